//! Random stores of every kind, and which pages they went to: what a dirty log has to name. It talks with its owner as arm64's guest
//! `dirty` does.
//!
//! Rounds, as many as `rounds=N` says, with `seed=N`: the guest says `READY round first pages`; waits until its owner shows it memory at
//! `go=ADDRESS`, where it reads ones before; stores to random pages of the range; says `WROTE` with a bit for each page, 64 in a word,
//! and `DONE`; waits until what was shown is gone. Everything else that it writes (stack, tables, its own records) lies outside the range.
#![no_std]
#![no_main]

use core::arch::asm;

use guest_x86_rt::rng::Rng;
use guest_x86_rt::{Machine, guest, println};

guest!(main);

const PAGE: u64 = 4096;
/// The range: some blocks of 2 MiB, behind the image.
const START: u64 = 16 << 20;
const RANGE: u64 = 16 << 20;
const WORDS: usize = (RANGE / PAGE / 64) as usize;
/// Stores of a round.
const STORES: u64 = 3000;
/// Every so often a store goes anywhere, else near the one before.
const FAR: u64 = 4;

fn load(address: u64) -> u64 {
    let value;
    // SAFETY: reads nothing that Rust owns; what is no memory reads as ones.
    unsafe { asm!("mov {}, [{}]", out(reg) value, in(reg) address, options(nostack, preserves_flags, readonly)) };
    value
}

/// One store of a random kind to `address`, which is a multiple of 64 and in the range.
fn store(rng: &mut Rng, address: u64) {
    let value = rng.draw();
    // SAFETY: all of them: 64 bytes from the address on are in the range, where no Rust object is.
    unsafe {
        match rng.below(8) {
            0 => asm!("mov [{}], {}", in(reg) address + rng.below(64), in(reg_byte) value as u8, options(nostack)),
            1 => asm!("mov [{} + 4], {:e}", in(reg) address, in(reg) value, options(nostack)),
            2 => asm!("movnti [{} + 8], {}", in(reg) address, in(reg) value, options(nostack)),
            3 => asm!("xchg [{}], {}", in(reg) address, inout(reg) value => _, options(nostack)),
            4 => asm!("lock xadd [{} + 16], {}", in(reg) address, inout(reg) value => _, options(nostack)),
            5 => {
                asm!("rep stosq", inout("rdi") address => _, inout("rcx") 8_u64 => _, in("rax") value, options(nostack))
            }
            6 => asm!("bts qword ptr [{}], {}", in(reg) address + 24, in(reg) value & 63, options(nostack)),
            _ => asm!("mov {old}, rsp", "lea rsp, [{at} + 64]", "push {value}", "mov rsp, {old}",
                old = out(reg) _, at = in(reg) address, value = in(reg) value),
        }
    }
}

/// Stores, and what they went to.
fn work(seed: u64, written: &mut [u64; WORDS]) {
    let mut rng = Rng::new(seed);
    let mut page = 0;
    for _ in 0..STORES {
        page = if rng.below(FAR) == 0 { rng.below(RANGE / PAGE) } else { (page + rng.below(3)) % (RANGE / PAGE) };
        written[(page / 64) as usize] |= 1 << (page % 64);
        let line = rng.below(PAGE / 64) * 64;
        store(&mut rng, START + page * PAGE + line);
        // A read beside it: reads name nothing.
        load(START + rng.below(RANGE / PAGE) * PAGE);
    }
}

fn round(number: u64, seed: u64, go: u64) {
    let mut written = [0; WORDS];
    println!("READY {number} {} {}", START / PAGE, RANGE / PAGE);
    while load(go) == u64::MAX {}
    work(seed.wrapping_mul(1000).wrapping_add(number * 16), &mut written);
    for (index, word) in written.iter().enumerate() {
        println!("WROTE {index} {word:#x}");
    }
    println!("DONE {number}");
    while load(go) != u64::MAX {}
}

fn main(machine: &Machine) {
    let number = |name| machine.number(name).unwrap_or_else(|| panic!("{name}= is missing"));
    // Everything is there before the first round: what is only read is never made.
    let mut rng = Rng::new(number("seed"));
    (0..RANGE / PAGE).for_each(|page| store(&mut rng, START + page * PAGE));
    for round_number in 0..number("rounds") {
        round(round_number, number("seed"), number("go"));
    }
    println!("ALL PASS");
}
