//! Taking everything out of the tree in a time that does not grow with what is mapped.
//!
//! Protocol: [`Table::detach`] moves each word of the root into a second root, which no hardware walker ever sees, marks
//! the word removed, flushes the VM's translations, and makes the words vacant. The caller then waits a grace period,
//! after which nobody stands in what was moved, and takes it apart with [`Detached::dismantle`], as many table pages at a
//! time as it likes. The census still counts what has not been taken apart.
//!
//! Invariants: INV-2 (nothing is installed in a root's word before the flush is complete), INV-7 (each table page hangs
//! from one of the two roots).

use entresol_addr::{Gfn, PageSize, Pfn, PfnRange};
use entresol_machine::{Machine, TlbOp, Word};

use crate::marker::{Marker, Ticket};
use crate::vmid::flush;
use crate::{Census, Entry, Format, LEAF_LEVEL, Table, VACANT, VmidSource, index, shift, size_at};

/// A tree that was detached and is being taken apart.
#[must_use = "the table pages are lost if they are not taken apart"]
#[derive(Debug)]
pub struct Detached {
    root: PfnRange,
    /// The guest frame that the taking apart has come to.
    next: u64,
    /// Behind it nothing was mapped.
    end: u64,
}

impl<F: Format> Table<F> {
    /// Moves everything below the root to a second root in the frames of `stash`, as many as the root has, and flushes.
    /// When it returns, no translation that was there before is left, and the table is empty. What cleaning an unmap would
    /// owe is not done: whoever maps or copies a page next does it.
    ///
    /// Nobody installs entries meanwhile.
    pub fn detach<M: Machine, V: VmidSource>(&self, machine: &M, vmid: V, stash: PfnRange) -> Detached {
        assert_eq!(stash.count(), self.root().count(), "a second root has the shape of the first");
        machine.zero(stash);
        let ticket = self.ticket();
        let mut moved = None;
        for number in 0..self.reach() {
            if self.move_word(machine, number, stash, ticket) {
                let first = moved.map_or(number, |(first, _)| first);
                moved = Some((first, number));
            }
        }
        flush(machine, &vmid, TlbOp::Vmid);
        let removed = Marker::Removed(ticket).encode::<F>();
        let (first, last) = moved.unwrap_or((1, 0));
        for number in first..=last {
            // Fails for a word that was vacant, or is another operation's.
            let _ = machine.compare_exchange(word_of(self.root(), number), removed, VACANT);
        }
        machine.published();
        let frames = |words: u64| words << shift(self.geometry().root_level());
        moved.map_or(Detached { root: stash, next: 0, end: 0 }, |(first, last)| Detached {
            root: stash,
            next: frames(first),
            end: frames(last + 1),
        })
    }

    /// Moves word `number` of the root; whether there was something to move.
    fn move_word<M: Machine>(&self, machine: &M, number: u64, stash: PfnRange, ticket: Ticket) -> bool {
        let word = word_of(self.root(), number);
        loop {
            let raw = machine.load(word);
            match self.format().decode(raw, self.geometry().root_level()) {
                Entry::Vacant => return false,
                Entry::Broken if Marker::decode::<F>(raw) == Marker::Claimed => entresol_sync::hint::spin_loop(),
                // What another operation removed is its own, and flushed here too.
                Entry::Broken => return false,
                Entry::Table(_) | Entry::Leaf(_) => {
                    let removed = Marker::Removed(ticket).encode::<F>();
                    if machine.compare_exchange(word, raw, removed).is_ok() {
                        machine.store(word_of(stash, number), raw);
                        return true;
                    }
                }
            }
        }
    }
}

/// Word `number` of a root, the frames of which follow each other.
fn word_of(root: PfnRange, number: u64) -> Word {
    let words = u64::from(Word::PER_FRAME);
    Word::new(root.start().offset(number / words), (number % words) as u16)
}

impl Detached {
    /// Takes at least one and at most about `limit` table pages apart, gives each to `free`, and counts what is gone.
    /// `true` when all is done: then only the frames of [`Self::root`] are left, which are the caller's again.
    ///
    /// A grace period has passed since the tree was detached from `table`.
    pub fn dismantle<M: Machine, F: Format>(
        &mut self,
        machine: &M,
        table: &Table<F>,
        limit: u64,
        mut free: impl FnMut(Pfn),
    ) -> bool {
        let mut gone = Census::default();
        while self.next < self.end && gone.tables < limit {
            self.next = self.step(machine, table, &mut gone, &mut free);
        }
        table.counters.remove(&gone);
        self.next >= self.end
    }

    /// The frames of the second root.
    pub const fn root(&self) -> PfnRange {
        self.root
    }

    /// Deals with one word, or with a whole table of the last level, and frees the tables that end there. Returns the
    /// first guest frame behind it.
    fn step<M: Machine, F: Format>(
        &self,
        machine: &M,
        table: &Table<F>,
        gone: &mut Census,
        free: &mut dyn FnMut(Pfn),
    ) -> u64 {
        let gfn = Gfn::new(self.next);
        let root_level = table.geometry().root_level();
        let mut level = root_level;
        let mut word = word_of(self.root, gfn.get() >> shift(level));
        // For each table on the way: its frame, and the word that points to it.
        let mut path = [(Pfn::new(0), word); LEAF_LEVEL as usize + 1];
        let entry = loop {
            match table.format().decode(machine.load(word), level) {
                Entry::Table(below) => {
                    level += 1;
                    path[level as usize] = (below, word);
                    word = Word::new(below, index(gfn, level));
                    if level == LEAF_LEVEL {
                        count_leaves(machine, table, below, gone);
                        break Entry::Vacant;
                    }
                }
                entry => break entry,
            }
        };
        if let (Entry::Leaf(_), Some(size)) = (entry, size_at(level)) {
            gone.count(size);
        }
        // A table of the last level is done as a whole.
        let done = if level == LEAF_LEVEL { LEAF_LEVEL - 1 } else { level };
        let next = ((gfn.get() >> shift(done)) + 1) << shift(done);
        while level > root_level && (level == LEAF_LEVEL || index(Gfn::new(next), level) == 0) {
            let (frame, word) = path[level as usize];
            machine.store(word, VACANT);
            free(frame);
            gone.tables += 1;
            level -= 1;
        }
        next
    }
}

/// Counts the leaves of a table of the last level.
fn count_leaves<M: Machine, F: Format>(machine: &M, table: &Table<F>, frame: Pfn, gone: &mut Census) {
    let leaf = |index: &u16| {
        matches!(table.format().decode(machine.load(Word::new(frame, *index)), LEAF_LEVEL), Entry::Leaf(_))
    };
    gone.leaves[PageSize::Size4K as usize] += (0..Word::PER_FRAME).filter(leaf).count() as u64;
}
