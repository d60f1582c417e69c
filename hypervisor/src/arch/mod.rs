//! What the two architectures do differently, under one set of names.
//!
//! Purpose: everything outside this room is written once. What a virtual machine of one architecture has that another's has not (an
//! interrupt controller, its own clocks, what is in a vCPU's registers, why a guest comes back) is in a room of that
//! architecture here, and has the same names in both, so that whoever calls them is compiled for either.
//!
//! | name | what |
//! |---|---|
//! | [`Metal`], `boot`, `console`, `cpu`, `own`, `power`, `probe`, `random`, `timer`, `lines` | the machine: rooms of the metal crate |
//! | [`start`], [`start_cpu`] | what the machine needs before it runs guests |
//! | [`kick`], [`KICK`], [`TIMER`], [`take_interrupt`], [`end_interrupt`] | interrupts of the machine |
//! | [`ARCH`] | what configurations call it |
//! | [`Format`], [`Memory`] | second-stage tables, and the core's part of a virtual machine with them |
//! | [`map`] | where things lie in a guest's address space |
//! | [`State`], [`SavedState`], [`Boot`], [`Room`] | a vCPU's registers: while it runs, outside the machine, when it starts; what they take of the heap |
//! | [`Board`], [`SavedBoard`], [`Line`] | what a machine has beside memory, vCPUs and virtio: controllers, serial port, clocks |
//! | [`Accessor`] | what of a vCPU its access to an interrupt controller needs |
//! | [`Guest`] | the files that a guest starts with, and where they go |
//! | [`turn`] | a vCPU comes to a CPU, enters its guest, and goes |
//! | [`exit`] | why a guest came back, and what is done about it |
//!
//! Lock order: as [`crate`].

#[cfg(target_arch = "aarch64")]
mod arm64;
#[cfg(target_arch = "aarch64")]
pub use arm64::*;

#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
pub use x86::*;
