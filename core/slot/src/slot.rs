//! One slot, as plain data.

use core::ops::Deref;

use bitflags::bitflags;
use entresol_addr::{Gfn, GfnRange};

bitflags! {
    /// What an owner may ask of a slot. Bit numbers are those of `KVM_SET_USER_MEMORY_REGION`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct SlotFlags: u32 {
        /// Writes are recorded in the dirty log.
        const LOG_DIRTY = 1 << 0;
        /// The guest's writes are not memory accesses; they leave to the owner.
        const READ_ONLY = 1 << 1;
    }
}

/// The name of a memory object. Opaque to slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(u32);

impl ObjectId {
    /// Wraps a number that the keeper of objects gave out.
    #[inline]
    pub const fn new(raw: u32) -> Self {
        Self(raw)
    }

    /// The number.
    #[inline]
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// Which state of the slots an answer came from. Bit 0: an update was in progress; the rest counts publications.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Generation(u64);

impl Generation {
    pub(crate) const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The raw number, mark included, for entries that store a part of it.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Publications so far, without the mark.
    #[inline]
    pub const fn count(self) -> u64 {
        self.0 >> 1
    }

    /// Whether an update was in progress, so that nothing may be kept on the strength of this answer.
    #[inline]
    pub const fn in_progress(self) -> bool {
        self.0 & 1 != 0
    }
}

/// A range of guest frames and what stands behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot {
    /// Its number, below the capacity of the [`crate::Slots`].
    pub id: u16,
    /// First guest frame.
    pub base: Gfn,
    /// Frames, never 0.
    pub count: u64,
    /// The object behind it.
    pub object: ObjectId,
    /// The object's frame behind `base`.
    pub offset: u64,
    /// What the owner asked for.
    pub flags: SlotFlags,
}

impl Slot {
    /// The guest frames.
    ///
    /// # Panics
    ///
    /// If they wrap 64 bits, which no slot that was accepted does.
    #[inline]
    pub const fn range(&self) -> GfnRange {
        GfnRange::new(self.base, self.count).expect("an accepted slot does not wrap")
    }

    /// Whether `gfn` lies inside.
    #[inline]
    pub const fn contains(&self, gfn: Gfn) -> bool {
        gfn.since(self.base) < self.count
    }

    /// The object's frame behind `gfn`, which lies inside.
    #[inline]
    pub const fn object_frame(&self, gfn: Gfn) -> u64 {
        self.offset.wrapping_add(gfn.since(self.base))
    }

    /// The guest frames that show the object's frames `start .. start + count`, if any do.
    pub fn guest_range(&self, start: u64, count: u64) -> Option<GfnRange> {
        let first = start.max(self.offset);
        let last = start.saturating_add(count).min(self.offset + self.count);
        (first < last).then(|| GfnRange::new(self.base.offset(first - self.offset), last - first)).flatten()
    }

    /// Whether the guest may not write through it.
    #[inline]
    pub const fn is_read_only(&self) -> bool {
        self.flags.contains(SlotFlags::READ_ONLY)
    }

    /// Whether its writes are logged.
    #[inline]
    pub const fn logs_dirty(&self) -> bool {
        self.flags.contains(SlotFlags::LOG_DIRTY)
    }
}

/// A slot as a lookup found it, with the generation that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRef {
    pub(crate) slot: Slot,
    pub(crate) generation: Generation,
}

impl SlotRef {
    /// The state of the slots that it was found in.
    #[inline]
    pub const fn generation(&self) -> Generation {
        self.generation
    }
}

impl Deref for SlotRef {
    type Target = Slot;

    #[inline]
    fn deref(&self) -> &Slot {
        &self.slot
    }
}
