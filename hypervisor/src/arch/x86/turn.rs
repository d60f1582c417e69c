//! A vCPU comes to a CPU, enters its guest, and goes.
//!
//! Protocol: [`load`], then any number of [`settle`] where [`Board::flag`](super::Board::flag) is up, and entries; then [`put`].
//! Interrupts of the machine are held off while the hypervisor runs: one that comes between the last check and the entry makes the guest come
//! out before its first instruction.

use entresol_metal_x86::{switch, timer};

use super::state::Halt;
use super::{State, exit};
use crate::exit::Next;
use crate::run::{Way, enter_until_it_leaves};
use crate::sched::{Leave, VcpuRef};

/// Makes the hardware this vCPU.
pub fn load(cpu: usize, vcpu: &VcpuRef, state: &mut State) {
    let vm = &vcpu.vm;
    // Its translations are told apart by who ran last on the CPU, not by the number.
    let _number = vm.memory.load(cpu);
    if let Some(boot) = vm.vcpu(vcpu.index).boot.lock().take() {
        state.start(boot);
        exit::shadow::shade(vcpu, state);
    }
    state.guest.set_root(vm.memory.table().root().start());
    state.guest.load(cpu);
    // Where it cannot run its virtual machine has ended, and it is not entered.
    exit::shadow::load(cpu, vcpu, state);
    state.fp.load();
    exit::timer_came(vcpu, state);
    // One that halts goes on for a reason only, whatever made it ready.
    if state.halt != Halt::No {
        vm.board.pc().apic().look_again(vcpu.index);
    }
    exit::clock::refresh(cpu, vcpu, state);
}

/// Settles the loaded vCPU's interrupts before it enters its guest; or why it leaves instead.
#[inline]
pub fn settle(vcpu: &VcpuRef, state: &mut State) -> Option<Leave> {
    exit::interrupts::settle(vcpu, state)
}

/// Lets the loaded vCPU run until it leaves.
pub fn until_it_leaves(cpu: usize, vcpu: &VcpuRef, state: &mut State) -> Leave {
    if switch::is_intel() {
        enter_until_it_leaves::<Vmx>(cpu, vcpu, state)
    } else {
        enter_until_it_leaves::<Svm>(cpu, vcpu, state)
    }
}

/// By AMD's VMRUN.
struct Svm;

impl Way for Svm {
    #[inline(always)]
    unsafe fn enter(cpu: usize, vcpu: &VcpuRef, state: &mut State) -> Next {
        // SAFETY: the caller's. Its nested tables are the core's, no port is passed through, and of the model-specific registers only those
        // that the processor keeps for it.
        unsafe { switch::enter_amd(cpu, &mut state.guest) };
        exit::handle(cpu, vcpu, state)
    }
}

/// By Intel's VMLAUNCH and VMRESUME.
struct Vmx;

impl Way for Vmx {
    #[inline]
    unsafe fn enter(cpu: usize, vcpu: &VcpuRef, state: &mut State) -> Next {
        // SAFETY: as for AMD's.
        unsafe { switch::enter_intel(cpu, &mut state.guest) };
        exit::handle_intel(cpu, vcpu, state)
    }
}

/// Takes this vCPU out of the hardware. Why it leaves stays.
pub fn put(cpu: usize, vcpu: &VcpuRef, state: &mut State, leave: Leave) -> Leave {
    state.fp.save();
    state.guest.put();
    vcpu.vm.put_tables(cpu);
    leave
}

/// When the loaded vCPU must come back for a timer of its own, in counts of the machine's.
#[inline]
pub fn deadline(vcpu: &VcpuRef, state: &State, now: u64) -> Option<u64> {
    let guest = vcpu.vm.board.pc().deadline(vcpu.index)?;
    // The guest's counter may have been moved far: what is due is due now.
    let left = guest.saturating_sub(now.wrapping_add(state.now().offset));
    Some(now.saturating_add(left))
}

/// When a vCPU that waits has to be woken by a timer of its own.
pub fn alarm(vcpu: &VcpuRef, state: &State) -> Option<u64> {
    deadline(vcpu, state, timer::now()).filter(|_| state.is_open())
}
