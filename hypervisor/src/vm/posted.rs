//! Stores that nobody answers: zones of coalesced MMIO, whose stores wait in a ring for their owner, and doorbells, whose stores
//! are signals to it.
//!
//! Protocol: both lie where the owner's configuration put them, inside [`OWNERS_WINDOW`], and stay there for the virtual
//! machine's life. A store that one of them takes is done when [`Posted::store`] returns; the owner gets it by [`Posted::take`]. A
//! doorbell that rings for the first time since then tells the attached owner ([`control::rung`]). When the ring is full the
//! virtual machine waits, with its store not done, until its owner has taken something and resumes it.
//!
//! Invariants: no slot shows a page of a zone or a doorbell ([`Posted::meets`] is asked before one is made), so a store to one needs
//! no look at the slots (INV-9). Nothing here allocates after creation but answers to the owner.
//! Lock order: the ring is a leaf.

use alloc::vec::Vec;

use entresol_addr::{Gpa, PAGE_SIZE};
use entresol_mmu::{CoalescedRing, CoalescedWrite};
use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicBool, AtomicU64, Ordering};
use entresol_wire::config::{self, CoalescedZone, OWNERS_WINDOW};

use super::OutOfHeap;
use crate::control;

/// A doorbell and how often it rang.
struct Bell {
    place: config::Doorbell,
    rings: AtomicU64,
}

/// What became of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// No zone and no doorbell is there.
    Elsewhere,
    /// It is done.
    Done,
    /// It is done, and the hypervisor has work for it.
    Signalled,
    /// There is no room for it: it is not done.
    Full,
}

/// The zones and doorbells of one virtual machine.
pub struct Posted {
    /// Bytes of the window that may have one; 0 if there is none.
    window: u64,
    bells: Vec<Bell>,
    zones: Vec<CoalescedZone>,
    /// One, if there are zones.
    ring: Vec<Mutex<CoalescedRing>>,
    /// Some doorbell rang since they were asked for.
    rung: AtomicBool,
}

fn try_collect<T>(count: usize, values: impl Iterator<Item = T>) -> Result<Vec<T>, OutOfHeap> {
    let mut all = Vec::new();
    all.try_reserve_exact(count).map_err(|_| OutOfHeap)?;
    all.extend(values.take(count));
    Ok(all)
}

impl Posted {
    /// What `config` asks for.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn new<F>(config: &config::Vm<F>) -> Result<Self, OutOfHeap> {
        let (zones, bells) = (&config.coalesced_mmio, &config.doorbells);
        let any = !(zones.is_empty() && bells.is_empty());
        let rings = usize::from(!zones.is_empty());
        Ok(Self {
            window: if any { OWNERS_WINDOW.end - OWNERS_WINDOW.start } else { 0 },
            bells: try_collect(
                bells.len(),
                bells.iter().map(|place| Bell { place: *place, rings: AtomicU64::new(0) }),
            )?,
            zones: try_collect(zones.len(), zones.iter().copied())?,
            ring: try_collect(rings, core::iter::from_fn(|| Some(Mutex::new(CoalescedRing::new()))))?,
            rung: AtomicBool::new(false),
        })
    }

    /// Whether a zone or a doorbell may be at `gpa`: a hint that costs nothing.
    #[inline]
    pub fn may_cover(&self, gpa: Gpa) -> bool {
        gpa.get().wrapping_sub(OWNERS_WINDOW.start) < self.window
    }

    /// A store of the low `size` bytes of `value` at `gpa`, aligned to its size.
    #[inline]
    pub fn store(&self, gpa: Gpa, size: u8, value: u64) -> Store {
        let address = gpa.get();
        for bell in &self.bells {
            if bell.place.address == address && bell.place.size == u64::from(size) {
                return self.ring_bell(bell);
            }
        }
        // A zone is whole units of 8 bytes: what begins in it and is aligned ends in it.
        if !self.zones.iter().any(|zone| address.wrapping_sub(zone.base) < zone.size) {
            return Store::Elsewhere;
        }
        let write = CoalescedWrite::new(gpa, size, value);
        match self.ring.first().map(|ring| ring.lock().push(write)) {
            Some(Ok(())) => Store::Done,
            Some(Err(_)) | None => Store::Full,
        }
    }

    #[inline]
    fn ring_bell(&self, bell: &Bell) -> Store {
        bell.rings.fetch_add(1, Ordering::Release);
        if self.rung.load(Ordering::Relaxed) || self.rung.swap(true, Ordering::SeqCst) {
            return Store::Done;
        }
        control::rung();
        Store::Signalled
    }

    /// Whether a doorbell rang since this or [`Posted::take`] was asked last.
    pub fn heard(&self) -> bool {
        self.rung.load(Ordering::Relaxed) && self.rung.swap(false, Ordering::SeqCst)
    }

    /// The oldest write that waits.
    pub fn take(&self) -> Option<CoalescedWrite> {
        self.ring.first().and_then(|ring| ring.lock().pop())
    }

    /// Every doorbell with its rings since they were asked for last.
    pub fn take_rings(&self) -> impl ExactSizeIterator<Item = (u64, u64)> + '_ {
        // Forgotten before it is counted: a ring that comes after the count is told.
        self.rung.store(false, Ordering::SeqCst);
        self.bells.iter().map(|bell| (bell.place.address, bell.rings.swap(0, Ordering::AcqRel)))
    }

    /// Whether a zone or a doorbell lies in a page of the `size` bytes at `start`, both page-aligned.
    pub fn meets(&self, start: u64, size: u64) -> bool {
        let zones = self.zones.iter().map(|zone| (zone.base, zone.size));
        let bells = self.bells.iter().map(|bell| (bell.place.address, bell.place.size));
        let end = start.saturating_add(size);
        zones.chain(bells).any(|(base, size)| base / PAGE_SIZE * PAGE_SIZE < end && start < base + size)
    }
}
