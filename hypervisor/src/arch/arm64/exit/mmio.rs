//! Accesses to devices: the data's way between a register and a device, whole and once.
//!
//! What the hardware describes (one general register, no writeback) is done here, without a look at the instruction; how it ends is
//! decided by the core's [`Completion`].
//! Everything else goes to [`emulate`], and so does what may be only the second half of an access: hardware reports one that
//! crosses into a page without memory with that page's first address.

use entresol_addr::{Gpa, PAGE_SIZE};
use entresol_arch_arm64::instruction::data;
use entresol_fault::{Access, Fault, Transfer};
use entresol_metal_arm64::exit::{self as hardware, Rights};
use entresol_metal_arm64::live;
use entresol_mmu::{Abort, Completion, Instruction};

use super::{Next, emulate, memory};
use crate::arch::State;
use crate::counters::Reason;
use crate::sched::VcpuRef;
use crate::vm::Claim;

/// Performs the access of `fault`, which no memory serves.
#[inline]
pub fn access(vcpu: &VcpuRef, state: &mut State, fault: &Fault, esr: u64, far: u64) -> Next {
    let transfer = match fault.transfer {
        Some(transfer) if is_whole(state, fault, &transfer, far) => transfer,
        _ => return emulate::access(vcpu, state, fault, esr, far),
    };
    vcpu.vm.counters.bump(Reason::Mmio);
    let claim = if fault.access == Access::Write {
        let value = order(state, state.read(transfer.register), transfer.size);
        vcpu.vm.device_write(vcpu, state, fault.gpa, transfer.size, value)
    } else {
        vcpu.vm.device_read(vcpu, state, fault.gpa, transfer.size)
    };
    let (completion, next) = match claim {
        Claim::Value(value) => (Completion::pending().loaded(value), Next::Again),
        Claim::Done => (Completion::pending().stored(), Next::Again),
        Claim::Look => (Completion::pending().stored(), Next::Look),
        Claim::Abort => (Completion::pending().aborted(), Next::Again),
        Claim::Again => (Completion::pending(), Next::Look),
    };
    completion.settle(&mut Described { vcpu, state, fault, transfer: &transfer, esr, far });
    next
}

/// An instruction that the hardware describes.
struct Described<'a> {
    vcpu: &'a VcpuRef,
    state: &'a mut State,
    fault: &'a Fault,
    transfer: &'a Transfer,
    esr: u64,
    far: u64,
}

impl Instruction for Described<'_> {
    #[inline]
    fn load(&mut self, value: u64) {
        let Transfer { size, sign_extend, wide, register, .. } = *self.transfer;
        let value = order(self.state, value, size);
        self.state.write(register, data::extend(value, size, sign_extend, wide));
    }

    #[inline]
    fn advance(&mut self) {
        self.state.skip(self.esr);
    }

    // What is cold is called: a call with `self` would keep all of it in memory, on the hot path too.
    #[inline]
    fn abort(&mut self) {
        memory::inject(self.vcpu, self.state, self.fault, self.far, Abort::External);
    }
}

/// Whether an access of `size` bytes that faulted at `gpa`, virtually at `far`, is aligned and begins there.
#[inline]
pub fn begins_there(gpa: Gpa, size: u8, far: u64) -> bool {
    let address = gpa.get();
    let first_of_page = address & (PAGE_SIZE - 1) == 0 && size > 1;
    address & (u64::from(size) - 1) == 0 && !(first_of_page && may_begin_before(far))
}

/// Whether the access is one that a device answers at once: aligned, and beginning where the fault is. Only Normal memory
/// takes others, and AArch32 code is not decoded.
#[inline]
fn is_whole(state: &State, fault: &Fault, transfer: &Transfer, far: u64) -> bool {
    begins_there(fault.gpa, transfer.size, far) || state.regs.pstate & PSTATE_AARCH32 != 0
}

/// Whether an access that faults at the first byte of a page may have begun in the page before: stage 1 refuses that on
/// Device memory, and without stage 1 everything is.
fn may_begin_before(far: u64) -> bool {
    live::sctlr_el1() & SCTLR_M != 0
        && !hardware::translate(far, Rights::El1Read).is_ok_and(|translated| translated.is_device())
}

/// SCTLR_EL1.M: stage 1 is on.
const SCTLR_M: u64 = 1;
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

/// Whether data of the loaded vCPU is big-endian at this moment.
pub fn is_big_endian(state: &State) -> bool {
    let pstate = state.regs.pstate;
    if pstate & PSTATE_AARCH32 != 0 {
        return pstate & PSTATE_E != 0;
    }
    let flag = if pstate & PSTATE_EL == 0 { SCTLR_E0E } else { SCTLR_EE };
    live::sctlr_el1() & flag != 0
}

/// The low `size` bytes of `value` as the guest's byte order has them.
pub fn order(state: &State, value: u64, size: u8) -> u64 {
    let value = data::extend(value, size, false, false);
    if is_big_endian(state) { value.swap_bytes() >> (64 - u32::from(size) * 8) } else { value }
}
