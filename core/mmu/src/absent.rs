//! Pages that are not in memory: who waits for what.
//!
//! Purpose: a fault, or an access for the guest, that meets such a page ends with the place of the store that has it
//! ([`crate::Reason::Stored`], [`CopyError::Absent`](crate::CopyError::Absent)). What the owner needs beyond that is which object and frame wait, to
//! put the page in when it has come.
//!
//! Protocol of the owner, none of it pinned from one step to the next:
//! 1. [`Vm::absent`] names the page; if another already waits for the same place, wait with it;
//! 2. [`Fetch::new`](entresol_backing::Fetch::new), the store's keeper fills the frame, [`Object::restore`](entresol_backing::Object::restore)
//!    for everybody who waits for the place, [`Fetch::give_back`](entresol_backing::Fetch::give_back);
//! 3. whoever waited makes its access again, also when the reading failed: it then waits anew.
//!
//! No entry changes: nothing showed the page, and its next fault shows it, for reading as long as it is clean. So no
//! invalidation is needed, and a page that has gone or come meanwhile by another way is no special case.

use entresol_addr::Gpa;
use entresol_backing::{ObjectHandle, StoreSlot};
use entresol_machine::Machine;
use entresol_slot::Hint;
use entresol_sync::Pin;
use entresol_table::Format;

use crate::vm::Vm;

/// A page that is not in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Absent {
    /// Whose it is.
    pub object: ObjectHandle,
    /// The object's frame.
    pub frame: u64,
    /// Where it is.
    pub slot: StoreSlot,
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// The page at `gpa`, if it is not in memory but in a store.
    pub fn absent(&self, pin: &Pin<'_>, gpa: Gpa) -> Option<Absent> {
        let slot = self.slots.find(pin, gpa.frame(), &Hint::new())?;
        let object = ObjectHandle::from_raw(slot.object.get());
        let frame = slot.object_frame(gpa.frame());
        let stored = self.host.objects.get(pin, object)?.stored_at(&self.host.machine, frame)?;
        Some(Absent { object, frame, slot: stored })
    }
}
