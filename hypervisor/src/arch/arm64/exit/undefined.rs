//! Exceptions for the guest: the registers that an exception entry to EL1 leaves behind.

use entresol_arch_arm64::inject::{self, Context, Exception, Features};
use entresol_metal_arm64::{identity, live};

use crate::arch::State;

/// The instruction that exited is UNDEFINED.
#[cold]
pub fn inject(state: &mut State) {
    enter(state, Exception::Undefined);
}

/// The loaded vCPU takes `exception`.
#[cold]
pub fn enter(state: &mut State, exception: Exception) {
    let context =
        Context { pc: state.regs.pc, pstate: state.regs.pstate, vbar: live::vbar_el1(), sctlr: live::sctlr_el1() };
    // ID_AA64PFR1_EL1, ID_AA64MMFR1_EL1.
    let features = Features::of_machine(identity::register(4, 1), identity::register(7, 1));
    let entry = inject::enter(exception, &context, features);
    live::set_exception(entry.elr, entry.spsr, entry.esr, entry.far);
    state.regs.pc = entry.pc;
    state.regs.pstate = entry.pstate;
}
