//! The x86-64 machine on real instructions: the only crate that executes them.
//!
//! Purpose: what the core asks of a machine ([`Metal`] implements `entresol_machine::Machine`), and what a hypervisor
//! needs around it: how it starts, how a guest is entered and left by AMD's SVM or Intel's VMX, a console, power.
//!
//! Rooms:
//!
//! | room | question |
//! |---|---|
//! | [`boot`] | how does the machine start, and what is in it? |
//! | `paging`, [`cpu`], `exception` | on what does the hypervisor itself stand? |
//! | [`interrupts`], `apic`, `ioapic` | how do devices, timers and other CPUs make themselves heard? |
//! | [`switch`] | how is a guest entered, and why did it come back? |
//! | [`vmx`] | the same on Intel's processors |
//! | [`features`] | what can this CPU do? |
//! | [`Metal`], [`flush`] | how do words, pages and TLBs obey the core? |
//! | [`own`], [`shootdown`], [`probe`] | what of RAM can the hypervisor itself not reach? |
//! | [`timer`], [`console`], [`rtc`], [`random`], [`power`] | the devices that the hypervisor keeps for itself |
//!
//! Protocol: the program that links this crate defines two symbols, without mangling, and is linked with `link.ld`:
//!
//! ```text
//! #[unsafe(no_mangle)] fn entresol_main(info: &'static BootInfo) -> !      // on the CPU that booted
//! #[unsafe(no_mangle)] fn entresol_secondary(cpu: usize) -> !              // on each CPU that it starts
//! ```
//!
//! It is compiled for `x86_64-unknown-none` (no x87, MMX or SSE register is touched: they are a guest's) with
//! `-C relocation-model=static -C force-frame-pointers=yes -C target-feature=+bmi1,+bmi2`; the code model of that target takes addresses below 2 GiB as well.
//!
//! Invariants: interrupts are taken where [`interrupts`] says, and nowhere else. The mapping is the identity; nothing in it is both
//! writable and executable.
//!
//! Lock order: none of the locks here is held while another is taken, except the console's, which is always last.
//!
//! Known holes: time stamp counters are taken to be invariant and to agree.
//!
//! Sources: AMD64 Architecture Programmer's Manual, volume 2 (24593, revision 3.42, "APM").
#![no_std]
#![allow(unsafe_code, reason = "the instructions themselves; every block says why it is sound")]
#![cfg_attr(
    not(target_os = "none"),
    allow(dead_code, reason = "hosts build only what is pure, for its tests; its callers are not there")
)]

#[cfg(target_os = "none")]
extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod boot;
pub mod flush;
mod ioapic;
pub mod rtc;
pub mod shootdown;
mod sleep;

#[cfg(target_os = "none")]
mod apic;
#[cfg(target_os = "none")]
pub mod console;
#[cfg(target_os = "none")]
pub mod cpu;
#[cfg(target_os = "none")]
mod exception;
#[cfg(target_os = "none")]
pub mod features;
#[cfg(target_os = "none")]
pub mod interrupts;
#[cfg(target_os = "none")]
mod machine;
#[cfg(target_os = "none")]
pub mod own;
#[cfg(target_os = "none")]
mod paging;
#[cfg(target_os = "none")]
pub mod power;
#[cfg(target_os = "none")]
pub mod probe;
#[cfg(target_os = "none")]
pub mod random;
#[cfg(target_os = "none")]
pub mod switch;
#[cfg(target_os = "none")]
mod tables;
#[cfg(target_os = "none")]
pub mod timer;
pub mod vmx;

#[cfg(target_os = "none")]
pub use machine::Metal;
