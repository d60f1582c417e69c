//! What an object answers to a fault.

use core::fmt;

use entresol_addr::{PageSize, Pfn};

use crate::StoreSlot;

/// How the machine must treat what is behind a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Cacheable memory.
    Normal,
    /// Registers: not cached, not gathered, never executed.
    Device,
}

/// A part of an object and where the machine has it. True while the CPU that got it stays pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// First frame of the block, aligned to `size`.
    pub pfn: Pfn,
    /// The object's frame that `pfn` backs.
    pub extent_start: u64,
    /// Size of the block: contiguous, wholly inside the object, of one state.
    pub size: PageSize,
    /// Whether a guest may write it.
    pub writable: bool,
    /// How to map it.
    pub memory: Memory,
    /// Whether this very call made it, zeroed.
    pub fresh: bool,
}

impl Grant {
    /// The frame behind the object's frame `frame`, which lies in the block.
    #[inline]
    pub const fn frame(&self, frame: u64) -> Pfn {
        self.pfn.offset(frame.wrapping_sub(self.extent_start))
    }

    /// The same grant, of only the block of `size` around the object's frame `frame`. `size` is at most [`Self::size`].
    #[inline]
    pub const fn narrow(self, frame: u64, size: PageSize) -> Self {
        let exact = self.frame(frame);
        let pfn = exact.align_down(size);
        Self { pfn, extent_start: frame.wrapping_sub(exact.since(pfn)), size, ..self }
    }
}

/// Why there is no grant. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantError {
    /// Another CPU is filling this part: run the guest again and look afresh.
    Busy,
    /// No frame for the page, or for a node above it.
    OutOfMemory,
    /// A write to ROM.
    ReadOnly,
    /// A write to what relatives may share, or to the zero page: [`crate::Object::own`] makes a copy.
    Shared,
    /// The object is being forked: unpin, then try again.
    Forking,
    /// No frame has the page, but a place of a store does: fetch it ([`crate::Fetch`]), then try again.
    Stored {
        /// The place.
        slot: StoreSlot,
    },
    /// The frame behind the page is bad: nobody reads or writes the page, until it is taken away and made anew.
    Poisoned,
    /// Past the end of the object.
    Outside {
        /// The frame asked for.
        frame: u64,
        /// Frames of the object.
        frames: u64,
    },
}

impl fmt::Display for GrantError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy => f.write_str("another CPU is filling this part of the object"),
            Self::OutOfMemory => crate::OutOfMemory.fmt(f),
            Self::Shared => f.write_str("write: the page must be copied first"),
            Self::Forking => f.write_str("the object is being forked"),
            Self::Stored { slot } => write!(f, "the page is not in memory, but in place {}", slot.index()),
            Self::ReadOnly => f.write_str("write: the object is read-only"),
            Self::Poisoned => f.write_str("the frame behind the page is bad"),
            Self::Outside { frame, frames } => write!(f, "frame {frame:#x}: the object has {frames:#x} frames"),
        }
    }
}

impl core::error::Error for GrantError {}
