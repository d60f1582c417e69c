//! Why a slot update was refused: the field, its value, the rule.

use core::fmt;

use entresol_addr::{Gpa, PAGE_SIZE};

use crate::{ObjectId, SlotFlags};

/// The class of a refusal, as the specification and the KVM API tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// `EINVAL`.
    InvalidArgument,
    /// `EEXIST`.
    Exists,
    /// `EFAULT`.
    BadAddress,
    /// `ENOMEM`.
    OutOfMemory,
}

/// A refused update. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotError {
    /// A number of bytes is not a multiple of 4 KiB.
    Unaligned {
        /// The request's field.
        field: &'static str,
        /// Its value, bytes.
        value: u64,
    },
    /// A range does not end within 64 bits.
    Wraps {
        /// The field that it starts at.
        field: &'static str,
        /// Its value, bytes.
        value: u64,
        /// The size, bytes.
        size: u64,
    },
    /// Flags that nobody defined.
    UnknownFlags {
        /// All bits of the request.
        flags: u32,
    },
    /// Bits 15:0 of the number are not below the capacity.
    UnknownSlot {
        /// The slot's number.
        id: u32,
        /// The capacity.
        capacity: u32,
    },
    /// Bits 31:16 of the number name an address space that the machine does not have.
    UnknownAddressSpace {
        /// The address space.
        space: u32,
    },
    /// No such object.
    UnknownObject {
        /// Its name.
        object: ObjectId,
    },
    /// The range ends after the object does.
    OutsideObject {
        /// First byte in the object.
        offset: u64,
        /// Bytes asked for.
        size: u64,
        /// Bytes that the object has.
        extent: u64,
    },
    /// A flag that private objects do not support.
    PrivateObject {
        /// The flags of the request.
        flags: SlotFlags,
    },
    /// A machine that has memory tagging shows only objects that have allocation tags.
    NoTags {
        /// The object.
        object: ObjectId,
    },
    /// Size 0 means delete, and there is nothing to delete.
    Absent {
        /// The slot's number.
        id: u16,
    },
    /// A field that only delete and create can change.
    Immutable {
        /// The field.
        field: &'static str,
        /// What the slot has.
        old: u64,
        /// What the request wants.
        new: u64,
    },
    /// Another slot already has a part of the range.
    Overlaps {
        /// First byte of the request.
        base: Gpa,
        /// Its size, bytes.
        size: u64,
        /// The other slot.
        other: u16,
        /// First byte of the other slot.
        other_base: Gpa,
        /// Its size, bytes.
        other_size: u64,
    },
    /// The range ends after the machine's guest physical address space does.
    BeyondLimit {
        /// One past the last byte of the request.
        end: u64,
        /// One past the last byte of the address space.
        limit: u64,
    },
    /// No frames for the dirty log of the slot.
    NoLog {
        /// Pages that it would have a bit for.
        pages: u64,
    },
}

impl SlotError {
    /// Its class.
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Overlaps { .. } => ErrorKind::Exists,
            Self::BeyondLimit { .. } => ErrorKind::BadAddress,
            Self::NoLog { .. } => ErrorKind::OutOfMemory,
            _ => ErrorKind::InvalidArgument,
        }
    }
}

impl fmt::Display for SlotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unaligned { field, value } => write!(f, "{field} {value:#x}: must be a multiple of {PAGE_SIZE:#x}"),
            Self::Wraps { field, value, size } => {
                write!(f, "{field} {value:#x}: with size {size:#x} it must end within 64 bits")
            }
            Self::UnknownFlags { flags } => {
                write!(f, "flags {flags:#x}: only the bits {:#x} are defined", SlotFlags::all().bits())
            }
            Self::UnknownSlot { id, capacity } => write!(f, "id {id}: must be below {capacity}"),
            Self::UnknownAddressSpace { space } => write!(f, "id: address space {space}: must be 0"),
            Self::UnknownObject { object } => write!(f, "object {:#x}: must name a live object", object.get()),
            Self::OutsideObject { offset, size, extent } => {
                write!(f, "offset {offset:#x}: with size {size:#x} it must end within the object's {extent:#x} bytes")
            }
            Self::PrivateObject { flags } => {
                write!(f, "flags {:#x}: a private object supports neither read-only nor dirty logging", flags.bits())
            }
            Self::NoTags { object } => {
                write!(f, "object {:#x}: a machine with memory tagging shows only memory that has tags", object.get())
            }
            Self::Absent { id } => write!(f, "size 0: slot {id} must exist to be deleted"),
            Self::Immutable { field, old, new } => {
                write!(f, "{field} {new:#x}: must stay {old:#x}; delete the slot and create it again")
            }
            Self::Overlaps { base, size, other, other_base, other_size } => write!(
                f,
                "base {base:#x}: with size {size:#x} it must not overlap slot {other} ({other_size:#x} bytes at {other_base:#x})"
            ),
            Self::BeyondLimit { end, limit } => write!(f, "base: the end {end:#x} must not exceed {limit:#x}"),
            Self::NoLog { pages } => {
                write!(f, "flags dirty-log: a log of {pages} pages must fit into the machine's free frames")
            }
        }
    }
}

impl core::error::Error for SlotError {}
