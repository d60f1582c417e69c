//! What has to be done to a page's memory around a change of its entry.

use entresol_addr::Gfn;

use crate::Leaf;

/// Cache, tag and record work that belongs to a change of an entry, and that the table does at the right moment (D5).
///
/// No method may use the table that called it, nor sleep: other CPUs wait for the claim under which it runs.
/// `()` is no work at all.
pub trait PageWork {
    /// Whether [`Self::prepare`] has anything to do. If not, a new entry is published with one compare-and-swap.
    #[inline]
    fn must_prepare(&self) -> bool {
        false
    }

    /// Makes the page of the new entry, or the wider use of the old one, safe to be seen; finished, `Machine::complete`
    /// included, when it returns. Runs at most once in a call; for a new entry only on the CPU that won it, for a wider
    /// one before the entry changes, so perhaps for nothing.
    #[inline]
    fn prepare(&mut self) {}

    /// Whether a leaf with other memory, or a table where a block is to be, gives way. If not, that is
    /// [`crate::MapError::Occupied`]: for entries that may be out of date by the time they are published.
    #[inline]
    fn may_replace(&self) -> bool {
        true
    }

    /// Whether [`Self::removed`] must find the TLBs flushed, because it cleans caches behind the guest's last access.
    /// It costs one flush a leaf; otherwise `removed` comes before the flush, which covers all leaves at once.
    #[inline]
    fn flush_before_removed(&self) -> bool {
        false
    }

    /// `leaf`, the block of which starts at `gfn`, is no longer in the table. Unless [`Self::flush_before_removed`],
    /// TLBs may still translate to it: nothing may be freed here.
    #[inline]
    fn removed(&mut self, gfn: Gfn, leaf: Leaf) {
        let _ = (gfn, leaf);
    }
}

impl PageWork for () {}
