//! Memory through every kind of mapping: MMU off, then Cacheable, Non-cacheable and Device, set/way maintenance, code
//! that changes itself, first touches by every form of access. Each test says whether data was right.
//!
//! The order matters: memory is written with the MMU off first, as a boot loader does, and what was written must be what
//! every later mapping reads.

#![no_std]
#![no_main]

mod aliases;
mod code;
mod first_touch;
mod set_way;
mod stage1;

use core::ops::Range;

use guest_rt::guest;
use guest_rt::machine::Machine;
use guest_rt::memory::{load64, store64};
use guest_rt::mmu::{self, Kind, Space};
use guest_rt::report::{Differs, Report, same};

guest!(main);

/// Where memory is mapped Non-cacheable, as Device, Write-through, besides its own addresses.
pub const NON_CACHEABLE: u64 = 0x20_0000_0000;
/// See [`NON_CACHEABLE`].
pub const DEVICE: u64 = 0x30_0000_0000;
/// See [`NON_CACHEABLE`].
pub const WRITE_THROUGH: u64 = 0x40_0000_0000;

const PAGE: u64 = 0x1000;

/// Memory that nobody touched yet, given out from its start.
pub struct Fresh(Range<u64>);

impl Fresh {
    /// So many bytes, page-aligned.
    pub fn take(&mut self, size: u64) -> Range<u64> {
        let start = self.0.start;
        self.0.start += size.next_multiple_of(PAGE);
        assert!(self.0.start <= self.0.end, "this machine has too little memory");
        start..start + size
    }
}

fn main(machine: &Machine) {
    let mut report = Report::default();
    let mut fresh = Fresh(machine.free());
    // Pages of one block and of the next: whatever size the hypervisor maps.
    let data = fresh.take(4 << 20);
    report.check("fresh memory is zero", is_zero(&data));
    report.check("mmu off: data", fill_and_verify(&data, 1));
    report.check("mmu off: code that changes", code::changes(fresh.take(PAGE), 0));
    first_touch::while_off(&mut report, &mut fresh);

    let mut space = Space::new(fresh.take(256 << 10));
    space.map(0x0800_0000, 0x0800_0000, 64 << 20, Kind::Device, true);
    let ram = guest_rt::machine::RAM;
    for (base, kind) in [
        (0, Kind::Cacheable),
        (NON_CACHEABLE, Kind::NonCacheable),
        (DEVICE, Kind::Device),
        (WRITE_THROUGH, Kind::WriteThrough),
    ] {
        space.map(base + ram, ram, machine.memory, kind, true);
    }
    mmu::enable(&space);
    report.check("mmu on: data written before", verify(&data, 1));
    report.check("mmu on: data", fill_and_verify(&data, 2));
    aliases::run(&mut report, fresh.take(1 << 20));
    report.check("set/way: data", set_way::run(&fresh.take(1 << 20)));
    report.check("mmu on: code that changes", code::changes(fresh.take(PAGE), 0));
    report.check("code written Non-cacheable", code::changes(fresh.take(PAGE), NON_CACHEABLE));
    report.check("code written as Device", code::changes(fresh.take(PAGE), DEVICE));
    first_touch::while_on(&mut report, &mut fresh);
    stage1::run(&mut report, &mut space, &mut fresh);
    report.check("mmu off and on 64 times", toggles(&space, &data));
    report.end();
}

fn pattern(address: u64, salt: u64) -> u64 {
    (address ^ salt << 56).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Writes a pattern of the addresses.
pub fn fill(range: &Range<u64>, salt: u64) {
    range.clone().step_by(8).for_each(|address| store64(address, pattern(address, salt)));
}

/// Reads the pattern back.
pub fn verify(range: &Range<u64>, salt: u64) -> Result<(), Differs<u64>> {
    range.clone().step_by(8).try_for_each(|address| same(address, pattern(address, salt), load64(address)))
}

fn fill_and_verify(range: &Range<u64>, salt: u64) -> Result<(), Differs<u64>> {
    fill(range, salt);
    verify(range, salt)
}

fn is_zero(range: &Range<u64>) -> Result<(), Differs<u64>> {
    range.clone().step_by(8).try_for_each(|address| same(address, 0, load64(address)))
}

/// What is written on one side of a switch is read on the other.
fn toggles(space: &Space, data: &Range<u64>) -> Result<(), Differs<u64>> {
    let part = data.start..data.start + 16 * PAGE;
    for round in 0..64 {
        fill(&part, round);
        guest_rt::memory::each_line(part.clone(), guest_rt::memory::clean_invalidate);
        mmu::disable();
        let read = verify(&part, round);
        fill(&part, round + 100);
        mmu::enable(space);
        read?;
        verify(&part, round + 100)?;
    }
    Ok(())
}
