//! The write fault of a guest whose writes are logged, in few instructions: an entry that may only be read becomes writable
//! where it stands, or where it is a block's, in a table of pages that takes the block's place.
//!
//! Both are what [`Table::relax`] and [`Table::split`] do, for one page, one flush, and a caller that has looked already. The
//! table that takes a block's place holds the pages around the one that is written, and is vacant elsewhere: what the guest
//! needs of the rest comes by its own faults, many pages at once.

use entresol_addr::{Gfn, PageSize, Pfn, PfnRange};
use entresol_machine::{Machine, TlbOp, Word};

use crate::claim::Broken;
use crate::vmid::flush_narrower;
use crate::{Entry, Format, LEAF_LEVEL, Leaf, Permissions, Table, VmidSource, Walk, index, level_of};

/// The level of 2 MiB blocks.
const BLOCK_LEVEL: u8 = LEAF_LEVEL - 1;

const _: () = assert!(level_of(PageSize::Size2M) == BLOCK_LEVEL && level_of(PageSize::Size4K) == LEAF_LEVEL);

impl<F: Format> Table<F> {
    /// [`Self::walk`], compiled into its caller, for one that nearly always finds a page.
    // A logged write is counted in instructions, and its caller is called rarely enough to be compiled for size.
    #[inline(always)]
    pub fn walk_to_page<M: Machine>(&self, machine: &M, gfn: Gfn) -> Option<Walk> {
        if !self.geometry().contains(gfn) {
            return None;
        }
        let (mut word, mut level) = (self.root_word(gfn), self.geometry().root_level());
        while level < LEAF_LEVEL {
            let raw = machine.load(word);
            let entry = self.format().decode(raw, level);
            let Entry::Table(below) = entry else { return Some(Walk { word, level, raw, entry }) };
            level += 1;
            word = Word::new(below, index(gfn, level));
        }
        let raw = machine.load(word);
        Some(Walk { word, level: LEAF_LEVEL, raw, entry: self.format().decode(raw, LEAF_LEVEL) })
    }

    /// The page or block at `at`, where a walk for `gfn` ended, becomes writable and young; then the TLBs are flushed of what
    /// it was. Whether it did: if not, another CPU has changed the entry.
    #[inline(always)]
    pub fn permit_write<M: Machine, V: VmidSource>(&self, machine: &M, vmid: V, gfn: Gfn, at: &Walk) -> bool {
        let Entry::Leaf(Leaf { size, .. }) = at.entry else { return false };
        let done = machine.compare_exchange(at.word, at.raw, self.format().writable(at.raw, at.level)).is_ok();
        if done {
            // Orders the entry before later walks, too.
            flush_narrower(machine, &vmid, |vmid| TlbOp::Ipa { vmid, gfn, size, leaf_only: true });
        }
        done
    }

    /// Where the block of 2 MiB stands whose word, `word`, held `raw` when a walk for `gfn` came there, `frame`, which is
    /// zeroed and the caller's, becomes a table of the pages that the aligned span of `around` frames (a power of two, at most
    /// 512) around `gfn` has of the block. That of `gfn` is writable and young, the others are as the block was.
    /// Break-before-make.
    ///
    /// # Errors
    ///
    /// The frame, zeroed, if another CPU has changed the entry, or if it was no such block.
    #[inline]
    #[allow(clippy::too_many_arguments, reason = "the place, the change and the machine")]
    pub fn split_for_write<M: Machine, V: VmidSource>(
        &self,
        machine: &M,
        vmid: V,
        gfn: Gfn,
        word: Word,
        raw: u64,
        frame: Pfn,
        around: u64,
    ) -> Result<(), Pfn> {
        let format = self.format();
        let Entry::Leaf(block) = format.decode(raw, BLOCK_LEVEL) else { return Err(frame) };
        let own = index(gfn, LEAF_LEVEL);
        let count = around.clamp(1, Word::PER_FRAME.into()) as u16;
        let first = own & !(count - 1);
        machine.store_row(frame, first, count, |page| format.leaf(&block.child(page, PageSize::Size4K)));
        let permissions = block.permissions.union(Permissions::WRITE);
        let written = Leaf { permissions, young: true, ..block.child(own, PageSize::Size4K) };
        machine.store(Word::new(frame, own), format.leaf(&written));
        let Some(broken) = Broken::<M, F>::take(machine, word, raw) else {
            machine.zero(PfnRange::single(frame));
            return Err(frame);
        };
        let blank = broken.flush(&vmid, |vmid| TlbOp::Ipa { vmid, gfn, size: block.size, leaf_only: true });
        blank.publish(format.table(frame));
        machine.published();
        self.counters.add_table();
        self.counters.add_leaves(PageSize::Size4K, count.into());
        self.counters.remove_leaves(PageSize::Size2M, 1);
        Ok(())
    }
}
