//! Units of the second stage: where a guest thinks memory is, and where it is.
//!
//! Purpose: every other crate speaks of addresses through these types, so that a guest's frame number can never be
//! mistaken for the machine's, nor bytes for frames. All are `u64` newtypes with the granule of 4 KiB; no `usize`
//! appears, because an address space is not the size of a pointer of the program that manages it.
//!
//! Protocol: none; the values are plain data. Arithmetic that can leave the address space is `checked_*` and says so
//! by `None`; a guest chooses these numbers.
#![no_std]
#![forbid(unsafe_code)]

mod frame;
mod range;
mod size;

pub use frame::{Gfn, Gpa, Hpa, Pfn};
pub use range::{FrameRange, GfnRange, PfnRange};
pub use size::PageSize;

/// Base-two logarithm of the granule in bytes (4 KiB).
pub const PAGE_SHIFT: u32 = 12;
/// The granule, in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
