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
use crate::OutOfMemory;

/// What the pool keeps for trees that share.
pub(super) struct Shared {
    blocks: Mutex<()>,
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

    /// Gives one reference to a single frame back; the last one defers it.
    pub(crate) fn release(&self, pfn: Pfn) {
        if self.frames.release(self.owned(pfn)) {
            self.defer(pfn, Order::PAGE);
        }
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
        for index in self.counted(first) {
            if self.frames.release(index) {
                self.defer(self.frames.pfn(index), order);
            }
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
        machine.zero(PfnRange::single(pfn));
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
