//! A fault in a slot that logs: in place of the rest of [`Vm::handle`].
//!
//! Rules (specification, "Permissions" and "Mapping size"): a page is writable only if this access writes; then its bit is
//! set. It is then 4 KiB large, and a block in the way is split, with the table pages in hand before anything changes.
//! Device memory is not logged: nobody can copy it.

use entresol_addr::{Gfn, PageSize, PfnRange};
use entresol_backing::{ObjectHandle, Order, OutOfMemory};
use entresol_fault::{Cause, Fault};
use entresol_machine::{Features, Machine, Word};
use entresol_slot::{Hint, SlotRef};
use entresol_sync::{Pin, planted};
use entresol_table::{Entry, Format, MapError, Mapped, Memory, PageWork, RelaxError, Reserve, Walk};

use super::Logs;
use crate::mapping::Mapping;
use crate::notifier::Sample;
use crate::outcome::{Outcome, Reason};
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

/// A fault in a slot that logs is as every other, but for this: a write to what is mapped.
enum Again {
    /// It is done.
    Done,
    /// Another CPU has changed the entry.
    Lost,
    /// The page is part of a block, the word of which held this.
    Block { word: Word, raw: u64 },
    /// It is something else, or something moves.
    Other,
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// [`Vm::handle`] from `slot` on, which was found after `sample` and logs; a write may go through it.
    // The way of [`Again::Done`] returns from no call: it needs no registers to be saved.
    #[inline(never)]
    pub(crate) fn handle_logged(
        &self,
        pin: &Pin<'_>,
        hint: &Hint,
        fault: &Fault,
        sample: Sample,
        slot: SlotRef,
    ) -> Outcome {
        match self.write_again(pin, fault, sample, &slot) {
            Again::Done => Outcome::Resume,
            Again::Lost => self.retry(),
            Again::Block { word, raw } => self.write_into_block(pin.cpu(), &slot, fault.gfn(), word, raw),
            Again::Other => self.decide_logged(pin, hint, fault, sample),
        }
    }

    /// What nearly every fault in a slot that logs is: a write to memory of the object's own that is mapped, and that its owner
    /// has write-protected. What is mapped is what the object has, unless an invalidation is in progress.
    #[inline(always)]
    fn write_again(&self, pin: &Pin<'_>, fault: &Fault, sample: Sample, slot: &SlotRef) -> Again {
        if !matches!(fault.cause, Cause::Permission { .. }) || !fault.is_write() || planted!(ZA10) {
            return Again::Other;
        }
        let (gfn, machine) = (fault.gfn(), &self.host.machine);
        let object = self.host.objects.get(pin, ObjectHandle::from_raw(slot.object.get()));
        let (Some(object), Some(at)) = (object, self.table.walk_to_page(machine, gfn)) else {
            return Again::Other;
        };
        let Entry::Leaf(leaf) = at.entry else { return Again::Other };
        let moved = !self.notifier.is_quiet(sample) || !self.slots.is_current(slot, pin);
        let shared = !object.is_own() && !planted!(ZC7);
        if leaf.memory != Memory::Normal || leaf.size == PageSize::Size1G || shared || moved {
            return Again::Other;
        }
        if leaf.size != PageSize::Size4K {
            return Again::Block { word: at.word, raw: at.raw };
        }
        if !self.logs.mark_alone(machine, slot, gfn) {
            return Again::Other;
        }
        self.stats.populated.bump();
        self.stats.permission.bump();
        let flushes = self.flushes(&self.stats.tlb_ipa);
        if self.table.permit_write(machine, flushes, gfn, &at) { Again::Done } else { Again::Lost }
    }

    /// The end of it where the page is part of a block, whose word held `raw`.
    #[inline(never)]
    fn write_into_block(&self, cpu: usize, slot: &SlotRef, gfn: Gfn, word: Word, raw: u64) -> Outcome {
        let (machine, pool) = (&self.host.machine, &self.host.pool);
        let Ok(frame) = pool.take(cpu, Order::PAGE) else {
            return self.out_of_memory(cpu);
        };
        machine.zero(PfnRange::single(frame));
        self.stats.populated.bump();
        self.stats.permission.bump();
        self.logs.mark(machine, cpu, slot, gfn);
        let (flushes, around) = (self.flushes(&self.stats.tlb_ipa), self.switches.around());
        match self.table.split_for_write(machine, flushes, gfn, word, raw, frame, around) {
            Ok(()) => self.unless_full(cpu, Outcome::Resume),
            Err(frame) => {
                pool.give(cpu, frame, Order::PAGE);
                self.retry()
            }
        }
    }

    /// How a fault ends that was handled so, on CPU `cpu`.
    fn unless_full(&self, cpu: usize, outcome: Outcome) -> Outcome {
        if outcome == Outcome::Resume && self.logs.rings.is_full_on(cpu) {
            return Outcome::Exit(Reason::DirtyRingFull);
        }
        outcome
    }

    #[cold]
    #[inline(never)]
    fn decide_logged(&self, pin: &Pin<'_>, hint: &Hint, fault: &Fault, sample: Sample) -> Outcome {
        match self.decide(pin, hint, fault) {
            Ok((slot, grant, mapping)) if slot.logs_dirty() => {
                self.count_grant(&grant);
                let relaxes = matches!(fault.cause, Cause::Permission { .. });
                if !grant.writable && !relaxes {
                    return self.map_read_only(pin, fault);
                }
                let outcome = self.publish_logged(pin, &slot, fault, &mapping);
                // What a split has left out comes back many pages at a time.
                if outcome == Outcome::Resume
                    && !fault.is_write()
                    && !relaxes
                    && let Some(object) = self.host.objects.get(pin, ObjectHandle::from_raw(slot.object.get()))
                {
                    self.map_around(pin, fault.gfn(), &slot, object, sample);
                }
                self.unless_full(pin.cpu(), outcome)
            }
            // Logging ended in between.
            Ok(_) => self.retry(),
            Err(outcome) => self.unless_full(pin.cpu(), outcome),
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
