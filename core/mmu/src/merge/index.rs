//! Where a page of a given sum is: a table of hints, of fixed size.
//!
//! Shape: buckets of eight entries of two words, 32 buckets to a frame of the pool; frames are taken as they are needed.
//! The first word of an entry is the sum, with the round in which the entry was last found true in its low byte; the
//! second says which page. An entry that was not found true in this round or the one before counts as none. A bucket that
//! is full loses one entry to a new one.

use alloc::vec::Vec;

use entresol_addr::{Pfn, PfnRange};
use entresol_backing::{ObjectHandle, Order, Supply};
use entresol_machine::{Machine, Word};

use super::has_room;
use crate::OutOfHeap;

/// Entries of a bucket.
const ENTRIES: u16 = 8;
/// Buckets of a frame.
const BUCKETS: u64 = Word::PER_FRAME as u64 / (2 * ENTRIES as u64);
/// Entries of a frame.
const PER_FRAME: u64 = BUCKETS * ENTRIES as u64;
const ROUND: u64 = 0xff;
const WANTED: u64 = 1 << 31;

/// A page of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) object: ObjectHandle,
    pub(super) frame: u64,
}

impl Location {
    /// Frames from here on are not in the index: 8 TiB.
    pub(super) const LIMIT: u64 = WANTED;

    fn encode(self) -> u64 {
        u64::from(self.object.raw()) << 32 | self.frame
    }

    fn decode(raw: u64) -> Self {
        Self { object: ObjectHandle::from_raw((raw >> 32) as u32), frame: raw & (WANTED - 1) }
    }
}

/// An entry that was found.
pub(super) struct Found {
    word: Word,
    pub(super) location: Location,
    /// Another page would join this one.
    pub(super) wanted: bool,
}

pub(super) struct Index {
    /// By the upper half of the sum.
    frames: Vec<Option<Pfn>>,
    /// 1 to 255, and 1 again.
    round: u8,
}

impl Index {
    pub(super) const fn new() -> Self {
        Self { frames: Vec::new(), round: 1 }
    }

    /// Makes room for one entry for each of the pool's `frames`; a power of two of frames, never fewer than there are.
    pub(super) fn reserve(&mut self, frames: u64) -> Result<(), OutOfHeap> {
        let wanted = usize::try_from(frames.div_ceil(PER_FRAME).next_power_of_two()).map_err(|_| OutOfHeap)?;
        if self.frames.is_empty() {
            self.frames.try_reserve_exact(wanted).map_err(|_| OutOfHeap)?;
            self.frames.resize(wanted, None);
        }
        Ok(())
    }

    /// Frames that it holds.
    pub(super) fn frames(&self) -> u64 {
        self.frames.iter().flatten().count() as u64
    }

    pub(super) fn next_round(&mut self) {
        self.round = self.round.checked_add(1).unwrap_or(1);
    }

    fn before(&self) -> u8 {
        self.round.checked_sub(1).filter(|round| *round != 0).unwrap_or(u8::MAX)
    }

    fn tag(&self, sum: u64) -> u64 {
        sum & !ROUND | u64::from(self.round)
    }

    fn is_live(&self, tag: u64) -> bool {
        let round = (tag & ROUND) as u8;
        round == self.round || round == self.before()
    }

    /// Which frame, and which word of it is the bucket's first.
    fn bucket(&self, sum: u64) -> (usize, u16) {
        let place = (sum >> 32) as usize & (self.frames.len() - 1);
        (place, ((sum >> 8 & (BUCKETS - 1)) as u16) * 2 * ENTRIES)
    }

    /// The entry for `sum`.
    pub(super) fn find<M: Machine>(&self, machine: &M, sum: u64) -> Option<Found> {
        let (place, first) = self.bucket(sum);
        let pfn = (*self.frames.get(place)?)?;
        let mut entries = (0..ENTRIES).map(|entry| first + 2 * entry);
        let at = entries.find(|at| {
            let tag = machine.load(Word::new(pfn, *at));
            tag & !ROUND == sum & !ROUND && self.is_live(tag)
        })?;
        let raw = machine.load(Word::new(pfn, at + 1));
        Some(Found { word: Word::new(pfn, at), location: Location::decode(raw), wanted: raw & WANTED != 0 })
    }

    /// The entry is true.
    pub(super) fn confirm<M: Machine>(&self, machine: &M, found: &Found, sum: u64) {
        machine.store(found.word, self.tag(sum));
    }

    /// Another page would join the one of the entry, or none would any more.
    pub(super) fn want<M: Machine>(&self, machine: &M, found: &Found, wanted: bool) {
        let mark = if wanted { WANTED } else { 0 };
        machine.store(Word::new(found.word.frame(), found.word.index() + 1), found.location.encode() | mark);
    }

    /// There is no entry for `sum` any more.
    pub(super) fn forget<M: Machine>(&self, machine: &M, sum: u64) {
        if let Some(found) = self.find(machine, sum) {
            // No round has the number 0.
            machine.store(found.word, sum & !ROUND);
        }
    }

    /// The entry names another page of the same sum from now on.
    pub(super) fn replace<M: Machine>(&self, machine: &M, found: Found, sum: u64, location: Location) {
        let found = Found { location, ..found };
        self.want(machine, &found, false);
        self.confirm(machine, &found, sum);
    }

    /// A new entry, in a free place of its bucket or in another's. Without a frame for it there is none.
    pub(super) fn insert<M: Machine>(&mut self, supply: &Supply<'_, M>, sum: u64, location: Location) {
        let (place, first) = self.bucket(sum);
        let Some(frame) = self.frames.get_mut(place) else { return };
        if frame.is_none() && has_room(supply.pool) {
            *frame = supply.pool.take(supply.cpu, Order::PAGE).ok();
            frame.iter().for_each(|pfn| supply.machine.zero(PfnRange::single(*pfn)));
        }
        let Some(pfn) = *frame else { return };
        let mut entries = (0..ENTRIES).map(|entry| first + 2 * entry);
        let free = entries.find(|at| !self.is_live(supply.machine.load(Word::new(pfn, *at))));
        // Bits of the sum that choose neither frame nor bucket.
        let at = free.unwrap_or(first + 2 * ((sum >> 16) as u16 % ENTRIES));
        self.replace(supply.machine, Found { word: Word::new(pfn, at), location, wanted: false }, sum, location);
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self, give: &mut impl FnMut(Pfn)) {
        self.frames.iter_mut().filter_map(Option::take).for_each(give);
    }
}
