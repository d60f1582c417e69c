//! What crosses between the host and the hypervisor: one set of types, compiled into both.
//!
//! Purpose: the owner writes a configuration on the host; the host tool checks it and packs it, with the files it names,
//! into a boot bundle; the hypervisor finds the bundle in its memory; afterwards both talk over a control channel.
//! Everything of that which has a format lives here, so that the two sides cannot disagree:
//!
//! | room | what crosses | form |
//! |---|---|---|
//! | [`config`] | which virtual machines there are | TOML on the host, JSON in the bundle |
//! | [`bundle`] | configuration and files, at boot | one flat image with a checksum |
//! | [`control`] | requests, responses, events, while it runs | lines of JSON |
//! | [`store`] | named files on the outer machine's disk | blocks, two directories |
//! | [`snapshot`] | a virtual machine in a file of the store | pages, JSON, a trailer |
//!
//! Trust: neither side believes the other. The hypervisor checks a bundle's bytes and its configuration by the same
//! functions as the host did, and reads a request as if it came from a stranger; the host tool does so with answers.
//! A guest's bytes cross only as data of [`control::Event::Console`], encoded, of bounded length.
//!
//! Memory: what a message from a guest causes is written into a buffer that exists already. What an owner sends is read
//! into heap whose size is bounded by the length of what was sent: a line by [`control::MAX_LINE`], a configuration by
//! [`bundle::MAX_CONFIG`].
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "std"))]
extern crate std;

pub mod bundle;
pub mod config;
pub mod control;
mod refusal;
pub mod snapshot;
pub mod store;

pub use refusal::Refusal;
