//! Services for guests that their owner lets drive the hypervisor: measurements and tests.
//!
//! Function identifiers are of the vendor-specific hypervisor range (Arm DEN 0028, 6.2); without the policy they do not exist.

use entresol_addr::{GfnRange, Gpa, PAGE_SIZE};
use entresol_metal_arm64::cpu;
use entresol_mmu::CoalescedRing;

use crate::sched::VcpuRef;

/// Takes the second-stage entries of a range away: X1 its first byte, X2 its length in bytes, both page-aligned. Contents
/// stay. Answers 0, or [`INVALID`].
const ZAP: u32 = 0xc600_0001;
/// Takes the coalesced writes that wait. Answers how many.
const DRAIN: u32 = 0xc600_0002;
/// An argument breaks a rule.
const INVALID: u64 = -2i64 as u64;

/// The answer to a vendor call, or `None` if there is no such function.
#[cold]
pub fn call(vcpu: &VcpuRef, function: u32, x1: u64, x2: u64) -> Option<u64> {
    if !vcpu.vm.config.policies.services {
        return None;
    }
    match function {
        ZAP => Some(zap(vcpu, x1, x2)),
        DRAIN => Some(core::iter::from_fn(|| vcpu.vm.posted.take()).take(CoalescedRing::ROOM).count() as u64),
        _ => None,
    }
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
