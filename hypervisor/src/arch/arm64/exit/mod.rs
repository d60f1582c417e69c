//! Why a guest left, and what is done about it: one room for each kind of reason.
//!
//! Protocol: the vCPU is loaded, its general registers are in its [`State`], everything else of it is in the hardware.
//!
//! Invariants: nothing that a guest does ends in a panic: what is not known is UNDEFINED for it. Memory is behind
//! [`memory::abort`], which alone pins the grace period.

mod emulate;
mod firmware;
pub mod interrupts;
mod maintenance;
mod memory;
mod mmio;
mod posted;
mod registers;
pub mod timers;
pub mod toggles;
mod undefined;
mod wait;
mod walk;

use entresol_arch_arm64::syndrome::{self, Exit};
use entresol_metal_arm64::exit as hardware;

use crate::arch::{State, lines};
use crate::counters::Reason;
use crate::exit::{Next, absent, crash, park, starve};
use crate::irq;
use crate::sched::{Leave, VcpuRef};
use crate::vm::Crash;

/// Handles a synchronous exit.
#[inline]
pub fn synchronous(cpu: usize, vcpu: &VcpuRef, state: &mut State) -> Next {
    let esr = hardware::esr();
    let counters = &vcpu.vm.counters;
    match syndrome::decode(esr) {
        Exit::DataAbort => {
            counters.bump(Reason::DataAbort);
            memory::abort(cpu, vcpu, state, esr)
        }
        Exit::InstructionAbort => {
            counters.bump(Reason::InstructionAbort);
            memory::abort(cpu, vcpu, state, esr)
        }
        Exit::Hvc { .. } => {
            counters.bump(Reason::Hvc);
            firmware::call(vcpu, state)
        }
        Exit::Smc { condition, .. } => {
            counters.bump(Reason::Smc);
            state.skip(esr);
            if condition.holds(state.regs.pstate) { firmware::call(vcpu, state) } else { Next::Again }
        }
        Exit::System(access) => {
            counters.bump(Reason::SystemRegister);
            registers::system(vcpu, state, esr, access)
        }
        Exit::Wait { kind, timeout, condition } => {
            counters.bump(Reason::Wait);
            state.skip(esr);
            if condition.holds(state.regs.pstate) { wait::wait(vcpu, state, kind, timeout) } else { Next::Again }
        }
        other => rare(vcpu, state, esr, other),
    }
}

#[cold]
fn rare(vcpu: &VcpuRef, state: &mut State, esr: u64, exit: Exit) -> Next {
    match exit {
        Exit::Coprocessor(access) => {
            vcpu.vm.counters.bump(Reason::SystemRegister);
            registers::coprocessor(vcpu, state, esr, &access)
        }
        Exit::CoprocessorPair(access) => {
            vcpu.vm.counters.bump(Reason::SystemRegister);
            registers::coprocessor_pair(vcpu, state, esr, &access)
        }
        _ => {
            vcpu.vm.counters.bump(Reason::Undefined);
            undefined::inject(state);
            Next::Again
        }
    }
}

/// An SError that the guest caused, with its syndrome: nothing tells what it hit, so the virtual machine ends.
#[cold]
pub fn system_error(vcpu: &VcpuRef, syndrome: u64) -> Leave {
    vcpu.vm.counters.bump(Reason::SystemError);
    vcpu.vm.crash(Crash::SystemError { syndrome });
    Leave::Park
}

/// The hypervisor's timer has come while the vCPU is loaded.
pub fn timer_came(vcpu: &VcpuRef, state: &mut State) {
    timers::sample_physical(vcpu, state);
}

/// An interrupt of the machine that stands for a guest's, or for the virtual interface's own; whether `intid` is one.
pub fn interrupt(intid: u32, guest: Option<(&VcpuRef, &mut State)>) -> bool {
    match (intid, guest) {
        (lines::VIRTUAL_TIMER, Some((vcpu, state))) => timers::sample(vcpu, state),
        (lines::VIRTUAL_TIMER, None) => irq::silence(lines::VIRTUAL_TIMER),
        (lines::MAINTENANCE, Some((vcpu, state))) => {
            timers::sample(vcpu, state);
            interrupts::flush(vcpu, state);
        }
        (lines::MAINTENANCE, None) => {}
        _ => return false,
    }
    true
}
