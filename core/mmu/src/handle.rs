//! The fault path, top to bottom.

use entresol_addr::{Pfn, PfnRange};
use entresol_backing::{Grant, GrantError, Memory, ObjectHandle, Order};
use entresol_fault::{Cause, Fault};
use entresol_machine::{Features, Machine};
use entresol_slot::{Hint, SlotRef};
use entresol_sync::{Pin, planted};
use entresol_table::{Format, MapError, Mapped, RelaxError, Reserve, Retired};

use crate::access;
use crate::mapping::{Mapping, choose};
use crate::outcome::{Abort, Outcome, Reason};
use crate::vm::{Prepare, Vm};

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// Handles one fault of a vCPU on the CPU that `pin` pins. `hint` is the vCPU's.
    // One piece of code with its caller, however many there are.
    #[inline(always)]
    pub fn handle(&self, pin: &Pin<'_>, hint: &Hint, fault: &Fault) -> Outcome {
        if let Some(outcome) = access::before_lookup(fault, self.machine_limit(), self.limit()) {
            return self.refused(outcome);
        }
        let mut sample = self.notifier.sample();
        let Some(slot) = self.slots.find(pin, fault.gfn(), hint) else {
            return self.refused(access::outside(fault));
        };
        let write = fault.is_write() | (planted!(ZB1) && fault.cache_maintenance);
        if write && slot.is_read_only() {
            return self.read_only(pin, fault);
        }
        if fault.cause == Cause::AccessFlag {
            return self.make_young(fault);
        }
        if slot.logs_dirty() {
            return self.handle_logged(pin, hint, fault, sample, slot);
        }
        let Some(object) = self.host.objects.get(pin, ObjectHandle::from_raw(slot.object.get())) else {
            return self.refused(Outcome::Exit(Reason::BadObject));
        };
        let grant = match object.grant(&self.host.supply(pin.cpu()), slot.object_frame(fault.gfn()), write) {
            Ok(grant) => grant,
            Err(error) => return self.no_grant(pin, fault, error),
        };
        if fault.is_fetch() && grant.memory == Memory::Device {
            return self.refused(Outcome::Inject(Abort::External));
        }
        let features = self.host.features();
        let mapping = choose(&slot, &grant, fault, self.options.largest, features);
        if planted!(ZA5) {
            sample = self.notifier.sample();
        }
        if self.notifier.moved(sample, mapping.range()) || !self.slots.is_current(&slot, pin) {
            return self.retry();
        }
        self.count_grant(&grant);
        match fault.cause {
            Cause::Permission { .. } => self.relax(fault, &mapping, features),
            _ if !grant.writable => self.map_read_only(pin, fault),
            _ => self.map(pin.cpu(), &mapping, features),
        }
    }

    /// The same for an access that is made for the guest and not by it: maps what a translation fault there would have.
    /// Apart from [`Vm::handle`], which stays one piece of code where it is called.
    #[cold]
    #[inline(never)]
    pub fn touch(&self, pin: &Pin<'_>, hint: &Hint, fault: &Fault) -> Outcome {
        if let Some(outcome) = access::before_lookup(fault, self.machine_limit(), self.limit()) {
            return self.refused(outcome);
        }
        self.publish_touched(pin, fault, self.decide(pin, hint, fault))
    }

    /// The rest of a touch.
    #[cold]
    pub(crate) fn publish_touched(
        &self,
        pin: &Pin<'_>,
        fault: &Fault,
        decided: Result<(SlotRef, Grant, Mapping), Outcome>,
    ) -> Outcome {
        let (slot, grant, mapping) = match decided {
            Ok(decided) => decided,
            Err(outcome) => return outcome,
        };
        if !grant.writable {
            return self.map_read_only(pin, fault);
        }
        if slot.logs_dirty() {
            return self.publish_logged(pin, &slot, fault, &mapping);
        }
        self.map_surely(pin.cpu(), &mapping, self.host.features(), true)
    }

    /// A new entry, with tables in hand for whatever the way needs.
    pub(crate) fn map_surely(&self, cpu: usize, mapping: &Mapping, features: &Features, replace: bool) -> Outcome {
        let needed = match self.try_map(mapping, features, &mut Reserve::new(), replace) {
            Ok(mapped) => return self.installed(mapped),
            Err(MapError::NoTable { needed }) => needed,
            Err(error) => return self.not_mapped(error),
        };
        match self.map_with_tables(cpu, mapping, features, needed, replace) {
            Outcome::Retry => self.map_with_tables(cpu, mapping, features, Reserve::MOST, replace),
            outcome => outcome,
        }
    }

    /// Everything up to the publication, off the hot path: slot, grant, mapping, and that nothing moved since. Waits for who
    /// fills the same page.
    pub(crate) fn decide(
        &self,
        pin: &Pin<'_>,
        hint: &Hint,
        fault: &Fault,
    ) -> Result<(SlotRef, Grant, Mapping), Outcome> {
        let sample = self.notifier.sample();
        let Some(slot) = self.slots.find(pin, fault.gfn(), hint) else {
            return Err(self.refused(access::outside(fault)));
        };
        let write = fault.is_write();
        if write && slot.is_read_only() {
            return Err(self.read_only(pin, fault));
        }
        let Some(object) = self.host.objects.get(pin, ObjectHandle::from_raw(slot.object.get())) else {
            return Err(self.refused(Outcome::Exit(Reason::BadObject)));
        };
        let grant = loop {
            match object.grant(&self.host.supply(pin.cpu()), slot.object_frame(fault.gfn()), write) {
                // Filling is bounded work of a CPU that nothing interrupts.
                Err(GrantError::Busy) => entresol_sync::hint::spin_loop(),
                answer => break answer.map_err(|error| self.no_grant(pin, fault, error))?,
            }
        };
        if fault.is_fetch() && grant.memory == Memory::Device {
            return Err(self.refused(Outcome::Inject(Abort::External)));
        }
        let mapping = choose(&slot, &grant, fault, self.options.largest, self.host.features());
        if self.notifier.moved(sample, mapping.range()) || !self.slots.is_current(&slot, pin) {
            return Err(self.retry());
        }
        Ok((slot, grant, mapping))
    }

    #[inline]
    pub(crate) fn count_grant(&self, grant: &Grant) {
        if grant.fresh { self.stats.fresh.bump() } else { self.stats.populated.bump() }
    }

    /// A new entry.
    #[inline]
    pub(crate) fn map(&self, cpu: usize, mapping: &Mapping, features: &Features) -> Outcome {
        self.stats.translation.bump();
        let mut reserve = Reserve::new();
        // Nearly always the tables are there: ask for them only when they are not.
        match self.try_map(mapping, features, &mut reserve, true) {
            Ok(mapped) => self.installed(mapped),
            Err(MapError::NoTable { needed }) => self.map_with_tables(cpu, mapping, features, needed, true),
            Err(error) => self.not_mapped(error),
        }
    }

    /// One try. `replace`: what is there gives way.
    #[inline]
    pub(crate) fn try_map(
        &self,
        mapping: &Mapping,
        features: &Features,
        reserve: &mut Reserve,
        replace: bool,
    ) -> Result<Mapped, MapError> {
        let mut prepare = Prepare { replace, ..self.prepare(mapping, features) };
        let flushes = self.flushes(&self.stats.tlb_ipa);
        self.table.map(&self.host.machine, flushes, mapping.gfn, &mapping.leaf, reserve, &mut prepare)
    }

    /// What must be done to the memory before a new entry for it is seen.
    #[inline]
    pub(crate) fn prepare(&self, mapping: &Mapping, features: &Features) -> Prepare<'_, M> {
        let cacheable = mapping.leaf.memory == entresol_table::Memory::Normal;
        Prepare {
            machine: &self.host.machine,
            frames: PfnRange::block(mapping.leaf.pfn, mapping.leaf.size),
            clean: cacheable & !features.forced_write_back & !planted!(ZA1),
            icache: mapping.leaf.permissions.execute & !features.coherent_icache,
            replace: true,
        }
    }

    /// The same with table pages in hand. A table that another vCPU splits meanwhile can raise the need: then the
    /// guest tries again.
    #[cold]
    fn map_with_tables(
        &self,
        cpu: usize,
        mapping: &Mapping,
        features: &Features,
        needed: usize,
        replace: bool,
    ) -> Outcome {
        let mut reserve = Reserve::new();
        let result = match self.fill(cpu, &mut reserve, needed) {
            Ok(()) => Some(self.try_map(mapping, features, &mut reserve, replace)),
            Err(entresol_backing::OutOfMemory) => None,
        };
        while let Some(frame) = reserve.pop() {
            if planted!(ZA8) && !matches!(result, Some(Ok(_))) {
                continue;
            }
            self.host.pool.give(cpu, frame, Order::PAGE);
        }
        match result {
            Some(Ok(mapped)) => self.installed(mapped),
            Some(Err(MapError::NoTable { .. })) => self.retry(),
            Some(Err(error)) => self.not_mapped(error),
            None => self.out_of_memory(cpu),
        }
    }

    /// Puts `needed` zeroed frames into an empty reserve.
    pub(crate) fn fill(
        &self,
        cpu: usize,
        reserve: &mut Reserve,
        needed: usize,
    ) -> Result<(), entresol_backing::OutOfMemory> {
        for _ in 0..needed.min(Reserve::MOST) {
            let frame = self.host.pool.take(cpu, Order::PAGE)?;
            self.host.machine.zero(PfnRange::single(frame));
            if let Err(frame) = reserve.push(frame) {
                self.host.pool.give(cpu, frame, Order::PAGE);
            }
        }
        Ok(())
    }

    /// Wider permissions for an entry that is there.
    #[cold]
    pub(crate) fn relax(&self, fault: &Fault, mapping: &Mapping, features: &Features) -> Outcome {
        self.stats.permission.bump();
        let frame = mapping.leaf.frame_of(fault.gfn());
        let add = mapping.leaf.permissions;
        let mut prepare = Prepare {
            machine: &self.host.machine,
            frames: PfnRange::block(mapping.leaf.pfn, mapping.leaf.size),
            clean: false,
            icache: fault.is_fetch() & !features.coherent_icache & !planted!(ZA9),
            replace: false,
        };
        let flushes = self.flushes(&self.stats.tlb_ipa);
        match self.table.relax(&self.host.machine, flushes, fault.gfn(), frame, add, &mut prepare) {
            Ok(_) => Outcome::Resume,
            Err(RelaxError::Gone | RelaxError::Busy | RelaxError::Outside { .. }) => self.retry(),
        }
    }

    #[cold]
    fn make_young(&self, fault: &Fault) -> Outcome {
        self.stats.access_flag.bump();
        match self.table.make_young(&self.host.machine, fault.gfn()) {
            Ok(_) => Outcome::Resume,
            Err(_) => self.retry(),
        }
    }

    #[inline]
    pub(crate) fn installed(&self, mapped: Mapped) -> Outcome {
        if !mapped.retired.is_empty() {
            self.retire(mapped.retired);
        }
        Outcome::Resume
    }

    /// Gives retired table pages back after a grace period. Their words stay as they are until then.
    #[cold]
    pub(crate) fn retire(&self, retired: Retired) {
        retired.drain(&self.host.machine, self.table.format(), |frame: Pfn| {
            if planted!(ZC6) {
                return self.host.pool.give(0, frame, Order::PAGE);
            }
            self.host.pool.defer(frame, Order::PAGE);
        });
    }

    #[cold]
    pub(crate) fn not_mapped(&self, error: MapError) -> Outcome {
        match error {
            MapError::Present(_) => {
                self.stats.spurious.bump();
                Outcome::Resume
            }
            MapError::Busy | MapError::Occupied | MapError::NoTable { .. } => self.retry(),
            // A slot or an object that no table of this shape can show: refused when the slot is made.
            MapError::Outside { .. }
            | MapError::Misaligned { .. }
            | MapError::TooLarge { .. }
            | MapError::Unreachable { .. } => self.refused(Outcome::Exit(Reason::BadObject)),
        }
    }

    /// A write to read-only memory. It looks for the slot again, so that the hot path keeps its own in registers.
    #[cold]
    fn read_only(&self, pin: &Pin<'_>, fault: &Fault) -> Outcome {
        if !fault.cache_maintenance || fault.stage1_walk || planted!(ZB2) {
            return self.refused(access::read_only(fault));
        }
        match self.slots.find(pin, fault.gfn(), &Hint::new()) {
            Some(slot) => self.maintain_read_only(pin, &slot, fault),
            None => self.retry(),
        }
    }

    #[cold]
    pub(crate) fn no_grant(&self, pin: &Pin<'_>, fault: &Fault, error: GrantError) -> Outcome {
        match error {
            GrantError::Busy | GrantError::Forking => self.retry(),
            GrantError::Shared => self.copy_on_write(pin, fault),
            GrantError::OutOfMemory => self.out_of_memory(pin.cpu()),
            GrantError::ReadOnly => self.read_only(pin, fault),
            GrantError::Stored { slot } => {
                self.stats.absent.bump();
                self.refused(Outcome::Exit(Reason::Stored { slot }))
            }
            GrantError::Poisoned => {
                self.stats.poisoned.bump();
                self.refused(Outcome::Inject(Abort::External))
            }
            GrantError::Outside { .. } => self.refused(Outcome::Exit(Reason::BadObject)),
        }
    }

    /// Frames whose grace period is over may be there yet, and frames that hold mere hints.
    #[cold]
    pub(crate) fn out_of_memory(&self, cpu: usize) -> Outcome {
        if self.host.pool.reap(&self.host.epoch, cpu, usize::MAX) != 0 {
            return self.retry();
        }
        if self.host.merging.shed(&self.host.pool, cpu) != 0 {
            return self.retry();
        }
        // So may what private machines gave back.
        if self.host.supply(cpu).scrub(usize::MAX) != 0 {
            return self.retry();
        }
        self.refused(Outcome::Exit(Reason::OutOfMemory))
    }

    #[cold]
    pub(crate) fn retry(&self) -> Outcome {
        self.stats.retry.bump();
        Outcome::Retry
    }

    #[cold]
    pub(crate) fn refused(&self, outcome: Outcome) -> Outcome {
        match outcome {
            Outcome::Inject(_) => self.stats.injected.bump(),
            Outcome::Mmio | Outcome::Skip => self.stats.outside.bump(),
            Outcome::Resume | Outcome::Retry | Outcome::Unshare | Outcome::Exit(_) => {}
        }
        outcome
    }
}
