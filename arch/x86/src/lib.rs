//! The x86-64 architecture as data: exits, second-stage and shadow entries, MMIO entries, the guest's own page tables.
//!
//! Purpose: what AMD's and Intel's manuals define as bits, this crate gives types. It executes no instruction, holds no
//! state and builds on every host, so every table in it is tested exhaustively or by property there.
//!
//! Rooms, in the order in which an exit goes through them:
//!
//! | room | question |
//! |---|---|
//! | [`svm`], [`vmx`] | what did the guest do? exit code → [`exit::Exit`] |
//! | [`fault`] | which memory access failed, and why? → `entresol_fault::Fault` |
//! | [`npt`], [`ept`], [`either`] | what do second-stage entries look like, on AMD's, on Intel's, on whichever it is? |
//! | [`mmio`] | how does an entry say "there is no memory here"? |
//! | [`paging`] | what do the guest's own tables translate an address to? |
//! | [`shadow`] | which shadow tables show them, and in which words? |
//! | [`emulate`] | what does the instruction do that touched a device? |
//! | [`cpuid`], [`msr`] | what does the guest see of its processor? |
//! | [`pvclock`] | how does it tell the time by its TSC? |
//!
//! Invariants: no function here panics, whatever registers, entries or addresses it is given; a guest chooses most of them.
//!
//! Sources: AMD64 Architecture Programmer's Manual, volume 2 (24593, revision 3.42, "APM"); Intel 64 and IA-32 Architectures
//! Software Developer's Manual, volume 3 (325384, "SDM").
#![no_std]
#![forbid(unsafe_code)]

pub mod control;
pub mod cpuid;
pub mod either;
pub mod emulate;
pub mod ept;
pub mod exit;
pub mod fault;
pub mod mmio;
pub mod msr;
pub mod npt;
pub mod paging;
pub mod pvclock;
pub mod shadow;
pub mod svm;
pub mod vmx;

#[cfg(test)]
mod format_tests;
#[cfg(test)]
mod shadow_tests;

#[cfg(test)]
extern crate std;
