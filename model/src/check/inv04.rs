//! INV-4: while writes are logged, a writable entry implies a set dirty bit.
//!
//! Watches both sides: each store of a leaf into a range that logs, and each store to a log. A bit is not cleared as long as
//! some CPU may write by a translation, one that only a cache has included.
//!
//! Slots of the lab have one frame of bits: no object is larger than that.

use entresol_addr::{Gfn, GfnRange, Pfn};
use entresol_machine::Word;

use crate::machine::descriptor::Descriptor;
use crate::machine::{EntryWrite, World};

/// A slot that logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    /// Whose.
    pub vm: usize,
    /// Its guest frames.
    pub range: GfnRange,
    /// Its bits.
    pub frame: Pfn,
}

impl Log {
    fn is_set(&self, world: &World, gfn: Gfn) -> bool {
        let page = gfn.since(self.range.start());
        let word = world.frame(self.frame).map_or(0, |frame| frame.line().get((page / 64) as u16));
        word >> (page % 64) & 1 != 0
    }
}

/// An entry was stored.
pub fn entry(world: &World, logs: &[Log], write: &EntryWrite) -> Option<String> {
    let Descriptor::Leaf(leaf) = write.new else { return None };
    if !leaf.write || !leaf.normal {
        return None;
    }
    let part = |log: &Log| log.range.intersect(write.span).map(|part| (*log, part));
    let clean = |(log, part): (Log, GfnRange)| {
        (0..part.count()).map(|page| part.start().offset(page)).find(|gfn| !log.is_set(world, *gfn))
    };
    let gfn = logs.iter().filter(|log| log.vm == write.vm).filter_map(part).find_map(clean)?;
    Some(format!("gfn {gfn:#x} of VM {} becomes writable, and its dirty bit is clear", write.vm))
}

/// `word`, if it is of a log, is about to become `value`.
pub fn cleared(world: &World, logs: &[Log], word: Word, value: u64) -> Option<String> {
    let log = logs.iter().find(|log| log.frame == word.frame())?;
    let gone = world.frame(word.frame())?.line().get(word.index()) & !value;
    let pages = (0..64).filter(|bit| gone >> bit & 1 != 0).map(|bit| u64::from(word.index()) * 64 + bit);
    pages.map(|page| log.range.start().offset(page)).find_map(|gfn| {
        let mut by = None;
        world.tables.each_seen(&world.tlb, Some(log.vm), Some(GfnRange::single(gfn)), |seen| {
            if seen.leaf.write && seen.leaf.normal {
                by = Some(if seen.stale { "by a stale translation" } else { "by its entry" });
            }
        });
        by.map(|by| format!("the dirty bit of gfn {gfn:#x} of VM {} is cleared, and {by} it can be written", log.vm))
    })
}
