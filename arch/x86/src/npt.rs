//! Entries of AMD's nested tables, and of shadow tables.
//!
//! Purpose: the bits that `entresol_table` leaves to the architecture. Nested paging walks tables of the host's own paging
//! mode (APM 15.25.5), here always four levels; a guest's accesses are user accesses to them (15.25.5), so U/S is how an entry
//! is opened to the guest at all.
//!
//! | bits | entry | value |
//! |---|---|---|
//! | 0 | P | 1 |
//! | 1 | R/W | writes |
//! | 2 | U/S | any access |
//! | 3, 4 | PWT, PCD | with the PAT as it is after a reset, both set: uncacheable |
//! | 5 | A | young |
//! | 6 | D | set ahead, so that the processor never writes the word for it |
//! | 7 | PS in levels 1 and 2 | 1 in a leaf |
//! | 51:12 | address | |
//! | 63 | NX (EFER.NXE is set) | not executable |
//!
//! Levels are the crate `table`'s: 0 is the PML4, 3 the page table. An entry with P clear is not present and the processor
//! ignores all its other bits (APM 5.3.2): that is where the markers of `entresol_table` live.
//!
//! A present entry with bit 51 set, which no processor of fewer than 52 address bits accepts, is an MMIO entry
//! ([`mmio`](crate::mmio)).
//!
//! The processor sets A by itself, and never clears it (APM 5.4.2): a leaf that is not young does not fault, unlike arm64's.
//!
//! Known holes: no five-level tables; no memory encryption bit.

use entresol_addr::{PageSize, Pfn};
use entresol_table::{Entry, Format, Geometry, LEAF_LEVEL, Leaf, Memory, MmioEntry, Permissions, VACANT, size_at};

use crate::mmio::{self, Kind};

pub(crate) const PRESENT: u64 = 1 << 0;
pub(crate) const WRITABLE: u64 = 1 << 1;
pub(crate) const USER: u64 = 1 << 2;
/// PWT and PCD: PAT entry 3, UC after a reset (APM 7.8.2).
pub(crate) const UNCACHEABLE: u64 = 0b11 << 3;
pub(crate) const ACCESSED: u64 = 1 << 5;
pub(crate) const DIRTY: u64 = 1 << 6;
/// PS in a level that can have tables.
pub(crate) const LARGE: u64 = 1 << 7;
/// Bits 51:12, the most that any processor has.
pub(crate) const ADDRESS: u64 = (1 << 52) - (1 << 12);
pub(crate) const NO_EXECUTE: u64 = 1 << 63;

/// Bit 12 of a large page is its PAT bit (APM 5.4.1).
const LARGE_PAT: u64 = 1 << 12;

/// The entry format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nested {
    /// Address bits that the processor has not.
    absent: u64,
    mmio: Option<mmio::Format>,
}

impl Nested {
    /// The format for a processor of `physical_bits` address bits (CPUID 8000_0008 EAX 7:0); `leaking_bits` as in
    /// [`mmio::Format::new`]. Without a bit to reserve it has no MMIO entries.
    pub const fn new(physical_bits: u8, leaking_bits: Option<u8>) -> Self {
        let mmio = mmio::Format::new(Kind::Reserved, physical_bits, leaking_bits);
        Self { absent: mmio::absent_bits(physical_bits), mmio }
    }
}

impl Format for Nested {
    /// P clear; bit 1 tells it from a vacant word in a dump.
    const BROKEN: u64 = 0b10;
    const FRAME_BITS: u32 = 52 - 12;

    /// Four levels, whatever part of the 48 bits is used: the processor walks them all.
    fn geometry(&self, gpa_bits: u8) -> Option<Geometry> {
        let whole = Geometry::new(Geometry::MAX_IPA_BITS, 1);
        if (Geometry::MIN_IPA_BITS..=Geometry::MAX_IPA_BITS).contains(&gpa_bits) { whole } else { None }
    }

    #[inline]
    fn decode(&self, raw: u64, level: u8) -> Entry {
        // Nearly every word of a walk, so it is asked first.
        if level < LEAF_LEVEL && raw & (PRESENT | LARGE) == PRESENT {
            return Entry::Table(Pfn::new((raw & ADDRESS) >> 12));
        }
        if raw == VACANT {
            return Entry::Vacant;
        }
        if raw & PRESENT == 0 {
            return Entry::Broken;
        }
        if raw & mmio::RESERVED != 0 && level == LEAF_LEVEL && self.mmio_entry(raw).is_some() {
            return Entry::Vacant;
        }
        let pfn = Pfn::new((raw & ADDRESS) >> 12);
        // PS in a PML4 entry is reserved (APM 5.3.3).
        let Some(size) = size_at(level) else { return Entry::Broken };
        Entry::Leaf(Leaf {
            pfn,
            size,
            permissions: Permissions {
                read: raw & USER != 0,
                write: raw & WRITABLE != 0,
                execute: raw & NO_EXECUTE == 0,
            },
            memory: if raw & UNCACHEABLE == UNCACHEABLE { Memory::Device } else { Memory::Normal },
            young: raw & ACCESSED != 0,
        })
    }

    #[inline]
    fn leaf(&self, leaf: &Leaf) -> u64 {
        let bit = |set: bool, bits: u64| if set { bits } else { 0 };
        let permissions = leaf.permissions;
        leaf.pfn.base().get() & ADDRESS
            | PRESENT
            | DIRTY
            | bit(leaf.size != PageSize::Size4K, LARGE)
            | bit(permissions.read, USER)
            | bit(permissions.write, WRITABLE)
            | bit(!permissions.execute, NO_EXECUTE)
            | bit(leaf.memory == Memory::Device, UNCACHEABLE)
            | bit(leaf.young, ACCESSED)
    }

    /// Open to everything: the leaf decides.
    #[inline]
    fn table(&self, frame: Pfn) -> u64 {
        frame.base().get() & ADDRESS | PRESENT | WRITABLE | USER | ACCESSED
    }

    #[inline]
    fn young(&self, raw: u64) -> u64 {
        raw | ACCESSED
    }

    #[inline]
    fn generation_bits(&self) -> u32 {
        if self.mmio.is_some() { mmio::GENERATION_BITS } else { 0 }
    }

    fn mmio(&self, entry: &MmioEntry) -> Option<u64> {
        self.mmio?.encode(&mmio::Entry::direct(entry))
    }

    #[inline]
    fn mmio_entry(&self, raw: u64) -> Option<MmioEntry> {
        self.mmio?.decode(raw)?.for_all()
    }

    /// APM 5.3 and 5.4.1: address bits beyond the processor's, PS in a PML4 entry, address bits within a large page.
    fn is_malformed(&self, raw: u64, level: u8) -> bool {
        let large = level < LEAF_LEVEL && raw & LARGE != 0;
        let within = match size_at(level).filter(|_| large) {
            Some(size) => ((size.frames() << 12) - 1) & ADDRESS & !LARGE_PAT,
            None => 0,
        };
        raw & PRESENT != 0 && (raw & (self.absent | within) != 0 || level == 0 && large)
    }
}
