//! What every bare machine needs that is no instruction: how RAM is divided, which frames the core may ask for, what is
//! in the hypervisor's own mapping, its console and its stacks.
//!
//! Purpose: `metal/*` share it, so that what is checked there on the way to hardware is one piece of code, tested on any host.
//!
//! | room | question |
//! |---|---|
//! | [`memory`] | what of the machine's RAM is heap, and what frames? |
//! | [`pool`] | may the core ask for this frame? |
//! | [`own`] | which frames are in the hypervisor's own mapping? |
//! | [`console`] | how do many write to one port? |
//! | [`stack`] | who called whom, and did a stack overflow? |
//! | [`line`] | what does an interrupted line say? |
//!
//! Invariants: nothing here allocates, and nothing touches a device.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod console;
pub mod line;
pub mod memory;
pub mod own;
pub mod pool;
pub mod stack;
