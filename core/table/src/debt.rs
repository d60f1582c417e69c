//! What is owed after entries were removed: a TLB invalidation, and table pages that walkers may still stand in.

use entresol_addr::{GfnRange, Pfn};
use entresol_machine::{Machine, Word};

use crate::counters::Census;
use crate::cursor::Hull;
use crate::marker::{Marker, Ticket};
use crate::{Entry, Format, Table};

/// Table pages that no hardware walker reaches any more, but a CPU that began its walk earlier may still read.
///
/// They are chained through word 0 of each: a frozen word, so a late walker sees an invalid entry whatever it reads.
/// After a grace period [`Retired::drain`] gives the frames back.
#[must_use = "retired table pages are lost if the chain is dropped"]
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Retired {
    head: Option<Pfn>,
    count: u64,
}

/// The number in the first word of a retired page: the next page's frame plus one, or zero at the end.
fn link(next: Option<Pfn>) -> u64 {
    next.map_or(0, |frame| frame.get() + 1)
}

impl Retired {
    /// No pages.
    pub const fn new() -> Self {
        Self { head: None, count: 0 }
    }

    /// Number of pages.
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds a page, all of whose words are frozen.
    pub(crate) fn push<M: Machine, F: Format>(&mut self, machine: &M, frame: Pfn) {
        machine.store(Word::new(frame, 0), Marker::Frozen(link(self.head)).encode::<F>());
        self.head = Some(frame);
        self.count += 1;
    }

    /// Takes the first page off; its content is not defined. The grace period must be over, and `format` is that of
    /// the table the pages came from.
    ///
    /// # Panics
    ///
    /// If a page was written to meanwhile.
    pub fn pop<M: Machine, F: Format>(&mut self, machine: &M, format: F) -> Option<Pfn> {
        let frame = self.head?;
        let raw = machine.load(Word::new(frame, 0));
        assert_eq!(format.decode(raw, 0), Entry::Broken, "a retired table page was written to");
        let Marker::Frozen(next) = Marker::decode::<F>(raw) else {
            panic!("a retired table page was written to: {raw:#x}");
        };
        self.head = next.checked_sub(1).map(Pfn::new);
        self.count -= 1;
        Some(frame)
    }

    /// Gives every page to `free`, under the conditions of [`Self::pop`].
    pub fn drain<M: Machine, F: Format>(mut self, machine: &M, format: F, mut free: impl FnMut(Pfn)) {
        while let Some(frame) = self.pop(machine, format) {
            free(frame);
        }
    }
}

/// Entries that [`Table::unmap`] took out of the table and that TLBs may still hold.
///
/// Their words stay unusable, and the table pages that went with them stay here, until [`FlushDebt::settle`].
#[must_use = "what was unmapped stays reachable, and its words unusable, until the debt is settled"]
pub struct FlushDebt<'t, F> {
    pub(crate) table: &'t Table<F>,
    pub(crate) ticket: Ticket,
    /// What is to be flushed.
    pub(crate) hull: Hull,
    pub(crate) gone: Census,
    pub(crate) retired: Retired,
}

/// What a settled unmap did.
#[must_use = "retired table pages are lost if they are dropped"]
#[derive(Debug, PartialEq, Eq)]
pub struct Settled {
    /// Leaves and table pages that were removed.
    pub gone: Census,
    /// The table pages, to be freed after a grace period.
    pub retired: Retired,
}

impl<F> FlushDebt<'_, F> {
    /// Leaves and table pages that were removed.
    pub const fn gone(&self) -> &Census {
        &self.gone
    }

    /// The guest frames to flush, or `None` if nothing was there.
    pub fn range(&self) -> Option<GfnRange> {
        self.hull.range()
    }
}
