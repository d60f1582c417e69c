//! Entering a guest and coming back on Intel's processors: VMX with extended page tables.
//!
//! Purpose: the other half of [`switch`](crate::switch). A guest's state and what is told of it are kept there in one record, which is AMD's; here it is
//! moved between that record and the processor's control structure, whose form is the processor's own.
//!
//! | room | question |
//! |---|---|
//! | `controls` | what may this processor be told, and what do we tell it? |
//! | `fields`, `instructions` | how is the structure named, read and written? |
//! | `bitmap` | which registers does a guest have for itself? |
//! | `guest` | what of the record goes into the structure, and what comes back? |
//! | `run` | what happens at an entry and an exit? |
//!
//! Protocol: `enable` once on each CPU. A vCPU's structure is current on one CPU at most, from `guest::Part::load` to
//! `guest::Part::put`.
//!
//! After an exit the limits of the GDT and the IDT are FFFFh (SDM 28.5.2): longer than ours. Vectors that our IDT has no gate for
//! are raised by nothing: interrupts that come here are those that our own controllers send.
//!
//! Sources: SDM chapters 24 to 31.
//!
//! Known holes: a non-maskable interrupt is given to a guest at once, in the shadow of a MOV to SS too.

mod bitmap;
mod controls;
mod fields;
#[cfg(target_os = "none")]
pub(crate) mod guest;
#[cfg(target_os = "none")]
mod instructions;
#[cfg(target_os = "none")]
pub(crate) mod run;

pub use controls::{Controls, Lacks};

#[cfg(target_os = "none")]
mod enable;
#[cfg(target_os = "none")]
pub(crate) use enable::{capabilities, enable};
