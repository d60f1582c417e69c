//! Frames that are bad: an error of the memory was found in them.
//!
//! Protocol: who has a page behind it marks a frame ([`FramePool::mark`]). The mark is the frame's state and the only truth:
//! whoever has a word that names the frame, by a tree of its own, as a relative or by merging, asks it before the frame is granted,
//! copied or read ([`FramePool::sound`]). References go on being counted; the last one leaves the frame in quarantine. When no
//! translation to it is left, and nobody uses it any more who asked before it was marked, it is sealed
//! ([`FramePool::seal`]): leases of it are over, and a private frame is absent for good.
//!
//! A frame is bad by itself: of a block, the other 511 go on. A block that several trees share is counted page by page from then on.
//! A place of a store that is known to hold the same goes on without the frame: who reads the page from there reads it.
//!
//! | bad frame | given out | in the hypervisor's mapping |
//! |---|---|---|
//! | `Poisoned`, private | yes | no, once it is sealed; a removal that failed is tried again |
//! | `Quarantined`, private | no, never again | no |
//! | either, ordinary | as above | yes: see below |
//!
//! Asking costs one load while no frame is bad.
//!
//! Invariants: INV-7 (a bad frame is taken, or in quarantine; it is in no cache, list or free block), INV-10.
//!
//! Known hole: an ordinary bad frame stays in the hypervisor's own mapping, where it is a part of a block of 2 MiB whose other
//! frames are in use: taking it out would change an entry under other CPUs' accesses (ADR 0021). Nothing here reads it by its address,
//! but speculation may.

use entresol_addr::{PageSize, Pfn};
use entresol_machine::Machine;
use entresol_sync::atomic::{AtomicU64, Ordering};
use entresol_sync::trace;

use super::FramePool;
use super::meta::{Order, State};
use crate::{Grant, StoreSlot};

/// How many frames are bad.
pub(super) struct Counts {
    /// All of them.
    marked: AtomicU64,
    /// Those in quarantine.
    quarantined: AtomicU64,
}

impl Counts {
    pub(super) const fn new() -> Self {
        Self { marked: AtomicU64::new(0), quarantined: AtomicU64::new(0) }
    }
}

/// What became of a frame that was to be marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Marked {
    /// It is bad from now on.
    Now,
    /// It was bad already.
    Before,
    /// It is not given out any more.
    Gone,
}

impl State {
    pub(super) const fn is_bad(self) -> bool {
        matches!(self, Self::Poisoned | Self::Quarantined)
    }
}

impl FramePool {
    /// Frames that are bad, in quarantine or still referred to.
    pub fn poisoned_frames(&self) -> u64 {
        self.bad.marked.load(Ordering::Relaxed)
    }

    /// Bad frames that nobody refers to any more.
    pub fn quarantined_frames(&self) -> u64 {
        self.bad.quarantined.load(Ordering::Relaxed)
    }

    /// Whether `pfn` is bad.
    #[inline]
    pub fn is_poisoned(&self, pfn: Pfn) -> bool {
        self.bad.marked.load(Ordering::Relaxed) != 0 && self.is_marked(pfn)
    }

    #[cold]
    fn is_marked(&self, pfn: Pfn) -> bool {
        self.frames.index(pfn).is_some_and(|index| self.frames.state(index).is_bad())
    }

    /// Whether one of the 512 frames from `block` on is bad.
    #[inline]
    pub(crate) fn has_poison(&self, block: Pfn) -> bool {
        self.bad.marked.load(Ordering::Relaxed) != 0 && self.has_mark(block)
    }

    #[cold]
    fn has_mark(&self, block: Pfn) -> bool {
        (0..Order::BLOCK.frames()).any(|offset| self.is_marked(block.offset(offset)))
    }

    /// `grant` of the object's frame `frame`, or what is left of it: nothing if the frame behind it is bad, the page alone if another
    /// of its block is. The caller is pinned.
    #[inline]
    pub(crate) fn sound(&self, grant: Grant, frame: u64) -> Option<Grant> {
        if self.bad.marked.load(Ordering::Relaxed) == 0 { Some(grant) } else { self.sound_part(grant, frame) }
    }

    #[cold]
    fn sound_part(&self, grant: Grant, frame: u64) -> Option<Grant> {
        if self.is_marked(grant.frame(frame)) {
            return None;
        }
        let whole = grant.size == PageSize::Size4K || !self.has_mark(grant.pfn);
        Some(if whole { grant } else { grant.narrow(frame, PageSize::Size4K) })
    }

    /// Marks `pfn`, which is a single frame, or lies in the shared block that begins at `block`, as bad. The caller is pinned and has found a
    /// word that names it.
    pub(crate) fn mark(&self, pfn: Pfn, block: Option<Pfn>) -> Marked {
        let _blocks = self.shared.blocks.lock();
        if let Some(block) = block {
            let first = self.owned(block);
            match self.frames.state(first) {
                State::Taken(Order::BLOCK) => self.frames.split_shared(first, Order::BLOCK),
                State::Taken(Order::PAGE) | State::Kept | State::Poisoned => {}
                _ => return Marked::Gone,
            }
        }
        let index = self.owned(pfn);
        loop {
            let note = self.frames.note(index);
            let was = self.frames.state(index);
            match was {
                State::Poisoned => return Marked::Before,
                State::Taken(Order::PAGE) | State::Kept => {}
                _ => return Marked::Gone,
            }
            // Before the state: who finds it bad finds that some frame is.
            self.bad.marked.fetch_add(1, Ordering::SeqCst);
            if self.frames.turn(index, was, State::Poisoned, false) {
                if let (State::Kept, Some(note)) = (was, note) {
                    self.forget(StoreSlot::from_raw(note), index);
                }
                return Marked::Now;
            }
            self.bad.marked.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// No translation to `pfn`, which is bad, is left, and nobody uses it: its leases are over, and if it is private it leaves the
    /// hypervisor's mapping.
    pub fn seal<M: Machine>(&self, machine: &M, pfn: Pfn) {
        let index = self.owned(pfn);
        assert!(self.frames.state(index).is_bad(), "only a bad frame is sealed");
        self.end_leases(machine, index);
        trace::freed(pfn.get(), 1);
    }

    /// The last reference to a bad frame is gone.
    #[cold]
    pub(super) fn quarantine(&self, index: u32) {
        self.frames.pass(index, State::Leaving, State::Quarantined);
        self.bad.quarantined.fetch_add(1, Ordering::Relaxed);
    }
}
