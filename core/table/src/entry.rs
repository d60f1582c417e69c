//! What an entry can say, and how an architecture writes it.

use entresol_addr::{Gfn, PageSize, Pfn};

use crate::Geometry;

/// The raw word of an entry where nothing is mapped. A zeroed frame is an empty table in every format.
pub const VACANT: u64 = 0;

/// What the guest may do with the memory behind a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Permissions {
    /// Loads.
    pub read: bool,
    /// Stores.
    pub write: bool,
    /// Instruction fetches.
    pub execute: bool,
}

impl Permissions {
    /// None at all.
    pub const NONE: Self = Self { read: false, write: false, execute: false };
    /// Loads only.
    pub const READ: Self = Self { read: true, write: false, execute: false };
    /// Stores only: what a write-protection removes.
    pub const WRITE: Self = Self { read: false, write: true, execute: false };
    /// Loads and stores.
    pub const READ_WRITE: Self = Self { read: true, write: true, execute: false };
    /// Loads and fetches.
    pub const READ_EXECUTE: Self = Self { read: true, write: false, execute: true };
    /// Everything.
    pub const ALL: Self = Self { read: true, write: true, execute: true };

    /// What either allows.
    #[inline]
    pub const fn union(self, other: Self) -> Self {
        Self { read: self.read | other.read, write: self.write | other.write, execute: self.execute | other.execute }
    }

    /// What `self` allows and `other` does not.
    #[inline]
    pub const fn without(self, other: Self) -> Self {
        Self { read: self.read & !other.read, write: self.write & !other.write, execute: self.execute & !other.execute }
    }

    /// Whether `self` allows all that `other` does.
    #[inline]
    pub const fn contains(self, other: Self) -> bool {
        (self.read | !other.read) & (self.write | !other.write) & (self.execute | !other.execute)
    }
}

/// How the guest's accesses reach the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Memory {
    /// Ordinary memory, cacheable.
    Normal,
    /// Registers of a device: no gathering, no reordering, no caching.
    Device,
}

/// A valid entry that maps memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Leaf {
    /// First frame of the memory; aligned to `size`.
    pub pfn: Pfn,
    /// How much is mapped.
    pub size: PageSize,
    /// What the guest may do.
    pub permissions: Permissions,
    /// How it is accessed.
    pub memory: Memory,
    /// Whether it was accessed since it was last aged (the access flag). A leaf that is not young faults once.
    pub young: bool,
}

impl Leaf {
    /// The frame behind `gfn`, which lies in this leaf's block.
    #[inline]
    pub const fn frame_of(&self, gfn: Gfn) -> Pfn {
        self.pfn.offset(gfn.since(gfn.align_down(self.size)))
    }

    /// Whether both map the same memory in the same way: they differ at most in permissions and access flag.
    #[inline]
    pub fn same_output(&self, other: &Self) -> bool {
        self.pfn == other.pfn && self.size == other.size && self.memory == other.memory
    }

    /// Leaf `index` of the 512 that together map what this one does.
    #[inline]
    pub const fn child(&self, index: u16, size: PageSize) -> Self {
        Self { pfn: self.pfn.offset(index as u64 * size.frames()), size, ..*self }
    }
}

/// What an entry that maps nothing remembers: no slot holds this frame, or did so at that generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MmioEntry {
    /// The guest frame that has no memory.
    pub gfn: Gfn,
    /// The low [`Format::generation_bits`] bits of the slots' generation when that was found out.
    pub generation: u64,
}

/// A decoded word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// Nothing is mapped, and no translation of it is left anywhere. The word is [`VACANT`] or an MMIO entry.
    Vacant,
    /// Invalid for the hardware, and somebody's: the crate documentation says whose.
    Broken,
    /// The table of the next level. Never at [`crate::LEAF_LEVEL`].
    Table(Pfn),
    /// Memory.
    Leaf(Leaf),
}

/// How an architecture writes entries.
///
/// An implementor promises, and its tests show:
/// 1. `decode(leaf(&l), level_of(l.size)) == Entry::Leaf(l)`, and `decode(table(p), level) == Entry::Table(p)` for levels
///    0–2, for every frame below `1 << FRAME_BITS`.
/// 2. `decode` is total, gives `Vacant` for [`VACANT`] and, at level 3, for MMIO entries, and never a table at level 3.
/// 3. `writable` and `protected` are what they say in terms of `decode` and `leaf`.
/// 4. A word whose low [`Self::MARKER_BITS`] bits equal `BROKEN` is invalid for the hardware whatever its other bits,
///    decodes as `Broken`, and is no leaf's, no table's and not vacant.
/// 5. `mmio_entry(mmio(&e)) == Some(e)` for all that `mmio` takes. The hardware faults at such a word in a way that it reports
///    apart from all others, and caches nothing of it: it may be replaced without an invalidation.
pub trait Format: Copy + Sync {
    /// Low bits of a word that `BROKEN` occupies; the bits above carry this crate's own data.
    const MARKER_BITS: u32 = 12;
    /// The marker of an invalid word that is owned; not zero, below `1 << MARKER_BITS`.
    const BROKEN: u64;
    /// Bits of a frame number that an entry can hold, at most 40.
    const FRAME_BITS: u32;

    /// The shape of tables that translate `ipa_bits` bits, or `None` if the format has none.
    fn geometry(&self, ipa_bits: u8) -> Option<Geometry>;

    /// What a word of a table at `level` says.
    fn decode(&self, raw: u64, level: u8) -> Entry;

    /// The word of a leaf.
    fn leaf(&self, leaf: &Leaf) -> u64;

    /// The word that points to a table.
    fn table(&self, frame: Pfn) -> u64;

    /// The word of a leaf with its access flag set, everything else as it was.
    fn young(&self, raw: u64) -> u64;

    /// The word of a leaf at `level` without the permission to write, everything else as it was; `None` if `raw` is no leaf. A
    /// format may know a shorter way.
    #[inline]
    fn protected(&self, raw: u64, level: u8) -> Option<u64> {
        match self.decode(raw, level) {
            Entry::Leaf(leaf) => {
                Some(self.leaf(&Leaf { permissions: leaf.permissions.without(Permissions::WRITE), ..leaf }))
            }
            Entry::Vacant | Entry::Broken | Entry::Table(_) => None,
        }
    }

    /// The word of a leaf at `level` with its access flag and the permission to write, everything else as it was. A format
    /// may know a shorter way.
    #[inline]
    fn writable(&self, raw: u64, level: u8) -> u64 {
        match self.decode(raw, level) {
            Entry::Leaf(leaf) => {
                self.leaf(&Leaf { permissions: leaf.permissions.union(Permissions::WRITE), young: true, ..leaf })
            }
            Entry::Vacant | Entry::Broken | Entry::Table(_) => raw,
        }
    }

    /// Bits of a generation that an MMIO entry holds; 0 if the format has no such entries, which then cost nothing.
    #[inline]
    fn generation_bits(&self) -> u32 {
        0
    }

    /// The word at level 3 that holds `entry`, or `None` if no word can: such an access is looked up each time.
    #[inline]
    fn mmio(&self, entry: &MmioEntry) -> Option<u64> {
        let _ = entry;
        None
    }

    /// What a word at level 3 remembers, if it is an MMIO entry.
    #[inline]
    fn mmio_entry(&self, raw: u64) -> Option<MmioEntry> {
        let _ = raw;
        None
    }

    /// Whether the hardware refuses a word of a table at `level` that should lead on: nobody here writes such a word, so
    /// something is broken. MMIO entries are not meant, and need not be told apart.
    #[inline]
    fn is_malformed(&self, raw: u64, level: u8) -> bool {
        let _ = (raw, level);
        false
    }
}

/// What an installer expects in a word that it saw as [`Entry::Vacant`] when it held `raw`.
#[inline]
pub(crate) fn vacant<F: Format>(format: F, raw: u64) -> u64 {
    if format.generation_bits() == 0 { VACANT } else { raw }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_a_set() {
        let all =
            (0..8u8).map(|bits| Permissions { read: bits & 1 != 0, write: bits & 2 != 0, execute: bits & 4 != 0 });
        for (a, b) in all.clone().flat_map(|a| all.clone().map(move |b| (a, b))) {
            assert!(a.union(b).contains(a) && a.union(b).contains(b));
            assert!(!a.without(b).union(b).without(a.union(b)).read, "removing and adding back stays inside the union");
            assert_eq!(a.contains(b), a.union(b) == a);
            assert_eq!(a.without(b).union(b), a.union(b));
        }
    }

    #[test]
    fn a_frame_inside_a_block_is_found_by_offset() {
        let block = Leaf {
            pfn: Pfn::new(0x8_0000),
            size: PageSize::Size2M,
            permissions: Permissions::READ,
            memory: Memory::Normal,
            young: true,
        };
        assert_eq!(block.frame_of(Gfn::new(0x1_0000 + 7)), Pfn::new(0x8_0007));
        assert_eq!(block.child(7, PageSize::Size4K).pfn, Pfn::new(0x8_0007));
    }
}
