//! What `entresol_table` asks of a format, for those of each maker and the one for both.

use entresol_addr::{Gfn, PageSize, Pfn};
use entresol_table::{Entry, Format, LEAF_LEVEL, Leaf, Memory, MmioEntry, Permissions, VACANT, level_of};

use crate::either::{Either, Maker};
use crate::ept::Extended;
use crate::npt::Nested;

/// For processors that have every address bit.
const NESTED: Nested = Nested::new(52, None);
const EXTENDED: Extended = Extended::new(52, None);

fn leaves() -> impl Iterator<Item = Leaf> {
    let frames = [0, 1, 0x8_0000, 0x123_4567, 0x55_5555_5555, 0xaa_aaaa_aaaa, (1 << 40) - 1];
    (0..1u32 << 5).flat_map(move |bits| {
        let bit = move |bit: u32| bits & 1 << bit != 0;
        frames.into_iter().flat_map(move |frame| {
            PageSize::ALL.into_iter().map(move |size| Leaf {
                pfn: Pfn::new(frame).align_down(size),
                size,
                permissions: Permissions { read: bit(0), write: bit(1), execute: bit(2) },
                memory: if bit(3) { Memory::Device } else { Memory::Normal },
                young: bit(4),
            })
        })
    })
}

fn decoding_undoes_encoding<F: Format>(format: F) {
    let mut seen = 0;
    for leaf in leaves() {
        let raw = format.leaf(&leaf);
        let level = level_of(leaf.size);
        assert_eq!(format.decode(raw, level), Entry::Leaf(leaf), "{raw:#x}");
        assert_eq!(format.decode(format.young(raw), level), Entry::Leaf(Leaf { young: true, ..leaf }));
        assert_ne!(raw & ((1 << F::MARKER_BITS) - 1), F::BROKEN);
        assert!(!format.is_malformed(raw, level), "{raw:#x}");
        seen += 1;
    }
    assert_eq!(seen, 32 * 7 * 3);
    for bit in 0..F::FRAME_BITS {
        let frame = Pfn::new(1 << bit);
        for level in 0..LEAF_LEVEL {
            assert_eq!(format.decode(format.table(frame), level), Entry::Table(frame));
            assert_ne!(format.table(frame) & ((1 << F::MARKER_BITS) - 1), F::BROKEN);
            assert!(!format.is_malformed(format.table(frame), level));
        }
    }
}

fn markers_are_invalid<F: Format>(format: F, present: u64) {
    for level in 0..=LEAF_LEVEL {
        assert_eq!(format.decode(VACANT, level), Entry::Vacant);
        for data in (F::MARKER_BITS..u64::BITS).map(|bit| 1 << bit).chain([0, u64::MAX << F::MARKER_BITS]) {
            assert_eq!((F::BROKEN | data) & present, 0, "the processor must see nothing");
            assert_eq!(format.decode(F::BROKEN | data, level), Entry::Broken);
        }
        for bit in 1..u64::BITS {
            assert!(level < LEAF_LEVEL || !matches!(format.decode(1 << bit, level), Entry::Table(_)));
        }
    }
}

#[test]
fn nested_tables_keep_their_promises() {
    decoding_undoes_encoding(NESTED);
    markers_are_invalid(NESTED, 1);
    assert_eq!(NESTED.decode(0x1000 | 0x81, 0), Entry::Broken, "a leaf of 512 GiB");
}

#[test]
fn extended_tables_keep_their_promises() {
    decoding_undoes_encoding(EXTENDED);
    markers_are_invalid(EXTENDED, 0b111);
    for misconfigured in [0b010, 0b100, 0b110] {
        assert_eq!(EXTENDED.decode(0x1000 | misconfigured, LEAF_LEVEL - 1), Entry::Broken);
    }
    assert_eq!(EXTENDED.decode(0x1000 | 0b010, LEAF_LEVEL), Entry::Broken);
    assert_eq!(EXTENDED.decode(0x1000 | 0b110, LEAF_LEVEL), Entry::Vacant, "an MMIO entry");
    assert_eq!(EXTENDED.decode(0x1000 | 0x87, 0), Entry::Broken, "a leaf of 512 GiB");
}

/// What a maker's own format, which knows what its processor reads, says of a word.
fn own(maker: Maker, raw: u64, level: u8) -> Entry {
    match maker {
        Maker::Amd => NESTED.decode(raw, level),
        Maker::Intel => EXTENDED.decode(raw, level),
    }
}

#[test]
fn words_for_either_mean_to_its_processor_what_they_say() {
    for (maker, present) in [(Maker::Amd, 1), (Maker::Intel, 0b111)] {
        let format = Either::new(maker, 52, None);
        decoding_undoes_encoding(format);
        markers_are_invalid(format, present);
        for leaf in leaves() {
            let (raw, level) = (format.leaf(&leaf), level_of(leaf.size));
            if leaf.permissions.read {
                assert_eq!(own(maker, raw, level), Entry::Leaf(leaf), "{maker:?} {raw:#x}");
            } else {
                assert_eq!(raw & present, 0, "{maker:?} {raw:#x}: the processor must see nothing");
            }
            let read_only = Leaf { permissions: leaf.permissions.without(Permissions::WRITE), ..leaf };
            assert_eq!(format.protected(raw, level), Some(format.leaf(&read_only)));
            let written = Leaf { permissions: leaf.permissions.union(Permissions::WRITE), young: true, ..leaf };
            assert_eq!(format.writable(raw, level), format.leaf(&written));
        }
        for level in 0..LEAF_LEVEL {
            let table = format.table(Pfn::new(0x8_1234));
            assert_eq!(own(maker, table, level), Entry::Table(Pfn::new(0x8_1234)));
            assert_eq!((format.protected(table, level), format.writable(table, level)), (None, table));
        }
        assert_eq!(format.decode(0x1000 | 0x81, 0), Entry::Broken, "a leaf of 512 GiB");
    }
}

#[test]
fn entries_without_memory_for_either_are_refused_by_its_processor() {
    for maker in [Maker::Amd, Maker::Intel] {
        let format = Either::new(maker, 40, None);
        for gfn in [0, 1, 0xf_ee00, (1 << 28) - 1] {
            for generation in [0, 1, 0x7_ffff] {
                let entry = MmioEntry { gfn: Gfn::new(gfn), generation };
                let raw = format.mmio(&entry).unwrap();
                assert_eq!((format.mmio_entry(raw), format.decode(raw, LEAF_LEVEL)), (Some(entry), Entry::Vacant));
                assert!(format.is_malformed(raw, LEAF_LEVEL), "{maker:?} {raw:#x}");
            }
        }
    }
    assert_eq!(Either::new(Maker::Amd, 52, None).generation_bits(), 0, "no address bit to reserve");
    assert_ne!(Either::new(Maker::Intel, 52, None).generation_bits(), 0);
}

#[test]
fn any_word_for_either_is_decoded() {
    for maker in [Maker::Amd, Maker::Intel] {
        let format = Either::new(maker, 46, None);
        for level in 0..=LEAF_LEVEL {
            for (low, high) in (0..1u64 << 12).flat_map(|low| [0, 1 << 51, 1 << 52, 1 << 63].map(|high| (low, high))) {
                let raw = low | high | 0x1234_5000;
                let seen = format.decode(raw, level);
                let table = matches!(seen, Entry::Table(_));
                assert!(!table || level < LEAF_LEVEL && own(maker, raw, level) == seen, "{maker:?} {raw:#x}");
                assert_eq!(
                    format.protected(raw, level).is_some(),
                    matches!(seen, Entry::Leaf(_)),
                    "{maker:?} {raw:#x}"
                );
            }
        }
    }
}

#[test]
fn what_the_processor_refuses_is_malformed() {
    let (nested, extended) = (Nested::new(40, None), Extended::new(40, None));
    for (raw, level, wrong) in [
        (0x1000 | 0x67, 3, false),
        (1 << 40 | 0x67, 3, true),
        (1 << 40 | 0x27, 1, true),
        (1 << 40 | 0x66, 3, false),
        (0x20_0000 | 0xe7, 2, false),
        (0x20_1000 | 0xe7, 2, false),
        (0x20_2000 | 0xe7, 2, true),
        (0x4020_0000 | 0xe7, 1, true),
        (0x1000 | 0xa7, 0, true),
    ] {
        assert_eq!(nested.is_malformed(raw, level), wrong, "{raw:#x} at level {level}");
    }
    for (raw, level, wrong) in [
        (0x1000 | 0x377, 3, false),
        (1 << 40 | 0x377, 3, true),
        (0x1000 | 0x376, 3, true),
        (0x1000 | 0x372, 3, true),
        (0x1000 | 0x370, 3, false),
        (0x1000 | 0x357, 3, true),
        (0x1000 | 0x107, 1, false),
        (0x1000 | 0x10f, 1, true),
        (0x20_0000 | 0x3f7, 2, false),
        (0x20_1000 | 0x3f7, 2, true),
        (0x1000 | 0x187, 0, true),
    ] {
        assert_eq!(extended.is_malformed(raw, level), wrong, "{raw:#x} at level {level}");
    }
}

#[test]
fn the_root_is_always_a_pml4() {
    for bits in 0..=64 {
        let shapes = [NESTED.geometry(bits), EXTENDED.geometry(bits)];
        for shape in shapes {
            assert_eq!(shape.map(|g| (g.root_level(), g.root_frames())), (32..=48).contains(&bits).then_some((0, 1)));
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
    // APM 5.4.1: D, A, U/S, R/W, P.
    assert_eq!(NESTED.leaf(&page), 0x4000_0000 | 0x67);
    // SDM 29.3.2: D, A, ignore PAT, type 6, X, W, R.
    assert_eq!(EXTENDED.leaf(&page), 0x4000_0000 | 0x377);
    let device = Leaf { permissions: Permissions::READ_WRITE, memory: Memory::Device, size: PageSize::Size2M, ..page };
    assert_eq!(NESTED.leaf(&device), 1 << 63 | 0x4000_0000 | 0xff);
    assert_eq!(EXTENDED.leaf(&device), 0x4000_0000 | 0x383);
    assert_eq!(NESTED.table(Pfn::new(0x8_1234)), 0x8123_4027);
    assert_eq!(EXTENDED.table(Pfn::new(0x8_1234)), 0x8123_4107);
}
