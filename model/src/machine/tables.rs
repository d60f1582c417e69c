//! The second-stage tables that the core wrote, with everything that ever stood in them.
//!
//! Purpose: a walker may use values that are gone from memory, so each word of a table that a walker can reach keeps its
//! history. A frame becomes a table when an entry that points to it is stored in a reachable table; what stands in it
//! then becomes visible at once.

use entresol_addr::{Gfn, GfnRange, Pfn};
use entresol_table::{index, shift};

use super::descriptor::{Descriptor, Leaf};
use super::linear::SHADOWS;
use super::tlb::{NEVER, Stamp, Standing, Tlb};

/// A value of a word, and since when.
#[derive(Clone, Copy, Debug)]
pub struct Past {
    /// When it was stored.
    pub at: Stamp,
    /// What it says.
    pub descriptor: Descriptor,
    /// The table it points to.
    pub child: Option<usize>,
}

/// A table that a walker could reach at some time.
#[derive(Debug)]
pub struct Table {
    /// Whose.
    pub vm: usize,
    /// Its level, 0–3.
    pub level: u8,
    /// First guest frame behind it.
    pub base: Gfn,
    /// Where it is.
    pub frame: Pfn,
    /// Whether the base register points to it.
    pub root: bool,
    /// Its frame is something else now.
    pub gone: bool,
    /// Words that ever held something, by index.
    words: Vec<(u16, Vec<Past>)>,
}

/// All tables of all virtual machines.
#[derive(Debug, Default)]
pub struct Tables {
    tables: Vec<Table>,
}

/// A leaf that some cache may hold, or that stands in a table now.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// The table.
    pub table: usize,
    /// The word.
    pub index: u16,
    /// Guest frames behind the word.
    pub span: GfnRange,
    /// The leaf.
    pub leaf: Leaf,
    /// No walk finds it any more; only a cache may have it.
    pub stale: bool,
}

impl Table {
    /// The values of a word, oldest first; empty if nothing was ever stored.
    pub fn history(&self, index: u16) -> &[Past] {
        match self.words.binary_search_by_key(&index, |(at, _)| *at) {
            Ok(place) => &self.words[place].1,
            Err(_) => &[],
        }
    }

    /// Guest frames behind word `index`.
    pub fn span(&self, index: u16) -> GfnRange {
        let frames = 1 << shift(self.level);
        GfnRange::new(self.base.offset(u64::from(index) * frames), frames).expect("a table translates at most 48 bits")
    }

    /// Value `place` of the history of word `index`, as caches see it.
    pub fn standing(&self, index: u16, history: &[Past], place: usize) -> Standing {
        Standing {
            vm: self.vm,
            level: self.level,
            span: self.span(index),
            table: matches!(history[place].descriptor, Descriptor::Table(_)),
            from: history[place].at,
            until: history.get(place + 1).map_or(NEVER, |next| next.at),
            cut: None,
        }
    }
}

impl Tables {
    /// Table number `table`.
    pub fn get(&self, table: usize) -> &Table {
        &self.tables[table]
    }

    /// A frame is a table from now on. Returns its number.
    pub fn add(&mut self, vm: usize, level: u8, base: Gfn, frame: Pfn, root: bool) -> usize {
        self.tables.push(Table { vm, level, base, frame, root, gone: false, words: Vec::new() });
        self.tables.len() - 1
    }

    /// No base register will point to the tables of `vm` any more.
    pub fn uproot(&mut self, vm: usize) {
        self.tables.iter_mut().filter(|table| table.vm == vm).for_each(|table| table.root = false);
    }

    /// Nor to those of its shadow tables, whatever their roots show.
    pub fn uproot_shadows(&mut self, vm: usize) {
        let shadows = self.tables.iter_mut().filter(|table| table.vm >= SHADOWS && table.vm % SHADOWS == vm);
        shadows.for_each(|table| table.root = false);
    }

    /// The root table of `vm` that translates `gfn`.
    pub fn root(&self, vm: usize, gfn: Gfn) -> Option<usize> {
        self.tables.iter().position(|table| {
            let frames = 1 << (shift(table.level) + 9);
            table.root && table.vm == vm && gfn.since(table.base) < frames
        })
    }

    /// Records what a word says from now on; returns what it said.
    pub fn record(&mut self, table: usize, index: u16, past: Past) -> Descriptor {
        let words = &mut self.tables[table].words;
        let place = match words.binary_search_by_key(&index, |(at, _)| *at) {
            Ok(place) => place,
            Err(place) => {
                words.insert(place, (index, Vec::new()));
                place
            }
        };
        let history = &mut words[place].1;
        let old = history.last().map_or(Descriptor::Invalid, |last| last.descriptor);
        history.push(past);
        old
    }

    /// The frame of a table is freed or reused: all its words are overwritten.
    pub fn retire(&mut self, table: usize, now: Stamp) {
        let table = &mut self.tables[table];
        table.gone = true;
        for (_, history) in &mut table.words {
            if history.last().is_some_and(|last| !last.descriptor.is_invalid()) {
                history.push(Past { at: now, descriptor: Descriptor::Invalid, child: None });
            }
        }
    }

    /// The word that decides how `gfn` is translated for `vm` now: its descriptor and its level.
    pub fn current(&self, vm: usize, gfn: Gfn) -> (Descriptor, u8) {
        let Some(mut at) = self.root(vm, gfn) else { return (Descriptor::Invalid, 0) };
        loop {
            let table = &self.tables[at];
            match table.history(index(gfn, table.level)).last() {
                Some(Past { child: Some(child), .. }) => at = *child,
                Some(past) => return (past.descriptor, table.level),
                None => return (Descriptor::Invalid, table.level),
            }
        }
    }

    /// Whether a walk can come to the table now, through memory or through walk caches.
    fn is_reachable(&self, tlb: &Tlb, table: usize) -> bool {
        let this = &self.tables[table];
        if this.root {
            return true;
        }
        let parents =
            self.tables.iter().enumerate().filter(|(_, parent)| parent.level + 1 == this.level && parent.vm == this.vm);
        parents.map(|(number, _)| View::new(self, tlb, number)).any(|mut view| {
            view.table.words.iter().any(|(index, history)| {
                let mut pointers = history.iter().enumerate().filter(|(_, past)| past.child == Some(table));
                pointers.any(|(place, _)| view.standing(*index, history, place).is_some())
            })
        })
    }

    /// When the last way to a table ended that no walk can come to now: a flush that began later and covers the way to an
    /// entry of it leaves nothing of that in any cache. `None` if there never was one.
    fn cut(&self, tlb: &Tlb, table: usize) -> Option<Stamp> {
        let this = &self.tables[table];
        let parents = self.tables.iter().enumerate().filter(|(_, parent)| parent.level + 1 == this.level);
        let ways = parents.flat_map(|(number, parent)| parent.words.iter().map(move |(_, history)| (number, history)));
        let pointers = ways.flat_map(|(number, history)| {
            let next = |place: usize| history.get(place + 1).map_or(NEVER, |next| next.at);
            let points =
                move |(place, past): (usize, &Past)| (past.child == Some(table)).then(|| (number, next(place)));
            history.iter().enumerate().filter_map(points)
        });
        // A pointer is of no use in a table that was cut off itself.
        pointers
            .map(|(parent, until)| {
                let reachable = self.is_reachable(tlb, parent);
                if reachable { until } else { until.min(self.cut(tlb, parent).unwrap_or(NEVER)) }
            })
            .max()
    }

    /// Calls `see` for every leaf by which some CPU may still reach memory: those in reachable tables, and stale ones in
    /// some cache. `vm` and `range` narrow the search.
    pub fn each_seen(&self, tlb: &Tlb, vm: Option<usize>, range: Option<GfnRange>, mut see: impl FnMut(Seen)) {
        let wanted = self.tables.iter().enumerate().filter(|(_, table)| vm.is_none_or(|vm| table.vm == vm));
        for (number, table) in wanted {
            let mut view = View::new(self, tlb, number);
            for (index, history) in &table.words {
                let span = table.span(*index);
                if range.is_some_and(|range| !range.overlaps(span)) {
                    continue;
                }
                for (place, past) in history.iter().enumerate() {
                    let Descriptor::Leaf(leaf) = past.descriptor else { continue };
                    if let Some(stale) = view.standing(*index, history, place) {
                        see(Seen { table: number, index: *index, span, leaf, stale });
                    }
                }
            }
        }
    }

    /// Calls `see` with the level of every table entry that points to `frame` and that some CPU may still follow.
    pub fn each_pointer(&self, tlb: &Tlb, frame: Pfn, mut see: impl FnMut(u8)) {
        for (number, table) in self.tables.iter().enumerate() {
            let mut view = View::new(self, tlb, number);
            for (index, history) in &table.words {
                for (place, past) in history.iter().enumerate() {
                    let points = past.descriptor == Descriptor::Table(frame);
                    if points && view.standing(*index, history, place).is_some() {
                        see(table.level);
                    }
                }
            }
        }
    }
}

/// One table as CPUs see it. Whether a walk comes to it is looked up once, when it is first wanted.
struct View<'a> {
    tables: &'a Tables,
    tlb: &'a Tlb,
    number: usize,
    table: &'a Table,
    /// Whether a walk can come to it, and since when not.
    reached: Option<(bool, Option<Stamp>)>,
}

impl<'a> View<'a> {
    fn new(tables: &'a Tables, tlb: &'a Tlb, number: usize) -> Self {
        Self { tables, tlb, number, table: tables.get(number), reached: None }
    }

    /// Whether some CPU can use value `place` of a word: `false` if a walk finds it, `true` if only a cache may have it.
    fn standing(&mut self, index: u16, history: &[Past], place: usize) -> Option<bool> {
        let last = place + 1 == history.len();
        let standing = self.table.standing(index, history, place);
        let held =
            |standing: &Standing| history[place].descriptor.is_cacheable() && self.tlb.may_hold(None, None, standing);
        if !last && !held(&standing) {
            return None;
        }
        let (tables, tlb, number) = (self.tables, self.tlb, self.number);
        let (reachable, cut) = *self.reached.get_or_insert_with(|| {
            let reachable = tables.is_reachable(tlb, number);
            (reachable, if reachable { None } else { tables.cut(tlb, number) })
        });
        if last && reachable {
            return Some(false);
        }
        held(&Standing { cut, ..standing }).then_some(true)
    }
}
