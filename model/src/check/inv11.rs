//! INV-11: a guest never reads a byte that it, its owner or zeroing did not put there: the data oracle. Allocation tags are
//! content of a page too, and judged the same way; what is wrong with them is INV-12.
//!
//! Purpose: for each word of an object that a scenario uses, which values a read may return now. A guest's store makes
//! its value the only one; a store of the owner takes a while, during which both the old and the new value are right.
//!
//! A guest that mixes cacheable and Non-cacheable accesses without FWB is responsible for its own maintenance (Arm DDI
//! 0487 B2.12), and so is an owner that writes memory which a guest without caches has mapped; such words are not
//! judged for the other kind of access until both agree again.
//!
//! Known hole: of an owner's store and another one to the same word at a time the oracle takes a guest's for the last, and
//! of two owners' the one that ends last. Scenarios have no such pair.

use std::collections::HashMap;

use crate::explore::access::Spread;
use crate::machine::content::WORDS;

/// A word of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Which object.
    pub object: usize,
    /// Its frame.
    pub frame: u64,
    /// Word of the frame; from [`TAGS`] on the tags of its granules.
    pub word: u16,
}

/// The tag of a frame's first granule, among its words.
pub const TAGS: u16 = WORDS;

#[derive(Clone, Debug)]
struct Cell {
    values: Vec<u64>,
    /// Guest stores so far.
    stores: u64,
    /// Stores that have begun so far, the owner's too.
    changes: u64,
    /// Only accesses of this kind are judged: past the cache, or through it; `None` is both.
    by: Option<bool>,
    /// A guest stored in both ways without maintenance: anything may be there until the owner stores.
    mixed: bool,
    /// Of a fork that is younger than all stores: one of the values, and always the same.
    one_of: bool,
}

/// A store of the owner that has begun.
#[derive(Clone, Copy, Debug)]
pub struct Begun {
    place: Place,
    value: u64,
    stores: u64,
}

/// Maintenance of a word's line that a guest has begun.
#[derive(Clone, Copy, Debug)]
pub struct Cleaned {
    place: Place,
    invalidates: bool,
    changes: u64,
}

/// What each word may read as.
#[derive(Debug, Default)]
pub struct Oracle {
    cells: HashMap<Place, Cell, Spread>,
    /// What each object reads as before anybody stores; 0 beyond the end.
    initial: Vec<u64>,
    /// Objects that are being forked, and to which.
    forking: Vec<(usize, usize)>,
}

impl Oracle {
    fn cell(&mut self, place: Place) -> &mut Cell {
        let initial = self.initial.get(place.object).copied().filter(|_| place.word < TAGS).unwrap_or(0);
        self.cells.entry(place).or_insert_with(|| Cell {
            values: vec![initial],
            stores: 0,
            changes: 0,
            by: None,
            mixed: false,
            one_of: false,
        })
    }

    /// Nobody has stored yet; `initial` is what each object reads as.
    pub fn new(initial: Vec<u64>) -> Self {
        Self { cells: HashMap::default(), initial, forking: Vec::new() }
    }

    /// A guest stored `value`, past the cache if `uncached`; `coherent` says that both kinds see the same.
    pub fn store(&mut self, place: Place, value: u64, uncached: bool, coherent: bool) {
        self.store_in_forks(place, value);
        let cell = self.cell(place);
        cell.values = vec![value];
        cell.one_of = false;
        cell.stores += 1;
        cell.changes += 1;
        cell.mixed |= !coherent && cell.by == Some(!uncached);
        cell.by = (!coherent).then_some(uncached);
    }

    /// The owner begins to store. `mapped`: a guest without FWB has the page mapped.
    pub fn begin(&mut self, place: Place, value: u64, mapped: bool) -> Begun {
        self.store_in_forks(place, value);
        let cell = self.cell(place);
        cell.values.push(value);
        cell.one_of = false;
        cell.changes += 1;
        cell.by = mapped.then_some(false);
        Begun { place, value, stores: cell.stores }
    }

    /// The owner's store is done.
    pub fn end(&mut self, begun: Begun) {
        let cell = self.cell(begun.place);
        if cell.stores == begun.stores {
            cell.values = vec![begun.value];
            cell.mixed = false;
        }
    }

    /// A store to what is being forked is in the copy as well, or is not.
    fn store_in_forks(&mut self, place: Place, value: u64) {
        for to in self.forking.iter().filter(|(from, _)| *from == place.object).map(|(_, to)| *to).collect::<Vec<_>>() {
            let cell = self.cell(Place { object: to, ..place });
            cell.values.push(value);
            cell.one_of = true;
        }
    }

    /// A guest begins to clean the line of `place` to the point of coherency, and to invalidate it too if it `invalidates`.
    pub fn begin_clean(&self, place: Place, invalidates: bool) -> Cleaned {
        Cleaned { place, invalidates, changes: self.cells.get(&place).map_or(0, |cell| cell.changes) }
    }

    /// It is done: if nobody stored meanwhile, both kinds of access see the same, as far as the operation goes.
    pub fn end_clean(&mut self, cleaned: &Cleaned) {
        let cell = self.cell(cleaned.place);
        let undisturbed = cell.changes == cleaned.changes && cell.values.len() == 1;
        // What was stored past the cache a stale copy may hide until that is invalidated.
        if undisturbed && (cleaned.invalidates || cell.by == Some(false)) {
            cell.by = None;
        }
    }

    /// Object `to` begins to become a copy of object `from`, as that is at one moment until [`Self::end_fork`].
    pub fn begin_fork(&mut self, from: usize, to: usize) {
        self.forget(to);
        let copies: Vec<_> = self.cells.iter().filter(|(place, _)| place.object == from).collect();
        let copy = |cell: &Cell| Cell { one_of: cell.values.len() > 1, ..cell.clone() };
        let copies: Vec<_> =
            copies.into_iter().map(|(place, cell)| (Place { object: to, ..*place }, copy(cell))).collect();
        self.cells.extend(copies);
        self.forking.push((from, to));
    }

    /// It has its own way from now on.
    pub fn end_fork(&mut self, to: usize) {
        self.forking.retain(|(_, copy)| *copy != to);
    }

    /// An object is gone.
    pub fn forget(&mut self, object: usize) {
        self.cells.retain(|place, _| place.object != object);
    }

    /// Frames of which some word surely reads otherwise in objects `one` and `other`.
    pub fn unlike(&self, one: usize, other: usize) -> std::collections::BTreeSet<u64> {
        let initial =
            |place: Place| vec![self.initial.get(place.object).copied().filter(|_| place.word < TAGS).unwrap_or(0)];
        let differs = |(place, cell): (&Place, &Cell)| {
            let twin = Place { object: if place.object == one { other } else { one }, ..*place };
            let values = self.cells.get(&twin).map_or_else(|| initial(twin), |cell| cell.values.clone());
            !cell.mixed && !values.iter().any(|value| cell.values.contains(value))
        };
        let mine = self.cells.iter().filter(|(place, _)| [one, other].contains(&place.object));
        mine.filter(|cell| differs(*cell)).map(|(place, _)| place.frame).collect()
    }

    /// `count` frames were unmapped, and cleaned on the way: both kinds of access agree on them from now on.
    pub fn cleaned(&mut self, object: usize, frame: u64, count: u64) {
        let inside = |place: &Place| place.object == object && place.frame.wrapping_sub(frame) < count;
        self.cells.iter_mut().filter(|(place, _)| inside(place)).for_each(|(_, cell)| cell.by = None);
    }

    /// The owner begins to make `count` frames from `frame` read as zero.
    pub fn begin_zero(&mut self, object: usize, frame: u64, count: u64) -> Vec<Begun> {
        let inside = |place: &Place| place.object == object && place.frame.wrapping_sub(frame) < count;
        let places: Vec<Place> = self.cells.keys().copied().filter(inside).collect();
        places.into_iter().map(|place| self.begin(place, 0, false)).collect()
    }

    /// A read returned `value`: what it should have been, if it should not have been that.
    pub fn judge(&mut self, place: Place, value: u64, uncached: bool) -> Option<String> {
        let cell = self.cell(place);
        if cell.mixed || cell.by.is_some_and(|by| by != uncached) {
            return None;
        }
        if cell.values.contains(&value) {
            if cell.one_of {
                cell.values = vec![value];
                cell.one_of = false;
            }
            return None;
        }
        let right = cell.values.iter().map(|value| format!("{value:#x}")).collect::<Vec<_>>().join(" or ");
        let what = match place.word.checked_sub(TAGS) {
            Some(granule) => format!("the tag of granule {granule}"),
            None => format!("word {}", place.word),
        };
        Some(format!(
            "a read of {what} of frame {} of object {} returned {value:#x}; only {right} was put there",
            place.frame, place.object
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place { object: 0, frame: 1, word: 2 };

    #[test]
    fn memory_begins_as_zero_and_holds_the_last_store() {
        let mut oracle = Oracle::default();
        assert!(oracle.judge(PLACE, 0, false).is_none());
        assert!(oracle.judge(PLACE, 7, false).is_some());
        oracle.store(PLACE, 7, false, true);
        assert!(oracle.judge(PLACE, 7, true).is_none());
        assert!(oracle.judge(PLACE, 0, false).unwrap().contains("only 0x7 was put there"));
    }

    #[test]
    fn while_the_owner_stores_both_are_right() {
        let mut oracle = Oracle::default();
        let begun = oracle.begin(PLACE, 5, false);
        assert!(oracle.judge(PLACE, 0, false).is_none() && oracle.judge(PLACE, 5, false).is_none());
        oracle.end(begun);
        assert!(oracle.judge(PLACE, 0, false).is_some());
        let zero = oracle.begin_zero(0, 0, 2);
        oracle.store(PLACE, 9, false, true);
        zero.into_iter().for_each(|begun| oracle.end(begun));
        assert!(oracle.judge(PLACE, 9, false).is_none() && oracle.judge(PLACE, 0, false).is_some());
    }

    #[test]
    fn a_copy_is_of_one_moment() {
        let copy = Place { object: 1, ..PLACE };
        let mut oracle = Oracle::default();
        oracle.store(PLACE, 5, false, true);
        oracle.begin_fork(0, 1);
        oracle.store(PLACE, 6, false, true);
        oracle.end_fork(1);
        oracle.store(PLACE, 7, false, true);
        assert_eq!(oracle.unlike(0, 1), [1].into());
        assert!(oracle.judge(copy, 7, false).is_some() && oracle.judge(copy, 5, false).is_none());
        assert!(oracle.judge(copy, 6, false).is_some(), "it was 5 before");
        assert!(oracle.judge(PLACE, 7, false).is_none());
        oracle.forget(1);
        assert!(oracle.judge(copy, 0, false).is_none());
    }

    #[test]
    fn a_guest_that_mixes_is_on_its_own() {
        let mut oracle = Oracle::default();
        oracle.store(PLACE, 7, false, false);
        assert!(oracle.judge(PLACE, 99, true).is_none());
        assert!(oracle.judge(PLACE, 99, false).is_some());
        oracle.cleaned(0, 0, 2);
        assert!(oracle.judge(PLACE, 99, true).is_some());
    }

    #[test]
    fn maintenance_makes_both_kinds_agree_unless_somebody_stores_meanwhile() {
        let mut oracle = Oracle::default();
        oracle.store(PLACE, 7, false, false);
        let clean = oracle.begin_clean(PLACE, false);
        oracle.store(PLACE, 8, false, false);
        oracle.end_clean(&clean);
        assert!(oracle.judge(PLACE, 99, true).is_none(), "8 came after the clean began");
        let clean = oracle.begin_clean(PLACE, false);
        oracle.end_clean(&clean);
        assert!(oracle.judge(PLACE, 99, true).is_some() && oracle.judge(PLACE, 8, true).is_none());
        oracle.store(PLACE, 9, true, false);
        let clean = oracle.begin_clean(PLACE, false);
        oracle.end_clean(&clean);
        assert!(oracle.judge(PLACE, 99, false).is_none(), "a copy may be older than memory");
        let clean = oracle.begin_clean(PLACE, true);
        oracle.end_clean(&clean);
        assert!(oracle.judge(PLACE, 99, false).is_some() && oracle.judge(PLACE, 9, false).is_none());
    }
}
