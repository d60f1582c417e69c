//! From the loader's jump to `entresol_main`.
//!
//! Purpose: the image is started as a Linux kernel is (Linux, Documentation/arch/arm64/booting.rst): by QEMU's
//! `-kernel` and by `booti` of U-Boot, at any address that is a multiple of 2 MiB, with the device tree's address in x0,
//! MMU and data cache off, interrupts masked; or by EFI firmware, as an application that brings this state about itself
//! ([`efi`]). `header` is what all of them read first.
//!
//! Protocol:
//!
//! 1. `head` relocates the image to where it runs, clears what must be zero, and takes a stack.
//! 2. [`entresol_boot`] (still without MMU: every access is Device memory, so no atomics, no locks, no log) reads the
//!    device tree into a [`BootInfo`], builds EL2's own tables, and turns MMU and caches on.
//! 3. `entresol_main` runs on the boot CPU, and starts the others with `cpu::start_all`.
//!
//! A machine that cannot carry the hypervisor is refused with one line on its console that begins with `PANIC`:
//! entered below EL2, no large system extensions, E2H stuck at one, or a device tree that lacks what we need.
//!
//! Invariants: what step 2 writes, it writes to memory past the caches; both the start code (before) and the step
//! itself (after) drop the cache lines of the written ranges, so nobody reads a stale line once caches are on.

pub mod efi;
mod info;
pub mod memory;

pub use info::{AFFINITY, BootInfo, Device, InfoError, MAX_CPUS, MAX_REGIONS, Region, parse};

#[cfg(target_os = "none")]
mod head;
#[cfg(target_os = "none")]
mod header;
#[cfg(target_os = "none")]
mod start;
#[cfg(target_os = "none")]
pub use start::{entresol_boot, image_base, image_offset};
