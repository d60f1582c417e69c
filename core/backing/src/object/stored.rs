//! Pages of an object that are in a store: saying so, and bringing them into memory.
//!
//! Protocol of bringing one in: whoever needs the page is told its place ([`GrantError::Stored`]); [`Fetch::new`] takes a frame;
//! the store's keeper fills the frame; [`Fetch::filled`]; [`Object::restore`] for every object and frame that waits for this place, which
//! then share the frame; [`Fetch::give_back`]. What fails is given back without being filled, and whoever waited asks again.
//! Nothing is locked meanwhile: if the page has come by another way, was punched, or its object is gone, the frame is given
//! back like any other.

use core::fmt;

use entresol_addr::Pfn;
use entresol_machine::Machine;

use super::{Kind, Object};
use crate::tree::Look;
use crate::{GrantError, Order, OutOfMemory, StoreError, StoreSlot, Supply};

/// A frame for what a place of a store holds. It has a reference to each.
#[must_use = "the frame and the reference are lost if it is dropped"]
#[derive(Debug)]
pub struct Fetch {
    pfn: Pfn,
    slot: StoreSlot,
    filled: bool,
}

/// Why a page was not put into a store's place. What the object reads as did not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutError {
    /// Only anonymous memory can be stored.
    Kind {
        /// What it is.
        kind: Kind,
    },
    /// The frame was touched already, or lies in a part that is shared or a block.
    Occupied {
        /// The frame.
        frame: u64,
    },
    /// No such place.
    Store(StoreError),
    /// [`GrantError::Outside`], [`GrantError::OutOfMemory`], [`GrantError::Forking`], or [`GrantError::Busy`]: then try again.
    Grant(GrantError),
}

impl fmt::Display for PutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kind { kind } => write!(f, "object {kind:?}: must be anonymous memory"),
            Self::Occupied { frame } => write!(f, "frame {frame:#x}: must not have been touched"),
            Self::Store(error) => error.fmt(f),
            Self::Grant(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for PutError {}

impl From<StoreError> for PutError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl Fetch {
    /// A frame, whatever is in it, for the page at `slot`. `None`: nobody refers to the place any more, so nobody waits.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`].
    pub fn new<M: Machine>(supply: &Supply<'_, M>, slot: StoreSlot) -> Result<Option<Self>, OutOfMemory> {
        let pfn = supply.pool.take(supply.cpu, Order::PAGE)?;
        if !supply.pool.stores().retain(slot) {
            supply.pool.give(supply.cpu, pfn, Order::PAGE);
            return Ok(None);
        }
        Ok(Some(Self { pfn, slot, filled: false }))
    }

    /// The frame to fill.
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// Where its content lies.
    pub fn slot(&self) -> StoreSlot {
        self.slot
    }

    /// The frame holds what the place does, as every CPU reads it.
    pub fn filled<M: Machine>(&mut self, supply: &Supply<'_, M>) {
        if !self.filled {
            // The reference of the one who fetched becomes the frame's.
            let kept = supply.pool.keep(self.pfn, self.slot);
            assert!(kept, "a frame that was just taken is not kept yet");
            self.filled = true;
        }
    }

    /// Gives back what is not used: the frame stays where it was put in.
    pub fn give_back<M: Machine>(self, supply: &Supply<'_, M>) {
        supply.pool.release(self.pfn);
        if !self.filled {
            supply.pool.stores().release(self.slot);
        }
    }
}

impl Object {
    /// Frame `frame`, which was never touched, reads as the place `slot` does. The object is not forked yet; the caller is
    /// pinned.
    ///
    /// # Errors
    ///
    /// [`PutError`].
    pub fn put_stored<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64, slot: StoreSlot) -> Result<(), PutError> {
        let Kind::Anonymous(_) = self.kind() else { return Err(PutError::Kind { kind: self.kind() }) };
        self.check_inside(frame)?;
        self.tree.put_stored(supply, frame, slot)
    }

    /// Puts a page that was fetched and filled where frame `frame` says that it is stored. `false`: the page is not stored there
    /// any more; it has come by another way, or is gone. Whoever waits for it looks again in any case. The caller is pinned.
    ///
    /// # Panics
    ///
    /// If nobody has said that the frame is filled.
    pub fn restore<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64, fetch: &Fetch) -> bool {
        assert!(fetch.filled, "what is put in was filled");
        match self.kind() {
            Kind::Anonymous(_) if frame < self.frames() => self.tree.restore(supply, frame, fetch),
            _ => false,
        }
    }

    /// The place where frame `frame` is stored, if no frame has it. The caller is pinned.
    pub fn stored_at<M: Machine>(&self, machine: &M, frame: u64) -> Option<StoreSlot> {
        self.check_inside(frame).ok()?;
        match self.look(machine, frame) {
            Look::Stored(slot) => Some(slot),
            Look::Present(_) | Look::Vacant => None,
        }
    }
}
