//! Frames behind guest pages, kept from one exit to the next by who reads them again and again.
//!
//! Purpose: an instruction that touches a device is found through the guest's own tables each time it is executed. What stands
//! behind those pages hardly ever changes, and whether it did is a matter of three loads. A page-frame cache
//! (`pfncache`) is for few pieces that are written too, and makes their pages the machine's own; here any page is kept as it is, for one CPU.
//!
//! Protocol: pin; [`Vm::keep`] first; then [`Vm::frame_to_keep`] for each page. In any later pin, while [`Vm::is_kept`] says so, the
//! frames are still those, until the end of that pin.
//!
//! Why: a page of an object that is all its machine's own gets another frame, or loses the one it has, by an announced change
//! only: a write goes where the page is. Whoever announces then waits a grace period before anything changes, so who asked
//! before is unpinned by then; who asks later finds the notifier moved, or not quiet. Slots are the same with their generation. A fork, a merge and
//! swap are announced too, and afterwards the object is not all its machine's own, so that nothing of it is kept. Poison, which needs
//! no notifier for itself, moves it ([`Notifier::told`](crate::Notifier::told)).
//!
//! Invariants: INV-3 as far as reads are concerned. Nothing allocates, no lock is taken.
//!
//! Known hole: memory that relatives or strangers share is not kept, so what a fork's machines do costs them the whole way.

use entresol_addr::{Gpa, Pfn};
use entresol_backing::ObjectHandle;
use entresol_machine::Machine;
use entresol_slot::{Generation, Hint};
use entresol_sync::{Pin, planted};
use entresol_table::Format;

use crate::notifier::Sample;
use crate::vm::Vm;

/// When frames of a virtual machine were looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    sample: Sample,
    generation: Generation,
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// The moment from which on frames are kept: before the first of them is looked up.
    pub fn keep(&self) -> Kept {
        Kept { sample: self.notifier.sample(), generation: self.slots.generation() }
    }

    /// [`Self::frame_behind`], where it can be kept.
    pub fn frame_to_keep(&self, pin: &Pin<'_>, hint: &Hint, gpa: Gpa) -> Option<Pfn> {
        let slot = self.slots.find(pin, gpa.frame(), hint)?;
        let object = self.host.objects.get(pin, ObjectHandle::from_raw(slot.object.get()))?;
        let frame = slot.object_frame(gpa.frame());
        let present = object.is_own().then(|| object.present(&self.host.supply(pin.cpu()), frame))?;
        present.map(|grant| grant.frame(frame))
    }

    /// Whether frames that were looked up since `kept` are still behind their pages, and stay there while the CPU is pinned.
    #[inline]
    pub fn is_kept(&self, _pin: &Pin<'_>, kept: &Kept) -> bool {
        (self.notifier.is_quiet(kept.sample) | planted!(ZX4))
            && self.slots.generation() == kept.generation
            && !kept.generation.in_progress()
    }
}
