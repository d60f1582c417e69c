//! Where pages are while no frame has them: places in stores, and how many still refer to each store.
//!
//! Purpose: a word of a tree may say, instead of a frame, that a page's bytes lie in a place of a store ([`StoreSlot`]): a
//! snapshot's file, for example. This crate moves no bytes to or from there. It says which place is wanted
//! ([`crate::GrantError::Stored`]), takes the frame that somebody else has filled ([`crate::Object::restore`]), and counts.
//!
//! Protocol for whoever restores lazily: [`Stores::open`] the file; [`crate::Object::put_stored`] for each page of a fresh
//! object; [`Stores::close`], which is refused as long as a page is still there, or a frame is known to hold the same.
//!
//! References: a word that names a place is one; a frame that is known to hold the same bytes is one (such a frame is *kept*,
//! see [`crate::FramePool`]); whoever reads the place has one. Whoever copies a word retains the place first and looks at
//! the word again after; whoever takes a word away releases the place.
//!
//! Invariants: INV-7 (a release without a reference stops the machine, in release builds too); what an open store holds does
//! not change, so whoever reads it gets what the page was. Lock order: the one lock here is a leaf.

use core::fmt;

use entresol_sync::Mutex;

/// Stores that may be open at once.
pub const MAX_STORES: usize = 64;
const INDEX_BITS: u32 = 48;
/// The most places of a store.
const MAX_SLOTS: u64 = 1 << INDEX_BITS;

/// The name of an open store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StoreId(u8);

/// A place for one page in a store. 56 bits, so that a word of a tree can say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StoreSlot(u64);

impl StoreSlot {
    /// Bits that a place is named with.
    pub(crate) const BITS: u32 = INDEX_BITS + u8::BITS;

    /// Place `index`, taken modulo 2^48, of `store`.
    pub const fn new(store: StoreId, index: u64) -> Self {
        Self((store.0 as u64) << INDEX_BITS | index & (MAX_SLOTS - 1))
    }

    /// The store.
    pub const fn store(self) -> StoreId {
        StoreId((self.0 >> INDEX_BITS) as u8)
    }

    /// The number of the place, from 0.
    pub const fn index(self) -> u64 {
        self.0 & (MAX_SLOTS - 1)
    }

    #[inline]
    pub(crate) const fn from_raw(raw: u64) -> Self {
        Self(raw & ((1 << Self::BITS) - 1))
    }

    #[inline]
    pub(crate) const fn raw(self) -> u64 {
        self.0
    }
}

/// Why a store was not opened, closed or named. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreError {
    /// As many stores are open as may be.
    TooMany,
    /// A store of no places, or of more than can be numbered.
    Slots {
        /// What was asked for.
        value: u64,
        /// The most.
        limit: u64,
    },
    /// No open store of that name.
    Unknown {
        /// The name.
        store: StoreId,
    },
    /// The store ends before.
    Outside {
        /// The place.
        slot: StoreSlot,
        /// Places of the store.
        slots: u64,
    },
    /// Words, frames or readers still refer to it.
    InUse {
        /// How many.
        references: u64,
    },
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany => write!(f, "store: at most {MAX_STORES} may be open"),
            Self::Slots { value, limit } => write!(f, "places = {value}: must be from 1 to {limit}"),
            Self::Unknown { store } => write!(f, "store {}: must be open", store.0),
            Self::Outside { slot, slots } => write!(f, "place {}: the store has {slots}", slot.index()),
            Self::InUse { references } => write!(f, "store: {references} references to it are left"),
        }
    }
}

impl core::error::Error for StoreError {}

#[derive(Clone, Copy)]
struct Store {
    slots: u64,
    references: u64,
}

/// The open stores of a machine.
pub struct Stores(Mutex<[Option<Store>; MAX_STORES]>);

impl Stores {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new([None; MAX_STORES]))
    }

    /// Opens a store of `slots` places that all hold a page, and do not change while it is open.
    ///
    /// # Errors
    ///
    /// [`StoreError::TooMany`], [`StoreError::Slots`].
    pub fn open(&self, slots: u64) -> Result<StoreId, StoreError> {
        if slots == 0 || slots > MAX_SLOTS {
            return Err(StoreError::Slots { value: slots, limit: MAX_SLOTS });
        }
        let mut stores = self.0.lock();
        let place = stores.iter().position(Option::is_none).ok_or(StoreError::TooMany)?;
        stores[place] = Some(Store { slots, references: 0 });
        Ok(StoreId(place as u8))
    }

    /// Forgets a store that nobody refers to. Its name may be another's afterwards.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unknown`], [`StoreError::InUse`].
    pub fn close(&self, store: StoreId) -> Result<(), StoreError> {
        let mut stores = self.0.lock();
        let place = stores.get_mut(usize::from(store.0)).ok_or(StoreError::Unknown { store })?;
        match *place {
            None => Err(StoreError::Unknown { store }),
            Some(Store { references: 0, .. }) => {
                *place = None;
                Ok(())
            }
            Some(Store { references, .. }) => Err(StoreError::InUse { references }),
        }
    }

    /// References to places of a store, all together; `None` if it is not open.
    pub fn references(&self, store: StoreId) -> Option<u64> {
        self.0.lock().get(usize::from(store.0))?.map(|store| store.references)
    }

    /// One reference more, for a place that an owner names.
    pub(crate) fn name(&self, slot: StoreSlot) -> Result<(), StoreError> {
        let mut stores = self.0.lock();
        let store = slot.store();
        let open = stores.get_mut(usize::from(store.0)).and_then(Option::as_mut);
        let open = open.ok_or(StoreError::Unknown { store })?;
        if slot.index() >= open.slots {
            return Err(StoreError::Outside { slot, slots: open.slots });
        }
        open.references += 1;
        Ok(())
    }

    /// One reference more to a place that a word names, or named a moment ago: then the caller looks again, and releases.
    /// `false`: nothing names it any more.
    pub(crate) fn retain(&self, slot: StoreSlot) -> bool {
        let mut stores = self.0.lock();
        match stores.get_mut(usize::from(slot.store().0)) {
            Some(Some(store)) if store.references != 0 => {
                store.references += 1;
                true
            }
            _ => false,
        }
    }

    /// Gives a reference back.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub(crate) fn release(&self, slot: StoreSlot) {
        let mut stores = self.0.lock();
        let store = stores.get_mut(usize::from(slot.store().0)).and_then(Option::as_mut);
        let left = store.and_then(|store| {
            store.references = store.references.checked_sub(1)?;
            Some(())
        });
        left.expect("a reference to a place is given back once");
    }
}
