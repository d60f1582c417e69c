//! Entries that map nothing and remember why: "no slot holds this frame".
//!
//! Purpose: an access to a device faults always. With an MMIO entry in the last level it faults in a way that the hardware
//! reports apart from all others, and the entry holds what the look at the slots found, so that no look is needed. A format
//! says whether it has such entries ([`Format::generation_bits`]); without them nothing here is compiled.
//!
//! Protocol:
//! * An MMIO entry stands only where nothing is mapped: it takes the place of a vacant word or of an older one, never of a
//!   leaf, whose translation some TLB may hold (INV-2, Z-C3). The hardware caches nothing of it, so what replaces it needs no
//!   invalidation.
//! * It is not removed when it becomes untrue. Its reader compares the generation (INV-8), which the crate `mmu` does; when
//!   generations begin anew, [`Table::clear_mmio`] removes all.
//! * [`Table::way`] is the walk of whoever was told of such a fault: lock-free, in a grace period, word by word, each whole. It
//!   stops at a word that the hardware refuses and that is no MMIO entry, and follows it nowhere.

use entresol_addr::{Gfn, GfnRange};
use entresol_machine::{Machine, Word};
use entresol_sync::planted;

use crate::cursor::Cursor;
use crate::{Entry, Format, LEAF_LEVEL, MapError, MmioEntry, Reserve, Table, VACANT, index};

/// Words from the root to a guest frame, as one walk read them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Level of the first word.
    pub first: u8,
    /// Level of the last one.
    pub last: u8,
    /// The words, by level; 0 outside `first..=last`.
    pub words: [u64; LEAF_LEVEL as usize + 1],
    /// What the last one says.
    pub end: End,
}

/// The end of a [`Way`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// There is no memory.
    Mmio(MmioEntry),
    /// A word that the hardware refuses, and nobody here has written.
    Malformed,
    /// Anything else: a leaf, nothing, or a change in progress.
    Entry(Entry),
}

impl<F: Format> Table<F> {
    /// The words on the way to `gfn`; `None` if the table translates no such address.
    pub fn way<M: Machine>(&self, machine: &M, gfn: Gfn) -> Option<Way> {
        if !self.geometry().contains(gfn) {
            return None;
        }
        let (format, first) = (self.format(), self.geometry().root_level());
        let (mut word, mut level) = (self.root_word(gfn), first);
        let mut words = [0; LEAF_LEVEL as usize + 1];
        loop {
            let raw = machine.load(word);
            words[level as usize] = raw;
            let way = |end| Some(Way { first, last: level, words, end });
            if level == LEAF_LEVEL
                && let Some(entry) = format.mmio_entry(raw)
            {
                return way(End::Mmio(entry));
            }
            if format.is_malformed(raw, level) {
                return way(End::Malformed);
            }
            match format.decode(raw, level) {
                Entry::Table(below) => {
                    level += 1;
                    word = Word::new(below, index(gfn, level));
                }
                entry => return way(End::Entry(entry)),
            }
        }
    }

    /// Remembers `entry` where nothing is mapped, in place of what was remembered there before.
    ///
    /// # Errors
    ///
    /// [`MapError`]: `Outside`; `NoTable`; `Busy` if another CPU changes the entry; `Occupied` if memory is mapped there, or if
    /// no word can hold `entry`.
    pub fn set_mmio<M: Machine>(&self, machine: &M, entry: &MmioEntry, reserve: &mut Reserve) -> Result<(), MapError> {
        let gfn = entry.gfn;
        let mut at = self.walk(machine, gfn).ok_or(MapError::Outside { gfn })?;
        let raw = self.format().mmio(entry).ok_or(MapError::Occupied)?;
        let needed = Self::missing(&at, LEAF_LEVEL);
        loop {
            match at.entry {
                Entry::Vacant if at.level == LEAF_LEVEL => break,
                Entry::Vacant if reserve.len() < Self::missing(&at, LEAF_LEVEL) => {
                    return Err(MapError::NoTable { needed });
                }
                Entry::Vacant => {
                    if at.level == self.geometry().root_level() {
                        self.extend_reach(gfn);
                    }
                    let below = self.link(machine, at.word, reserve)?;
                    let level = at.level + 1;
                    at = self.walk_from(machine, gfn, Word::new(below, index(gfn, level)), level, LEAF_LEVEL);
                }
                Entry::Leaf(leaf) if planted!(ZC3) && at.level == LEAF_LEVEL => {
                    self.counters.remove_leaves(leaf.size, 1);
                    break;
                }
                Entry::Leaf(_) => return Err(MapError::Occupied),
                // A walk to the last level ends at no table.
                Entry::Broken | Entry::Table(_) => return Err(MapError::Busy),
            }
        }
        machine.compare_exchange(at.word, at.raw, raw).map_err(|_| MapError::Busy)?;
        machine.published();
        Ok(())
    }

    /// Removes every MMIO entry of `range`; returns how many. One that is made meanwhile may stay.
    pub fn clear_mmio<M: Machine>(&self, machine: &M, range: GfnRange) -> u64 {
        let (mut cleared, mut cursor) = (0, Cursor::new(self, machine, range));
        while let Some(place) = cursor.peek() {
            match place.entry {
                Entry::Vacant if place.raw != VACANT => {
                    // If it fails, somebody has put something else there, or a newer one: that is looked at again.
                    if machine.compare_exchange(place.word, place.raw, VACANT).is_ok() {
                        cleared += 1;
                        cursor.advance();
                    }
                }
                Entry::Vacant | Entry::Leaf(_) => cursor.advance(),
                Entry::Table(below) => cursor.descend(below),
                Entry::Broken => {
                    if cursor.meet(place.raw).is_some() {
                        cursor.advance();
                    }
                }
            }
        }
        machine.published();
        cleared
    }
}
