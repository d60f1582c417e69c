//! A fault in a slot that logs: in place of the rest of [`Vm::handle`].
//!
//! Rules (specification, "Permissions" and "Mapping size"): a page is writable only if this access writes; then its bit is
//! set. It is then 4 KiB large, and a block in the way is split, with the table pages in hand before anything changes.
//! Device memory is not logged: nobody can copy it.

use entresol_addr::{Gfn, PageSize};
use entresol_backing::{Order, OutOfMemory};
use entresol_fault::{Cause, Fault};
use entresol_machine::{Features, Machine};
use entresol_slot::{Hint, SlotRef};
use entresol_sync::{Pin, planted};
use entresol_table::{Entry, Format, MapError, Mapped, Memory, PageWork, RelaxError, Reserve, Walk};

use super::Logs;
use crate::mapping::Mapping;
use crate::outcome::Outcome;
use crate::vm::{Prepare, Vm};

/// Cache work, then the bit, before a writable entry is seen (INV-1, INV-4).
struct Written<'a, M> {
    prepare: Prepare<'a, M>,
    logs: &'a Logs,
    cpu: usize,
    slot: &'a SlotRef,
    gfn: Gfn,
}

impl<M: Machine> PageWork for Written<'_, M> {
    fn must_prepare(&self) -> bool {
        true
    }

    fn prepare(&mut self) {
        if self.prepare.must_prepare() {
            self.prepare.prepare();
        }
        self.logs.mark(self.prepare.machine, self.cpu, self.slot, self.gfn);
    }
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// [`Vm::handle`] from the slot on, for one that logs. It looks for the slot again, so that the hot path keeps its own in
    /// registers.
    #[cold]
    #[inline(never)]
    pub(crate) fn handle_logged(&self, pin: &Pin<'_>, hint: &Hint, fault: &Fault) -> Outcome {
        match self.decide(pin, hint, fault) {
            Ok((slot, grant, mapping)) if slot.logs_dirty() => {
                self.count_grant(&grant);
                if !grant.writable && !matches!(fault.cause, Cause::Permission { .. }) {
                    return self.map_read_only(pin, fault);
                }
                self.publish_logged(pin, &slot, fault, &mapping)
            }
            // Logging ended in between.
            Ok(_) => self.retry(),
            Err(outcome) => outcome,
        }
    }

    /// Publishes `mapping`, which was chosen for `fault` in `slot` as if the slot did not log.
    pub(crate) fn publish_logged(&self, pin: &Pin<'_>, slot: &SlotRef, fault: &Fault, mapping: &Mapping) -> Outcome {
        let features = self.host.features();
        let (gfn, relaxes) = (fault.gfn(), matches!(fault.cause, Cause::Permission { .. }));
        if mapping.leaf.memory == Memory::Normal && mapping.leaf.permissions.write && fault.is_write() {
            return self.written(pin.cpu(), slot, relaxes, &mapping.page(gfn), features);
        }
        let narrow = if mapping.leaf.memory == Memory::Device { *mapping } else { mapping.read_only() };
        if relaxes {
            // A block may become executable as a whole: its dirty state does not change.
            self.relax(fault, &narrow, features)
        } else {
            self.map(pin.cpu(), &narrow.page(gfn), features)
        }
    }

    /// A write to memory: `page` is its entry.
    fn written(&self, cpu: usize, slot: &SlotRef, relaxes: bool, page: &Mapping, features: &Features) -> Outcome {
        if relaxes {
            self.stats.permission.bump()
        } else {
            self.stats.translation.bump()
        }
        let mut work = Written { prepare: self.prepare(page, features), logs: &self.logs, cpu, slot, gfn: page.gfn };
        let Some(at) = self.table.walk(&self.host.machine, page.gfn) else {
            return self.retry();
        };
        match at.entry {
            Entry::Leaf(leaf) if leaf.same_output(&page.leaf) => self.relax_written(page, &at, &mut work),
            // A block, or a page that was copied since.
            Entry::Leaf(_) | Entry::Vacant => self.map_written(page, &mut work),
            Entry::Broken | Entry::Table(_) => self.retry(),
        }
    }

    /// A page where none is, or where a block is in the way.
    fn map_written(&self, page: &Mapping, work: &mut Written<'_, M>) -> Outcome {
        let Ok(result) = self.map_reserving(page, work) else {
            return self.out_of_memory(work.cpu);
        };
        match result {
            Ok(mapped) => self.installed(mapped),
            // Out of a block, which said what its pages say: not writable yet.
            Err(MapError::Present(leaf)) if leaf.size == PageSize::Size4K && !leaf.permissions.write => {
                match self.table.walk(&self.host.machine, page.gfn) {
                    Some(at) => self.relax_written(page, &at, work),
                    None => self.retry(),
                }
            }
            Err(MapError::NoTable { .. }) => self.retry(),
            Err(error) => self.not_mapped(error),
        }
    }

    /// [`entresol_table::Table::map`], again with table pages if it needs some.
    fn map_reserving(
        &self,
        page: &Mapping,
        work: &mut Written<'_, M>,
    ) -> Result<Result<Mapped, MapError>, OutOfMemory> {
        let (machine, flushes) = (&self.host.machine, || self.flushes(&self.stats.tlb_ipa));
        let mut reserve = Reserve::new();
        let first = self.table.map(machine, flushes(), page.gfn, &page.leaf, &mut reserve, work);
        let Err(MapError::NoTable { needed }) = first else {
            return Ok(first);
        };
        let filled = self.fill(work.cpu, &mut reserve, needed);
        let result = filled.map(|()| self.table.map(machine, flushes(), page.gfn, &page.leaf, &mut reserve, work));
        while let Some(frame) = reserve.pop() {
            self.host.pool.give(work.cpu, frame, Order::PAGE);
        }
        result
    }

    /// The page that `at` found becomes writable.
    fn relax_written(&self, page: &Mapping, at: &Walk, work: &mut Written<'_, M>) -> Outcome {
        if !matches!(at.entry, Entry::Leaf(leaf) if leaf.size == PageSize::Size4K) {
            return self.retry();
        }
        let (machine, flushes) = (&self.host.machine, self.flushes(&self.stats.tlb_ipa));
        let (frame, add) = (page.leaf.pfn, page.leaf.permissions);
        let result = if planted!(ZA10) {
            self.table.relax_at(machine, flushes, page.gfn, at, frame, add, &mut ())
        } else {
            // Nothing new is seen through the caches: only the bit is left to do.
            work.prepare.clean = false;
            work.prepare.icache = false;
            self.table.relax_at(machine, flushes, page.gfn, at, frame, add, work)
        };
        match result {
            Ok(_) => Outcome::Resume,
            Err(RelaxError::Gone | RelaxError::Busy | RelaxError::Outside { .. }) => self.retry(),
        }
    }
}
