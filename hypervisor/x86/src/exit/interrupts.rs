//! Interrupts of the guest: what its controllers hold, into its processor.
//!
//! Protocol: [`begin`] at an exit that may look at the controllers, [`settle`] before the next entry. An exit in the middle of an
//! event's delivery gives the event back ([`again`]), which comes before all others.
//!
//! Sources: APM 15.20 (event injection), 15.21 (virtual interrupts: V_TPR, V_IRQ), 15.7.2 (EXITINTINFO).
//!
//! Known holes: no interrupt of the machine tells when a guest's timer is due: it is looked at whenever the guest comes back, and
//! waited for, turning, while it halts. A guest that computes without ever coming back has no ticks.
//! An exception that an access causes in the middle of an event's delivery takes the event's place.

use entresol_devices::apic::Event;
use entresol_metal_x86::cpu;
use entresol_metal_x86::switch::Guest;
use entresol_metal_x86::switch::vmcb::first;

use super::identity::guest_time;
use super::{Next, skip};
use crate::devices::{Devices, VCPU};
use crate::vm::{Crash, End, Vm};

/// EVENTINJ and EXITINTINFO: valid; the kind of event.
const VALID: u64 = 1 << 31;
const KIND: u64 = 0b111 << 8;
const NON_MASKABLE: u64 = 2 << 8 | 2;
/// INT n, which is executed again.
const SOFTWARE: u64 = 4 << 8;
/// Virtual interrupts: V_TPR, V_IRQ, V_IGN_TPR.
const TPR: u64 = 0xff;
const PENDING: u64 = 1 << 8;
const IGNORE_TPR: u64 = 1 << 20;
const RFLAGS_IF: u64 = 1 << 9;

/// The guest's CR8, into its controller.
pub fn begin(guest: &mut Guest, devices: &Devices) {
    let tpr = ((guest.control().virtual_interrupts & 0xf) << 4) as u8;
    if devices.apic.tpr(VCPU) >> 4 != tpr >> 4 {
        devices.apic.set_tpr(VCPU, tpr);
    }
}

/// An event that an exit interrupted is delivered again.
#[cold]
pub fn again(guest: &mut Guest) {
    let event = guest.control().exit_interrupt_info;
    if event & KIND != SOFTWARE {
        guest.control().event_injection = event;
    }
}

/// What is due is injected, or asked for as soon as it can be.
pub fn settle(vm: &mut Vm) {
    let (guest, apic) = (&mut *vm.vcpu.guest, &vm.devices.apic);
    let now = guest_time(guest);
    if apic.deadline(VCPU).is_some_and(|deadline| deadline <= now) {
        // It is this vCPU's own, which looks now.
        let _kicked = apic.expire(VCPU, now);
    }
    let free = guest.control().event_injection & VALID == 0;
    // The first vCPU is never started by another: INIT and SIPI of its own making are ignored.
    while let Some(event) = apic.take_event(VCPU) {
        if event == Event::NonMaskable && free {
            guest.control().event_injection = NON_MASKABLE | VALID;
        }
    }
    let due = apic.pending(VCPU).is_some_and(|pending| !pending.masked);
    let (control_free, open) = (guest.control().event_injection & VALID == 0, guest.state().rflags & RFLAGS_IF != 0);
    let open = open && guest.control().interrupt_shadow & 1 == 0;
    let taken = if due && open && control_free { apic.acknowledge(VCPU) } else { None };
    if let Some(vector) = taken {
        guest.control().event_injection = u64::from(vector) | VALID;
    }
    let wait = if taken.is_some() { apic.pending(VCPU).is_some_and(|pending| !pending.masked) } else { due };
    let tpr = u64::from(apic.tpr(VCPU) >> 4);
    let control = guest.control();
    let window = if wait { PENDING | IGNORE_TPR } else { 0 };
    control.virtual_interrupts = control.virtual_interrupts & !(TPR | PENDING | IGNORE_TPR) | tpr | window;
    control.intercepts.first = control.intercepts.first & !first::VINTR | if wait { first::VINTR } else { 0 };
}

/// HLT: the CPU turns until something is due.
pub fn halt(vm: &mut Vm) -> Next {
    let (guest, apic) = (&mut *vm.vcpu.guest, &vm.devices.apic);
    if guest.state().rflags & RFLAGS_IF == 0 {
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
