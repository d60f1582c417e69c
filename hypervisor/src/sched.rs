//! The scheduler: which vCPU a CPU runs next.
//!
//! Purpose: vCPUs of all virtual machines share the physical CPUs round-robin, preempted when a slice ends and another
//! vCPU is ready. A vCPU that waits for an interrupt gives its CPU away; a timer or an interrupt makes it ready again.
//!
//! Protocol: every change of a vCPU's [`Run`] state happens under the one lock here. A CPU that finds nothing to run
//! marks itself idle under the same lock, so a wake-up either sees it idle and sends it an interrupt, or happens before
//! it looks for work. A vCPU goes to wait only if, under the lock, nothing is deliverable to it: whoever makes an
//! interrupt pending does so first and takes the lock after. The same holds for one that waits for a page.
//!
//! The first CPUs may be set aside for the hypervisor's own work ([`set_aside`]): no vCPU is picked there, and none of them counts as idle.
//!
//! Invariants: a vCPU is in at most one place: the ready queue, the waiting list, one CPU, or none. The queue and the
//! list have room for every vCPU that exists ([`reserve`]), so nothing here allocates while guests run.
//! Lock order: a vCPU's own state → scheduler; nothing is taken under the scheduler but the interrupt controller's
//! redistributor lock (for "is anything deliverable") and the lock of readings.

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::arch::{self, cpu};
use entresol_devices::kick::Kick;
use entresol_sync::Mutex;
use entresol_sync::atomic::Ordering;

use crate::paging::{self, Ticket};
use crate::vm::{OutOfHeap, Vm};

/// Where a vCPU is. Stored in the vCPU, written under the scheduler's lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Powered off, as PSCI means it.
    Off,
    /// In the ready queue.
    Ready,
    /// On a CPU.
    Running(usize),
    /// Waits for an interrupt.
    Waiting,
    /// Waits for a page.
    Fetching,
    /// Would be ready, but its virtual machine is paused.
    Parked,
}

/// A count of the physical counter, or never. Each variant of [`Leave`] has one register or none, so that every exit returns two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline(u64);

impl Deadline {
    /// Never.
    pub const NEVER: Self = Self(u64::MAX);

    /// At this count. No counter comes to the last one: the rollover time is 40 years at least (Arm DDI 0487, D12.1).
    pub const fn at(count: u64) -> Self {
        Self(count)
    }

    /// The count.
    pub fn count(self) -> Option<u64> {
        (self != Self::NEVER).then_some(self.0)
    }
}

/// Why a vCPU leaves its CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// Its slice is over, or the hypervisor has work.
    Ready,
    /// It waits for an interrupt, at the latest until this count of the physical counter.
    Wait(Deadline),
    /// It waits for a page that is being fetched.
    Fetch(Ticket),
    /// It powered itself off.
    #[cfg_attr(target_arch = "x86_64", expect(dead_code, reason = "INIT makes it wait for SIPI, which is a wait"))]
    Off,
    /// Its virtual machine no longer runs.
    Park,
}

/// A vCPU by name.
#[derive(Clone)]
pub struct VcpuRef {
    /// Its virtual machine.
    pub vm: Arc<Vm>,
    /// Its number there.
    pub index: usize,
}

impl VcpuRef {
    fn is(&self, vm: &Vm, index: usize) -> bool {
        core::ptr::eq(Arc::as_ptr(&self.vm), vm) && self.index == index
    }
}

struct Waiter {
    vcpu: VcpuRef,
    deadline: Option<u64>,
    /// The page that it waits for; no interrupt ends that.
    page: Option<Ticket>,
    cpu: usize,
}

struct Queues {
    ready: VecDeque<VcpuRef>,
    waiting: Vec<Waiter>,
    idle: u64,
    vcpus: usize,
    /// CPUs, the first ones, that run no vCPU.
    aside: usize,
}

static QUEUES: Mutex<Queues> =
    Mutex::new(Queues { ready: VecDeque::new(), waiting: Vec::new(), idle: 0, vcpus: 0, aside: 0 });

/// Keeps vCPUs off the first `aside` CPUs. Before any is made ready.
pub fn set_aside(aside: usize) {
    QUEUES.lock().aside = aside;
}

/// Makes room for `vcpus` more vCPUs.
///
/// # Errors
///
/// [`OutOfHeap`]; nothing changed.
pub fn reserve(vcpus: usize) -> Result<(), OutOfHeap> {
    let mut queues = QUEUES.lock();
    let total = queues.vcpus + vcpus;
    let (ready, waiting) = (queues.ready.len(), queues.waiting.len());
    queues.ready.try_reserve(total - ready).map_err(|_| OutOfHeap)?;
    queues.waiting.try_reserve(total - waiting).map_err(|_| OutOfHeap)?;
    queues.vcpus = total;
    Ok(())
}

/// Gives back the room of a virtual machine whose vCPUs are all gone.
pub fn release(vcpus: usize) {
    QUEUES.lock().vcpus -= vcpus;
}

impl Queues {
    fn make_ready(&mut self, vcpu: VcpuRef) {
        let slot = vcpu.vm.vcpu(vcpu.index);
        if !vcpu.vm.may_run() {
            slot.set_run(Run::Parked);
            return;
        }
        slot.set_run(Run::Ready);
        slot.wait.begin();
        self.ready.push_back(vcpu);
        if self.idle != 0 {
            arch::kick(self.idle.trailing_zeros() as usize);
        }
    }

    fn stop_waiting(&mut self, vm: &Vm, index: usize) -> Option<VcpuRef> {
        let place = self.waiting.iter().position(|waiter| waiter.vcpu.is(vm, index))?;
        Some(self.waiting.swap_remove(place).vcpu)
    }
}

/// Powers a vCPU on. False if it is on already.
pub fn power_on(vcpu: VcpuRef, prepare: impl FnOnce()) -> bool {
    let mut queues = QUEUES.lock();
    if vcpu.vm.vcpu(vcpu.index).run() != Run::Off {
        return false;
    }
    prepare();
    queues.make_ready(vcpu);
    true
}

/// The next vCPU for CPU `cpu`, now running there; or `None`, and the CPU counts as idle unless it is set aside.
pub fn pick(cpu: usize) -> Option<VcpuRef> {
    let mut queues = QUEUES.lock();
    if cpu < queues.aside {
        return None;
    }
    while let Some(vcpu) = queues.ready.pop_front() {
        let slot = vcpu.vm.vcpu(vcpu.index);
        if vcpu.vm.may_run() {
            slot.set_run(Run::Running(cpu));
            slot.wait.end();
            queues.idle &= !(1 << cpu);
            return Some(vcpu);
        }
        slot.set_run(Run::Parked);
    }
    queues.idle |= 1 << cpu;
    None
}

/// CPU `cpu` is not idle any more: it looks for work again.
pub fn wake_self(cpu: usize) {
    QUEUES.lock().idle &= !(1 << cpu);
}

/// A vCPU has left CPU `cpu`; its state is saved, and its lock is free: nobody else takes it until the vCPU is ready.
/// `deliverable` says whether an interrupt waits for it.
pub fn put(cpu: usize, vcpu: VcpuRef, leave: Leave, deliverable: impl FnOnce() -> bool) {
    let mut queues = QUEUES.lock();
    let slot = vcpu.vm.vcpu(vcpu.index);
    match leave {
        Leave::Off => slot.set_run(Run::Off),
        Leave::Park => queues.make_ready(vcpu),
        Leave::Ready => queues.make_ready(vcpu),
        // One that waits holds a share of its virtual machine, which nobody would come for after its end.
        Leave::Wait(_) if !vcpu.vm.may_run() || deliverable() => queues.make_ready(vcpu),
        Leave::Wait(deadline) => {
            slot.set_run(Run::Waiting);
            queues.waiting.push(Waiter { vcpu, deadline: deadline.count(), page: None, cpu });
        }
        Leave::Fetch(page) if !vcpu.vm.may_run() || !paging::is_pending(page) => queues.make_ready(vcpu),
        Leave::Fetch(page) => {
            slot.set_run(Run::Fetching);
            queues.waiting.push(Waiter { vcpu, deadline: None, page: Some(page), cpu });
        }
    }
}

/// Something may be deliverable to these vCPUs of `vm`: the waiting become ready, the running look.
pub fn kick(vm: &Vm, vcpus: Kick) {
    let this = cpu::index();
    let mut queues = QUEUES.lock();
    for index in vcpus.iter().filter(|index| *index < vm.vcpus()) {
        match vm.vcpu(index).run() {
            Run::Waiting => {
                if let Some(vcpu) = queues.stop_waiting(vm, index) {
                    queues.make_ready(vcpu);
                }
            }
            Run::Running(cpu) if cpu != this => arch::kick(cpu),
            Run::Running(_) | Run::Off | Run::Ready | Run::Fetching | Run::Parked => {}
        }
    }
}

/// The reading `page`, which is not pending any more, is over: every vCPU that waited for it is ready.
pub fn fetched(page: Ticket) {
    let mut queues = QUEUES.lock();
    while let Some(place) = queues.waiting.iter().position(|waiter| waiter.page == Some(page)) {
        let vcpu = queues.waiting.swap_remove(place).vcpu;
        queues.make_ready(vcpu);
    }
}

/// Every vCPU of `vm` that runs elsewhere looks up.
pub fn interrupt(vm: &Vm) {
    let this = cpu::index();
    let _queues = QUEUES.lock();
    for index in 0..vm.vcpus() {
        if let Run::Running(cpu) = vm.vcpu(index).run()
            && cpu != this
        {
            arch::kick(cpu);
        }
    }
}

/// The vCPUs of `vm` that were parked become ready: it runs again.
pub fn unpark(vm: &Arc<Vm>) {
    let mut queues = QUEUES.lock();
    for index in 0..vm.vcpus() {
        if vm.vcpu(index).run() == Run::Parked {
            queues.make_ready(VcpuRef { vm: vm.clone(), index });
        }
    }
}

/// Takes every vCPU of `vm` off: none is ready, waits, or runs once this returns. The virtual machine must already
/// refuse to run, and the caller must not be inside one of its vCPUs.
pub fn withdraw(vm: &Vm) {
    {
        let mut queues = QUEUES.lock();
        queues.ready.retain(|vcpu| !core::ptr::eq(Arc::as_ptr(&vcpu.vm), vm));
        queues.waiting.retain(|waiter| !core::ptr::eq(Arc::as_ptr(&waiter.vcpu.vm), vm));
        for index in 0..vm.vcpus() {
            match vm.vcpu(index).run() {
                Run::Running(cpu) => arch::kick(cpu),
                Run::Ready | Run::Waiting | Run::Fetching => vm.vcpu(index).set_run(Run::Parked),
                Run::Off | Run::Parked => {}
            }
        }
    }
    wait_until_off(vm);
}

/// Waits until no vCPU of `vm` is on a CPU. The virtual machine must already refuse to run and its vCPUs have been
/// interrupted; the caller must not be inside one of them.
pub fn wait_until_off(vm: &Vm) {
    // A running vCPU leaves at its next exit, which the interrupt forces; its CPU never waits for this one.
    while (0..vm.vcpus()).any(|index| matches!(vm.vcpu(index).run(), Run::Running(_))) {
        cpu::relax();
    }
    core::sync::atomic::fence(Ordering::SeqCst);
}

/// Makes ready every vCPU that waited on this CPU's timer and whose time has come.
pub fn expire(cpu: usize, now: u64) {
    let mut queues = QUEUES.lock();
    while let Some(place) = queues
        .waiting
        .iter()
        .position(|waiter| waiter.cpu == cpu && waiter.deadline.is_some_and(|deadline| deadline <= now))
    {
        let vcpu = queues.waiting.swap_remove(place).vcpu;
        queues.make_ready(vcpu);
    }
}

/// The earliest moment at which [`expire`] has something to do on `cpu`.
pub fn next_expiry(cpu: usize) -> Option<u64> {
    let queues = QUEUES.lock();
    queues.waiting.iter().filter(|waiter| waiter.cpu == cpu).filter_map(|waiter| waiter.deadline).min()
}

/// Whether no vCPU but the one on CPU `cpu` runs, or could.
pub fn is_alone(cpu: usize) -> bool {
    let queues = QUEUES.lock();
    let others = (queues.aside..cpu::count()).filter(|other| *other != cpu);
    queues.ready.is_empty() && others.into_iter().all(|other| queues.idle & 1 << other != 0)
}

/// Whether another vCPU is ready, so that a slice must end.
pub fn contended() -> bool {
    !QUEUES.lock().ready.is_empty()
}
