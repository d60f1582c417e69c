//! The part of a VM's memory that its devices reach, where they do not reach all of it.
//!
//! Purpose: devices of a machine whose private memory they may not touch need memory that is shared from the start: rings, and
//! buffers that the guest copies through. The device tree says which, and that the devices' bus reaches nothing else.
//!
//! ```text
//! memory ends below 2 GiB + 128 MiB   the last 32 MiB: a restricted pool (Linux: CONFIG_DMA_RESTRICTED_POOL), which rings
//!                                     and buffers are taken from
//! larger                              the 128 MiB below 2 GiB: memory like any other, of which the last 32 MiB are Linux's
//!                                     default pool for rings. Its DMA zone then ends at 2 GiB, and the buffers that it copies
//!                                     through, 64 MiB made early at boot, lie right below the pool: no configuration is needed
//! ```
//!
//! The second shape relies on where Linux puts its buffers at boot: what lies outside the window is refused to devices, so that a
//! kernel which does otherwise finds its devices broken and loses nothing else.
//!
//! Invariants: the window is made of 2 MiB blocks, and lies inside memory, above kernel, RAM disk and tree ([`Window::below`]).

use entresol_addr::{Gpa, PAGE_SIZE};

use crate::{Ram, Region};

const MIB: u64 = 1 << 20;
/// Bytes of a restricted pool, and of the pool for rings.
const POOL: u64 = 32 * MIB;
/// Where Linux's DMA zone ends at the earliest in memory that starts at 1 GiB: it is cut at a power of two.
const ZONE_END: u64 = 1 << 31;
/// Bytes of the window below that.
const ZONE_WINDOW: u64 = POOL + 64 * MIB + ROOM;
/// For what Linux puts above its buffers before it makes them.
const ROOM: u64 = 32 * MIB;
/// Memory above the zone, so that nothing else is put at its end at boot.
const ABOVE_ZONE: u64 = 128 * MIB;

const _: () = assert!(POOL.is_multiple_of(PAGE_SIZE) && ZONE_END.is_multiple_of(POOL));

/// How a guest gets at the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// All of it is a restricted pool.
    Restricted,
    /// It is the end of the DMA zone.
    Zone,
}

/// What devices reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Where.
    pub region: Region,
    /// How the guest gets at it.
    pub shape: Shape,
}

impl Window {
    /// That of a machine with memory `ram`, which has 2 MiB blocks, and more than a pool.
    pub const fn of(ram: Ram) -> Self {
        let end = ram.base.get() + ram.size;
        let (end, size, shape) = if end < ZONE_END + ABOVE_ZONE {
            (end, POOL, Shape::Restricted)
        } else {
            (ZONE_END, ZONE_WINDOW, Shape::Zone)
        };
        Self { region: Region { start: Gpa::new(end - size), size }, shape }
    }

    /// The pool that the tree names.
    pub const fn pool(self) -> Region {
        Region { start: Gpa::new(self.region.end().get() - POOL), size: POOL }
    }

    /// The memory below it, where everything goes that a VM starts with.
    pub const fn below(self, ram: Ram) -> Ram {
        Ram { base: ram.base, size: self.region.start.get() - ram.base.get() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virt::RAM_BASE;

    #[test]
    fn windows_lie_inside_memory_and_leave_room_below() {
        for size in [128, 512, 1024, 1150, 1152, 1280, 4096].map(|mib| mib * MIB) {
            let ram = Ram { base: Gpa::new(RAM_BASE), size };
            let window = Window::of(ram);
            let (start, end) = (window.region.start.get(), window.region.end().get());
            assert!(start >= RAM_BASE + 96 * MIB && end <= RAM_BASE + size, "{size:#x}: {window:?}");
            assert_eq!(window.shape == Shape::Zone, size >= 1152 * MIB);
            assert_eq!(window.below(ram).size, start - RAM_BASE);
            assert!(start.is_multiple_of(2 * MIB) && window.pool().start >= window.region.start);
        }
    }
}
