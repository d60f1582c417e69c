//! Frames of private memory: absent from the hypervisor's own mapping (design D9, INV-10).
//!
//! Purpose: private objects take their pages here and not from the pool proper. What is taken here reads as zero and is
//! absent already; what comes back is zeroed before anybody else gets it, mapped or not.
//!
//! Shape: the pool gives a *private block*, 512 frames that leave the mapping together and are used for private memory only
//! ([`entresol_machine::own`]). Its frames are taken as one block, or one by one; when all 512 are free again, the block
//! goes back into the mapping, and to the pool.
//!
//! ```text
//! pool ─grow: zero, unmap─→ Hidden ─take→ Taken ─give, reap→ Dirty ─scrub: zero, unmap if leased─→ Hidden
//!   ↑                                                                                                │
//!   └──────────────────────────────── all 512 of the block: map ──────────────────────────────────────┘
//! ```
//!
//! The pool itself cannot zero: frames that are given back wait as `Dirty` for somebody with the machine at hand, who
//! scrubs them ([`crate::Supply::scrub`]): the next who needs one, whoever ended an object, and the hypervisor's idle work.
//!
//! # Locks
//!
//! `Private::free` covers the lists, and each step by which a block becomes private or stops being so, mapping included.
//! A frame's own lock ([`super::lease`]) covers whether that frame is mapped. Order: free → a frame's lock; free → buddy.
//!
//! Invariants: INV-7 (states and their order are checked on every step), INV-10, INV-11 (a `Hidden` frame is zero).
//!
//! Known holes: a private block is not private memory's for long when its last page goes and comes: it then is zeroed whole
//! each time. Where the pool has no free block of 2 MiB left, private memory is out, though single frames are free.

use alloc::boxed::Box;

use entresol_addr::{PageSize, Pfn, PfnRange};
use entresol_machine::{Machine, TlbOp};
use entresol_sync::atomic::{AtomicU64, Ordering};
use entresol_sync::{Mutex, trace};

use super::meta::{Frames, NONE, Order, State};
use super::{FramePool, Seen, lease};
use crate::{OutOfHeap, OutOfMemory, try_boxed};

const BLOCK: u64 = Order::BLOCK.frames();

/// What the pool keeps for private memory.
pub(super) struct Private {
    free: Mutex<Free>,
    /// Frames of private blocks, in whatever state.
    total: AtomicU64,
    /// Frames on the list of dirty ones, so that the common scrub takes no lock.
    dirty: AtomicU64,
    /// How leases and accesses go on.
    pub(super) leases: lease::Counts,
}

struct Free {
    /// Frames that can be taken one by one.
    head: u32,
    count: u64,
    /// Blocks and frames that must be zeroed.
    dirty: u32,
    /// Of each block of the machine: its frames on the first list.
    of_block: Box<[u16]>,
}

impl Private {
    pub(super) fn new(frames: &Frames) -> Result<Self, OutOfHeap> {
        let blocks = frames.len().div_ceil(BLOCK) + 1;
        let free = Free { head: NONE, count: 0, dirty: NONE, of_block: try_boxed(blocks as usize, || 0)? };
        Ok(Self {
            free: Mutex::new(free),
            total: AtomicU64::new(0),
            dirty: AtomicU64::new(0),
            leases: lease::Counts::new(),
        })
    }
}

impl Free {
    fn push(&mut self, frames: &Frames, index: u32) {
        frames.set_state(index, State::Hidden);
        frames.set_prev(index, NONE);
        frames.set_next(index, self.head);
        if self.head != NONE {
            frames.set_prev(self.head, index);
        }
        self.head = index;
        self.count += 1;
        *self.of(frames, index) += 1;
    }

    /// Takes a frame off the list; its state is the caller's to set.
    fn unlink(&mut self, frames: &Frames, index: u32) {
        let (prev, next) = (frames.prev(index), frames.next(index));
        if prev == NONE {
            self.head = next;
        } else {
            frames.set_next(prev, next);
        }
        if next != NONE {
            frames.set_prev(next, prev);
        }
        self.count -= 1;
        *self.of(frames, index) -= 1;
    }

    /// The number of listed frames of the block around a frame.
    fn of(&mut self, frames: &Frames, index: u32) -> &mut u16 {
        let block = frames.pfn(index).get() / BLOCK - frames.first().get() / BLOCK;
        &mut self.of_block[block as usize]
    }
}

impl FramePool {
    /// Whether `pfn` is a frame of private memory. It stays so as long as somebody has it.
    #[inline]
    pub fn is_private(&self, pfn: Pfn) -> bool {
        self.frames.index(pfn).is_some_and(|index| lease::is_private(self.frames.lease(index)))
    }

    /// Frames that are set apart for private memory: in use, free and zero, or to be zeroed.
    pub fn private_frames(&self) -> u64 {
        self.private.total.load(Ordering::Relaxed)
    }

    /// Frames of private memory that were given back and wait to be zeroed.
    pub fn dirty_frames(&self) -> u64 {
        self.private.dirty.load(Ordering::Relaxed)
    }

    /// Takes a private frame: absent, and zero.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`]: none is left, and the pool has no block that could leave the mapping.
    pub(crate) fn take_private<M: Machine>(&self, machine: &M, cpu: usize) -> Result<Pfn, OutOfMemory> {
        if trace::starved() {
            return Err(OutOfMemory);
        }
        loop {
            if let Some(pfn) = self.pop_private() {
                return Ok(pfn);
            }
            if self.scrub_private(machine, 1) == 0 {
                let block = self.take(cpu, Order::BLOCK)?;
                self.hide(machine, cpu, block)?;
                self.break_up(block);
            }
        }
    }

    /// Takes a private block of 2 MiB, absent and zero, only if the pool has one as it is.
    pub(crate) fn take_private_block<M: Machine>(&self, machine: &M, cpu: usize) -> Option<Pfn> {
        let block = self.take_at_hand(Order::BLOCK)?;
        self.hide(machine, cpu, block).ok().map(|()| block)
    }

    fn pop_private(&self) -> Option<Pfn> {
        let mut free = self.private.free.lock();
        let index = free.head;
        if index == NONE {
            return None;
        }
        free.unlink(&self.frames, index);
        self.frames.pass(index, State::Hidden, State::Taken(Order::PAGE));
        Some(self.frames.pfn(index))
    }

    /// Zeroes a block that was just taken and has it leave the mapping. If it cannot, the pool has it back.
    fn hide<M: Machine>(&self, machine: &M, cpu: usize, block: Pfn) -> Result<(), OutOfMemory> {
        let frames = PfnRange::block(block, PageSize::Size2M);
        machine.zero(frames);
        let free = self.private.free.lock();
        if machine.unmap_own(frames).is_err() {
            drop(free);
            self.give(cpu, block, Order::BLOCK);
            return Err(OutOfMemory);
        }
        machine.tlb(TlbOp::Own(frames));
        machine.complete();
        self.each_lease(block, lease::enter);
        self.private.total.fetch_add(BLOCK, Ordering::Relaxed);
        Ok(())
    }

    /// The frames of a private block that was taken whole can be taken one by one.
    fn break_up(&self, block: Pfn) {
        let mut free = self.private.free.lock();
        let first = self.owned(block);
        self.frames.pass(first, State::Taken(Order::BLOCK), State::Interior);
        // Lowest first off the list: the guest gets rising frames.
        for index in (first..first + BLOCK as u32).rev() {
            free.push(&self.frames, index);
        }
    }

    fn each_lease(&self, block: Pfn, change: impl Fn(u32) -> u32) {
        let first = self.owned(block);
        (first..first + BLOCK as u32).for_each(|index| lease::change(self.frames.lease(index), &change));
    }

    /// Takes a private block or frame that nobody can reach any more.
    pub(super) fn soil(&self, index: u32, order: Order, from: State) {
        self.frames.pass(index, from, State::Dirty(order));
        let mut free = self.private.free.lock();
        self.frames.set_next(index, free.dirty);
        free.dirty = index;
        self.private.dirty.fetch_add(order.frames(), Ordering::Relaxed);
    }

    /// Zeroes what was given back, at most `limit` frames or blocks. Returns how many frames can be taken again.
    pub(crate) fn scrub_private<M: Machine>(&self, machine: &M, limit: usize) -> u64 {
        let mut done = 0;
        for _ in 0..limit {
            if self.private.dirty.load(Ordering::Relaxed) == 0 {
                break;
            }
            let Some((index, order)) = self.pop_dirty() else { break };
            let frames = || (index..).take(order.frames() as usize);
            // A frame that cannot leave the mapping keeps all of its block waiting.
            let absent = frames().filter(|index| self.cleanse(machine, *index)).count() as u64 == order.frames();
            if !absent {
                self.soil(index, order, State::Dirty(order));
                break;
            }
            let mut free = self.private.free.lock();
            frames().for_each(|index| free.push(&self.frames, index));
            done += order.frames();
            if u64::from(*free.of(&self.frames, index)) == BLOCK {
                self.show(machine, &mut free, index);
            }
        }
        done
    }

    fn pop_dirty(&self) -> Option<(u32, Order)> {
        let mut free = self.private.free.lock();
        let index = free.dirty;
        if index == NONE {
            return None;
        }
        free.dirty = self.frames.next(index);
        let State::Dirty(order) = self.frames.state(index) else {
            unreachable!("a frame leaves the dirty state only here");
        };
        self.private.dirty.fetch_sub(order.frames(), Ordering::Relaxed);
        Some((index, order))
    }

    /// Gives the block around `index`, all of it free and zero, back to the mapping and to the pool.
    fn show<M: Machine>(&self, machine: &M, free: &mut Free, index: u32) {
        let frames = PfnRange::block(self.frames.pfn(index), PageSize::Size2M);
        let first = self.owned(frames.start());
        for index in first..first + BLOCK as u32 {
            free.unlink(&self.frames, index);
            self.frames.pass(index, State::Hidden, State::Interior);
        }
        machine.map_own(frames);
        self.each_lease(frames.start(), lease::leave);
        self.private.total.fetch_sub(BLOCK, Ordering::Relaxed);
        trace::freed(frames.start().get(), BLOCK);
        self.buddy.lock().give(&self.frames, first, Order::BLOCK);
    }

    /// Tells `tally` of all frames, block by block, each under the lock that keeps blocks from becoming private or not.
    pub(crate) fn visit_mapping<M: Machine>(&self, machine: &M, tally: &mut impl FnMut(Seen)) {
        let mut next = 0;
        while next < self.frames.len() {
            let _free = self.private.free.lock();
            let first = self.frames.pfn(next as u32);
            let end = (next + BLOCK - first.get() % BLOCK).min(self.frames.len());
            let frames = PfnRange::new(first, end - next).expect("frames of the machine do not wrap");
            let indices = || next as u32..end as u32;
            match self.seen_alike(machine, frames, indices()) {
                Some(seen) => tally(seen),
                None => indices().filter(|index| self.frames.state(*index) != State::Absent).for_each(|index| {
                    let pfn = self.frames.pfn(index);
                    let poisoned = self.frames.state(index).is_bad();
                    tally(lease::see(pfn, self.frames.lease(index), poisoned, || machine.is_mapped_own(pfn)));
                }),
            }
            next = end;
        }
    }

    /// What is seen of frames that are all the pool's and all in the same, right, state: mapped and not private, or private,
    /// unused by the hypervisor, and absent. `None`: they must be looked at one by one.
    fn seen_alike<M: Machine>(
        &self,
        machine: &M,
        frames: PfnRange,
        mut indices: core::ops::Range<u32>,
    ) -> Option<Seen> {
        let private = lease::is_private(self.frames.lease(indices.start));
        let alike = |index| {
            let word = self.frames.lease(index);
            let same = if private { lease::is_unused(word) } else { !lease::is_private(word) };
            let state = self.frames.state(index);
            same && state != State::Absent && !state.is_bad()
        };
        let mapped = if private { 0 } else { frames.count() };
        let right = indices.all(alike) && machine.count_mapped_own(frames) == mapped;
        let none =
            Seen { frames, private, leased: false, open: false, stuck: false, poisoned: false, mapped: !private };
        right.then_some(none)
    }
}
