//! Pages that come back from the swap device.
//!
//! Each lies far from the next, so that none is read ahead. The machine has one vCPU: what is between the markers is the fault, everything that is
//! done for it, and whatever the hypervisor does while nobody can run; the device's own time costs no instruction.

use core::arch::asm;

use guest_rt::machine::Machine;
use guest_rt::{memory, println, smccc, timer};

use crate::{ALONE, PAGE, phase};

/// Puts so many bytes of the machine's memory on the swap device; with 0 says how many pages are there, or [`BUSY`].
const RECLAIM: u64 = 0xc600_0011;
/// Some are leaving yet.
const BUSY: u64 = -2i64 as u64;
/// Pages, and pages from one to the next: more than are read ahead.
const COUNT: u64 = 512;
const STRIDE: u64 = 16;

pub fn swap(machine: &Machine) {
    let start = machine.free().start.next_multiple_of(PAGE);
    let addresses = (0..COUNT).map(|index| start + index * STRIDE * PAGE);
    for address in addresses.clone() {
        memory::store64(address, address);
    }
    leave();
    phase::<0xa015>();
    read(addresses.clone());
    leave();
    phase::<0xa016>();
    read(addresses);
    println!("BENCH DONE");
}

/// Until all of them are out, and the hypervisor has nothing to do: the hand takes what was not used since it came last.
fn leave() {
    phase::<0xa000>();
    assert_eq!(smccc::hvc([RECLAIM, COUNT * STRIDE * PAGE, 0, 0]), 0, "the hypervisor reclaims nothing");
    let out = loop {
        let out = smccc::hvc([RECLAIM, 0, 0, 0]);
        if out != BUSY {
            break out;
        }
        // The hypervisor works while this one sleeps.
        timer::arm_virtual_at(timer::now() + timer::frequency() / 1000);
        timer::wait_for_interrupt();
    };
    assert!(out >= COUNT, "{out} pages are out");
    while smccc::hvc([ALONE, 0, 0, 0]) == 0 {}
}

fn read(addresses: impl Iterator<Item = u64>) {
    for address in addresses {
        let value: u64;
        measured!("ldr {}, [{}]", out(reg) value, in(reg) address);
        assert_eq!(value, address, "a page has lost its content");
    }
}
