//! Devices that a guest sees.
#![no_std]
#![forbid(unsafe_code)]

pub mod gic;
