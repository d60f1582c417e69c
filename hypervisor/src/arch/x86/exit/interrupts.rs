//! Interrupts of the guest: what its controllers hold, into its processor.
//!
//! Protocol: [`begin`] at an exit that may look at the controllers, [`settle`] before the next entry where the controllers say so, and after an
//! exit that opens the guest to interrupts. An exit in the middle of an event's delivery gives the event back
//! ([`Guest::redeliver`](entresol_metal_x86::switch::Guest::redeliver)), which comes before all others.
//!
//! Known holes: an exception that an access causes in the middle of an event's delivery takes the event's place.

use entresol_devices::apic::Event;
use entresol_metal_x86::switch;

use super::shadow;
use crate::arch::State;
use crate::arch::cpu;
use crate::arch::x86::state::Halt;
use crate::exit::Next;
use crate::sched::{Deadline, Leave, VcpuRef};

/// The guest's state within reach, and its CR8 in its controller.
pub fn begin(vcpu: &VcpuRef, state: &mut State) {
    state.guest.bring();
    follow(vcpu, state);
}

/// The controller has the guest's CR8 from now on. What that lets through comes before the next entry: the instruction that is looked at may
/// end in an exception, which must not take its place.
pub fn follow(vcpu: &VcpuRef, state: &mut State) {
    let (apic, tpr) = (vcpu.vm.board.pc().apic(), state.guest.priority() << 4);
    if apic.tpr(vcpu.index) >> 4 != tpr >> 4 {
        apic.set_tpr(vcpu.index, tpr);
        apic.look_again(vcpu.index);
    }
}

/// The guest has stored to its controller: its CR8 is what that says.
pub fn lead(vcpu: &VcpuRef, state: &mut State) {
    let tpr = vcpu.vm.board.pc().apic().tpr(vcpu.index);
    state.guest.set_task_priority(tpr >> 4);
}

/// What is due is injected, or asked for as soon as it can be. Or why the vCPU does not run.
#[inline(never)]
pub fn settle(vcpu: &VcpuRef, state: &mut State) -> Option<Leave> {
    begin(vcpu, state);
    let (apic, index) = (vcpu.vm.board.pc().apic(), vcpu.index);
    while let Some(event) = apic.take_event(index) {
        match event {
            Event::Init => {}
            Event::Startup(page) => {
                state.start_up(page);
                shadow::shade(vcpu, state);
                shadow::load(cpu::index(), vcpu, state);
            }
            Event::NonMaskable => {
                state.halt = Halt::No;
                if !state.guest.is_injecting() {
                    state.guest.inject(switch::Event::NonMaskable);
                }
            }
        }
    }
    if apic.waits(index) {
        return Some(Leave::Wait(Deadline::NEVER));
    }
    let due = apic.pending(index).is_some_and(|pending| !pending.masked);
    match state.halt {
        Halt::Open if due => state.halt = Halt::No,
        Halt::No => {}
        Halt::Open | Halt::Closed => return Some(Leave::Wait(Deadline::NEVER)),
    }
    settle_now(vcpu, state);
    None
}

/// The most urgent vector, if the guest can take it.
pub fn settle_now(vcpu: &VcpuRef, state: &mut State) {
    let (apic, index) = (vcpu.vm.board.pc().apic(), vcpu.index);
    let due = || apic.pending(index).is_some_and(|pending| !pending.masked);
    let open = state.guest.is_open() && !state.guest.is_injecting();
    let mut waits = due();
    if waits
        && open
        && let Some(vector) = apic.acknowledge(index)
    {
        state.guest.inject(switch::Event::Interrupt(vector));
        waits = due();
    }
    state.guest.set_priority(apic.tpr(index) >> 4, waits);
}

/// HLT.
pub fn halt(vcpu: &VcpuRef, state: &mut State) -> Next {
    state.halt = if state.guest.is_enabled() { Halt::Open } else { Halt::Closed };
    state.guest.skip(1);
    match settle(vcpu, state) {
        Some(leave) if !vcpu.vm.has_device_work() => Next::Leave(leave),
        // Devices first: the flag brings it back here.
        Some(_) => {
            vcpu.vm.board.pc().apic().look_again(vcpu.index);
            Next::Look
        }
        None => Next::Look,
    }
}
