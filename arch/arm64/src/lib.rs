//! The arm64 architecture as data: syndromes, descriptors, identification, calling conventions.
//!
//! Purpose: what Arm's manuals define as bits, this crate gives types. It executes no instruction, holds no state and
//! builds on every host, so every table in it is tested exhaustively or by property there; `metal/arm64` has the
//! instructions.
//!
//! Rooms, in the order in which an exit goes through them:
//!
//! | room | question |
//! |---|---|
//! | [`syndrome`] | what did the guest do? ESR_EL2 → [`syndrome::Exit`] |
//! | [`abort`] | which memory access failed, and why? → `entresol_fault::Fault` |
//! | [`instruction`] | which load or store was it, where the syndrome does not say? |
//! | [`stage1`] | which of its own tables does an address go through? |
//! | [`stage2`] | what do second-stage descriptors look like? |
//! | [`sysreg`], [`policy`] | which register was touched, what is the answer? |
//! | [`idregs`] | what does the guest learn about its CPU? |
//! | [`smccc`], [`psci`] | what did it ask of its firmware? |
//! | [`mpidr`] | which vCPU does it mean? |
//! | [`inject`] | how does it get an exception? |
//!
//! Invariants: no function here panics, whatever registers it is given; a guest chooses most of them.
#![no_std]
#![forbid(unsafe_code)]

pub mod abort;
pub mod idregs;
pub mod inject;
pub mod instruction;
pub mod mpidr;
pub mod policy;
pub mod psci;
pub mod smccc;
pub mod stage1;
pub mod stage2;
pub mod syndrome;
pub mod sysreg;

#[cfg(test)]
extern crate std;
