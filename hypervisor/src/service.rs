//! Services for guests that their owner lets drive the hypervisor: measurements and tests.
//!
//! Function identifiers are of the vendor-specific hypervisor range (Arm DEN 0028, 6.2); without the policy they do not exist.

use entresol_addr::{GfnRange, Gpa, PAGE_SIZE};
use entresol_metal_arm64::cpu;
use entresol_mmu::CoalescedRing;

use crate::sched::VcpuRef;
use crate::vm::{Alias, LogOptions};

/// Takes the second-stage entries of a range away: X1 its first byte, X2 its length in bytes, both page-aligned. Contents
/// stay. Answers 0, or [`INVALID`].
const ZAP: u32 = 0xc600_0001;
/// Takes the coalesced writes that wait. Answers how many.
const DRAIN: u32 = 0xc600_0002;
/// Makes a slot that shows the machine's own memory a second time, or moves, changes or deletes the one of that number: X1 bits
/// 15:0 its number, 31:16 its flags, 63:32 the page of memory behind its first; X2 its address; X3 its bytes, 0 to delete.
/// Answers 0, or [`INVALID`].
const SLOT: u32 = 0xc600_0003;
/// The machine's dirty log: X1 0 ends it; 1 starts it; 2 fetches and clears that of slot X2, of at most 1 GiB, and answers how
/// many pages it named; 3 marks this moment; 4 forgets the mark. Answers 0 otherwise, or [`INVALID`].
const DIRTY: u32 = 0xc600_0010;
/// An argument breaks a rule.
const INVALID: u64 = -2i64 as u64;

/// The answer to a vendor call, or `None` if there is no such function.
#[cold]
pub fn call(vcpu: &VcpuRef, function: u32, [x1, x2, x3]: [u64; 3]) -> Option<u64> {
    if !vcpu.vm.config.policies.services {
        return None;
    }
    match function {
        ZAP => Some(zap(vcpu, x1, x2)),
        DRAIN => Some(core::iter::from_fn(|| vcpu.vm.posted.take()).take(CoalescedRing::ROOM).count() as u64),
        SLOT => Some(slot(vcpu, x1, x2, x3)),
        DIRTY => Some(dirty(vcpu, x1, x2)),
        _ => None,
    }
}

fn slot(vcpu: &VcpuRef, which: u64, base: u64, size: u64) -> u64 {
    let alias = Alias {
        number: which as u32 & 0xffff,
        flags: (which >> 16) as u32 & 0xffff,
        offset: (which >> 32) * PAGE_SIZE,
        base,
        size,
    };
    match vcpu.vm.set_alias(&alias) {
        Ok(()) => 0,
        Err(error) => {
            log::debug!("vm {}: no slot: {error}", vcpu.vm.config.name);
            INVALID
        }
    }
}

fn dirty(vcpu: &VcpuRef, action: u64, slot: u64) -> u64 {
    let vm = &vcpu.vm;
    let done = match action {
        0 => vm.stop_log().map(|_| 0),
        1 => vm.start_log(LogOptions::default()).map(|()| 0),
        2 => vm.take_dirty_log(slot as u16),
        3 => vm.mark().map(|()| 0),
        4 => vm.unmark().map(|()| 0),
        _ => return INVALID,
    };
    done.unwrap_or_else(|error| {
        log::debug!("vm {}: dirty log: {error}", vm.config.name);
        INVALID
    })
}

fn zap(vcpu: &VcpuRef, start: u64, size: u64) -> u64 {
    if !start.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) {
        return INVALID;
    }
    // No grace period is pinned here: only memory aborts pin, and this is a call.
    match GfnRange::new(Gpa::new(start).frame(), size / PAGE_SIZE).map(|range| vcpu.vm.memory.zap(cpu::index(), range))
    {
        Some(Ok(())) => 0,
        Some(Err(_)) | None => INVALID,
    }
}
