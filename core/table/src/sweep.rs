//! Operations on the leaves of a range that leave them in place.
//!
//! A block that reaches over the edge of the range counts as inside it, unless the caller says otherwise.

use entresol_addr::{Gfn, GfnRange};
use entresol_machine::{Machine, TlbOp};

use crate::cursor::{Cursor, Finder, Hull, Place};
use crate::vmid::flush;
use crate::{Entry, Format, LEAF_LEVEL, Leaf, Permissions, Table, VmidSource};

/// What happens to a block that lies in a range only in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Straddle {
    /// It is treated whole, the part outside included.
    Whole,
    /// It is left alone.
    Skip,
}

impl<F: Format> Table<F> {
    /// Removes permissions from the leaves of `range`, in place, and flushes. When it returns, no CPU uses one of
    /// them any more, also where another CPU removed it, or the whole leaf, just before. Returns how many leaves changed.
    ///
    /// Nothing is split: the next fault on a block decides that.
    pub fn protect<M: Machine, V: VmidSource>(
        &self,
        machine: &M,
        vmid: V,
        range: GfnRange,
        remove: Permissions,
        straddle: Straddle,
    ) -> u64 {
        let (mut seen, mut changed) = (Hull::new(), 0);
        let removed = self.each_leaf(machine, range, |place, leaf, covered| {
            if !covered && straddle == Straddle::Skip {
                return true;
            }
            let permissions = leaf.permissions.without(remove);
            if permissions != leaf.permissions {
                if !self.update(machine, place, &Leaf { permissions, ..leaf }) {
                    return false;
                }
                changed += 1;
            }
            // Another CPU may have narrowed an entry and not have flushed yet.
            seen.include(place);
            true
        });
        seen.join(&removed);
        if let Some(range) = seen.range() {
            flush(machine, &vmid, |vmid| TlbOp::Range { vmid, range });
        }
        changed
    }

    /// Removes the permission to write from the leaves behind single frames, and nothing beside them but the rest of a block, in
    /// place, and flushes: as [`Self::protect`]. Fast where neighbours follow each other.
    pub fn protect_frames<M: Machine, V: VmidSource>(
        &self,
        machine: &M,
        vmid: V,
        frames: impl Iterator<Item = Gfn>,
    ) -> u64 {
        let (mut seen, mut changed, mut finder) = (Hull::new(), 0, Finder::new(self, machine));
        let format = self.format();
        for gfn in frames {
            // Nearly always a page of the same table as the one before.
            if let Some((word, raw)) = finder.near(gfn)
                && let Some(protected) = format.protected(raw, LEAF_LEVEL)
                && (raw == protected || machine.compare_exchange(word, raw, protected).is_ok())
            {
                changed += u64::from(raw != protected);
                seen.include_page(gfn);
                continue;
            }
            while let Some(place) = finder.find(gfn) {
                if let Some(protected) = format.protected(place.raw, place.level).filter(|raw| *raw != place.raw) {
                    if machine.compare_exchange(place.word, place.raw, protected).is_err() {
                        continue;
                    }
                    changed += 1;
                }
                seen.include(&place);
                break;
            }
        }
        if let Some(range) = seen.range() {
            flush(machine, &vmid, |vmid| TlbOp::Range { vmid, range });
        }
        changed
    }

    /// Clears the access flag of the leaves of `range`, flushes, and returns how many were young.
    pub fn age<M: Machine, V: VmidSource>(&self, machine: &M, vmid: V, range: GfnRange) -> u64 {
        let mut aged = Hull::new();
        self.each_leaf(machine, range, |place, leaf, _| {
            if leaf.young {
                if !self.update(machine, place, &Leaf { young: false, ..leaf }) {
                    return false;
                }
                aged.include(place);
            }
            true
        });
        if let Some(range) = aged.range() {
            flush(machine, &vmid, |vmid| TlbOp::Range { vmid, range });
        }
        aged.entries()
    }

    /// Whether a leaf of `range` is young.
    pub fn test_young<M: Machine>(&self, machine: &M, range: GfnRange) -> bool {
        let mut young = false;
        self.each_leaf(machine, range, |_, leaf, _| {
            young |= leaf.young;
            true
        });
        young
    }

    /// Calls `f` with the first guest frame of each leaf of `range`, and the leaf, in address order. Each leaf is as it
    /// was at some moment of the call; together they are no snapshot.
    pub fn visit<M: Machine>(&self, machine: &M, range: GfnRange, mut f: impl FnMut(Gfn, Leaf)) {
        self.each_leaf(machine, range, |place, leaf, _| {
            f(place.gfn, leaf);
            true
        });
    }

    /// Walks the leaves of `range`. `f` gets each with its place and whether all of it is in the range, and says
    /// whether it is done with it; if not, because the word changed, the word is looked at again. Returns what unmaps
    /// in progress have removed and may not have flushed yet.
    fn each_leaf<M: Machine>(
        &self,
        machine: &M,
        range: GfnRange,
        mut f: impl FnMut(&Place, Leaf, bool) -> bool,
    ) -> Hull {
        let mut removed = Hull::new();
        let mut cursor = Cursor::new(self, machine, range);
        while let Some(place) = cursor.peek() {
            match place.entry {
                Entry::Vacant => cursor.advance(),
                Entry::Table(frame) => cursor.descend(frame),
                Entry::Leaf(leaf) => {
                    if f(&place, leaf, cursor.covers(&place)) {
                        cursor.advance();
                    }
                }
                Entry::Broken => {
                    if cursor.meet(place.raw).is_some() {
                        removed.include(&place);
                        cursor.advance();
                    }
                }
            }
        }
        removed
    }

    /// Replaces the leaf at `place` in place, if it is still the one that was seen there.
    fn update<M: Machine>(&self, machine: &M, place: &Place, leaf: &Leaf) -> bool {
        machine.compare_exchange(place.word, place.raw, self.format().leaf(leaf)).is_ok()
    }
}
