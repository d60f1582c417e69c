//! A TLB that caches whatever it may, at once, and forgets only what it is told to.
//!
//! It replays a machine's log. A leaf is cached the moment it can be walked to, also through a table page that was
//! unlinked but not yet flushed from the walk caches. When a leaf becomes reachable while a different translation of the
//! same guest frame is still cached, break-before-make was violated (INV-2), and the replay panics.

use std::collections::{BTreeMap, HashMap};

use entresol_addr::{Gfn, GfnRange, Pfn, PfnRange};
use entresol_machine::flat::Event;
use entresol_machine::{TlbOp, Word};
use entresol_table::{Entry, Format, Geometry, Leaf, level_of, shift};

use super::Plain;

/// A table page that a walker can reach.
#[derive(Clone, Copy)]
struct Link {
    level: u8,
    start: u64,
    /// Unlinked, but perhaps in a walk cache.
    lingers: bool,
    flushing: bool,
}

/// A translation that is cached and no longer in the table.
#[derive(Debug)]
struct Stale {
    start: u64,
    leaf: Leaf,
    flushing: bool,
}

pub struct GreedyTlb {
    /// The words of each frame, as far as the log told.
    words: HashMap<Pfn, Box<[u64; 512]>>,
    links: HashMap<Pfn, Link>,
    stale: Vec<Stale>,
    /// Reachable leaves by first guest frame.
    live: BTreeMap<u64, Leaf>,
}

impl GreedyTlb {
    pub fn new(geometry: Geometry, root: PfnRange) -> Self {
        let level = geometry.root_level();
        let link = |frame: u64| Link { level, start: frame << 9 << shift(level), lingers: false, flushing: false };
        let links = (0..root.count()).map(|frame| (root.start().offset(frame), link(frame))).collect();
        Self { words: HashMap::new(), links, stale: Vec::new(), live: BTreeMap::new() }
    }

    /// Takes note of everything that a machine logged.
    pub fn replay(&mut self, events: Vec<Event>) {
        for event in events {
            match event {
                Event::Word(word, raw) => self.word(word, raw),
                Event::Zero(frames) => self.words.retain(|frame, _| !frames.contains(*frame)),
                Event::Tlb(op) => self.start(op),
                Event::Complete => {
                    self.stale.retain(|stale| !stale.flushing);
                    self.links.retain(|_, link| !(link.lingers && link.flushing));
                }
                Event::Copy(..) | Event::Clean(_) | Event::Icache(_) => {}
                Event::ClearTags(_) | Event::CopyTags(..) => {}
                Event::UnmapOwn(_) | Event::MapOwn(_) | Event::Window(_) => {}
            }
        }
    }

    /// Nothing is cached that is not in the table.
    pub fn assert_settled(&self) {
        assert!(self.stale.is_empty(), "cached but gone: {:x?}", self.stale.first());
        assert!(!self.links.values().any(|link| link.lingers), "an unlinked table is in the walk caches");
    }

    fn word(&mut self, word: Word, raw: u64) {
        let frame = self.words.entry(word.frame()).or_insert_with(|| Box::new([0; 512]));
        let old = std::mem::replace(&mut frame[word.index() as usize], raw);
        let Some(link) = self.links.get(&word.frame()).copied() else { return };
        let start = link.start + ((word.index() as u64) << shift(link.level));
        self.leave(start, link.level, old, link.lingers);
        self.enter(start, link.level, raw, link.lingers);
    }

    fn leave(&mut self, start: u64, level: u8, raw: u64, lingers: bool) {
        match Plain.decode(raw, level) {
            Entry::Leaf(leaf) if !lingers => {
                assert_eq!(self.live.remove(&start), Some(leaf));
                // An entry whose access flag is clear is never cached.
                if leaf.young {
                    self.stale.push(Stale { start, leaf, flushing: false });
                }
            }
            Entry::Table(frame) if !lingers => self.unlink(frame, start, level + 1),
            _ => {}
        }
    }

    fn unlink(&mut self, frame: Pfn, start: u64, level: u8) {
        for (index, raw) in self.words_of(frame) {
            self.leave(start + (index << shift(level)), level, raw, false);
        }
        let link = self.links.get_mut(&frame).expect("it was linked");
        link.lingers = true;
    }

    fn enter(&mut self, start: u64, level: u8, raw: u64, lingers: bool) {
        match Plain.decode(raw, level) {
            Entry::Leaf(leaf) => {
                let range = GfnRange::block(Gfn::new(start), leaf.size);
                for stale in &self.stale {
                    let cached = GfnRange::block(Gfn::new(stale.start), stale.leaf.size);
                    let same = leaf.same_output(&stale.leaf);
                    assert!(same || !range.overlaps(cached), "INV-2: {leaf:x?} at {start:#x} over {stale:x?}");
                }
                if lingers {
                    self.stale.push(Stale { start, leaf, flushing: false });
                } else {
                    // What is put back just as it was is not stale any more.
                    let again = |stale: &Stale| stale.start == start && same_but_for_age(&stale.leaf, &leaf);
                    self.stale.retain(|stale| !again(stale));
                    assert_eq!(level, level_of(leaf.size));
                    self.live.insert(start, leaf);
                }
            }
            Entry::Table(frame) => {
                let link = Link { level: level + 1, start, lingers, flushing: false };
                self.links.insert(frame, link);
                for (index, raw) in self.words_of(frame) {
                    self.enter(start + (index << shift(level + 1)), level + 1, raw, lingers);
                }
            }
            Entry::Vacant | Entry::Broken => {}
        }
    }

    /// The words of a frame that are not zero.
    fn words_of(&self, frame: Pfn) -> Vec<(u64, u64)> {
        let words = self.words.get(&frame).into_iter().flat_map(|words| words.iter());
        (0..).zip(words.copied()).filter(|(_, raw)| *raw != 0).collect()
    }

    fn start(&mut self, op: TlbOp) {
        let (range, leaf_only) = match op {
            TlbOp::Ipa { vmid, gfn, size, leaf_only } => {
                assert_eq!(vmid, super::VMID);
                (GfnRange::block(gfn, size), leaf_only)
            }
            TlbOp::Range { vmid, range } => {
                assert_eq!(vmid, super::VMID);
                (range, false)
            }
            TlbOp::Own(frames) => panic!("no table of a guest maps {frames:?}"),
            TlbOp::Vmid(_) | TlbOp::All => (super::gfns(0, u64::MAX), false),
        };
        for stale in &mut self.stale {
            let cached = GfnRange::block(Gfn::new(stale.start), stale.leaf.size);
            // By address, an invalidation finds an entry of the size it names; a range finds all it covers.
            stale.flushing |= range.covers(cached);
        }
        for link in self.links.values_mut().filter(|link| link.lingers && !leaf_only) {
            let count = 512 << shift(link.level);
            link.flushing |= range.covers(super::gfns(link.start, count));
        }
    }
}

fn same_but_for_age(one: &Leaf, other: &Leaf) -> bool {
    Leaf { young: true, ..*one } == Leaf { young: true, ..*other }
}
