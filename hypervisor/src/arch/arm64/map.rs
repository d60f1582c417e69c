//! Where things lie in a guest's address space: QEMU's `virt` machine ([`virt`]).

use core::iter;
use core::ops::Range;

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SHIFT, PAGE_SIZE};
use entresol_loader::virt;
use entresol_wire::config;

pub use virt::{FIRMWARE_BASE, FLASH_BASE, VIRTIO_BASE, VIRTIO_SIZE, VIRTIO_SLOTS};

/// Memory's first address.
pub const RAM: Gpa = Gpa::new(virt::RAM_BASE);
/// Bits of guest physical address: enough for the most memory that a machine may have, from 1 GiB.
pub const GPA_BITS: u8 = 40;
/// Slots that memory takes, from 0.
pub const RAM_SLOTS: u32 = 1;

// What the configuration was checked with is where things are.
const _: () = assert!(config::FIRMWARE_BASE == virt::FIRMWARE_BASE && config::FLASH_BASE == virt::FLASH_BASE);
const _: () = assert!(config::ROM_END == virt::GICD_BASE);
const _: () = assert!(virt::STOLEN_TIME_SIZE == PAGE_SIZE && RECORDS < RAM_FRAME, "the list rises");

const RAM_FRAME: u64 = virt::RAM_BASE >> PAGE_SHIFT;
/// The page with the records of stolen time.
const RECORDS: u64 = virt::STOLEN_TIME_BASE >> PAGE_SHIFT;

/// The parts of `bytes` bytes of memory: where each begins in memory, and its guest frames.
pub fn parts(bytes: u64) -> impl Iterator<Item = (u64, GfnRange)> {
    iter::once(GfnRange::new(Gfn::new(RAM_FRAME), bytes / PAGE_SIZE).map(|range| (0, range))).flatten()
}

/// The frame of memory at `gpa`.
pub fn frame_of(gpa: Gpa) -> Option<u64> {
    gpa.frame().get().checked_sub(RAM_FRAME)
}

/// Where frame `frame` of memory is.
pub fn gfn_of(frame: u64) -> Gfn {
    Gfn::new(RAM_FRAME + frame)
}

/// The guest frames of `count` frames of memory from `first` on.
pub fn shown(first: u64, count: u64) -> impl Iterator<Item = GfnRange> {
    GfnRange::new(gfn_of(first), count).into_iter()
}

/// Where a machine with `bytes` bytes of private memory has it, in guest frames: the page with the records of stolen time, and memory.
pub fn private_frames(bytes: u64) -> [Range<u64>; 2] {
    [RECORDS..RECORDS + 1, RAM_FRAME..RAM_FRAME + bytes / PAGE_SIZE]
}

/// The page that a guest shares beside its memory, if there is one.
pub const fn extra_page() -> Option<u64> {
    Some(RECORDS)
}
