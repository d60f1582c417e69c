//! The dirty ring of one vCPU: pages in the order in which it wrote to them.
//!
//! An entry goes round: free → dirty (the vCPU's CPU: [`Ring::push`]) → harvested (the owner: [`RingEntry::harvest`]) → free
//! (the owner, by [`Vm::reset_dirty_rings`](crate::Vm::reset_dirty_rings)). The layout is that of `struct kvm_dirty_gfn`.
//!
//! Protocol: no lock between the two sides. Only the CPU that the vCPU runs on moves `pushed`, only the holder of the owner's
//! lock moves `reset`; an entry's flags are stored after its page (release) and loaded before it (acquire). The numbers run on
//! modulo 2^32, and the size is a power of two.
//!
//! An owner may share the entries with somebody it does not trust, so what stands in them is not believed: a page that does
//! not exist is ignored at the reset, and an entry that says harvested but was not pushed is not looked at.
//!
//! A ring can be off, and be used in part: its limit is 0 then, or less than the entries that it was made with. Entries are
//! never made a second time, because whoever pushes takes no lock.
//!
//! Invariants: `pushed − reset` is at most the number of entries.

use alloc::boxed::Box;
use alloc::vec::Vec;

use entresol_sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::OutOfHeap;

/// Entries that stay free at the soft limit: what one run of a vCPU can make dirty at most before it is asked again is
/// bounded by its exits, each of which writes a few pages. What does not fit nevertheless is in the log.
pub const RESERVE: u32 = 64;
/// The least and the most entries: more than the reserve; as many as KVM has.
const SIZES: core::ops::RangeInclusive<u32> = 2 * RESERVE..=65_536;

/// `KVM_DIRTY_GFN_F_DIRTY`.
const DIRTY: u32 = 1 << 0;
/// `KVM_DIRTY_GFN_F_RESET`.
const HARVESTED: u32 = 1 << 1;

/// Where an entry is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingState {
    /// Nobody's.
    Free,
    /// It names a page; the owner's to harvest.
    Dirty,
    /// The owner has seen it; it is freed at the next reset.
    Harvested,
}

/// One entry.
#[repr(C)]
#[derive(Debug, Default)]
pub struct RingEntry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

const _: () = assert!(size_of::<RingEntry>() == 16 || cfg!(loom));

impl RingEntry {
    /// Where it is on its way.
    pub fn state(&self) -> RingState {
        match self.flags.load(Ordering::Acquire) {
            flags if flags & HARVESTED != 0 => RingState::Harvested,
            0 => RingState::Free,
            _ => RingState::Dirty,
        }
    }

    /// Slot number and page of the slot, of an entry that is not free.
    pub fn page(&self) -> (u32, u64) {
        (self.slot.load(Ordering::Relaxed), self.offset.load(Ordering::Relaxed))
    }

    /// The owner has seen it.
    pub fn harvest(&self) {
        self.flags.store(HARVESTED, Ordering::Release);
    }

    /// What somebody can do to it who has the entries in its memory.
    pub fn overwrite(&self, slot: u32, offset: u64) {
        self.slot.store(slot, Ordering::Relaxed);
        self.offset.store(offset, Ordering::Relaxed);
    }

    fn fill(&self, slot: u16, offset: u64) {
        self.overwrite(slot.into(), offset);
        self.flags.store(DIRTY, Ordering::Release);
    }

    fn free(&self) {
        self.flags.store(0, Ordering::Release);
    }
}

/// The ring of one vCPU.
#[derive(Debug)]
pub struct Ring {
    entries: Box<[RingEntry]>,
    /// How many may be used; 0 while it is off.
    limit: AtomicU32,
    pushed: AtomicU32,
    reset: AtomicU32,
}

impl Ring {
    /// Whether a ring may have so many entries: a power of two from 128 to 65,536.
    pub(super) fn is_size(entries: u32) -> bool {
        entries.is_power_of_two() && SIZES.contains(&entries)
    }

    /// `entries` free entries, a size that [`Self::is_size`]; all of them are used.
    pub(super) fn new(entries: u32) -> Result<Self, OutOfHeap> {
        let mut all = Vec::new();
        all.try_reserve_exact(entries as usize).map_err(|_| OutOfHeap)?;
        all.resize_with(entries as usize, RingEntry::default);
        let (pushed, reset) = (AtomicU32::new(0), AtomicU32::new(0));
        Ok(Self { entries: all.into_boxed_slice(), limit: AtomicU32::new(entries), pushed, reset })
    }

    /// Uses `entries` of its entries from now on, a size that [`Self::is_size`] and that it has; or none, with 0: it is off.
    pub(super) fn set_limit(&self, entries: u32) {
        self.limit.store(entries, Ordering::Release);
    }

    /// Whether pages are pushed.
    pub(super) fn is_on(&self) -> bool {
        self.limit.load(Ordering::Acquire) != 0
    }

    /// Frees every entry, whatever it says. It is off since a grace period, and the caller holds the owner's lock.
    pub(super) fn clear(&self) {
        self.free(self.used());
    }

    /// The entries. Number `n` that is pushed goes to place `n` modulo their number.
    pub fn entries(&self) -> &[RingEntry] {
        &self.entries
    }

    /// Entry number `n`, modulo the size.
    fn entry(&self, n: u32) -> &RingEntry {
        &self.entries[n as usize & (self.entries.len() - 1)]
    }

    /// Entries that are not free.
    pub fn used(&self) -> u32 {
        self.pushed.load(Ordering::Acquire).wrapping_sub(self.reset.load(Ordering::Acquire))
    }

    /// Whether it is at the soft limit: the vCPU is not to run before a reset.
    pub fn is_full(&self) -> bool {
        let limit = self.limit.load(Ordering::Relaxed);
        limit != 0 && self.used() >= limit - RESERVE
    }

    /// Names a page. Returns whether there was room. The caller is the CPU that the ring's vCPU runs on.
    pub(super) fn push(&self, slot: u16, offset: u64) -> bool {
        if self.used() >= self.limit.load(Ordering::Relaxed) {
            return false;
        }
        let pushed = self.pushed.load(Ordering::Relaxed);
        self.entry(pushed).fill(slot, offset);
        self.pushed.store(pushed.wrapping_add(1), Ordering::Release);
        true
    }

    /// Marks every dirty entry harvested, in order, and tells `f` of each. Returns how many.
    pub fn harvest(&self, mut f: impl FnMut(u32, u64)) -> u32 {
        self.harvest_while(|slot, offset| {
            f(slot, offset);
            true
        })
    }

    /// The same as long as `f` takes them: the first that it does not take stays dirty, and so do those after it.
    pub fn harvest_while(&self, mut f: impl FnMut(u32, u64) -> bool) -> u32 {
        let (mut next, end) = (self.reset.load(Ordering::Acquire), self.pushed.load(Ordering::Acquire));
        let mut harvested = 0;
        while next != end {
            let entry = self.entry(next);
            if entry.state() == RingState::Dirty {
                let (slot, offset) = entry.page();
                if !f(slot, offset) {
                    break;
                }
                entry.harvest();
                harvested += 1;
            }
            next = next.wrapping_add(1);
        }
        harvested
    }

    /// What entry `ahead` after the first that is not free names, if it and all before it are harvested; the caller knows of
    /// those before. The caller holds the owner's lock.
    pub(super) fn harvested(&self, ahead: u32) -> Option<(u32, u64)> {
        if ahead >= self.used() {
            return None;
        }
        let entry = self.entry(self.reset.load(Ordering::Relaxed).wrapping_add(ahead));
        (entry.state() == RingState::Harvested).then(|| entry.page())
    }

    /// Frees the first `count` entries that are not free. The caller holds the owner's lock.
    pub(super) fn free(&self, count: u32) {
        let first = self.reset.load(Ordering::Relaxed);
        for ahead in 0..count {
            self.entry(first.wrapping_add(ahead)).free();
        }
        self.reset.store(first.wrapping_add(count), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_two_within_bounds() {
        for (entries, allowed) in [(0, false), (64, false), (127, false), (128, true), (192, false), (65_536, true)] {
            assert_eq!(Ring::is_size(entries), allowed, "{entries}");
        }
        assert!(!Ring::is_size(1 << 17) && !Ring::is_size(1 << 31));
    }

    #[test]
    fn the_soft_limit_leaves_the_reserve() {
        let ring = Ring::new(128).unwrap();
        for page in 0..64 {
            assert!(!ring.is_full(), "{page}");
            assert!(ring.push(3, page));
        }
        assert!(ring.is_full());
        for page in 64..128 {
            assert!(ring.push(3, page));
        }
        assert!(!ring.push(3, 128), "no entry is written over");
        assert_eq!(ring.used(), 128);
    }

    #[test]
    fn a_part_of_a_ring_has_its_own_soft_limit() {
        let ring = Ring::new(512).unwrap();
        ring.set_limit(128);
        for page in 0..128 {
            assert_eq!(ring.is_full(), page >= 64, "{page}");
            assert!(ring.push(3, page));
        }
        assert!(!ring.push(3, 128));
        ring.set_limit(0);
        assert!(!ring.is_full() && !ring.is_on() && !ring.push(3, 128));
        ring.clear();
        ring.set_limit(512);
        assert_eq!(ring.used(), 0);
        assert!(ring.push(3, 7) && ring.is_on());
        assert_eq!(ring.harvest_while(|_, _| false), 0);
        assert_eq!(ring.harvested(0), None, "what was not taken stays dirty");
        assert_eq!(ring.harvest(|slot, page| assert_eq!((slot, page), (3, 7))), 1);
    }

    #[test]
    fn numbers_run_on_past_32_bits() {
        let ring = Ring::new(128).unwrap();
        ring.pushed.store(u32::MAX - 2, Ordering::Relaxed);
        ring.reset.store(u32::MAX - 2, Ordering::Relaxed);
        for page in 0..6 {
            assert!(ring.push(1, page));
        }
        assert_eq!(ring.used(), 6);
        let mut seen = Vec::new();
        assert_eq!(ring.harvest(|_, page| seen.push(page)), 6);
        assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
        assert_eq!((ring.harvested(5), ring.harvested(6)), (Some((1, 5)), None));
        ring.free(6);
        assert_eq!(ring.used(), 0);
    }

    #[test]
    fn an_entry_that_was_not_pushed_is_not_looked_at() {
        let ring = Ring::new(128).unwrap();
        ring.entries()[0].overwrite(7, 7);
        ring.entries()[0].harvest();
        assert_eq!(ring.harvested(0), None);
        assert!(ring.push(1, 2));
        assert_eq!(ring.harvested(0), None, "pushed, so it is dirty");
        assert_eq!(ring.entries()[0].page(), (1, 2));
    }
}
