//! A second virtual machine that goes on where a running one is (design D2, D3).
//!
//! Protocol, host's work: [`Vm::hold`] keeps the parent's vCPUs off every CPU, at an instruction boundary, with their
//! registers, interrupts and timers saved; [`Vm::fork`] makes a child from it, which is paused; dropping the [`Hold`] lets the parent
//! go on; [`Vm::equip`] makes what only a child that runs needs; [`Vm::follow`] puts it in the parent's status. Memory is shared by the core in a time that does
//! not grow with it; what is copied here is the rest: vCPUs, interrupt controller, device registers. The child's disks and
//! terminal are its own, and the caller's to make.
//!
//! Time: a child's virtual count has its parent's offset, so it neither jumps nor stops. Timers go on in both.
//!
//! What is not the parent's: the generation ([`entresol_devices::vmgenid`]), whose interrupt is pending before the child's first
//! instruction; counters; stores that wait for the owner, which stay the parent's.
//!
//! Invariants: whatever fails, dropping the child gives everything back (INV-7). While a
//! [`Hold`] lives nobody resumes the parent: that is host's work too.
//! Lock order: as [`super`].

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::mem::ManuallyDrop;

use entresol_backing::ObjectHandle;
use entresol_mmu::Counter;
use entresol_slot::Hint;
use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicBool, Ordering};
use entresol_wire::bundle::FileIndex;
use entresol_wire::config;

use super::build;
use super::link::Link;
use super::pass_through::Passed;
use super::{FlashMemory, OutOfHeap, Overlay, Pause, Posted, Status, Vm, slots};
use crate::arch::{Board, Memory, cpu, map};
use crate::console::Terminal;
use crate::counters::Counters;
use crate::vcpu::{Vcpu, rooms};
use crate::{host, sched};

/// Why there is no child. Nothing is left of it, and the parent is as it was.
#[derive(Clone, Debug)]
pub enum ForkError {
    /// The heap has no room.
    OutOfHeap,
    /// It has what cannot be in two virtual machines.
    Unshareable {
        /// What, as the configuration calls it.
        field: &'static str,
    },
    /// The memory could not be shared.
    Memory(entresol_mmu::ForkError),
    /// A disk, or a flash that is in the middle of a command, could not be.
    Disk(entresol_backing::ForkError),
}

impl fmt::Display for ForkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfHeap => f.write_str(&OutOfHeap::text()),
            Self::Unshareable { field } => write!(f, "{field}: must not be configured"),
            Self::Memory(error) => write!(f, "memory: {error}"),
            Self::Disk(error) => write!(f, "disk: {error}"),
        }
    }
}

impl From<OutOfHeap> for ForkError {
    fn from(_: OutOfHeap) -> Self {
        Self::OutOfHeap
    }
}

/// A virtual machine none of whose vCPUs is on a CPU, or gets there.
#[must_use = "dropping it lets the virtual machine go on"]
pub struct Hold<'v>(&'v Arc<Vm>);

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let goes_on = {
            let status = self.0.status.lock();
            let goes_on = *status == Status::Running;
            self.0.runs.store(goes_on, Ordering::SeqCst);
            goes_on
        };
        if goes_on {
            sched::unpark(self.0);
        }
    }
}

/// What slot `id` shows.
fn slot_of(memory: &Memory, id: u32) -> Option<ObjectHandle> {
    let pin = host::get().epoch.pin(cpu::index());
    let slot = memory.slots().iter(&pin).find(|slot| u32::from(slot.id) == id)?;
    Some(ObjectHandle::from_raw(slot.object.get()))
}

impl Vm {
    /// Stops its vCPUs without changing its status. Host's work, with no vCPU loaded on this CPU.
    pub fn hold(self: &Arc<Self>) -> Hold<'_> {
        {
            let _status = self.status.lock();
            self.runs.store(false, Ordering::SeqCst);
        }
        sched::interrupt(self);
        sched::wait_until_off(self);
        Hold(self)
    }

    /// A copy called as `config` says, paused; see the module. `flash` is this one's and the copy's, which gets its bytes here.
    ///
    /// # Errors
    ///
    /// [`ForkError`].
    pub fn fork(
        &self,
        held: &Hold<'_>,
        config: config::Vm<FileIndex>,
        terminal: &Arc<Terminal>,
        disks: &[Arc<Overlay>],
        flash: Option<(&FlashMemory, &Arc<FlashMemory>)>,
    ) -> Result<Arc<Self>, ForkError> {
        assert!(core::ptr::eq(Arc::as_ptr(held.0), self), "the virtual machine that is forked is the one that is held");
        if !self.passed.is_empty() {
            return Err(ForkError::Unshareable { field: "pass_through" });
        }
        let shown = flash.filter(|_| slot_of(&self.memory, slots::FLASH).is_some());
        if let (Some((flash, copy)), None) = (flash, shown) {
            flash.copy_to(copy).map_err(ForkError::Disk)?;
        }
        let link = Link::default();
        let mut board = self.board.fork(&link, terminal)?;
        let flash_copy = flash.map(|(_, copy)| copy);
        let devices = self.devices.fork(&link, &board, terminal, disks, flash_copy, config.private_io)?;
        let vcpus = self.fork_vcpus()?;
        let posted = Posted::new(&config)?;
        sched::reserve(vcpus.len())?;
        let mut memory = self.memory.fork(cpu::index()).map_err(|error| {
            sched::release(vcpus.len());
            ForkError::Memory(error)
        })?;
        if let (Some((_, copy)), Some(object)) = (shown, slot_of(&memory, slots::FLASH)) {
            copy.take(object);
        }
        if config.merge
            && let Err(error) = memory.enable_merging(cpu::index())
        {
            log::warn!("vm {}: its pages are not merged: {error}", config.name);
        }
        let ram = {
            let pin = host::get().epoch.pin(cpu::index());
            let slot = memory.slots().find(&pin, map::RAM.frame(), &Hint::new());
            ObjectHandle::from_raw(slot.expect("slot 0 is the memory, and stays").object.get())
        };
        if let Err(error) = Board::shade(&mut memory, &config) {
            sched::release(vcpus.len());
            memory.destroy(cpu::index());
            build::destroy_ram(ram);
            return Err(error.into());
        }
        board.take_over(&memory);
        let vm = Arc::new(Self {
            config,
            memory: ManuallyDrop::new(memory),
            counters: Counters::default(),
            posted,
            tracking: Default::default(),
            unclaimed: Counter::new(),
            devices,
            board,
            passed: Passed::none(),
            ram,
            short: Default::default(),
            vcpus,
            status: Mutex::new(Status::Paused(Pause::NotStarted)),
            runs: AtomicBool::new(false),
        });
        link.tie(&vm);
        vm.board.renew_generation();
        Ok(vm)
    }

    /// Gives a fresh copy that is to run what its parent does not have to wait for: page-frame caches.
    ///
    /// # Errors
    ///
    /// [`ForkError::OutOfHeap`].
    pub fn equip(&self) -> Result<(), ForkError> {
        Ok(self.memory.make_caches(self.devices.caches()).map_err(|_| OutOfHeap)?)
    }

    fn fork_vcpus(&self) -> Result<Box<[Vcpu]>, OutOfHeap> {
        let mut vcpus = Vec::new();
        vcpus.try_reserve_exact(self.vcpus.len()).map_err(|_| OutOfHeap)?;
        vcpus.extend(self.vcpus.iter().zip(rooms(self.vcpus.len())?).map(|(vcpu, room)| vcpu.fork(room)));
        Ok(vcpus.into_boxed_slice())
    }

    /// A fresh copy takes the status of its parent: it runs, or is paused as that is.
    pub fn follow(self: &Arc<Self>, parent: Status) {
        self.set_status(parent);
        if parent == Status::Running {
            sched::unpark(self);
        }
    }
}
