//! Services for guests that their owner lets drive the hypervisor: measurements and tests.
//!
//! VMMCALL (VMCALL on Intel's processors) with a function in EAX, its arguments in RBX, RCX and RDX, the answer in RAX; the numbers are those of the arm64
//! hypervisor. Without the policy they do not exist: VMMCALL is undefined, as on a processor without SVM.

use entresol_addr::{Gfn, GfnRange, PAGE_SIZE};

use super::{Next, UNDEFINED, inject, skip};
use crate::vm::Vm;

/// Answers 0: what a call costs.
const NOTHING: u32 = 0xc600_0000;
/// Takes the second-stage entries of a range away: RBX its first byte, RCX its length in bytes, both page-aligned. Contents stay.
/// Answers 0, or [`INVALID`].
const ZAP: u32 = 0xc600_0001;
/// The machine's dirty log: RBX 0 ends it; 1 starts it; 2 fetches and clears that of its lower memory, of at most 1 GiB, and answers how
/// many pages it named. Answers 0 otherwise, or [`INVALID`].
const DIRTY: u32 = 0xc600_0010;
/// How accesses to devices were answered: RBX 0 by the cache, 1 by a walk, 2 the whole way again, 3 entries made. Or [`INVALID`].
const MMIO: u32 = 0xc600_0012;

/// An argument breaks a rule.
const INVALID: u64 = -2i64 as u64;
/// The function does not exist.
const NOT_SUPPORTED: u64 = -1i64 as u64;

/// A VMMCALL or VMCALL: three bytes each.
pub fn call(cpu: usize, vm: &mut Vm) -> Next {
    if !vm.services {
        return inject(&mut vm.vcpu.guest, UNDEFINED, None);
    }
    let registers = &vm.vcpu.guest.registers;
    let (first, second) = (registers.rbx, registers.rcx);
    let function = *vm.vcpu.guest.rax() as u32;
    let answer = match function {
        NOTHING => 0,
        ZAP => zap(cpu, vm, first, second),
        DIRTY => dirty(vm, first),
        MMIO => {
            let counts = vm.mmio_counts();
            let counts = [counts.cached, counts.walked, counts.refreshed, counts.made];
            usize::try_from(first).ok().and_then(|index| counts.get(index).copied()).unwrap_or(INVALID)
        }
        _ => NOT_SUPPORTED,
    };
    *vm.vcpu.guest.rax() = answer;
    skip(&mut vm.vcpu.guest, 3)
}

fn zap(cpu: usize, vm: &Vm, first: u64, length: u64) -> u64 {
    if !first.is_multiple_of(PAGE_SIZE) || !length.is_multiple_of(PAGE_SIZE) {
        return INVALID;
    }
    let zapped = GfnRange::new(Gfn::new(first / PAGE_SIZE), length / PAGE_SIZE)
        .is_some_and(|range| vm.memory.zap(cpu, range).is_ok());
    if zapped { 0 } else { INVALID }
}

/// Starts, ends or fetches the dirty log.
fn dirty(vm: &mut Vm, action: u64) -> u64 {
    let answer = match action {
        0 | 1 => vm.set_log(action == 1).map(|()| 0).ok(),
        2 => vm.take_log().ok(),
        _ => None,
    };
    answer.unwrap_or(INVALID)
}
