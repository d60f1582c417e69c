//! What was counted for one virtual machine. Each count is exact; all of them together are not one moment.

use alloc::borrow::Cow;
use alloc::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::response::owned;

/// Counters and gauges of one virtual machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats<'a> {
    /// Second-stage faults, by kind.
    pub faults: Faults,
    /// Valid second-stage entries now, by size.
    pub entries: Entries,
    /// Frames that hold its second-stage tables now.
    pub table_pages: u64,
    /// TLB invalidations, by operation.
    pub tlb: Tlb,
    /// Exits from the guest, by reason.
    #[serde(borrow)]
    pub exits: BTreeMap<Cow<'a, str>, u64>,
    /// Frames that hold its memory now.
    pub resident_frames: u64,
    /// Frames of the whole machine that nobody has now.
    pub free_frames: u64,
    /// Accesses to addresses that no device claims.
    pub unclaimed_mmio: u64,
}

impl Stats<'_> {
    /// The same, borrowing nothing.
    pub fn into_owned(self) -> Stats<'static> {
        let exits = self.exits.into_iter().map(|(reason, count)| (owned(reason), count)).collect();
        Stats { exits, ..self }
    }
}

/// Second-stage faults, by kind. By cause: translation, permission, access flag. By outcome: the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Faults {
    /// No valid entry was there.
    pub translation: u64,
    /// A valid entry did not permit the access.
    pub permission: u64,
    /// An entry's access flag was clear.
    pub access_flag: u64,
    /// The object had to make the page.
    pub fresh: u64,
    /// The object had the page already.
    pub populated: u64,
    /// Lost to something that moved, and went round again.
    pub retry: u64,
    /// Found its work done.
    pub spurious: u64,
    /// Outside every slot, or a store to read-only memory: given to devices.
    pub outside: u64,
    /// Ended as an abort in the guest.
    pub injected: u64,
}

/// Valid second-stage entries, by size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Entries {
    /// Pages of 4 KiB.
    pub size_4k: u64,
    /// Blocks of 2 MiB.
    pub size_2m: u64,
    /// Blocks of 1 GiB.
    pub size_1g: u64,
}

/// TLB invalidations, by operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tlb {
    /// Of one intermediate physical address.
    pub ipa: u64,
    /// Of a range of them.
    pub range: u64,
    /// Of a whole virtual machine.
    pub vmid: u64,
    /// Of everything.
    pub all: u64,
}
