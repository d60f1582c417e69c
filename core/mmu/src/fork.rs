//! A second virtual machine with the same memory, in a time that does not grow with it (D2, D3).
//!
//! # Protocol of a fork
//!
//! 1. Plan: the child is made with its slots and with fresh, empty objects for the parent's anonymous ones (other objects
//!    are shown to both). All that can fail is here, and the parent runs meanwhile.
//! 2. Freeze the parent's objects: nothing is granted for writing any more.
//! 3. Start an invalidation of everything, and wait a grace period: no fault publishes, and nobody writes what was granted.
//! 4. Detach the parent's second stage, flush. Now no guest writes what is about to be shared.
//! 5. Share the roots, end the invalidation, thaw.
//!
//! vCPUs may run: what they store before the flush of step 4 completes is in both machines, what they store after step 5
//! in the parent alone, and in between they fault and try again. Whoever also wants their registers stops them first.
//! The owner changes no slot of the parent meanwhile; a slot changed since step 1 is in the child as it was.
//!
//! A child's slots do not log: its owner has asked for nothing yet.
//!
//! The detached tables are taken apart later, by [`Vm::reclaim`], so that no fork waits for what another has left: a fork
//! does it only where [`MOST_DETACHED`] others have left theirs, before it freezes anything.
//!
//! Without forced write-back, step 4 does not clean what it unmaps, or the pause would grow with it: a page is cleaned
//! where its entry is made again, as always, and before it is copied.
//!
//! Invariants: INV-3 (an invalidation of everything is in progress until the roots are shared), INV-7, INV-11.
//! Lock order: the lock of forks is the first of all; an object's structure lock, in the freeze alone.

use alloc::vec::Vec;
use core::fmt;

use entresol_addr::{PAGE_SHIFT, PfnRange};
use entresol_backing::{Frozen, Kind, ObjectHandle, Order};
use entresol_machine::Machine;
use entresol_slot::{ObjectId, Slot, SlotError, SlotFlags, SlotRequest};
use entresol_sync::epoch::Moment;
use entresol_sync::planted;
use entresol_table::{Detached, Format, Permissions, Straddle};

use crate::create::root_order;
use crate::{CreateError, OutOfHeap, TooMany, Vm};

/// Why a virtual machine was not forked. Nothing is left behind, and the parent is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForkError {
    /// The child could not be made.
    Create(CreateError),
    /// A slot of the child could not be made.
    Slot(SlotError),
    /// An object could not be shared.
    Object {
        /// The parent's object.
        handle: ObjectHandle,
        /// Why.
        error: entresol_backing::ForkError,
    },
    /// An object is shown to another machine too, or held: a copy for one of them would not be a copy for the other.
    SharedObject {
        /// The object.
        handle: ObjectHandle,
    },
    /// Too many invalidations of the parent are in progress.
    TooMany,
    /// No frames for what replaces the parent's tables.
    OutOfMemory,
    /// The heap has no room for the list of slots.
    OutOfHeap,
}

impl fmt::Display for ForkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create(error) => write!(f, "child: {error:?}"),
            Self::Slot(error) => write!(f, "child's slot: {error}"),
            Self::Object { handle, error } => write!(f, "object {:#x}: {error}", handle.raw()),
            Self::SharedObject { handle } => {
                write!(f, "object {:#x}: must be shown to this machine alone", handle.raw())
            }
            Self::TooMany => f.write_str("invalidations: too many are in progress"),
            Self::OutOfMemory => entresol_backing::OutOfMemory.fmt(f),
            Self::OutOfHeap => f.write_str("heap: no room for the list of slots"),
        }
    }
}

impl core::error::Error for ForkError {}

impl From<CreateError> for ForkError {
    fn from(error: CreateError) -> Self {
        Self::Create(error)
    }
}

impl From<TooMany> for ForkError {
    fn from(TooMany: TooMany) -> Self {
        Self::TooMany
    }
}

impl From<OutOfHeap> for ForkError {
    fn from(OutOfHeap: OutOfHeap) -> Self {
        Self::OutOfHeap
    }
}

/// Forks whose tables may wait to be taken apart.
const MOST_DETACHED: usize = 16;

/// Tables that a fork detached, and since when.
pub(crate) struct Retiring {
    detached: Detached,
    since: Moment,
}

/// A parent's object and the child's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair {
    pub(crate) parent: ObjectHandle,
    pub(crate) child: ObjectHandle,
}

/// What is ready before anything is frozen.
struct Plan<'h, M, F> {
    child: Vm<'h, M, F>,
    /// The parent's slots as the plan saw them.
    slots: Vec<Slot>,
    /// Its anonymous objects, each once.
    pairs: Vec<Pair>,
}

pub(crate) fn with_room<T>(count: usize) -> Result<Vec<T>, OutOfHeap> {
    let mut list = Vec::new();
    list.try_reserve_exact(count).map_err(|_| OutOfHeap)?;
    Ok(list)
}

impl<'h, M: Machine, F: Format> Vm<'h, M, F> {
    /// A virtual machine with the same slots, whose memory reads as this one's does at one moment of the call; each has
    /// its own from then on. Its anonymous objects are new, are held by its slots, and become the caller's to destroy.
    ///
    /// Not called by a pinned CPU; `cpu` is the one that the caller runs on.
    ///
    /// # Errors
    ///
    /// [`ForkError`].
    pub fn fork(&self, cpu: usize) -> Result<Self, ForkError> {
        let _forking = self.forking.lock();
        let plan = self.plan_fork(cpu)?;
        match self.share_memory(cpu, &plan.pairs) {
            Ok(()) => Ok(plan.child),
            Err(error) => {
                plan.abandon(cpu);
                Err(error)
            }
        }
    }

    fn make_room_for_detached(&self, cpu: usize) -> Result<(), ForkError> {
        if self.detached.lock().len() >= MOST_DETACHED {
            self.reclaim_all(cpu);
        }
        Ok(self.detached.lock().try_reserve(1).map_err(|_| OutOfHeap)?)
    }

    /// Step 1.
    fn plan_fork(&self, cpu: usize) -> Result<Plan<'h, M, F>, ForkError> {
        let slots = self.list_slots(cpu)?;
        let pairs = with_room(slots.len())?;
        let child = Self::new(self.host, cpu, self.table.format(), self.options)?;
        let mut plan = Plan { child, slots, pairs };
        match self.fill_plan(cpu, &mut plan) {
            Ok(()) => Ok(plan),
            Err(error) => {
                plan.abandon(cpu);
                Err(error)
            }
        }
    }

    pub(crate) fn list_slots(&self, cpu: usize) -> Result<Vec<Slot>, ForkError> {
        let pin = self.host.epoch.pin(cpu);
        let mut slots = with_room(self.slots.iter(&pin).count())?;
        // A slot that was made since the count has no room: the owner makes none.
        let room = slots.capacity();
        slots.extend(self.slots.iter(&pin).map(|slot| *slot).take(room));
        Ok(slots)
    }

    /// The child's objects and slots.
    fn fill_plan(&self, cpu: usize, plan: &mut Plan<'h, M, F>) -> Result<(), ForkError> {
        for index in 0..plan.slots.len() {
            let slot = plan.slots[index];
            let parent = ObjectHandle::from_raw(slot.object.get());
            let object = self.child_object(cpu, &plan.slots, &mut plan.pairs, parent)?;
            let request = SlotRequest {
                id: slot.id.into(),
                base: slot.base.base(),
                size: slot.count << PAGE_SHIFT,
                object: ObjectId::new(object.raw()),
                offset: slot.offset << PAGE_SHIFT,
                flags: slot.flags.difference(SlotFlags::LOG_DIRTY).bits(),
            };
            plan.child.set_slot(cpu, &request).map_err(ForkError::Slot)?;
        }
        Ok(())
    }

    /// What the child shows where the parent, whose slots are `slots`, shows `parent`. `pairs`, which has room for one a slot,
    /// gets what is made for that.
    pub(crate) fn child_object(
        &self,
        cpu: usize,
        slots: &[Slot],
        pairs: &mut Vec<Pair>,
        parent: ObjectHandle,
    ) -> Result<ObjectHandle, ForkError> {
        if let Some(pair) = pairs.iter().find(|pair| pair.parent == parent) {
            return Ok(pair.child);
        }
        let kind = {
            let pin = self.host.epoch.pin(cpu);
            self.host.objects.get(&pin, parent).map(|object| object.kind())
        };
        if !matches!(kind, Some(Kind::Anonymous(_))) {
            return Ok(parent);
        }
        let shown = slots.iter().filter(|slot| slot.object.get() == parent.raw()).count();
        if self.host.objects.holds(parent) != Some(shown as u32) {
            return Err(ForkError::SharedObject { handle: parent });
        }
        let child = self.host.objects.create_like(&self.host.supply(cpu), parent);
        let child = child.map_err(|error| ForkError::Object { handle: parent, error })?;
        pairs.push(Pair { parent, child });
        Ok(child)
    }

    /// Steps 2 to 5.
    pub(crate) fn share_memory(&self, cpu: usize, pairs: &[Pair]) -> Result<(), ForkError> {
        self.make_room_for_detached(cpu)?;
        let mut frozen: Vec<Frozen<'_>> = with_room(pairs.len())?;
        let stash = self.take_stash(cpu)?;
        let started = self.freeze(pairs, &mut frozen).and_then(|()| Ok(self.announce(self.everything())?));
        let invalidation = started.inspect_err(|_| {
            self.host.pool.give(cpu, stash.start(), root_order(self.table.geometry()));
        })?;
        if !planted!(ZG4) {
            self.host.epoch.synchronize();
        }
        self.withdraw_writable(cpu, stash);
        let supply = self.host.supply(cpu);
        let mut outcome = Ok(());
        for (frozen, pair) in frozen.iter().zip(pairs) {
            let shared = frozen.share_with(&supply, pair.child);
            outcome = outcome.and(shared.map_err(|error| ForkError::Object { handle: pair.parent, error }));
        }
        self.notifier.end(invalidation);
        outcome
    }

    fn freeze(&self, pairs: &[Pair], frozen: &mut Vec<Frozen<'h>>) -> Result<(), ForkError> {
        for pair in pairs {
            let one = self.host.objects.freeze(pair.parent);
            frozen.push(one.map_err(|error| ForkError::Object { handle: pair.parent, error })?);
        }
        Ok(())
    }

    /// Frames for the root that the detached tables hang from.
    fn take_stash(&self, cpu: usize) -> Result<PfnRange, ForkError> {
        let geometry = self.table.geometry();
        let first = self.host.pool.take(cpu, root_order(geometry)).map_err(|_| ForkError::OutOfMemory)?;
        Ok(PfnRange::new(first, geometry.root_frames()).expect("the pool's frames do not wrap"))
    }

    /// Step 4: when it returns, no translation writes.
    fn withdraw_writable(&self, cpu: usize, stash: PfnRange) {
        let machine = &self.host.machine;
        let _pin = self.host.epoch.pin(cpu);
        if self.switches.protects_at_fork() {
            let flushes = self.flushes(&self.stats.tlb_range);
            self.table.protect(machine, flushes, self.everything(), Permissions::WRITE, Straddle::Whole);
            self.host.pool.give(cpu, stash.start(), root_order(self.table.geometry()));
            return;
        }
        let detached = self.table.detach(machine, self.flushes(&self.stats.tlb_vmid), stash);
        let since = self.host.epoch.advance();
        let mut queue = self.detached.lock();
        assert!(queue.len() < queue.capacity(), "there is room for it, and one fork is made at a time");
        queue.push_back(Retiring { detached, since });
    }

    /// Takes at most about `limit` table pages apart of what the oldest fork has left. `true` if none are left, `false` also while
    /// somebody may still be using them. `cpu` is the CPU that the caller runs on.
    pub fn reclaim(&self, cpu: usize, limit: u64) -> bool {
        let mut place = self.detached.lock();
        let Some(retiring) = place.front_mut() else { return true };
        if !self.host.epoch.is_over(retiring.since) && !planted!(ZG5) {
            return false;
        }
        let (machine, pool) = (&self.host.machine, &self.host.pool);
        let free = |frame| pool.give(cpu, frame, Order::PAGE);
        let done = retiring.detached.dismantle(machine, &self.table, limit, free);
        if done {
            pool.give(cpu, retiring.detached.root().start(), root_order(self.table.geometry()));
            place.pop_front();
        }
        place.is_empty()
    }

    /// All of them. Not called by a pinned CPU.
    pub(crate) fn reclaim_all(&self, cpu: usize) {
        while !self.reclaim(cpu, u64::MAX) && !entresol_sync::hint::abandoned() {
            entresol_sync::hint::spin_loop();
        }
    }
}

impl<M: Machine, F: Format> Plan<'_, M, F> {
    /// Gives everything back that was made for the child.
    fn abandon(self, cpu: usize) {
        let host = self.child.host;
        self.child.destroy(cpu);
        for pair in self.pairs {
            host.objects.destroy(&host.supply(cpu), &host.epoch, pair.child).expect("the child's slots are gone");
        }
    }
}
