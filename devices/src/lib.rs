//! Devices that a guest sees: serial port, clock, flash, virtio over MMIO, interrupt controller. PL011, PL031 and GIC are an
//! arm64 machine's; the 16550, the APICs, the interval timer, the CMOS clock and the power registers an x86-64 machine's.
//!
//! Purpose: register files and queue engines as plain state machines. Nothing here knows how an exit is decoded, where
//! a device lies in the guest's map, or how memory is backed: those come in through the traits of [`bus`], so all of
//! it runs and is tested on any host.
//!
//! Protocol: the program that owns the VM routes each MMIO exit to a [`bus::Device`]; the device answers synchronously,
//! on the CPU that took the exit. Registers, identification values and interrupt behaviour are those of QEMU's `virt`
//! machine where a guest can tell, and of the manuals named in each module; an x86-64 machine is like QEMU's `microvm`.
//! Devices that count time are told it with each access, and say when they want to be looked at next.
//!
//! Invariants: a guest is hostile. No access, of whatever offset, size or value, and no content of guest memory panics,
//! loops without bound or allocates. Heap is taken when a device is made, fallibly.
//!
//! Lock order: a device's own lock, then guest memory or the interrupt line. No device calls another, and the hooks
//! that wake the host's side are called with no lock held.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod apic;
pub mod bus;
pub mod cmos;
pub mod flash;
pub mod gic;
pub mod kick;
pub mod pc;
pub mod pit;
pub mod pl011;
pub mod pl031;
pub mod power;
mod primecell;
pub mod saved;
pub mod serial;
pub mod uart16550;
pub mod virtio;
pub mod vmgenid;
