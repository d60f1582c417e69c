//! Touches its memory bit by bit, keeps a pattern in it, and reads it all back: for machines that have too little.
//!
//! Command line: `mib=N` touches N MiB (all free memory if absent); `seed=N` changes the pattern; `tags` gives its granules tags by a
//! pattern too, with the MMU on; `hold` keeps what was touched and verifies it again and again until the guest is killed; `churn` does
//! so and gives about every fourth page a new pattern each time; `zero` looks at every word of it first, which must be zero, and with `tags`
//! at every tag: `CLEAN n MiB`, else `FAILED`; `whole` takes the device tree's place too. Prints `TOUCHED n MiB` for every 4 MiB, then
//! `VERIFIED n MiB`; a word, or a granule, that is not what was written is `LOST`.

#![no_std]
#![no_main]

use core::ops::Range;

use guest_rt::machine::{Machine, RAM};
use guest_rt::memory::{load_tag, load64, store_tag, store64};
use guest_rt::mmu::{self, Kind, Space};
use guest_rt::{guest, println};

guest!(main);

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// A progress line for so much.
const STEP: u64 = 4 * MIB;
/// Room for stage-1 tables.
const TABLES: u64 = 64 * PAGE;

fn main(machine: &Machine) {
    let free = if machine.argument("whole").is_some() { machine.behind_image() } else { machine.free() };
    let tags = machine.argument("tags").is_some();
    let start = if tags { see_tags(machine, free.start) } else { free.start };
    let wanted = machine.number("mib").map_or(u64::MAX, |mib| mib.saturating_mul(MIB));
    let size = wanted.min(free.end - start) & !(MIB - 1);
    let pattern =
        Pattern { seed: machine.number("seed").unwrap_or(1), tags, churn: machine.argument("churn").is_some() };
    let range = start..start + size;
    println!("TOUCHER {} MiB at {:#x}, seed {}", size / MIB, range.start, pattern.seed);
    if machine.argument("zero").is_some() {
        let foreign = |address: &u64| load64(*address) != 0 || tags && load_tag(*address) != 0;
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

/// Turns the MMU on, with all memory tagged; where memory is free behind the tables.
fn see_tags(machine: &Machine, free: u64) -> u64 {
    let tables = free.next_multiple_of(PAGE);
    let mut space = Space::new(tables..tables + TABLES);
    space.map(0x0800_0000, 0x0800_0000, 64 << 20, Kind::Device, true);
    space.map(RAM, RAM, machine.memory, Kind::Tagged, true);
    mmu::enable(&space);
    mmu::enable_tags();
    tables + TABLES
}

/// What is kept, and where.
struct Pattern {
    seed: u64,
    tags: bool,
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
            if self.tags {
                store_tag(address, self.tag(address, round));
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
                let tag = if self.tags { (self.tag(address, round), load_tag(address)) } else { (0, 0) };
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
