//! What the owner does.

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SIZE};
use entresol_backing::ObjectHandle;
use entresol_mmu::CopyError;
use entresol_slot::{ObjectId, SlotRequest};

use super::{CPU, RAM, SLOTS, Subject, WINDOW};
use crate::input::Input;
use crate::reference::Behind;

/// Words of a buffer for the log of the largest slot.
const WORDS: usize = 16;

impl Subject<'_> {
    /// A request of any kind.
    pub(super) fn set_slot(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let object = input.below(5);
        let number = self.reference.objects.get(object as usize).map_or(0xbad, |object| object.number);
        let odd = if input.below(16) == 0 { 1 } else { 0 };
        let request = SlotRequest {
            id: input.one_of(&[0, 1, 2, 3, 0, 1, 2, 3, 4, 1 << 16]),
            base: Gpa::new((RAM + input.one_of(&[0, 1, 8, 16, 64, 512, 512, 1024, 1030])) * PAGE_SIZE + odd),
            size: input.one_of(&[0, 1, 4, 4, 8, 40, 40, 512, 520, 520]) * PAGE_SIZE,
            object: ObjectId::new(number),
            offset: input.one_of(&[0, 0, 0, 1, 8, 512]) * PAGE_SIZE,
            flags: input.one_of(&[0, 0, 0, 1, 1, 2, 3, 4]),
        };
        self.update(&request)
    }

    /// A request about a slot that is there: other flags, another place, its end.
    pub(super) fn change_slot(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let place = input.below(u64::from(SLOTS)) as usize;
        let Some((id, slot)) = self.reference.slots.iter().nth(place).map(|(id, slot)| (*id, *slot)) else {
            return Ok(());
        };
        let same = SlotRequest {
            id: id.into(),
            base: Gpa::new(slot.base * PAGE_SIZE),
            size: slot.count * PAGE_SIZE,
            object: ObjectId::new(slot.object),
            offset: slot.offset * PAGE_SIZE,
            flags: slot.flags,
        };
        let base = Gpa::new((RAM + u64::from(input.byte()) * 8) * PAGE_SIZE);
        let request = match input.below(5) {
            0 => SlotRequest { size: 0, flags: 0, ..same },
            1 => SlotRequest { base, ..same },
            2 => same,
            _ => SlotRequest { flags: slot.flags ^ 1, ..same },
        };
        self.update(&request)
    }

    fn update(&mut self, request: &SlotRequest) -> Result<(), String> {
        // The core waits for invalidations to end: nobody else is there to end them.
        self.finish_all();
        let wanted = self.reference.updated(request, SLOTS);
        match (self.vm.set_slot(CPU, request), wanted) {
            (Ok(()), Some(slots)) => {
                self.feedback.note(500);
                self.reference.accept(slots);
                Ok(())
            }
            (Err(error), None) => {
                self.feedback.note(501 + error.kind() as u32);
                told(&error)
            }
            (Err(_), Some(_)) if self.may_be_out() => Ok(()),
            (core, reference) => Err(format!("{request:?}: {core:?}, and the reference says {}", reference.is_some())),
        }
    }

    /// The owner reads and writes the guest's memory.
    pub(super) fn copy(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let gfn = self.gfn(input);
        let (write, value) = (input.bit(), u64::from(input.byte()) + 1);
        let gpa = Gpa::new(gfn * PAGE_SIZE);
        let found = self.reference.at(gfn);
        let behind = found.and_then(|(_, slot)| self.reference.object(slot.object)).map(|object| object.behind);
        let read_only = found.is_some_and(|(_, slot)| slot.is_read_only()) || behind == Some(Behind::Rom);
        let pin = self.host.epoch.pin(CPU);
        let mut bytes = [0; 8];
        let result = if write {
            self.vm.write(&pin, &self.hint, gpa, &value.to_le_bytes())
        } else {
            self.vm.read(&pin, &self.hint, gpa, &mut bytes)
        };
        drop(pin);
        match result {
            Ok(()) if write && !read_only => self.reference.write(gfn, value),
            Ok(()) if !write => {
                let expected = found.map(|(_, slot)| self.reference.word(slot.object, slot.behind(gfn)));
                if expected != Some(u64::from_le_bytes(bytes)) {
                    return Err(format!("the owner reads {bytes:x?} at {gpa:#x}, not {expected:x?}"));
                }
            }
            Err(CopyError::ReadOnly { gpa: at }) if write && read_only && at == gpa => {}
            Err(CopyError::Outside { gpa: at }) if at == gpa && behind.is_none_or(|kind| kind == Behind::Device) => {}
            Err(CopyError::OutOfMemory) if self.may_be_out() => {}
            other => return Err(format!("copy at {gpa:#x}, write {write}, {behind:?}: {other:?}")),
        }
        Ok(())
    }

    pub(super) fn start(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let range = self.range(input);
        match self.vm.invalidate_range_start(CPU, range) {
            Ok(invalidation) => self.invalidations.push(invalidation),
            Err(_) if self.invalidations.len() >= 8 => {}
            Err(error) => return Err(format!("start of {range:?}: {error:?}")),
        }
        Ok(())
    }

    pub(super) fn finish(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        if !self.invalidations.is_empty() {
            let place = input.below(self.invalidations.len() as u64) as usize;
            self.vm.invalidate_range_end(self.invalidations.swap_remove(place));
        }
        Ok(())
    }

    pub(super) fn finish_all(&mut self) {
        for invalidation in self.invalidations.drain(..) {
            self.vm.invalidate_range_end(invalidation);
        }
    }

    pub(super) fn zap(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let range = self.range(input);
        match self.vm.zap(CPU, range) {
            Err(_) if self.invalidations.len() < 8 => Err(format!("zap of {range:?} is refused")),
            _ => Ok(()),
        }
    }

    pub(super) fn age(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let range = self.range(input);
        let young = self.vm.test_young(CPU, range).map_err(|error| format!("{error:?}"))?;
        let aged = self.vm.clear_young(CPU, range).map_err(|error| format!("{error:?}"))?;
        let still = self.vm.test_young(CPU, range).map_err(|error| format!("{error:?}"))?;
        if young != (aged != 0) || still {
            return Err(format!("{range:?}: young {young}, {aged} entries aged, still young {still}"));
        }
        Ok(())
    }

    /// Takes content away: translations first. Or the guest gives it back.
    pub(super) fn punch(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        if input.bit() {
            return self.discard(input);
        }
        let place = input.below(self.reference.objects.len() as u64) as usize;
        let object = self.reference.objects[place];
        let (start, count) = (input.one_of(&[0, 1, 8, 511]), input.one_of(&[1, 4, 40, 512, 520]));
        self.finish_all();
        let everything = GfnRange::new(Gfn::new(RAM), WINDOW).expect("a range");
        let invalidation =
            self.vm.invalidate_range_start(CPU, everything).map_err(|error| format!("start: {error:?}"))?;
        let result = {
            let pin = self.host.epoch.pin(CPU);
            let handle = ObjectHandle::from_raw(object.number);
            let found = self.host.objects.get(&pin, handle).ok_or("an object is gone")?;
            found.punch(&self.host.supply(CPU), start, count)
        };
        self.vm.invalidate_range_end(invalidation);
        self.host.pool.reap(&self.host.epoch, CPU, 64);
        let fits = object.behind == Behind::Memory && start + count <= object.frames;
        match result {
            Ok(_) if fits => self.reference.punch(object.number, start, count),
            Err(error) if !fits || self.may_be_out() => told(&error)?,
            other => return Err(format!("punch {start}, {count} of {object:?}: {other:?}")),
        }
        Ok(())
    }

    pub(super) fn populate(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let place = input.below(self.reference.objects.len() as u64) as usize;
        let object = self.reference.objects[place];
        let (start, count) = (input.one_of(&[0, 1, 8, 511]), input.one_of(&[1, 4, 40, 512]));
        let pin = self.host.epoch.pin(CPU);
        let found = self.host.objects.get(&pin, ObjectHandle::from_raw(object.number)).ok_or("an object is gone")?;
        match found.populate(&self.host.supply(CPU), start, count) {
            Ok(()) if start + count <= object.frames => Ok(()),
            Err(error) if start + count > object.frames || self.may_be_out() => told(&error),
            other => Err(format!("populate {start}, {count} of {object:?}: {other:?}")),
        }
    }

    /// The log names whatever was written since it was taken (INV-4).
    pub(super) fn get_log(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let (id, keep) = (input.below(5) as u16, input.bit());
        let mut words = [0; WORDS];
        let slot = self.reference.slots.get(&id).copied();
        self.finish_all();
        let result =
            if keep { self.vm.read_dirty_log(CPU, id, &mut words) } else { self.vm.get_dirty_log(CPU, id, &mut words) };
        let logs = slot.is_some_and(|slot| slot.logs());
        let count = match result {
            Ok(count) if logs => count,
            Err(error) if !logs => return told(&error),
            other => return Err(format!("the log of slot {id}, {slot:?}: {other:?}")),
        };
        if count != words.iter().map(|word: &u64| u64::from(word.count_ones())).sum() {
            return Err(format!("the log of slot {id} names another number than {count}"));
        }
        let missing = self.reference.dirty.iter().find(|(of, page)| *of == id && !names(&words, *page));
        if let Some((_, page)) = missing {
            return Err(format!("INV-4: page {page} of slot {id} was written and is not in the log"));
        }
        if !keep {
            self.reference.dirty.retain(|(of, _)| *of != id);
        }
        Ok(())
    }

    pub(super) fn clear_log(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let id = input.below(5) as u16;
        let first = input.one_of(&[0, 0, 64, 512, 3]);
        let pattern = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|_| input.byte()));
        let named = [pattern; WORDS];
        let slot = self.reference.slots.get(&id).copied();
        let pages = slot.map_or(0, |slot| slot.count);
        let count = input.one_of(&[pages.saturating_sub(first), 64, 7]);
        self.finish_all();
        let right = slot.is_some_and(|slot| slot.logs())
            && first.is_multiple_of(64)
            && first + count <= pages
            && (count.is_multiple_of(64) || first + count == pages);
        match self.vm.clear_dirty_log(CPU, id, first, count, &named) {
            Ok(_) if right => {
                let cleared = |page: u64| (first..first + count).contains(&page) && names(&named, page - first);
                self.reference.dirty.retain(|(of, page)| *of != id || !cleared(*page));
                Ok(())
            }
            Err(error) if !right => told(&error),
            other => Err(format!("clear {first}, {count} of slot {id}, {slot:?}: {other:?}")),
        }
    }

    pub(super) fn split_ahead(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let id = input.below(5) as u16;
        let logs = self.reference.slots.get(&id).is_some_and(|slot| slot.logs());
        self.finish_all();
        match self.vm.split_ahead(CPU, id) {
            Ok(_) if logs => Ok(()),
            Err(error) if !logs || self.may_be_out() => told(&error),
            other => Err(format!("split ahead of slot {id}: {other:?}")),
        }
    }

    /// Rings beside the log: what was harvested and reset is written again with a trap.
    pub(super) fn rings(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        self.finish_all();
        match input.below(6) {
            0 => {
                // A second time is a mistake, and told.
                let first = self.vm.dirty_ring(0).is_none();
                match self.vm.enable_dirty_rings(1, 128) {
                    Ok(()) if first => {}
                    Err(error) if !first => told(&error)?,
                    other => return Err(format!("rings, first {first}: {other:?}")),
                }
            }
            1 | 2 => {
                let full = self.vm.dirty_ring(0).is_some_and(|ring| ring.is_full());
                if self.vm.enter(CPU, 0).is_err() != full {
                    return Err(format!("a ring that is full {full} lets the vCPU run {}", !full));
                }
            }
            3 => self.vm.leave(CPU),
            _ => {
                let Some(ring) = self.vm.dirty_ring(0) else { return Ok(()) };
                let mut harvested = Vec::new();
                ring.harvest(|slot, page| harvested.push((slot as u16, page)));
                let freed = self.vm.reset_dirty_rings(CPU);
                if freed != harvested.len() as u64 {
                    return Err(format!("{} entries were harvested and {freed} freed", harvested.len()));
                }
                for entry in &harvested {
                    self.reference.dirty.remove(entry);
                }
            }
        }
        Ok(())
    }
}

/// Whether a log names a page.
fn names(words: &[u64], page: u64) -> bool {
    words.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0)
}

/// A refusal says why.
pub(super) fn told(error: &dyn std::error::Error) -> Result<(), String> {
    if error.to_string().is_empty() { Err(format!("{error:?} says nothing")) } else { Ok(()) }
}
