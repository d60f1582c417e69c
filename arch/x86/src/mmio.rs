//! Entries that say "there is no memory here", so that the next access needs no look-up in the slots.
//!
//! Purpose: an access to a device faults always. An MMIO entry makes it fault in a way that the processor reports apart from
//! all others, and holds what the look-up found: the guest frame, the access and the generation of the slots.
//!
//! Layout, the same for every format but for what makes it fault:
//!
//! | bits | meaning |
//! |---|---|
//! | 2:0 | [`Kind::Reserved`]: P set, then W and U of the access; [`Kind::Misconfiguration`]: write and execute without read |
//! | 10:3 | generation, low part |
//! | 11 | clear |
//! | 51:12 | the guest frame, and for [`Kind::Reserved`] bit 51, which no processor of fewer than 52 address bits accepts |
//! | 62:52 | generation, high part |
//! | 63 | [`Kind::Reserved`]: the access may not fetch |
//!
//! A processor with the fault that lets speculation read past an entry which it will refuse ("L1TF") uses the entry's address
//! bits all the same, as far as its cache has address bits. There the five highest of these are set, so that they name no memory
//! that can be cached, and the frame's own bits stand five places higher.
//!
//! Invariants: `decode` undoes `encode` for all that `encode` takes; what it cannot hold, it refuses, and such an access takes
//! the full path each time. INV-8 is its user's: the generation is compared there.
//!
//! Sources: APM 15.25.6 and 5.6.5 (reserved bits), SDM 29.3.3.1 (misconfigurations).

use entresol_addr::Gfn;
use entresol_table::MmioEntry;

/// Bits of a generation that an entry stores.
pub const GENERATION_BITS: u32 = 19;
const GENERATION_LOW_BITS: u32 = 8;
const GENERATION_LOW_SHIFT: u32 = 3;
const GENERATION_HIGH_SHIFT: u32 = 52;
/// Address bits of an entry: 51:12.
const ADDRESS: u64 = (1 << 52) - (1 << 12);
/// The reserved bit.
pub(crate) const RESERVED: u64 = 1 << 51;
/// Address bits that are forced to ones.
const FORCED_BITS: u32 = 5;

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const NO_EXECUTE: u64 = 1 << 63;
/// Write and execute without read.
const MISCONFIGURED: u64 = 0b110;
const LOW: u64 = 0b111;
/// Clear in every MMIO entry; set in what is a leaf to us and not to the processor.
const NOT_MMIO: u64 = 1 << 11;

/// Address bits of an entry that a processor of `physical_bits` address bits has not.
pub(crate) const fn absent_bits(physical_bits: u8) -> u64 {
    if physical_bits >= 52 { 0 } else { ADDRESS & (u64::MAX << physical_bits) }
}

/// The part of a slot generation that entries store. When it comes back to 0, every entry of the round before must be gone.
#[inline]
pub const fn stored(generation: u64) -> u64 {
    generation & ((1 << GENERATION_BITS) - 1)
}

/// How the processor is made to refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nested and shadow tables: an address bit that must be zero.
    Reserved,
    /// Extended page tables: permissions that make no sense.
    Misconfiguration,
}

/// What the guest's own tables allow there. In nested and extended tables, which know nothing of those: all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Stores.
    pub write: bool,
    /// Accesses by user code.
    pub user: bool,
    /// Fetches.
    pub execute: bool,
}

impl Access {
    /// Everything.
    pub const ALL: Self = Self { write: true, user: true, execute: true };
}

/// What an entry holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The guest frame that has no memory.
    pub gfn: Gfn,
    /// What may be done there.
    pub access: Access,
    /// The slots' generation when that was found out, as [`stored`].
    pub generation: u64,
}

impl Entry {
    /// An entry of tables that know nothing of what the guest's own allow.
    pub(crate) const fn direct(entry: &MmioEntry) -> Self {
        Self { gfn: entry.gfn, access: Access::ALL, generation: entry.generation }
    }

    /// What it says if it is one.
    pub(crate) fn for_all(self) -> Option<MmioEntry> {
        (self.access == Access::ALL).then_some(MmioEntry { gfn: self.gfn, generation: self.generation })
    }
}

/// How entries are written on a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    kind: Kind,
    /// Address bits that are set in every entry.
    forced: u64,
    /// Address bits that hold the frame in its place.
    plain: u64,
    /// Address bits of the frame that stand [`FORCED_BITS`] higher.
    moved: u64,
}

impl Format {
    /// The format for a processor of `physical_bits` address bits (CPUID 8000_0008 EAX 7:0). `leaking_bits`: the address bits of
    /// its cache, if it has L1TF.
    ///
    /// `None` if there is no bit to reserve, or none to force: MMIO entries cannot be used then.
    pub const fn new(kind: Kind, physical_bits: u8, leaking_bits: Option<u8>) -> Option<Self> {
        let reserved = match kind {
            Kind::Reserved if physical_bits >= 52 => return None,
            Kind::Reserved => RESERVED,
            Kind::Misconfiguration => 0,
        };
        let Some(bits) = leaking_bits else {
            return Some(Self { kind, forced: reserved, plain: ADDRESS & !reserved, moved: 0 });
        };
        let bits = bits as u32;
        // The moved bits must end below the reserved one, and begin above the page offset.
        if bits + FORCED_BITS > 51 || bits < 12 + FORCED_BITS {
            return None;
        }
        let moved = (1 << bits) - (1 << (bits - FORCED_BITS));
        Some(Self { kind, forced: reserved | moved, plain: (1 << (bits - FORCED_BITS)) - (1 << 12), moved })
    }

    /// The word, or `None` if it cannot hold the frame or the access.
    #[inline]
    pub const fn encode(&self, entry: &Entry) -> Option<u64> {
        let gfn = entry.gfn.get();
        if gfn >> 40 != 0 {
            return None;
        }
        let address = gfn << 12;
        if address & !(self.plain | self.moved) != 0 {
            return None;
        }
        let Access { write, user, execute } = entry.access;
        let access = match self.kind {
            Kind::Reserved => {
                PRESENT
                    | if write { WRITE } else { 0 }
                    | if user { USER } else { 0 }
                    | if execute { 0 } else { NO_EXECUTE }
            }
            Kind::Misconfiguration if write && user && execute => MISCONFIGURED,
            Kind::Misconfiguration => return None,
        };
        let frame = address & self.plain | (address & self.moved) << FORCED_BITS;
        Some(access | frame | self.forced | place(entry.generation))
    }

    /// What a word says, or `None` if it is no MMIO entry.
    #[inline]
    pub const fn decode(&self, raw: u64) -> Option<Entry> {
        let frame_bits = self.plain | self.moved << FORCED_BITS;
        // Every address bit is the frame's, forced to one, or zero.
        if raw & NOT_MMIO != 0 || raw & ADDRESS & !frame_bits != self.forced {
            return None;
        }
        let access = match self.kind {
            Kind::Reserved if raw & PRESENT != 0 => {
                Access { write: raw & WRITE != 0, user: raw & USER != 0, execute: raw & NO_EXECUTE == 0 }
            }
            Kind::Misconfiguration if raw & (LOW | NO_EXECUTE) == MISCONFIGURED => Access::ALL,
            _ => return None,
        };
        let address = raw & self.plain | raw >> FORCED_BITS & self.moved;
        Some(Entry { gfn: Gfn::new(address >> 12), access, generation: generation(raw) })
    }
}

const fn place(generation: u64) -> u64 {
    let generation = stored(generation);
    let low = generation & ((1 << GENERATION_LOW_BITS) - 1);
    low << GENERATION_LOW_SHIFT | generation >> GENERATION_LOW_BITS << GENERATION_HIGH_SHIFT
}

const fn generation(raw: u64) -> u64 {
    let low = raw >> GENERATION_LOW_SHIFT & ((1 << GENERATION_LOW_BITS) - 1);
    let high = raw >> GENERATION_HIGH_SHIFT & ((1 << (GENERATION_BITS - GENERATION_LOW_BITS)) - 1);
    high << GENERATION_LOW_BITS | low
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ept::Extended;
    use crate::npt::Nested;
    use entresol_table::{Entry as TableEntry, Format as _, LEAF_LEVEL, Leaf, Memory, Permissions};
    use proptest::prelude::*;

    const NESTED: Nested = Nested::new(46, None);
    const EXTENDED: Extended = Extended::new(46, None);

    fn formats() -> impl Iterator<Item = Format> {
        [Kind::Reserved, Kind::Misconfiguration].into_iter().flat_map(|kind| {
            (36..=52).flat_map(move |physical| {
                [None, Some(36), Some(39), Some(44), Some(46)]
                    .into_iter()
                    .filter_map(move |leaking| Format::new(kind, physical, leaking))
            })
        })
    }

    fn access(bits: u8) -> Access {
        Access { write: bits & 1 != 0, user: bits & 2 != 0, execute: bits & 4 != 0 }
    }

    #[test]
    fn without_a_bit_to_spare_there_is_no_format() {
        assert_eq!(Format::new(Kind::Reserved, 52, None), None);
        assert!(Format::new(Kind::Reserved, 51, None).is_some());
        assert!(Format::new(Kind::Misconfiguration, 52, None).is_some());
        assert_eq!(Format::new(Kind::Reserved, 46, Some(47)), None, "nowhere to move the frame's bits to");
        assert!(Format::new(Kind::Reserved, 46, Some(46)).is_some());
        assert_eq!(Format::new(Kind::Reserved, 46, Some(0)), None);
    }

    #[test]
    fn every_frame_bit_and_generation_bit_survives() {
        for format in formats() {
            for bit in 0..40 {
                let entry = Entry { gfn: Gfn::new(1 << bit), access: Access::ALL, generation: 0 };
                if let Some(raw) = format.encode(&entry) {
                    assert_eq!(format.decode(raw), Some(entry), "{format:?} {raw:#x}");
                }
            }
            for bit in 0..GENERATION_BITS {
                let entry = Entry { gfn: Gfn::new(0x1_2345), access: Access::ALL, generation: 1 << bit };
                let raw = format.encode(&entry).unwrap();
                assert_eq!(format.decode(raw), Some(entry), "{format:?} {raw:#x}");
            }
        }
    }

    #[test]
    fn only_what_cannot_be_held_is_refused() {
        let plain = Format::new(Kind::Reserved, 46, None).unwrap();
        let shifted = Format::new(Kind::Reserved, 46, Some(44)).unwrap();
        let extended = Format::new(Kind::Misconfiguration, 46, None).unwrap();
        let fits = |format: Format, gfn: u64| {
            format.encode(&Entry { gfn: Gfn::new(gfn), access: Access::ALL, generation: 0 }).is_some()
        };
        assert!(fits(plain, (1 << 39) - 1) && !fits(plain, 1 << 39));
        assert!(fits(shifted, (1 << 32) - 1) && !fits(shifted, 1 << 32));
        assert!(fits(extended, (1 << 40) - 1) && !fits(extended, 1 << 40));
        assert!(!fits(extended, 1 << 63));
    }

    #[test]
    fn the_processor_refuses_every_entry() {
        for format in formats() {
            let entry = Entry { gfn: Gfn::new(0xf_ee00), access: Access::ALL, generation: stored(u64::MAX) };
            let raw = format.encode(&entry).unwrap();
            match format.kind {
                Kind::Reserved => assert_eq!(raw & (RESERVED | PRESENT), RESERVED | PRESENT),
                Kind::Misconfiguration => assert_eq!(raw & LOW, MISCONFIGURED),
            }
        }
    }

    #[test]
    fn speculation_finds_no_memory() {
        for (bits, kind) in [(36, Kind::Reserved), (44, Kind::Reserved), (44, Kind::Misconfiguration)] {
            let format = Format::new(kind, 46, Some(bits)).unwrap();
            for gfn in [0, 1, 0xf_ee00, (1 << (bits - 12)) - 1] {
                let entry = Entry { gfn: Gfn::new(gfn), access: Access::ALL, generation: 0 };
                let cached = format.encode(&entry).unwrap() & ((1 << bits) - 1);
                assert_eq!(cached >> (bits - 5), 0b1_1111, "the top of what the cache can name");
            }
        }
    }

    #[test]
    fn no_leaf_table_or_marker_is_an_mmio_entry() {
        let leaf = |bits: u8| Leaf {
            pfn: entresol_addr::Pfn::new((1 << 34) - 1),
            size: entresol_addr::PageSize::Size4K,
            permissions: Permissions { read: bits & 1 != 0, write: bits & 2 != 0, execute: bits & 4 != 0 },
            memory: if bits & 8 != 0 { Memory::Device } else { Memory::Normal },
            young: bits & 16 != 0,
        };
        for format in formats() {
            for bits in 0..32 {
                let words = match format.kind {
                    Kind::Reserved => [NESTED.leaf(&leaf(bits)), NESTED.table(leaf(bits).pfn)],
                    Kind::Misconfiguration => [EXTENDED.leaf(&leaf(bits)), EXTENDED.table(leaf(bits).pfn)],
                };
                for raw in words {
                    assert_eq!(format.decode(raw), None, "{format:?} {raw:#x}");
                }
            }
            for raw in [0, Nested::BROKEN, Extended::BROKEN, u64::MAX << 12] {
                assert_eq!(format.decode(raw), None);
            }
        }
    }

    /// The tables' own reading: vacant in the last level, and nothing that leads anywhere above it.
    fn tables_see_nothing<F: entresol_table::Format>(format: F) {
        for entry in [MmioEntry { gfn: Gfn::new(7), generation: 9 }, MmioEntry { gfn: Gfn::new(0), generation: 0 }] {
            let raw = format.mmio(&entry).unwrap();
            assert_eq!(format.mmio_entry(raw), Some(entry));
            assert_eq!(format.decode(raw, LEAF_LEVEL), TableEntry::Vacant);
            assert!(format.is_malformed(raw, LEAF_LEVEL), "or the processor would use it");
        }
    }

    #[test]
    fn to_tables_an_mmio_entry_is_vacant() {
        tables_see_nothing(NESTED);
        tables_see_nothing(EXTENDED);
        assert_eq!(Nested::new(52, None).mmio(&MmioEntry { gfn: Gfn::new(7), generation: 9 }), None);
    }

    proptest! {
        #[test]
        fn decoding_undoes_encoding(gfn: u64, bits in 0u8..8, generation: u64, pick: prop::sample::Index) {
            let formats: std::vec::Vec<_> = formats().collect();
            let format = *pick.get(&formats);
            for gfn in [gfn, gfn >> 24, gfn >> 32, gfn >> 40] {
                let entry = Entry { gfn: Gfn::new(gfn), access: access(bits), generation: stored(generation) };
                if let Some(raw) = format.encode(&entry) {
                    prop_assert_eq!(format.decode(raw), Some(entry));
                }
            }
        }

        #[test]
        fn what_decodes_is_what_encodes(raw: u64, pick: prop::sample::Index) {
            let formats: std::vec::Vec<_> = formats().collect();
            let format = *pick.get(&formats);
            for raw in [raw, raw | RESERVED | PRESENT, raw & !LOW | MISCONFIGURED, raw & !NOT_MMIO | format.forced | PRESENT] {
                if let Some(entry) = format.decode(raw) {
                    prop_assert_eq!(format.encode(&entry), Some(raw));
                }
            }
        }
    }
}
