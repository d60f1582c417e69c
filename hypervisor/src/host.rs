//! The one host of this machine: frames, objects, VMIDs, grace periods.

use alloc::vec::Vec;

use crate::arch::{Metal, own};
use entresol_addr::{Pfn, PfnRange};
use entresol_backing::{FrameMeta, FramePool, Objects};
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

/// Takes memory from the largest of `ranges`, which comes first, for the tables that let frames leave the own mapping.
/// A machine so small that it would be felt goes without: it has no private guests.
pub fn set_own_tables_aside(ranges: &mut [PfnRange], cpus: usize) {
    match own::set_aside(ranges, cpus) {
        // SAFETY: free memory, mapped as all RAM is, that is in no range any more.
        Ok(aside) => unsafe { own::init(aside) },
        Err(wanted) => log::warn!("{wanted} frames for tables of the own mapping are too many: no private guests"),
    }
}

/// Makes the host out of the free memory `ranges`, for `cpus` CPUs.
///
/// # Errors
///
/// [`OutOfHeap`]: the heap is smaller than what the frames' records need.
pub fn init(ranges: &[PfnRange], cpus: usize) -> Result<(), OutOfHeap> {
    let (first, count) = own::span(ranges).map_or((Pfn::new(0), 0), |span| (span.start(), span.count() as usize));
    let mut meta = Vec::new();
    meta.try_reserve_exact(count).map_err(|_| OutOfHeap)?;
    meta.resize_with(count, FrameMeta::new);
    let pool = FramePool::new(first, meta.into_boxed_slice(), cpus).map_err(|_| OutOfHeap)?;
    for range in ranges {
        pool.add(*range).expect("free memory is listed once, and the pool describes all of it");
    }
    Metal::set_pool(ranges);
    let objects = Objects::with_capacity(OBJECTS).map_err(|_| OutOfHeap)?;
    let host = Host::new(Metal, pool, objects).map_err(|_| OutOfHeap)?;
    HOST.call_once(|| host);
    Ok(())
}
