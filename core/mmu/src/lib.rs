//! The pipeline: from a fault to an installed entry, or to an exact reason why not.
//!
//! Purpose: the only crate that names every stage. A fault becomes a slot, the slot's object a grant, the grant an
//! entry; [`Vm::handle`] reads as that line. Changes of backing come the other way, through the notifier.
//!
//! Protocol of a fault:
//! 1. pin the grace period (the caller does); 2. sample the notifier; 3. find the slot, ask its object; 4. choose size
//!    and permissions; 5. ask notifier and slots again; 6. win the entry, clean, publish. Anything that moved in between
//!    is a [`Outcome::Retry`] and nothing was published.
//!
//! Protocol of an invalidation: `start` the notifier, wait a grace period, unmap, flush; change the backing; `end`. The
//! grace period makes step 5 and 6 one: a fault that asked before `start` has published before the unmap begins, and one
//! that asks later sees it in progress (INV-3).
//!
//! Memory that relatives share has its own chapter, `share`; the fork of a machine is in `fork`; equal pages of strangers
//! become one in `merge`; what a guest gives back is `discard`'s, what a private one shares `convert`'s; frames that are bad are
//! `poison`'s.
//!
//! Invariants: INV-1, INV-2, INV-3, INV-4, INV-5, INV-6, INV-7, INV-8, INV-14. Nothing here allocates after creation but frames.
//! Lock order: merging → fork → dirty logs → slot update → notifier → object → pool. Faults take no lock but a pool's.
//!
//! An access that lies outside every slot leaves the pin with that answer: whoever emulates it looks again in the pin in which it
//! answers, and has the guest try again if a slot is there by then (INV-9). Formats with MMIO entries have a shorter way to that
//! answer: `mmio`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod absent;
mod access;
mod coalesced;
mod completion;
mod convert;
mod create;
mod dirty;
mod discard;
mod fork;
mod guest;
mod handle;
mod host;
mod invalidate;
mod kept;
mod lease;
mod maintain;
mod mapping;
mod mark;
mod merge;
mod mmio;
mod notifier;
mod out;
mod outcome;
mod pfncache;
mod poison;
mod shadow;
mod share;
mod stats;
mod switches;
mod tags;
mod vm;
mod vmid;
mod young;

#[cfg(test)]
mod convert_tests;
#[cfg(test)]
mod discard_tests;
#[cfg(test)]
mod fork_tests;
#[cfg(test)]
mod kept_tests;
#[cfg(test)]
mod mmio_tests;
#[cfg(test)]
mod pfncache_property_tests;
#[cfg(test)]
mod pfncache_tests;
#[cfg(test)]
mod poison_tests;
#[cfg(test)]
mod shadow_tests;
#[cfg(test)]
mod tag_tests;
#[cfg(test)]
mod tests;

pub use absent::Absent;
pub use coalesced::{CoalescedRing, CoalescedWrite, Full};
pub use completion::{Completion, Instruction};
pub use convert::{ConvertError, MemoryFault};
pub use create::CreateError;
pub use dirty::{LogError, LogPart, RESERVE, Ring, RingEntry, RingFull, RingState, RingsError};
pub use discard::{Busy, Discarded};
pub use fork::ForkError;
pub use guest::CopyError;
pub use host::Host;
pub use invalidate::InvalidateError;
pub use kept::Kept;
pub use maintain::{Maintenance, ReadOnlyIvac};
pub use mark::Mark;
pub use merge::{MergeError, MergeRefusal, Merging, Scan};
pub use mmio::{MmioCache, MmioCounts};
pub use notifier::{Invalidation, Notifier, Sample, TooMany};
pub use out::{Frames, LeaveError, Shown, begin_out, discard};
pub use outcome::{Abort, Outcome, Reason};
pub use pfncache::{CacheError, Piece};
pub use poison::{PoisonError, Poisoned};
pub use shadow::{ShadeError, ShadowOutcome, ShadowWords};
pub use stats::{Counter, Stats};
pub use switches::Switches;
pub use tags::TagError;
pub use vm::{Options, Vm};
pub use vmid::{VmVmid, Vmids};

/// The heap has no room for what a machine or a virtual machine needs at its creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfHeap;
