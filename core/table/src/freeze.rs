//! Taking leaves and whole table pages out of the tree.

use entresol_addr::{Gfn, Pfn};
use entresol_machine::{Machine, TlbOp, Word};

use crate::marker::Marker;
use crate::vmid::flush;
use crate::{Census, Entry, Format, Leaf, PageWork, Retired, Table, VmidSource, shift};

/// Collects what one operation removes.
pub(crate) struct Remover<'a, M, F, V, W> {
    pub(crate) table: &'a Table<F>,
    pub(crate) machine: &'a M,
    pub(crate) vmid: &'a V,
    pub(crate) work: &'a mut W,
    pub(crate) gone: Census,
    pub(crate) retired: Retired,
}

impl<'a, M: Machine, F: Format, V: VmidSource, W: PageWork> Remover<'a, M, F, V, W> {
    pub(crate) fn new(table: &'a Table<F>, machine: &'a M, vmid: &'a V, work: &'a mut W) -> Self {
        Self { table, machine, vmid, work, gone: Census::default(), retired: Retired::new() }
    }

    /// `leaf` was just replaced by an invalid word.
    pub(crate) fn leaf(&mut self, gfn: Gfn, leaf: Leaf) {
        if self.work.flush_before_removed() {
            flush(self.machine, self.vmid, |vmid| TlbOp::Ipa { vmid, gfn, size: leaf.size, leaf_only: true });
        }
        self.work.removed(gfn, leaf);
        self.gone.count(leaf.size);
    }

    /// Freezes the table page `frame` of `level`, the first word of which translates `start`, and all pages below it.
    /// Its parent's word is invalid and this operation's. At most three calls deep.
    pub(crate) fn page(&mut self, frame: Pfn, level: u8, start: Gfn) {
        for index in 0..Word::PER_FRAME {
            let gfn = start.offset((index as u64) << shift(level));
            match self.freeze(Word::new(frame, index), level) {
                Entry::Leaf(leaf) => self.leaf(gfn, leaf),
                Entry::Table(below) => self.page(below, level + 1, gfn),
                Entry::Vacant | Entry::Broken => {}
            }
        }
        self.retired.push::<M, F>(self.machine, frame);
        self.gone.tables += 1;
    }

    /// Freezes one word and returns what it said; waits for a claim that is below this operation's own.
    fn freeze(&self, word: Word, level: u8) -> Entry {
        let frozen = Marker::Frozen(0).encode::<F>();
        loop {
            let raw = self.machine.load(word);
            let entry = self.table.format().decode(raw, level);
            if entry == Entry::Broken && Marker::decode::<F>(raw) == Marker::Claimed {
                entresol_sync::hint::spin_loop();
            } else if self.machine.compare_exchange(word, raw, frozen).is_ok() {
                return entry;
            }
        }
    }
}
