//! What a dirty log costs, for a machine of 1 GiB in one slot, with 4 KiB entries (`bench=log`) and with 2 MiB ones
//! (`bench=split`).
//!
//! The log of a guest is its hypervisor's: a vendor call starts, fetches and ends it ([`DIRTY`]); for other hypervisors, a
//! register behind `service=ADDRESS` takes the same numbers. Each phase is as in the module above.

use core::arch::asm;

use guest_rt::machine::Machine;
use guest_rt::{memory, println, smccc};

use super::{BLOCK, PAGE, phase};

/// X1: 0 ends the log, 1 starts it, 2 fetches and clears that of slot X2, and answers how many pages it named.
const DIRTY: u64 = 0xc600_0010;
const STOP: u64 = 0;
const START: u64 = 1;
const GET: u64 = 2;
/// Pages that are dirty at each fetch.
const DIRTY_PAGES: u64 = 16_384;
/// How far apart they are: spread over most of the slot.
const STRIDE: u64 = 13 * PAGE;
/// Blocks that are split.
const BLOCKS: u64 = 400;
/// How often the log is fetched.
const ROUNDS: u64 = 3;
/// Pages besides that the guest writes to between two fetches: its stack, its console.
const OWN: u64 = 64;

/// Faults on write-protected pages, and fetches of the log.
pub fn log(machine: &Machine) {
    let start = first(machine, DIRTY_PAGES * STRIDE);
    let end = start + DIRTY_PAGES * STRIDE;
    (start..end).step_by(PAGE as usize).for_each(|page| memory::store64(page, page));
    ask(machine, START, 0);
    for _ in 0..ROUNDS {
        // Protected by the start, or by the fetch before.
        phase::<0xa00c>();
        for page in (start..end).step_by(STRIDE as usize) {
            measured!("str {0}, [{0}]", in(reg) page);
        }
        phase::<0xa00d>();
        let named = fetch(machine);
        assert!((DIRTY_PAGES..DIRTY_PAGES + OWN).contains(&named), "the log named {named} pages");
    }
    ask(machine, STOP, 0);
    // What was stored is still there.
    (start..end).step_by(PAGE as usize).for_each(|page| assert_eq!(memory::load64(page), page));
    println!("BENCH DONE");
}

/// Faults on write-protected blocks, and on the pages that these become.
pub fn split(machine: &Machine) {
    let start = first(machine, BLOCKS * BLOCK);
    let end = start + BLOCKS * BLOCK;
    (start..end).step_by(BLOCK as usize).for_each(|block| memory::store64(block, block));
    ask(machine, START, 0);
    phase::<0xa00e>();
    for block in (start..end).step_by(BLOCK as usize) {
        measured!("str {0}, [{0}]", in(reg) block);
    }
    phase::<0xa00f>();
    // In another order than the blocks', so that no fault finds what the one before left at hand.
    for page in (start..end).step_by(BLOCK as usize).flat_map(|block| [3, 100, 511].map(|page| block + page * PAGE)) {
        measured!("str {0}, [{0}]", in(reg) page);
    }
    ask(machine, STOP, 0);
    (start..end).step_by(BLOCK as usize).for_each(|block| assert_eq!(memory::load64(block), block));
    println!("BENCH DONE");
}

/// Where `size` bytes of free memory begin.
fn first(machine: &Machine, size: u64) -> u64 {
    let free = machine.free();
    let start = free.start.next_multiple_of(BLOCK);
    assert!(start + size <= free.end, "this machine has too little memory");
    start
}

fn ask(machine: &Machine, action: u64, slot: u64) {
    match machine.number("service") {
        Some(service) => memory::store64(service + 24, action),
        None => assert_eq!(smccc::hvc([DIRTY, action, slot, 0]), 0, "dirty log: {action}"),
    }
}

/// Fetches the log, and counts that: the call included. Another hypervisor's VMM counts for itself.
fn fetch(machine: &Machine) -> u64 {
    if let Some(service) = machine.number("service") {
        memory::store64(service + 24, GET);
        return memory::load64(service + 24);
    }
    let mut answer = DIRTY;
    measured!("hvc #0", inout("x0") answer, inout("x1") GET => _, inout("x2") 0u64 => _, inout("x3") 0u64 => _,
        clobber_abi("C"));
    answer
}
