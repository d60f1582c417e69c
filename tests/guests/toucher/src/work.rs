//! What `toucher` does with its memory, the same on every architecture: a pattern by address and seed, put there and looked for.

use core::ops::Range;

use crate::{Machine, load64, println, store64};

pub const MIB: u64 = 1 << 20;
pub const PAGE: u64 = 4096;
/// A progress line for so much.
const STEP: u64 = 4 * MIB;

/// How a granule's tag is read and written, where granules have some.
#[derive(Clone, Copy)]
pub struct Tags {
    pub load: fn(u64) -> u8,
    pub store: fn(u64, u8),
}

/// Touches as much of `free` as the command line wants.
pub fn run(machine: &Machine, free: Range<u64>, tags: Option<Tags>) {
    let wanted = machine.number("mib").map_or(u64::MAX, |mib| mib.saturating_mul(MIB));
    let size = wanted.min(free.end - free.start) & !(MIB - 1);
    let pattern =
        Pattern { seed: machine.number("seed").unwrap_or(1), tags, churn: machine.argument("churn").is_some() };
    let range = free.start..free.start + size;
    println!("TOUCHER {} MiB at {:#x}, seed {}", size / MIB, range.start, pattern.seed);
    if machine.argument("zero").is_some() {
        let foreign = |address: &u64| load64(*address) != 0 || tags.is_some_and(|tags| (tags.load)(*address) != 0);
        let left = range.clone().step_by(8).filter(foreign).count();
        if left != 0 {
            println!("FAILED: {left} words of fresh memory are not zero");
            return;
        }
        println!("CLEAN {} MiB", size / MIB);
    }
    let mut step = range.start;
    while step < range.end {
        let end = (step + STEP).min(range.end);
        pattern.fill(step..end, 0);
        println!("TOUCHED {} MiB", (end - range.start) / MIB);
        step = end;
    }
    let holds = machine.argument("hold").is_some() || pattern.churn;
    for round in 1.. {
        let lost = pattern.verify(range.clone(), round - 1);
        if lost != 0 {
            println!("FAILED: {lost} words or tags were lost in round {round}");
            return;
        }
        println!("VERIFIED {} MiB, round {round}", size / MIB);
        if !holds {
            println!("ALL PASS 1");
            return;
        }
        pattern.change(range.clone(), round);
    }
}

/// What is kept, and where.
struct Pattern {
    seed: u64,
    tags: Option<Tags>,
    churn: bool,
}

impl Pattern {
    /// The word at an address whose page was last written in that round.
    fn word(&self, address: u64, round: u64) -> u64 {
        (address ^ self.seed << 48 ^ round << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31)
    }

    /// The tag of its granule.
    fn tag(&self, address: u64, round: u64) -> u8 {
        (self.word(address & !0xf, round) >> 21) as u8 & 0xf
    }

    /// Whether a page gets another pattern in that round.
    fn changes(&self, page: u64, round: u64) -> bool {
        self.churn && (page / PAGE + round).wrapping_mul(0x2545_f491_4f6c_dd1d) >> 62 == 0
    }

    /// When a page was written last.
    fn written(&self, page: u64, round: u64) -> u64 {
        (1..=round).rev().find(|round| self.changes(page, *round)).unwrap_or(0)
    }

    fn fill(&self, range: Range<u64>, round: u64) {
        for address in words(range) {
            store64(address, self.word(address, round));
            if let Some(tags) = self.tags {
                (tags.store)(address, self.tag(address, round));
            }
        }
    }

    fn change(&self, range: Range<u64>, round: u64) {
        for page in range.step_by(PAGE as usize).filter(|page| self.changes(*page, round)) {
            self.fill(page..page + PAGE, round);
        }
    }

    /// How many words and tags are not what was written; the first few are printed.
    fn verify(&self, range: Range<u64>, round: u64) -> u64 {
        let mut lost = 0;
        for page in range.step_by(PAGE as usize) {
            let round = self.written(page, round);
            for address in words(page..page + PAGE) {
                let word = (self.word(address, round), load64(address));
                let tag = self.tags.map_or((0, 0), |tags| (self.tag(address, round), (tags.load)(address)));
                if word.0 != word.1 || tag.0 != tag.1 {
                    lost += 1;
                    if lost <= 8 {
                        println!(
                            "LOST {address:#x}: expected {:#x}, found {:#x}; tags {} and {}",
                            word.0, word.1, tag.0, tag.1
                        );
                    }
                }
            }
        }
        lost
    }
}

/// The first and the last word of every 512 bytes: every page, every block, and their edges.
fn words(range: Range<u64>) -> impl Iterator<Item = u64> {
    range.step_by(512).flat_map(|address| [address, address + 504])
}
