//! Why objects could not be made, changed or destroyed: the field, its value, the rule.

use core::fmt;

use entresol_addr::Pfn;

use super::{Kind, MAX_OBJECTS, ObjectHandle};
use crate::{AddError, GrantError, OutOfHeap, OutOfMemory};

/// Why there is no table of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableError {
    /// The capacity is 0, or above [`MAX_OBJECTS`].
    Capacity {
        /// What was asked for.
        value: usize,
    },
    /// The heap has no room.
    OutOfHeap,
}

/// Why an object was not made. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateError {
    /// An extent of 0, or more than the kind can have.
    Frames {
        /// What was asked for.
        value: u64,
        /// The most.
        limit: u64,
    },
    /// Frames that the machine's physical addresses do not reach.
    BeyondMachine {
        /// The first frame.
        first: Pfn,
        /// How many.
        frames: u64,
        /// One past the machine's last frame number.
        limit: u64,
    },
    /// Private memory on a machine whose own mapping cannot be split to pages.
    Unsplittable,
    /// A device or ROM that has a frame of the pool.
    PoolFrame {
        /// The frame.
        pfn: Pfn,
    },
    /// An owned ROM that the pool could not take over.
    NotOwnable(AddError),
    /// Every place of the table is taken.
    TableFull {
        /// The places.
        capacity: usize,
    },
    /// No frame for the root.
    OutOfMemory,
}

/// Why an object was not destroyed, held or released. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestroyError {
    /// The handle names no live object.
    Unknown {
        /// The handle.
        handle: ObjectHandle,
    },
    /// Something still refers to it.
    Held {
        /// How often.
        holds: u32,
    },
}

/// How far populating came, and what stopped it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PopulateError {
    /// Frames from the start that are present now.
    pub done: u64,
    /// What stopped it.
    pub error: GrantError,
}

/// Why nothing was punched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PunchError {
    /// Only anonymous memory can be vacant.
    Kind {
        /// What it is.
        kind: Kind,
    },
    /// Past the end of the object.
    Outside {
        /// First frame.
        start: u64,
        /// Frames.
        count: u64,
        /// Frames of the object.
        frames: u64,
    },
    /// No frame for the node that a block must be split into, or for the copy of a shared one.
    OutOfMemory,
    /// The object is being forked: unpin, then try again.
    Forking,
}

impl From<OutOfMemory> for CreateError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

impl From<OutOfHeap> for TableError {
    fn from(_: OutOfHeap) -> Self {
        Self::OutOfHeap
    }
}

impl fmt::Display for TableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capacity { value } => write!(f, "objects {value}: must be 1 to {MAX_OBJECTS}"),
            Self::OutOfHeap => OutOfHeap.fmt(f),
        }
    }
}

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frames { value, limit } => write!(f, "frames {value:#x}: must be 1 to {limit:#x}"),
            Self::BeyondMachine { first, frames, limit } => {
                write!(f, "first {first:#x}: with {frames:#x} frames it must end by frame {limit:#x} of the machine")
            }
            Self::Unsplittable => {
                f.write_str("private: the hypervisor's own mapping must be one that can be split to pages")
            }
            Self::PoolFrame { pfn } => write!(f, "first: frame {pfn:#x} must not be the frame pool's"),
            Self::NotOwnable(error) => write!(f, "owned: {error}"),
            Self::TableFull { capacity } => write!(f, "objects: there must be at most {capacity}"),
            Self::OutOfMemory => OutOfMemory.fmt(f),
        }
    }
}

impl fmt::Display for DestroyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { handle } => write!(f, "object {:#x}: must name a live object", handle.raw()),
            Self::Held { holds } => write!(f, "object: {holds} slots or others must let go of it first"),
        }
    }
}

impl fmt::Display for PopulateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "after {:#x} frames: {}", self.done, self.error)
    }
}

impl fmt::Display for PunchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kind { kind } => write!(f, "object {kind:?}: must be anonymous memory"),
            Self::Outside { start, count, frames } => {
                write!(f, "start {start:#x}: with {count:#x} frames it must end within the object's {frames:#x}")
            }
            Self::OutOfMemory => OutOfMemory.fmt(f),
            Self::Forking => GrantError::Forking.fmt(f),
        }
    }
}

impl core::error::Error for TableError {}
impl core::error::Error for CreateError {}
impl core::error::Error for DestroyError {}
impl core::error::Error for PopulateError {}
impl core::error::Error for PunchError {}
