//! Taking a range out of the tree, in two halves.
//!
//! Protocol: [`Table::unmap`] turns every leaf of the range, and every table all of whose range is inside it, into a
//! word that says "removed" with the call's own ticket. [`FlushDebt::settle`] flushes the TLBs and only then makes
//! these words vacant. In between a fault there is `Busy`, so no new translation stands beside an old cached one
//! (INV-2), and table pages and memory stay where they are (INV-7).
//!
//! What another unmap removed and has not flushed yet is passed over, and flushed by this debt too: when `settle`
//! returns, nothing that was mapped before `unmap` began can be reached, whoever removed it.

use entresol_addr::{GfnRange, PageSize};
use entresol_machine::{Machine, TlbOp, Vmid};

use crate::cursor::{Cursor, Hull};
use crate::freeze::Remover;
use crate::marker::{Marker, Ticket};
use crate::vmid::flush;
use crate::{Entry, FlushDebt, Format, PageWork, Settled, Table, VACANT, VmidSource};

impl<F: Format> Table<F> {
    /// Removes the leaves of `range`, and the tables that lie in it whole. A block that reaches over its edge goes as
    /// a whole: the next fault brings the rest back.
    ///
    /// `work.removed` hears of every leaf; `vmid` is asked only if [`PageWork::flush_before_removed`].
    pub fn unmap<M: Machine, V: VmidSource, W: PageWork>(
        &self,
        machine: &M,
        vmid: V,
        range: GfnRange,
        work: &mut W,
    ) -> FlushDebt<'_, F> {
        let ticket = self.ticket();
        let removed = Marker::Removed(ticket).encode::<F>();
        let mut hull = Hull::new();
        let mut remover = Remover::new(self, machine, &vmid, work);
        let mut cursor = Cursor::new(self, machine, range);
        while let Some(place) = cursor.peek() {
            match place.entry {
                Entry::Vacant => cursor.advance(),
                Entry::Table(frame) if !cursor.covers(&place) => cursor.descend(frame),
                Entry::Broken => {
                    if cursor.meet(place.raw).is_some() {
                        hull.include(&place);
                        cursor.advance();
                    }
                }
                Entry::Table(_) | Entry::Leaf(_) => {
                    if machine.compare_exchange(place.word, place.raw, removed).is_err() {
                        continue;
                    }
                    hull.include(&place);
                    match place.entry {
                        Entry::Leaf(leaf) => remover.leaf(place.gfn, leaf),
                        Entry::Table(frame) => remover.page(frame, place.level + 1, place.gfn),
                        Entry::Vacant | Entry::Broken => {}
                    }
                    cursor.advance();
                }
            }
        }
        let Remover { gone, retired, .. } = remover;
        self.counters.remove(&gone);
        FlushDebt { table: self, ticket, hull, gone, retired }
    }

    /// Makes the words vacant that the unmap with `ticket` removed in `range`.
    fn vacate<M: Machine>(&self, machine: &M, range: GfnRange, ticket: Ticket) {
        let mut cursor = Cursor::new(self, machine, range);
        while let Some(place) = cursor.peek() {
            match place.entry {
                Entry::Table(frame) => cursor.descend(frame),
                Entry::Vacant | Entry::Leaf(_) => cursor.advance(),
                Entry::Broken => {
                    let Some(owner) = cursor.meet(place.raw) else { continue };
                    // Fails only if the page is being frozen: then the word is nobody's any more.
                    if owner != ticket || machine.compare_exchange(place.word, place.raw, VACANT).is_ok() {
                        cursor.advance();
                    }
                }
            }
        }
    }
}

impl<F: Format> FlushDebt<'_, F> {
    /// Flushes the TLBs of what was removed, waits for that, and makes the entries usable again.
    pub fn settle<M: Machine, V: VmidSource>(self, machine: &M, vmid: V) -> Settled {
        if let Some(range) = self.hull.range() {
            flush(machine, &vmid, |vmid| self.invalidation(vmid, range));
            self.table.vacate(machine, range, self.ticket);
        }
        Settled { gone: self.gone, retired: self.retired }
    }

    /// One leaf alone leaves the walk caches as they are; anything more, or a table, is a range.
    fn invalidation(&self, vmid: Vmid, range: GfnRange) -> TlbOp {
        let leaf = PageSize::ALL.into_iter().find(|size| self.gone.of(*size) == 1);
        match leaf {
            Some(size) if self.hull.entries() == 1 && self.gone.tables == 0 => {
                TlbOp::Ipa { vmid, gfn: range.start(), size, leaf_only: true }
            }
            _ => TlbOp::Range { vmid, range },
        }
    }
}
