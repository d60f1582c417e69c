//! The tree itself: its root, the walk down, and its end.

use entresol_addr::{Gfn, Pfn, PfnRange};
use entresol_machine::{Machine, TlbOp, Word};
use entresol_sync::atomic::{AtomicU64, Ordering};

use crate::counters::Counters;
use crate::geometry::INDEX_BITS;
use crate::marker::Ticket;
use crate::vmid::flush;
use crate::{Census, Entry, Format, Geometry, LEAF_LEVEL, VmidSource, index, shift};

/// The second-stage tables of one guest.
pub struct Table<F> {
    format: F,
    geometry: Geometry,
    root: PfnRange,
    pub(crate) counters: Counters,
    tickets: AtomicU64,
    /// Words of the root, from its first, that ever held anything: where memory is, a root has few.
    reach: AtomicU64,
}

/// The frames offered as a root do not fit the geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RootError {
    /// There must be exactly as many as the geometry says.
    Count {
        /// What the geometry needs.
        needed: u64,
        /// What was offered.
        offered: u64,
    },
    /// Concatenated frames are aligned to their total size (Arm DDI 0487 D8.2, concatenated translation tables).
    Misaligned {
        /// The first frame offered.
        start: Pfn,
        /// The alignment in frames.
        alignment: u64,
    },
    /// An entry of the format cannot hold the address.
    Unreachable {
        /// The first frame offered.
        start: Pfn,
    },
}

/// The end of a walk: the first entry that is not a table, or that lies at the level asked for.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    /// Where the entry is.
    pub word: Word,
    /// Its level, 0–3.
    pub level: u8,
    /// What it held.
    pub raw: u64,
    /// What that says.
    pub entry: Entry,
}

impl<F: Format> Table<F> {
    /// An empty table in the frames of `root`, which it zeroes and publishes.
    ///
    /// # Errors
    ///
    /// [`RootError`] if the frames do not fit; nothing was touched then.
    pub fn new<M: Machine>(machine: &M, format: F, geometry: Geometry, root: PfnRange) -> Result<Self, RootError> {
        let needed = geometry.root_frames();
        let start = root.start();
        if root.count() != needed {
            return Err(RootError::Count { needed, offered: root.count() });
        }
        if !start.get().is_multiple_of(needed.next_power_of_two()) {
            return Err(RootError::Misaligned { start, alignment: needed.next_power_of_two() });
        }
        if (root.end().get() - 1) >> F::FRAME_BITS != 0 {
            return Err(RootError::Unreachable { start });
        }
        machine.zero(root);
        machine.published();
        Ok(Self {
            format,
            geometry,
            root,
            counters: Counters::default(),
            tickets: AtomicU64::new(0),
            reach: AtomicU64::new(0),
        })
    }

    /// The shape of the tree.
    #[inline]
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The format of its entries.
    #[inline]
    pub const fn format(&self) -> F {
        self.format
    }

    /// The root's frames: what the hardware's base register points to.
    #[inline]
    pub const fn root(&self) -> PfnRange {
        self.root
    }

    /// Entries by size, and table pages, now.
    pub fn census(&self) -> Census {
        self.counters.census()
    }

    /// The entry that decides how `gfn` is translated; `None` if the table translates no such address.
    #[inline]
    pub fn walk<M: Machine>(&self, machine: &M, gfn: Gfn) -> Option<Walk> {
        self.geometry.contains(gfn).then(|| self.descend(machine, gfn, LEAF_LEVEL))
    }

    /// How many table pages a map of an entry at `level` that begins at `walk` can need: one for each level between.
    #[inline]
    pub(crate) const fn missing(walk: &Walk, level: u8) -> usize {
        level.saturating_sub(walk.level) as usize
    }

    /// How many table pages a [`Table::map`] of a leaf of `size` at `gfn` needs, as things are now: at most
    /// [`crate::Reserve::MOST`].
    #[inline]
    pub fn needed<M: Machine>(&self, machine: &M, gfn: Gfn, size: entresol_addr::PageSize) -> usize {
        if !self.geometry.contains(gfn) {
            return 0;
        }
        let level = crate::level_of(size);
        Self::missing(&self.descend(machine, gfn, level), level)
    }

    /// The root's word for `gfn`, which is inside the geometry.
    #[inline]
    pub(crate) fn root_word(&self, gfn: Gfn) -> Word {
        let level = self.geometry.root_level();
        let frame = gfn.get() >> shift(level) >> 9;
        Word::new(self.root.start().offset(frame), index(gfn, level))
    }

    /// Walks to the entry at `target`, or to one above it that is not a table. `gfn` is inside the geometry.
    #[inline]
    pub(crate) fn descend<M: Machine>(&self, machine: &M, gfn: Gfn, target: u8) -> Walk {
        self.walk_from(machine, gfn, self.root_word(gfn), self.geometry.root_level(), target)
    }

    /// The rest of a walk, from `word` at `level`.
    #[inline]
    pub(crate) fn walk_from<M: Machine>(&self, machine: &M, gfn: Gfn, word: Word, level: u8, target: u8) -> Walk {
        let (mut word, mut level, mut low) = (word, level, shift(level));
        loop {
            let raw = machine.load(word);
            let entry = self.format.decode(raw, level);
            match entry {
                Entry::Table(frame) if level < target => {
                    level += 1;
                    low -= INDEX_BITS;
                    // `Word::new` keeps the nine bits of the index.
                    word = Word::new(frame, (gfn.get() >> low) as u16);
                }
                _ => return Walk { word, level, raw, entry },
            }
        }
    }

    /// A name for one more unmap.
    pub(crate) fn ticket(&self) -> Ticket {
        Ticket::new(self.tickets.fetch_add(1, Ordering::Relaxed))
    }

    /// The root's word for `gfn` is about to hold something.
    pub(crate) fn extend_reach(&self, gfn: Gfn) {
        self.reach.fetch_max((gfn.get() >> shift(self.geometry.root_level())) + 1, Ordering::Relaxed);
    }

    /// Words of the root behind which none ever held anything. Exact while nobody installs entries.
    pub(crate) fn reach(&self) -> u64 {
        self.reach.load(Ordering::Relaxed)
    }

    /// Ends the table: flushes the VM's translations, gives every table page to `free`, and returns the root's frames.
    ///
    /// No vCPU runs on it any more, and nobody else can hold a reference, so no grace period is needed.
    pub fn destroy<M: Machine, V: VmidSource>(self, machine: &M, vmid: V, mut free: impl FnMut(Pfn)) -> PfnRange {
        flush(machine, &vmid, TlbOp::Vmid);
        for frame in 0..self.root.count() {
            self.free_below(machine, self.root.start().offset(frame), self.geometry.root_level(), &mut free);
        }
        self.root
    }

    /// Frees the tables that the words of `frame`, a table at `level`, point to; at most three calls deep.
    fn free_below<M: Machine>(&self, machine: &M, frame: Pfn, level: u8, free: &mut dyn FnMut(Pfn)) {
        if level == LEAF_LEVEL {
            return;
        }
        for index in 0..Word::PER_FRAME {
            let raw = machine.load(Word::new(frame, index));
            if let Entry::Table(below) = self.format.decode(raw, level) {
                self.free_below(machine, below, level + 1, free);
                free(below);
            }
        }
    }
}
