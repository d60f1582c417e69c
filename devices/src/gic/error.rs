//! What an owner can ask for that cannot be.

use core::fmt;

use super::{FIRST_SPI, MAX_SPIS, MAX_VCPUS};

/// Why the interrupt controller refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GicError {
    /// `Config::vcpus` out of range.
    Vcpus(usize),
    /// `Config::spis` out of range.
    Spis(usize),
    /// No SPI with this INTID; `limit` is one past the last.
    Spi {
        /// The INTID asked for.
        intid: u32,
        /// One past the last SPI.
        limit: u32,
    },
    /// No PPI has this INTID.
    Ppi(u32),
    /// No memory for the interrupts' state.
    OutOfMemory,
}

impl fmt::Display for GicError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpus(vcpus) => write!(f, "vcpus = {vcpus}: must be 1 to {MAX_VCPUS}"),
            Self::Spis(spis) => write!(f, "spis = {spis}: must be a multiple of 32, from 32 to {MAX_SPIS}"),
            Self::Spi { intid, limit } => write!(f, "SPI {intid}: INTID must be {FIRST_SPI} to {}", limit - 1),
            Self::Ppi(intid) => write!(f, "PPI {intid}: INTID must be 16 to 31"),
            Self::OutOfMemory => f.write_str("no memory for the interrupt controller"),
        }
    }
}

impl core::error::Error for GicError {}
