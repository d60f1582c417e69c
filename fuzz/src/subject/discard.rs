//! The guest gives memory back.

use entresol_addr::{Gfn, Gpa, PAGE_SIZE};
use entresol_mmu::{Busy, Discarded};

use super::{CPU, Subject};
use crate::input::Input;
use crate::reference::Behind;

/// Invalidations that may be in progress at once.
const IN_PROGRESS: usize = 8;

impl Subject<'_> {
    /// Two ranges, anywhere: in slots, beside them, in each other.
    pub(super) fn discard(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let ranges = [self.range(input), self.range(input)];
        let what = format!("discard {ranges:x?}");
        let given = match self.vm.discard(CPU, &ranges) {
            Ok(given) => given,
            Err(Busy) if self.invalidations.len() >= IN_PROGRESS => return Ok(()),
            Err(Busy) => return Err(format!("{what}: nobody else is busy")),
        };
        self.feedback.note(510 + u32::from(given.kept != 0));
        if given.kept != 0 && !self.may_be_out() {
            return Err(format!("{what}: {given:?}, and there is memory"));
        }
        let mut refused = 0;
        for gfn in ranges.into_iter().flat_map(|range| range.start().get()..range.end().get()) {
            refused += u64::from(!self.took(gfn, &given)?);
        }
        if refused != given.refused {
            return Err(format!("{what}: {given:?}, and {refused} pages are not the guest's to give"));
        }
        Ok(())
    }

    /// Whether a page was one to take; then it reads as zero now, unless it was kept.
    fn took(&mut self, gfn: u64, given: &Discarded) -> Result<bool, String> {
        let Some((_, slot)) = self.reference.at(gfn).filter(|(_, slot)| !slot.is_read_only()) else { return Ok(false) };
        if self.reference.object(slot.object).is_none_or(|object| object.behind != Behind::Memory) {
            return Ok(false);
        }
        let mut bytes = [0; 8];
        let read = self.vm.read(&self.host.epoch.pin(CPU), &self.hint, Gpa::new(gfn * PAGE_SIZE), &mut bytes);
        read.map_err(|error| format!("a page that was given back: {error:?}"))?;
        match u64::from_le_bytes(bytes) {
            0 => self.reference.discard(slot.object, slot.behind(gfn)),
            // What it must be, the next comparison says.
            _ if given.kept != 0 => {}
            left => return Err(format!("INV-11: {:#x} was given back, and reads as {left:#x}", Gfn::new(gfn))),
        }
        Ok(true)
    }
}
