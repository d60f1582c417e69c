//! What a physical CPU does all day: pick a vCPU, load it, run it until it leaves, put it, look after the host's work.
//!
//! Protocol of one turn in the guest: interrupts of the vCPU are settled before every entry; an exit is handled with the
//! vCPU still loaded; only [`crate::exit::Next`] other than `Again` ends the turn. Physical interrupts are masked
//! while the hypervisor runs, so an event between the last check and the entry makes the guest exit at once.
//!
//! Invariants: nothing here allocates. The CPU is pinned to the grace period only inside `exit`, never across an entry.
//! Lock order: vCPU state (for the whole turn) → everything else.

use crate::arch::turn::{self, settle};
use crate::arch::{State, cpu, timer};
use crate::exit::Next;
use crate::sched::{self, Deadline, Leave, VcpuRef};
use crate::vm::Pause;
use crate::{host_work, irq, merge};

/// Length of a turn while others are ready, in milliseconds.
const SLICE_MS: u64 = 10;

/// Length of a turn in counts of the timer.
fn slice() -> u64 {
    timer::frequency() / 1000 * SLICE_MS
}

/// Runs vCPUs on CPU `cpu` for ever.
pub fn forever(cpu: usize) -> ! {
    loop {
        host_work::run(cpu);
        match sched::pick(cpu) {
            Some(vcpu) => take_turn(cpu, vcpu),
            None => idle(cpu),
        }
    }
}

/// Sleeps until an interrupt, and handles it.
fn idle(cpu: usize) {
    arm(cpu, None, None);
    if !host_work::pending(cpu) {
        cpu::wait_for_interrupt();
    }
    sched::wake_self(cpu);
    irq::take(cpu, None);
}

/// Sets the CPU's timer to the first moment at which something must happen.
pub fn arm(cpu: usize, slice_end: Option<u64>, vcpu_deadline: Option<u64>) {
    let deadline =
        [slice_end, vcpu_deadline, sched::next_expiry(cpu), merge::deadline(cpu)].into_iter().flatten().min();
    match deadline {
        Some(deadline) => timer::set_deadline(deadline),
        None => timer::clear(),
    }
}

/// One turn of one vCPU.
fn take_turn(cpu: usize, vcpu: VcpuRef) {
    let leave = {
        let mut state = vcpu.vm.vcpu(vcpu.index).state.lock();
        turn::load(cpu, &vcpu, &mut state);
        let leave = turn::until_it_leaves(cpu, &vcpu, &mut state);
        match turn::put(cpu, &vcpu, &mut state, leave) {
            Leave::Wait(at_most) => {
                let first = [at_most.count(), deadline(&vcpu, &state)].into_iter().flatten().min();
                Leave::Wait(first.map_or(Deadline::NEVER, Deadline::at))
            }
            other => other,
        }
    };
    let vm = vcpu.vm.clone();
    let index = vcpu.index;
    sched::put(cpu, vcpu, leave, || vm.wakes(index));
}

/// A way in which this architecture's processors enter guests: each has a loop of its own, so that nothing asks which at an entry.
pub trait Way {
    /// Lets the loaded vCPU run until it comes back, and answers why it did.
    ///
    /// # Safety
    ///
    /// [`turn::load`] made the hardware hold this vCPU's state and its virtual machine's tables; nothing else runs on this CPU, which is
    /// `cpu`, and whose way this is.
    unsafe fn enter(cpu: usize, vcpu: &VcpuRef, state: &mut State) -> Next;
}

/// Lets the loaded vCPU run until it leaves this CPU, `cpu`, whose way is `W`.
#[inline(never)]
pub fn enter_until_it_leaves<W: Way>(cpu: usize, vcpu: &VcpuRef, state: &mut State) -> Leave {
    if vcpu.vm.memory.enter(cpu, vcpu.index as u32).is_err() {
        vcpu.vm.pause(Pause::DirtyRingFull);
        return Leave::Park;
    }
    let mut slice_end = timer::now() + slice();
    tick(vcpu);
    arm(cpu, Some(slice_end), turn::deadline(vcpu, state, timer::now()));
    let flag = vcpu.vm.board.flag(vcpu.index);
    loop {
        if !vcpu.vm.may_run() {
            return Leave::Park;
        }
        if vcpu.vm.has_device_work() {
            vcpu.vm.run_devices();
        }
        if flag.is_up()
            && let Some(leave) = settle(vcpu, state)
        {
            return leave;
        }
        // SAFETY: `load` made the hardware hold this vCPU's state and its VM's tables; nothing else runs on this CPU.
        let next = unsafe { W::enter(cpu, vcpu, state) };
        // Nearly always, so it is asked first.
        if next == Next::Again {
            continue;
        }
        if let Next::Leave(leave) = next {
            return leave;
        }
        let now = timer::now();
        if now >= slice_end {
            tick(vcpu);
            if sched::contended() {
                return Leave::Ready;
            }
            slice_end = now + slice();
        }
        if host_work::pending(cpu) {
            return Leave::Ready;
        }
        arm(cpu, Some(slice_end), turn::deadline(vcpu, state, now));
    }
}

/// Devices that keep time are the first vCPU's business.
fn tick(vcpu: &VcpuRef) {
    if vcpu.index == 0 {
        vcpu.vm.board.tick();
    }
}

/// When a vCPU that waits has to be woken by a timer.
fn deadline(vcpu: &VcpuRef, state: &State) -> Option<u64> {
    let alarm = if vcpu.index == 0 { vcpu.vm.board.alarm() } else { None };
    [turn::alarm(vcpu, state), alarm].into_iter().flatten().min()
}
