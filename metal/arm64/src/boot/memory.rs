//! How the machine's RAM is divided: the hypervisor's heap, and frames for guests and their tables.

pub use entresol_metal_common::memory::{MAX_FREE, Memory, NoRoomForHeap, pages_around, without};

use super::info::BootInfo;

/// Divides the RAM of `info` without the image, the bundle, the device tree and reserved ranges;
/// [`entresol_metal_common::memory::split`] says how.
///
/// # Errors
///
/// [`NoRoomForHeap`].
pub fn split(info: &BootInfo, heap: u64) -> Result<Memory, NoRoomForHeap> {
    let used = [info.image, info.dtb].into_iter().chain(info.bundle).chain(info.reserved.iter().copied());
    entresol_metal_common::memory::split(info.ram.iter().copied(), used, heap)
}
