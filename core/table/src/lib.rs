//! Second-stage tables: where a guest's frames are in the machine's memory.
//!
//! Purpose: the tables that a hardware walker reads and that every CPU may change at once. The crate knows levels,
//! sizes and the life of an entry; the bits of a descriptor belong to a [`Format`] of `arch/*`. The granule is 4 KiB, a
//! frame holds 512 words, levels are 0–3 with leaves of 1 GiB, 2 MiB and 4 KiB at levels 1, 2 and 3.
//!
//! # Words
//!
//! A word is seen as three types: the raw `u64`, the decoded [`Entry`], and for an entry that one CPU has taken out of
//! service, an owned claim (`claim::Broken`, then `claim::Blank`). An invalid word is one of:
//!
//! | word | meaning | who may change it | what others do |
//! |---|---|---|---|
//! | vacant (0, or an MMIO entry) | nothing is here, and no TLB holds anything for here | anyone, by compare-and-swap | install |
//! | claimed | one call will put something valid here | its claimant | a fault gets `Busy`; a range operation waits |
//! | removed(t) | gone, but TLBs may hold it | the [`FlushDebt`] with ticket `t` | `Busy`; range operations pass |
//! | frozen | the table page itself is unlinked | nobody, until the frame is reused | `Busy`; start again at the root |
//!
//! # Protocol
//!
//! * A fault installs an entry with one compare-and-swap from vacant. If the page needs work before it may be seen
//!   (INV-1), the word is claimed first, the work is done, then the entry is stored: nothing is visible before it is
//!   clean, and only the winner does the work.
//! * A valid entry changes its output address, size or memory type only through claimed or removed, a TLB invalidation
//!   and its completion (INV-2; Arm DDI 0487 D8.16.1, break-before-make). A change of permissions or of the access flag
//!   alone happens in place, which the same section allows, with a TLB invalidation after it.
//! * A table page that leaves the tree is unlinked first (its parent's word becomes claimed or removed), then every one
//!   of its words is frozen. Who still stands in the page either changed a word before it was frozen, and then the
//!   freezer found that entry and took care of it, or finds it frozen and starts again: no translation is installed in
//!   a page that nobody can find. The page goes into a [`Retired`] chain, linked through its own frozen words, and may
//!   be reused when the TLB invalidation has completed *and* every CPU that was walking has left (grace period).
//! * A format may have MMIO entries: words of the last level that map nothing and remember why (`mmio`). To everything here
//!   but their own operations they are vacant, and whoever installs swaps against the very word that it saw.
//! * What can fail comes first: table pages are in a [`Reserve`] before anything changes, and stay there on every
//!   error.
//! * The VMID is read after the word has changed, behind a full barrier, through [`VmidSource`]: a VM that gets a new
//!   VMID meanwhile either is flushed under it or walks the changed table.
//!
//! * All of a table can be taken away at once ([`Table::detach`]): the root's words move into other frames, so what hangs
//!   from them is out of reach after one flush, and is taken apart later, piece by piece.
//!
//! Claims are held for one call's bounded work, and a claimant waits only for claims strictly below its own word;
//! range operations hold none while they wait. So waiting ends.
//!
//! # Invariants
//!
//! INV-1 and INV-2 as above. INV-5 as far as this crate can see it: a leaf is aligned to its size on both sides. INV-7
//! for table pages: each is in the tree, in a `Reserve`, in a `FlushDebt` or in a `Retired`, and leaves each of these by
//! value.
//!
//! # Lock order
//!
//! None is taken. Every call that walks happens inside the machine's grace period ([`entresol_sync::Epoch::pin`]).
//!
//! # Known holes
//!
//! * Waiting for a claim is a spin loop; the explorer will need to schedule it.
//! * Tables are 48-bit: no LPA2, no 52-bit addresses. The contiguous hint is not used.
//! * Counters are exact when nothing is in flight; a reader in between may see an operation half counted.
#![no_std]
#![forbid(unsafe_code)]

mod claim;
mod counters;
mod cursor;
mod debt;
mod detach;
mod entry;
mod freeze;
mod geometry;
mod map;
mod marker;
mod mmio;
mod relax;
mod reserve;
mod resize;
mod sweep;
mod table;
mod unmap;
mod vmid;
mod work;
mod write;

pub use counters::Census;
pub use debt::{FlushDebt, Retired, Settled};
pub use detach::Detached;
pub use entresol_machine::Vmid;
pub use entry::{Entry, Format, Leaf, Memory, MmioEntry, Permissions, VACANT};
pub use geometry::{Geometry, LEAF_LEVEL, index, level_of, shift, size_at};
pub use map::{MapError, Mapped};
pub use mmio::{End, Way};
pub use relax::RelaxError;
pub use reserve::Reserve;
pub use resize::{MergeError, SplitError};
pub use sweep::Straddle;
pub use table::{RootError, Table, Walk};
pub use vmid::VmidSource;
pub use work::PageWork;
