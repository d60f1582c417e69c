//! WFI, WFE and their forms with a timeout.

use entresol_arch_arm64::syndrome::Wait;
use entresol_metal_arm64::timer;

use super::{Next, interrupts};
use crate::arch::State;
use crate::sched::{self, Deadline, Leave, VcpuRef};

/// A wait instruction; the PC is past it. `timeout` is the register with the deadline in the guest's virtual count.
pub fn wait(vcpu: &VcpuRef, state: &mut State, kind: Wait, timeout: Option<u8>) -> Next {
    match kind {
        Wait::Wfi => until_interrupt(vcpu, state),
        Wait::Wfit => {
            let deadline = timeout.map(|register| state.read(register).wrapping_add(state.timer.offset));
            match deadline {
                Some(deadline) if deadline <= timer::now() => Next::Again,
                _ if interrupts::deliverable(vcpu, state) => Next::Again,
                deadline => Next::Leave(Leave::Wait(deadline.map_or(Deadline::NEVER, Deadline::at))),
            }
        }
        // A guest that waits for an event spins on a lock; its owner may be waiting for this CPU.
        Wait::Wfe | Wait::Wfet => {
            if sched::contended() {
                Next::Leave(Leave::Ready)
            } else {
                Next::Again
            }
        }
    }
}

/// Waits until an interrupt is deliverable.
pub fn until_interrupt(vcpu: &VcpuRef, state: &mut State) -> Next {
    if vcpu.vm.has_device_work() || interrupts::deliverable(vcpu, state) {
        Next::Look
    } else {
        Next::Leave(Leave::Wait(Deadline::NEVER))
    }
}
