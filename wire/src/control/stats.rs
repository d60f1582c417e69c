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
    /// Pages of its memory that are in no frame now, but in a store.
    #[serde(default)]
    pub stored_frames: u64,
    /// Frames of the whole machine that nobody has now.
    pub free_frames: u64,
    /// Frames of the whole machine that are bad, and never used again.
    #[serde(default)]
    pub poisoned_frames: u64,
    /// Accesses to addresses that no device claims.
    pub unclaimed_mmio: u64,
    /// Its balloon, if it has one.
    #[serde(default, borrow, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon<'a>>,
    /// What merging equal pages did.
    #[serde(default)]
    pub merge: Merge,
}

impl Stats<'_> {
    /// The same, borrowing nothing.
    pub fn into_owned(self) -> Stats<'static> {
        let exits = self.exits.into_iter().map(|(reason, count)| (owned(reason), count)).collect();
        Stats { exits, balloon: self.balloon.map(Balloon::into_owned), ..self }
    }
}

/// What is in a balloon, and what went through it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balloon<'a> {
    /// Pages that its owner wants in it.
    pub target: u64,
    /// Pages that the guest says are in it.
    pub actual: u64,
    /// Frames that came back by inflating it.
    pub inflated: u64,
    /// Pages that the guest took out.
    pub deflated: u64,
    /// Frames that came back because the guest reported them free.
    pub reported: u64,
    /// Pages that the guest named and that are not its to give.
    pub refused: u64,
    /// Pages that stayed because giving them back needs memory first.
    pub kept: u64,
    /// How often the guest has told its own counts. Each question asks it for newer ones.
    pub updates: u64,
    /// The guest's own counts, as it told them last.
    #[serde(borrow)]
    pub guest: BTreeMap<Cow<'a, str>, u64>,
}

impl Balloon<'_> {
    fn into_owned(self) -> Balloon<'static> {
        Balloon { guest: self.guest.into_iter().map(|(name, count)| (owned(name), count)).collect(), ..self }
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
    /// The page was not in memory, but in a store.
    pub absent: u64,
    /// The frame behind the page is bad: each was an abort in the guest.
    pub poisoned: u64,
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

/// Pages that became one with equal ones, and what that took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Merge {
    /// Pages that the scanner read.
    pub scanned: u64,
    /// Pages that are never written again, so that others may join them.
    pub offered: u64,
    /// Pages that joined an equal one: each gave its frame back.
    pub joined: u64,
    /// Pages of zeros that became vacant: likewise.
    pub vacated: u64,
    /// Blocks that were broken up for that.
    pub broken: u64,
    /// Pages that were compared, and differed.
    pub differed: u64,
    /// Pages and blocks that were copied because a write met what is shared, by merging or by a fork.
    pub copied: u64,
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
