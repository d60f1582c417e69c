//! Fills pages of a file with numbers, and says whether they still hold them: memory of a Linux guest, if the file is in a
//! file system in memory.
//!
//! `pages fill|check FILE SEED FIRST COUNT`. Every page differs from every other of the same seed, and from those of
//! another seed; the same seed has the same pages everywhere. `check` names the first page that is wrong, and fails.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;
/// Pages that are read or written at once.
const CHUNK: u64 = 16;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [what, path, numbers @ ..] = arguments.as_slice() else { return Err(usage()) };
    let numbers = numbers.iter().map(|number| number.parse::<u64>()).collect::<std::result::Result<Vec<_>, _>>();
    let Ok([seed, first, count]) = numbers.as_deref() else { return Err(usage()) };
    let chunks = (*first..first.saturating_add(*count)).step_by(CHUNK as usize);
    let chunks = chunks.map(|start| (start, content(*seed, start, CHUNK.min(first + count - start))));
    match what.as_str() {
        "fill" => {
            let file = File::options().write(true).create(true).truncate(false).open(path)?;
            chunks.into_iter().try_for_each(|(start, bytes)| file.write_all_at(&bytes, start * PAGE as u64))
        }
        "check" => {
            let file = File::open(path)?;
            chunks.into_iter().try_for_each(|(start, bytes)| check(&file, start, &bytes))
        }
        _ => Err(usage()),
    }
}

fn usage() -> Error {
    Error::new(ErrorKind::InvalidInput, "pages fill|check FILE SEED FIRST COUNT")
}

fn check(file: &File, start: u64, expected: &[u8]) -> Result<()> {
    let mut found = vec![0; expected.len()];
    file.read_exact_at(&mut found, start * PAGE as u64)?;
    let wrong = found.chunks(PAGE).zip(expected.chunks(PAGE)).position(|(found, expected)| found != expected);
    match wrong {
        Some(index) => Err(Error::other(format!("page {} holds something else", start + index as u64))),
        None => Ok(()),
    }
}

/// `count` pages from number `first` on.
fn content(seed: u64, first: u64, count: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count as usize * PAGE);
    for page in first..first + count {
        // An odd factor: no two pages, and no two of 2^24 seeds, begin alike; nor is 0 among them.
        let mut state = ((seed + 1) << 40 | page).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for _ in 0..PAGE / 8 {
            bytes.extend_from_slice(&state.to_le_bytes());
            // xorshift64 (Marsaglia, 2003).
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
        }
    }
    bytes
}
