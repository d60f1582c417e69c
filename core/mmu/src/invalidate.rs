//! Changes that come from the owner: slot updates, memory withdrawn, the end of a virtual machine.
//!
//! Nothing here may be called on a CPU that is pinned: every one of these waits for grace periods, or pins itself. `cpu`
//! is the CPU that the caller runs on.

use entresol_addr::{Gfn, GfnRange, PfnRange};
use entresol_backing::{ObjectHandle, Order};
use entresol_machine::Machine;
use entresol_slot::{Change, ObjectShape, SlotError, SlotRequest, Update};
use entresol_sync::{hint, planted};
use entresol_table::{Format, PageWork};

use crate::vm::Vm;
use crate::{Invalidation, TooMany};

/// Why a range was not invalidated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidateError {
    /// The range does not lie in the guest's address space.
    Outside {
        /// What was asked for.
        range: GfnRange,
    },
    /// Too many invalidations are in progress.
    TooMany,
}

impl From<TooMany> for InvalidateError {
    fn from(TooMany: TooMany) -> Self {
        Self::TooMany
    }
}

/// Cache work on what is taken from the guest.
struct Withdraw<'m, M> {
    machine: &'m M,
    clean: bool,
}

impl<M: Machine> PageWork for Withdraw<'_, M> {
    fn flush_before_removed(&self) -> bool {
        self.clean
    }

    fn removed(&mut self, _gfn: Gfn, leaf: entresol_table::Leaf) {
        if self.clean && leaf.memory == entresol_table::Memory::Normal {
            self.machine.clean_invalidate_to_poc(PfnRange::block(leaf.pfn, leaf.size));
            self.machine.complete();
        }
    }
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// `invalidate_range_start`: when it returns, no translation reaches `range`, and none will until
    /// [`Vm::invalidate_range_end`] (INV-3).
    ///
    /// # Errors
    ///
    /// [`InvalidateError`]; nothing changed.
    pub fn invalidate_range_start(&self, cpu: usize, range: GfnRange) -> Result<Invalidation, InvalidateError> {
        self.check_range(range)?;
        let invalidation = self.announce(range)?;
        self.host.epoch.synchronize();
        self.unmap(cpu, range);
        self.stats.invalidations.bump();
        Ok(invalidation)
    }

    /// Refuses what does not lie in the guest's address space.
    pub(crate) fn check_range(&self, range: GfnRange) -> Result<(), InvalidateError> {
        if self.everything().covers(range) { Ok(()) } else { Err(InvalidateError::Outside { range }) }
    }

    /// `invalidate_range_end`: the backing has its new state.
    pub fn invalidate_range_end(&self, invalidation: Invalidation) {
        self.notifier.end(invalidation);
    }

    /// Takes every entry of `range` away; the objects keep their pages, and the next access brings the entries back.
    ///
    /// # Errors
    ///
    /// [`InvalidateError`]; nothing changed.
    pub fn zap(&self, cpu: usize, range: GfnRange) -> Result<(), InvalidateError> {
        let invalidation = self.invalidate_range_start(cpu, range)?;
        self.invalidate_range_end(invalidation);
        Ok(())
    }

    /// Cleans and invalidates every cacheable page that is mapped: what set/way maintenance means to a guest. A page that
    /// is mapped meanwhile was cleaned before it was.
    pub fn clean_all(&self, cpu: usize) {
        let machine = &self.host.machine;
        let _pin = self.host.epoch.pin(cpu);
        self.table.visit(machine, self.everything(), |_, leaf| {
            if leaf.memory == entresol_table::Memory::Normal {
                machine.clean_invalidate_to_poc(PfnRange::block(leaf.pfn, leaf.size));
            }
        });
        machine.complete();
    }

    /// Pinned, because another invalidation may retire the table pages that this one walks.
    fn unmap(&self, cpu: usize, range: GfnRange) {
        let _pin = self.host.epoch.pin(cpu);
        self.unmap_pinned(range);
    }

    /// Takes every entry of `range` away. The caller is pinned.
    pub(crate) fn unmap_pinned(&self, range: GfnRange) {
        let machine = &self.host.machine;
        let mut work = Withdraw { machine, clean: !machine.features().forced_write_back };
        let flushes = &self.stats.tlb_range;
        let debt = self.table.unmap(machine, self.flushes(flushes), range, &mut work);
        let settled = debt.settle(machine, self.flushes(flushes));
        self.retire(settled.retired);
    }

    /// Creates, deletes, moves a slot, or changes its flags. A slot holds its object, so that it cannot be destroyed.
    /// `cpu` is the CPU that the caller runs on.
    ///
    /// # Errors
    ///
    /// [`SlotError`]; nothing changed.
    pub fn set_slot(&self, cpu: usize, request: &SlotRequest) -> Result<(), SlotError> {
        let handle = ObjectHandle::from_raw(request.object.get());
        // Held first, so that it is still there when the slot is.
        let held = request.size != 0 && self.host.objects.hold(handle).is_ok();
        let shape = {
            let pin = self.host.epoch.pin(cpu);
            match self.host.objects.get(&pin, handle).filter(|_| held) {
                Some(object) if self.options.tags && !object.make_tags_valid(&self.host.machine) => {
                    self.release(handle);
                    return Err(SlotError::NoTags { object: request.object });
                }
                // Private objects can be read-only and log writes as well as others.
                object => object.map(|object| ObjectShape { frames: object.frames(), private: false }),
            }
        };
        let _logs = self.logs.owner();
        while self.notifier.is_active() {
            hint::spin_loop();
        }
        self.keep_generations_apart(cpu);
        let result = self.update_slot(cpu, request, shape);
        let (keep, gone) = match result {
            Ok(Change::Create(_)) => (held, None),
            Ok(Change::Delete(slot)) => (false, Some(slot.object)),
            Ok(Change::Nothing | Change::Move { .. } | Change::Flags { .. }) | Err(_) => (false, None),
        };
        if held && !keep {
            self.release(handle);
        }
        if let Some(object) = gone {
            self.release(ObjectHandle::from_raw(object.get()));
        }
        result.map(|_| ())
    }

    fn release(&self, handle: ObjectHandle) {
        self.host.objects.release(handle).expect("a held object exists");
    }

    fn update_slot(&self, cpu: usize, request: &SlotRequest, shape: Option<ObjectShape>) -> Result<Change, SlotError> {
        match self.slots.update(&self.host.epoch, request, shape)? {
            Update::Unchanged => Ok(Change::Nothing),
            Update::Publish(ready) => {
                let change = ready.change();
                self.make_log(cpu, change)?;
                ready.commit();
                self.log_changed(cpu, change);
                if planted!(ZF6)
                    && let Change::Flags { to, .. } = change
                {
                    self.unmap(cpu, to.range());
                }
                Ok(change)
            }
            Update::Withdraw(withdraw) => {
                let change = withdraw.change();
                self.make_log(cpu, change)?;
                let ready = withdraw.invalidate();
                if let Some(slot) = ready.withdrawn() {
                    self.unmap(cpu, slot.range());
                }
                ready.commit();
                self.log_changed(cpu, change);
                Ok(change)
            }
        }
    }

    /// Ends the virtual machine: flushes its translations and gives its tables back. No vCPU of it runs any more. Its
    /// objects are their owner's.
    pub fn destroy(mut self, cpu: usize) {
        self.unshade(cpu);
        self.reclaim_all(cpu);
        self.end_caches();
        let shown = |handle: ObjectHandle| {
            let pin = self.host.epoch.pin(cpu);
            self.slots.iter(&pin).any(|slot| slot.object.get() == handle.raw())
        };
        self.host.merging.leave(&self.host.pool, cpu, shown);
        let Self { host, table, stats, vmid, slots, logs, .. } = self;
        {
            let pin = host.epoch.pin(cpu);
            for slot in slots.iter(&pin) {
                let handle = ObjectHandle::from_raw(slot.object.get());
                host.objects.release(handle).expect("a slot holds its object");
                logs.free(&host.machine, slot.id, slot.count, &mut |frame, order| host.pool.give(cpu, frame, order));
            }
        }
        let geometry = table.geometry();
        // Faults of its own are over, but another may have retired pages that a late walker still reads.
        host.epoch.synchronize();
        stats.tlb_vmid.bump();
        let root = table.destroy(&host.machine, vmid, |frame| host.pool.give(cpu, frame, Order::PAGE));
        host.pool.give(cpu, root.start(), crate::create::root_order(geometry));
    }
}
