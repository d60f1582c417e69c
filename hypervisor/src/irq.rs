//! Physical interrupts: the hypervisor's own, and those that stand for a guest's.

use crate::arch::{self, State, exit, lines, timer};
use crate::counters::Reason;
use crate::exit::Next;
use crate::host_work::{self, Work};
use crate::sched::{self, VcpuRef};
use crate::{block, console, control};

/// Takes every interrupt that is pending on CPU `cpu`; `guest` is the loaded vCPU, if one is.
pub fn take(cpu: usize, mut guest: Option<(&VcpuRef, &mut State)>) -> Next {
    if let Some((vcpu, _)) = &guest {
        vcpu.vm.counters.bump(Reason::Interrupt);
    }
    while let Some(intid) = arch::take_interrupt() {
        handle(cpu, intid, guest.as_mut().map(|(vcpu, state)| (*vcpu, &mut **state)));
        arch::end_interrupt(intid);
    }
    Next::Look
}

fn handle(cpu: usize, intid: u32, guest: Option<(&VcpuRef, &mut State)>) {
    match intid {
        arch::KICK => {}
        arch::TIMER => {
            timer::clear();
            sched::expire(cpu, timer::now());
            if let Some((vcpu, state)) = guest {
                exit::timer_came(vcpu, state);
            }
        }
        intid if console::owns(intid) => {
            console::receive();
            host_work::raise(Work::Console);
        }
        intid if control::owns(intid) => {
            control::acknowledge();
            host_work::raise(Work::Control);
        }
        intid if block::owns(intid) => block::acknowledge(intid),
        intid if exit::interrupt(intid, guest) => {}
        intid => {
            log::warn!("interrupt {intid} is nobody's: disabled");
            silence(intid);
        }
    }
}

/// Lets no more of `intid` come to this CPU.
pub fn silence(intid: u32) {
    if let Err(error) = lines::disable(intid) {
        log::error!("interrupt {intid}: {error}");
    }
}
