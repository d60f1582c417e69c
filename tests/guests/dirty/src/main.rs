//! Random stores of every kind from all CPUs, and which pages they went to: what a dirty log has to name.
//!
//! Rounds, as many as `rounds=N` says, with `seed=N`: the guest says `READY round first pages`; waits until its owner shows it
//! memory at `go=ADDRESS`; stores to random pages of the range; says `WROTE` with a bit for each page, 64 in a word, and `DONE`;
//! waits until what was shown is gone. Everything else that it writes (stacks, its own records) lies outside the range.

#![no_std]
#![no_main]

use core::arch::asm;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use guest_rt::machine::{Machine, RAM};
use guest_rt::rng::Rng;
use guest_rt::trap::probe;
use guest_rt::{guest, memory, println, smp};

guest!(main);

const PAGE: u64 = 0x1000;
/// Bytes of the range: some blocks of 2 MiB.
const RANGE: u64 = 16 << 20;
const WORDS: usize = (RANGE / PAGE / 64) as usize;
/// Stores of one CPU in a round.
const STORES: u64 = 1500;
/// Every so often a store goes anywhere, else near the one before.
const FAR: u64 = 4;

static WRITTEN: [AtomicU64; WORDS] = [const { AtomicU64::new(0) }; WORDS];
/// The range's start, and the seed of the round.
static START: AtomicU64 = AtomicU64::new(0);
static SEED: AtomicU64 = AtomicU64::new(0);
/// CPUs that have not ended the round.
static BUSY: AtomicUsize = AtomicUsize::new(0);

/// One store of a random kind to `address`, which is a multiple of 64 and outside the image.
fn store(rng: &mut Rng, address: u64) {
    let value = rng.draw();
    match rng.below(8) {
        0 => memory::store8(address + rng.below(64), value as u8),
        1 => memory::store32(address + 4, value as u32),
        2 => memory::store64(address + 8, value),
        // SAFETY: the address is in the range, where no Rust object is.
        3 => unsafe { asm!("stp {v}, {v}, [{a}, #16]", v = in(reg) value, a = in(reg) address, options(nostack)) },
        // SAFETY: as above.
        4 => unsafe {
            asm!("2: ldxr {t}, [{a}]", "add {t}, {t}, {v}", "stxr {s:w}, {t}, [{a}]", "cbnz {s:w}, 2b",
                t = out(reg) _, s = out(reg) _, v = in(reg) value, a = in(reg) address, options(nostack))
        },
        // SAFETY: as above.
        5 => unsafe {
            asm!(".arch_extension lse", "ldadd {v}, {t}, [{a}]", ".arch_extension nolse",
                v = in(reg) value, t = out(reg) _, a = in(reg) address, options(nostack))
        },
        // SAFETY: as above.
        6 => unsafe {
            asm!("str {v}, [{a}], #8", "str {v}, [{a}, #8]!", v = in(reg) value, a = inout(reg) address => _,
                options(nostack))
        },
        // SAFETY: as above.
        _ => unsafe { asm!("stlr {v}, [{a}]", v = in(reg) value, a = in(reg) address, options(nostack)) },
    }
}

/// A CPU's part of a round.
fn work(cpu: usize) {
    let start = START.load(Ordering::Acquire);
    let mut rng = Rng::new(SEED.load(Ordering::Acquire) + cpu as u64);
    let mut page = 0;
    for _ in 0..STORES {
        page = if rng.below(FAR) == 0 { rng.below(RANGE / PAGE) } else { (page + rng.below(3)) % (RANGE / PAGE) };
        WRITTEN[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Relaxed);
        let line = rng.below(PAGE / 64) * 64;
        store(&mut rng, start + page * PAGE + line);
        // A read beside it: reads name nothing.
        memory::load64(start + rng.below(RANGE / PAGE) * PAGE);
    }
    BUSY.fetch_sub(1, Ordering::AcqRel);
}

fn round(machine: &Machine, number: u64, seed: u64, go: u64) {
    let start = START.load(Ordering::Acquire);
    WRITTEN.iter().for_each(|word| word.store(0, Ordering::Relaxed));
    SEED.store(seed.wrapping_mul(1000).wrapping_add(number * 16), Ordering::Release);
    println!("READY {number} {} {}", (start - RAM) / PAGE, RANGE / PAGE);
    while probe::load64(go, 0).is_err() {}
    BUSY.store(machine.cpus, Ordering::Release);
    for cpu in 1..machine.cpus {
        assert_eq!(smp::on(cpu, work), Ok(()), "CPU {cpu} does not start");
    }
    work(0);
    while BUSY.load(Ordering::Acquire) != 0 || (1..machine.cpus).any(|cpu| smp::state(cpu) != 1) {}
    for (index, word) in WRITTEN.iter().enumerate() {
        println!("WROTE {index} {:#x}", word.load(Ordering::Relaxed));
    }
    println!("DONE {number}");
    while probe::load64(go, 0).is_ok() {}
}

fn main(machine: &Machine) {
    let start = machine.free().start.next_multiple_of(2 << 20);
    assert!(start + RANGE <= machine.free().end, "this machine has too little memory");
    START.store(start, Ordering::Release);
    // Everything is there before the first round: what is only read is never made.
    (0..RANGE / PAGE).for_each(|page| memory::store64(start + page * PAGE, page));
    let number = |name| machine.number(name).unwrap_or_else(|| panic!("{name}= is missing"));
    for round_number in 0..number("rounds") {
        round(machine, round_number, number("seed"), number("go"));
    }
    println!("ALL PASS");
}
