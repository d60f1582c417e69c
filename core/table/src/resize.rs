//! One block into 512 smaller leaves, and back.

use entresol_addr::{Gfn, GfnRange, PageSize, Pfn, PfnRange};
use entresol_machine::{Machine, TlbOp, Word};
use entresol_sync::planted;

use crate::claim::Broken;
use crate::marker::Marker;
use crate::{Census, Entry, Format, Leaf, Reserve, Retired, Table, VmidSource, Walk, level_of};

/// Why a block was not split. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SplitError {
    /// The table translates no such address.
    Outside {
        /// The guest frame asked for.
        gfn: Gfn,
    },
    /// No block is there.
    NotBlock,
    /// The reserve is empty.
    NoTable,
    /// Another CPU is changing the entry.
    Busy,
}

/// Why leaves were not merged. Nothing was changed, except that some of them may be young.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeError {
    /// The table translates no such address.
    Outside {
        /// The guest frame asked for.
        gfn: Gfn,
    },
    /// The entries are not 512 leaves of contiguous, aligned memory with the same permissions.
    NotUniform,
    /// Another CPU is changing the entries.
    Busy,
}

impl<F: Format> Table<F> {
    /// Splits the block behind `gfn` into 512 leaves of the next smaller size that say the same.
    ///
    /// # Errors
    ///
    /// [`SplitError`].
    pub fn split<M: Machine, V: VmidSource>(
        &self,
        machine: &M,
        vmid: V,
        gfn: Gfn,
        reserve: &mut Reserve,
    ) -> Result<(), SplitError> {
        let at = self.walk(machine, gfn).ok_or(SplitError::Outside { gfn })?;
        self.split_at(machine, &vmid, gfn, &at, reserve).map(|_| ())
    }

    /// Splits the block that `at` holds; returns the new table.
    pub(crate) fn split_at<M: Machine, V: VmidSource>(
        &self,
        machine: &M,
        vmid: &V,
        gfn: Gfn,
        at: &Walk,
        reserve: &mut Reserve,
    ) -> Result<Pfn, SplitError> {
        let block = match at.entry {
            Entry::Leaf(leaf) => leaf,
            Entry::Broken => return Err(SplitError::Busy),
            Entry::Vacant | Entry::Table(_) => return Err(SplitError::NotBlock),
        };
        let smaller = block.size.smaller().ok_or(SplitError::NotBlock)?;
        let frame = reserve.pop().ok_or(SplitError::NoTable)?;
        // Nobody sees the page yet; the compare-and-swap below is against the very word that the leaves copy.
        let format = self.format();
        machine.store_row(frame, 0, Word::PER_FRAME, |index| format.leaf(&block.child(index, smaller)));
        if planted!(ZA6) {
            machine.store(at.word, self.format().table(frame));
            return Ok(self.count_split(frame, block.size, smaller));
        }
        let Some(broken) = Broken::<M, F>::take(machine, at.word, at.raw) else {
            machine.zero(PfnRange::single(frame));
            reserve.put_back(frame);
            return Err(SplitError::Busy);
        };
        let blank = broken.flush(vmid, |vmid| TlbOp::Ipa { vmid, gfn, size: block.size, leaf_only: true });
        blank.publish(self.format().table(frame));
        machine.published();
        Ok(self.count_split(frame, block.size, smaller))
    }

    /// Counts a block of `size` that became 512 leaves in `frame`, which it returns.
    fn count_split(&self, frame: Pfn, size: PageSize, smaller: PageSize) -> Pfn {
        self.counters.add_table();
        self.counters.add_leaves(smaller, Word::PER_FRAME as u64);
        self.counters.remove_leaves(size, 1);
        frame
    }

    /// Replaces 512 leaves around `gfn` by the one leaf of `size` (2 MiB or 1 GiB) that says the same. It is young if one
    /// of them was.
    ///
    /// Returns the table page, to be freed after a grace period.
    ///
    /// # Errors
    ///
    /// [`MergeError`].
    pub fn merge<M: Machine, V: VmidSource>(
        &self,
        machine: &M,
        vmid: V,
        gfn: Gfn,
        size: PageSize,
    ) -> Result<Retired, MergeError> {
        if !self.geometry().contains(gfn) {
            return Err(MergeError::Outside { gfn });
        }
        let smaller = size.smaller().ok_or(MergeError::NotUniform)?;
        let at = self.descend(machine, gfn, level_of(size));
        let Entry::Table(frame) = at.entry else {
            return Err(if at.entry == Entry::Broken { MergeError::Busy } else { MergeError::NotUniform });
        };
        if at.level != level_of(size) {
            return Err(MergeError::NotUniform);
        }
        // Looks first: a table that cannot merge is not disturbed.
        let first = self.uniform(machine, frame, size, smaller)?;
        let broken = Broken::<M, F>::take(machine, at.word, at.raw).ok_or(MergeError::Busy)?;
        let Some(young) = self.freeze_uniform(machine, frame, &first, smaller) else {
            broken.restore(at.raw);
            machine.published();
            return Err(MergeError::Busy);
        };
        let mut retired = Retired::new();
        retired.push::<M, F>(machine, frame);
        let blank = broken.flush(&vmid, |vmid| TlbOp::Range { vmid, range: GfnRange::block(gfn, size) });
        blank.publish(self.format().leaf(&Leaf { size, young, ..first }));
        machine.published();
        self.counters.add_leaves(size, 1);
        let mut gone = Census { tables: 1, ..Census::default() };
        gone.leaves[smaller as usize] = Word::PER_FRAME as u64;
        self.counters.remove(&gone);
        Ok(retired)
    }

    /// The first of 512 leaves that could be one leaf of `size`.
    fn uniform<M: Machine>(
        &self,
        machine: &M,
        frame: Pfn,
        size: PageSize,
        smaller: PageSize,
    ) -> Result<Leaf, MergeError> {
        let at = |index| self.format().decode(machine.load(Word::new(frame, index)), level_of(smaller));
        let Entry::Leaf(first) = at(0) else {
            return Err(MergeError::NotUniform);
        };
        let all = first.pfn.is_aligned(size) && (1..Word::PER_FRAME).all(|index| continues(at(index), &first, index));
        if all { Ok(first) } else { Err(MergeError::NotUniform) }
    }

    /// Freezes the 512 words of a page whose parent is claimed, as long as each still continues `first`; returns
    /// whether one was young. If one does not, thaws what it froze and returns `None`.
    fn freeze_uniform<M: Machine>(&self, machine: &M, frame: Pfn, first: &Leaf, smaller: PageSize) -> Option<bool> {
        let mut young = false;
        for index in 0..Word::PER_FRAME {
            let word = Word::new(frame, index);
            let raw = machine.load(word);
            let entry = self.format().decode(raw, level_of(smaller));
            let was_young = matches!(entry, Entry::Leaf(leaf) if leaf.young);
            let frozen = Marker::Frozen(was_young as u64).encode::<F>();
            if !continues(entry, first, index) || machine.compare_exchange(word, raw, frozen).is_err() {
                self.thaw(machine, frame, index, first, smaller);
                return None;
            }
            young |= was_young;
        }
        Some(young)
    }

    /// Puts the first `count` words back that [`Self::freeze_uniform`] froze.
    fn thaw<M: Machine>(&self, machine: &M, frame: Pfn, count: u16, first: &Leaf, smaller: PageSize) {
        for index in 0..count {
            let word = Word::new(frame, index);
            let young = Marker::decode::<F>(machine.load(word)) == Marker::Frozen(1);
            let leaf = Leaf { young, ..first.child(index, smaller) };
            machine.store(word, self.format().leaf(&leaf));
        }
    }
}

/// Whether `entry` is leaf `index` of the sequence that `first` begins; the access flag does not matter.
fn continues(entry: Entry, first: &Leaf, index: u16) -> bool {
    matches!(entry, Entry::Leaf(leaf) if Leaf { young: first.young, ..leaf } == first.child(index, first.size))
}
