//! The one host of this machine: frames, objects, VMIDs, grace periods.

use alloc::vec::Vec;

use entresol_addr::{Pfn, PfnRange};
use entresol_backing::{FrameMeta, FramePool, Objects};
use entresol_metal_arm64::Metal;
use entresol_mmu::Host;
use entresol_sync::Once;

use crate::vm::OutOfHeap;

/// Objects that may exist at once: memory and disks of the most VMs that a bundle may have, and room to spare.
const OBJECTS: usize = 2048;

static HOST: Once<Host<Metal>> = Once::new();

/// The host.
///
/// # Panics
///
/// Before [`init`].
#[inline]
pub fn get() -> &'static Host<Metal> {
    HOST.get().expect("the host is made before anything uses it")
}

/// Bytes of heap that [`init`] takes for each frame of memory.
pub const HEAP_PER_FRAME: u64 = size_of::<FrameMeta>() as u64;

/// Makes the host out of the free memory `ranges`, for `cpus` CPUs.
///
/// # Errors
///
/// [`OutOfHeap`]: the heap is smaller than what the frames' records need.
pub fn init(ranges: &[PfnRange], cpus: usize) -> Result<(), OutOfHeap> {
    let first = ranges.iter().map(|range| range.start().get()).min().unwrap_or(0);
    let end = ranges.iter().map(|range| range.end().get()).max().unwrap_or(0);
    let count = (end - first) as usize;
    let mut meta = Vec::new();
    meta.try_reserve_exact(count).map_err(|_| OutOfHeap)?;
    meta.resize_with(count, FrameMeta::new);
    let pool = FramePool::new(Pfn::new(first), meta.into_boxed_slice(), cpus).map_err(|_| OutOfHeap)?;
    for range in ranges {
        pool.add(*range).expect("free memory is listed once, and the pool describes all of it");
    }
    Metal::set_pool(ranges);
    let objects = Objects::with_capacity(OBJECTS).map_err(|_| OutOfHeap)?;
    let host = Host::new(Metal, pool, objects).map_err(|_| OutOfHeap)?;
    HOST.call_once(|| host);
    Ok(())
}
