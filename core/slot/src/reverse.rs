//! Slots in the order of what they map: from an object's range back to the guest's.
//!
//! Purpose: a notifier knows `(object, range)` and must reach every slot that shows a part of it. Slots of one object
//! may overlap each other there, so an order alone does not bound the search.
//!
//! Shape: `order` holds slot numbers by (object, offset, number). Over its places stands a tree of maxima in one array:
//! node `k` has the children `2k` and `2k + 1`, leaf `width + place` is the end of that slot in its object. "The next
//! place at or after `p` whose end is above `x`" takes logarithmic time, whatever overlaps.
//!
//! Invariants: leaves from `len` on are 0. Only the writer stores, in the set that nobody reads.

use alloc::boxed::Box;

use entresol_sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::set::{insert, remove, try_boxed};

pub(crate) struct Reverse {
    order: Box<[AtomicU32]>,
    ends: Box<[AtomicU64]>,
    width: usize,
}

impl Reverse {
    pub(crate) fn with_capacity(capacity: usize) -> Option<Self> {
        let width = capacity.next_power_of_two();
        Some(Self {
            order: try_boxed(capacity, || AtomicU32::new(0))?,
            ends: try_boxed(2 * width, || AtomicU64::new(0))?,
            width,
        })
    }

    /// The slot at `place`.
    pub(crate) fn at(&self, place: usize) -> u16 {
        self.order[place].load(Ordering::Relaxed) as u16
    }

    /// Puts slot `id`, which ends at `end` in its object, at `place` of `len`.
    pub(crate) fn insert(&self, len: usize, place: usize, id: u16, end: u64) {
        insert(&self.order, len, place, id);
        for moved in (place..len).rev() {
            self.set_leaf(moved + 1, self.leaf(moved));
        }
        self.set_leaf(place, end);
        self.refresh(place, len);
    }

    /// Takes what is at `place` of `len` out.
    pub(crate) fn remove(&self, len: usize, place: usize) {
        remove(&self.order, len, place);
        for moved in place + 1..len {
            self.set_leaf(moved - 1, self.leaf(moved));
        }
        self.set_leaf(len - 1, 0);
        self.refresh(place, len - 1);
    }

    /// The first place in `from .. until` whose slot ends above `above`.
    pub(crate) fn next_above(&self, from: usize, until: usize, above: u64) -> Option<usize> {
        if from >= until {
            return None;
        }
        let mut node = self.width + from;
        while self.end(node) <= above {
            // The next subtree to the right: up while this is a right child, then over.
            node >>= node.trailing_ones();
            if node == 0 {
                return None;
            }
            node += 1;
        }
        while node < self.width {
            node *= 2;
            if self.end(node) <= above {
                node += 1;
            }
        }
        let place = node - self.width;
        (place < until).then_some(place)
    }

    fn end(&self, node: usize) -> u64 {
        self.ends[node].load(Ordering::Relaxed)
    }

    fn leaf(&self, place: usize) -> u64 {
        self.end(self.width + place)
    }

    fn set_leaf(&self, place: usize, end: u64) {
        self.ends[self.width + place].store(end, Ordering::Relaxed);
    }

    /// Recomputes the maxima above the leaves `first ..= last`.
    fn refresh(&self, first: usize, last: usize) {
        let (mut low, mut high) = (self.width + first, self.width + last);
        while low > 1 {
            (low, high) = (low / 2, high / 2);
            for node in low..=high {
                self.ends[node].store(self.end(2 * node).max(self.end(2 * node + 1)), Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn next_above_is_what_a_scan_finds(
            edits in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>(), 0u64..20), 1..60),
            capacity in 1usize..20,
            above in 0u64..20,
        ) {
            let reverse = Reverse::with_capacity(capacity).unwrap();
            let mut naive: Vec<u64> = Vec::new();
            for (add, place, end) in edits {
                if add && naive.len() < capacity {
                    let place = place.index(naive.len() + 1);
                    reverse.insert(naive.len(), place, end as u16, end);
                    naive.insert(place, end);
                } else if !add && !naive.is_empty() {
                    let place = place.index(naive.len());
                    reverse.remove(naive.len(), place);
                    naive.remove(place);
                }
                for from in 0..naive.len() {
                    for until in from..=naive.len() {
                        let scanned = (from..until).find(|&place| naive[place] > above);
                        prop_assert_eq!(reverse.next_above(from, until, above), scanned);
                    }
                    prop_assert_eq!(u64::from(reverse.at(from)), naive[from]);
                }
            }
        }
    }
}
