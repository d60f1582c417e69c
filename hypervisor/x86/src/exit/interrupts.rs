//! Interrupts of the guest: what its controllers hold, into its processor.
//!
//! Protocol: [`begin`] at an exit that may look at the controllers, [`settle`] before the next entry. An exit in the middle of an
//! event's delivery gives the event back ([`Guest::redeliver`]), which comes before all others.
//!
//! Known holes: no interrupt of the machine tells when a guest's timer is due: it is looked at whenever the guest comes back, and
//! waited for, turning, while it halts. A guest that computes without ever coming back has no ticks.
//! An exception that an access causes in the middle of an event's delivery takes the event's place.

use entresol_devices::apic::Event;
use entresol_metal_x86::cpu;
use entresol_metal_x86::switch::{self, Guest};

use super::identity::guest_time;
use super::{Next, skip};
use crate::devices::{Devices, VCPU};
use crate::vm::{Crash, End, Vm};

/// The guest's state within reach, and its CR8 in its controller.
pub fn begin(guest: &mut Guest, devices: &Devices) {
    guest.bring();
    let tpr = guest.priority() << 4;
    if devices.apic.tpr(VCPU) >> 4 != tpr >> 4 {
        devices.apic.set_tpr(VCPU, tpr);
    }
}

/// What is due is injected, or asked for as soon as it can be.
#[inline(always)]
pub fn settle(vm: &mut Vm) {
    let (guest, apic) = (&mut *vm.vcpu.guest, &vm.devices.apic);
    let now = guest_time(guest);
    if apic.deadline(VCPU).is_some_and(|deadline| deadline <= now) {
        // It is this vCPU's own, which looks now.
        let _kicked = apic.expire(VCPU, now);
    }
    let free = !guest.is_injecting();
    // The first vCPU is never started by another: INIT and SIPI of its own making are ignored.
    while let Some(event) = apic.take_event(VCPU) {
        if event == Event::NonMaskable && free {
            guest.inject(switch::Event::NonMaskable);
        }
    }
    let due = apic.pending(VCPU).is_some_and(|pending| !pending.masked);
    let open = guest.is_open() && !guest.is_injecting();
    let taken = if due && open { apic.acknowledge(VCPU) } else { None };
    if let Some(vector) = taken {
        guest.inject(switch::Event::Interrupt(vector));
    }
    let wait = if taken.is_some() { apic.pending(VCPU).is_some_and(|pending| !pending.masked) } else { due };
    guest.set_priority(apic.tpr(VCPU) >> 4, wait);
}

/// HLT: the CPU turns until something is due.
pub fn halt(vm: &mut Vm) -> Next {
    let (guest, apic) = (&mut *vm.vcpu.guest, &vm.devices.apic);
    if !guest.is_enabled() {
        return Next::End(End::Crash(Crash::Halted));
    }
    while apic.pending(VCPU).is_none_or(|pending| pending.masked) {
        // Nothing else can wake it.
        let Some(deadline) = apic.deadline(VCPU) else { return Next::End(End::Crash(Crash::Halted)) };
        while guest_time(guest) < deadline {
            cpu::relax();
        }
        let _kicked = apic.expire(VCPU, deadline);
    }
    skip(guest, 1)
}
