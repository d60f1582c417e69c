//! The machine's frames: who may use which.
//!
//! Purpose: one pool hands out single frames and naturally aligned blocks, for guests, second-stage tables and tree
//! nodes. It never touches the frames themselves; all it knows is in [`FrameMeta`].
//!
//! Shape: a buddy allocator behind one lock, and in front of it a small cache of single frames for each CPU, so that the
//! common fault takes a lock that nobody else wants. Caches are filled and emptied in batches. Before the pool says
//! [`OutOfMemory`], it empties the caches of all CPUs.
//!
//! Frames that several trees refer to are counted ([`share`]). Frames of private memory have a pool of their own behind this
//! one ([`private`]), and leases ([`lease`]). Frames that are bad are never given out again ([`poison`]).
//!
//! Invariants: INV-7. Each frame is in exactly one [`meta::State`]; taking and giving check it with one exchange, in
//! release builds too, so a frame given back twice, or by somebody who never had it, stops the machine at once.
//! Lock order: shared blocks → deferred → a CPU's cache → buddy; the list of dead nodes is a leaf. No CPU holds two caches.
//!
//! Known holes: caches are emptied one after the other. Beside a CPU that fills its own meanwhile, [`OutOfMemory`] may be
//! said although a frame was free all the time.

mod buddy;
mod deferred;
mod lease;
mod meta;
mod poison;
mod private;
mod share;

use alloc::boxed::Box;
use core::fmt;

use buddy::Buddy;
use deferred::Deferred;
use entresol_addr::{Pfn, PfnRange};
use entresol_sync::atomic::{AtomicU64, Ordering};
use entresol_sync::{Epoch, Mutex, trace};
pub(crate) use lease::Seen;
pub use lease::{Lease, LeaseError};
pub use meta::{FrameMeta, Order};
use meta::{Frames, State};
pub(crate) use poison::Marked;

use crate::{OutOfHeap, OutOfMemory, Stores, try_boxed};

/// Frames that go between a cache and the buddy at once.
const BATCH: usize = Order::BATCH.frames() as usize;

/// Single frames at hand for one CPU.
struct Cache {
    len: usize,
    frames: [u32; 2 * BATCH],
}

/// A CPU's cache on cache lines of its own.
#[repr(align(128))]
struct CpuCache(Mutex<Cache>);

impl Cache {
    const EMPTY: Self = Self { len: 0, frames: [0; 2 * BATCH] };

    #[inline]
    fn pop(&mut self) -> Option<u32> {
        let last = self.len.checked_sub(1)?;
        let index = *self.frames.get(last)?;
        self.len = last;
        Some(index)
    }

    /// Puts a frame in; gives it back if there is no room.
    #[inline]
    fn push(&mut self, index: u32) -> Result<(), u32> {
        let place = self.frames.get_mut(self.len).ok_or(index)?;
        *place = index;
        self.len += 1;
        Ok(())
    }
}

/// Why a range cannot join the pool. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddError {
    /// A frame that the pool has no [`FrameMeta`] for.
    Outside {
        /// The first such frame.
        pfn: Pfn,
    },
    /// A frame that is the pool's already.
    Present {
        /// The first such frame.
        pfn: Pfn,
    },
}

impl fmt::Display for AddError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outside { pfn } => write!(f, "frame {pfn:#x}: must lie in the memory that the pool describes"),
            Self::Present { pfn } => write!(f, "frame {pfn:#x}: must not be the pool's already"),
        }
    }
}

impl core::error::Error for AddError {}

/// The frames of one machine.
pub struct FramePool {
    frames: Frames,
    buddy: Mutex<Buddy>,
    caches: Box<[CpuCache]>,
    deferred: Mutex<Deferred>,
    /// Frames in `deferred`, so that the common reap takes no lock.
    waiting: AtomicU64,
    total: AtomicU64,
    shared: share::Shared,
    stores: Stores,
    private: private::Private,
    bad: poison::Counts,
}

impl FramePool {
    /// A pool that can describe `meta.len()` frames from `first`, used by CPUs `0 .. cpus`. It owns none of them yet.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`] if there is no room for the caches.
    ///
    /// # Panics
    ///
    /// If there are 2³² − 1 frames (16 TiB) or more.
    pub fn new(first: Pfn, meta: Box<[FrameMeta]>, cpus: usize) -> Result<Self, OutOfHeap> {
        let frames = Frames::new(first, meta);
        Ok(Self {
            private: private::Private::new(&frames)?,
            frames,
            buddy: Mutex::new(Buddy::new()),
            caches: try_boxed(cpus, || CpuCache(Mutex::new(Cache::EMPTY)))?,
            deferred: Mutex::new(Deferred::new()),
            waiting: AtomicU64::new(0),
            total: AtomicU64::new(0),
            shared: share::Shared::new(),
            stores: Stores::new(),
            bad: poison::Counts::new(),
        })
    }

    /// Where pages are that no frame has.
    pub fn stores(&self) -> &Stores {
        &self.stores
    }

    /// Donates frames that nobody else uses.
    ///
    /// # Errors
    ///
    /// [`AddError`].
    pub fn add(&self, range: PfnRange) -> Result<(), AddError> {
        let mut buddy = self.buddy.lock();
        self.may_add(range)?;
        let (mut pfn, end) = (range.start(), range.end());
        while pfn != end {
            let order = Order::fitting(pfn, end.since(pfn));
            // Checked above: the whole range has indices.
            let index = pfn.since(self.frames.first()) as u32;
            (index..).take(order.frames() as usize).for_each(|inside| self.frames.set_state(inside, State::Interior));
            buddy.give(&self.frames, index, order);
            pfn = pfn.offset(order.frames());
        }
        self.total.fetch_add(range.count(), Ordering::Relaxed);
        Ok(())
    }

    /// Whether [`Self::add`] would take this range.
    ///
    /// # Errors
    ///
    /// [`AddError`].
    pub fn may_add(&self, range: PfnRange) -> Result<(), AddError> {
        for pfn in (0..range.count()).map(|offset| range.start().offset(offset)) {
            let index = self.frames.index(pfn).ok_or(AddError::Outside { pfn })?;
            if self.frames.state(index) != State::Absent {
                return Err(AddError::Present { pfn });
            }
        }
        Ok(())
    }

    /// A frame of `range` that is the pool's, if there is one.
    pub fn any_of(&self, range: PfnRange) -> Option<Pfn> {
        let described = PfnRange::new(self.frames.first(), self.frames.len())?.intersect(range)?;
        let mut inside = (0..described.count()).map(|offset| described.start().offset(offset));
        inside.find(|pfn| self.frames.index(*pfn).is_some_and(|index| self.frames.state(index) != State::Absent))
    }

    /// Takes a naturally aligned block of `order` for CPU `cpu`. Its content is whatever it was.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`]: no such block is free, in any cache either. Frames may still wait for a grace period: see
    /// [`Self::reap`].
    ///
    /// # Panics
    ///
    /// If the pool has no CPU `cpu`.
    #[inline]
    pub fn take(&self, cpu: usize, order: Order) -> Result<Pfn, OutOfMemory> {
        if trace::starved() {
            return Err(OutOfMemory);
        }
        if order == Order::PAGE {
            let cached = self.caches[cpu].0.lock().pop();
            if let Some(index) = cached {
                self.frames.pass(index, State::Cached, State::Taken(Order::PAGE));
                trace::taken(self.frames.pfn(index).get(), 1);
                return Ok(self.frames.pfn(index));
            }
        }
        self.take_slow(cpu, order)
    }

    /// Takes a block of `order` only if one is free as it is: for callers that can do with less.
    pub fn take_at_hand(&self, order: Order) -> Option<Pfn> {
        let index = self.buddy.lock().take(&self.frames, order, State::Taken(order))?;
        trace::taken(self.frames.pfn(index).get(), order.frames());
        Some(self.frames.pfn(index))
    }

    #[cold]
    fn take_slow(&self, cpu: usize, order: Order) -> Result<Pfn, OutOfMemory> {
        if order == Order::PAGE
            && let Some(pfn) = self.refill(cpu)
        {
            return Ok(pfn);
        }
        if let Some(pfn) = self.take_at_hand(order) {
            return Ok(pfn);
        }
        for cache in &self.caches {
            self.drain(&mut cache.0.lock(), 0);
        }
        self.take_at_hand(order).ok_or(OutOfMemory)
    }

    /// Fills a CPU's cache with a batch, as one block if there is one, and takes one frame more.
    fn refill(&self, cpu: usize) -> Option<Pfn> {
        let mut cache = self.caches[cpu].0.lock();
        let mut buddy = self.buddy.lock();
        let index = match buddy.take(&self.frames, Order::BATCH, State::Taken(Order::PAGE)) {
            Some(first) => {
                // Highest first: the cache gives out the last that went in, and the guest then gets rising frames.
                for index in (first + 1..first + BATCH as u32).rev() {
                    self.frames.set_state(index, State::Cached);
                    cache.push(index).expect("a cache has room for two batches");
                }
                first
            }
            None => self.refill_singly(&mut cache, &mut buddy)?,
        };
        trace::taken(self.frames.pfn(index).get(), 1);
        Some(self.frames.pfn(index))
    }

    /// The same out of whatever is left.
    #[cold]
    fn refill_singly(&self, cache: &mut Cache, buddy: &mut Buddy) -> Option<u32> {
        let index = buddy.take(&self.frames, Order::PAGE, State::Taken(Order::PAGE))?;
        while cache.len < BATCH {
            let Some(more) = buddy.take(&self.frames, Order::PAGE, State::Cached) else { break };
            cache.push(more).expect("a cache has room for two batches");
        }
        Some(index)
    }

    /// Moves frames from a cache to the buddy until `keep` are left.
    fn drain(&self, cache: &mut Cache, keep: usize) {
        if cache.len <= keep {
            return;
        }
        let mut buddy = self.buddy.lock();
        while cache.len > keep
            && let Some(index) = cache.pop()
        {
            buddy.give(&self.frames, index, Order::PAGE);
        }
    }

    /// Gives back a block that was taken at `order`. Nobody can reach it any more.
    ///
    /// # Panics
    ///
    /// If the pool did not give it out at this order, or has it back already.
    #[inline]
    pub fn give(&self, cpu: usize, pfn: Pfn, order: Order) {
        self.put_back(cpu, self.owned(pfn), order, State::Taken(order));
    }

    /// Gives a block back once every CPU that is pinned now has unpinned: for frames that were just unpublished.
    ///
    /// # Panics
    ///
    /// As [`Self::give`].
    pub fn defer(&self, pfn: Pfn, order: Order) {
        self.defer_from(self.owned(pfn), order, State::Taken(order));
    }

    fn defer_from(&self, index: u32, order: Order, from: State) {
        self.frames.pass(index, from, State::Deferred(order));
        let mut deferred = self.deferred.lock();
        deferred.push(&self.frames, index, order);
        self.waiting.store(deferred.frames(), Ordering::Relaxed);
    }

    /// Gives back deferred frames whose grace period is over, at most `limit` blocks, and begins the grace period of
    /// those that came since. `epoch` is the one that readers pin; a pin of the caller's own counts. Returns frames.
    pub fn reap(&self, epoch: &Epoch, cpu: usize, limit: usize) -> u64 {
        if self.waiting.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        let mut deferred = self.deferred.lock();
        let mut reaped = 0;
        for _ in 0..limit {
            let Some((index, order)) = deferred.pop(&self.frames, epoch) else { break };
            self.put_back(cpu, index, order, State::Deferred(order));
            reaped += order.frames();
        }
        self.waiting.store(deferred.frames(), Ordering::Relaxed);
        reaped
    }

    /// From now on the block's frames were taken one by one.
    ///
    /// # Panics
    ///
    /// As [`Self::give`].
    pub fn split(&self, pfn: Pfn, order: Order) {
        let index = self.owned(pfn);
        self.frames.pass(index, State::Taken(order), State::Taken(Order::PAGE));
        for inside in index + 1..index + order.frames() as u32 {
            self.frames.pass(inside, State::Interior, State::Taken(Order::PAGE));
        }
    }

    /// Frames that the pool owns, in whatever state.
    pub fn total_frames(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Frames that can be taken, those in caches included. Exact while nobody takes or gives.
    pub fn free_frames(&self) -> u64 {
        let cached: usize = self.caches.iter().map(|cache| cache.0.lock().len).sum();
        self.buddy.lock().free() + cached as u64
    }

    /// Frames that wait for a grace period.
    pub fn deferred_frames(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }

    #[inline]
    fn put_back(&self, cpu: usize, index: u32, order: Order, from: State) {
        if lease::is_private(self.frames.lease(index)) {
            return self.soil(index, order, from);
        }
        trace::freed(self.frames.pfn(index).get(), order.frames());
        if order != Order::PAGE {
            self.frames.pass(index, from, State::Interior);
            self.buddy.lock().give(&self.frames, index, order);
            return;
        }
        self.frames.pass(index, from, State::Cached);
        let mut cache = self.caches[cpu].0.lock();
        if let Err(index) = cache.push(index) {
            self.drain(&mut cache, BATCH);
            cache.push(index).expect("a drained cache has room");
        }
    }

    /// The index of a frame that the caller says it has from this pool.
    #[inline]
    fn owned(&self, pfn: Pfn) -> u32 {
        match self.frames.index(pfn) {
            Some(index) => index,
            None => panic!("frame {pfn:#x} is not this pool's"),
        }
    }
}

#[cfg(test)]
mod tests;
