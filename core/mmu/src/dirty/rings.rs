//! All dirty rings of a virtual machine.
//!
//! Protocol: [`Vm::enter`] before each run of a vCPU and [`Vm::leave`] after it say whose ring the writes of a CPU go to, as
//! [`Vm::write`] for a device goes to that of the vCPU which made it act. Where none runs, the page is in the log only. Rings
//! are made by the first [`Vm::enable_dirty_rings`] and stay; [`Vm::disable_dirty_rings`] empties them. Both may be called while
//! vCPUs run. A write that takes its ring to the soft limit is done, and its fault ends with [`Reason::DirtyRingFull`](crate::Reason::DirtyRingFull).
//!
//! A reset takes the harvested entries of each ring from the oldest on, up to the first that is not harvested. Neighbours are
//! taken together: pages of one slot in one aligned group of 64 cost one grace period and one flush. A group is a word of the
//! log, so there is nothing to add to an entry's page before it is compared with the slot's pages (Z-F4).

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use entresol_addr::GfnRange;
use entresol_machine::Machine;
use entresol_sync::atomic::{AtomicU32, Ordering};
use entresol_sync::epoch::MAX_CPUS;
use entresol_sync::{Once, planted};
use entresol_table::Format;

use super::Ring;
use super::bitmap::PAGES;
use crate::vm::Vm;

/// Why there are no rings. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingsError {
    /// Not a power of two from 128 to 65,536.
    Entries {
        /// What was asked for.
        value: u32,
    },
    /// No vCPU.
    Vcpus {
        /// What was asked for.
        value: u32,
    },
    /// They are enabled already.
    Enabled,
    /// The rings were made before, with fewer entries or for other vCPUs.
    Made {
        /// vCPUs that have a ring.
        vcpus: u32,
        /// Entries of each.
        entries: u32,
    },
    /// The heap has no room.
    OutOfHeap,
}

impl fmt::Display for RingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Entries { value } => write!(f, "entries {value}: must be a power of two from 128 to 65536"),
            Self::Vcpus { value } => write!(f, "vcpus {value}: must be 1 to {}", u16::MAX),
            Self::Enabled => f.write_str("dirty rings: must not be enabled already"),
            Self::Made { vcpus, entries } => {
                write!(f, "entries: must be at most {entries}, and for {vcpus} vCPUs, as the rings were made first")
            }
            Self::OutOfHeap => f.write_str("dirty rings: the heap has no room for them"),
        }
    }
}

impl core::error::Error for RingsError {}

/// The vCPU's ring is at its soft limit (`DirtyRingFull`): it runs again after a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingFull;

/// The rings, and which vCPU runs where.
pub(super) struct Rings {
    rings: Once<Box<[Ring]>>,
    /// By CPU: the vCPU that runs there plus one, or 0.
    running: [AtomicU32; MAX_CPUS],
}

impl Rings {
    pub(super) const fn new() -> Self {
        Self { rings: Once::new(), running: [const { AtomicU32::new(0) }; MAX_CPUS] }
    }

    fn all(&self) -> &[Ring] {
        self.rings.get().map_or(&[], |rings| rings)
    }

    fn of(&self, vcpu: u32) -> Option<&Ring> {
        self.all().get(vcpu as usize)
    }

    /// The ring of the vCPU that runs on CPU `cpu`.
    fn on(&self, cpu: usize) -> Option<&Ring> {
        let running = self.running.get(cpu).map_or(0, |running| running.load(Ordering::Relaxed));
        running.checked_sub(1).and_then(|vcpu| self.of(vcpu))
    }

    /// Page `offset` of `slot` was written on CPU `cpu`, which is the caller's. Where no ring has room for that, the log
    /// says it alone.
    pub(super) fn push(&self, cpu: usize, slot: u16, offset: u64) {
        if let Some(ring) = self.on(cpu) {
            ring.push(slot, offset);
        }
    }

    /// Whether there are rings, which may be off.
    #[inline]
    pub(super) fn are_made(&self) -> bool {
        self.rings.is_completed()
    }

    /// Whether the vCPU that runs on CPU `cpu` has to stop for its ring.
    pub(super) fn is_full_on(&self, cpu: usize) -> bool {
        self.on(cpu).is_some_and(Ring::is_full)
    }
}

/// Neighbours in a ring, taken together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Group {
    slot: u32,
    /// Which word of the log.
    word: u64,
    mask: u64,
}

impl Group {
    const fn of(slot: u32, offset: u64) -> Self {
        Self { slot, word: offset / PAGES, mask: 1 << (offset % PAGES) }
    }

    /// Takes `other` in, if it belongs to the same word.
    const fn join(&mut self, other: Self) -> bool {
        let same = self.slot == other.slot && self.word == other.word;
        if same {
            self.mask |= other.mask;
        }
        same
    }
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// From now on each of the vCPUs `0 .. vcpus` has a ring of `entries` entries.
    ///
    /// # Errors
    ///
    /// [`RingsError`].
    pub fn enable_dirty_rings(&self, vcpus: u32, entries: u32) -> Result<(), RingsError> {
        if !Ring::is_size(entries) {
            return Err(RingsError::Entries { value: entries });
        }
        if vcpus == 0 || vcpus > u32::from(u16::MAX) {
            return Err(RingsError::Vcpus { value: vcpus });
        }
        let _owner = self.logs.owner();
        let made = self.logs.rings.all();
        if made.iter().any(Ring::is_on) {
            return Err(RingsError::Enabled);
        }
        if let Some(first) = made.first() {
            let has = first.entries().len() as u32;
            if made.len() as u32 != vcpus || has < entries {
                return Err(RingsError::Made { vcpus: made.len() as u32, entries: has });
            }
            made.iter().for_each(|ring| ring.set_limit(entries));
            return Ok(());
        }
        let mut rings = Vec::new();
        rings.try_reserve_exact(vcpus as usize).map_err(|_| RingsError::OutOfHeap)?;
        for _ in 0..vcpus {
            rings.push(Ring::new(entries).map_err(|_| RingsError::OutOfHeap)?);
        }
        self.logs.rings.rings.call_once(|| rings.into_boxed_slice());
        Ok(())
    }

    /// From now on there are no rings; what stood in them is in the log. Not called by a pinned CPU.
    pub fn disable_dirty_rings(&self) {
        let _owner = self.logs.owner();
        let rings = self.logs.rings.all();
        rings.iter().for_each(|ring| ring.set_limit(0));
        // Whoever is about to push is pinned.
        self.host.epoch.synchronize();
        rings.iter().for_each(Ring::clear);
    }

    /// The ring of vCPU `vcpu`, if rings are enabled.
    pub fn dirty_ring(&self, vcpu: u32) -> Option<&Ring> {
        self.logs.rings.of(vcpu).filter(|ring| ring.is_on())
    }

    /// CPU `cpu` is about to run vCPU `vcpu`, until [`Vm::leave`].
    ///
    /// # Errors
    ///
    /// [`RingFull`]: it must not run.
    pub fn enter(&self, cpu: usize, vcpu: u32) -> Result<(), RingFull> {
        if self.logs.rings.of(vcpu).is_some_and(Ring::is_full) {
            return Err(RingFull);
        }
        self.set_running(cpu, vcpu + 1);
        Ok(())
    }

    /// CPU `cpu` runs none of its vCPUs any more.
    pub fn leave(&self, cpu: usize) {
        self.set_running(cpu, 0);
    }

    fn set_running(&self, cpu: usize, running: u32) {
        if let Some(place) = self.logs.rings.running.get(cpu) {
            place.store(running, Ordering::Relaxed);
        }
    }

    /// Frees the harvested entries of all rings: their pages are write-protected, the TLBs flushed, their bits cleared. Copy
    /// the pages after that. Returns how many entries were freed. Entries that name no page of a slot that logs do nothing.
    pub fn reset_dirty_rings(&self, cpu: usize) -> u64 {
        let _owner = self.logs.owner();
        self.logs.rings.all().iter().map(|ring| u64::from(self.reset_ring(cpu, ring))).sum()
    }

    fn reset_ring(&self, cpu: usize, ring: &Ring) -> u32 {
        let mut freed = 0;
        // The vCPU may push meanwhile, but not more than this often into what was freed.
        while let Some((slot, offset)) = ring.harvested(0).filter(|_| (freed as usize) < ring.entries().len()) {
            let (mut group, mut count) = (Group::of(slot, offset), 1);
            while let Some((slot, offset)) = ring.harvested(count) {
                if !group.join(Group::of(slot, offset)) {
                    break;
                }
                count += 1;
            }
            self.reset_group(cpu, group);
            ring.free(count);
            freed += count;
        }
        freed
    }

    fn reset_group(&self, cpu: usize, group: Group) {
        let Ok(id) = u16::try_from(group.slot) else { return };
        let Ok((slot, log)) = self.log_of(cpu, id) else { return };
        if planted!(ZF4) {
            return self.reset_overflowing(cpu, slot, group);
        }
        // The log has no bits after the slot's last page.
        if group.word < slot.count.div_ceil(PAGES) {
            self.take(cpu, &slot, log, group.word..group.word + 1, |_| group.mask, |_, _| {});
        }
    }

    /// Z-F4: the end wraps, and is below the slot's.
    fn reset_overflowing(&self, cpu: usize, slot: entresol_slot::Slot, group: Group) {
        let first = group.word.wrapping_mul(PAGES);
        if first.wrapping_add(PAGES) <= slot.count
            && let Some(range) = GfnRange::new(slot.base.offset(first), PAGES)
        {
            let invalidation = self.exclude(range);
            self.reprotect(cpu, (0..PAGES).map(|page| range.start().offset(page)));
            self.notifier.end(invalidation);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_of_one_word_of_one_slot_are_taken_together() {
        let mut group = Group::of(1, 64);
        assert!(group.join(Group::of(1, 127)));
        assert!(group.join(Group::of(1, 64)), "once more");
        assert_eq!(group.mask, 1 << 63 | 1);
        let before = group;
        for (slot, offset) in [(2, 64), (1, 63), (1, 128), (1, u64::MAX)] {
            assert!(!group.join(Group::of(slot, offset)), "{slot} {offset}");
        }
        assert_eq!(group, before);
    }
}
