//! Where things lie in a guest's address space ([`entresol_loader::x86::map`]).

use core::iter;
use core::ops::Range;

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SHIFT, PAGE_SIZE};
use entresol_loader::x86::map;

pub use map::{VIRTIO_BASE, VIRTIO_SIZE, VIRTIO_SLOTS};

/// Memory's first address.
pub const RAM: Gpa = Gpa::new(0);
/// Bits of guest physical address: enough for the most memory that a machine may have.
pub const GPA_BITS: u8 = 40;
/// Slots that memory takes, from 0: below the devices, and behind them.
pub const RAM_SLOTS: u32 = 2;
/// The page with the machine's generation, behind the transports.
pub const GENERATION_BASE: u64 = VIRTIO_BASE + VIRTIO_SIZE * VIRTIO_SLOTS as u64;
/// Where a PC has firmware and flash; no configuration has either yet.
pub const FIRMWARE_BASE: u64 = 0xffe0_0000;
/// As [`FIRMWARE_BASE`].
pub const FLASH_BASE: u64 = 0xff00_0000;

/// Frames of memory below the devices, at most.
const LOW: u64 = map::LOW_END >> PAGE_SHIFT;
/// Where memory goes on behind them.
const HIGH: u64 = map::HIGH_BASE >> PAGE_SHIFT;

/// The parts of `bytes` bytes of memory: where each begins in memory, and its guest frames.
pub fn parts(bytes: u64) -> impl Iterator<Item = (u64, GfnRange)> {
    let frames = bytes / PAGE_SIZE;
    let high = frames.checked_sub(LOW).filter(|count| *count != 0);
    let low = GfnRange::new(Gfn::new(0), frames.min(LOW)).map(|range| (0, range));
    let high = high.and_then(|count| Some((map::LOW_END, GfnRange::new(Gfn::new(HIGH), count)?)));
    low.into_iter().chain(high)
}

/// The frame of memory at `gpa`.
pub fn frame_of(gpa: Gpa) -> Option<u64> {
    let gfn = gpa.frame().get();
    if gfn < LOW { Some(gfn) } else { gfn.checked_sub(HIGH).map(|frame| frame + LOW) }
}

/// The guest frames of `count` frames of memory from `first` on.
pub fn shown(first: u64, count: u64) -> impl Iterator<Item = GfnRange> {
    let below = count.min(LOW.saturating_sub(first));
    let low = GfnRange::new(Gfn::new(first), below);
    let above = HIGH + (first + below).saturating_sub(LOW);
    let high = GfnRange::new(Gfn::new(above), count - below);
    iter::once(low).chain(iter::once(high)).flatten().filter(|range| !range.is_empty())
}

/// Where a machine with `bytes` bytes of private memory has it, in guest frames.
pub fn private_frames(bytes: u64) -> [Range<u64>; 2] {
    let frames = bytes / PAGE_SIZE;
    [0..frames.min(LOW), HIGH..HIGH + frames.saturating_sub(LOW)]
}

/// The page that a guest shares beside its memory, if there is one.
pub const fn extra_page() -> Option<u64> {
    None
}
