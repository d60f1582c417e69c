//! What a guest's first instruction finds: its kernel, its initial RAM disk, its device tree.
//!
//! Purpose: files that an owner names become bytes at guest physical addresses, or an error that says which field has which
//! value and which rule it breaks; nothing is started then. The guest's world is that of QEMU's `virt` machine ([`virt`]),
//! so kernels, firmware and bare-metal programs written for it run unmodified.
//!
//! Protocol, in this order:
//!
//! 1. [`kernel::recognise`] looks at the file: arm64 `Image`, ELF, flat, and the first and last of these gzip'd;
//! 2. [`layout::layout`] decides all addresses, or refuses;
//! 3. [`fdt::generate`] describes the machine;
//! 4. [`kernel::place`] streams the kernel into guest memory; the caller writes the initial RAM disk and the tree.
//!
//! The boot CPU then starts at [`layout::Layout::entry`] with X0 = [`layout::Layout::dtb`], X1–X3 = 0, at EL1 with the MMU
//! off and everything masked (Linux, Documentation/arch/arm64/booting.rst).
//!
//! An x86-64 guest's world is another, and has a room of its own: [`x86`].
//!
//! Invariants: no input panics or allocates without bound: an inflater takes about 48 KiB, a device tree at most
//! [`fdt::MAX_SIZE`]; a failed allocation is an error (D8). Everything placed lies inside the VM's memory and nothing overlaps.
//!
//! Known holes: EFI zboot images with another compression than gzip; big-endian ELF; kernels inside legacy uImage or FIT.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod fdt;
pub mod kernel;
pub mod layout;
pub mod virt;
pub mod window;
pub mod x86;

use core::fmt;
use entresol_addr::Gpa;

/// Guest memory as the loader writes it.
pub trait Memory {
    /// Why an access failed: outside the VM's memory, or no frame for it.
    type Error;

    /// Puts `bytes` at `gpa`.
    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Makes `size` bytes from `gpa` read as zero. Memory that was never touched already does, and need not be populated.
    fn zero(&mut self, gpa: Gpa, size: u64) -> Result<(), Self::Error>;
}

/// A VM's memory: one range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ram {
    /// First byte.
    pub base: Gpa,
    /// Bytes.
    pub size: u64,
}

/// Bytes in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: Gpa,
    /// Bytes.
    pub size: u64,
}

impl Region {
    /// One past the last byte. Regions made by this crate lie inside a VM's memory and do not wrap.
    pub const fn end(self) -> Gpa {
        Gpa::new(self.start.get().wrapping_add(self.size))
    }

    /// Whether the two share a byte.
    pub const fn overlaps(self, other: Self) -> bool {
        self.size != 0
            && other.size != 0
            && self.start.get() < other.end().get()
            && other.start.get() < self.end().get()
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end())
    }
}

/// A value that breaks a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value:#x}; it must be {rule}")]
pub struct Invalid {
    /// Where the value is, by the name of its owner's file or of the format's manual.
    pub field: &'static str,
    /// The value.
    pub value: u64,
    /// What it should have been.
    pub rule: &'static str,
}
