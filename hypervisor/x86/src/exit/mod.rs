//! Why a guest left, and what is done about it.
//!
//! | room | exits |
//! |---|---|
//! | [`memory`] | nested page faults |
//! | [`shadow`] | page faults, control registers and INVLPG of guests on shadow tables |
//! | [`mmio`] | those on what is no memory |
//! | [`ports`] | IN and OUT |
//! | [`identity`], [`clock`] | CPUID, RDMSR, WRMSR |
//! | [`service`] | VMMCALL |
//! | [`interrupts`] | HLT, and what is injected before the next entry |
//!
//! An instruction that left is answered whole: either its effect is there and the guest goes on behind it, or it gets an
//! exception, or the machine ends.
//!
//! Known holes: where the processor does not save the next instruction's address, the length is that of the instruction without
//! prefixes: a guest that puts some before CPUID goes on in the middle of it. It harms itself only.

pub mod clock;
pub mod identity;
pub mod interrupts;
mod memory;
mod mmio;
mod ports;
mod service;
pub mod shadow;

use entresol_arch_x86::exit::Exit;
use entresol_metal_x86::switch::{Event, Guest};

use crate::vm::{Crash, End, Vm};

/// What comes after an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The guest goes on, and nothing of its interrupts has changed.
    Again,
    /// The guest goes on when its interrupts were looked at.
    Look,
    /// It does not.
    End(End),
}

/// Exceptions (APM 8.2).
pub const UNDEFINED: u8 = 6;
pub const GENERAL_PROTECTION: u8 = 13;
pub const PAGE_FAULT: u8 = 14;

/// Answers the exit that the vCPU came back with.
#[inline(always)]
pub fn handle(cpu: usize, vm: &mut Vm) -> Next {
    if vm.vcpu.guest.was_delivering() {
        vm.vcpu.guest.redeliver();
    }
    if let Some(fault) = vm.vcpu.guest.nested_fault() {
        return memory::fault(cpu, vm, fault);
    }
    other(cpu, vm)
}

/// The same on Intel's processors.
#[inline(never)]
pub fn handle_intel(cpu: usize, vm: &mut Vm) -> Next {
    if vm.vcpu.guest.was_delivering() {
        vm.vcpu.guest.redeliver();
    }
    match vm.vcpu.guest.extended_fault() {
        Some(fault) => memory::fault(cpu, vm, fault),
        None => other(cpu, vm),
    }
}

/// What is due before the next entry, there.
#[inline(never)]
pub fn settle_intel(vm: &mut Vm) {
    interrupts::settle(vm);
}

/// Any exit but a nested page fault. Apart, so that the faults keep their registers.
#[inline(never)]
fn other(cpu: usize, vm: &mut Vm) -> Next {
    if let Some((linear, code)) = vm.vcpu.guest.page_fault() {
        return shadow::page_fault(cpu, vm, linear, code);
    }
    interrupts::begin(&mut vm.vcpu.guest, &vm.devices);
    match vm.vcpu.guest.exit() {
        Exit::Io(io) => ports::access(vm, io),
        other => rare(cpu, vm, other),
    }
}

#[cold]
fn rare(cpu: usize, vm: &mut Vm, exit: Exit) -> Next {
    let guest = &mut *vm.vcpu.guest;
    match exit {
        // Asked before.
        Exit::Memory(_) => Next::Again,
        Exit::Cpuid => identity::cpuid(vm),
        Exit::ReadMsr => identity::read_register(vm),
        Exit::WriteMsr => identity::write_register(cpu, vm),
        Exit::Hypercall => service::call(cpu, vm),
        // Caches are coherent, and devices see them: there is nothing to write back, and nothing may be thrown away.
        Exit::WriteBackCaches | Exit::InvalidateCaches => skip(guest, 2),
        Exit::Control(_) | Exit::InvalidatePage(_) if guest.control_registers().is_some() => {
            shadow::instruction(cpu, vm)
        }
        Exit::Halt => interrupts::halt(vm),
        Exit::InterruptWindow => Next::Look,
        Exit::Shutdown => Next::End(End::Crash(Crash::TripleFault)),
        Exit::InvalidState => Next::End(End::Crash(Crash::InvalidState)),
        // Of the machine's own: another CPU's kick. Out of the guest is all that it wants.
        Exit::Interrupt => {
            while let Some(line) = entresol_metal_x86::interrupts::ack() {
                entresol_metal_x86::interrupts::deactivate(line);
            }
            Next::Look
        }
        // The CPU has taken it by now: another's question about the own mapping, or the end.
        Exit::NonMaskable => Next::Again,
        Exit::Exception { vector, error, .. } => panic!("the machine's exception {vector}, error code {error:#x}"),
        Exit::Virtualisation | Exit::Monitor | Exit::MonitorWait | Exit::SetExtended => inject(guest, UNDEFINED, None),
        Exit::ReadCounter => inject(guest, GENERAL_PROTECTION, Some(0)),
        Exit::Control(access) if guest.moves(access) => Next::Again,
        Exit::Control(_) => inject(guest, GENERAL_PROTECTION, Some(0)),
        other => Next::End(End::Crash(Crash::Unexpected(other))),
    }
}

/// The guest goes on behind its instruction of `length` bytes.
#[inline]
pub fn skip(guest: &mut Guest, length: u64) -> Next {
    guest.skip(length);
    Next::Look
}

/// The guest goes on at `rip`.
#[inline]
pub fn go_on(guest: &mut Guest, rip: u64) -> Next {
    guest.go_on(rip);
    Next::Look
}

/// The guest gets an exception where it is.
#[cold]
pub fn inject(guest: &mut Guest, vector: u8, error: Option<u32>) -> Next {
    guest.inject(Event::Exception { vector, error });
    Next::Again
}
