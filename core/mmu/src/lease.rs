//! Leases of guest pages: for what the hypervisor uses for long by their addresses.
//!
//! Protocol: the caller is pinned while it asks. A lease keeps the page's frame in the hypervisor's own mapping until it is
//! released, if it is private; it does not keep the page where it is. Whoever keeps one learns by the notifier that the page
//! goes (punched, copied, swapped, its slot deleted), and by then uses the address no more: a lease whose frame was freed is
//! released in vain.
//!
//! A page that is converted keeps its frame: a lease of it goes on, and keeps the frame in the mapping when the page is private again.
//!
//! Invariants: INV-7, INV-10.

use entresol_addr::Gpa;
use entresol_backing::{GrantError, Lease, LeaseError, Memory, ObjectHandle};
use entresol_machine::Machine;
use entresol_slot::Hint;
use entresol_sync::Pin;
use entresol_table::Format;

use crate::CopyError;
use crate::vm::Vm;

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// Leases the page at `gpa`, which is made if nothing backs it yet, and copied if relatives share it: the caller may
    /// write it.
    ///
    /// # Errors
    ///
    /// [`CopyError`]; [`CopyError::OutOfMemory`] also if the frame has as many leases as can be counted.
    pub fn lease(&self, pin: &Pin<'_>, hint: &Hint, gpa: Gpa) -> Result<Lease, CopyError> {
        let outside = CopyError::Outside { gpa };
        let slot = self.slots.find(pin, gpa.frame(), hint).ok_or(outside)?;
        if slot.is_read_only() {
            return Err(CopyError::ReadOnly { gpa });
        }
        let object = self.host.objects.get(pin, ObjectHandle::from_raw(slot.object.get())).ok_or(outside)?;
        if object.may_share() {
            self.own_for_write(pin, &slot, object, gpa)?;
        }
        let (supply, frame) = (self.host.supply(pin.cpu()), slot.object_frame(gpa.frame()));
        let grant = object.grant_waiting(&supply, frame, true).map_err(|error| refused(gpa, error))?;
        if grant.memory == Memory::Device {
            return Err(outside);
        }
        let lease = self.host.pool.lease(&self.host.machine, grant.frame(frame));
        lease.map_err(|LeaseError::TooMany| CopyError::OutOfMemory)
    }

    /// Ends a lease; see [`entresol_backing::FramePool::release_lease`].
    pub fn release_lease(&self, lease: Lease) {
        self.host.pool.release_lease(&self.host.machine, lease);
    }
}

fn refused(gpa: Gpa, error: GrantError) -> CopyError {
    match error {
        GrantError::OutOfMemory => CopyError::OutOfMemory,
        GrantError::ReadOnly => CopyError::ReadOnly { gpa },
        GrantError::Stored { slot } => CopyError::Absent { gpa, slot },
        GrantError::Poisoned => CopyError::Poisoned { gpa },
        GrantError::Outside { .. } => CopyError::Outside { gpa },
        GrantError::Busy | GrantError::Shared | GrantError::Forking => CopyError::Busy,
    }
}
