//! The hypervisor's own mapping, as far as the core changes it: frames that leave it, come back, or are reached for the
//! length of one access.
//!
//! Protocol of leaving: [`crate::Machine::unmap_own`] takes the entry away, `tlb(TlbOp::Own(frames))` starts the
//! invalidation of what other CPUs may still translate, and when `complete()` has returned the frames are absent: no
//! speculation of any CPU reaches them. Coming back needs neither: a translation that was absent is nowhere cached.
//!
//! A frame leaves for the first time inside a naturally aligned block of 512, whose frames nobody uses for anything
//! else while one of them is absent. So no entry is ever changed under an access of another CPU, and a machine needs
//! neither to stop its CPUs nor FEAT_BBM for it. From then on each frame of the block comes and goes by itself.
//!
//! A *window* is a translation that one CPU has alone. Opening and closing it costs no broadcast.
//!
//! Invariants: INV-10.

use core::fmt;

use entresol_addr::{Pfn, PfnRange};

/// Frames that leave the mapping at once at first, and come back at once in the end: 2 MiB.
pub const OWN_BLOCK: u64 = 512;

/// Why frames are still in the hypervisor's own mapping. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemoveError {
    /// The mapping cannot be split there: it never will be possible.
    Unsplittable {
        /// The first frame.
        pfn: Pfn,
    },
    /// Not now: whoever asks again later may succeed.
    TryAgain {
        /// The first frame.
        pfn: Pfn,
    },
}

impl fmt::Display for RemoveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsplittable { pfn } => {
                write!(f, "the hypervisor's mapping of frame {pfn:#x} cannot be split to pages")
            }
            Self::TryAgain { pfn } => write!(f, "frame {pfn:#x} could not leave the hypervisor's mapping for now"),
        }
    }
}

impl core::error::Error for RemoveError {}

/// What is done to one frame through a window.
#[derive(Debug)]
pub enum Work<'a> {
    /// Reads the bytes from byte `at` of the frame on.
    Read {
        /// First byte, below 4096.
        at: u16,
        /// As many as end within the frame.
        to: &'a mut [u8],
    },
    /// Writes bytes from byte `at` of the frame on.
    Write {
        /// First byte, below 4096.
        at: u16,
        /// As many as end within the frame.
        from: &'a [u8],
    },
    /// Fills the frame with zero.
    Zero,
    /// Copies another frame into it, which need not be in the mapping either.
    Copy {
        /// The other.
        from: Pfn,
    },
}

/// Whether `frames` is what the mapping's entries are for: one frame, or a naturally aligned block.
#[inline]
pub const fn is_own_unit(frames: PfnRange) -> bool {
    frames.count() == 1 || frames.count() == OWN_BLOCK && frames.start().get().is_multiple_of(OWN_BLOCK)
}
