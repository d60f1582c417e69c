//! A virtual machine: its memory, its vCPUs, its interrupt controller, its devices.
//!
//! Protocol of its life: [`build`] makes it from its configuration and files, not running; [`Vm::start`] powers vCPU 0 on; it
//! runs until someone pauses or ends it. Whoever ends it only sets its [`Status`] and makes its vCPUs look up; taking it apart
//! is the host's work, done with none of its vCPUs on a CPU.
//!
//! A copy of a running one is made by [`Vm::fork`].
//!
//! Invariants: `runs` is true exactly in [`Status::Running`], but while a [`Hold`] lives. A vCPU that sees it false leaves its CPU before it enters
//! the guest again. A virtual machine is dropped by the host's work only, unpinned.
//! Lock order: status → scheduler.

mod aliases;
mod balloon;
pub mod build;
mod devices;
mod dirty;
mod flash;
mod fork;
mod link;
mod memory;
mod overlay;
pub mod pass_through;
mod posted;
pub mod rom;
mod saved;
pub mod slots;
mod wait;

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::mem::ManuallyDrop;

use entresol_addr::PAGE_SIZE;

use entresol_backing::{Grant, Object, ObjectHandle};
use entresol_mmu::Counter;
use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicBool, Ordering};
use entresol_wire::bundle::FileIndex;
use entresol_wire::config;

use crate::arch::{self, Board, Boot, Memory, cpu};
use crate::counters::Counters;
use crate::host;
use crate::host_work::{self, Work};
use crate::paging::Short;
use crate::sched::{self, VcpuRef};
use crate::vcpu::Vcpu;
use devices::Devices;
use dirty::Tracking;

pub use aliases::Alias;
pub use build::BuildError;
pub use devices::Claim;
pub use dirty::{DirtyError, LogOptions, Place, Run};
pub use flash::FlashMemory;
pub use fork::{ForkError, Hold};
pub use link::Link;
pub use memory::BootMemory;
pub use overlay::Overlay;
use pass_through::Passed;
pub use posted::{Posted, Store};
pub use saved::Saved;
pub use wait::Wait;

/// What outlives a virtual machine's resets.
#[derive(Clone, Default)]
pub struct Media {
    /// Its disks, in the order of its configuration.
    pub disks: Vec<Arc<Overlay>>,
    /// Its flash.
    pub flash: Option<Arc<FlashMemory>>,
}

/// The heap has no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfHeap;

impl OutOfHeap {
    /// In words.
    pub fn text() -> String {
        "the hypervisor's heap has no room for it".to_string()
    }
}

/// Why a virtual machine is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// It was never started: its configuration says so.
    NotStarted,
    /// Its owner asked for it.
    Owner,
    /// A page was needed and there is no frame.
    OutOfMemory,
    /// Its coalesced writes have filled their ring.
    CoalescedFull,
    /// A page is in a store that cannot be read now, or one that is needed cannot be made room for, because others cannot be written.
    Storage,
    /// A vCPU's dirty ring is full.
    DirtyRingFull,
}

/// How a virtual machine ended by its own doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// PSCI SYSTEM_OFF.
    PowerOff,
    /// PSCI SYSTEM_RESET.
    Reset,
    /// Its owner killed it.
    Killed,
}

/// How it ended because something that cannot go on happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// An SError was taken from it.
    #[cfg_attr(target_arch = "x86_64", expect(dead_code, reason = "a machine check ends the hypervisor"))]
    SystemError {
        /// ESR_EL2.
        syndrome: u64,
    },
    /// A fault that no rule covers.
    Unsupported {
        /// ESR_EL2.
        syndrome: u64,
    },
    /// A triple fault.
    #[cfg_attr(target_arch = "aarch64", expect(dead_code, reason = "every exit has a decoded reason"))]
    TripleFault,
    /// The processor refused its state.
    #[cfg_attr(target_arch = "aarch64", expect(dead_code, reason = "every exit has a decoded reason"))]
    InvalidState,
    /// It came back for a reason that nobody asked for.
    #[cfg_attr(target_arch = "aarch64", expect(dead_code, reason = "every exit has a decoded reason"))]
    Unexpected,
    /// A slot without an object behind it; or, of x86-64's, tables or code where no memory is.
    BadObject {
        /// Where.
        gpa: u64,
    },
    /// An access to no memory that is not emulated, and its owner's policy.
    NoSyndrome {
        /// The instruction, if it could be read.
        instruction: Option<u32>,
        /// Where.
        gpa: u64,
        /// ESR_EL2.
        syndrome: u64,
    },
}

/// Where it is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Its vCPUs may run.
    Running,
    /// They may not, for now.
    Paused(Pause),
    /// They never will again.
    Stopped(Stop),
    /// Likewise.
    Crashed(Crash),
}

/// A virtual machine.
pub struct Vm {
    /// What its owner wants.
    pub config: config::Vm<FileIndex>,
    /// Its memory.
    pub memory: ManuallyDrop<Memory>,
    /// Exits by reason.
    pub counters: Counters,
    /// Accesses that no memory and no device served.
    pub unclaimed: Counter,
    /// Its zones of coalesced MMIO, and its doorbells.
    pub posted: Posted,
    tracking: Tracking,
    pub(crate) devices: Devices,
    /// What else it has. Dropped after the memory that shows some of it.
    pub board: Box<Board>,
    /// Devices of the machine that are its own.
    passed: Passed,
    ram: ObjectHandle,
    /// Who waits because it has all that it may have.
    pub short: Short,
    vcpus: Box<[Vcpu]>,
    status: Mutex<Status>,
    runs: AtomicBool,
}

impl Vm {
    /// Number of vCPUs.
    #[inline]
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// vCPU `index`.
    #[inline]
    pub fn vcpu(&self, index: usize) -> &Vcpu {
        &self.vcpus[index]
    }

    /// Whether its vCPUs may run.
    #[inline]
    pub fn may_run(&self) -> bool {
        self.runs.load(Ordering::SeqCst)
    }

    /// Where it is in its life.
    pub fn status(&self) -> Status {
        *self.status.lock()
    }

    /// Frames that its memory holds.
    pub fn resident_frames(&self) -> u64 {
        self.with_ram(Object::resident_frames).unwrap_or(0)
    }

    /// The object that is its memory.
    pub fn ram(&self) -> ObjectHandle {
        self.ram
    }

    /// Frames of its memory, in memory or not.
    pub fn memory_frames(&self) -> u64 {
        self.config.memory / PAGE_SIZE
    }

    /// What backs frame `frame` of its memory, if that is in memory: for looking at its size.
    pub fn backing(&self, frame: u64) -> Option<Grant> {
        self.with_ram(|object| object.present(&host::get().supply(cpu::index()), frame)).flatten()
    }

    /// Whether its memory may be shared with others.
    pub fn is_forked(&self) -> bool {
        self.with_ram(Object::is_forked).unwrap_or(false)
    }

    /// Pages of its memory that are in a store.
    pub fn stored_frames(&self) -> u64 {
        self.with_ram(Object::stored_frames).unwrap_or(0)
    }

    /// Frames that it may have more. `None`: as many as there are.
    pub fn room(&self) -> Option<u64> {
        self.with_ram(Object::room).flatten()
    }

    /// Has no more than it may from now on: what its start needed is there.
    pub fn limit_memory(&self) {
        if let Some(max) = self.config.limits.max {
            self.with_ram(|object| object.set_limit(max / PAGE_SIZE));
        }
    }

    fn with_ram<T>(&self, look: impl FnOnce(&Object) -> T) -> Option<T> {
        let host = host::get();
        let pin = host.epoch.pin(cpu::index());
        host.objects.get(&pin, self.ram).map(look)
    }

    /// Whether `object` is its memory.
    pub fn shows(&self, object: ObjectHandle) -> bool {
        self.ram == object
    }

    /// Powers vCPU 0 on at `boot` and lets the virtual machine run.
    pub fn start(self: &Arc<Self>, boot: Boot) {
        self.power_on(Status::Running, boot);
    }

    /// Powers vCPU 0 on at `boot`, but the virtual machine waits for its owner.
    pub fn start_paused(self: &Arc<Self>, boot: Boot) {
        self.power_on(Status::Paused(Pause::NotStarted), boot);
    }

    fn power_on(self: &Arc<Self>, status: Status, boot: Boot) {
        self.set_status(status);
        *self.vcpu(0).boot.lock() = Some(boot);
        for index in 0..arch::first_vcpus(self.vcpus()) {
            let on = sched::power_on(VcpuRef { vm: self.clone(), index }, || ());
            assert!(on, "a virtual machine that was just built has no vCPU on");
        }
    }

    /// Gives the guest input; returns how many of the first bytes it took. The serial port has precedence; a guest that
    /// listens only at its virtio console gets it there.
    pub fn offer(&self, bytes: &[u8]) -> usize {
        let taken = self.board.offer(bytes);
        if taken == 0 && !self.board.is_heard() { self.devices.offer(bytes) } else { taken }
    }

    fn set_status(&self, status: Status) {
        let mut current = self.status.lock();
        *current = status;
        self.runs.store(status == Status::Running, Ordering::SeqCst);
    }

    /// Goes from `Running` to `to`; false if it is not running. Its vCPUs leave their CPUs soon.
    fn leave_running(&self, to: Status) -> bool {
        {
            let mut status = self.status.lock();
            if *status != Status::Running {
                return false;
            }
            *status = to;
            self.runs.store(false, Ordering::SeqCst);
        }
        sched::interrupt(self);
        true
    }

    /// Stops its vCPUs until [`Vm::resume`]. False if it is not running.
    pub fn pause(&self, reason: Pause) -> bool {
        let paused = self.leave_running(Status::Paused(reason));
        if paused && reason == Pause::OutOfMemory {
            log::warn!("vm {}: paused: OutOfMemory", self.config.name);
        }
        if paused {
            crate::control::state_changed(self);
        }
        paused
    }

    /// Lets a paused virtual machine run. False if it is not paused.
    pub fn resume(self: &Arc<Self>) -> bool {
        {
            let mut status = self.status.lock();
            if !matches!(*status, Status::Paused(_)) {
                return false;
            }
            *status = Status::Running;
            self.runs.store(true, Ordering::SeqCst);
        }
        self.devices.resume();
        sched::unpark(self);
        crate::control::state_changed(self);
        true
    }

    /// The end, by the guest's or the owner's wish. The first end counts.
    pub fn stop(&self, stop: Stop) {
        self.end(Status::Stopped(stop));
    }

    /// The end, because it cannot go on.
    pub fn crash(&self, crash: Crash) {
        log::error!("vm {}: crashed: {crash:x?}", self.config.name);
        self.end(Status::Crashed(crash));
    }

    fn end(&self, to: Status) {
        {
            let mut status = self.status.lock();
            // A reset is no end for good: its owner's kill still counts.
            let killed_instead = *status == Status::Stopped(Stop::Reset) && to == Status::Stopped(Stop::Killed);
            if matches!(*status, Status::Stopped(_) | Status::Crashed(_)) && !killed_instead {
                return;
            }
            *status = to;
            self.runs.store(false, Ordering::SeqCst);
        }
        sched::interrupt(self);
        host_work::raise(Work::Lifecycle);
    }

    /// Whether an interrupt waits that ends the wait of vCPU `index`, which is on no CPU.
    pub fn wakes(&self, index: usize) -> bool {
        let state = self.vcpu(index).state.lock();
        self.board.wakes(index, &state)
    }

    /// CPU `cpu` has put its vCPU.
    pub fn put_tables(&self, cpu: usize) {
        self.memory.leave(cpu);
        self.memory.put(cpu);
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let (host, cpu) = (host::get(), cpu::index());
        // They know addresses of memory that others get now.
        self.passed.reset();
        self.tracking.end();
        // SAFETY: taken once, here, and not used after.
        let memory = unsafe { ManuallyDrop::take(&mut self.memory) };
        memory.destroy(cpu);
        let supply = host.supply(cpu);
        if let Err(error) = host.objects.destroy(&supply, &host.epoch, self.ram) {
            log::error!("vm {}: its memory object stays: {error:?}", self.config.name);
        }
        host.pool.reap(&host.epoch, cpu, usize::MAX);
        supply.scrub(usize::MAX);
        sched::release(self.vcpus.len());
    }
}
