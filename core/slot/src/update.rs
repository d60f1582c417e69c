//! One update of the slots, step by step, each step a type.
//!
//! ```text
//! update ─┬→ Unchanged
//!         ├→ Publish(Ready) ───────────────────────────────────────┬─commit→ done
//!         └→ Withdraw ─invalidate→ Ready, flush, prepare may fail ─┴─drop──→ as before
//! ```
//!
//! Invariants: the update lock is held from the decision to the end. A slot that was marked invalid is either committed
//! or valid again when the `Ready` is gone, whatever the caller's preparation does (Z-F2).

use entresol_sync::{Epoch, MutexGuard, planted};

use crate::set::Validity;
use crate::{Change, ObjectShape, Slot, SlotError, SlotRequest, Slots, decide};

/// The most publications that one update makes: a slot is withdrawn, and then moved, deleted or put back.
pub const MOST_PUBLICATIONS: u64 = 2;

/// An accepted request, by what it needs next.
#[must_use = "an update that is dropped changes nothing"]
pub enum Update<'s> {
    /// Everything is as asked already; the generation stays.
    Unchanged,
    /// Create, or flags only: prepare, then commit.
    Publish(Ready<'s>),
    /// Delete or move: the slot must be withdrawn first.
    Withdraw(Withdraw<'s>),
}

/// The lock, and what was decided under it.
struct Decided<'s> {
    slots: &'s Slots,
    epoch: &'s Epoch,
    change: Change,
    _updating: MutexGuard<'s, ()>,
}

/// A slot to be withdrawn from its guest frames.
#[must_use = "dropping it changes nothing"]
pub struct Withdraw<'s> {
    decided: Decided<'s>,
    from: Slot,
}

/// A change that only has to be prepared and published.
#[must_use = "dropping it reverts the update"]
pub struct Ready<'s> {
    decided: Decided<'s>,
    /// The slot that is marked invalid now, if one is.
    withdrawn: Option<Slot>,
}

impl<'s> Update<'s> {
    pub(crate) fn begin(
        slots: &'s Slots,
        epoch: &'s Epoch,
        request: &SlotRequest,
        object: Option<ObjectShape>,
    ) -> Result<Self, SlotError> {
        let updating = slots.updating.lock();
        let change = decide(slots.published(), slots.limit(), request, object)?;
        let decided = Decided { slots, epoch, change, _updating: updating };
        Ok(match change {
            Change::Nothing => Self::Unchanged,
            Change::Create(_) | Change::Flags { .. } => Self::Publish(Ready { decided, withdrawn: None }),
            Change::Delete(from) | Change::Move { from, .. } => Self::Withdraw(Withdraw { decided, from }),
        })
    }
}

impl<'s> Withdraw<'s> {
    /// What was decided.
    pub fn change(&self) -> Change {
        self.decided.change
    }

    /// Marks the slot invalid and publishes that: when this returns, no guest frame finds it, and every reader that
    /// did is gone. The caller then flushes the second stage of [`Ready::withdrawn`], before it commits.
    pub fn invalidate(self) -> Ready<'s> {
        let Self { decided, from } = self;
        decided.slots.publish(decided.epoch, from.id, Some((from, Validity::Invalid)));
        Ready { decided, withdrawn: Some(from) }
    }
}

impl Ready<'_> {
    /// What was decided.
    pub fn change(&self) -> Change {
        self.decided.change
    }

    /// The slot whose guest frames must be flushed from the second stage before `commit`.
    pub fn withdrawn(&self) -> Option<Slot> {
        self.withdrawn
    }

    /// Publishes the change. When this returns every reader sees it, and the generation has moved.
    pub fn commit(mut self) {
        let (id, to) = match self.decided.change {
            Change::Nothing => return,
            Change::Delete(slot) => (slot.id, None),
            Change::Create(to) | Change::Move { to, .. } | Change::Flags { to, .. } => {
                (to.id, Some((to, Validity::Valid)))
            }
        };
        self.withdrawn = None;
        self.decided.slots.publish(self.decided.epoch, id, to);
    }

    /// Gives up: the slots are as they were before the update. The same as dropping.
    pub fn revert(self) {}
}

impl Drop for Ready<'_> {
    fn drop(&mut self) {
        if planted!(ZF2) {
            return;
        }
        if let Some(slot) = self.withdrawn {
            self.decided.slots.publish(self.decided.epoch, slot.id, Some((slot, Validity::Valid)));
        }
    }
}
