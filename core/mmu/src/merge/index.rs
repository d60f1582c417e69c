//! Where a page of a given sum is: a table of hints, of fixed size.
//!
//! Shape: buckets of eight entries of two words, 32 buckets to a frame of the pool; frames are taken as they are needed.
//! The first word of an entry is the sum, with the round in which the entry was last found true in its low byte; the
//! second says which page. An entry that was not found true in this round or the one before counts as none.
//!
//! A sum has two buckets, and its entry is made in the emptier one. With one bucket for each sum some would be full while the
//! table is nearly empty, and sums that meet in a full one take the place from each other in every round: such pages never
//! become one. With two, both are full only when nearly the whole table is. Then one of them loses an entry to the new one.

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
/// An odd factor near 2^64 divided by the golden ratio (Knuth, The Art of Computer Programming, vol. 3, 6.4).
const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

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

    /// The two buckets of a sum: each one's frame, and which word of it is the bucket's first.
    fn buckets(&self, sum: u64) -> [(usize, u16); 2] {
        // What an entry keeps of a sum decides, so that it is found again. The upper bits of the product depend on all of it.
        let mixed = (sum >> ROUND.count_ones()).wrapping_mul(MIX);
        let bucket = |frame: u64, number: u64| {
            (frame as usize & (self.frames.len() - 1), (number & (BUCKETS - 1)) as u16 * 2 * ENTRIES)
        };
        [bucket(sum >> 32, sum >> 8), bucket(mixed >> 32, mixed >> 59)]
    }

    /// The entries of a bucket, by the first word of each; none if it has no frame.
    fn entries(&self, (place, first): (usize, u16)) -> impl Iterator<Item = Word> + use<> {
        let pfn = self.frames.get(place).copied().flatten();
        pfn.into_iter().flat_map(move |pfn| (0..ENTRIES).map(move |entry| Word::new(pfn, first + 2 * entry)))
    }

    /// The entry for `sum`.
    pub(super) fn find<M: Machine>(&self, machine: &M, sum: u64) -> Option<Found> {
        let mut entries = self.buckets(sum).into_iter().flat_map(|bucket| self.entries(bucket));
        let word = entries.find(|word| {
            let tag = machine.load(*word);
            tag & !ROUND == sum & !ROUND && self.is_live(tag)
        })?;
        let raw = machine.load(Word::new(word.frame(), word.index() + 1));
        Some(Found { word, location: Location::decode(raw), wanted: raw & WANTED != 0 })
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

    /// A new entry, in a free place of one of its buckets or in another's. Without a frame for it there is none.
    pub(super) fn insert<M: Machine>(&mut self, supply: &Supply<'_, M>, sum: u64, location: Location) {
        let buckets = self.buckets(sum);
        buckets.iter().for_each(|(place, _)| self.make_room(supply, *place));
        let live = |word: &Word| self.is_live(supply.machine.load(*word));
        let emptier = buckets.into_iter().filter(|bucket| self.entries(*bucket).next().is_some());
        let Some(bucket) = emptier.min_by_key(|bucket| self.entries(*bucket).filter(live).count()) else { return };
        // Bits of the sum that choose neither frame nor bucket.
        let other = usize::from((sum >> 16) as u16 % ENTRIES);
        let word = self.entries(bucket).find(|word| !live(word)).or_else(|| self.entries(bucket).nth(other));
        if let Some(word) = word {
            self.replace(supply.machine, Found { word, location, wanted: false }, sum, location);
        }
    }

    /// A frame for the buckets of number `place`, if there is room for one more.
    fn make_room<M: Machine>(&mut self, supply: &Supply<'_, M>, place: usize) {
        let Some(frame @ None) = self.frames.get_mut(place) else { return };
        if has_room(supply.pool) {
            *frame = supply.pool.take(supply.cpu, Order::PAGE).ok();
            frame.iter().for_each(|pfn| supply.machine.zero(PfnRange::single(*pfn)));
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self, give: &mut impl FnMut(Pfn)) {
        self.frames.iter_mut().filter_map(Option::take).for_each(give);
    }
}
