//! Memory slots: which guest frames are memory, and what stands behind them.
//!
//! Purpose: a slot maps a range of guest frames to `(object, offset)` (D1). This crate keeps the slots of one virtual
//! machine, answers lookups by guest frame and by object range, and changes them by the table "Slot updates" of the
//! specification (`vm-memory`). What an object is, it does not know: [`ObjectId`] is an opaque number here.
//!
//! Protocol of a reader: pin the epoch, [`Slots::find`], act, ask [`Slots::is_current`] before publishing anything that
//! depends on the answer, publish, unpin. No lock, and no store but the caller's own [`Hint`].
//!
//! Protocol of a writer: [`Slots::update`] decides, purely ([`decide()`]), and takes the update lock. Create and
//! flags-only need one publication; delete and move go: mark invalid → publish → the caller flushes the second stage →
//! the caller prepares → publish again. Dropping the update half-way puts the slot back (Z-F2). One publication is:
//! edit the set that nobody reads, make it the active one and set the in-progress mark in one store, wait a grace
//! period, then edit the other set likewise, move the generation and clear the mark. Whoever saw the old set is gone
//! before the generation moves (Z-F1), so whoever sees a generation without the mark saw the set that belongs to it.
//!
//! The caller's part: it waits for running notifier invalidations before `update`, lets none begin until the update
//! has ended, and its own CPU is not pinned while it publishes.
//!
//! Invariants: INV-5 (a slot lies inside its object's extent, and slots of one machine never overlap), INV-8, INV-9
//! (a lookup is current ⇔ its generation is, and no update is in progress). Lookup is one compare for a hint that
//! hits, logarithmic otherwise, for both directions. Nothing is allocated after creation.
//!
//! Lock order: the update lock is taken before any lock of the second stage; readers take none.
//!
//! Known holes: one address space. An insertion in the middle shifts the order arrays, so creating `n` slots in
//! descending order costs `n²/2` small moves.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod decide;
mod error;
mod reverse;
mod set;
mod slot;
mod slots;
mod update;

#[cfg(test)]
mod tests;

pub use decide::{Change, ObjectShape, SlotRequest, decide};
pub use error::{ErrorKind, SlotError};
pub use set::{Mappings, Set};
pub use slot::{Generation, ObjectId, Slot, SlotFlags, SlotRef};
pub use slots::{CreateError, Hint, MAX_SLOTS, Place, Slots};
pub use update::{MOST_PUBLICATIONS, Ready, Update, Withdraw};
