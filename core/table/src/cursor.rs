//! A walk over a range of guest frames, entry by entry, in address order.
//!
//! Protocol: the cursor remembers the tables it came through. Others may unlink one of them meanwhile; every word of
//! it is then frozen, and the cursor starts again at the root for the address it has reached. It never goes back to an
//! address it has passed.

use entresol_addr::{Gfn, GfnRange, Pfn};
use entresol_machine::{Machine, Word};

use crate::marker::Marker;
use crate::{Entry, Format, LEAF_LEVEL, Table, Walk, index, shift};

/// Where a cursor stands.
pub(crate) struct Place {
    pub(crate) word: Word,
    pub(crate) raw: u64,
    pub(crate) level: u8,
    pub(crate) entry: Entry,
    /// First guest frame behind the word.
    pub(crate) gfn: Gfn,
}

impl Place {
    /// The guest frames behind the word: at most 2^27 below 2^36, so this never wraps.
    fn end(&self) -> u64 {
        self.gfn.get() + (1 << shift(self.level))
    }
}

/// The smallest range around the entries that an operation touched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hull {
    start: u64,
    end: u64,
    entries: u64,
}

impl Hull {
    pub(crate) const fn new() -> Self {
        Self { start: u64::MAX, end: 0, entries: 0 }
    }

    pub(crate) fn include(&mut self, place: &Place) {
        self.start = self.start.min(place.gfn.get());
        self.end = self.end.max(place.end());
        self.entries += 1;
    }

    /// [`Self::include`] of the entry of one page.
    #[inline]
    pub(crate) fn include_page(&mut self, gfn: Gfn) {
        self.start = self.start.min(gfn.get());
        self.end = self.end.max(gfn.get() + 1);
        self.entries += 1;
    }

    pub(crate) fn join(&mut self, other: &Self) {
        self.start = self.start.min(other.start);
        self.end = self.end.max(other.end);
        self.entries += other.entries;
    }

    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    pub(crate) fn range(&self) -> Option<GfnRange> {
        let count = self.end.checked_sub(self.start)?;
        GfnRange::new(Gfn::new(self.start), count)
    }
}

/// The walk.
pub(crate) struct Cursor<'a, M, F> {
    table: &'a Table<F>,
    machine: &'a M,
    /// The tables on the way, by level; the root's own is not used.
    frames: [Pfn; LEAF_LEVEL as usize + 1],
    level: u8,
    gfn: u64,
    start: u64,
    end: u64,
}

impl<'a, M: Machine, F: Format> Cursor<'a, M, F> {
    /// At the first frame of `range`, of which only what the table translates is walked.
    pub(crate) fn new(table: &'a Table<F>, machine: &'a M, range: GfnRange) -> Self {
        let (start, end) = table.geometry().clip(range);
        Self {
            table,
            machine,
            frames: [Pfn::new(0); LEAF_LEVEL as usize + 1],
            level: table.geometry().root_level(),
            gfn: start,
            start,
            end,
        }
    }

    /// The entry here, freshly loaded, or `None` at the end of the range.
    pub(crate) fn peek(&self) -> Option<Place> {
        if self.gfn >= self.end {
            return None;
        }
        let (gfn, level) = (Gfn::new(self.gfn), self.level);
        let word = if level == self.table.geometry().root_level() {
            self.table.root_word(gfn)
        } else {
            Word::new(self.frames[level as usize], index(gfn, level))
        };
        let raw = self.machine.load(word);
        let entry = self.table.format().decode(raw, level);
        Some(Place { word, raw, level, entry, gfn: Gfn::new(self.gfn >> shift(level) << shift(level)) })
    }

    /// Whether all that lies behind `place` is in the range.
    pub(crate) fn covers(&self, place: &Place) -> bool {
        place.gfn.get() >= self.start && place.end() <= self.end
    }

    /// Goes into the table that the entry here points to.
    pub(crate) fn descend(&mut self, frame: Pfn) {
        self.level += 1;
        self.frames[self.level as usize] = frame;
    }

    /// Goes to the next entry, up where a table ends.
    pub(crate) fn advance(&mut self) {
        self.gfn = ((self.gfn >> shift(self.level)) + 1) << shift(self.level);
        while self.level > self.table.geometry().root_level() && index(Gfn::new(self.gfn), self.level) == 0 {
            self.level -= 1;
        }
    }

    /// Deals with a word that decoded as `Broken`: waits for a claim, leaves a page that was unlinked, passes what an
    /// unmap removed. Returns the ticket in the last case; the cursor then still stands at that word.
    pub(crate) fn meet(&mut self, raw: u64) -> Option<crate::marker::Ticket> {
        match Marker::decode::<F>(raw) {
            Marker::Removed(ticket) => return Some(ticket),
            Marker::Claimed => entresol_sync::hint::spin_loop(),
            Marker::Frozen(_) => self.level = self.table.geometry().root_level(),
        }
        None
    }
}

/// Looks entries up one by one, and remembers the last table of leaves for the next.
pub(crate) struct Finder<'a, M, F> {
    table: &'a Table<F>,
    machine: &'a M,
    /// Which frames the table translates, and where it is.
    near: Option<(u64, Pfn)>,
}

impl<'a, M: Machine, F: Format> Finder<'a, M, F> {
    pub(crate) fn new(table: &'a Table<F>, machine: &'a M) -> Self {
        Self { table, machine, near: None }
    }

    /// The leaf behind `gfn`, or the word that an unmap in progress removed; `None` if nothing is there. Waits for a
    /// claim, and walks anew where a table was unlinked.
    pub(crate) fn find(&mut self, gfn: Gfn) -> Option<Place> {
        if !self.table.geometry().contains(gfn) {
            return None;
        }
        loop {
            let at = self.look(gfn);
            let place = Place {
                word: at.word,
                raw: at.raw,
                level: at.level,
                entry: at.entry,
                gfn: Gfn::new(gfn.get() >> shift(at.level) << shift(at.level)),
            };
            match at.entry {
                // A walk to the last level ends at no table.
                Entry::Vacant | Entry::Table(_) => return None,
                Entry::Leaf(_) => return Some(place),
                Entry::Broken => match Marker::decode::<F>(at.raw) {
                    Marker::Removed(_) => return Some(place),
                    Marker::Claimed => entresol_sync::hint::spin_loop(),
                    Marker::Frozen(_) => self.near = None,
                },
            }
        }
    }

    /// The word behind `gfn` and what it holds, if it is in the table of leaves of the look before.
    #[inline]
    pub(crate) fn near(&self, gfn: Gfn) -> Option<(Word, u64)> {
        let (_, frame) = self.near.filter(|(near, _)| *near == gfn.get() >> shift(LEAF_LEVEL - 1))?;
        let word = Word::new(frame, index(gfn, LEAF_LEVEL));
        Some((word, self.machine.load(word)))
    }

    fn look(&mut self, gfn: Gfn) -> Walk {
        let number = gfn.get() >> shift(LEAF_LEVEL - 1);
        if let Some((near, frame)) = self.near
            && near == number
        {
            let word = Word::new(frame, index(gfn, LEAF_LEVEL));
            let raw = self.machine.load(word);
            return Walk { word, level: LEAF_LEVEL, raw, entry: self.table.format().decode(raw, LEAF_LEVEL) };
        }
        let at = self.table.descend(self.machine, gfn, LEAF_LEVEL);
        self.near = (at.level == LEAF_LEVEL).then(|| (number, at.word.frame()));
        at
    }
}
