//! One set of slots: what readers search while it is active, and the writer edits while it is not.
//!
//! Shape: cells by slot number, and two orders of the numbers, by guest frame and by object ([`Reverse`]). A number
//! stays where it is when other slots come and go, so a hint survives every update.
//!
//! Invariants: valid or not, slots of a set never overlap. All loads and stores are relaxed: the grace period and the
//! state word of [`crate::Slots`] order them. A reader that breaks that rule would see mixed words, never memory that
//! is not there.

use alloc::boxed::Box;
use alloc::vec::Vec;

use entresol_addr::{Gfn, GfnRange};
use entresol_sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::reverse::Reverse;
use crate::{Generation, ObjectId, Slot, SlotFlags, SlotRef};

/// Bit of the third word: found in reverse, but by no guest frame.
const INVALID: u64 = 1 << 31;

/// A slot in four words: base, count, object << 32 | invalid | flags, offset. A count of 0 is "absent".
#[repr(align(32))]
struct Cell([AtomicU64; 4]);

impl Cell {
    const fn absent() -> Self {
        Self([const { AtomicU64::new(0) }; 4])
    }

    #[inline]
    fn word(&self, index: usize) -> u64 {
        self.0[index].load(Ordering::Relaxed)
    }

    #[inline]
    fn base(&self) -> Gfn {
        Gfn::new(self.word(0))
    }

    #[inline]
    fn load(&self, id: u16) -> (Slot, Validity) {
        let [base, count, packed, offset] = [0, 1, 2, 3].map(|index| self.word(index));
        let validity = if packed & INVALID == 0 { Validity::Valid } else { Validity::Invalid };
        let object = ObjectId::new((packed >> 32) as u32);
        let flags = SlotFlags::from_bits_truncate(packed as u32);
        (Slot { id, base: Gfn::new(base), count, object, offset, flags }, validity)
    }

    fn store(&self, slot: Option<(Slot, Validity)>) {
        let words = slot.map_or([0; 4], |(slot, validity)| {
            let invalid = if validity == Validity::Invalid { INVALID } else { 0 };
            let packed = u64::from(slot.object.get()) << 32 | invalid | u64::from(slot.flags.bits());
            [slot.base.get(), slot.count, packed, slot.offset]
        });
        for (cell, word) in self.0.iter().zip(words) {
            cell.store(word, Ordering::Relaxed);
        }
    }
}

const _: () = assert!(SlotFlags::all().bits() as u64 & INVALID == 0);

/// Whether guest frames find a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Validity {
    Valid,
    Invalid,
}

/// One set of slots.
pub struct Set {
    cells: Box<[Cell]>,
    len: AtomicU32,
    by_gfn: Box<[AtomicU32]>,
    by_object: Reverse,
}

impl Set {
    pub(crate) fn with_capacity(capacity: usize) -> Option<Self> {
        Some(Self {
            cells: try_boxed(capacity, Cell::absent)?,
            len: AtomicU32::new(0),
            by_gfn: try_boxed(capacity, || AtomicU32::new(0))?,
            by_object: Reverse::with_capacity(capacity)?,
        })
    }

    /// The numbers that slots may have are below this.
    pub fn capacity(&self) -> u32 {
        self.cells.len() as u32
    }

    /// Slots in it, invalid ones included.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed) as usize
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Slot `id`, valid or not.
    pub fn get(&self, id: u16) -> Option<Slot> {
        let (slot, _) = self.cells.get(usize::from(id))?.load(id);
        (slot.count != 0).then_some(slot)
    }

    /// Slot `id`, if guest frames find it.
    pub(crate) fn get_valid(&self, id: u16) -> Option<Slot> {
        let (slot, validity) = self.cells.get(usize::from(id))?.load(id);
        (slot.count != 0 && validity == Validity::Valid).then_some(slot)
    }

    /// Some slot other than `except` that shares a frame with `range`.
    pub fn overlapping(&self, range: GfnRange, except: u16) -> Option<Slot> {
        // Slots do not overlap each other: of those that start before the range ends, only the last can reach into it.
        let before = self.place_of(range.end());
        let mut candidates = (0..before).rev().map(|place| self.at(place)).filter(|slot| slot.id != except);
        candidates.next().filter(|slot| slot.range().overlaps(range))
    }

    /// The valid slot that `gfn` lies in, if number `hint` is the one.
    #[inline]
    pub(crate) fn find_hinted(&self, gfn: Gfn, hint: u16) -> Option<Slot> {
        let (slot, validity) = self.cells.get(usize::from(hint))?.load(hint);
        (slot.contains(gfn) && validity == Validity::Valid).then_some(slot)
    }

    /// The valid slot that `gfn` lies in.
    pub(crate) fn find(&self, gfn: Gfn) -> Option<Slot> {
        let after = self.partition(|slot| self.cell(slot).base() <= gfn, |place| self.number(place));
        let id = self.number(after.checked_sub(1)?);
        self.find_hinted(gfn, id)
    }

    /// The slot that `gfn` lies in, valid or not.
    pub(crate) fn holder(&self, gfn: Gfn) -> Option<(Slot, Validity)> {
        let after = self.partition(|slot| self.cell(slot).base() <= gfn, |place| self.number(place));
        let found = self.load(self.number(after.checked_sub(1)?));
        found.0.contains(gfn).then_some(found)
    }

    /// Slot number `id` becomes `to`.
    pub(crate) fn replace(&self, id: u16, to: Option<(Slot, Validity)>) {
        let place = |slot: Slot| (slot.base, slot.count, slot.object, slot.offset);
        let (old, new) = (self.get(id), to.map(|(slot, _)| slot));
        let stays = old.map(place) == new.map(place);
        if let Some(old) = old.filter(|_| !stays) {
            self.leave_orders(old);
        }
        self.cells[usize::from(id)].store(to);
        if let Some(new) = new.filter(|_| !stays) {
            self.enter_orders(new);
        }
    }

    /// Slots in the order of guest frames, with whether each is valid.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Slot, Validity)> {
        (0..self.len()).map(|place| self.load(self.number(place)))
    }

    /// Slots, valid or not, that show a frame of `object` in `start .. start + count`.
    pub(crate) fn mappings(&self, generation: Generation, object: ObjectId, start: u64, count: u64) -> Mappings<'_> {
        let end = start.saturating_add(count);
        let before = |offset: u64| {
            let key = (object, offset);
            self.partition(|id| self.object_key(id) < key, |place| self.by_object.at(place))
        };
        let until = if count == 0 { 0 } else { before(end) };
        Mappings { set: self, generation, next: before(0), until, start }
    }

    fn enter_orders(&self, slot: Slot) {
        let len = self.len();
        insert(&self.by_gfn, len, self.place_of(slot.base), slot.id);
        self.by_object.insert(len, self.object_place_of(slot), slot.id, slot.offset + slot.count);
        self.len.store(len as u32 + 1, Ordering::Relaxed);
    }

    fn leave_orders(&self, slot: Slot) {
        let len = self.len();
        remove(&self.by_gfn, len, self.place_of(slot.base));
        self.by_object.remove(len, self.object_place_of(slot));
        self.len.store(len as u32 - 1, Ordering::Relaxed);
    }

    #[inline]
    fn cell(&self, id: u16) -> &Cell {
        &self.cells[usize::from(id)]
    }

    #[inline]
    fn number(&self, place: usize) -> u16 {
        self.by_gfn[place].load(Ordering::Relaxed) as u16
    }

    fn at(&self, place: usize) -> Slot {
        self.load(self.number(place)).0
    }

    #[inline]
    fn load(&self, id: u16) -> (Slot, Validity) {
        self.cell(id).load(id)
    }

    /// The first place whose slot starts at `gfn` or after it.
    fn place_of(&self, gfn: Gfn) -> usize {
        self.partition(|id| self.cell(id).base() < gfn, |place| self.number(place))
    }

    /// The place of a slot in the order of objects, or the one that it would get.
    fn object_place_of(&self, slot: Slot) -> usize {
        let key = (slot.object, slot.offset, slot.id);
        let before = |id| {
            let (object, offset) = self.object_key(id);
            (object, offset, id) < key
        };
        self.partition(before, |place| self.by_object.at(place))
    }

    fn object_key(&self, id: u16) -> (ObjectId, u64) {
        let (slot, _) = self.load(id);
        (slot.object, slot.offset)
    }

    /// The number of leading places, in the order that `number` gives, whose slots are `before`.
    #[inline]
    fn partition(&self, before: impl Fn(u16) -> bool, number: impl Fn(usize) -> u16) -> usize {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low.midpoint(high);
            if before(number(middle)) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

/// The slots that show a part of an object, in the order of their offsets. See [`crate::Slots::mappings`].
pub struct Mappings<'s> {
    set: &'s Set,
    generation: Generation,
    next: usize,
    until: usize,
    start: u64,
}

impl Iterator for Mappings<'_> {
    type Item = SlotRef;

    fn next(&mut self) -> Option<SlotRef> {
        let place = self.set.by_object.next_above(self.next, self.until, self.start)?;
        self.next = place + 1;
        let id = self.set.by_object.at(place);
        Some(SlotRef { slot: self.set.load(id).0, generation: self.generation })
    }
}

/// Puts `id` at `place` of the first `len`.
pub(crate) fn insert(order: &[AtomicU32], len: usize, place: usize, id: u16) {
    for moved in (place..len).rev() {
        order[moved + 1].store(order[moved].load(Ordering::Relaxed), Ordering::Relaxed);
    }
    order[place].store(id.into(), Ordering::Relaxed);
}

/// Takes what is at `place` of the first `len` out.
pub(crate) fn remove(order: &[AtomicU32], len: usize, place: usize) {
    for moved in place + 1..len {
        order[moved - 1].store(order[moved].load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

/// `count` values on the heap, or `None` if it has no room.
pub(crate) fn try_boxed<T>(count: usize, value: impl FnMut() -> T) -> Option<Box<[T]>> {
    let mut values = Vec::new();
    values.try_reserve_exact(count).ok()?;
    values.resize_with(count, value);
    Some(values.into_boxed_slice())
}
