//! The arm64 machine on real instructions: the only crate that executes them.
//!
//! Purpose: what the core asks of a machine ([`Metal`] implements `entresol_machine::Machine`), and what a hypervisor
//! needs around it: how it starts, how a guest is entered and left, interrupts, time, a console, power.
//!
//! Rooms:
//!
//! | room | question |
//! |---|---|
//! | [`boot`] | how does the machine start, and what is in it? |
//! | `paging`, [`cpu`], `exception` | on what does the hypervisor itself stand? |
//! | [`own`], [`probe`] | what has left its own mapping, and does it notice? |
//! | [`switch`], [`traps`], [`exit`] | how is a guest entered, what may it do, why did it come back? |
//! | [`live`] | what do the registers of the loaded vCPU hold? |
//! | [`features`], [`identity`], [`random`] | what can this CPU do? |
//! | [`Metal`], [`operand`], `bytes` | how do words, pages, caches and TLBs obey the core? How do bytes move? |
//! | [`gic`], [`timer`], [`console`], [`power`] | the devices that the hypervisor keeps for itself |
//!
//! Protocol: the program that links this crate defines two symbols, without mangling, and is linked with `link.ld`:
//!
//! ```text
//! #[unsafe(no_mangle)] fn entresol_main(info: &'static BootInfo) -> !      // on the CPU that booted
//! #[unsafe(no_mangle)] fn entresol_secondary(cpu: usize) -> !              // on each CPU that `cpu::start_all` started
//! ```
//!
//! It is compiled for `aarch64-unknown-none-softfloat` (the hypervisor never touches the floating-point registers,
//! which are a guest's) with `-C relocation-model=pie -C force-frame-pointers=yes -C target-feature=+lse`, and linked
//! with `-pie --no-dynamic-linker -z text -z max-page-size=4096 -T link.ld`. The image is the ELF file's loadable
//! segments laid out by address from 0; the ELF file itself is what backtraces are resolved against.
//!
//! Invariants: HCR_EL2.E2H is 0. PSTATE.DAIF is set whenever code of EL2 runs, so nothing is ever interrupted here; a
//! pending interrupt ends `wfi` and is acknowledged by [`gic::ack`]. The EL2 mapping is the identity, without private
//! frames, and the windows of [`own`]; nothing in it is both writable and executable.
//!
//! Lock order: none of the locks here is held while another is taken, except the console's, which is always last.
//!
//! Known holes: no branch target identification or pointer authentication for the hypervisor's own code; on a
//! machine without FEAT_RAS an SError still pending when a guest leaves is reported by whoever runs next.
#![no_std]
#![allow(unsafe_code, reason = "the instructions themselves; every block says why it is sound")]
#![cfg_attr(
    not(target_os = "none"),
    allow(dead_code, reason = "hosts build only what is pure, for its tests; its callers are not there")
)]

#[cfg(test)]
extern crate std;

pub mod boot;
#[cfg(target_os = "none")]
mod bytes;
pub mod operand;

#[cfg(target_os = "none")]
#[macro_use]
mod sysreg;
#[cfg(target_os = "none")]
pub mod console;
#[cfg(target_os = "none")]
pub mod cpu;
#[cfg(target_os = "none")]
mod exception;
#[cfg(target_os = "none")]
pub mod exit;
#[cfg(target_os = "none")]
pub mod features;
#[cfg(target_os = "none")]
pub mod gic;
#[cfg(target_os = "none")]
pub mod identity;
#[cfg(target_os = "none")]
pub mod live;
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
mod tags;
#[cfg(target_os = "none")]
pub mod timer;
#[cfg(target_os = "none")]
pub mod traps;

#[cfg(target_os = "none")]
pub use machine::Metal;
