//! A device's state outside the machine, and what is wrong with one that is read.
//!
//! Protocol: `save` gives a device's registers as a value with a serialised form; `load` puts one into a device that was made
//! anew, in a virtual machine none of whose vCPUs runs. A value that was read is a stranger's: `load` checks everything that the
//! device relies on, and refuses it with the field's name, changing nothing. What a guest could have stored in a register
//! itself needs no check.
//!
//! Lines are not driven by `load`: the level that a device remembers is part of the saved state of the interrupt controller.

use core::fmt;

/// What is wrong with a saved state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadState {
    /// The field.
    pub field: &'static str,
    /// What must hold.
    pub rule: &'static str,
}

impl fmt::Display for BadState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.rule)
    }
}

impl core::error::Error for BadState {}

/// That `holds`.
pub(crate) fn check(holds: bool, field: &'static str, rule: &'static str) -> Result<(), BadState> {
    if holds { Ok(()) } else { Err(BadState { field, rule }) }
}
