//! The hypervisor's own heap: for what is made when a virtual machine is made. Nothing that a guest drives allocates here.

use core::ptr::NonNull;

use crate::arch::boot::Region;
use entresol_addr::{PAGE_SIZE, PfnRange};
use talc::TalcLock;
use talc::source::Manual;

#[global_allocator]
static HEAP: TalcLock<spin::Mutex<()>, Manual> = TalcLock::new(Manual);

/// Bytes of heap for a machine with `frames` frames of memory: a record for each, and 48 MiB for everything else.
pub const fn size(frames: u64) -> u64 {
    frames * crate::host::HEAP_PER_FRAME + (48 << 20)
}

/// Bytes that nothing was made of.
pub fn free() -> u64 {
    HEAP.lock().counters().available_bytes as u64
}

/// Gives `region` to the allocator.
///
/// # Panics
///
/// If it is too small to hold the allocator's own records.
///
/// # Safety
///
/// The region is RAM that nobody else uses, now or later, mapped readable and writable.
pub unsafe fn init(region: Region) {
    // SAFETY: as the caller promises.
    let end: Option<NonNull<u8>> = unsafe { HEAP.lock().claim(region.start as *mut u8, region.size() as usize) };
    assert!(end.is_some(), "a heap of {} bytes is too small", region.size());
}

/// Gives `frames` to the allocator as well; a range too small for it is left unused.
///
/// # Safety
///
/// As [`init`].
pub unsafe fn extend(frames: PfnRange) {
    let (start, size) = (frames.start().base().get(), frames.count() * PAGE_SIZE);
    // SAFETY: as the caller promises.
    if unsafe { HEAP.lock().claim(start as *mut u8, size as usize) }.is_none() {
        log::debug!("{size} bytes at {start:#x} are too few for the heap");
    }
}
