//! Leases of private frames, and accesses to them: who may make the hypervisor see one, and for how long.
//!
//! Purpose: `spec/private-memory.md`'s table. A *lease* keeps a frame in the hypervisor's mapping until it is released; it
//! is counted, because several users of one frame are normal. A one-off [`FramePool::access`] reaches the frame for one
//! copy. Both work for frames that are not private, too, where they cost nothing.
//!
//! Shape: a word for each frame. Bit 31 is the frame's lock, bit 30 says that the frame is private, bit 29 that it is mapped
//! although nobody leases it, because its removal failed, bit 28 that it is *open*: its page is shared with the hypervisor, so that
//! it is mapped without a lease. Bits 27:16 count leases. Bits 15:0 are the frame's *life*, which
//! goes up when the frame is freed: a lease knows the life in which it was made, and its release does nothing in a later one.
//!
//! | operation | count | mapping |
//! |---|---|---|
//! | `lease` | 0 → 1 | put back, then the lease is handed out |
//! | `lease`, `release` | above | none |
//! | `release` | 1 → 0 | entry removed, all TLBs invalidated, then return |
//! | `access` | any | under the lock: what is there if it is mapped, else a window, or in and out again |
//! | `open` | any | put back if it is absent |
//! | `close` | 0 | entry removed, all TLBs invalidated, then return; with leases it stays until the last is released |
//! | freed | any → 0 | zeroed, removed if it was mapped; the life is over |
//! | poisoned | any → 0 | removed if it was mapped; the life is over |
//!
//! A removal that fails is tried again by whoever touches the frame next and by [`FramePool::retry_removals`]; until it
//! succeeds the frame does not count as absent.
//!
//! Invariants: INV-10, INV-7 (a lease is given back once: it is consumed). A frame's lock is held for bounded work that
//! waits for nobody. Lock order: table → a frame's lock, a leaf.
//!
//! Known holes: a lease that is kept over 65,536 lives of its frame would be taken for one of the current life.

use core::fmt;

use entresol_addr::{Pfn, PfnRange};
use entresol_machine::own::Work;
use entresol_machine::{Machine, TlbOp};
use entresol_sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use entresol_sync::{hint, planted};

use super::FramePool;

const LOCKED: u32 = 1 << 31;
const PRIVATE: u32 = 1 << 30;
const STUCK: u32 = 1 << 29;
const OPEN: u32 = 1 << 28;
const COUNT_SHIFT: u32 = 16;
const COUNT_ONE: u32 = 1 << COUNT_SHIFT;
const COUNT: u32 = 0xfff << COUNT_SHIFT;
const LIFE: u32 = 0xffff;

/// How often a removal is tried before it is left to others.
const TRIES: usize = 3;

/// What is counted of all frames.
pub(super) struct Counts {
    /// Frames whose removal failed.
    stuck: AtomicU64,
    /// Whether a one-off access maps the frame for everybody instead of opening a window.
    in_place: AtomicBool,
}

impl Counts {
    pub(super) const fn new() -> Self {
        Self { stuck: AtomicU64::new(0), in_place: AtomicBool::new(false) }
    }
}

/// A frame that the hypervisor may use by its address until [`FramePool::release_lease`].
#[must_use = "a lease that is dropped is never released"]
#[derive(Debug, PartialEq, Eq)]
pub struct Lease {
    pfn: Pfn,
    /// The life of the frame, if it is private.
    life: Option<u16>,
}

impl Lease {
    /// The frame.
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// Whether it is a frame of private memory.
    pub fn is_private(&self) -> bool {
        self.life.is_some()
    }
}

/// Why there is no lease. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseError {
    /// As many as can be counted exist already.
    TooMany,
}

impl fmt::Display for LeaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany => write!(f, "lease: there must be at most {} of a frame", COUNT >> COUNT_SHIFT),
        }
    }
}

impl core::error::Error for LeaseError {}

/// What an audit sees of one frame, or of several that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub frames: PfnRange,
    pub private: bool,
    pub leased: bool,
    /// Its page is shared with the hypervisor.
    pub open: bool,
    /// Its removal failed.
    pub stuck: bool,
    /// It is bad.
    pub poisoned: bool,
    /// By the machine's tables.
    pub mapped: bool,
}

/// A frame's word, locked; what `value` says by then is what it becomes.
struct Locked<'w> {
    word: &'w AtomicU32,
    value: u32,
}

impl<'w> Locked<'w> {
    fn new(word: &'w AtomicU32) -> Self {
        loop {
            let value = word.load(Ordering::Relaxed) & !LOCKED;
            if word.compare_exchange(value, value | LOCKED, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return Self { word, value };
            }
            hint::spin_loop();
        }
    }

    fn is_private(&self) -> bool {
        self.value & PRIVATE != 0
    }

    fn is_mapped(&self) -> bool {
        !self.is_private() || self.value & (COUNT | STUCK | OPEN) != 0
    }

    fn life(&self) -> u16 {
        (self.value & LIFE) as u16
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.word.store(self.value, Ordering::Release);
    }
}

#[inline]
pub(super) fn is_private(word: &AtomicU32) -> bool {
    word.load(Ordering::Relaxed) & PRIVATE != 0
}

/// Changes a word under its lock.
pub(super) fn change(word: &AtomicU32, change: impl Fn(u32) -> u32) {
    let mut locked = Locked::new(word);
    locked.value = change(locked.value);
}

/// The frame has left the mapping with its block.
pub(super) fn enter(value: u32) -> u32 {
    debug_assert!(value & !LIFE == 0, "a frame that was not private has no lease");
    value | PRIVATE
}

/// The frame is about to be like any other.
pub(super) fn leave(value: u32) -> u32 {
    debug_assert!(value & !LIFE == PRIVATE, "a free frame has no lease");
    value & LIFE
}

/// Whether a frame is private, and neither leased, nor mapped by a failed removal, nor being changed.
pub(super) fn is_unused(word: &AtomicU32) -> bool {
    word.load(Ordering::Relaxed) & !LIFE == PRIVATE
}

pub(super) fn see(pfn: Pfn, word: &AtomicU32, poisoned: bool, mapped: impl FnOnce() -> bool) -> Seen {
    let locked = Locked::new(word);
    let has = |bits| locked.value & bits != 0;
    let (leased, open, stuck) = (has(COUNT), has(OPEN), has(STUCK));
    let private = locked.is_private();
    Seen { frames: PfnRange::single(pfn), private, leased, open, stuck, poisoned, mapped: mapped() }
}

impl FramePool {
    /// Whether a one-off access maps its frame for all CPUs and removes it again, instead of using a window of this CPU:
    /// for measurements.
    pub fn access_in_place(&self, in_place: bool) {
        self.private.leases.in_place.store(in_place, Ordering::Relaxed);
    }

    /// Frames that are mapped only because their removal failed.
    pub fn stuck_frames(&self) -> u64 {
        self.private.leases.stuck.load(Ordering::Relaxed)
    }

    /// Has `pfn` in the hypervisor's mapping until the lease is released. The caller keeps the frame from being freed
    /// meanwhile, or knows of it: then the lease is over, and its address must not be used.
    ///
    /// # Errors
    ///
    /// [`LeaseError`].
    pub fn lease<M: Machine>(&self, machine: &M, pfn: Pfn) -> Result<Lease, LeaseError> {
        let Some(index) = self.frames.index(pfn).filter(|index| is_private(self.frames.lease(*index))) else {
            return Ok(Lease { pfn, life: None });
        };
        let mut locked = Locked::new(self.frames.lease(index));
        if locked.value & COUNT == COUNT {
            return Err(LeaseError::TooMany);
        }
        if locked.value & STUCK != 0 {
            locked.value &= !STUCK;
            self.private.leases.stuck.fetch_sub(1, Ordering::Relaxed);
        } else if planted!(ZD8) && !locked.is_mapped() {
            locked.value += COUNT_ONE;
            let life = locked.life();
            drop(locked);
            machine.map_own(PfnRange::single(pfn));
            return Ok(Lease { pfn, life: Some(life) });
        } else if !locked.is_mapped() {
            machine.map_own(PfnRange::single(pfn));
        }
        locked.value += COUNT_ONE;
        Ok(Lease { pfn, life: Some(locked.life()) })
    }

    /// Ends a lease. When it was the frame's last one, no CPU translates to the frame when this returns. A lease of a frame
    /// that was freed since does nothing.
    pub fn release_lease<M: Machine>(&self, machine: &M, lease: Lease) {
        let Some(life) = lease.life else { return };
        let mut locked = Locked::new(self.frames.lease(self.owned(lease.pfn)));
        let is_over = locked.life() != life && !(planted!(ZD3) && locked.value & COUNT != 0);
        if !locked.is_private() || is_over {
            return;
        }
        assert!(locked.value & COUNT != 0, "a lease of this life is counted");
        locked.value -= COUNT_ONE;
        if locked.value & (COUNT | OPEN) == 0 || planted!(ZD1) {
            self.remove(machine, lease.pfn, &mut locked);
        }
    }

    /// Does `work` to a frame that the caller keeps from being freed, wherever it is.
    pub fn access<M: Machine>(&self, machine: &M, pfn: Pfn, work: Work<'_>) {
        let Some(index) = self.frames.index(pfn).filter(|index| is_private(self.frames.lease(*index))) else {
            return directly(machine, pfn, work);
        };
        let mut locked = Locked::new(self.frames.lease(index));
        if locked.is_mapped() {
            directly(machine, pfn, work);
            if locked.value & STUCK != 0 {
                self.remove(machine, pfn, &mut locked);
            }
        } else if self.private.leases.in_place.load(Ordering::Relaxed) {
            machine.map_own(PfnRange::single(pfn));
            directly(machine, pfn, work);
            self.remove(machine, pfn, &mut locked);
        } else {
            machine.through_window(pfn, work);
        }
    }

    /// The page of a private frame is shared with the hypervisor from now on: the frame is in the mapping, whoever leases it.
    /// The caller keeps it from being freed.
    pub(crate) fn open<M: Machine>(&self, machine: &M, pfn: Pfn) {
        let mut locked = Locked::new(self.frames.lease(self.owned(pfn)));
        debug_assert!(locked.is_private(), "an open page is one of private memory");
        if locked.value & STUCK != 0 {
            locked.value &= !STUCK;
            self.private.leases.stuck.fetch_sub(1, Ordering::Relaxed);
        } else if !locked.is_mapped() {
            machine.map_own(PfnRange::single(pfn));
        }
        locked.value |= OPEN;
    }

    /// It is not any more. If nobody leases the frame, no CPU translates to it when this returns, or its removal is tried again.
    pub(crate) fn close<M: Machine>(&self, machine: &M, pfn: Pfn) {
        let mut locked = Locked::new(self.frames.lease(self.owned(pfn)));
        if locked.value & OPEN == 0 {
            return;
        }
        locked.value &= !OPEN;
        if locked.value & COUNT == 0 {
            self.remove(machine, pfn, &mut locked);
        }
    }

    /// As [`Self::access`], only if the frame is not private, or its page is shared with the hypervisor at that moment. Whether
    /// it was done.
    pub fn access_open<M: Machine>(&self, machine: &M, pfn: Pfn, work: Work<'_>) -> bool {
        let Some(index) = self.frames.index(pfn).filter(|index| is_private(self.frames.lease(*index))) else {
            directly(machine, pfn, work);
            return true;
        };
        let locked = Locked::new(self.frames.lease(index));
        let open = locked.value & OPEN != 0;
        if open {
            directly(machine, pfn, work);
        }
        open
    }

    /// Whether the page of private frame `pfn` is shared with the hypervisor.
    pub(crate) fn is_open(&self, pfn: Pfn) -> bool {
        self.frames.index(pfn).is_some_and(|index| self.frames.lease(index).load(Ordering::Acquire) & OPEN != 0)
    }

    /// Copies the private frame `from`, which does not change, to `to`, which is private too, and which nobody but the
    /// caller knows.
    pub(crate) fn copy_private<M: Machine>(&self, machine: &M, from: Pfn, to: Pfn) {
        let _source = Locked::new(self.frames.lease(self.owned(from)));
        // Nobody waits for this one.
        let _target = Locked::new(self.frames.lease(self.owned(to)));
        machine.through_window(to, Work::Copy { from });
    }

    /// Zeroes a frame that nobody has any more; its leases are over. Whether it is absent.
    pub(super) fn cleanse<M: Machine>(&self, machine: &M, index: u32) -> bool {
        let mut locked = Locked::new(self.frames.lease(index));
        if !planted!(ZD9) {
            machine.through_window(self.frames.pfn(index), Work::Zero);
        }
        self.end_life(machine, index, &mut locked)
    }

    /// The leases of a frame are over, whoever has it still; if it is private, it is absent, or its removal is tried again.
    pub(super) fn end_leases<M: Machine>(&self, machine: &M, index: u32) {
        let mut locked = Locked::new(self.frames.lease(index));
        if locked.is_private() {
            self.end_life(machine, index, &mut locked);
        }
    }

    /// A private frame's life is over. Whether it is absent.
    fn end_life<M: Machine>(&self, machine: &M, index: u32, locked: &mut Locked<'_>) -> bool {
        let mapped = locked.is_mapped();
        let next = u32::from(locked.life().wrapping_add(1));
        locked.value = locked.value & !(COUNT | OPEN | LIFE) | next;
        !mapped || self.remove(machine, self.frames.pfn(index), locked)
    }

    /// Tries again what failed before. Returns how many frames are absent now.
    #[cold]
    pub(crate) fn retry_removals<M: Machine>(&self, machine: &M) -> u64 {
        let before = self.stuck_frames();
        if before == 0 {
            return 0;
        }
        for index in 0..self.frames.len() as u32 {
            let mut locked = Locked::new(self.frames.lease(index));
            if locked.value & STUCK != 0 {
                self.remove(machine, self.frames.pfn(index), &mut locked);
            }
        }
        before.saturating_sub(self.stuck_frames())
    }

    /// Takes a mapped frame that nobody leases out of the mapping. Whether it is absent now.
    fn remove<M: Machine>(&self, machine: &M, pfn: Pfn, locked: &mut Locked<'_>) -> bool {
        let frame = PfnRange::single(pfn);
        let removed = (0..TRIES).any(|_| machine.unmap_own(frame).is_ok());
        let was_stuck = locked.value & STUCK != 0;
        if removed || planted!(ZD4) {
            if !planted!(ZD5) {
                machine.tlb(TlbOp::Own(frame));
                machine.complete();
            }
            locked.value &= !STUCK;
            self.private.leases.stuck.fetch_sub(u64::from(was_stuck), Ordering::Relaxed);
        } else {
            locked.value |= STUCK;
            self.private.leases.stuck.fetch_add(u64::from(!was_stuck), Ordering::Relaxed);
        }
        removed
    }
}

/// Through the hypervisor's own mapping.
fn directly<M: Machine>(machine: &M, pfn: Pfn, work: Work<'_>) {
    let byte = |at: u16| entresol_addr::Hpa::new(pfn.base().get() + u64::from(at));
    match work {
        Work::Read { at, to } => machine.read(byte(at), to),
        Work::Write { at, from } => machine.write(byte(at), from),
        Work::Zero => machine.zero(PfnRange::single(pfn)),
        Work::Copy { from } => machine.copy(from, pfn, 1),
    }
}
