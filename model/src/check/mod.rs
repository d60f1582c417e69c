//! What must hold: one file for each invariant that existing code can break, and what all of them say.
//!
//! A checker is a pure function of the model's state and of what just happened; the lab calls it at the moment its
//! module says. Any of them can be switched off, so that a test can show that a bug is found *by it*.
//!
//! INV-12 is judged by the oracle
//! of INV-11.

pub mod coalesced;
pub mod completion;
pub mod inv01;
pub mod inv02;
pub mod inv03;
pub mod inv04;
pub mod inv05;
pub mod inv06;
pub mod inv07;
pub mod inv08;
pub mod inv09;
pub mod inv10;
pub mod inv11;
pub mod inv13;
pub mod inv14;
pub mod inv15;
pub mod maintenance;
pub mod slots;
pub mod written;

use std::fmt;

use crate::machine::{EntryWrite, World};

/// What watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Check {
    /// Clean before visible.
    Inv1,
    /// Break before make.
    Inv2,
    /// Nothing reaches a range that is being invalidated.
    Inv3,
    /// A writable entry under logging has its dirty bit.
    Inv4,
    /// Blocks stay in their slot.
    Inv5,
    /// Instruction cache before execution.
    Inv6,
    /// Frames are released once, and nobody reaches a free one.
    Inv7,
    /// MMIO entries are believed while they are true.
    Inv8,
    /// Memory is not emulated.
    Inv9,
    /// The hypervisor's own mapping.
    Inv10,
    /// The data oracle.
    Inv11,
    /// The data oracle's tags.
    Inv12,
    /// Read-only bytes.
    Inv13,
    /// VMIDs.
    Inv14,
    /// Progress.
    Inv15,
    /// Slot updates do what their kind says.
    Slots,
    /// Cache maintenance means what the table says.
    Maintenance,
    /// Coalesced writes.
    Coalesced,
    /// Instructions take effect once, or not at all.
    Completion,
    /// Dirty logs, dirty rings and differences name what was written.
    Written,
    /// Shadow tables show what the guest's tables and the second stage do.
    Shadow,
    /// Outcomes that the litmus file forbids.
    Forbidden,
    /// A panic of the core.
    Panic,
}

impl Check {
    /// All.
    pub const ALL: [Self; 23] = [
        Self::Inv1,
        Self::Inv2,
        Self::Inv3,
        Self::Inv4,
        Self::Inv5,
        Self::Inv6,
        Self::Inv7,
        Self::Inv8,
        Self::Inv9,
        Self::Inv10,
        Self::Inv11,
        Self::Inv12,
        Self::Inv13,
        Self::Inv14,
        Self::Inv15,
        Self::Slots,
        Self::Maintenance,
        Self::Coalesced,
        Self::Completion,
        Self::Written,
        Self::Shadow,
        Self::Forbidden,
        Self::Panic,
    ];

    /// The checker of that name, whatever its case.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|check| check.name().eq_ignore_ascii_case(name))
    }

    /// Its name in reports and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inv1 => "INV-1",
            Self::Inv2 => "INV-2",
            Self::Inv3 => "INV-3",
            Self::Inv4 => "INV-4",
            Self::Inv5 => "INV-5",
            Self::Inv6 => "INV-6",
            Self::Inv7 => "INV-7",
            Self::Inv8 => "INV-8",
            Self::Inv9 => "INV-9",
            Self::Inv10 => "INV-10",
            Self::Inv11 => "INV-11",
            Self::Inv12 => "INV-12",
            Self::Inv13 => "INV-13",
            Self::Inv14 => "INV-14",
            Self::Inv15 => "INV-15",
            Self::Slots => "slots",
            Self::Maintenance => "cache-ops",
            Self::Coalesced => "coalesced",
            Self::Completion => "completion",
            Self::Written => "written",
            Self::Shadow => "shadow",
            Self::Forbidden => "forbidden",
            Self::Panic => "panic",
        }
    }
}

/// Which checkers watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checks(u32);

impl Checks {
    /// All of them.
    pub const fn all() -> Self {
        Self(u32::MAX)
    }

    /// All but these.
    pub fn without(self, checks: &[Check]) -> Self {
        Self(checks.iter().fold(self.0, |set, check| set & !(1 << *check as u8)))
    }

    /// Only these.
    pub fn only(checks: &[Check]) -> Self {
        Self(checks.iter().fold(0, |set, check| set | 1 << *check as u8))
    }

    /// Whether `check` watches.
    pub const fn has(self, check: Check) -> bool {
        self.0 & 1 << check as u8 != 0
    }
}

/// Something does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What.
    pub check: Check,
    /// Where and how, with the page and its history.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.check.name(), self.what)
    }
}

/// The checkers that watch each store to a table.
pub fn entry(checks: Checks, world: &World, write: &EntryWrite) -> Option<Violation> {
    type Checker = fn(&World, &EntryWrite) -> Option<String>;
    const CHECKERS: [(Check, Checker); 5] = [
        (Check::Inv1, inv01::entry),
        (Check::Inv2, inv02::entry),
        (Check::Inv6, inv06::entry),
        (Check::Inv7, inv07::entry),
        (Check::Inv13, inv13::entry),
    ];
    CHECKERS
        .iter()
        .filter(|(check, _)| checks.has(*check))
        .find_map(|(check, checker)| checker(world, write).map(|what| Violation { check: *check, what }))
}
