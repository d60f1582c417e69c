//! How the machine's RAM is divided: the hypervisor's heap, and frames for guests and their tables.
//!
//! Purpose: RAM, minus what is already used (the image, the bundle, what the loader says of the machine, reserved ranges), is
//! cut into the heap of the global allocator and the ranges of the frame pool. Pure arithmetic, tested on any host.

use arrayvec::ArrayVec;
use entresol_addr::{PAGE_SIZE, Pfn, PfnRange};

/// The most ranges of RAM, and of memory that is reserved.
pub const MAX_REGIONS: usize = 16;

/// A range of physical addresses in bytes. It never wraps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl Region {
    /// `start .. start + size`, or `None` if that wraps.
    pub const fn sized(start: u64, size: u64) -> Option<Self> {
        match start.checked_add(size) {
            Some(end) => Some(Self { start, end }),
            None => None,
        }
    }

    /// Length in bytes.
    pub const fn size(self) -> u64 {
        self.end - self.start
    }

    /// Whether all of `other` lies inside.
    pub const fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Whether `address` lies inside.
    pub const fn contains(self, address: u64) -> bool {
        self.start <= address && address < self.end
    }
}

/// The most free ranges: each hole cuts one in two.
pub const MAX_FREE: usize = 2 * MAX_REGIONS + 4;

const BLOCK: u64 = 2 << 20;

/// RAM by use.
#[derive(Clone, Debug)]
pub struct Memory {
    /// For the global allocator.
    pub heap: Region,
    /// For guests and their tables: whole frames, largest range first.
    pub frames: ArrayVec<PfnRange, MAX_FREE>,
}

/// No free range of RAM is large enough for the heap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoomForHeap {
    /// Bytes that were asked for.
    pub wanted: u64,
    /// Bytes of the largest free range.
    pub largest: u64,
}

/// Divides `ram` without what is `used`. The heap comes from the smallest free range that holds `heap` bytes (rounded up to
/// 2 MiB), so that the large ones stay whole for blocks.
///
/// # Errors
///
/// [`NoRoomForHeap`].
///
/// # Panics
///
/// If there are more than [`MAX_REGIONS`] ranges of RAM, or so many are used.
pub fn split(
    ram: impl Iterator<Item = Region>,
    used: impl Iterator<Item = Region>,
    heap: u64,
) -> Result<Memory, NoRoomForHeap> {
    let free: ArrayVec<Region, MAX_FREE> = ram.collect();
    let mut free = used.fold(free, |free, hole| without(&free, pages_around(hole)));
    let largest = free.iter().map(|region| region.size()).max().unwrap_or(0);
    let no_room = NoRoomForHeap { wanted: heap, largest };
    let heap = heap.checked_next_multiple_of(BLOCK).ok_or(no_room)?;
    let home = free.iter_mut().filter(|region| region.size() >= heap).min_by_key(|region| region.size());
    let home = home.ok_or(no_room)?;
    let heap = Region { start: home.start, end: home.start + heap };
    home.start = heap.end;
    let mut frames: ArrayVec<PfnRange, MAX_FREE> = free.iter().filter_map(|region| whole_frames(*region)).collect();
    frames.sort_unstable_by_key(|range| core::cmp::Reverse(range.count()));
    Ok(Memory { heap, frames })
}

/// `regions` without `hole`. There is room: no more holes are cut than `MAX_FREE - MAX_REGIONS`.
pub fn without<const N: usize>(regions: &ArrayVec<Region, N>, hole: Region) -> ArrayVec<Region, N> {
    let parts = regions.iter().flat_map(|region| {
        let below = Region { start: region.start, end: region.end.min(hole.start) };
        let above = Region { start: region.start.max(hole.end), end: region.end };
        [below, above].into_iter().filter(|part| part.start < part.end)
    });
    parts.collect()
}

/// The whole pages that touch `region`.
pub const fn pages_around(region: Region) -> Region {
    let end = match region.end.checked_next_multiple_of(PAGE_SIZE) {
        Some(end) => end,
        None => !(PAGE_SIZE - 1),
    };
    Region { start: region.start & !(PAGE_SIZE - 1), end }
}

fn whole_frames(region: Region) -> Option<PfnRange> {
    let first = region.start.div_ceil(PAGE_SIZE);
    let count = (region.end / PAGE_SIZE).checked_sub(first).filter(|count| *count != 0)?;
    PfnRange::new(Pfn::new(first), count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn region(start: u64, end: u64) -> Region {
        Region { start, end }
    }

    #[test]
    fn a_hole_leaves_what_is_beside_it() {
        for (hole, left) in [
            (region(20, 30), std::vec![region(10, 20), region(30, 40)]),
            (region(0, 30), std::vec![region(30, 40)]),
            (region(30, 90), std::vec![region(10, 30)]),
            (region(0, 90), std::vec![]),
            (region(40, 90), std::vec![region(10, 40)]),
        ] {
            let mut whole = ArrayVec::<Region, 4>::new();
            whole.push(region(10, 40));
            assert_eq!(without(&whole, hole).into_iter().collect::<Vec<_>>(), left, "{hole:?}");
        }
    }

    #[test]
    fn pages_around_a_byte_are_one() {
        assert_eq!(pages_around(region(0x1fff, 0x2000)), region(0x1000, 0x2000));
        assert_eq!(pages_around(region(0x1fff, 0x2001)), region(0x1000, 0x3000));
        assert_eq!(pages_around(region(u64::MAX - 1, u64::MAX)).end, !0xfff);
    }
}
