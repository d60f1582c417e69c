//! Accesses to devices: the data's way between a register and a device, whole and once.
//!
//! Known hole: an access that the hardware does not describe (pairs, writeback, SIMD) is not decoded; the guest gets an
//! external abort.

use entresol_fault::{Access, Fault, Transfer};
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
        let value = truncate(state.read(transfer.register), transfer.size);
        vcpu.vm.device_write(vcpu, state, fault.gpa, transfer.size, value)
    } else {
        let claim = vcpu.vm.device_read(vcpu, state, fault.gpa, transfer.size);
        if let Claim::Value(value) = claim {
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
