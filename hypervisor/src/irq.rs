//! Physical interrupts: the hypervisor's own, and those that stand for a guest's.

use entresol_metal_arm64::{gic, timer};

use crate::counters::Reason;
use crate::exit::{Next, interrupts, timers};
use crate::host_work::{self, Work};
use crate::sched::{self, VcpuRef};
use crate::vcpu::State;
use crate::{block, console, control};

/// Takes every interrupt that is pending on CPU `cpu`; `guest` is the loaded vCPU, if one is.
pub fn take(cpu: usize, mut guest: Option<(&VcpuRef, &mut State)>) -> Next {
    if let Some((vcpu, _)) = &guest {
        vcpu.vm.counters.bump(Reason::Interrupt);
    }
    while let Some(intid) = gic::ack() {
        gic::drop_priority(intid);
        handle(cpu, intid, guest.as_mut().map(|(vcpu, state)| (*vcpu, &mut **state)));
        gic::deactivate(intid);
    }
    Next::Look
}

fn handle(cpu: usize, intid: u32, guest: Option<(&VcpuRef, &mut State)>) {
    match (intid, guest) {
        (sched::KICK, _) => {}
        (gic::HYPERVISOR_TIMER, guest) => {
            timer::clear();
            sched::expire(cpu, timer::now());
            if let Some((vcpu, state)) = guest {
                timers::sample_physical(vcpu, state);
            }
        }
        (gic::VIRTUAL_TIMER, Some((vcpu, state))) => timers::sample(vcpu, state),
        (gic::VIRTUAL_TIMER, None) => silence(gic::VIRTUAL_TIMER),
        (gic::MAINTENANCE, Some((vcpu, state))) => {
            timers::sample(vcpu, state);
            interrupts::flush(vcpu, state);
        }
        (gic::MAINTENANCE, None) => {}
        (intid, _) if console::owns(intid) => {
            console::receive();
            host_work::raise(Work::Console);
        }
        (intid, _) if control::owns(intid) => {
            control::acknowledge();
            host_work::raise(Work::Control);
        }
        (intid, _) if block::owns(intid) => block::acknowledge(intid),
        (intid, _) => {
            log::warn!("interrupt {intid} is nobody's: disabled");
            silence(intid);
        }
    }
}

fn silence(intid: u32) {
    if let Err(error) = gic::disable(intid) {
        log::error!("interrupt {intid}: {error}");
    }
}
