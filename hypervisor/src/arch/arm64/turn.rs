//! A vCPU comes to a CPU, enters its guest, and goes.
//!
//! Protocol: [`load`], then any number of [`settle`] where [`Board::flag`](super::Board::flag) is up, and entries; then [`put`].
//! Physical interrupts are masked while the hypervisor runs, so an event between the last check and the entry makes the guest exit at once.

use entresol_metal_arm64::switch::{self, ExitKind};
use entresol_metal_arm64::{exit as hardware, timer, traps};

use super::{State, exit};
use crate::exit::Next;
use crate::irq;
use crate::run::{Way, enter_until_it_leaves};
use crate::sched::{Leave, VcpuRef};

/// Makes the hardware this vCPU.
pub fn load(cpu: usize, vcpu: &VcpuRef, state: &mut State) {
    let vm = &vcpu.vm;
    vm.board.load(&vm.memory, cpu, vcpu.index);
    if let Some(boot) = vm.vcpu(vcpu.index).boot.lock().take() {
        state.start(boot);
    }
    exit::toggles::resume(vcpu, state);
    // SAFETY: no guest runs on this CPU, and this state's vCPU is entered next.
    unsafe { state.el1.load() };
    if vm.config.mte {
        // SAFETY: as above; no virtual machine has this without the CPU.
        unsafe { state.tags.load() };
    }
    traps::trap_fp(false);
    state.fp.load();
    exit::interrupts::load(state);
    exit::timers::load(vcpu, state);
    // What cannot be told now is told at the next turn.
    let _told = vm.tell_stolen_time(vcpu.index);
}

/// Settles the loaded vCPU's interrupts before it enters its guest. What else it may have to do instead.
#[inline(always)]
pub fn settle(vcpu: &VcpuRef, state: &mut State) -> Option<Leave> {
    exit::interrupts::flush(vcpu, state);
    None
}

/// Lets the loaded vCPU run until it leaves.
pub fn until_it_leaves(cpu: usize, vcpu: &VcpuRef, state: &mut State) -> Leave {
    enter_until_it_leaves::<El2>(cpu, vcpu, state)
}

/// By ERET from EL2.
struct El2;

impl Way for El2 {
    #[inline(always)]
    unsafe fn enter(cpu: usize, vcpu: &VcpuRef, state: &mut State) -> Next {
        // SAFETY: the caller's.
        match unsafe { switch::enter(&mut state.regs) } {
            ExitKind::SYNCHRONOUS => exit::synchronous(cpu, vcpu, state),
            ExitKind::INTERRUPT => irq::take(cpu, Some((vcpu, state))),
            _ => Next::Leave(exit::system_error(vcpu, hardware::esr())),
        }
    }
}

/// Takes this vCPU out of the hardware. What it has done last may change why it leaves.
pub fn put(cpu: usize, vcpu: &VcpuRef, state: &mut State, leave: Leave) -> Leave {
    let error = hardware::take_system_error();
    let leave = error.map_or(leave, |syndrome| exit::system_error(vcpu, syndrome));
    exit::timers::put(vcpu, state);
    exit::interrupts::save(vcpu, state);
    state.fp.save();
    if vcpu.vm.config.mte {
        state.tags.save();
    }
    state.el1.save();
    vcpu.vm.put_tables(cpu);
    leave
}

/// When the loaded vCPU must come back for a timer of its own: the virtual timer comes by itself.
#[inline]
pub fn deadline(_vcpu: &VcpuRef, state: &State, now: u64) -> Option<u64> {
    state.physical_timer.deadline(now)
}

/// When a vCPU that waits has to be woken by a timer of its own.
pub fn alarm(_vcpu: &VcpuRef, state: &State) -> Option<u64> {
    [state.timer.deadline(), state.physical_timer.deadline(timer::now())].into_iter().flatten().min()
}
