//! Loads and stores by address: everything outside the image, which belongs to Rust.

use core::arch::asm;
use core::ops::Range;

unsafe extern "C" {
    static guest_start: u8;
    static guest_image_end: u8;
}

/// Where this image is.
pub fn image() -> Range<u64> {
    &raw const guest_start as u64..&raw const guest_image_end as u64
}

/// Refuses what Rust knows of.
fn outside(address: u64) -> u64 {
    let image = image();
    let end = address.wrapping_add(size_of::<u64>() as u64);
    assert!(end <= image.start || address >= image.end || end < address, "{address:#x} is inside the image");
    address
}

/// Loads with one instruction.
pub fn load64(address: u64) -> u64 {
    let address = outside(address);
    let value;
    // SAFETY: no Rust object is outside the image; what nobody answers for reads as ones, and what is not mapped is an exception.
    unsafe { asm!("mov {}, [{}]", out(reg) value, in(reg) address, options(nostack, preserves_flags)) };
    value
}

/// Stores with one instruction.
pub fn store64(address: u64, value: u64) {
    let address = outside(address);
    // SAFETY: as above.
    unsafe { asm!("mov [{}], {}", in(reg) address, in(reg) value, options(nostack, preserves_flags)) };
}
