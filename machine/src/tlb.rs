//! TLB invalidations as values.

use entresol_addr::{Gfn, GfnRange, PageSize, PfnRange};

/// A virtual machine identifier as the hardware sees it. Zero is the hypervisor's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vmid(u16);

impl Vmid {
    /// Wraps a number of at most `Features::vmid_bits` bits.
    #[inline]
    pub const fn new(raw: u16) -> Self {
        Self(raw)
    }

    /// The raw number.
    #[inline]
    pub const fn get(self) -> u16 {
        self.0
    }
}

/// One invalidation, on all CPUs of the inner shareable domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlbOp {
    /// The stage-2 entry of one guest address, its walk-cache entries, and what stage 1 combined from them.
    Ipa {
        /// Whose.
        vmid: Vmid,
        /// A frame behind the entry.
        gfn: Gfn,
        /// Size of the entry that was valid. A table entry is named by the size of its own level.
        size: PageSize,
        /// Whether only a leaf changed, so that walk caches may stay.
        leaf_only: bool,
    },
    /// Every stage-2 entry that translates a part of the range, and what was combined from them.
    Range {
        /// Whose.
        vmid: Vmid,
        /// The guest frames.
        range: GfnRange,
    },
    /// Everything of one virtual machine, stage 1 and 2.
    Vmid(Vmid),
    /// Everything of every virtual machine, and the instruction caches (VMID rollover).
    All,
    /// The hypervisor's own translations of these frames: one, or a naturally aligned block of 512.
    Own(PfnRange),
}
