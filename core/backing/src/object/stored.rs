//! Pages of an object that are in a store: saying so, and bringing them into memory.
//!
//! Protocol of bringing one in: whoever needs the page is told its place ([`GrantError::Stored`]); [`Fetch::new`] takes a frame;
//! the store's keeper fills the frame; [`Fetch::filled`]; [`Object::restore`] for every object and frame that waits for this place, which
//! then share the frame; [`Fetch::give_back`]. What fails is given back without being filled, and whoever waited asks again.
//! Protocol of taking one out: with its translations gone, and none made meanwhile, [`Object::begin_out`]; a grace period, so that
//! nobody writes the frame who was granted it before; whoever keeps the store writes the frame there; [`Out::finish`]; and later, again
//! with its translations gone, [`Object::discard`].
//!
//! Tags go where the bytes go: [`Out::tags`] are written to the place with the page, both or neither, and whoever fills a frame from a
//! place that has tags ([`Fetch::is_tagged`]) hands them to [`Fetch::filled`]. The frame's tags are valid before a word names it, so no guest
//! sees others (INV-11, INV-12); as the place keeps them until nobody refers to it, doing so twice is harmless.
//!
//! Nothing is locked meanwhile: if the page has come by another way, was punched, or its object is gone, the frame is given
//! back like any other.

use core::fmt;

use entresol_addr::Pfn;
use entresol_machine::{Machine, Tags};
use entresol_sync::planted;

use super::{Kind, Object};
use crate::tree::Look;
use crate::{GrantError, Order, OutOfMemory, StoreError, StoreId, StoreSlot, Supply};

/// A frame for what a place of a store holds. It has a reference to each.
#[must_use = "the frame and the reference are lost if it is dropped"]
#[derive(Debug)]
pub struct Fetch {
    pfn: Pfn,
    slot: StoreSlot,
    tagged: bool,
    filled: bool,
}

/// A page that is being written to a store. It has a reference to the frame and one to the place.
#[must_use = "the references are lost if it is dropped"]
#[derive(Debug)]
pub struct Out {
    pfn: Pfn,
    slot: StoreSlot,
    tagged: bool,
}

impl Out {
    /// The frame; nobody writes it once a grace period has passed.
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// Where it is to be written.
    pub fn slot(&self) -> StoreSlot {
        self.slot
    }

    /// The tags that are to be written with it, if it has some; nobody changes them, as the bytes.
    pub fn tags<M: Machine>(&self, machine: &M) -> Option<Tags> {
        self.tagged.then(|| machine.load_tags(self.pfn))
    }

    /// It was written, and reads so from now on; or it was not, and stays in memory.
    pub fn finish<M: Machine>(self, supply: &Supply<'_, M>, written: bool) {
        if written {
            supply.pool.stores().set_valid(self.slot);
        } else {
            supply.pool.stop_keeping_at(self.pfn, self.slot);
        }
        supply.pool.release(self.pfn);
        supply.pool.stores().release(self.slot);
    }
}

/// Why a page was not prepared to leave memory. What the object reads as did not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutError {
    /// No place for it.
    Store(StoreError),
    /// No frame for the node that a block is split into.
    OutOfMemory,
}

impl fmt::Display for OutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(error) => error.fmt(f),
            Self::OutOfMemory => OutOfMemory.fmt(f),
        }
    }
}

impl core::error::Error for OutError {}

impl From<StoreError> for OutError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<OutOfMemory> for OutError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

/// Why a page was not put into a store's place. What the object reads as did not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutError {
    /// Only anonymous memory can be stored.
    Kind {
        /// What it is.
        kind: Kind,
    },
    /// Memory with tags comes from a store that has them, and no other memory does.
    Tags {
        /// Whether the object has some.
        object: bool,
    },
    /// What is stored comes into memory through frames that are mapped: private memory is not stored.
    Private,
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
            Self::Tags { object } => write!(f, "object with tags: {object}: the store's pages must be the same"),
            Self::Private => f.write_str("object: must not be private memory"),
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
        let stores = supply.pool.stores();
        let tagged = stores.is_tagged(slot);
        if planted!(ZE4) {
            stores.release(slot);
        }
        Ok(Some(Self { pfn, slot, tagged, filled: false }))
    }

    /// The frame that holds the same already, if there is one: it needs no filling. The caller is pinned.
    pub fn cached<M: Machine>(supply: &Supply<'_, M>, slot: StoreSlot) -> Option<Self> {
        let pfn = supply.pool.share_kept(slot)?;
        Some(Self { pfn, slot, tagged: supply.pool.stores().is_tagged(slot), filled: true })
    }

    /// The frame to fill.
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// Where its content lies.
    pub fn slot(&self) -> StoreSlot {
        self.slot
    }

    /// Whether the place has tags beside the page.
    pub fn is_tagged(&self) -> bool {
        self.tagged
    }

    /// The frame holds what the place does, as every CPU reads it, and gets these tags, which are those of the place.
    ///
    /// # Panics
    ///
    /// If the place has tags and there are none here, or the other way round.
    pub fn filled<M: Machine>(&mut self, supply: &Supply<'_, M>, tags: Option<&Tags>) {
        assert_eq!(tags.is_some(), self.tagged, "tags come back with the page that they left with");
        if !self.filled {
            if let Some(tags) = tags {
                supply.machine.store_tags(self.pfn, tags);
            }
            if planted!(ZE1) {
                supply.pool.stores().lose_tags(self.slot);
            }
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
        if self.is_private() {
            return Err(PutError::Private);
        }
        let object = self.is_tagged();
        if supply.pool.stores().is_tagged(slot) != object {
            return Err(PutError::Tags { object });
        }
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

    /// Frame `frame` is to leave memory for `store`: if its page is in none yet, it becomes clean, and must be written. `None`:
    /// there is nothing to write. The caller is pinned, has removed every translation to the page, of relatives too, and keeps new
    /// ones from being made meanwhile. A block of the object's own becomes pages; a shared one stays.
    ///
    /// # Errors
    ///
    /// [`OutError`].
    pub fn begin_out<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        frame: u64,
        store: StoreId,
    ) -> Result<Option<Out>, OutError> {
        // Whoever writes to stores reads frames by their addresses: private memory stays.
        if !matches!(self.kind(), Kind::Anonymous(_)) || self.is_private() || frame >= self.frames() {
            return Ok(None);
        }
        let _structure = self.structure.lock();
        let leaving = self.tree.begin_out(supply, frame, store)?;
        Ok(leaving.map(|(pfn, slot)| Out { pfn, slot, tagged: self.is_tagged() }))
    }

    /// Frame `frame` leaves memory, if its page is clean and where it was to be written is valid. Whether it left. The caller is as in
    /// [`Self::begin_out`].
    pub fn discard<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> bool {
        matches!(self.kind(), Kind::Anonymous(_)) && frame < self.frames() && self.tree.discard(supply, frame)
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
