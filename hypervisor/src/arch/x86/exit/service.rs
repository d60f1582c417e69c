//! Services for guests ([`crate::service`]): VMMCALL (VMCALL on Intel's processors) with a function in EAX, its arguments in RBX, RCX and RDX, the answer in RAX; the numbers
//! are those of arm64. For a guest that has none VMMCALL is undefined, as on a processor without SVM.

use super::{UNDEFINED, inject};
use crate::arch::State;
use crate::exit::Next;
use crate::sched::VcpuRef;
use crate::service;

/// Answers 0: what a call costs.
const NOTHING: u32 = 0xc600_0000;
/// How accesses to devices were answered: RBX 0 by the cache, 1 by a walk, 2 the whole way again, 3 entries made. Or [`INVALID`].
const MMIO: u32 = 0xc600_0012;

/// An argument breaks a rule.
const INVALID: u64 = -2i64 as u64;
/// The function does not exist.
const NOT_SUPPORTED: u64 = -1i64 as u64;

/// A VMMCALL or VMCALL: three bytes each.
#[inline]
pub fn call(vcpu: &VcpuRef, state: &mut State) -> Next {
    let config = &vcpu.vm.config;
    if !config.policies.services && !config.private {
        return inject(state, UNDEFINED, None);
    }
    let registers = &state.guest.registers;
    let arguments = [registers.rbx, registers.rcx, registers.rdx];
    let answer = match *state.guest.rax() as u32 {
        NOTHING if config.policies.services => 0,
        MMIO if config.policies.services => {
            let counts = vcpu.vm.memory.shadow_mmio_counts(vcpu.index).unwrap_or(state.mmio.counts());
            let counts = [counts.cached, counts.walked, counts.refreshed, counts.made];
            usize::try_from(arguments[0]).ok().and_then(|index| counts.get(index).copied()).unwrap_or(INVALID)
        }
        function => service::call(vcpu, function, arguments).unwrap_or(NOT_SUPPORTED),
    };
    *state.guest.rax() = answer;
    state.guest.skip(3);
    Next::Look
}
