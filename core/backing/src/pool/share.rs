//! Frames that more than one tree refers to: how many do, and what becomes of a frame that none does any more.
//!
//! Protocol: a word of a tree's node is one reference to what it names. Whoever copies a word calls `share` first,
//! while the original still holds its own reference, so a count never rises from nothing. Whoever takes a word away
//! calls `release`; the last one has the frame alone and defers it, because pinned readers may have come to it by a
//! word that is gone.
//!
//! A block is counted at its first frame, as long as it is whole. The first tree that breaks it into pages splits the
//! count with it, for all: each of the 512 frames then has as many references as the block had. The others' words still
//! say "block", which names the same frames; they hold one reference to each. The `blocks` lock makes "is it whole?" and
//! the counting one step.
//!
//! A frame that is known to hold the same bytes as a place of a store is *kept*: it has a reference to the place, which goes
//! back with the frame's last one, or before the frame is written. Who may write it has it alone.
//!
//! A node that nobody refers to any more waits on the list of the dead until somebody takes its own references back
//! ([`crate::tree`]), a bounded number of nodes at a time. The list is linked through [`super::FrameMeta`], which is idle
//! while a frame is taken.
//!
//! The zero page is a frame that reads as zero and is never written: what a shared tree grants where it has nothing. It
//! leaves the pool's total when it is made, and never comes back.
//!
//! Invariants: INV-7.

use entresol_addr::{Pfn, PfnRange};
use entresol_machine::Machine;
use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicU64, Ordering};

use super::FramePool;
use super::meta::{NONE, Order, State};
use crate::{OutOfMemory, StoreId, StoreSlot};

/// What the pool keeps for trees that share.
pub(super) struct Shared {
    pub(super) blocks: Mutex<()>,
    /// The first dead node.
    dead: Mutex<u32>,
    /// The zero page's frame number plus one, 0 while there is none.
    zero: AtomicU64,
}

impl Shared {
    pub(super) const fn new() -> Self {
        Self { blocks: Mutex::new(()), dead: Mutex::new(NONE), zero: AtomicU64::new(0) }
    }
}

impl FramePool {
    /// One reference more to a single frame.
    pub(crate) fn share(&self, pfn: Pfn) {
        self.frames.share(self.owned(pfn));
    }

    /// One reference more to a single frame, of which somebody else may be giving the last one back.
    pub(crate) fn share_if_held(&self, pfn: Pfn) -> bool {
        self.frames.share_if_held(self.owned(pfn))
    }

    /// One reference more to a single frame that has fewer than `most` and is not bad, of which somebody else may be giving
    /// the last one back.
    pub(crate) fn share_if_sound(&self, pfn: Pfn, most: u32) -> bool {
        self.frames.share_if_sound(self.owned(pfn), most)
    }

    /// Gives one reference to a single frame back; the last one defers it, or leaves it in quarantine for good.
    pub(crate) fn release(&self, pfn: Pfn) {
        self.release_page(self.owned(pfn));
    }

    fn release_page(&self, index: u32) {
        let note = self.frames.note(index);
        let Some(was) = self.frames.leave(index) else { return };
        if was == State::Poisoned {
            return self.quarantine(index);
        }
        if let (State::Kept, Some(note)) = (was, note) {
            self.forget(StoreSlot::from_raw(note), index);
        }
        self.defer_from(index, Order::PAGE, State::Leaving);
    }

    /// From now on the frame, to which the caller has a reference, is known to hold what `slot` does; the caller's reference to the place is the
    /// frame's. `false` if it is known already, or bad: nothing changed.
    pub(crate) fn keep(&self, pfn: Pfn, slot: StoreSlot) -> bool {
        let index = self.owned(pfn);
        // Two who share it may both want to, and it becomes bad under the same lock.
        let _blocks = self.shared.blocks.lock();
        if matches!(self.frames.state(index), State::Kept | State::Poisoned) {
            return false;
        }
        // Nobody reads the note of a frame that is not kept.
        self.frames.set_note(index, slot.raw());
        let kept = self.frames.turn(index, State::Taken(Order::PAGE), State::Kept, false);
        assert!(kept, "a frame is kept by who has a reference to it");
        self.stores.set_frame(slot, index, true);
        true
    }

    /// Gives back a frame's reference to a place.
    pub(super) fn forget(&self, slot: StoreSlot, index: u32) {
        self.stores.set_frame(slot, index, false);
        self.stores.release(slot);
    }

    /// The frame is about to be written, by who has the only reference to it: it is not known any more to hold what a store
    /// does. `false` if there are more references; then nothing changed.
    pub(crate) fn stop_keeping(&self, pfn: Pfn) -> bool {
        let (index, page) = (self.owned(pfn), State::Taken(Order::PAGE));
        let Some(slot) = self.kept_at(pfn) else {
            // What was to be written to the place has failed.
            return self.frames.turn(index, page, page, true);
        };
        let alone = self.frames.turn(index, State::Kept, page, true);
        if alone {
            self.forget(slot, index);
        }
        alone
    }

    /// The frame is not known to hold what `slot` does: it was not written there. The caller has a reference to both.
    pub(crate) fn stop_keeping_at(&self, pfn: Pfn, slot: StoreSlot) {
        let index = self.owned(pfn);
        let kept = self.kept_at(pfn) == Some(slot);
        if kept && self.frames.turn(index, State::Kept, State::Taken(Order::PAGE), false) {
            self.forget(slot, index);
        }
    }

    /// Of `count` frames of the pool from its number `from` on, those that are known to hold what a place of `store` does are not
    /// any more: nobody finds them by it, and they do not keep the store open. Where to go on, or `None` at the end. The caller is pinned.
    pub fn stop_keeping_for(&self, store: StoreId, from: u64, count: u64) -> Option<u64> {
        let end = self.frames.len().min(from.saturating_add(count));
        for pfn in (from..end).map(|index| self.frames.pfn(index as u32)) {
            let kept = || self.kept_at(pfn).filter(|slot| slot.store() == store);
            if kept().is_none() || !self.share_if_held(pfn) {
                continue;
            }
            // With a reference to it, it is not given out again meanwhile, and kept for another.
            if let Some(slot) = kept() {
                self.stop_keeping_at(pfn, slot);
            }
            self.release(pfn);
        }
        (end < self.frames.len()).then_some(end)
    }

    /// One reference more to a frame that is kept for `slot`, if one is in memory. The caller is pinned.
    pub(crate) fn share_kept(&self, slot: StoreSlot) -> Option<Pfn> {
        let pfn = self.frames.pfn(self.stores.frame(slot)?);
        if !self.share_if_held(pfn) {
            return None;
        }
        if self.kept_at(pfn) == Some(slot) {
            return Some(pfn);
        }
        self.release(pfn);
        None
    }

    /// The place that holds the same as the frame, if that is known. The caller is pinned, or has the frame.
    pub(crate) fn kept_at(&self, pfn: Pfn) -> Option<StoreSlot> {
        self.frames.note(self.frames.index(pfn)?).map(StoreSlot::from_raw)
    }

    /// Gives one reference to a node back; the last one buries it.
    pub(crate) fn release_node(&self, node: Pfn) {
        let index = self.owned(node);
        if self.frames.release(index) {
            let mut dead = self.shared.dead.lock();
            self.frames.set_next(index, *dead);
            *dead = index;
        }
    }

    /// One reference more to all frames of a block, be it whole or not.
    pub(crate) fn share_block(&self, pfn: Pfn) {
        let _blocks = self.shared.blocks.lock();
        let index = self.owned(pfn);
        for index in self.counted(index) {
            self.frames.share(index);
        }
    }

    /// Gives one reference to all frames of a block back; what nobody else refers to is deferred.
    pub(crate) fn release_block(&self, pfn: Pfn) {
        let _blocks = self.shared.blocks.lock();
        let first = self.owned(pfn);
        let order = self.order(first);
        if order == Order::PAGE {
            self.counted(first).for_each(|index| self.release_page(index));
        } else if self.frames.release(first) {
            self.defer(pfn, order);
        }
    }

    /// From now on each frame of the block is counted by itself; the caller's reference to the block is one to each.
    pub(crate) fn split_shared(&self, pfn: Pfn) {
        let _blocks = self.shared.blocks.lock();
        let index = self.owned(pfn);
        if self.order(index) == Order::BLOCK {
            self.frames.split_shared(index, Order::BLOCK);
        }
    }

    /// Where the references of the block at `first` are counted. The caller holds the `blocks` lock.
    fn counted(&self, first: u32) -> core::ops::Range<u32> {
        let places = if self.order(first) == Order::BLOCK { 1 } else { Order::BLOCK.frames() as u32 };
        first..first + places
    }

    fn order(&self, index: u32) -> Order {
        match self.frames.state(index) {
            State::Taken(order) => order,
            State::Kept | State::Poisoned => Order::PAGE,
            state => panic!("frame {:#x} is {state:?}, and some tree refers to it", self.frames.pfn(index)),
        }
    }

    /// Takes a dead node off the list.
    pub(crate) fn exhume(&self) -> Option<Pfn> {
        let mut dead = self.shared.dead.lock();
        let index = *dead;
        if index == NONE {
            return None;
        }
        *dead = self.frames.next(index);
        Some(self.frames.pfn(index))
    }

    /// Whether `pfn` is the zero page.
    #[inline]
    pub fn is_zero_page(&self, pfn: Pfn) -> bool {
        self.shared.zero.load(Ordering::Acquire) == pfn.get() + 1
    }

    /// The page that reads as zero and is never written. Made by the first call; whoever wants the count of frames to
    /// stay what it is calls this at the machine's beginning.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`], if there is none yet and no frame for it.
    pub fn zero_page<M: Machine>(&self, machine: &M, cpu: usize) -> Result<Pfn, OutOfMemory> {
        let made = self.shared.zero.load(Ordering::Acquire);
        if made != 0 {
            return Ok(Pfn::new(made - 1));
        }
        let pfn = self.take(cpu, Order::PAGE)?;
        // A guest with tags may be shown it too.
        machine.zero_tagged(PfnRange::single(pfn));
        match self.shared.zero.compare_exchange(0, pfn.get() + 1, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {
                self.total.fetch_sub(1, Ordering::Relaxed);
                Ok(pfn)
            }
            Err(made) => {
                self.give(cpu, pfn, Order::PAGE);
                Ok(Pfn::new(made - 1))
            }
        }
    }
}
