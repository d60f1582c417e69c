//! Putting a leaf into the tree.

use entresol_addr::{Gfn, GfnRange, PageSize, Pfn};
use entresol_machine::{Machine, TlbOp, Word};
use entresol_sync::planted;

use crate::claim::{Blank, Broken};
use crate::entry::vacant;
use crate::freeze::Remover;
use crate::{
    Entry, Format, Leaf, PageWork, Reserve, Retired, SplitError, Table, VACANT, VmidSource, Walk, index, level_of,
};

/// A leaf was installed.
#[must_use = "retired table pages are lost if they are dropped"]
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mapped {
    /// Table pages that a block took the place of, to be freed after a grace period.
    pub retired: Retired,
}

/// Why a leaf was not installed. No translation was changed; for `Busy`, `Occupied` and `Present`, tables may have been linked and
/// blocks split on the way down. For all others, nothing was touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// The table translates no such address.
    Outside {
        /// The guest frame asked for.
        gfn: Gfn,
    },
    /// Guest frame and frame must both be aligned to the size.
    Misaligned {
        /// The guest frame asked for.
        gfn: Gfn,
        /// The frame offered.
        pfn: Pfn,
        /// The size asked for.
        size: PageSize,
    },
    /// The root lies below the level of leaves of this size.
    TooLarge {
        /// The size asked for.
        size: PageSize,
    },
    /// An entry cannot hold this frame's address.
    Unreachable {
        /// The frame offered.
        pfn: Pfn,
    },
    /// The reserve holds too few table pages.
    NoTable {
        /// How many are needed.
        needed: usize,
    },
    /// Another CPU is changing the entry: let the guest try again.
    Busy,
    /// Something else is mapped there, and [`PageWork::may_replace`] says no.
    Occupied,
    /// This leaf maps the same memory already; at most its permissions or access flag differ. The guest may go on, or
    /// [`Table::relax`] and [`Table::make_young`] help.
    Present(Leaf),
}

impl From<SplitError> for MapError {
    fn from(error: SplitError) -> Self {
        match error {
            SplitError::Outside { gfn } => Self::Outside { gfn },
            SplitError::NoTable => Self::NoTable { needed: 1 },
            SplitError::Busy | SplitError::NotBlock => Self::Busy,
        }
    }
}

impl<F: Format> Table<F> {
    /// Maps `leaf` at `gfn`.
    ///
    /// Where nothing is, that is one compare-and-swap, or with [`PageWork::prepare`] a claim, the work and a store. A
    /// larger block in the way is split; a leaf of the same size with other memory is replaced break-before-make; a
    /// table in the way of a block is unlinked with all below it. `work.removed` hears of every leaf displaced.
    ///
    /// # Errors
    ///
    /// [`MapError`].
    #[inline]
    pub fn map<M: Machine, V: VmidSource, W: PageWork>(
        &self,
        machine: &M,
        vmid: V,
        gfn: Gfn,
        leaf: &Leaf,
        reserve: &mut Reserve,
        work: &mut W,
    ) -> Result<Mapped, MapError> {
        self.check(gfn, leaf)?;
        let target = level_of(leaf.size);
        let at = self.descend(machine, gfn, target);
        if at.level == target && at.entry == Entry::Vacant {
            return self.fill(machine, at.word, at.raw, leaf, work);
        }
        self.map_over(machine, &vmid, gfn, leaf, reserve, work)
    }

    /// Maps where the way down ends early or something is there. Walks again, so that the way past it carries nothing.
    #[inline(never)]
    fn map_over<M: Machine, V: VmidSource, W: PageWork>(
        &self,
        machine: &M,
        vmid: &V,
        gfn: Gfn,
        leaf: &Leaf,
        reserve: &mut Reserve,
        work: &mut W,
    ) -> Result<Mapped, MapError> {
        let at = self.grow(machine, vmid, gfn, leaf, reserve)?;
        match at.entry {
            Entry::Vacant => self.fill(machine, at.word, at.raw, leaf, work),
            Entry::Leaf(old) if old.same_output(leaf) => Err(MapError::Present(old)),
            Entry::Leaf(_) | Entry::Table(_) if !work.may_replace() => Err(MapError::Occupied),
            Entry::Leaf(old) => self.replace(machine, vmid, gfn, leaf, &at, old, work),
            Entry::Table(frame) => self.replace_table(machine, vmid, gfn, leaf, &at, frame, work),
            Entry::Broken => Err(MapError::Busy),
        }
    }

    /// Refuses what no table of this shape can hold.
    #[inline]
    fn check(&self, gfn: Gfn, leaf: &Leaf) -> Result<(), MapError> {
        let (pfn, size) = (leaf.pfn, leaf.size);
        if !self.geometry().contains(gfn) {
            return Err(MapError::Outside { gfn });
        }
        if !gfn.is_aligned(size) || !pfn.is_aligned(size) {
            return Err(MapError::Misaligned { gfn, pfn, size });
        }
        if level_of(size) <= self.geometry().root_level() {
            self.check_at_root(gfn, size)?;
        }
        if pfn.get() >> F::FRAME_BITS != 0 {
            return Err(MapError::Unreachable { pfn });
        }
        Ok(())
    }

    /// The same for what would be in the root, or above it.
    #[cold]
    fn check_at_root(&self, gfn: Gfn, size: PageSize) -> Result<(), MapError> {
        if level_of(size) < self.geometry().root_level() {
            return Err(MapError::TooLarge { size });
        }
        self.extend_reach(gfn);
        Ok(())
    }

    /// Installs where nothing is, in a word that held `old`.
    #[inline]
    fn fill<M: Machine, W: PageWork>(
        &self,
        machine: &M,
        word: Word,
        old: u64,
        leaf: &Leaf,
        work: &mut W,
    ) -> Result<Mapped, MapError> {
        let raw = self.format().leaf(leaf);
        if planted!(ZA2) {
            machine.compare_exchange(word, vacant(self.format(), old), raw).map_err(|_| MapError::Busy)?;
            work.prepare();
        } else if work.must_prepare() {
            let blank = Blank::<M, F>::take(machine, self.format(), word, old).ok_or(MapError::Busy)?;
            work.prepare();
            blank.publish(raw);
        } else {
            machine.compare_exchange(word, vacant(self.format(), old), raw).map_err(|_| MapError::Busy)?;
        }
        machine.published();
        self.counters.add_leaves(leaf.size, 1);
        Ok(Mapped::default())
    }

    /// Walks to the leaf's level, and makes the tables that are missing on the way: links new ones, splits blocks. Each
    /// round is a level down.
    fn grow<M: Machine, V: VmidSource>(
        &self,
        machine: &M,
        vmid: &V,
        gfn: Gfn,
        leaf: &Leaf,
        reserve: &mut Reserve,
    ) -> Result<Walk, MapError> {
        let target = level_of(leaf.size);
        let mut at = self.descend(machine, gfn, target);
        let needed = Self::missing(&at, target);
        while at.level < target {
            if let Entry::Leaf(block) = at.entry
                && serves(&block, gfn, leaf)
            {
                return Err(MapError::Present(block));
            }
            // True in every later round if it was in the first: each needs one page and goes one level down.
            if at.entry != Entry::Broken && reserve.len() < Self::missing(&at, target) {
                return Err(MapError::NoTable { needed });
            }
            let below = match at.entry {
                Entry::Vacant => {
                    if at.level == self.geometry().root_level() {
                        self.extend_reach(gfn);
                    }
                    self.link(machine, at.word, reserve)?
                }
                Entry::Leaf(_) => self.split_at(machine, vmid, gfn, &at, reserve)?,
                Entry::Table(below) => below,
                Entry::Broken => return Err(MapError::Busy),
            };
            let level = at.level + 1;
            at = self.walk_from(machine, gfn, Word::new(below, index(gfn, level)), level, target);
        }
        Ok(at)
    }

    /// Links an empty table into a vacant word.
    pub(crate) fn link<M: Machine>(&self, machine: &M, word: Word, reserve: &mut Reserve) -> Result<Pfn, MapError> {
        let frame = reserve.pop().ok_or(MapError::NoTable { needed: 1 })?;
        if machine.compare_exchange(word, VACANT, self.format().table(frame)).is_err() {
            reserve.put_back(frame);
            return Err(MapError::Busy);
        }
        self.counters.add_table();
        Ok(frame)
    }

    /// Replaces a leaf that maps other memory: break, flush, make.
    #[cold]
    #[allow(clippy::too_many_arguments, reason = "the arguments of `map`, and what its walk found")]
    fn replace<M: Machine, V: VmidSource, W: PageWork>(
        &self,
        machine: &M,
        vmid: &V,
        gfn: Gfn,
        leaf: &Leaf,
        at: &Walk,
        old: Leaf,
        work: &mut W,
    ) -> Result<Mapped, MapError> {
        let broken = Broken::<M, F>::take(machine, at.word, at.raw).ok_or(MapError::Busy)?;
        let blank = broken.flush(vmid, |vmid| TlbOp::Ipa { vmid, gfn, size: old.size, leaf_only: true });
        work.removed(gfn, old);
        if work.must_prepare() {
            work.prepare();
        }
        blank.publish(self.format().leaf(leaf));
        machine.published();
        Ok(Mapped::default())
    }

    /// Replaces a table and all below it by a block.
    #[cold]
    #[allow(clippy::too_many_arguments, reason = "the arguments of `map`, and what its walk found")]
    fn replace_table<M: Machine, V: VmidSource, W: PageWork>(
        &self,
        machine: &M,
        vmid: &V,
        gfn: Gfn,
        leaf: &Leaf,
        at: &Walk,
        frame: Pfn,
        work: &mut W,
    ) -> Result<Mapped, MapError> {
        let broken = Broken::<M, F>::take(machine, at.word, at.raw).ok_or(MapError::Busy)?;
        let mut remover = Remover::new(self, machine, vmid, work);
        remover.page(frame, at.level + 1, gfn);
        let Remover { gone, retired, work, .. } = remover;
        let range = GfnRange::block(gfn, leaf.size);
        let blank = broken.flush(vmid, |vmid| TlbOp::Range { vmid, range });
        if work.must_prepare() {
            work.prepare();
        }
        blank.publish(self.format().leaf(leaf));
        machine.published();
        self.counters.add_leaves(leaf.size, 1);
        self.counters.remove(&gone);
        Ok(Mapped { retired })
    }
}

/// Whether the block already gives what the smaller leaf at `gfn` would.
fn serves(block: &Leaf, gfn: Gfn, leaf: &Leaf) -> bool {
    block.frame_of(gfn) == leaf.pfn && block.memory == leaf.memory && block.permissions.contains(leaf.permissions)
}
