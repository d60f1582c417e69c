//! Allocation tags of guest memory, read and written from outside: for debuggers, and for whoever moves a machine.
//!
//! Protocol: one page at a time, so that who copies many knows how far it came. Reading changes nothing: where nothing was touched, or what is there
//! has no tags, they are zero. Writing is a write: what relatives share becomes the machine's own first, a page that came from a
//! store lets go of its place, and logs name the page.
//!
//! Invariants: INV-4, INV-12. Lock order: as [`crate::Vm::write`].

use core::fmt;

use entresol_addr::{Gpa, PAGE_SIZE};
use entresol_backing::ObjectHandle;
use entresol_machine::{Machine, Tags};
use entresol_slot::Hint;
use entresol_sync::Pin;
use entresol_table::Format;

use crate::CopyError;
use crate::guest::stopped;
use crate::vm::Vm;

/// Why the tags of a page were neither read nor written. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagError {
    /// Its guest has no tags.
    Untagged,
    /// Not the first byte of a page.
    Unaligned {
        /// The address.
        gpa: Gpa,
    },
    /// No memory is there, or none that may be written; or it is not in memory: fetch it, then try again.
    Copy(CopyError),
}

impl fmt::Display for TagError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Untagged => f.write_str("memory tagging: the virtual machine must have it (mte = true)"),
            Self::Unaligned { gpa } => write!(f, "gpa {gpa:#x}: must be a multiple of {PAGE_SIZE:#x}"),
            Self::Copy(CopyError::Outside { gpa }) => write!(f, "gpa {gpa:#x}: must be memory"),
            Self::Copy(CopyError::ReadOnly { gpa }) => write!(f, "gpa {gpa:#x}: must be memory that may be written"),
            Self::Copy(CopyError::OutOfMemory) => entresol_backing::OutOfMemory.fmt(f),
            Self::Copy(CopyError::Absent { gpa, .. }) => write!(f, "gpa {gpa:#x}: the page is not in memory"),
            Self::Copy(CopyError::Poisoned { gpa }) => write!(f, "gpa {gpa:#x}: must not be poisoned"),
            Self::Copy(CopyError::MemoryFault(_)) => f.write_str("the page is private"),
            Self::Copy(CopyError::Busy) => f.write_str("the memory is being forked"),
        }
    }
}

impl core::error::Error for TagError {}

impl From<CopyError> for TagError {
    fn from(error: CopyError) -> Self {
        Self::Copy(error)
    }
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// The tags of the page at `gpa`.
    ///
    /// # Errors
    ///
    /// [`TagError`].
    pub fn read_tags(&self, pin: &Pin<'_>, hint: &Hint, gpa: Gpa) -> Result<Tags, TagError> {
        self.check_tags(gpa)?;
        let outside = CopyError::Outside { gpa };
        let slot = self.slots.find(pin, gpa.frame(), hint).ok_or(outside)?;
        let object = self.host.objects.get(pin, ObjectHandle::from_raw(slot.object.get())).ok_or(outside)?;
        let tags = object.tags(&self.host.supply(pin.cpu()), slot.object_frame(gpa.frame()));
        Ok(tags.map_err(|error| stopped(gpa, error))?)
    }

    /// Gives the page at `gpa` these tags.
    ///
    /// # Errors
    ///
    /// [`TagError`].
    pub fn write_tags(&self, pin: &Pin<'_>, hint: &Hint, gpa: Gpa, tags: &Tags) -> Result<(), TagError> {
        self.check_tags(gpa)?;
        let outside = CopyError::Outside { gpa };
        let slot = self.slots.find(pin, gpa.frame(), hint).ok_or(outside)?;
        if slot.is_read_only() {
            return Err(CopyError::ReadOnly { gpa }.into());
        }
        let object = self.host.objects.get(pin, ObjectHandle::from_raw(slot.object.get())).ok_or(outside)?;
        if object.may_share() {
            self.own_for_write(pin, &slot, object, gpa)?;
        }
        let supply = self.host.supply(pin.cpu());
        let written = object.set_tags(&supply, slot.object_frame(gpa.frame()), tags);
        if !written.map_err(|error| stopped(gpa, error))? {
            return Err(outside.into());
        }
        // After the tags: see `dirty`.
        if slot.logs_dirty() {
            self.logs.mark(&self.host.machine, pin.cpu(), &slot, gpa.frame());
        }
        Ok(())
    }

    fn check_tags(&self, gpa: Gpa) -> Result<(), TagError> {
        if !self.options.tags {
            return Err(TagError::Untagged);
        }
        if gpa.page_offset() == 0 { Ok(()) } else { Err(TagError::Unaligned { gpa }) }
    }
}
