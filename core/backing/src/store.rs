//! Where pages are while no frame has them: places in stores, and how many still refer to each store.
//!
//! Purpose: a word of a tree may say, instead of a frame, that a page's bytes lie in a place of a store ([`StoreSlot`]): a
//! snapshot's file, for example. This crate moves no bytes to or from there. It says which place is wanted
//! ([`crate::GrantError::Stored`]), takes the frame that somebody else has filled ([`crate::Object::restore`]), and counts.
//!
//! A page with allocation tags has them in its place, beside its bytes: a place is 4096 bytes, and 128 bytes more where it is marked so.
//! The mark is made with the place's first reference and goes with its last: tags are there exactly as long as the bytes (D10).
//!
//! Two kinds of store. A *plain* one ([`Stores::open`]) is a file: every place holds a page, and none changes while it is open.
//! Whoever restores lazily opens one, and calls [`crate::Object::put_stored`] for each page of a fresh object. Of a *counted* one
//! ([`Stores::open_counted`]), a swap device, places are free until a page is written there ([`crate::Object::begin_out`]), and again when
//! nobody refers to them; a record of 8 bytes is kept for each. [`Stores::close`] is refused as long as a page is still there, or
//! a frame is known to hold the same.
//!
//! References: a word that names a place is one; a frame that is known to hold the same bytes is one (such a frame is *kept*,
//! see [`crate::FramePool`]); whoever reads the place has one. Whoever copies a word retains the place first and looks at
//! the word again after; whoever takes a word away releases the place.
//!
//! A place that is being written is not *valid* yet: no word names it before it is, so whoever reads a place gets what the page
//! was.
//!
//! Invariants: INV-7 (a release without a reference stops the machine, in release builds too). Nothing is allocated after
//! [`Stores::open_counted`]. Lock order: the one lock here is a leaf.
//!
//! Known hole: a free place is looked for from behind the last one that was taken; in a store that is nearly full that looks
//! at many.

use alloc::boxed::Box;
use core::fmt;

use entresol_sync::{Mutex, planted};

use crate::{OutOfHeap, try_boxed};

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
    /// The heap has no room for the records.
    OutOfHeap,
    /// Every place is taken, or it is no store whose places are taken.
    Full {
        /// The store.
        store: StoreId,
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
            Self::OutOfHeap => OutOfHeap.fmt(f),
            Self::Full { store } => write!(f, "store {}: no place is free", store.0),
            Self::InUse { references } => write!(f, "store: {references} references to it are left"),
        }
    }
}

impl core::error::Error for StoreError {}

impl From<OutOfHeap> for StoreError {
    fn from(OutOfHeap: OutOfHeap) -> Self {
        Self::OutOfHeap
    }
}

/// What is known of a place of a counted store. Zero: it is free.
#[derive(Clone, Copy, Default)]
struct Record {
    /// References, in bit 31 whether the place is valid, and in bit 30 whether it has tags.
    references: u32,
    /// A frame that is kept for it, as its index in the pool plus one; 0 if none is known.
    frame: u32,
}

const VALID: u32 = 1 << 31;
const TAGGED: u32 = 1 << 30;

/// The most bytes that stay in memory of a page that leaves, its tags counted.
const MOST_KEPT: usize = 16;

// The record, and the word of the tree that names the place.
const _: () = assert!(size_of::<Record>() + size_of::<u64>() <= MOST_KEPT);

impl Record {
    const fn count(self) -> u32 {
        self.references & !(VALID | TAGGED)
    }
}

struct Store {
    slots: u64,
    /// Of a plain one: every place has tags.
    tagged: bool,
    references: u64,
    /// Of a counted one.
    records: Option<Box<[Record]>>,
    taken: u64,
    /// Where the search for a free place begins.
    next: usize,
}

impl Store {
    /// The record of a place, if it has one and somebody refers to it.
    fn held(&mut self, slot: StoreSlot) -> Option<&mut Record> {
        let index = usize::try_from(slot.index()).ok()?;
        self.records.as_mut()?.get_mut(index).filter(|record| record.count() != 0)
    }

    /// Whether some frame holds what each place does.
    fn is_in_memory(&self) -> bool {
        self.records.iter().flatten().all(|record| record.count() == 0 || record.frame != 0)
    }
}

/// The open stores of a machine.
pub struct Stores(Mutex<[Option<Store>; MAX_STORES]>);

impl Stores {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new([const { None }; MAX_STORES]))
    }

    /// Opens a store of `slots` places that all hold a page, and do not change while it is open.
    ///
    /// # Errors
    ///
    /// [`StoreError::TooMany`], [`StoreError::Slots`].
    pub fn open(&self, slots: u64) -> Result<StoreId, StoreError> {
        self.open_plain(slots, false)
    }

    /// The same, and every page has its tags beside it.
    ///
    /// # Errors
    ///
    /// [`StoreError::TooMany`], [`StoreError::Slots`].
    pub fn open_tagged(&self, slots: u64) -> Result<StoreId, StoreError> {
        self.open_plain(slots, true)
    }

    fn open_plain(&self, slots: u64, tagged: bool) -> Result<StoreId, StoreError> {
        if slots == 0 || slots > MAX_SLOTS {
            return Err(StoreError::Slots { value: slots, limit: MAX_SLOTS });
        }
        self.add(slots, None, tagged)
    }

    /// Opens a store of `slots` places, at most 2^31, that are free.
    ///
    /// # Errors
    ///
    /// [`StoreError::TooMany`], [`StoreError::Slots`], [`StoreError::OutOfHeap`].
    pub fn open_counted(&self, slots: u64) -> Result<StoreId, StoreError> {
        const LIMIT: u64 = 1 << 31;
        if slots == 0 || slots > LIMIT {
            return Err(StoreError::Slots { value: slots, limit: LIMIT });
        }
        let records = try_boxed(slots as usize, Record::default)?;
        self.add(slots, Some(records), false)
    }

    fn add(&self, slots: u64, records: Option<Box<[Record]>>, tagged: bool) -> Result<StoreId, StoreError> {
        let mut stores = self.0.lock();
        let place = stores.iter().position(Option::is_none).ok_or(StoreError::TooMany)?;
        stores[place] = Some(Store { slots, tagged, references: 0, records, taken: 0, next: 0 });
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
        match place.as_ref().map(|store| store.references) {
            None => Err(StoreError::Unknown { store }),
            Some(0) => {
                *place = None;
                Ok(())
            }
            Some(_) if planted!(ZE8) && place.as_ref().is_some_and(Store::is_in_memory) => {
                *place = None;
                Ok(())
            }
            Some(references) => Err(StoreError::InUse { references }),
        }
    }

    /// References to places of a store, all together; `None` if it is not open.
    pub fn references(&self, store: StoreId) -> Option<u64> {
        self.0.lock().get(usize::from(store.0))?.as_ref().map(|store| store.references)
    }

    /// Places of a counted store that are taken; `None` if it is not open.
    pub fn taken(&self, store: StoreId) -> Option<u64> {
        self.0.lock().get(usize::from(store.0))?.as_ref().map(|store| store.taken)
    }

    /// One reference more, for a place that an owner names.
    pub(crate) fn name(&self, slot: StoreSlot) -> Result<(), StoreError> {
        let mut stores = self.0.lock();
        let store = slot.store();
        let open = stores.get_mut(usize::from(store.0)).and_then(Option::as_mut);
        let open = open.ok_or(StoreError::Unknown { store })?;
        // Places of a counted store are never an owner's to name: they would be beyond its end.
        let slots = if open.records.is_some() { 0 } else { open.slots };
        if slot.index() >= slots {
            return Err(StoreError::Outside { slot, slots });
        }
        open.references += 1;
        Ok(())
    }

    /// Takes a free place, not valid yet, with one reference; for tags too if it is `tagged`.
    pub(crate) fn take(&self, store: StoreId, tagged: bool) -> Result<StoreSlot, StoreError> {
        let mut stores = self.0.lock();
        let full = StoreError::Full { store };
        let open =
            stores.get_mut(usize::from(store.0)).and_then(Option::as_mut).ok_or(StoreError::Unknown { store })?;
        let records = open.records.as_mut().filter(|_| open.taken < open.slots).ok_or(full)?;
        let (before, after) = records.split_at(open.next);
        let found = after.iter().chain(before).position(|record| record.count() == 0).ok_or(full)?;
        let index = (open.next + found) % records.len();
        records[index] = Record { references: 1 | if tagged { TAGGED } else { 0 }, frame: 0 };
        open.next = (index + 1) % records.len();
        open.taken += 1;
        open.references += 1;
        Ok(StoreSlot::new(store, index as u64))
    }

    /// Whether the place, which somebody refers to, has tags beside the page.
    pub(crate) fn is_tagged(&self, slot: StoreSlot) -> bool {
        let mut stores = self.0.lock();
        let store = stores.get_mut(usize::from(slot.store().0)).and_then(Option::as_mut);
        store.is_some_and(|store| match store.records {
            Some(_) => store.held(slot).is_some_and(|record| record.references & TAGGED != 0),
            None => store.tagged,
        })
    }

    /// The mistake of Z-E1.
    pub(crate) fn lose_tags(&self, slot: StoreSlot) {
        let mut stores = self.0.lock();
        let store = stores.get_mut(usize::from(slot.store().0)).and_then(Option::as_mut);
        if let Some(record) = store.and_then(|store| store.held(slot)) {
            record.references &= !TAGGED;
        }
    }

    /// The place holds the page from now on.
    pub(crate) fn set_valid(&self, slot: StoreSlot) {
        let mut stores = self.0.lock();
        let store = stores.get_mut(usize::from(slot.store().0)).and_then(Option::as_mut);
        if let Some(record) = store.and_then(|store| store.held(slot)) {
            record.references |= VALID;
        }
    }

    /// Whether the place, which somebody refers to, holds the page already; then one reference more.
    pub(crate) fn retain_valid(&self, slot: StoreSlot) -> bool {
        let mut stores = self.0.lock();
        let Some(Some(store)) = stores.get_mut(usize::from(slot.store().0)) else { return false };
        let valid = match &store.records {
            Some(_) => store.held(slot).is_some_and(|record| record.references & VALID != 0),
            None => store.references != 0,
        };
        if valid {
            store.references += 1;
            if let Some(record) = store.held(slot) {
                record.references += 1;
            }
        }
        valid
    }

    /// Notes, or forgets, that the frame of that index holds the same.
    pub(crate) fn set_frame(&self, slot: StoreSlot, index: u32, holds: bool) {
        let mut stores = self.0.lock();
        let store = stores.get_mut(usize::from(slot.store().0)).and_then(Option::as_mut);
        let Some(record) = store.and_then(|store| store.held(slot)) else { return };
        if holds {
            record.frame = index + 1;
        } else if record.frame == index + 1 {
            record.frame = 0;
        }
    }

    /// The index of a frame that held the same a moment ago.
    pub(crate) fn frame(&self, slot: StoreSlot) -> Option<u32> {
        let mut stores = self.0.lock();
        let store = stores.get_mut(usize::from(slot.store().0)).and_then(Option::as_mut)?;
        store.held(slot)?.frame.checked_sub(1)
    }

    /// One reference more to a place that a word names, or named a moment ago: then the caller looks again, and releases.
    /// `false`: nothing names it any more.
    pub(crate) fn retain(&self, slot: StoreSlot) -> bool {
        let mut stores = self.0.lock();
        match stores.get_mut(usize::from(slot.store().0)) {
            Some(Some(store)) if store.references != 0 => {
                if store.records.is_some() {
                    let Some(record) = store.held(slot) else { return false };
                    record.references += 1;
                }
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
            if store.records.is_some() {
                let record = store.held(slot)?;
                record.references -= 1;
                if record.count() == 0 {
                    *record = Record::default();
                    store.taken -= 1;
                }
            }
            Some(())
        });
        left.expect("a reference to a place is given back once");
    }
}
