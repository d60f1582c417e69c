//! A machine and its fork: each has its own memory from then on, and operations go to one or the other.

use std::collections::BTreeMap;

use entresol_addr::{Gfn, Gpa, PAGE_SIZE};
use entresol_slot::{Hint, SlotFlags};

use super::{CPU, Relative, Subject};
use crate::input::Input;
use crate::reference::{Behind, Reference};

impl Subject<'_> {
    /// Forks the machine, if it has no relative yet.
    pub(super) fn fork(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let (notifier, protect, around) = (input.bit(), input.bit(), input.one_of(&[16, 0, 64]));
        if self.relative.is_some() {
            return Ok(());
        }
        self.finish_all();
        self.vm.switches.force_notifier(notifier);
        self.vm.switches.protect_at_fork(protect);
        self.vm.switches.set_fault_around(around);
        let vm = match self.vm.fork(CPU) {
            Ok(vm) => vm,
            Err(_) if self.may_be_out() => return Ok(()),
            Err(error) => return Err(format!("fork: {error:?}")),
        };
        let numbers: BTreeMap<u16, u32> = {
            let pin = self.host.epoch.pin(CPU);
            vm.slots().iter(&pin).map(|slot| (slot.id, slot.object.get())).collect()
        };
        let reference = self.reference.forked(&numbers).ok_or("the fork has other slots")?;
        self.relative = Some(Relative { vm, hint: Hint::new(), reference });
        Ok(())
    }

    /// From now on operations go to the relative.
    pub(super) fn switch(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        self.finish_all();
        self.vm.reclaim(CPU, input.below(8));
        if let Some(other) = &mut self.relative {
            self.vm.leave(CPU);
            self.vm.put(CPU);
            std::mem::swap(&mut self.vm, &mut other.vm);
            std::mem::swap(&mut self.hint, &mut other.hint);
            std::mem::swap(&mut self.reference, &mut other.reference);
            self.vm.load(CPU);
        }
        Ok(())
    }

    /// Everything that the machine's memory holds (INV-11).
    pub(super) fn compare(&self) -> Result<(), String> {
        let pin = self.host.epoch.pin(CPU);
        for slot in self.reference.slots.values() {
            if self.reference.object(slot.object).is_none_or(|object| object.behind == Behind::Device) {
                continue;
            }
            for gfn in slot.base..slot.base + slot.count {
                let mut bytes = [0; 8];
                let gpa = Gpa::new(Gfn::new(gfn).get() * PAGE_SIZE);
                self.vm.read(&pin, &Hint::new(), gpa, &mut bytes).map_err(|error| format!("{gpa:#x}: {error:?}"))?;
                let (found, expected) = (u64::from_le_bytes(bytes), self.reference.word(slot.object, slot.behind(gfn)));
                if found != expected {
                    return Err(format!("INV-11: at the end {gpa:#x} reads {found:#x}, not {expected:#x}"));
                }
            }
        }
        Ok(())
    }
}

impl Reference {
    /// What the reference says of a fork whose slots show these objects.
    fn forked(&self, numbers: &BTreeMap<u16, u32>) -> Option<Self> {
        if !self.slots.keys().eq(numbers.keys()) {
            return None;
        }
        let renamed: BTreeMap<u32, u32> = self.slots.iter().map(|(id, slot)| (slot.object, numbers[id])).collect();
        let mut child = self.renamed(&renamed);
        // Its owner has asked for no log yet.
        child.slots.values_mut().for_each(|slot| slot.flags &= !SlotFlags::LOG_DIRTY.bits());
        child.dirty.clear();
        Some(child)
    }
}
