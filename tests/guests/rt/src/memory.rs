//! Loads, stores and cache maintenance by address: everything outside the image.
//!
//! Accesses are single instructions of the named width, so that what a hypervisor sees is what the name says.

use core::arch::asm;
use core::ops::Range;

macro_rules! address_of {
    ($symbol:ident) => {{
        let address: u64;
        // SAFETY: computes an address relative to the program counter.
        unsafe {
            core::arch::asm!(concat!("adrp {0}, ", stringify!($symbol)), concat!("add {0}, {0}, :lo12:", stringify!($symbol)),
                out(reg) address, options(nomem, nostack, pure))
        };
        address
    }};
}
pub(crate) use address_of;

/// Where this image is.
pub fn image() -> Range<u64> {
    address_of!(rt_image_start)..address_of!(rt_image_end)
}

/// Refuses what Rust knows of.
fn outside(address: u64, size: u64) -> u64 {
    let image = image();
    let end = address.wrapping_add(size);
    assert!(end <= image.start || address >= image.end || end < address, "{address:#x} is inside the image");
    address
}

macro_rules! access {
    ($load:ident, $store:ident, $type:ty, $ldr:literal, $str:literal, $modifier:literal) => {
        /// Loads with one instruction.
        pub fn $load(address: u64) -> $type {
            let address = outside(address, size_of::<$type>() as u64);
            let value: $type;
            // SAFETY: no Rust object is outside the image; an address without memory behind it is an exception.
            unsafe {
                asm!(concat!($ldr, " {value:", $modifier, "}, [{address}]"), value = out(reg) value,
                    address = in(reg) address, options(nostack))
            };
            value
        }

        /// Stores with one instruction.
        pub fn $store(address: u64, value: $type) {
            let address = outside(address, size_of::<$type>() as u64);
            // SAFETY: no Rust object is outside the image; an address without memory behind it is an exception.
            unsafe {
                asm!(concat!($str, " {value:", $modifier, "}, [{address}]"), value = in(reg) value,
                    address = in(reg) address, options(nostack))
            };
        }
    };
}

/// Where a pointer has its tag (Arm DDI 0487 D10.3).
const TAG: u32 = 56;

/// The allocation tag of the granule at `address`, on a CPU with FEAT_MTE2.
pub fn load_tag(address: u64) -> u8 {
    let address = outside(address, 1);
    let mut tagged = 0u64;
    // SAFETY: reads a tag, of no Rust object.
    unsafe {
        asm!(".arch_extension memtag", "ldg {tagged}, [{address}]", ".arch_extension nomemtag",
            tagged = inout(reg) tagged, address = in(reg) address, options(nostack))
    };
    (tagged >> TAG) as u8 & 0xf
}

/// Gives the granule at `address` the low four bits of `tag`, on a CPU with FEAT_MTE2.
pub fn store_tag(address: u64, tag: u8) {
    // STG of an address inside a granule is an alignment fault (Arm DDI 0487 C6.2).
    let address = outside(address & !0xf, 1);
    let tagged = address | u64::from(tag & 0xf) << TAG;
    // SAFETY: changes a tag, of no Rust object.
    unsafe {
        asm!(".arch_extension memtag", "stg {tagged}, [{address}]", ".arch_extension nomemtag",
            tagged = in(reg) tagged, address = in(reg) address, options(nostack))
    };
}

access!(load16, store16, u16, "ldrh", "strh", "w");
access!(load32, store32, u32, "ldr", "str", "w");
access!(load64, store64, u64, "ldr", "str", "x");
access!(load8, store8, u8, "ldrb", "strb", "w");

/// Bytes outside the image that nobody changes while they are looked at: a device tree.
pub fn view(address: u64, length: usize) -> Option<&'static [u8]> {
    let end = address.checked_add(length as u64)?;
    let image = image();
    if address == 0 || (address < image.end && end > image.start) {
        return None;
    }
    // SAFETY: not null, not the image, does not wrap; the loader put the device tree there and the guest reads it before
    // it starts to use memory.
    Some(unsafe { core::slice::from_raw_parts(address as *const u8, length) })
}

macro_rules! maintenance {
    ($(#[$doc:meta] $name:ident: $instruction:literal),* $(,)?) => {$(
        #[$doc]
        pub fn $name(address: u64) {
            let address = outside(address, 1);
            // SAFETY: maintenance of a line outside the image; only what the guest itself keeps there can be lost.
            unsafe { asm!(concat!($instruction, ", {}"), in(reg) address, options(nostack)) };
        }
    )*};
}

maintenance! {
    /// Cleans a data line to the point of coherency.
    clean: "dc cvac",
    /// Cleans a data line to the point of unification.
    clean_to_pou: "dc cvau",
    /// Cleans and invalidates a data line to the point of coherency.
    clean_invalidate: "dc civac",
    /// Invalidates a data line to the point of coherency.
    invalidate: "dc ivac",
    /// Invalidates an instruction line to the point of unification.
    invalidate_instructions: "ic ivau",
    /// Zeroes a block of [`zero_block`] bytes.
    zero: "dc zva",
}

/// Bytes that one `DC ZVA` zeroes, or 0 if it is prohibited (Arm DDI 0487, DCZID_EL0).
pub fn zero_block() -> u64 {
    let id = crate::sysreg_read!("dczid_el0");
    if id & 1 << 4 == 0 { 4 << (id & 0xf) } else { 0 }
}

/// Smallest data cache line, in bytes (CTR_EL0.DminLine is the logarithm of its words).
pub fn data_line() -> u64 {
    4 << (crate::sysreg_read!("ctr_el0") >> 16 & 0xf)
}

/// Applies a maintenance function to every data line of a range, and waits.
pub fn each_line(range: Range<u64>, maintain: impl Fn(u64)) {
    let line = data_line();
    let mut at = range.start & !(line - 1);
    while at < range.end {
        maintain(at);
        at += line;
    }
    barrier();
}

/// Waits for memory accesses and maintenance; synchronises the context.
pub fn barrier() {
    // SAFETY: barriers only.
    unsafe { asm!("dsb sy", "isb", options(nostack)) };
}

/// Makes code that was written at `range` what is executed there (Arm DDI 0487 B2.4.4).
pub fn publish_code(range: Range<u64>) {
    each_line(range.clone(), clean_to_pou);
    // IminLine may be smaller than DminLine; four bytes is the least that it can be, 16 what it is in practice.
    let line = 4 << (crate::sysreg_read!("ctr_el0") & 0xf);
    let mut at = range.start & !(line - 1);
    while at < range.end {
        invalidate_instructions(at);
        at += line;
    }
    barrier();
}
