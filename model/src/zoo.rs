//! The zoo: each mistake that was made before, planted in the production path, with the scenario that shows it.
//!
//! Purpose: a checker that never fails proves nothing. For each [`Exhibit`] the bug is switched on, its scenario is
//! explored within a budget, and the bug must be found; with the bug off, ten times the budget must find nothing; with
//! the checkers that find it off, it must not be found, so no other accident finds it.
//!
//! Names are the specification's; Z-X are ours, so that each checker has a bug to find. Z-A1 is here twice: on the path of a
//! fault, and on its own, the `change` of a notifier; so is Z-B5, whose bug has two halves.
//!
//! Of Z-D6 the half that shows is here: a hole's lease that is released is released in vain, because a lease knows its frame's life.
//!
//! Bugs of Z-C are here for second-stage entries and for shadow tables, but for those that have one place only: shadow tables have no short way of a
//! write (Z-C7) and report nothing as malformed (Z-C4), and a second stage knows no INVLPG (Z-C5).

use std::time::Duration;

pub use entresol_sync::zoo::Bug;

use crate::check::{Check, Checks};
use crate::explore::run::Setting;
use crate::explore::{Plan, Report, explore};
use crate::litmus::Scenario;

/// A planted bug and where it shows.
#[derive(Clone, Copy, Debug)]
pub struct Exhibit {
    /// Its name in the specification.
    pub name: &'static str,
    /// The switch.
    pub bug: Bug,
    /// What is done wrong.
    pub about: &'static str,
    /// The scenario's file name.
    pub file: &'static str,
    text: &'static str,
    /// The checkers that find it here; the first is the one meant for it.
    pub found_by: &'static [Check],
}

macro_rules! exhibit {
    ($name:literal, $bug:ident, $file:literal, $found_by:expr, $about:literal) => {
        Exhibit {
            name: $name,
            bug: Bug::$bug,
            about: $about,
            file: $file,
            text: include_str!(concat!("../../lab/", $file)),
            found_by: $found_by,
        }
    };
}

/// All of them.
pub const ZOO: [Exhibit; 80] = {
    use Check::{
        Coalesced, Completion, Forbidden, Inv1, Inv2, Inv3, Inv4, Inv5, Inv6, Inv7, Inv8, Inv9, Inv10, Inv11, Inv12,
        Inv13, Inv14, Inv15, Maintenance, Panic, Shadow, Slots, Written,
    };
    /// A translation outlives what it leads to: whoever looks first sees it.
    const STALE: &[Check] = &[Inv3, Inv7, Inv11, Inv2];
    /// The same by a shadow entry.
    const STALE_SHADOW: &[Check] = &[Shadow, Inv3, Inv7, Inv11];
    /// A translation is made of what was taken back: no promise of the invalidation is broken, the frame is.
    const REVIVED: &[Check] = &[Inv7, Inv11, Inv3, Inv2];
    [
        exhibit!(
            "Z-A1",
            ZA1,
            "mmu-off.toml",
            &[Inv1, Inv11, Forbidden],
            "an entry is installed and its page not cleaned"
        ),
        exhibit!(
            "Z-A1-change",
            ZA1,
            "change.toml",
            &[Inv1, Inv11, Forbidden],
            "a change of the notifier installs a page that is not cleaned"
        ),
        exhibit!(
            "Z-A2",
            ZA2,
            "mmu-off.toml",
            &[Inv1, Inv11, Forbidden],
            "the page is cleaned after its entry is visible"
        ),
        exhibit!("Z-A3", ZA3, "invalidate.toml", STALE, "a fault tests the sequence, not what is in progress"),
        exhibit!("Z-A4", ZA4, "invalidate.toml", REVIVED, "a fault tests what is in progress, not the sequence"),
        exhibit!("Z-A5", ZA5, "invalidate.toml", REVIVED, "the sequence is sampled after the backing was asked"),
        exhibit!("Z-A6", ZA6, "split.toml", &[Inv2], "a block becomes a table without a break"),
        exhibit!("Z-A7", ZA7, "invalidate.toml", STALE, "a frame is freed before the invalidation completed"),
        exhibit!("Z-A8", ZA8, "two-vcpus.toml", &[Inv7], "frames in hand are lost where a fault gives up"),
        exhibit!("Z-A9", ZA9, "code.toml", &[Inv6, Inv11], "a page becomes executable, and old code stays cached"),
        exhibit!(
            "Z-A10",
            ZA10,
            "dirty-log.toml",
            &[Inv4, Written, Forbidden],
            "a write fault makes a page writable without its dirty bit"
        ),
        exhibit!("Z-A11", ZA11, "block-mmu-off.toml", &[Inv1, Inv11], "only the first page of a block is cleaned"),
        exhibit!("Z-B1", ZB1, "maintenance.toml", &[Maintenance], "a fault by cache maintenance counts as a write"),
        exhibit!(
            "Z-B2",
            ZB2,
            "maintenance.toml",
            &[Inv9, Maintenance],
            "maintenance of read-only memory exits as MMIO"
        ),
        exhibit!(
            "Z-B3",
            ZB3,
            "maintenance.toml",
            &[Inv15, Maintenance],
            "DC IVAC on read-only memory is tried again for ever"
        ),
        exhibit!(
            "Z-B4",
            ZB4,
            "table-walk.toml",
            &[Inv9],
            "a table walk that must write to read-only memory exits as MMIO"
        ),
        exhibit!("Z-B5", ZB5, "mmio-exit.toml", &[Completion], "a completed MMIO exit steps over two instructions"),
        exhibit!(
            "Z-B5-abort",
            ZB5,
            "mmio-abort.toml",
            &[Completion],
            "an abort after an MMIO exit leaves what was loaded in its register"
        ),
        exhibit!("Z-B6", ZB6, "coalesced.toml", &[Coalesced], "a ring of 170 entries counts modulo 2^32"),
        exhibit!("Z-C1", ZC1, "mmio-create.toml", &[Inv9], "a slot is created, and MMIO entries of before count"),
        exhibit!("Z-C1-ept", ZC1, "mmio-create-ept.toml", &[Inv9], "the same in extended tables"),
        exhibit!("Z-C1-move", ZC1, "mmio-move.toml", &[Inv9], "the same where a slot moves"),
        exhibit!("Z-C2", ZC2, "mmio-wrap.toml", &[Inv9], "generations begin anew, and MMIO entries stay"),
        exhibit!("Z-C3", ZC3, "mmio-delete.toml", STALE, "an MMIO entry takes the place of a leaf that is not flushed"),
        exhibit!("Z-C4", ZC4, "mmio-zap.toml", &[Forbidden], "an entry that was zapped counts as a bug of ours"),
        exhibit!("Z-C6", ZC6, "mmio-zap.toml", &[Inv7, Panic], "a table page is freed under a walk"),
        exhibit!(
            "Z-C7",
            ZC7,
            "mmio-fork.toml",
            &[Inv11, Written, Forbidden],
            "the short way makes a shared page writable"
        ),
        exhibit!("Z-C8", ZC8, "mmio-create.toml", &[Inv8, Inv9], "an MMIO entry counts while slots are being updated"),
        exhibit!(
            "Z-F1",
            ZF1,
            "delete-slot.toml",
            &[Inv3, Inv5, Inv7, Inv11, Inv2],
            "an update goes on before the grace period is over"
        ),
        exhibit!("Z-F2", ZF2, "revert-slot.toml", &[Inv9, Inv7], "an update that is given up leaves its slot invalid"),
        exhibit!(
            "Z-F3",
            ZF3,
            "dirty-log.toml",
            &[Inv4, Written],
            "the log is cleared before the pages are write-protected"
        ),
        exhibit!("Z-F4", ZF4, "dirty-ring.toml", &[Slots], "the end of what a ring entry names wraps"),
        exhibit!("Z-F7", ZF7, "dirty-log.toml", &[Inv4, Written, Forbidden], "the log is taken while faults go on"),
        exhibit!(
            "Z-F5",
            ZF5,
            "vmid-rollover.toml",
            &[Inv14, Inv3, Inv7, Inv11, Panic],
            "a VMID is used again without a flush"
        ),
        exhibit!("Z-F6", ZF6, "slot-flags.toml", &[Slots], "an update of flags alone unmaps"),
        exhibit!(
            "Z-G1",
            ZG1,
            "fork-write.toml",
            &[Inv11, Inv15, Written],
            "a write goes through a shared node, and relatives see it"
        ),
        exhibit!(
            "Z-G3",
            ZG3,
            "merge-write.toml",
            &[Inv11],
            "two pages are compared before writes to them are kept out"
        ),
        exhibit!("Z-D1", ZD1, "lease.toml", &[Inv10], "a release removes a frame that is leased a second time"),
        exhibit!("Z-D2", ZD2, "cache-hole.toml", &[Inv10, Inv7, Inv11], "a hole leaves a live page-frame cache"),
        exhibit!("Z-D3", ZD3, "lease-hole.toml", &[Inv10, Panic], "a late release takes the next owner's lease"),
        exhibit!("Z-D4", ZD4, "lease-fails.toml", &[Inv10], "a frame whose removal failed counts as absent"),
        exhibit!("Z-D5", ZD5, "lease.toml", &[Inv10], "a removed frame is not invalidated"),
        exhibit!("Z-D6", ZD6, "cache-convert.toml", &[Inv7], "a conversion takes a cache's lease for over"),
        exhibit!("Z-D7", ZD7, "cache-offset.toml", &[Inv11, Forbidden], "a cache keeps the place of another piece"),
        exhibit!("Z-D8", ZD8, "lease.toml", &[Inv10], "a lease is handed out before the frame is mapped again"),
        exhibit!("Z-D9", ZD9, "lease-hole.toml", &[Inv11], "a frame goes to its next owner unzeroed"),
        exhibit!(
            "Z-D10",
            ZD10,
            "poison-own.toml",
            &[Inv7],
            "a bad frame's entries go before those that are being made are there"
        ),
        exhibit!(
            "Z-E1",
            ZE1,
            "swap-tags.toml",
            &[Inv12, Inv1, Forbidden, Panic],
            "the tags of a place are forgotten when its page has come back"
        ),
        exhibit!("Z-E2", ZE2, "tags-touch.toml", &[Inv1], "a page is there before its tags are cleared"),
        exhibit!("Z-E3", ZE3, "tags-block.toml", &[Inv1], "of a block, only the first page's tags are cleared"),
        exhibit!(
            "Z-E4",
            ZE4,
            "swap-tags.toml",
            &[Inv12, Inv11, Inv7, Inv15, Forbidden, Panic],
            "a place is free before the page that is read from it is there"
        ),
        exhibit!("Z-E5", ZE5, "tags-fork.toml", &[Inv1], "a copy has the bytes and not the tags"),
        exhibit!("Z-E6", ZE6, "merge-tags.toml", &[Inv12], "pages of equal bytes become one, whatever their tags"),
        exhibit!(
            "Z-E7",
            ZE7,
            "tags-device.toml",
            &[Inv7],
            "a device is mapped as Normal memory where a machine with tags had memory"
        ),
        exhibit!(
            "Z-E8",
            ZE8,
            "swap-off.toml",
            &[Inv15, Panic],
            "a swap device is removed while a second sharer's page is out"
        ),
        exhibit!("Z-G2", ZG2, "difference.toml", &[Written], "a difference misses a page that was written in between"),
        exhibit!(
            "Z-G4",
            ZG4,
            "fork-live.toml",
            &[Written, Inv11, Forbidden, Inv3, Inv7],
            "a fork does not wait for faults that publish"
        ),
        exhibit!(
            "Z-G5",
            ZG5,
            "fork-reclaim.toml",
            &[Inv7, Inv15, Panic],
            "tables that a fork detached are freed under a fault"
        ),
        exhibit!("Z-X1", ZX1, "block-edge.toml", &[Inv5, Inv3], "a block reaches beyond its slot"),
        exhibit!("Z-X2", ZX2, "read-only-slot.toml", &[Inv13, Inv11, Forbidden], "a read-only slot is mapped writable"),
        exhibit!("Z-X3", ZX3, "cache-hole.toml", &[Inv10, Inv7, Inv11], "a page-frame cache is on no list"),
        exhibit!("Z-X4", ZX4, "kept-hole.toml", &[Forbidden, Inv7], "a frame is kept whatever has moved"),
        exhibit!("Z-C1-shadow", ZC1, "shadow-create.toml", &[Inv9, Inv8, Shadow], "the same by shadow tables"),
        exhibit!("Z-C2-shadow", ZC2, "shadow-wrap.toml", &[Inv9], "what a word keeps of a generation is compared"),
        exhibit!(
            "Z-C3-shadow",
            ZC3,
            "shadow-replace.toml",
            &[Shadow, Forbidden],
            "an MMIO entry takes the place of a shadow entry that is not flushed"
        ),
        exhibit!("Z-C5", ZC5, "shadow-invlpg.toml", &[Shadow, Forbidden], "INVLPG leaves an MMIO entry"),
        exhibit!(
            "Z-C6-shadow",
            ZC6,
            "shadow-room.toml",
            &[Inv7],
            "the frames of shadow tables are used again under a walk"
        ),
        exhibit!("Z-C8-shadow", ZC8, "shadow-create.toml", &[Inv8, Inv9], "the same by shadow tables"),
        exhibit!(
            "Z-X5",
            ZX5,
            "shadow-fill.toml",
            &[Shadow, Forbidden],
            "a walk counts that was made before its tables were protected"
        ),
        exhibit!("Z-X6", ZX6, "shadow-cr3.toml", &[Shadow, Forbidden], "shadow tables are compared before the flush"),
        exhibit!("Z-X7", ZX7, "shadow-delete.toml", STALE_SHADOW, "shadow entries outlive an invalidation"),
        exhibit!("Z-X8", ZX8, "shadow-again.toml", &[Shadow, Forbidden], "a fault's second try believes its first"),
        exhibit!("Z-X7-move", ZX7, "shadow-move.toml", STALE_SHADOW, "the same where a slot moves"),
        exhibit!("Z-X7-zap", ZX7, "shadow-zap.toml", STALE_SHADOW, "the same where the owner takes a page away"),
        exhibit!("Z-X7-log", ZX7, "shadow-log.toml", STALE_SHADOW, "the same where a log is fetched"),
        exhibit!("Z-X7-fork", ZX7, "shadow-fork.toml", STALE_SHADOW, "the same where a machine is forked"),
        exhibit!(
            "Z-X12",
            ZX12,
            "shadow-roots.toml",
            &[Shadow, Forbidden],
            "a root that was loaded before is not compared when it is loaded again"
        ),
        exhibit!(
            "Z-X9",
            ZX9,
            "shadow-link.toml",
            &[Shadow, Forbidden],
            "a way comes to a shadow table that is there, and it is not compared"
        ),
        exhibit!(
            "Z-X10",
            ZX10,
            "shadow-fill.toml",
            &[Shadow, Forbidden],
            "a walk counts that was made before the flush of what it read"
        ),
        exhibit!(
            "Z-X11",
            ZX11,
            "shadow-device.toml",
            &[Shadow],
            "a load of CR3 leaves what the vCPU knows to be no memory"
        ),
    ]
};

/// Schedules that a bug may take to be found: an exhaustive search at the scenario's bound, and 5,000 each of PCT and
/// sticky.
pub fn budget() -> Plan {
    Plan { limit: Duration::from_secs(60), ..Plan::default() }
}

impl Exhibit {
    /// The exhibit of that name, whatever its case.
    pub fn named(name: &str) -> Option<Self> {
        ZOO.into_iter().find(|exhibit| exhibit.name.eq_ignore_ascii_case(name))
    }

    /// Its scenario.
    ///
    /// # Panics
    ///
    /// If the file is wrong, which a test rules out.
    pub fn scenario(&self) -> Scenario {
        Scenario::parse(self.text).unwrap_or_else(|error| panic!("{}: {error}", self.file))
    }

    /// Looks for the bug with the checkers given.
    pub fn hunt(&self, checks: Checks, plan: &Plan) -> Report {
        let setting = Setting { bugs: &[self.bug], checks, ..Setting::default() };
        let scenario = self.scenario();
        explore(&scenario, setting, &plan.fitting(&scenario), &|_| {})
    }

    /// Looks for anything in the same scenario without the bug, with ten times the random part of the plan.
    pub fn control(&self, plan: &Plan) -> Report {
        let plan = Plan { pct: plan.pct * 10, sticky: plan.sticky * 10, limit: plan.limit * 10, ..*plan };
        let scenario = self.scenario();
        explore(&scenario, Setting::default(), &plan.fitting(&scenario), &|_| {})
    }
}
