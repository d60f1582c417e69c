//! Accesses to devices: the data's way between a register and a device, whole and once.
//!
//! Known hole: an access that the hardware does not describe (pairs, writeback, SIMD) is not decoded; the guest gets an
//! external abort.

use entresol_fault::{Access, Fault, Transfer};
use entresol_metal_arm64::live;
use entresol_mmu::Abort;

use super::{Next, memory};
use crate::counters::Reason;
use crate::sched::VcpuRef;
use crate::vcpu::State;
use crate::vm::Claim;

/// Performs the access of `fault`, which no memory serves.
#[inline]
pub fn access(vcpu: &VcpuRef, state: &mut State, fault: &Fault, esr: u64, far: u64) -> Next {
    let Some(transfer) = fault.transfer else {
        vcpu.vm.counters.bump(Reason::NoSyndrome);
        memory::inject(state, fault, far, Abort::External);
        return Next::Again;
    };
    vcpu.vm.counters.bump(Reason::Mmio);
    let claim = if fault.access == Access::Write {
        let value = order(state, truncate(state.read(transfer.register), transfer.size), transfer.size);
        vcpu.vm.device_write(vcpu, state, fault.gpa, transfer.size, value)
    } else {
        let claim = vcpu.vm.device_read(vcpu, state, fault.gpa, transfer.size);
        if let Claim::Value(value) = claim {
            let value = order(state, truncate(value, transfer.size), transfer.size);
            state.write(transfer.register, extend(value, &transfer));
        }
        claim
    };
    match claim {
        Claim::Value(_) | Claim::Done => {
            state.skip(esr);
            Next::Again
        }
        Claim::Look => {
            state.skip(esr);
            Next::Look
        }
        Claim::Abort => {
            memory::inject(state, fault, far, Abort::External);
            Next::Again
        }
    }
}

/// SCTLR_EL1.E0E: data is big-endian at EL0 (Arm DDI 0487 D24.2, SCTLR_EL1).
const SCTLR_E0E: u64 = 1 << 24;
/// SCTLR_EL1.EE: data is big-endian at EL1.
const SCTLR_EE: u64 = 1 << 25;
/// PSTATE.EL.
const PSTATE_EL: u64 = 0b1100;
/// PSTATE.nRW: AArch32.
const PSTATE_AARCH32: u64 = 1 << 4;
/// PSTATE.E, in AArch32 only.
const PSTATE_E: u64 = 1 << 9;

/// `value` as the guest's byte order at this moment has it.
fn order(state: &State, value: u64, size: u8) -> u64 {
    let pstate = state.regs.pstate;
    let big = if pstate & PSTATE_AARCH32 != 0 {
        pstate & PSTATE_E != 0
    } else {
        let flag = if pstate & PSTATE_EL == 0 { SCTLR_E0E } else { SCTLR_EE };
        live::sctlr_el1() & flag != 0
    };
    if big && size > 1 { value.swap_bytes() >> (64 - u32::from(size) * 8) } else { value }
}

/// The low `size` bytes.
const fn truncate(value: u64, size: u8) -> u64 {
    if size >= 8 { value } else { value & ((1 << (size * 8)) - 1) }
}

/// A loaded value as it lands in the register (Arm DDI 0487 C6.2, LDR and LDRS*).
const fn extend(value: u64, transfer: &Transfer) -> u64 {
    let value = truncate(value, transfer.size);
    if !transfer.sign_extend || transfer.size >= 8 {
        return value;
    }
    let unused = 64 - transfer.size as u32 * 8;
    let signed = ((value << unused) as i64 >> unused) as u64;
    if transfer.wide { signed } else { signed & 0xffff_ffff }
}
