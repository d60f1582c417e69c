//! Page-frame caches: where a piece of guest memory lies in the machine, kept from one use to the next.
//!
//! Purpose: what the hypervisor reads and writes again and again (a vCPU's stolen time, the rings of a virtqueue) without a walk
//! through slots and objects each time. A cache knows a piece within one page, and says in a few loads whether what it knows is
//! still true.
//!
//! # Protocol
//!
//! - *Use* ([`Vm::check`], [`Vm::check_at`]): pin, check, use, unpin. Between check and unpin the frame stays what it is.
//! - *Refresh* ([`Vm::refresh`]), one at a time: invalid first, then sample the notifier, let go of the lock, find slot and frame,
//!   take the lock again, ask the notifier and the slots whether anything moved since; if so, begin again. A frame that a fork
//!   shares is made the object's own first: what a cache knows may be written.
//! - *Invalidation*: [`Vm::announce`] raises the notifier's count first, then takes what caches know of the range, then the caller
//!   waits a grace period. A refresh that holds the lock before the invalidation takes it has what it found taken away; one
//!   that takes it later sees the count. And whoever checked before is unpinned when the grace period is over.
//! - Slot updates need no word: a cache keeps the generation that its slot was found in, and one of another is not used.
//! - Private memory is absent from the hypervisor's own mapping, so a cache of it *leases* the frame for as long as it may be used.
//!   What an invalidation takes away may be in use until the grace period is over, so the lease stays with the cache, and the
//!   next refresh, which finds another frame, or fails, gives it back after one. A lease of a frame that was freed meanwhile is
//!   given back in vain: it died with the frame.
//! - Who is answerable for the lease of an invalidated cache: if the frame goes (a hole, a freed object, poison: [`Caches::forget_frame`]), nobody; if it
//!   stays and its page is converted, whoever converts takes the lease from the cache after the grace period and releases it.
//!   A hole after that finds no lease.
//! - `activate` puts a cache on the list that invalidations walk before it samples anything; `deactivate` takes what it knows first.
//!   An invalidation raises its count before it looks at the list: who joins after that finds the count.
//! - A cache of somebody who sees only what the guest shares ([`Reach::Open`]) knows open pages only: the attribute is asked after
//!   the sample, and a conversion is an invalidation.
//!
//! Readers take no lock: what a cache knows is published under a version that is odd while it changes.
//!
//! Invariants: INV-3 (nothing is written through a cache once `invalidate_range_start` has returned), INV-4 (who writes where
//! writes are logged marks after the bytes, as [`Vm::write`] does), INV-7, INV-10. Nothing allocates after [`Vm::make_caches`].
//! Lock order: a cache's refreshing → the list → a cache's state → a frame's; slots, objects, pool and grace periods after the first,
//! with list and states free.
//!
//! Known hole: a cache that nobody refreshes keeps its lease, and so the frame in the mapping, until it is deactivated, the frame is
//! freed or the machine ends.

use alloc::boxed::Box;
use alloc::vec::Vec;

use entresol_addr::{GfnRange, Gpa, Hpa, PAGE_SIZE, Pfn};
use entresol_backing::{GrantError, Lease, LeaseError, ObjectHandle, Reach};
use entresol_machine::Machine;
use entresol_slot::{Hint, SlotRef};
use entresol_sync::atomic::{AtomicU64, Ordering, fence};
use entresol_sync::{Mutex, Once, Pin, hint, planted};
use entresol_table::Format;

use crate::guest::CopyError;
use crate::vm::Vm;
use crate::{Invalidation, MemoryFault, OutOfHeap, TooMany};

/// How often a refresh begins again before it leaves the rest to a later one: others may change the page for long.
const TRIES: usize = 64;

/// A generation that no slot has been found in: bit 0 says that an update was in progress.
const NEVER: u64 = 1;

/// Why a cache knows nothing. What it knew before is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheError {
    /// There is no cache of that number.
    Absent {
        /// The number.
        index: usize,
    },
    /// The piece is empty, or does not lie in one page.
    Straddles {
        /// Its first byte.
        gpa: Gpa,
        /// Its bytes.
        len: u64,
    },
    /// It was not activated.
    Inactive,
    /// The memory cannot be written. [`CopyError::Busy`] also where it changes for longer than a refresh waits.
    Memory(CopyError),
}

/// What is under the lock.
#[derive(Debug)]
struct State {
    active: bool,
    gpa: Gpa,
    len: u64,
    /// How far its user sees.
    reach: Reach,
    /// Of the frame that it knows, or knew last.
    lease: Option<Lease>,
}

/// What a cache knows.
#[derive(Clone, Copy, Debug)]
struct Known {
    gpa: Gpa,
    /// Bytes; 0 for nothing.
    len: u64,
    /// Where the first is in the machine.
    address: Hpa,
    /// The slots' generation.
    generation: u64,
}

impl Known {
    const NOTHING: Self = Self { gpa: Gpa::new(0), len: 0, address: Hpa::new(0), generation: NEVER };
}

/// A page-frame cache.
#[derive(Debug)]
struct PfnCache {
    /// Held by whoever refreshes or sets it.
    refreshing: Mutex<()>,
    state: Mutex<State>,
    /// Odd while the rest, which is [`Known`], changes.
    version: AtomicU64,
    gpa: AtomicU64,
    len: AtomicU64,
    address: AtomicU64,
    generation: AtomicU64,
}

/// A piece of guest memory, to be used while the CPU is pinned.
pub struct Piece<'p, 'e> {
    known: Known,
    pin: &'p Pin<'e>,
}

impl Piece<'_, '_> {
    /// Where it lies in the machine.
    pub fn address(&self) -> Hpa {
        self.known.address
    }

    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.known.len
    }

    /// How many of `bytes` it has.
    fn at_most(&self, bytes: usize) -> usize {
        usize::try_from(self.known.len).unwrap_or(usize::MAX).min(bytes)
    }
}

impl PfnCache {
    const fn new() -> Self {
        let state = State { active: false, gpa: Gpa::new(0), len: 0, reach: Reach::Everything, lease: None };
        Self {
            refreshing: Mutex::new(()),
            state: Mutex::new(state),
            version: AtomicU64::new(0),
            gpa: AtomicU64::new(0),
            len: AtomicU64::new(0),
            address: AtomicU64::new(0),
            generation: AtomicU64::new(NEVER),
        }
    }

    /// Says something else from now on. The caller holds the state.
    fn publish(&self, known: &Known) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.gpa.store(known.gpa.get(), Ordering::Relaxed);
        self.len.store(known.len, Ordering::Relaxed);
        self.address.store(known.address.get(), Ordering::Relaxed);
        self.generation.store(known.generation, Ordering::Relaxed);
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    fn forget(&self) {
        self.publish(&Known::NOTHING);
    }

    /// What it says, unless that changes at the moment.
    #[inline]
    fn snapshot(&self) -> Option<Known> {
        let version = self.version.load(Ordering::Acquire);
        let known = Known {
            gpa: Gpa::new(self.gpa.load(Ordering::Relaxed)),
            len: self.len.load(Ordering::Relaxed),
            address: Hpa::new(self.address.load(Ordering::Relaxed)),
            generation: self.generation.load(Ordering::Relaxed),
        };
        fence(Ordering::Acquire);
        let same = version & 1 == 0 && self.version.load(Ordering::Relaxed) == version;
        same.then_some(known)
    }
}

/// The caches of one virtual machine, once they are made: a slice of one, which can be made where the heap may have no room.
pub(crate) struct Caches(Once<Box<[Table]>>);

/// All caches. Apart from the virtual machine, so that what faults use of that lies close together.
struct Table {
    all: Box<[PfnCache]>,
    /// Numbers of those that are active, or were a moment ago; there is room for all.
    list: Mutex<Vec<usize>>,
}

impl Caches {
    pub(crate) const fn new() -> Self {
        Self(Once::new())
    }

    #[inline]
    fn table(&self) -> Option<&Table> {
        self.0.get()?.first()
    }

    #[inline]
    fn all(&self) -> &[PfnCache] {
        self.table().map_or(&[], |table| &table.all)
    }

    fn get(&self, index: usize) -> Result<&PfnCache, CacheError> {
        self.all().get(index).ok_or(CacheError::Absent { index })
    }

    /// Cache `index`, which is there, is one that invalidations look at.
    fn join(&self, index: usize) {
        let Some(table) = self.table() else { return };
        let mut list = table.list.lock();
        if !list.contains(&index) {
            debug_assert!(list.len() < list.capacity(), "there is room for all");
            list.push(index);
        }
    }

    fn leave(&self, index: usize) {
        let Some(table) = self.table() else { return };
        let mut list = table.list.lock();
        if let Some(place) = list.iter().position(|other| *other == index) {
            list.swap_remove(place);
        }
    }

    /// Calls `visit` with the state of each cache of a page of `range`, whose invalidation is in progress.
    fn of_range(&self, range: GfnRange, mut visit: impl FnMut(&PfnCache, &mut State)) {
        let Some(table) = self.table() else { return };
        let list = table.list.lock();
        for cache in list.iter().filter_map(|index| table.all.get(*index)) {
            let mut state = cache.state.lock();
            if range.contains(state.gpa.frame()) {
                visit(cache, &mut state);
            }
        }
    }

    /// Takes what caches know of `range`, whose invalidation is in progress.
    fn forget(&self, range: GfnRange) {
        self.of_range(range, |cache, _| cache.forget());
    }

    /// Takes the leases of caches of `range`, whose invalidation is in progress since a grace period.
    pub(crate) fn give_leases_back(&self, range: GfnRange, mut release: impl FnMut(Lease)) {
        self.of_range(range, |_, state| {
            state.lease.take().into_iter().filter(|_| !planted!(ZD6)).for_each(&mut release);
        });
    }

    /// Takes what caches know of `pfn`, which is bad and is granted no more. Their leases die with it.
    pub(crate) fn forget_frame(&self, pfn: Pfn) {
        for cache in self.all() {
            let mut state = cache.state.lock();
            if state.lease.as_ref().is_some_and(|lease| lease.pfn() == pfn) {
                cache.forget();
                state.lease = None;
            }
        }
    }
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// First half of `invalidate_range_start`: faults see the range in progress, and caches know nothing of it. The caller
    /// then waits a grace period before it unmaps.
    ///
    /// # Errors
    ///
    /// [`TooMany`]; nothing changed.
    pub(crate) fn announce(&self, range: GfnRange) -> Result<Invalidation, TooMany> {
        let invalidation = self.notifier.start(range)?;
        if !planted!(ZD2) {
            self.caches.forget(range);
        }
        Ok(invalidation)
    }

    /// Makes `count` caches, numbered from 0, inactive. Once.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn make_caches(&self, count: usize) -> Result<(), OutOfHeap> {
        let mut caches = Vec::new();
        caches.try_reserve_exact(count).map_err(|_| OutOfHeap)?;
        // Copies of a constant: a fork makes many.
        caches.resize_with(count, || const { PfnCache::new() });
        let mut list = Vec::new();
        list.try_reserve_exact(count).map_err(|_| OutOfHeap)?;
        let mut table = Vec::new();
        table.try_reserve_exact(1).map_err(|_| OutOfHeap)?;
        table.push(Table { all: caches.into_boxed_slice(), list: Mutex::new(list) });
        self.caches.0.call_once(|| table.into_boxed_slice());
        Ok(())
    }

    /// Cache `index` is for the `len` bytes at `gpa` from now on, and knows where they lie. Not called by a pinned CPU; `cpu` is
    /// the one that the caller runs on.
    ///
    /// # Errors
    ///
    /// [`CacheError`]. After [`CacheError::Memory`] it is active all the same, and a later refresh may do better.
    pub fn activate(&self, cpu: usize, index: usize, gpa: Gpa, len: u64) -> Result<(), CacheError> {
        self.activate_as(cpu, index, Reach::Everything, gpa, len)
    }

    /// The same for somebody who reaches as far as `reach`.
    ///
    /// # Errors
    ///
    /// As [`Self::activate`]; [`CopyError::MemoryFault`] where the page is out of reach.
    pub fn activate_as(&self, cpu: usize, index: usize, reach: Reach, gpa: Gpa, len: u64) -> Result<(), CacheError> {
        let cache = self.caches.get(index)?;
        if len == 0 || gpa.page_offset().checked_add(len).is_none_or(|end| end > PAGE_SIZE) {
            return Err(CacheError::Straddles { gpa, len });
        }
        let _one = cache.refreshing.lock();
        if !planted!(ZX3) {
            self.caches.join(index);
        }
        {
            let mut state = cache.state.lock();
            if planted!(ZD7) && state.active && state.gpa.frame() == gpa.frame() {
                (state.gpa, state.len) = (gpa, len);
                return Ok(());
            }
            cache.forget();
            (state.active, state.gpa, state.len, state.reach) = (true, gpa, len, reach);
        }
        self.refresh_cache(cpu, cache)
    }

    /// Cache `index` knows nothing, and nobody looks at it any more.
    ///
    /// # Errors
    ///
    /// [`CacheError::Absent`].
    pub fn deactivate(&self, index: usize) -> Result<(), CacheError> {
        let cache = self.caches.get(index)?;
        let _one = cache.refreshing.lock();
        let lease = {
            let mut state = cache.state.lock();
            cache.forget();
            state.active = false;
            state.lease.take()
        };
        self.caches.leave(index);
        self.give_back_used(lease);
        Ok(())
    }

    /// The machine ends: nobody uses its caches.
    pub(crate) fn end_caches(&self) {
        for cache in self.caches.all() {
            let lease = cache.state.lock().lease.take();
            lease.into_iter().for_each(|lease| self.release_lease(lease));
        }
    }

    /// Gives a lease back whose frame somebody may be using who has checked before.
    fn give_back_used(&self, lease: Option<Lease>) {
        let Some(lease) = lease else { return };
        if lease.is_private() {
            self.host.epoch.synchronize();
        }
        self.release_lease(lease);
    }

    /// Has cache `index` find out where its memory lies now. May wait for a grace period. Not called by a pinned CPU; `cpu` is the one that the caller runs
    /// on.
    ///
    /// # Errors
    ///
    /// [`CacheError`].
    pub fn refresh(&self, cpu: usize, index: usize) -> Result<(), CacheError> {
        let cache = self.caches.get(index)?;
        let _one = cache.refreshing.lock();
        self.refresh_cache(cpu, cache)
    }

    /// The caller holds `refreshing`, so nobody else moves the piece. What fails leaves nothing mapped for the cache.
    fn refresh_cache(&self, cpu: usize, cache: &PfnCache) -> Result<(), CacheError> {
        let refreshed = self.find_piece(cpu, cache);
        if refreshed.is_err() {
            let lease = cache.state.lock().lease.take();
            self.give_back_used(lease);
        }
        refreshed
    }

    fn find_piece(&self, cpu: usize, cache: &PfnCache) -> Result<(), CacheError> {
        for _ in 0..TRIES {
            let (gpa, len, reach) = {
                let state = cache.state.lock();
                cache.forget();
                if !state.active {
                    return Err(CacheError::Inactive);
                }
                (state.gpa, state.len, state.reach)
            };
            let sample = self.notifier.sample();
            // The lease that is over: the one before, or the one that was found in vain.
            let over = {
                let pin = self.host.epoch.pin(cpu);
                let (slot, lease) = match self.find_frame(&pin, gpa, reach) {
                    Ok(found) => found,
                    Err(CopyError::Busy) => {
                        drop(pin);
                        hint::spin_loop();
                        continue;
                    }
                    Err(error) => return Err(CacheError::Memory(error)),
                };
                let mut state = cache.state.lock();
                let moved = self.notifier.moved(sample, GfnRange::single(gpa.frame()));
                if moved || !self.slots.is_current(&slot, &pin) {
                    Err(lease)
                } else {
                    // Also where the page is the same as before: the piece may lie elsewhere in it.
                    let address = Hpa::new(lease.pfn().base().get() + gpa.page_offset());
                    let before = state.lease.replace(lease);
                    cache.publish(&Known { gpa, len, address, generation: slot.generation().get() });
                    Ok(before)
                }
            };
            match over {
                Ok(before) => {
                    self.give_back_used(before);
                    return Ok(());
                }
                // Nobody has seen it.
                Err(lease) => self.release_lease(lease),
            }
            hint::spin_loop();
        }
        Err(CacheError::Memory(CopyError::Busy))
    }

    /// The slot at `gpa`, and a lease of the page of the machine behind it, which may be written, is shared with nobody, and is in
    /// `reach`.
    fn find_frame(&self, pin: &Pin<'_>, gpa: Gpa, reach: Reach) -> Result<(SlotRef, Lease), CopyError> {
        let slot = self.slots.find(pin, gpa.frame(), &Hint::new()).ok_or(CopyError::Outside { gpa })?;
        if slot.is_read_only() {
            return Err(CopyError::ReadOnly { gpa });
        }
        let object = self.host.objects.get(pin, ObjectHandle::from_raw(slot.object.get()));
        let object = object.ok_or(CopyError::Outside { gpa })?;
        let frame = slot.object_frame(gpa.frame());
        if reach == Reach::Open && !object.is_open(&self.host.machine, frame) {
            return Err(CopyError::MemoryFault(MemoryFault::new(gpa, false)));
        }
        if object.may_share() {
            self.own_for_write(pin, &slot, object, gpa)?;
        }
        match object.grant(&self.host.supply(pin.cpu()), frame, true) {
            Ok(grant) if grant.memory == entresol_backing::Memory::Normal => {
                let lease = self.host.pool.lease(&self.host.machine, grant.frame(frame));
                lease.map(|lease| (slot, lease)).map_err(|LeaseError::TooMany| CopyError::OutOfMemory)
            }
            // What was the object's own a moment ago is shared again, or another CPU makes it.
            Err(GrantError::Busy | GrantError::Shared | GrantError::Forking) => Err(CopyError::Busy),
            Err(GrantError::OutOfMemory) => Err(CopyError::OutOfMemory),
            Err(GrantError::ReadOnly) => Err(CopyError::ReadOnly { gpa }),
            Err(GrantError::Stored { slot }) => Err(CopyError::Absent { gpa, slot }),
            Err(GrantError::Poisoned) => Err(CopyError::Poisoned { gpa }),
            Ok(_) | Err(GrantError::Outside { .. }) => Err(CopyError::Outside { gpa }),
        }
    }

    /// The first `len` bytes of what cache `index` is for, if it knows where they are. Usable while `pin` lasts.
    #[inline]
    pub fn check<'p, 'e>(&self, pin: &'p Pin<'e>, index: usize, len: u64) -> Option<Piece<'p, 'e>> {
        let known = self.caches.all().get(index)?.snapshot()?;
        let current = (1..=known.len).contains(&len) && self.slots.generation().get() == known.generation;
        current.then_some(Piece { known: Known { len, ..known }, pin })
    }

    /// The `len` bytes at `gpa`, if cache `index` is for them and knows where they are. Usable while `pin` lasts.
    #[inline]
    pub fn check_at<'p, 'e>(&self, pin: &'p Pin<'e>, index: usize, gpa: Gpa, len: u64) -> Option<Piece<'p, 'e>> {
        let known = self.caches.all().get(index)?.snapshot()?;
        let before = gpa.get().checked_sub(known.gpa.get())?;
        let rest = known.len.checked_sub(before)?;
        let current = (1..=rest).contains(&len) && self.slots.generation().get() == known.generation;
        // Within the page that is known, so it does not wrap.
        let address = Hpa::new(known.address.get() + before);
        current.then_some(Piece { known: Known { gpa, len, address, ..known }, pin })
    }

    /// Fills `to` from the beginning of `piece`, and says how many bytes that were: not more than it has.
    pub fn read_piece(&self, piece: &Piece<'_, '_>, to: &mut [u8]) -> usize {
        let most = piece.at_most(to.len());
        self.host.machine.read(piece.address(), &mut to[..most]);
        most
    }

    /// Stores `from` at the beginning of `piece`; what it has no room for is left out. A page of a slot that logs becomes dirty.
    pub fn write_piece(&self, piece: &Piece<'_, '_>, from: &[u8]) {
        self.host.machine.write(piece.address(), &from[..piece.at_most(from.len())]);
        let Piece { known: Known { gpa, .. }, pin } = piece;
        // After the bytes: see `dirty`.
        let slot = self.slots.find(pin, gpa.frame(), &Hint::new());
        if let Some(slot) = slot.filter(|slot| slot.logs_dirty()) {
            self.logs.mark(&self.host.machine, pin.cpu(), &slot, gpa.frame());
        }
    }
}
