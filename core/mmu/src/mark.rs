//! A mark: the memory of a virtual machine as it was at one moment, to find out later what was written since.
//!
//! Purpose: the third way to know what was written, beside log and ring: without write protection, and without a bit that
//! somebody must fetch in time. A mark may be kept as long as its owner likes, and asked again and again.
//!
//! Protocol: [`Vm::mark`] is steps 1 to 5 of a fork (see `fork`) with nobody to show the copies to: each anonymous object of
//! the machine gets a relative that reads as it does at that moment and never changes. It takes the time of a fork,
//! whatever the memory's size. [`Vm::written_since`] walks what the two do not share any more. Frames that are written
//! after a mark are kept twice, until [`Mark::give_back`].
//!
//! A frame counts as written if the object has another frame there: also where what was written is what was there, and
//! with blocks also the neighbours that came with a page that was not there before.
//!
//! Invariants: INV-7: a mark's objects are given back, or it is lost with them.

use alloc::vec::Vec;

use entresol_backing::{Differences, ObjectHandle};
use entresol_machine::Machine;
use entresol_slot::Slot;
use entresol_sync::Pin;
use entresol_table::Format;

use crate::fork::{Pair, with_room};
use crate::{ForkError, Host, Vm};

/// The memory of a virtual machine at one moment.
#[must_use = "its objects are lost if it is dropped: give it back"]
#[derive(Debug)]
pub struct Mark {
    /// The machine's objects and what they were.
    pairs: Vec<Pair>,
}

impl Mark {
    /// What object `handle` was, if it is memory that was the machine's at the mark.
    pub fn object(&self, handle: ObjectHandle) -> Option<ObjectHandle> {
        self.pairs.iter().find(|pair| pair.parent == handle).map(|pair| pair.child)
    }

    /// Ends it. Not called by a pinned CPU; `cpu` is the one that the caller runs on.
    pub fn give_back<M: Machine>(self, host: &Host<M>, cpu: usize) {
        for pair in self.pairs {
            host.objects.destroy(&host.supply(cpu), &host.epoch, pair.child).expect("nobody else knows it");
        }
    }
}

impl<'h, M: Machine, F: Format> Vm<'h, M, F> {
    /// Marks this moment. vCPUs may run meanwhile. Not called by a pinned CPU; `cpu` is the one that the caller runs on.
    ///
    /// # Errors
    ///
    /// [`ForkError`]; nothing changed.
    pub fn mark(&self, cpu: usize) -> Result<Mark, ForkError> {
        let _forking = self.forking.lock();
        let slots = self.list_slots(cpu)?;
        let mut mark = Mark { pairs: with_room(slots.len())? };
        let mut made = Ok(());
        for slot in &slots {
            let object = ObjectHandle::from_raw(slot.object.get());
            made = made.and_then(|()| self.child_object(cpu, &slots, &mut mark.pairs, object).map(drop));
        }
        match made.and_then(|()| self.share_memory(cpu, &mark.pairs)) {
            Ok(()) => Ok(mark),
            Err(error) => {
                mark.give_back(self.host, cpu);
                Err(error)
            }
        }
    }

    /// The parts of the memory behind `slot`, as first frame *of its object* and number of frames, from frame `from` of the
    /// object on, that were written since `mark`. `None` if the slot's object is no memory, or was not there yet.
    pub fn written_since<'a>(
        &'a self,
        pin: &'a Pin<'_>,
        mark: &Mark,
        slot: &Slot,
        from: u64,
    ) -> Option<Differences<'a, M>> {
        let handle = ObjectHandle::from_raw(slot.object.get());
        let now = self.host.objects.get(pin, handle)?;
        let then = self.host.objects.get(pin, mark.object(handle)?)?;
        now.differences(&self.host.supply(pin.cpu()), then, from).ok()
    }
}
