//! What a slot update means for the log of the slot.
//!
//! Protocol: the log is made before the update is published, all or nothing; so out of memory refuses the update. After the
//! publication's grace period every fault sees the flag; then entries of before lose their write permission, and from that
//! moment a writable entry has its bit. The other way round, a log is freed when nobody finds the flag any more, after blocks
//! were put together again. A moved slot keeps its log: bits count from its start.
//!
//! Putting together is done by the way of a fault that reads: where a block can stand over a table, [`Vm::touch`] puts it
//! there, break-before-make. What loses to another change stays split until a fault comes by.

use entresol_addr::{Gfn, GfnRange, PageSize};
use entresol_backing::{ObjectHandle, Order};
use entresol_fault::Access;
use entresol_machine::Machine;
use entresol_slot::{Change, Hint, Slot, SlotError, SlotRef};
use entresol_sync::{MutexGuard, Pin};
use entresol_table::{Entry, Format, LEAF_LEVEL, Permissions, Reserve, Straddle};

use super::bitmap::Bitmap;
use super::{LogError, Logs};
use crate::mapping::choose;
use crate::share::made;
use crate::vm::Vm;

/// The slot before and after.
const fn states(change: Change) -> (Option<Slot>, Option<Slot>) {
    match change {
        Change::Nothing => (None, None),
        Change::Create(to) => (None, Some(to)),
        Change::Delete(from) => (Some(from), None),
        Change::Move { from, to } | Change::Flags { from, to } => (Some(from), Some(to)),
    }
}

impl Logs {
    /// Keeps logs from being made, freed, cleared or reset by others.
    pub(crate) fn owner(&self) -> MutexGuard<'_, ()> {
        self.owner.lock()
    }
}

/// The first frame of every piece of at most `size` that `range` has, aligned to it but for the first.
fn pieces(range: GfnRange, size: PageSize) -> impl Iterator<Item = Gfn> {
    let (start, end) = (range.start().get(), range.end().get());
    let first = range.start().align_down(size).get();
    (first..end).step_by(size.frames() as usize).map(move |gfn| Gfn::new(gfn.max(start)))
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// Before `change` is published: the log that it needs. The caller holds the owner's lock.
    pub(crate) fn make_log(&self, cpu: usize, change: Change) -> Result<(), SlotError> {
        let (_, Some(to)) = states(change) else {
            return Ok(());
        };
        let Some(cell) = self.logs.cells.get(usize::from(to.id)).filter(|_| to.logs_dirty()) else {
            return Ok(());
        };
        if cell.get().is_none() {
            let made = Bitmap::make(&self.host.supply(cpu), to.count);
            cell.set(made.map_err(|_| SlotError::NoLog { pages: to.count })?);
        }
        Ok(())
    }

    /// After `change` was published. The caller holds the owner's lock, and its CPU is not pinned.
    pub(crate) fn log_changed(&self, cpu: usize, change: Change) {
        match states(change) {
            (from, Some(to)) if to.logs_dirty() => {
                if from.is_some_and(|from| !from.logs_dirty()) {
                    self.write_protect(cpu, to.range());
                }
                if let Some(cell) = self.logs.cells.get(usize::from(to.id)) {
                    cell.arm();
                }
            }
            (Some(from), to) if from.logs_dirty() => {
                if to.is_some_and(|to| to.base == from.base) {
                    self.put_together(cpu, from.range());
                }
                let free = &mut |frame, order| self.host.pool.give(cpu, frame, order);
                self.logs.free(&self.host.machine, from.id, from.count, free);
            }
            _ => {}
        }
    }

    fn write_protect(&self, cpu: usize, range: GfnRange) {
        let _pin = self.host.epoch.pin(cpu);
        let flushes = self.flushes(&self.stats.tlb_range);
        self.table.protect(&self.host.machine, flushes, range, Permissions::WRITE, Straddle::Whole);
    }

    /// Puts blocks where pages stand that make one.
    fn put_together(&self, cpu: usize, range: GfnRange) {
        for gfn in pieces(range, PageSize::Size2M) {
            let pin = self.host.epoch.pin(cpu);
            let walk = self.table.walk(&self.host.machine, gfn);
            let split = walk.is_some_and(|at| at.level == LEAF_LEVEL);
            if split && self.may_be_block(&pin, gfn) {
                // What comes of it is the same for the guest.
                let _ = self.touch(&pin, &Hint::new(), &made(gfn, Access::Read));
            }
        }
    }

    /// Whether a fault at `gfn` would map more than a page.
    fn may_be_block(&self, pin: &Pin<'_>, gfn: Gfn) -> bool {
        let block = |slot: SlotRef| {
            let object = self.host.objects.get(pin, ObjectHandle::from_raw(slot.object.get()))?;
            let grant = object.present(&self.host.supply(pin.cpu()), slot.object_frame(gfn))?;
            Some(choose(&slot, &grant, &made(gfn, Access::Read), self.options.largest, self.host.features()).leaf.size)
        };
        self.slots.find(pin, gfn, &Hint::new()).and_then(block).is_some_and(|size| size != PageSize::Size4K)
    }

    /// Splits every block of slot `slot` into pages, ahead of the guest's writes: to be called once logging has begun. One
    /// block at a time, so that faults never wait for more than one. Returns how many were split.
    ///
    /// # Errors
    ///
    /// [`LogError::Absent`], [`LogError::NotLogged`]; [`LogError::OutOfMemory`] if there is no frame for a table: what is
    /// left is split by the guest's writes.
    pub fn split_ahead(&self, cpu: usize, slot: u16) -> Result<u64, LogError> {
        let _owner = self.logs.owner();
        let (slot, _) = self.log_of(cpu, slot)?;
        let mut split = 0;
        for gfn in pieces(slot.range(), PageSize::Size2M) {
            // A block of 1 GiB is split twice.
            while self.split_one(cpu, gfn).map_err(|_| LogError::OutOfMemory { split })? {
                split += 1;
            }
        }
        Ok(split)
    }

    /// Whether there was a block behind `gfn`, which is split now.
    fn split_one(&self, cpu: usize, gfn: Gfn) -> Result<bool, entresol_backing::OutOfMemory> {
        let _pin = self.host.epoch.pin(cpu);
        let machine = &self.host.machine;
        let walk = self.table.walk(machine, gfn);
        let block = walk.is_some_and(|at| matches!(at.entry, Entry::Leaf(leaf) if leaf.size != PageSize::Size4K));
        if !block {
            return Ok(false);
        }
        let mut reserve = Reserve::new();
        self.fill(cpu, &mut reserve, 1)?;
        let result = self.table.split(machine, self.flushes(&self.stats.tlb_ipa), gfn, &mut reserve);
        while let Some(frame) = reserve.pop() {
            self.host.pool.give(cpu, frame, Order::PAGE);
        }
        // Who was faster did something else with it; a write will see what.
        Ok(result.is_ok())
    }
}
