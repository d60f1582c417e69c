//! Entries of Intel's extended page tables, and the pointer to them.
//!
//! Purpose: as [`npt`](crate::npt), for SDM 29.3 (the extended page-table mechanism).
//!
//! | bits | entry | value |
//! |---|---|---|
//! | 0, 1, 2 | read, write, execute | all clear: not present |
//! | 5:3 | memory type of a leaf | 6 write-back, 0 uncacheable |
//! | 6 | ignore PAT in a leaf | set for memory, so that no guest makes an uncacheable alias of it |
//! | 7 | 1 in a leaf of levels 1 and 2 | |
//! | 8 | accessed, if EPTP.6 is set | young |
//! | 9 | dirty, likewise | set ahead |
//! | 11 | ignored by the processor | ours: a leaf that may not be read |
//! | 51:12 | address | |
//! | 53:52 | ignored by the processor | ours: W and X of such a leaf |
//!
//! Write or execute without read is a misconfiguration (SDM 29.3.3.1), not a permission: a leaf that may not be read is
//! therefore written as one that is not present, and remembers in ignored bits what else it says. Write and execute without
//! read is an MMIO entry ([`mmio`](crate::mmio)).
//!
//! A word with bits 2:0 clear is not present and the processor ignores all its other bits: that is where the markers of
//! `entresol_table` live.
//!
//! Known holes: no five-level tables, no mode-based execute control, no execute-only leaves; without accessed flags in the
//! processor (IA32_VMX_EPT_VPID_CAP bit 21) every leaf stays as young as it was made.

use entresol_addr::{PageSize, Pfn};
use entresol_table::{Entry, Format, Geometry, LEAF_LEVEL, Leaf, Memory, MmioEntry, Permissions, VACANT, size_at};

use crate::mmio::{self, Kind};

pub(crate) const READ: u64 = 1 << 0;
pub(crate) const WRITE: u64 = 1 << 1;
pub(crate) const EXECUTE: u64 = 1 << 2;
/// Any of them: present.
pub(crate) const PRESENT: u64 = READ | WRITE | EXECUTE;
const MEMORY_TYPE: u64 = 0b111 << 3;
pub(crate) const WRITE_BACK: u64 = 6 << 3;
pub(crate) const IGNORE_PAT: u64 = 1 << 6;
pub(crate) const LARGE: u64 = 1 << 7;
pub(crate) const ACCESSED: u64 = 1 << 8;
pub(crate) const DIRTY: u64 = 1 << 9;
/// Ours: a leaf all the same.
pub(crate) const CLOSED: u64 = 1 << 11;
const CLOSED_WRITE: u64 = 1 << 52;
const CLOSED_EXECUTE: u64 = 1 << 53;
pub(crate) const ADDRESS: u64 = (1 << 52) - (1 << 12);

/// Bits 7:3 of an entry that points to a table, all reserved (SDM 29.3.2; of a PML4 entry bit 7 too).
const TABLE_RESERVED: u64 = 0b1111 << 3;

/// The entry format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extended {
    /// Address bits that the processor has not.
    absent: u64,
    mmio: Option<mmio::Format>,
}

impl Extended {
    /// The format for a processor of `physical_bits` address bits (CPUID 8000_0008 EAX 7:0); `leaking_bits` as in
    /// [`mmio::Format::new`].
    pub const fn new(physical_bits: u8, leaking_bits: Option<u8>) -> Self {
        let mmio = mmio::Format::new(Kind::Misconfiguration, physical_bits, leaking_bits);
        Self { absent: mmio::absent_bits(physical_bits), mmio }
    }
}

impl Format for Extended {
    /// Bits 2:0 and [`CLOSED`] clear.
    const BROKEN: u64 = 1 << 3;
    const FRAME_BITS: u32 = 52 - 12;

    /// Four levels, whatever part of the 48 bits is used: the processor walks them all.
    fn geometry(&self, gpa_bits: u8) -> Option<Geometry> {
        let whole = Geometry::new(Geometry::MAX_IPA_BITS, 1);
        if (Geometry::MIN_IPA_BITS..=Geometry::MAX_IPA_BITS).contains(&gpa_bits) { whole } else { None }
    }

    #[inline]
    fn decode(&self, raw: u64, level: u8) -> Entry {
        if raw == VACANT {
            return Entry::Vacant;
        }
        let closed = raw & (PRESENT | CLOSED) == CLOSED;
        // Neither present nor ours, or a misconfiguration.
        if raw & READ == 0 && !closed {
            let mmio = level == LEAF_LEVEL && raw & PRESENT != 0 && self.mmio_entry(raw).is_some();
            return if mmio { Entry::Vacant } else { Entry::Broken };
        }
        let pfn = Pfn::new((raw & ADDRESS) >> 12);
        if level < LEAF_LEVEL && raw & LARGE == 0 {
            return if closed { Entry::Broken } else { Entry::Table(pfn) };
        }
        let Some(size) = size_at(level) else { return Entry::Broken };
        let permissions = if closed {
            Permissions { read: false, write: raw & CLOSED_WRITE != 0, execute: raw & CLOSED_EXECUTE != 0 }
        } else {
            Permissions { read: true, write: raw & WRITE != 0, execute: raw & EXECUTE != 0 }
        };
        let memory = if raw & MEMORY_TYPE == WRITE_BACK { Memory::Normal } else { Memory::Device };
        Entry::Leaf(Leaf { pfn, size, permissions, memory, young: raw & ACCESSED != 0 })
    }

    #[inline]
    fn leaf(&self, leaf: &Leaf) -> u64 {
        let bit = |set: bool, bits: u64| if set { bits } else { 0 };
        let Permissions { read, write, execute } = leaf.permissions;
        let access = if read {
            READ | bit(write, WRITE) | bit(execute, EXECUTE)
        } else {
            CLOSED | bit(write, CLOSED_WRITE) | bit(execute, CLOSED_EXECUTE)
        };
        leaf.pfn.base().get() & ADDRESS
            | access
            | DIRTY
            | bit(leaf.size != PageSize::Size4K, LARGE)
            | bit(leaf.memory == Memory::Normal, WRITE_BACK | IGNORE_PAT)
            | bit(leaf.young, ACCESSED)
    }

    /// Open to everything: the leaf decides.
    #[inline]
    fn table(&self, frame: Pfn) -> u64 {
        frame.base().get() & ADDRESS | READ | WRITE | EXECUTE | ACCESSED
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

    /// SDM 29.3.3.1, EPT misconfigurations.
    fn is_malformed(&self, raw: u64, level: u8) -> bool {
        if raw & PRESENT == 0 {
            return false;
        }
        let leaf = level == LEAF_LEVEL || raw & LARGE != 0;
        let wrong = match size_at(level).filter(|_| leaf) {
            Some(size) => {
                let within = ((size.frames() << 12) - 1) & ADDRESS;
                raw & within != 0 || matches!((raw & MEMORY_TYPE) >> 3, 2 | 3 | 7)
            }
            None => leaf || raw & TABLE_RESERVED != 0,
        };
        wrong || raw & READ == 0 || raw & self.absent != 0
    }
}

/// EPTP: four levels, tables write-back, accessed and dirty flags on if `accessed_dirty` (SDM 25.6.11). `root` is the PML4's
/// frame.
#[inline]
pub const fn eptp(root: Pfn, accessed_dirty: bool) -> u64 {
    const TABLES_WRITE_BACK: u64 = 6;
    const FOUR_LEVELS: u64 = 3 << 3;
    root.base().get() & ADDRESS | (accessed_dirty as u64) << 6 | FOUR_LEVELS | TABLES_WRITE_BACK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pointer_is_the_manuals() {
        assert_eq!(eptp(Pfn::new(0x12345), false), 0x1234_501e);
        assert_eq!(eptp(Pfn::new(0x12345), true), 0x1234_505e);
    }

    #[test]
    fn no_word_is_a_misconfiguration() {
        for bits in 0..8u8 {
            let permissions = Permissions { read: bits & 1 != 0, write: bits & 2 != 0, execute: bits & 4 != 0 };
            for memory in [Memory::Normal, Memory::Device] {
                let leaf = Leaf { pfn: Pfn::new(7), size: PageSize::Size4K, permissions, memory, young: true };
                let raw = Extended::new(46, None).leaf(&leaf);
                assert!(raw & READ != 0 || raw & PRESENT == 0, "SDM 29.3.3.1: write or execute needs read");
                assert!([0, 1, 4, 5, 6].contains(&(raw >> 3 & 7)), "SDM 29.3.3.1: 2, 3 and 7 are reserved types");
            }
        }
    }
}
