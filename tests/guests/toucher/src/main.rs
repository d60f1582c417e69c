//! Touches its memory bit by bit, keeps a pattern in it, and reads it all back: for machines that have too little.
//!
//! Command line: `mib=N` touches N MiB (all free memory if absent); `seed=N` changes the pattern; `hold` keeps what was
//! touched and verifies it again and again until the guest is killed; `zero` looks at every word of it first, which must
//! be zero: `CLEAN n MiB`, else `FAILED`; `whole` takes the device tree's place too. Prints `TOUCHED n MiB` for every 4 MiB, then
//! `VERIFIED n MiB`; a word that is not what was written is `LOST`.

#![no_std]
#![no_main]

use core::ops::Range;

use guest_rt::machine::Machine;
use guest_rt::memory::{load64, store64};
use guest_rt::{guest, println};

guest!(main);

const MIB: u64 = 1 << 20;
/// A progress line for so much.
const STEP: u64 = 4 * MIB;

fn main(machine: &Machine) {
    let free = if machine.argument("whole").is_some() { machine.behind_image() } else { machine.free() };
    let wanted = machine.number("mib").map_or(u64::MAX, |mib| mib.saturating_mul(MIB));
    let size = wanted.min(free.end - free.start) & !(MIB - 1);
    let seed = machine.number("seed").unwrap_or(1);
    let range = free.start..free.start + size;
    println!("TOUCHER {} MiB at {:#x}, seed {seed}", size / MIB, range.start);
    if machine.argument("zero").is_some() {
        let left = range.clone().step_by(8).filter(|address| load64(*address) != 0).count();
        if left != 0 {
            println!("FAILED: {left} words of fresh memory are not zero");
            return;
        }
        println!("CLEAN {} MiB", size / MIB);
    }
    let mut step = range.start;
    while step < range.end {
        let end = (step + STEP).min(range.end);
        fill(step..end, seed);
        println!("TOUCHED {} MiB", (end - range.start) / MIB);
        step = end;
    }
    let mut round = 1u64;
    loop {
        let lost = verify(range.clone(), seed);
        if lost != 0 {
            println!("FAILED: {lost} words were lost in round {round}");
            return;
        }
        println!("VERIFIED {} MiB, round {round}", size / MIB);
        if machine.argument("hold").is_none() {
            println!("ALL PASS 1");
            return;
        }
        round += 1;
    }
}

fn pattern(address: u64, seed: u64) -> u64 {
    (address ^ seed << 48).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31)
}

/// The first and the last word of every 512 bytes: every page, every block, and their edges.
fn words(range: Range<u64>) -> impl Iterator<Item = u64> {
    range.step_by(512).flat_map(|address| [address, address + 504])
}

fn fill(range: Range<u64>, seed: u64) {
    words(range).for_each(|address| store64(address, pattern(address, seed)));
}

/// How many words are not what was written; the first few are printed.
fn verify(range: Range<u64>, seed: u64) -> u64 {
    let mut lost = 0;
    for address in words(range) {
        let (expected, found) = (pattern(address, seed), load64(address));
        if expected != found {
            lost += 1;
            if lost <= 8 {
                println!("LOST {address:#x}: expected {expected:#x}, found {found:#x}");
            }
        }
    }
    lost
}
