//! `entresol ctl dirty` and `ctl young`: which pages a virtual machine wrote or used.
//!
//! Pages are asked for piece by piece until the hypervisor says that there are no more; runs that meet are joined.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use entresol_wire::control::{Answer, Bytes, CONSOLE_CHUNK, Dirty, Op, PagePlace, PageRun, SlotRow};

use crate::client::{Client, ClientError, unexpected};

/// Pages that a word of a log names.
const WORD: u64 = 64;
/// Pages that one request can clear: a multiple of a word's.
const CLEARED: u64 = (CONSOLE_CHUNK * 8) as u64;

const _: () = assert!(CLEARED.is_multiple_of(WORD));

/// What `entresol ctl dirty VM` can do.
#[derive(Clone, Debug, Subcommand)]
pub enum What {
    /// Keep a dirty log of the memory, while it runs
    Start {
        /// `get` does not clear what it tells; `clear` does
        #[arg(long)]
        manual: bool,
        /// Split blocks at once, not by the guest's first writes
        #[arg(long)]
        ahead: bool,
        /// Give each vCPU a ring of N entries: a power of two from 128 to 65536
        #[arg(long, value_name = "N")]
        ring: Option<u32>,
    },
    /// Show the pages that were written since they were shown last
    Get,
    /// Clear what `get --json` has named in a log that was started with --manual
    Clear {
        /// A file with that answer
        named: PathBuf,
    },
    /// Take the pages that stand in the rings; a machine that waits for a full ring goes on
    Harvest,
    /// End the log, and put blocks together again
    Stop,
    /// Remember the memory as it is now, for `since`
    Mark,
    /// Show the pages that were written since `mark`
    Since,
    /// Forget the mark
    Unmark,
}

/// Why it did not work.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// The hypervisor or the way to it.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The file with pages to clear.
    #[error("{path}: {error}")]
    File {
        /// Its path.
        path: String,
        /// What is wrong.
        error: io::Error,
    },
}

/// What there is to show.
pub enum Shown {
    /// Nothing but that it is done.
    Done,
    /// Pages, and the slots that they are in.
    Pages(Vec<PageRun>, Vec<SlotRow<'static>>),
    /// A number of pages.
    Count(u64),
}

/// Carries `what` out on `vm`.
///
/// # Errors
/// [`DirtyError`].
pub fn run(client: &mut Client, vm: &str, what: What) -> Result<Shown, DirtyError> {
    match what {
        What::Start { manual, ahead, ring } => done(client, vm, Dirty::Start { manual, ahead, ring }),
        What::Stop => done(client, vm, Dirty::Stop),
        What::Mark => done(client, vm, Dirty::Mark),
        What::Unmark => done(client, vm, Dirty::Unmark),
        What::Get => shown(client, vm, Dirty::Get),
        What::Since => shown(client, vm, Dirty::Since),
        What::Harvest => shown(client, vm, |_| Dirty::Harvest),
        What::Clear { named } => {
            let runs = read(&named)?;
            let mut cleared = 0;
            for (at, bits) in bitmaps(&runs) {
                let op = Op::Dirty { vm: vm.into(), what: Dirty::Clear { at, bits: Bytes::from(bits.as_slice()) } };
                match client.call(op.clone())? {
                    Answer::Count(count) => cleared += count,
                    other => return Err(unexpected(&op, &other).into()),
                }
            }
            Ok(Shown::Count(cleared))
        }
    }
}

fn done(client: &mut Client, vm: &str, what: Dirty<'_>) -> Result<Shown, DirtyError> {
    let op = Op::Dirty { vm: vm.into(), what };
    match client.call(op.clone())? {
        Answer::Done => Ok(Shown::Done),
        other => Err(unexpected(&op, &other).into()),
    }
}

fn shown(client: &mut Client, vm: &str, what: impl Fn(PagePlace) -> Dirty<'static>) -> Result<Shown, DirtyError> {
    let runs = client.pages(vm, what)?;
    Ok(Shown::Pages(runs, client.slots(vm)?))
}

/// Runs of pages out of an answer that was kept.
fn read(path: &Path) -> Result<Vec<PageRun>, DirtyError> {
    let file = |error| DirtyError::File { path: path.display().to_string(), error };
    let text = fs::read(path).map_err(file)?;
    serde_json::from_slice(&text).map_err(|error| file(io::Error::other(error)))
}

/// The runs as bits: for each request the place of its first bit, and whole words.
fn bitmaps(runs: &[PageRun]) -> Vec<(PagePlace, Vec<u8>)> {
    let mut maps: Vec<(PagePlace, Vec<u8>)> = Vec::new();
    for PageRun(slot, first, count) in runs.iter().copied() {
        for page in first..first.saturating_add(count) {
            let start = page / CLEARED * CLEARED;
            let at = PagePlace { slot, page: start };
            if maps.last().is_none_or(|(last, _)| *last != at) {
                maps.push((at, Vec::new()));
            }
            let (_, bits) = maps.last_mut().expect("one was just put there");
            let words = ((page - start) / WORD + 1) as usize;
            bits.resize(bits.len().max(words * size_of::<u64>()), 0);
            bits[((page - start) / 8) as usize] |= 1 << (page % 8);
        }
    }
    maps
}

/// Joins runs that meet, in the order in which they came.
pub fn joined(runs: impl IntoIterator<Item = PageRun>) -> Vec<PageRun> {
    let mut all: Vec<PageRun> = Vec::new();
    for run in runs {
        match all.last_mut() {
            Some(last) if last.0 == run.0 && last.1.checked_add(last.2) == Some(run.1) => last.2 += run.2,
            _ => all.push(run),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_meet_are_one() {
        let runs = [PageRun(0, 1, 2), PageRun(0, 3, 1), PageRun(0, 5, 1), PageRun(1, 6, 1), PageRun(1, 7, 9)];
        assert_eq!(joined(runs), [PageRun(0, 1, 3), PageRun(0, 5, 1), PageRun(1, 6, 10)]);
    }

    #[test]
    fn bits_name_exactly_the_pages_of_the_runs() {
        let runs = [PageRun(0, 3, 2), PageRun(0, 63, 2), PageRun(0, CLEARED - 1, 2), PageRun(7, 0, 1)];
        let mut pages = Vec::new();
        for (at, bits) in bitmaps(&runs) {
            assert!(at.page.is_multiple_of(WORD) && bits.len().is_multiple_of(8) && bits.len() <= CONSOLE_CHUNK);
            let set = (0..bits.len() as u64 * 8).filter(|bit| bits[(bit / 8) as usize] >> (bit % 8) & 1 != 0);
            pages.extend(set.map(|bit| (at.slot, at.page + bit)));
        }
        let expected = [(0, 3), (0, 4), (0, 63), (0, 64), (0, CLEARED - 1), (0, CLEARED), (7, 0)];
        assert_eq!(pages, expected);
    }
}
