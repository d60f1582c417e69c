//! Copies between the hypervisor and guest memory, through slots and objects: no entry of the second stage is used or
//! made, and no reference into guest memory exists. Private memory is reached page by page, each in one locked access, and is
//! absent from the hypervisor's mapping before and after (INV-10), or not reached at all by who sees open pages only
//! ([`crate::Vm::convert`]).

use entresol_addr::{Gpa, PAGE_SIZE, Pfn};
use entresol_backing::{AccessError, ObjectHandle, Reach, StoreSlot};
use entresol_machine::Machine;
use entresol_slot::Hint;
use entresol_sync::Pin;
use entresol_table::Format;

use crate::MemoryFault;
use crate::vm::Vm;

/// Why a copy stopped. The bytes before the address may have been copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyError {
    /// No slot there.
    Outside {
        /// The first address that could not be copied.
        gpa: Gpa,
    },
    /// A write to a read-only slot or object.
    ReadOnly {
        /// The first address that could not be written.
        gpa: Gpa,
    },
    /// No frame for a page.
    OutOfMemory,
    /// A page is not in memory: fetch it ([`crate::Vm::absent`]), then make the whole copy again.
    Absent {
        /// The first address that could not be copied.
        gpa: Gpa,
        /// The place of a store that has the page.
        slot: StoreSlot,
    },
    /// The frame behind a page is bad ([`crate::Vm::poison`]).
    Poisoned {
        /// The first address that could not be copied.
        gpa: Gpa,
    },
    /// A page is private, and the access is of somebody who sees only what the guest shares.
    MemoryFault(MemoryFault),
    /// A write to memory that is being forked, or copied for this write while it is invalidated: unpin, then try again.
    Busy,
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// Fills `to` from guest memory at `gpa`.
    ///
    /// # Errors
    ///
    /// [`CopyError`].
    pub fn read(&self, pin: &Pin<'_>, hint: &Hint, gpa: Gpa, to: &mut [u8]) -> Result<(), CopyError> {
        self.read_as(pin, hint, Reach::Everything, gpa, to)
    }

    /// The same for somebody who reaches as far as `reach`.
    ///
    /// # Errors
    ///
    /// [`CopyError`].
    pub fn read_as(&self, pin: &Pin<'_>, hint: &Hint, reach: Reach, gpa: Gpa, to: &mut [u8]) -> Result<(), CopyError> {
        let mut gpa = gpa;
        let mut rest = to;
        while !rest.is_empty() {
            let (part, after) = rest.split_at_mut(in_page(gpa, rest.len()));
            let slot = self.slots.find(pin, gpa.frame(), hint).ok_or(CopyError::Outside { gpa })?;
            let object = self
                .host
                .objects
                .get(pin, ObjectHandle::from_raw(slot.object.get()))
                .ok_or(CopyError::Outside { gpa })?;
            let offset = slot.object_frame(gpa.frame()) * PAGE_SIZE + gpa.page_offset();
            object.read_as(&self.host.supply(pin.cpu()), reach, offset, part).map_err(|error| stopped(gpa, error))?;
            gpa = gpa.checked_add(part.len() as u64).ok_or(CopyError::Outside { gpa })?;
            rest = after;
        }
        Ok(())
    }

    /// The machine's frame behind the page at `gpa`, if something backs it that is not bad. It stays what it is as long as the caller is
    /// pinned.
    pub fn frame_behind(&self, pin: &Pin<'_>, hint: &Hint, gpa: Gpa) -> Option<Pfn> {
        let slot = self.slots.find(pin, gpa.frame(), hint)?;
        let object = self.host.objects.get(pin, ObjectHandle::from_raw(slot.object.get()))?;
        let frame = slot.object_frame(gpa.frame());
        object.present(&self.host.supply(pin.cpu()), frame).map(|grant| grant.frame(frame))
    }

    /// Stores `from` to guest memory at `gpa`. Pages of slots that log become dirty.
    ///
    /// # Errors
    ///
    /// [`CopyError`].
    pub fn write(&self, pin: &Pin<'_>, hint: &Hint, gpa: Gpa, from: &[u8]) -> Result<(), CopyError> {
        self.write_as(pin, hint, Reach::Everything, gpa, from)
    }

    /// The same for somebody who reaches as far as `reach`.
    ///
    /// # Errors
    ///
    /// [`CopyError`].
    pub fn write_as(&self, pin: &Pin<'_>, hint: &Hint, reach: Reach, gpa: Gpa, from: &[u8]) -> Result<(), CopyError> {
        let mut gpa = gpa;
        let mut rest = from;
        while !rest.is_empty() {
            let (part, after) = rest.split_at(in_page(gpa, rest.len()));
            let slot = self.slots.find(pin, gpa.frame(), hint).ok_or(CopyError::Outside { gpa })?;
            if slot.is_read_only() {
                return Err(CopyError::ReadOnly { gpa });
            }
            let object = self
                .host
                .objects
                .get(pin, ObjectHandle::from_raw(slot.object.get()))
                .ok_or(CopyError::Outside { gpa })?;
            if object.may_share() {
                self.own_for_write(pin, &slot, object, gpa)?;
            }
            let offset = slot.object_frame(gpa.frame()) * PAGE_SIZE + gpa.page_offset();
            object.write_as(&self.host.supply(pin.cpu()), reach, offset, part).map_err(|error| stopped(gpa, error))?;
            // After the bytes: see `dirty`.
            if slot.logs_dirty() {
                self.logs.mark(&self.host.machine, pin.cpu(), &slot, gpa.frame());
            }
            self.shadow_written(gpa.frame());
            gpa = gpa.checked_add(part.len() as u64).ok_or(CopyError::Outside { gpa })?;
            rest = after;
        }
        Ok(())
    }
}

/// How many of `len` bytes from `gpa` lie in its page.
fn in_page(gpa: Gpa, len: usize) -> usize {
    len.min((PAGE_SIZE - gpa.page_offset()) as usize)
}

pub(crate) fn stopped(gpa: Gpa, error: AccessError) -> CopyError {
    match error {
        AccessError::OutOfMemory => CopyError::OutOfMemory,
        AccessError::Forking => CopyError::Busy,
        AccessError::Private { .. } => CopyError::MemoryFault(MemoryFault::new(gpa, false)),
        AccessError::ReadOnly => CopyError::ReadOnly { gpa },
        AccessError::Stored { slot, .. } => CopyError::Absent { gpa, slot },
        AccessError::Poisoned { .. } => CopyError::Poisoned { gpa },
        AccessError::Outside { .. } | AccessError::Device => CopyError::Outside { gpa },
    }
}
