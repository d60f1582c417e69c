//! How the machine's RAM is divided: the hypervisor's heap, and frames for guests and their tables.

pub use entresol_metal_common::memory::{Memory, NoRoomForHeap};

use super::machine::BootInfo;

/// Divides the RAM of `info` without the image and the bundle; [`entresol_metal_common::memory::split`] says how.
///
/// # Errors
///
/// [`NoRoomForHeap`].
pub fn split(info: &BootInfo, heap: u64) -> Result<Memory, NoRoomForHeap> {
    let used = [info.image].into_iter().chain(info.bundle);
    entresol_metal_common::memory::split(info.ram.iter().copied(), used, heap)
}
