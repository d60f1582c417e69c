//! From the loader's jump to `entresol_main`.
//!
//! Purpose: the image is an ELF file that is started by the PVH boot protocol (Xen's "x86/HVM direct boot ABI"): by QEMU's
//! `-kernel`, with the bundle as `-initrd`; or by multiboot2, as GRUB does on a PC, with the bundle as first module.
//!
//! Protocol:
//!
//! 1. `head` clears what must be zero, takes a stack, and enters long mode on tables of its own.
//! 2. `entresol_boot` reads what the loader says of the machine and the machine's ACPI tables into a [`BootInfo`], asks the processor
//!    for what we use, and changes to tables on which nothing is both writable and executable.
//! 3. `entresol_main` runs on the boot CPU, and starts the others with `cpu::start_all`: they begin in `secondary`.
//!
//! A machine that cannot carry the hypervisor is refused with one line on its console that begins with `PANIC`.

mod command;
mod info;
mod machine;
pub mod memory;
pub mod multiboot;

pub use entresol_metal_common::memory::Region;
pub use info::{InfoError, StartInfo, parse};
pub(crate) use machine::MAX_IO_APICS;
pub use machine::{BootInfo, Device, Entry, FIRST_INPUT, Inputs, IoApic, MAX_CPUS, MAX_INPUTS, MachineError};

#[cfg(target_os = "none")]
mod head;
#[cfg(target_os = "none")]
mod secondary;
#[cfg(target_os = "none")]
mod start;
#[cfg(target_os = "none")]
pub use start::entresol_boot;
