//! How an x86-64 guest's memory lies, and the map that says so (ACPI 6.5, 15: system address map).
//!
//! Invariants: entries are in ascending order and do not overlap; usable ones lie in memory.

use arrayvec::ArrayVec;
use entresol_addr::{Gpa, PageSize};

use super::map;
use crate::{Invalid, Region};

/// Ranges that the map has at most.
pub const MAX_RANGES: usize = 4;
/// Least memory: the area below 1 MiB, and something to run in.
const LEAST: u64 = 2 << 20;
/// Bits of physical address that everything placed must fit.
const MOST: u64 = 1 << 46;

/// What a range of guest physical addresses is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Memory for the kernel.
    Usable = 1,
    /// Nothing that the kernel may use.
    Reserved = 2,
}

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Where.
    pub region: Region,
    /// What.
    pub kind: Kind,
}

/// Where a guest's memory lies: the slots that the VM's owner makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// From address 0.
    pub low: Region,
    /// From 4 GiB, if not all fits below.
    pub high: Option<Region>,
}

const fn region(start: u64, size: u64) -> Region {
    Region { start: Gpa::new(start), size }
}

impl Memory {
    /// The memory of a guest that has `size` bytes.
    ///
    /// # Errors
    ///
    /// A size that is no multiple of 2 MiB, zero, or more than 64 TiB.
    pub fn of(size: u64) -> Result<Self, Invalid> {
        if !(LEAST..=MOST).contains(&size) || !size.is_multiple_of(PageSize::Size2M.bytes()) {
            let rule = "a multiple of 2 MiB, from 2 MiB to 64 TiB";
            return Err(Invalid { field: "memory", value: size, rule });
        }
        let low = size.min(map::LOW_END);
        let high = (size > low).then(|| region(map::HIGH_BASE, size - low));
        Ok(Self { low: region(0, low), high })
    }

    /// The map that the kernel is given.
    pub fn ranges(&self) -> ArrayVec<Range, MAX_RANGES> {
        let range = |start: u64, end: u64, kind| Range { region: region(start, end - start), kind };
        let mut ranges = ArrayVec::new();
        ranges.push(range(0, map::CONVENTIONAL_END, Kind::Usable));
        ranges.push(range(map::CONVENTIONAL_END, map::EXTENDED_BASE, Kind::Reserved));
        ranges.push(range(map::EXTENDED_BASE, self.low.size, Kind::Usable));
        if let Some(high) = self.high {
            ranges.push(Range { region: high, kind: Kind::Usable });
        }
        ranges
    }
}
