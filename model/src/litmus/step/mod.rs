//! One step of a script, from text.
//!
//! A step is a verb and its arguments; a virtual machine's name and a colon may stand before it, and `-> NAME` after a
//! step that has a result. Numbers are decimal or `0x` hexadecimal. [`VERBS`] is the whole grammar; [`words`] takes a text
//! apart, [`parse`] makes a step of it.

mod parse;
#[cfg(test)]
mod tests;
mod words;

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SHIFT};

use crate::guest::operation::Operation;
pub use words::number;

/// What a verb looks like and does, for errors and for the documentation.
pub const VERBS: [(&str, &str); 65] = [
    ("load GPA", "the vCPU loads the word at GPA"),
    ("store GPA VALUE", "the vCPU stores a word"),
    ("fetch GPA", "the vCPU fetches the instruction word at GPA"),
    ("ldxr GPA", "the vCPU loads a word and watches it"),
    ("stxr GPA VALUE", "the vCPU stores a word if nobody stored there since its ldxr: 0, or 1 if it did not"),
    ("ldg GPA", "the vCPU loads the allocation tag of the granule at GPA"),
    ("stg GPA VALUE", "the vCPU stores the granule's tag"),
    ("walk data|fetch GPA", "the hardware reads the vCPU's stage-1 descriptor at GPA"),
    ("update data|fetch GPA", "the hardware sets the access flag of the stage-1 descriptor at GPA"),
    ("dc ivac|cvac|civac|cvau GPA", "the vCPU's maintenance of the line at GPA, with its barrier"),
    ("ic ivau GPA", "the same for instruction caches"),
    ("tlbi", "the vCPU's own TLB invalidation, which promises nothing about the second stage"),
    ("invlpg GPA", "with shadow tables: the vCPU flushes the page at this linear address; tlbi is its load of CR3"),
    ("cr3 GPA", "with shadow tables: the vCPU loads CR3 with another root; every CPU begins with 0x1000"),
    ("mmu on|off", "the vCPU's own translation: off makes its accesses Non-cacheable"),
    ("post COUNT", "the vCPU stores to a coalesced zone; the result is how many stores the ring took"),
    ("drain", "the owner takes the coalesced stores that wait; the result is how many"),
    ("leave", "the CPU stops running the virtual machine"),
    ("write GPA VALUE", "the owner stores a word to guest memory"),
    ("read GPA", "the owner reads a word of guest memory"),
    ("zap GPA PAGES", "the owner invalidates a range"),
    ("start GPA PAGES", "invalidate_range_start"),
    ("end", "invalidate_range_end of the CPU's last start"),
    ("punch OBJECT FRAME COUNT", "the owner makes frames of an object vacant"),
    ("populate OBJECT FRAME COUNT", "the owner makes frames of an object present"),
    ("fork VM OBJECT", "VM, which is not there before, becomes a fork, and OBJECT its memory"),
    ("kill", "the owner ends the virtual machine, which nobody runs, and its memory"),
    ("differ OBJECT BASE", "the owner asks in what OBJECT and its relative BASE differ: in how many frames"),
    ("reclaim", "tables that forks detached, and tree nodes that nobody refers to, are taken apart"),
    ("unshare GPA", "the owner breaks the sharing of the page through the notifier"),
    ("notifier", "in setup: the virtual machine's copies on write go through the notifier"),
    ("merging", "in setup: the virtual machine's pages may become one with equal ones"),
    ("join GPA VM GPA", "the owner makes the page at GPA one with VM's at the second GPA, if both read the same"),
    ("slot ID GPA PAGES OBJECT OFFSET [ro]", "the owner creates a slot"),
    ("delete ID", "the owner deletes a slot"),
    ("move ID GPA", "the owner moves a slot"),
    ("flags ID log|none", "the owner changes a slot's flags"),
    ("revert ID", "the owner begins to delete a slot and gives up"),
    ("split GPA", "the block behind GPA becomes smaller leaves"),
    ("merge GPA", "the leaves around GPA become a 2 MiB block"),
    ("age GPA PAGES", "the owner clears access flags"),
    ("protect GPA PAGES", "the owner takes write permission away"),
    ("log get ID", "the owner fetches and clears a slot's dirty log: how many pages it names"),
    ("log read ID", "the owner reads a slot's dirty log"),
    ("log clear ID MASK", "the owner clears pages of the first 64 from a slot's dirty log"),
    ("rings", "every CPU's vCPU gets a dirty ring"),
    ("harvest CPU", "the owner harvests the ring of the CPU's vCPU: how many entries"),
    ("forge CPU SLOT OFFSET", "the first entry of a ring says something else"),
    ("reset", "the owner resets the dirty rings: how many entries were freed"),
    (
        "out GPA PAGES",
        "pages go out to the swap device, those written first that it does not have: how many left memory",
    ),
    ("out-fails GPA PAGES", "the same, and the device fails to write"),
    ("swap-off", "the swap device is removed: whatever is there comes back first"),
    ("clean-all", "the guest's set/way maintenance, trapped"),
    ("reap", "frames whose grace period is over become free, private ones zeroed"),
    ("lease GPA", "the hypervisor leases the page at GPA"),
    ("use", "it reads the word that it leased last, by its address"),
    ("release", "it releases what it leased last"),
    (
        "convert GPA PAGES open|private",
        "the guest shares pages of private memory with the hypervisor, or takes them back",
    ),
    ("poison GPA", "the frame behind the page at GPA is found to be bad: 1, or 0 if there is none that could be"),
    ("cache GPA", "the CPU's page-frame cache is for the word at GPA"),
    ("tell VALUE", "the word is stored through the cache: 1, or 0 if the cache knows nothing"),
    ("refresh", "the cache finds out where its word lies"),
    ("uncache", "the cache is for nothing"),
    ("keep GPA", "the hypervisor keeps the frame behind the page at GPA, if it can be kept"),
    ("recall", "it reads the word in the frame that it keeps, if that is still kept"),
];

/// Beside [`VERBS`], for `setup`: `vmids COUNT` wears VMIDs out, `generation COUNT` moves the generation of the slots ahead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A vCPU's access.
    Guest {
        /// Whose.
        vm: usize,
        /// What it does.
        what: Operation,
        /// Where, 8-byte aligned.
        gpa: Gpa,
        /// The register for the result.
        to: Option<String>,
    },
    /// The vCPU's MMU.
    Mmu {
        /// On or off.
        on: bool,
    },
    /// The vCPU's own TLB invalidation.
    Tlbi,
    /// The vCPU's own flush of one page, by its linear address.
    Invlpg {
        /// Whose.
        vm: usize,
        /// The address.
        linear: u64,
    },
    /// The vCPU's load of CR3 with the root of other tables.
    Cr3 {
        /// Whose.
        vm: usize,
        /// Where the root is.
        root: Gpa,
    },
    /// Stores to a coalesced zone.
    Post {
        /// How many.
        count: u64,
        /// The register for how many were taken.
        to: Option<String>,
    },
    /// The owner takes those that wait.
    Drain {
        /// The register for how many there were.
        to: Option<String>,
    },
    /// The CPU puts its virtual machine.
    Leave,
    /// The owner's store.
    Write {
        /// Whose memory.
        vm: usize,
        /// Where.
        gpa: Gpa,
        /// What.
        value: u64,
    },
    /// The owner's load.
    Read {
        /// Whose memory.
        vm: usize,
        /// Where.
        gpa: Gpa,
        /// The register for the result.
        to: Option<String>,
    },
    /// Something about a range of guest frames.
    Range {
        /// Whose.
        vm: usize,
        /// Which frames.
        range: GfnRange,
        /// What.
        what: RangeVerb,
    },
    /// `invalidate_range_end`.
    End,
    /// A virtual machine becomes a fork of another.
    Fork {
        /// The parent.
        vm: usize,
        /// The child.
        child: usize,
        /// The child's memory.
        object: usize,
        /// The register for 0.
        to: Option<String>,
    },
    /// A virtual machine is ended.
    Kill {
        /// Which.
        vm: usize,
        /// The register for 0.
        to: Option<String>,
    },
    /// Two relatives are compared.
    Differ {
        /// One.
        object: usize,
        /// The other.
        base: usize,
        /// The register for how many frames differ.
        to: Option<String>,
    },
    /// What forks left is taken apart.
    Reclaim,
    /// The notifier's way to a page of one's own.
    Unshare {
        /// Whose.
        vm: usize,
        /// Where.
        gpa: Gpa,
    },
    /// Its copies on write go through the notifier.
    Notifier {
        /// Whose.
        vm: usize,
    },
    /// Its memory takes part in merging.
    Merging {
        /// Whose.
        vm: usize,
    },
    /// Two pages become one, if they are equal.
    Join {
        /// Whose.
        vm: usize,
        /// Where.
        gpa: Gpa,
        /// Whose the other is.
        other: usize,
        /// Where that is.
        other_gpa: Gpa,
    },
    /// Something about frames of an object.
    Object {
        /// Which object.
        object: usize,
        /// First frame.
        frame: u64,
        /// How many.
        count: u64,
        /// Vacant rather than present.
        punch: bool,
    },
    /// Something about a slot.
    Slot {
        /// Whose.
        vm: usize,
        /// Which.
        id: u32,
        /// What.
        what: SlotVerb,
    },
    /// Something about the dirty log of a slot.
    Log {
        /// Whose.
        vm: usize,
        /// Which slot.
        id: u16,
        /// What.
        what: LogVerb,
        /// The register for the result.
        to: Option<String>,
    },
    /// Something about the dirty rings of a virtual machine.
    Ring {
        /// Whose.
        vm: usize,
        /// What.
        what: RingVerb,
        /// The register for the result.
        to: Option<String>,
    },
    /// Pages go out to the swap device.
    Out {
        /// Whose.
        vm: usize,
        /// Which.
        range: GfnRange,
        /// The device writes anything, and says that it failed.
        fails: bool,
        /// The register for how many left memory.
        to: Option<String>,
    },
    /// The swap device is removed.
    SwapOff {
        /// The register for 0.
        to: Option<String>,
    },
    /// Set/way maintenance.
    CleanAll {
        /// Whose.
        vm: usize,
    },
    /// Deferred frames become free.
    Reap,
    /// A page is leased.
    Lease {
        /// Whose.
        vm: usize,
        /// Where.
        gpa: Gpa,
    },
    /// What was leased last is read by its address.
    Use {
        /// The register for the result.
        to: Option<String>,
    },
    /// What was leased last is released.
    Release,
    /// A frame is found to be bad.
    Poison {
        /// In whose memory.
        vm: usize,
        /// Behind which page.
        gpa: Gpa,
        /// The register for whether it was.
        to: Option<String>,
    },
    /// The slots' generation moves ahead.
    Generation {
        /// Whose.
        vm: usize,
        /// To what.
        count: u64,
    },
    /// Something about the CPU's page-frame cache.
    Cache {
        /// Whose.
        vm: usize,
        /// What.
        what: CacheVerb,
        /// The register for the result.
        to: Option<String>,
    },
    /// A frame is kept.
    Keep {
        /// Whose.
        vm: usize,
        /// Behind which word.
        gpa: Gpa,
    },
    /// The word in the frame that is kept is read.
    Recall {
        /// The register for it.
        to: Option<String>,
    },
    /// So many VMIDs are used up.
    Vmids {
        /// How many.
        count: u64,
    },
}

/// What happens to a range of guest frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeVerb {
    /// Invalidated at once.
    Zap,
    /// `invalidate_range_start`.
    Start,
    /// The block there is split.
    Split,
    /// The leaves there are merged.
    Merge,
    /// Access flags are cleared.
    Age,
    /// Write permission is taken away.
    Protect,
    /// Its pages are shared with the hypervisor, or private.
    Convert {
        /// Which of the two.
        open: bool,
    },
}

/// What happens to a page-frame cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheVerb {
    /// It is for the word at an address.
    Activate {
        /// Where.
        gpa: Gpa,
    },
    /// A word is stored through it.
    Tell {
        /// What.
        value: u64,
    },
    /// It looks again.
    Refresh,
    /// It is for nothing.
    Deactivate,
}

/// What happens to a dirty log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogVerb {
    /// It is fetched and cleared.
    Get,
    /// It is read.
    Read,
    /// These of its first 64 pages are cleared.
    Clear {
        /// Bit by bit.
        mask: u64,
    },
}

/// What happens to dirty rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingVerb {
    /// They are made.
    Make,
    /// One is harvested.
    Harvest {
        /// The CPU whose vCPU's it is.
        vcpu: u32,
    },
    /// The first entry of one is overwritten.
    Forge {
        /// The CPU whose vCPU's it is.
        vcpu: u32,
        /// What it names.
        slot: u32,
        /// What it names.
        offset: u64,
    },
    /// They are reset.
    Reset,
}

/// What happens to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotVerb {
    /// It is made.
    Create {
        /// Where.
        range: GfnRange,
        /// The object behind it.
        object: usize,
        /// The object's first frame.
        offset: u64,
        /// Guests may not write.
        read_only: bool,
    },
    /// It goes.
    Delete,
    /// It goes elsewhere.
    Move {
        /// Where to.
        base: Gfn,
    },
    /// Its flags become these.
    Flags {
        /// Writes are logged.
        log: bool,
    },
    /// It is withdrawn, and the update given up.
    Revert,
}

/// Why a text is no step.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("step {step:?}: {rule}")]
pub struct StepError {
    /// The text.
    pub step: String,
    /// What it must be.
    pub rule: String,
}

/// Names that steps may use, by their numbers.
#[derive(Clone, Copy, Debug)]
pub struct Names<'a> {
    /// Virtual machines.
    pub vms: &'a [String],
    /// Objects.
    pub objects: &'a [String],
}

impl Step {
    /// The register that it sets.
    pub fn result(&self) -> Option<&str> {
        match self {
            Self::Guest { to, .. }
            | Self::Read { to, .. }
            | Self::Fork { to, .. }
            | Self::Kill { to, .. }
            | Self::Differ { to, .. }
            | Self::Log { to, .. }
            | Self::Ring { to, .. }
            | Self::Post { to, .. }
            | Self::Out { to, .. }
            | Self::SwapOff { to }
            | Self::Use { to }
            | Self::Recall { to }
            | Self::Poison { to, .. }
            | Self::Cache { what: CacheVerb::Tell { .. }, to, .. }
            | Self::Drain { to } => to.as_deref(),
            _ => None,
        }
    }

    /// The virtual machine whose step it is.
    pub fn vm(&self) -> Option<usize> {
        match self {
            Self::Guest { vm, .. }
            | Self::Invlpg { vm, .. }
            | Self::Cr3 { vm, .. }
            | Self::Write { vm, .. }
            | Self::Read { vm, .. }
            | Self::Range { vm, .. }
            | Self::Fork { vm, .. }
            | Self::Kill { vm, .. }
            | Self::Unshare { vm, .. }
            | Self::Notifier { vm }
            | Self::Merging { vm }
            | Self::Slot { vm, .. }
            | Self::Log { vm, .. }
            | Self::Ring { vm, .. }
            | Self::Lease { vm, .. }
            | Self::Poison { vm, .. }
            | Self::Generation { vm, .. }
            | Self::Cache { vm, .. }
            | Self::Keep { vm, .. }
            | Self::Out { vm, .. }
            | Self::CleanAll { vm } => Some(*vm),
            _ => None,
        }
    }

    /// The virtual machine and the object that it makes.
    pub fn forks(&self) -> Option<(usize, usize)> {
        match self {
            Self::Fork { child, object, .. } => Some((*child, *object)),
            _ => None,
        }
    }

    /// The guest page that the step is about, for reports.
    pub fn page(&self) -> Option<(usize, Gfn)> {
        match self {
            Self::Guest { vm, gpa, .. } | Self::Write { vm, gpa, .. } | Self::Read { vm, gpa, .. } => {
                Some((*vm, Gfn::new(gpa.get() >> PAGE_SHIFT)))
            }
            _ => None,
        }
    }
}
