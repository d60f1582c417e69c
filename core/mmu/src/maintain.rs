//! A guest's cache maintenance by virtual address: one table, two doors.
//!
//! Purpose: what DC IVAC, CVAC, CVAU, CVAP, CIVAC and IC IVAU do where memory is absent or read-only ("cache-ops",
//! required outcomes). They are told apart by what they need: only DC IVAC needs write permission.
//!
//! Doors: a data abort with CM = 1, in [`Vm::handle`], where a permission fault says that the operation needs to write; and
//! the instruction itself, if its owner lets it trap, in [`Vm::maintain`], where its name says it. Both ask [`triage`], so an
//! operation means the same through either. At the first door memory is mapped and the instruction is made again (at most
//! two traps, INV-15: a translation fault, then a permission fault); at the second it is carried out here, and skipped.
//!
//! Invariants: INV-13 (maintenance never writes to a read-only page), INV-15.
//!
//! Known hole: a trapped operation works on its whole page, not on its line: the machine's unit is a page.

use entresol_addr::{Gpa, PfnRange};
use entresol_backing::{Kind, Memory, ObjectHandle};
use entresol_fault::{Access, Cause, Fault};
use entresol_machine::Machine;
use entresol_slot::{Hint, SlotRef};
use entresol_sync::{Pin, planted};
use entresol_table::Format;

use crate::access;
use crate::outcome::{Abort, Outcome, Reason};
use crate::vm::Vm;

/// What DC IVAC does to read-only memory: the owner's choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadOnlyIvac {
    /// A synchronous external abort at its address: it would need permission to write.
    #[default]
    Abort,
    /// Clean and invalidate, which is what it is in a guest anyway (HCR_EL2.VM = 1).
    Clean,
}

/// An operation that trapped instead of being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maintenance {
    /// DC IVAC.
    Invalidate,
    /// DC CVAC, CVAP, CVADP, CIVAC: to the point of coherency.
    Clean,
    /// DC CVAU: to the point of unification.
    CleanToUnification,
    /// IC IVAU.
    Instructions,
}

/// What lies at the address. Device memory is what its slot and object allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Nothing,
    ReadOnly,
    Writable,
}

/// What becomes of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Triage {
    /// It has no effect: step over it.
    Skip,
    /// As a load: map what is there, do not make it dirty.
    Read,
    /// As a store: make it writable, and dirty.
    Write,
    /// The guest takes an abort.
    Abort,
    /// Clean and invalidate the page, then step over it.
    Clean,
}

/// The table. `needs_write`: the operation was refused for want of write permission, or is DC IVAC.
pub(crate) const fn triage(target: Target, needs_write: bool, policy: ReadOnlyIvac) -> Triage {
    match (target, needs_write, policy) {
        (Target::Nothing, ..) => Triage::Skip,
        (Target::Writable, true, _) => Triage::Write,
        (Target::Writable | Target::ReadOnly, false, _) => Triage::Read,
        (Target::ReadOnly, true, ReadOnlyIvac::Abort) => Triage::Abort,
        (Target::ReadOnly, true, ReadOnlyIvac::Clean) => Triage::Clean,
    }
}

impl Maintenance {
    const fn needs_write(self) -> bool {
        matches!(self, Self::Invalidate)
    }

    /// The fault that it would have been, had it not trapped.
    const fn fault(self, gpa: Gpa) -> Fault {
        let cause = if self.needs_write() { Cause::Permission { level: 3 } } else { Cause::Translation };
        Fault {
            gpa,
            access: Access::Write,
            cause,
            stage1_walk: false,
            cache_maintenance: true,
            transfer: None,
            syndrome: 0,
        }
    }
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// The second door: carries out an operation on the guest physical address `gpa` of the CPU that `pin` pins. `hint` is
    /// the vCPU's. [`Outcome::Skip`] if it is done.
    pub fn maintain(&self, pin: &Pin<'_>, hint: &Hint, gpa: Gpa, operation: Maintenance) -> Outcome {
        if gpa >= self.limit() {
            return self.refused(access::beyond(&operation.fault(gpa), self.machine_limit()));
        }
        let Some(slot) = self.slots.find(pin, gpa.frame(), hint) else {
            return self.refused(access::outside(&operation.fault(gpa)));
        };
        let Some(object) = self.host.objects.get(pin, ObjectHandle::from_raw(slot.object.get())) else {
            return self.refused(Outcome::Exit(Reason::BadObject));
        };
        let read_only = slot.is_read_only() || matches!(object.kind(), Kind::Rom { .. });
        let target = if read_only { Target::ReadOnly } else { Target::Writable };
        match triage(target, operation.needs_write(), self.options.read_only_ivac) {
            Triage::Abort => return self.refused(Outcome::Inject(Abort::External)),
            Triage::Write => {
                let store = Fault { cause: Cause::Translation, cache_maintenance: false, ..operation.fault(gpa) };
                match self.touch(pin, hint, &store) {
                    Outcome::Resume => {}
                    // The slot went, or became read-only, since it was found above: what was decided there is decided anew.
                    Outcome::Mmio => return self.retry(),
                    other => return other,
                }
            }
            Triage::Skip | Triage::Read | Triage::Clean => {}
        }
        self.clean_page(pin, &slot, gpa, operation)
    }

    /// The first door's end for DC IVAC on read-only memory, by the owner's choice.
    #[cold]
    pub(crate) fn maintain_read_only(&self, pin: &Pin<'_>, slot: &SlotRef, fault: &Fault) -> Outcome {
        if planted!(ZB3) {
            return Outcome::Resume;
        }
        match triage(Target::ReadOnly, true, self.options.read_only_ivac) {
            Triage::Clean => self.clean_page(pin, slot, fault.gpa, Maintenance::Clean),
            _ => self.refused(Outcome::Inject(Abort::External)),
        }
    }

    /// Carries out `operation` on the page at `gpa`, if it has a frame: one that has none was never in a cache.
    fn clean_page(&self, pin: &Pin<'_>, slot: &SlotRef, gpa: Gpa, operation: Maintenance) -> Outcome {
        let features = self.host.features();
        let nothing_to_do = match operation {
            Maintenance::Instructions => features.coherent_icache,
            // The guest's caches hide nothing from anybody.
            Maintenance::Invalidate | Maintenance::Clean => features.forced_write_back,
            Maintenance::CleanToUnification => false,
        };
        if nothing_to_do {
            return Outcome::Skip;
        }
        let machine = &self.host.machine;
        let frame = slot.object_frame(gpa.frame());
        let object = self.host.objects.get(pin, ObjectHandle::from_raw(slot.object.get()));
        let grant = object.and_then(|object| object.present(&self.host.supply(pin.cpu()), frame));
        if let Some(grant) = grant.filter(|grant| grant.memory == Memory::Normal) {
            let page = PfnRange::single(grant.frame(frame));
            match operation {
                Maintenance::Instructions => machine.invalidate_icache(page),
                _ => machine.clean_invalidate_to_poc(page),
            }
            machine.complete();
        }
        Outcome::Skip
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_the_specification() {
        use ReadOnlyIvac::{Abort, Clean};
        for (target, needs_write, policy, expected) in [
            (Target::Nothing, false, Abort, Triage::Skip),
            (Target::Nothing, true, Abort, Triage::Skip),
            (Target::Writable, false, Abort, Triage::Read),
            (Target::Writable, true, Abort, Triage::Write),
            (Target::ReadOnly, false, Abort, Triage::Read),
            (Target::ReadOnly, true, Abort, Triage::Abort),
            (Target::Nothing, true, Clean, Triage::Skip),
            (Target::Writable, true, Clean, Triage::Write),
            (Target::ReadOnly, false, Clean, Triage::Read),
            (Target::ReadOnly, true, Clean, Triage::Clean),
        ] {
            assert_eq!(triage(target, needs_write, policy), expected, "{target:?} {needs_write} {policy:?}");
        }
    }

    #[test]
    fn both_doors_see_the_same_need() {
        for operation in
            [Maintenance::Invalidate, Maintenance::Clean, Maintenance::CleanToUnification, Maintenance::Instructions]
        {
            let fault = operation.fault(Gpa::new(0x4000_0000));
            assert_eq!(fault.is_write(), operation.needs_write(), "{operation:?}");
            let writable = triage(Target::Writable, fault.is_write(), ReadOnlyIvac::Abort);
            let expected = if operation == Maintenance::Invalidate { Triage::Write } else { Triage::Read };
            assert_eq!(writable, expected);
        }
    }
}
