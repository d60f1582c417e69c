//! Cache maintenance by address that traps, because its owner wants it (policy `cache_maintenance`) or an emulator below
//! never faults on it: the core's second door. A machine that faults on it, but does not say that it is maintenance, comes
//! here too ([`super::emulate`]).
//!
//! Protocol: the address is translated as the instruction would have, so that the guest's own stage-1 faults are its own
//! (Arm DDI 0487 D8.16.2: DC IVAC needs permission to write, the others to read); then the core decides and carries out.

use entresol_addr::{Gpa, PAGE_SIZE};
use entresol_arch_arm64::inject::{Exception, pstate};
use entresol_arch_arm64::policy::CacheOp;
use entresol_fault::{Access, Cause, Fault};
use entresol_metal_arm64::exit::Rights;
use entresol_metal_arm64::{cpu, live};
use entresol_mmu::Maintenance;

use super::walk::{self, Untranslated};
use super::{Next, absent, memory, starve, undefined};
use crate::arch::State;
use crate::counters;
use crate::host;
use crate::sched::VcpuRef;

/// Carries out `operation`, which trapped, on the guest's virtual address `address`.
#[cold]
pub fn maintain(vcpu: &VcpuRef, state: &mut State, esr: u64, operation: CacheOp, address: u64) -> Next {
    vcpu.vm.counters.bump(counters::Reason::CacheMaintenance);
    if operation == CacheOp::InstructionAll {
        live::invalidate_instructions();
        state.skip(esr);
        return Next::Again;
    }
    match walk::translate(vcpu, state, address, rights(state, operation)) {
        Ok(translated) => {
            let gpa = Gpa::new(translated.page() | address & (PAGE_SIZE - 1));
            maintain_at(vcpu, state, esr, operation, gpa, address)
        }
        Err(Untranslated::Fault(status)) => {
            undefined::enter(state, Exception::DataAbort { address, status, write: true, cache_maintenance: true });
            Next::Again
        }
        Err(Untranslated::OutOfMemory) => starve(vcpu),
        Err(Untranslated::Absent { gpa }) => absent(vcpu, gpa),
        Err(Untranslated::Again) => Next::Look,
    }
}

/// Carries out `operation` at `gpa`, which the guest calls `address`.
pub fn maintain_at(vcpu: &VcpuRef, state: &mut State, esr: u64, operation: CacheOp, gpa: Gpa, address: u64) -> Next {
    let operation = match operation {
        CacheOp::Invalidate => Maintenance::Invalidate,
        CacheOp::Clean | CacheOp::CleanInvalidate => Maintenance::Clean,
        CacheOp::CleanToUnification => Maintenance::CleanToUnification,
        CacheOp::InstructionAddress => Maintenance::Instructions,
        // HCR_EL2.TDZ is never set, and what has no address was done.
        CacheOp::Zero | CacheOp::InstructionAll => {
            undefined::inject(state);
            return Next::Again;
        }
    };
    let outcome = {
        let pin = host::get().epoch.pin(cpu::index());
        vcpu.vm.memory.maintain(&pin, &state.hint, gpa, operation)
    };
    memory::conclude(vcpu, state, &fault(gpa, esr), esr, address, outcome)
}

/// With whose rights an operation translates its address.
fn rights(state: &State, operation: CacheOp) -> Rights {
    match (state.regs.pstate & pstate::MODE == pstate::EL0T, operation) {
        (true, _) => Rights::El0Read,
        (false, CacheOp::Invalidate) => Rights::El1Write,
        (false, _) => Rights::El1Read,
    }
}

/// The fault that it would have been.
fn fault(gpa: Gpa, esr: u64) -> Fault {
    Fault {
        gpa,
        access: Access::Write,
        cause: Cause::Translation,
        stage1_walk: false,
        cache_maintenance: true,
        transfer: None,
        syndrome: esr,
    }
}
