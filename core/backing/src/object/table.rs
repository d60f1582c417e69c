//! All objects of a machine: a fixed number of places, each used again and again.
//!
//! Protocol: `create` makes an object in a free place and then publishes its handle there (release); `get` compares
//! (acquire). `destroy` withdraws the handle, waits a grace period, and only then takes the object apart, so whoever
//! got it under a pin can use it until unpinning. A *hold* is a promise that something still refers to the object: each
//! slot has one, and a held object cannot be destroyed, so no translation outlives what it shows (INV-3, INV-7).
//!
//! Known holes: a place's generation has 16 bits. A handle that was kept without a hold over 65,535 lives of its place
//! would name another object.

use alloc::boxed::Box;

use entresol_addr::{Pfn, PfnRange};
use entresol_machine::Machine;
use entresol_sync::atomic::Ordering;
use entresol_sync::{Epoch, Mutex, Pin};

use super::{CreateError, DestroyError, Object, Spec, TableError};
use crate::tree::MAX_FRAMES;
use crate::{Supply, try_boxed};

/// The most objects that one machine may have.
pub const MAX_OBJECTS: usize = 1 << 16;

/// The name of an object: bits 15:0 the place, bits 31:16 the generation, which is never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ObjectHandle(u32);

impl ObjectHandle {
    /// The handle that [`Self::raw`] came from. Any number is safe: it names an object or it does not.
    #[inline]
    pub const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    /// The number.
    #[inline]
    pub const fn raw(self) -> u32 {
        self.0
    }

    const fn new(place: usize, generation: u16) -> Self {
        Self((generation as u32) << 16 | place as u32)
    }

    #[inline]
    const fn place(self) -> usize {
        (self.0 & 0xffff) as usize
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Free,
    Live,
    /// Withdrawn, not yet taken apart.
    Dying,
}

/// What the table's lock protects about one place.
struct Record {
    phase: Phase,
    generation: u16,
    holds: u32,
}

/// The objects of a machine.
pub struct Objects {
    places: Box<[Object]>,
    records: Mutex<Box<[Record]>>,
}

impl Objects {
    /// Room for `capacity` objects.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn with_capacity(capacity: usize) -> Result<Self, TableError> {
        if capacity == 0 || capacity > MAX_OBJECTS {
            return Err(TableError::Capacity { value: capacity });
        }
        let records = try_boxed(capacity, || Record { phase: Phase::Free, generation: 1, holds: 0 })?;
        Ok(Self { places: try_boxed(capacity, Object::new)?, records: Mutex::new(records) })
    }

    /// The object that `handle` names. It can be used as long as the pin lasts.
    #[inline]
    pub fn get<'s>(&'s self, _pin: &'s Pin<'_>, handle: ObjectHandle) -> Option<&'s Object> {
        let object = self.places.get(handle.place())?;
        // A free place has 0, which no handle that was given out is.
        (object.live.load(Ordering::Acquire) == handle.0 && handle.0 != 0).then_some(object)
    }

    /// What is in the place of that number, if there is one. It stays what it is as long as the pin lasts.
    pub(super) fn at<'s>(&'s self, _pin: &'s Pin<'_>, place: usize) -> Option<&'s Object> {
        self.places.get(place)
    }

    /// Every live object, for audits.
    pub(crate) fn iter<'s>(&'s self, _pin: &'s Pin<'_>) -> impl Iterator<Item = &'s Object> {
        self.places.iter().filter(|object| object.handle().is_some())
    }

    /// Makes an object.
    ///
    /// # Errors
    ///
    /// [`CreateError`]; nothing changed.
    pub fn create<M: Machine>(&self, supply: &Supply<'_, M>, spec: Spec) -> Result<ObjectHandle, CreateError> {
        check(supply, spec)?;
        let mut records = self.records.lock();
        let full = CreateError::TableFull { capacity: self.places.len() };
        let place = records.iter().position(|record| record.phase == Phase::Free).ok_or(full)?;
        self.places[place].make(supply, spec)?;
        let record = &mut records[place];
        record.phase = Phase::Live;
        record.holds = 0;
        let handle = ObjectHandle::new(place, record.generation);
        self.places[place].live.store(handle.0, Ordering::Release);
        Ok(handle)
    }

    /// Promises that something refers to the object, until [`Self::release`].
    ///
    /// # Errors
    ///
    /// [`DestroyError::Unknown`].
    pub fn hold(&self, handle: ObjectHandle) -> Result<(), DestroyError> {
        let mut records = self.records.lock();
        let record = live(&mut records, handle)?;
        record.holds = record.holds.checked_add(1).expect("there are not 2^32 slots");
        Ok(())
    }

    /// Ends one hold.
    ///
    /// # Errors
    ///
    /// [`DestroyError::Unknown`].
    ///
    /// # Panics
    ///
    /// If nothing holds it: a hold was released twice.
    pub fn release(&self, handle: ObjectHandle) -> Result<(), DestroyError> {
        let mut records = self.records.lock();
        let record = live(&mut records, handle)?;
        record.holds = record.holds.checked_sub(1).expect("a hold is released once");
        Ok(())
    }

    /// Destroys an object and gives its frames back. Waits for a grace period of `epoch`, which is the one that readers
    /// pin; the caller's own CPU is not pinned.
    ///
    /// # Errors
    ///
    /// [`DestroyError`]; nothing changed.
    pub fn destroy<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        epoch: &Epoch,
        handle: ObjectHandle,
    ) -> Result<(), DestroyError> {
        let object = &self.places[self.withdraw(handle)?];
        epoch.synchronize();
        object.unmake(supply);
        let record = &mut self.records.lock()[handle.place()];
        record.phase = Phase::Free;
        record.generation = record.generation.checked_add(1).unwrap_or(1);
        Ok(())
    }

    /// How often a live object is held; `None` if the handle names none.
    pub fn holds(&self, handle: ObjectHandle) -> Option<u32> {
        let mut records = self.records.lock();
        live(&mut records, handle).ok().map(|record| record.holds)
    }

    /// The place of a handle that names, or named, an object.
    pub(super) fn place(&self, handle: ObjectHandle) -> &Object {
        &self.places[handle.place()]
    }

    /// Objects that exist.
    pub fn len(&self) -> usize {
        self.records.lock().iter().filter(|record| record.phase == Phase::Live).count()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// From now on nobody gets the object. Returns its place.
    fn withdraw(&self, handle: ObjectHandle) -> Result<usize, DestroyError> {
        let mut records = self.records.lock();
        let record = live(&mut records, handle)?;
        if record.holds != 0 {
            return Err(DestroyError::Held { holds: record.holds });
        }
        record.phase = Phase::Dying;
        self.places[handle.place()].live.store(0, Ordering::Release);
        Ok(handle.place())
    }
}

/// The record of a live object.
fn live(records: &mut [Record], handle: ObjectHandle) -> Result<&mut Record, DestroyError> {
    let generation = (handle.0 >> 16) as u16;
    let record = records.get_mut(handle.place());
    let record = record.filter(|record| record.phase == Phase::Live && record.generation == generation);
    record.ok_or(DestroyError::Unknown { handle })
}

/// What can be said of a spec before anything is taken for it.
fn check<M: Machine>(supply: &Supply<'_, M>, spec: Spec) -> Result<(), CreateError> {
    match spec {
        Spec::Private { .. } if !supply.machine.can_unmap_own() => Err(CreateError::Unsplittable),
        Spec::Anonymous { frames, .. } | Spec::Private { frames, .. } => check_frames(frames, MAX_FRAMES),
        Spec::Device { first, frames } => check_fixed(supply, first, frames).map(drop),
        Spec::Rom { first, frames, owned } => {
            let range = check_fixed(supply, first, frames)?;
            if owned { supply.pool.may_add(range).map_err(CreateError::NotOwnable) } else { Ok(()) }
        }
    }
}

fn check_frames(value: u64, limit: u64) -> Result<(), CreateError> {
    if value == 0 || value > limit { Err(CreateError::Frames { value, limit }) } else { Ok(()) }
}

/// A device or ROM lies in the machine's address space, but not in what the pool gives to others.
fn check_fixed<M: Machine>(supply: &Supply<'_, M>, first: Pfn, frames: u64) -> Result<PfnRange, CreateError> {
    let limit = 1 << (u32::from(supply.machine.features().physical_bits) - entresol_addr::PAGE_SHIFT);
    check_frames(frames, limit)?;
    let range = PfnRange::new(first, frames).filter(|range| range.end().get() <= limit);
    let range = range.ok_or(CreateError::BeyondMachine { first, frames, limit })?;
    match supply.pool.any_of(range) {
        Some(pfn) => Err(CreateError::PoolFrame { pfn }),
        None => Ok(range),
    }
}
