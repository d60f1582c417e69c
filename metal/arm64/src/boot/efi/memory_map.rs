//! Which memory is ours when EFI firmware has ended.
//!
//! Purpose: the firmware's memory map, in whatever order and however fragmented, becomes few ranges of RAM. Pure, tested
//! on any host.
//!
//! Sources: UEFI 2.10, 7.2 (memory types and their use after ExitBootServices), 7.2.3 (GetMemoryMap,
//! EFI_MEMORY_DESCRIPTOR).
//!
//! Invariants: what is returned is sorted, disjoint, does not touch, and is covered by usable descriptors.

use core::mem::offset_of;

use arrayvec::ArrayVec;
use r_efi::efi::{
    BOOT_SERVICES_CODE, BOOT_SERVICES_DATA, CONVENTIONAL_MEMORY, LOADER_CODE, LOADER_DATA, MEMORY_SP, MEMORY_WB,
    MemoryDescriptor,
};

use crate::boot::{MAX_REGIONS, Region};

const EFI_PAGE_SHIFT: u32 = 12;

/// A memory map as the firmware wrote it: descriptors of `stride` bytes, of which the first are ours to know.
#[derive(Clone, Copy, Debug)]
pub struct MemoryMap<'a> {
    bytes: &'a [u8],
    stride: usize,
}

impl<'a> MemoryMap<'a> {
    /// The firmware states `stride`, which may be more than a descriptor's size as we know it. If it is less, the map is
    /// none, and nothing is usable.
    pub fn new(bytes: &'a [u8], stride: usize) -> Self {
        let whole = stride >= size_of::<MemoryDescriptor>();
        Self { bytes: if whole { bytes } else { &[] }, stride: stride.max(size_of::<MemoryDescriptor>()) }
    }

    /// RAM that nobody else uses after ExitBootServices. Of more pieces than there is room for, the largest are kept.
    pub fn usable(self) -> ArrayVec<Region, MAX_REGIONS> {
        let mut kept = ArrayVec::<Region, MAX_REGIONS>::new();
        let mut next = 0;
        while let Some(piece) = self.piece_from(next) {
            next = piece.end;
            if kept.try_push(piece).is_err() {
                let smallest = kept.iter().enumerate().min_by_key(|(_, piece)| piece.size());
                if let Some((index, _)) = smallest.filter(|(_, smallest)| smallest.size() < piece.size()) {
                    kept.remove(index);
                    kept.push(piece);
                }
            }
        }
        kept
    }

    /// The lowest usable range that starts at `from` or above, with all that adjoins it.
    fn piece_from(self, from: u64) -> Option<Region> {
        let mut piece = self.descriptors().filter(|region| region.start >= from).min_by_key(|region| region.start)?;
        let adjoining = |end: u64| {
            self.descriptors().filter(move |region| region.start <= end && region.end > end).map(|region| region.end)
        };
        while let Some(end) = adjoining(piece.end).max() {
            piece.end = end;
        }
        Some(piece)
    }

    fn descriptors(self) -> impl Iterator<Item = Region> {
        self.bytes.chunks_exact(self.stride).filter_map(usable)
    }
}

/// The range of a descriptor, if it is RAM, cacheable, not set aside for a purpose, and free.
fn usable(descriptor: &[u8]) -> Option<Region> {
    let word = |offset: usize| {
        let bytes = descriptor.get(offset..offset + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    let kind = word(offset_of!(MemoryDescriptor, r#type))? as u32;
    let attributes = word(offset_of!(MemoryDescriptor, attribute))?;
    let free =
        matches!(kind, LOADER_CODE | LOADER_DATA | BOOT_SERVICES_CODE | BOOT_SERVICES_DATA | CONVENTIONAL_MEMORY);
    if !free || attributes & MEMORY_WB == 0 || attributes & MEMORY_SP != 0 {
        return None;
    }
    let pages = word(offset_of!(MemoryDescriptor, number_of_pages))?;
    let size = pages.checked_mul(1 << EFI_PAGE_SHIFT).filter(|size| *size != 0)?;
    Region::sized(word(offset_of!(MemoryDescriptor, physical_start))?, size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use r_efi::efi::{ACPI_RECLAIM_MEMORY, MEMORY_MAPPED_IO, MEMORY_UC, RUNTIME_SERVICES_DATA};
    use std::vec::Vec;

    const STRIDE: usize = 48;

    fn map_of(descriptors: &[(u32, u64, u64, u64)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, start, pages, attributes) in descriptors {
            for word in [u64::from(*kind), *start, 0, *pages, *attributes, 0xdead] {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
        }
        bytes
    }

    fn pieces(descriptors: &[(u32, u64, u64, u64)]) -> Vec<(u64, u64)> {
        let bytes = map_of(descriptors);
        MemoryMap::new(&bytes, STRIDE).usable().iter().map(|piece| (piece.start, piece.end)).collect()
    }

    #[test]
    fn what_adjoins_is_one_piece_in_any_order() {
        let found = pieces(&[
            (CONVENTIONAL_MEMORY, 0x9000, 1, MEMORY_WB),
            (BOOT_SERVICES_CODE, 0x3000, 2, MEMORY_WB),
            (LOADER_DATA, 0x1000, 2, MEMORY_WB | MEMORY_UC),
            (BOOT_SERVICES_DATA, 0x5000, 1, MEMORY_WB),
            (LOADER_CODE, 0x6000, 1, MEMORY_WB),
        ]);
        assert_eq!(found, [(0x1000, 0x7000), (0x9000, 0xa000)]);
    }

    #[test]
    fn what_belongs_to_somebody_is_not_ours() {
        let found = pieces(&[
            (RUNTIME_SERVICES_DATA, 0x1000, 1, MEMORY_WB),
            (ACPI_RECLAIM_MEMORY, 0x2000, 1, MEMORY_WB),
            (MEMORY_MAPPED_IO, 0x3000, 1, MEMORY_WB),
            (CONVENTIONAL_MEMORY, 0x4000, 1, MEMORY_UC),
            (CONVENTIONAL_MEMORY, 0x5000, 1, MEMORY_WB | MEMORY_SP),
        ]);
        assert_eq!(found, []);
    }

    #[test]
    fn a_malformed_descriptor_is_no_memory() {
        assert_eq!(pieces(&[(CONVENTIONAL_MEMORY, 0x1000, 0, MEMORY_WB)]), []);
        assert_eq!(pieces(&[(CONVENTIONAL_MEMORY, 0x1000, u64::MAX, MEMORY_WB)]), []);
        assert_eq!(pieces(&[(CONVENTIONAL_MEMORY, u64::MAX - 0xfff, 1, MEMORY_WB)]), []);
        let whole = map_of(&[(CONVENTIONAL_MEMORY, 0x1000, 1, MEMORY_WB)]);
        assert!(MemoryMap::new(&whole[..STRIDE - 1], STRIDE).usable().is_empty());
        for stride in [0, 39] {
            assert!(MemoryMap::new(&whole, stride).usable().is_empty(), "descriptors of {stride} bytes");
        }
    }

    #[test]
    fn the_largest_pieces_are_kept() {
        let scattered: Vec<_> =
            (1..=30u64).map(|pages| (CONVENTIONAL_MEMORY, pages << 20, 31 - pages, MEMORY_WB)).collect();
        let kept: Vec<u64> = pieces(&scattered).iter().map(|(start, end)| (end - start) >> 12).collect();
        let expected: Vec<u64> = (1..=30u64).map(|pages| 31 - pages).take(MAX_REGIONS).collect();
        assert_eq!(kept, expected);
        let turned: Vec<_> = (1..=30u64).map(|pages| (CONVENTIONAL_MEMORY, pages << 20, pages, MEMORY_WB)).collect();
        let kept: Vec<u64> = pieces(&turned).iter().map(|(start, end)| (end - start) >> 12).collect();
        assert_eq!(kept, (31 - MAX_REGIONS as u64..=30).collect::<Vec<_>>(), "and they stay sorted");
    }

    proptest! {
        /// Page by page, against the descriptors: overlaps, gaps and order do not matter.
        #[test]
        fn a_page_is_in_a_piece_exactly_if_a_usable_descriptor_has_it(
            descriptors in prop::collection::vec((1u32..9, 0u64..40, 1u64..6), 0..14)
        ) {
            let written: Vec<_> =
                descriptors.iter().map(|(kind, page, pages)| (*kind, page << 12, *pages, MEMORY_WB)).collect();
            let found = pieces(&written);
            prop_assert!(found.windows(2).all(|pair| pair[0].1 < pair[1].0), "sorted, disjoint, apart: {found:?}");
            for page in 0..48u64 {
                let usable = |kind: u32| kind <= BOOT_SERVICES_DATA || kind == CONVENTIONAL_MEMORY;
                let expected = descriptors
                    .iter()
                    .any(|(kind, first, pages)| usable(*kind) && (*first..first + pages).contains(&page));
                let is_in = found.iter().any(|(start, end)| (*start..*end).contains(&(page << 12)));
                prop_assert_eq!(expected, is_in, "page {}", page);
            }
        }
    }
}
