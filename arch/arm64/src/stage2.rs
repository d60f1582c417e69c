//! Second-stage descriptors of VMSAv8-64 with the 4 KiB granule, and the registers that point at them.
//!
//! Purpose: the bits that `entresol_table` leaves to the architecture (Arm DDI 0487, D8.3 descriptor formats, D8.4
//! permissions, D8.6 memory attributes), and the values of VTCR_EL2 and VTTBR_EL2 (D24.2) that make the hardware walk
//! the same tree.
//!
//! | bits | leaf | value |
//! |---|---|---|
//! | 0 | valid | 1 |
//! | 1 | table at levels 0–2, page at level 3; 0 is a block | |
//! | 5:2 | MemAttr | by FWB, below |
//! | 7:6 | S2AP: 6 reads, 7 writes | |
//! | 9:8 | SH | inner shareable for memory |
//! | 10 | AF, the access flag | |
//! | 47:12 | output address | |
//! | 54:53 | XN | 0b00 executable, 0b10 not, at EL1 and EL0 |
//!
//! A descriptor with bit 0 clear is invalid and the hardware ignores all its other bits (D8.3.1): that is where the
//! markers of `entresol_table` live.
//!
//! Invariants: INV-1 leans on the memory attributes: with FWB, whatever the guest says, memory is write-back, and no
//! clean to the point of coherency is owed; without it, the guest's own attributes combine with ours.
//!
//! Known holes: no LPA2, no 52-bit output addresses, no hardware-managed access flag or dirty state, no Realm or Secure
//! state.

use entresol_addr::Pfn;
use entresol_table::{Entry, Format, Geometry, LEAF_LEVEL, Leaf, Memory, Permissions, VACANT, Vmid, size_at};

/// Valid (D8.3.1).
const VALID: u64 = 1 << 0;
/// With [`VALID`]: a table at levels 0–2, a page at level 3.
const TABLE_OR_PAGE: u64 = 1 << 1;
const TYPE: u64 = VALID | TABLE_OR_PAGE;
/// MemAttr without FWB: bits 3:2 outer, 1:0 inner; both write-back (D8.6, stage 2 memory type, FWB disabled).
const NORMAL: u64 = 0b1111 << 2;
/// MemAttr without FWB: Device-nGnRE.
const DEVICE: u64 = 0b0001 << 2;
/// MemAttr with FWB: Normal write-back, whatever stage 1 says (D8.6, FWB enabled).
const FWB_NORMAL: u64 = 0b0110 << 2;
/// MemAttr with FWB: Device-nGnRE.
const FWB_DEVICE: u64 = 0b0001 << 2;
const MEM_ATTR: u64 = 0b1111 << 2;
/// S2AP: reads allowed (D8.4).
const READ: u64 = 1 << 6;
/// S2AP: writes allowed.
const WRITE: u64 = 1 << 7;
/// SH: inner shareable.
const INNER_SHAREABLE: u64 = 0b11 << 8;
/// The access flag.
const AF: u64 = 1 << 10;
/// Output address, or the next table's.
const ADDRESS: u64 = (1 << 48) - (1 << 12);
/// XN: not executable at EL1 nor EL0, with and without FEAT_XNX.
const XN: u64 = 0b10 << 53;
const XN_FIELD: u64 = 0b11 << 53;

// No two fields share a bit.
const _: () = {
    let fields = [TYPE, MEM_ATTR, READ, WRITE, INNER_SHAREABLE, AF, ADDRESS, XN_FIELD];
    let (mut index, mut seen) = (0, 0u64);
    while index < fields.len() {
        assert!(seen & fields[index] == 0);
        seen |= fields[index];
        index += 1;
    }
    assert!(NORMAL & !MEM_ATTR == 0 && FWB_NORMAL & !MEM_ATTR == 0 && NORMAL != DEVICE && FWB_NORMAL != FWB_DEVICE);
    assert!(XN & !XN_FIELD == 0);
};

/// The descriptor format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage2 {
    /// Whether FEAT_S2FWB is implemented and HCR_EL2.FWB is set: it changes how MemAttr is read.
    pub fwb: bool,
}

impl Stage2 {
    #[inline]
    const fn mem_attr(self, memory: Memory) -> u64 {
        match (memory, self.fwb) {
            (Memory::Normal, true) => FWB_NORMAL,
            (Memory::Device, true) => FWB_DEVICE,
            (Memory::Normal, false) => NORMAL,
            (Memory::Device, false) => DEVICE,
        }
    }
}

impl Format for Stage2 {
    /// Bit 0 clear, so invalid; bit 1 tells it from a vacant word in a dump.
    const BROKEN: u64 = 0b10;
    const FRAME_BITS: u32 = 48 - 12;

    /// Up to 16 concatenated root frames (D8.2, concatenated translation tables): a root at level 2 for 32–34 bits, at
    /// level 1 for 35–43, at level 0 for 44–48.
    fn geometry(&self, ipa_bits: u8) -> Option<Geometry> {
        Geometry::new(ipa_bits, 16)
    }

    #[inline]
    fn decode(&self, raw: u64, level: u8) -> Entry {
        let pfn = Pfn::new((raw & ADDRESS) >> 12);
        if raw & TYPE == TYPE && level < LEAF_LEVEL {
            return Entry::Table(pfn);
        }
        if raw == VACANT {
            return Entry::Vacant;
        }
        // A block at level 3 and at level 0 is reserved, which is invalid (D8.3.1).
        let leaf = if level == LEAF_LEVEL { TYPE } else { VALID };
        let Some(size) = size_at(level).filter(|_| raw & TYPE == leaf) else {
            return Entry::Broken;
        };
        Entry::Leaf(Leaf {
            pfn,
            size,
            permissions: Permissions { read: raw & READ != 0, write: raw & WRITE != 0, execute: raw & XN_FIELD == 0 },
            memory: if raw & MEM_ATTR == self.mem_attr(Memory::Normal) { Memory::Normal } else { Memory::Device },
            young: raw & AF != 0,
        })
    }

    #[inline]
    fn leaf(&self, leaf: &Leaf) -> u64 {
        let bit = |set: bool, bits: u64| if set { bits } else { 0 };
        let permissions = leaf.permissions;
        leaf.pfn.base().get() & ADDRESS
            | VALID
            | bit(leaf.size == entresol_addr::PageSize::Size4K, TABLE_OR_PAGE)
            | self.mem_attr(leaf.memory)
            | bit(leaf.memory == Memory::Normal, INNER_SHAREABLE)
            | bit(permissions.read, READ)
            | bit(permissions.write, WRITE)
            | bit(!permissions.execute, XN)
            | bit(leaf.young, AF)
    }

    #[inline]
    fn table(&self, frame: Pfn) -> u64 {
        frame.base().get() & ADDRESS | TYPE
    }

    #[inline]
    fn young(&self, raw: u64) -> u64 {
        raw | AF
    }

    #[inline]
    fn protected(&self, raw: u64, level: u8) -> Option<u64> {
        let leaf = if level == LEAF_LEVEL { TYPE } else { VALID };
        (raw & TYPE == leaf && size_at(level).is_some()).then_some(raw & !WRITE)
    }

    #[inline]
    fn writable(&self, raw: u64, _level: u8) -> u64 {
        raw | WRITE | AF
    }
}

/// Why a geometry cannot be used on a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VtcrError {
    /// The second stage may not translate more bits than a physical address has (D8.2, implemented PA size).
    IpaTooLarge {
        /// Bits asked for.
        ipa_bits: u8,
        /// Bits of a physical address (ID_AA64MMFR0_EL1.PARange).
        physical_bits: u8,
    },
}

/// VTCR_EL2 for tables of this shape: 4 KiB granule, table walks inner shareable and write-back, output addresses of
/// at most 48 bits, access flag and dirty state managed by software.
///
/// `physical_bits` is what ID_AA64MMFR0_EL1.PARange says (32–52); `vmid16` whether VMIDs have 16 bits.
///
/// # Errors
///
/// [`VtcrError`].
pub const fn vtcr(geometry: Geometry, physical_bits: u8, vmid16: bool) -> Result<u64, VtcrError> {
    let ipa_bits = geometry.ipa_bits();
    if ipa_bits > physical_bits {
        return Err(VtcrError::IpaTooLarge { ipa_bits, physical_bits });
    }
    // SL0 for the 4 KiB granule: 0b00 level 2, 0b01 level 1, 0b10 level 0.
    let sl0 = 2 - geometry.root_level() as u64;
    let ps = match physical_bits {
        0..36 => 0b000,
        36..40 => 0b001,
        40..42 => 0b010,
        42..44 => 0b011,
        44..48 => 0b100,
        _ => 0b101,
    };
    const IRGN0_WRITE_BACK: u64 = 0b01 << 8;
    const ORGN0_WRITE_BACK: u64 = 0b01 << 10;
    const SH0_INNER: u64 = 0b11 << 12;
    const TG0_4K: u64 = 0b00 << 14;
    const RES1: u64 = 1 << 31;
    let walks = IRGN0_WRITE_BACK | ORGN0_WRITE_BACK | SH0_INNER | TG0_4K;
    let t0sz = 64 - ipa_bits as u64;
    Ok(RES1 | (vmid16 as u64) << 19 | ps << 16 | walks | sl0 << 6 | t0sz)
}

/// VTTBR_EL2: the root's address and the VMID. Not common (CnP clear): CPUs do not share TLB entries.
///
/// `root` is the first frame of a table's root, aligned as `Table::new` demands.
#[inline]
pub const fn vttbr(root: Pfn, vmid: Vmid) -> u64 {
    root.base().get() & ADDRESS | (vmid.get() as u64) << 48
}

#[cfg(test)]
mod tests {
    use super::*;
    use entresol_addr::PageSize;
    use entresol_table::level_of;

    fn leaves() -> impl Iterator<Item = (Stage2, Leaf)> {
        let frames = [0, 1, 0x8_0000, 0x123_4567, 0x5_5555_5555, 0xa_aaaa_aaaa, (1 << 36) - 1];
        let bits = (0..1 << 6).map(|bits: u32| move |bit: u32| bits & 1 << bit != 0);
        bits.flat_map(move |bit| {
            frames.into_iter().flat_map(move |frame| {
                PageSize::ALL.into_iter().map(move |size| {
                    let permissions = Permissions { read: bit(0), write: bit(1), execute: bit(2) };
                    let memory = if bit(3) { Memory::Device } else { Memory::Normal };
                    let pfn = Pfn::new(frame).align_down(size);
                    (Stage2 { fwb: bit(5) }, Leaf { pfn, size, permissions, memory, young: bit(4) })
                })
            })
        })
    }

    #[test]
    fn decoding_undoes_encoding() {
        let mut seen = 0;
        for (format, leaf) in leaves() {
            let raw = format.leaf(&leaf);
            assert_eq!(format.decode(raw, level_of(leaf.size)), Entry::Leaf(leaf), "{raw:#x}");
            assert_eq!(
                format.decode(format.young(raw), level_of(leaf.size)),
                Entry::Leaf(Leaf { young: true, ..leaf })
            );
            let (level, write) = (level_of(leaf.size), Permissions::WRITE);
            let with = |permissions, young| Leaf { permissions, young, ..leaf };
            assert_eq!(format.writable(raw, level), format.leaf(&with(leaf.permissions.union(write), true)));
            let protected = format.leaf(&with(leaf.permissions.without(write), leaf.young));
            assert_eq!(format.protected(raw, level), Some(protected));
            seen += 1;
        }
        assert_eq!(seen, 64 * 7 * 3);
        for bit in 0..36 {
            let frame = Pfn::new(1 << bit);
            for level in 0..LEAF_LEVEL {
                for fwb in [false, true] {
                    let format = Stage2 { fwb };
                    assert_eq!(format.decode(format.table(frame), level), Entry::Table(frame));
                }
            }
        }
    }

    #[test]
    fn words_are_the_manuals() {
        let page = Leaf {
            pfn: Pfn::new(0x4_0000),
            size: PageSize::Size4K,
            permissions: Permissions::ALL,
            memory: Memory::Normal,
            young: true,
        };
        // Page, AF, inner shareable, read and write, executable.
        assert_eq!(Stage2 { fwb: false }.leaf(&page), 0x4000_0000 | 0x7ff);
        assert_eq!(Stage2 { fwb: true }.leaf(&page), 0x4000_0000 | 0x7db);
        let device = Leaf { permissions: Permissions::READ_WRITE, memory: Memory::Device, ..page };
        for fwb in [false, true] {
            assert_eq!(Stage2 { fwb }.leaf(&device), 1 << 54 | 0x4000_0000 | 0x4c7);
        }
        let block = Leaf { size: PageSize::Size2M, ..page };
        assert_eq!(Stage2 { fwb: false }.leaf(&block), 0x4000_0000 | 0x7fd);
        assert_eq!(Stage2 { fwb: false }.table(Pfn::new(0x8_1234)), 0x8123_4003);
    }

    #[test]
    fn every_word_with_bit_0_clear_is_invalid() {
        let format = Stage2 { fwb: true };
        for level in 0..=LEAF_LEVEL {
            assert_eq!(format.decode(VACANT, level), Entry::Vacant);
            for bit in 1..64 {
                assert_eq!(format.decode(1 << bit, level), Entry::Broken);
                assert_eq!(format.decode(Stage2::BROKEN | u64::MAX << Stage2::MARKER_BITS, level), Entry::Broken);
            }
        }
        // Reserved: a block at level 3, a block at level 0.
        assert_eq!(format.decode(0x4000_07fd, LEAF_LEVEL), Entry::Broken);
        assert_eq!(format.decode(0x4000_07fd, 0), Entry::Broken);
    }

    #[test]
    fn no_marker_is_a_leaf_or_a_table() {
        let low = (1 << Stage2::MARKER_BITS) - 1;
        for (format, leaf) in leaves() {
            assert_ne!(format.leaf(&leaf) & low, Stage2::BROKEN);
            assert_ne!(format.table(leaf.pfn) & low, Stage2::BROKEN);
        }
    }

    #[test]
    fn vtcr_names_the_shape() {
        let field = |value: u64, low: u32, bits: u32| value >> low & ((1 << bits) - 1);
        for ipa_bits in 32..=48 {
            let geometry = Stage2 { fwb: true }.geometry(ipa_bits).unwrap();
            let value = vtcr(geometry, 48, true).unwrap();
            assert_eq!(field(value, 0, 6), 64 - ipa_bits as u64, "T0SZ");
            // The hardware's own rule (D8.2, S2InconsistentSL): the start level reaches from one entry to 16 tables.
            let start = 2 - field(value, 6, 2) as u8;
            let least = 9 * (3 - start) + 12 + 1;
            assert!((least..=least + 8 + 4).contains(&ipa_bits), "SL0 for {ipa_bits} bits");
            assert_eq!(start, geometry.root_level());
            assert_eq!(field(value, 8, 8), 0b00_11_01_01, "TG0, SH0, ORGN0, IRGN0");
            assert_eq!(field(value, 16, 3), 0b101, "PS");
            assert_eq!(value >> 19, 1 << 12 | 1, "VS and the reserved one");
        }
        let geometry = Stage2 { fwb: true }.geometry(40).unwrap();
        assert_eq!(vtcr(geometry, 44, false).unwrap(), 0x8004_3558);
        assert_eq!(vtcr(geometry, 52, false).unwrap() >> 16 & 7, 0b101);
        assert_eq!(vtcr(geometry, 39, false), Err(VtcrError::IpaTooLarge { ipa_bits: 40, physical_bits: 39 }));
    }

    #[test]
    fn vttbr_holds_root_and_vmid() {
        assert_eq!(vttbr(Pfn::new(0x4_8010), Vmid::new(0xabcd)), 0xabcd_0000_4801_0000);
    }
}
