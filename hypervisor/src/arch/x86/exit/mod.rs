//! Why a guest left, and what is done about it.
//!
//! | room | exits |
//! |---|---|
//! | [`memory`] | second-stage faults |
//! | [`shadow`] | page faults, control registers and INVLPG of guests on shadow tables |
//! | [`mmio`] | those on what is no memory |
//! | [`ports`] | IN and OUT |
//! | [`identity`], [`clock`] | CPUID, RDMSR, WRMSR |
//! | [`service`] | VMMCALL |
//! | [`interrupts`] | HLT, and what is injected before the next entry |
//!
//! Protocol: the vCPU is loaded, and all of it but its x87 and SSE registers is in its [`State`]. An instruction that left is answered
//! whole: either its effect is there and the guest goes on behind it, or it gets an exception, or the virtual machine ends.
//!
//! Known holes: where the processor does not save the next instruction's address, the length is that of the instruction without
//! prefixes: a guest that puts some before CPUID goes on in the middle of it. It harms itself only.

pub mod clock;
mod identity;
pub mod interrupts;
mod memory;
mod mmio;
mod ports;
mod service;
pub mod shadow;

use entresol_arch_x86::exit::Exit;
use entresol_metal_x86::switch::Event;

use crate::arch::State;
use crate::counters::Reason;
use crate::exit::{Next, crash};
use crate::irq;
use crate::sched::VcpuRef;
use crate::vm::Crash;

/// Exceptions (APM 8.2).
pub const DEBUG: u8 = 1;
pub const UNDEFINED: u8 = 6;
pub const GENERAL_PROTECTION: u8 = 13;
pub const PAGE_FAULT: u8 = 14;
pub const ALIGNMENT_CHECK: u8 = 17;

/// Answers the exit that the vCPU came back with.
#[inline(always)]
pub fn handle(cpu: usize, vcpu: &VcpuRef, state: &mut State) -> Next {
    if state.guest.was_delivering() {
        state.guest.redeliver();
    }
    if let Some(fault) = state.guest.nested_fault() {
        return memory::fault(cpu, vcpu, state, fault);
    }
    other(cpu, vcpu, state)
}

/// The same on Intel's processors.
#[inline]
pub fn handle_intel(cpu: usize, vcpu: &VcpuRef, state: &mut State) -> Next {
    if state.guest.was_delivering() {
        state.guest.redeliver();
    }
    match state.guest.extended_fault() {
        Some(fault) => memory::fault(cpu, vcpu, state, fault),
        None => other(cpu, vcpu, state),
    }
}

/// Any exit but a second-stage fault. Apart, so that the faults keep their registers.
#[inline(never)]
fn other(cpu: usize, vcpu: &VcpuRef, state: &mut State) -> Next {
    if let Some((linear, code)) = state.guest.page_fault() {
        return shadow::page_fault(cpu, vcpu, state, linear, code);
    }
    state.guest.bring();
    match state.guest.exit() {
        Exit::Io(io) => ports::access(vcpu, state, io),
        Exit::Hypercall => {
            vcpu.vm.counters.bump(Reason::Hypercall);
            service::call(vcpu, state)
        }
        Exit::WriteMsr => {
            vcpu.vm.counters.bump(Reason::Msr);
            interrupts::begin(vcpu, state);
            identity::write_register(cpu, vcpu, state)
        }
        // It is pending still.
        Exit::Interrupt => irq::take(cpu, Some((vcpu, state))),
        Exit::Halt => {
            vcpu.vm.counters.bump(Reason::Wait);
            interrupts::begin(vcpu, state);
            interrupts::halt(vcpu, state)
        }
        Exit::InterruptWindow => {
            interrupts::begin(vcpu, state);
            interrupts::settle_now(vcpu, state);
            Next::Again
        }
        other => rare(cpu, vcpu, state, other),
    }
}

#[cold]
fn rare(cpu: usize, vcpu: &VcpuRef, state: &mut State, exit: Exit) -> Next {
    match exit {
        Exit::Cpuid => {
            vcpu.vm.counters.bump(Reason::Cpuid);
            identity::cpuid(vcpu, state)
        }
        Exit::ReadMsr => {
            vcpu.vm.counters.bump(Reason::Msr);
            interrupts::begin(vcpu, state);
            identity::read_register(vcpu, state)
        }
        // Caches are coherent, and devices see them: there is nothing to write back, and nothing may be thrown away.
        Exit::WriteBackCaches | Exit::InvalidateCaches => skip(state, 2),
        Exit::Control(_) | Exit::InvalidatePage(_) if state.guest.control_registers().is_some() => {
            interrupts::begin(vcpu, state);
            shadow::instruction(cpu, vcpu, state)
        }
        Exit::Shutdown => {
            log::error!("vm {}: vCPU {}: a triple fault: {:x?}", vcpu.vm.config.name, vcpu.index, state.guest.save());
            crash(vcpu, Crash::TripleFault)
        }
        Exit::InvalidState => crash(vcpu, Crash::InvalidState),
        // The CPU has taken it by now: another's question about the own mapping, or the end.
        Exit::NonMaskable => Next::Again,
        Exit::Exception { vector: DEBUG, .. } => inject(state, DEBUG, None),
        Exit::Exception { vector: ALIGNMENT_CHECK, .. } => inject(state, ALIGNMENT_CHECK, Some(0)),
        Exit::Exception { vector, error, .. } => panic!("the machine's exception {vector}, error code {error:#x}"),
        Exit::Virtualisation | Exit::Monitor | Exit::MonitorWait | Exit::SetExtended => {
            vcpu.vm.counters.bump(Reason::Undefined);
            inject(state, UNDEFINED, None)
        }
        Exit::ReadCounter => inject(state, GENERAL_PROTECTION, Some(0)),
        Exit::Control(access) if state.guest.moves(access) => Next::Again,
        Exit::Control(_) => inject(state, GENERAL_PROTECTION, Some(0)),
        other => {
            log::error!("vm {}: exit {other:x?}", vcpu.vm.config.name);
            crash(vcpu, Crash::Unexpected)
        }
    }
}

/// The guest goes on behind its instruction of `length` bytes.
#[inline]
fn skip(state: &mut State, length: u64) -> Next {
    state.guest.skip(length);
    Next::Again
}

/// The guest gets an exception where it is.
#[cold]
fn inject(state: &mut State, vector: u8, error: Option<u32>) -> Next {
    state.guest.inject(Event::Exception { vector, error });
    Next::Again
}

/// The hypervisor's timer has come while the vCPU is loaded, or may have before it was.
pub fn timer_came(vcpu: &VcpuRef, state: &mut State) {
    let (pc, now) = (vcpu.vm.board.pc(), state.now());
    if pc.deadline(vcpu.index).is_some() {
        pc.expire(vcpu.index, &now);
    }
}

/// An interrupt of the machine that stands for a guest's: there is none.
pub fn interrupt(_line: u32, _guest: Option<(&VcpuRef, &mut State)>) -> bool {
    false
}
