//! Saying that the frame behind a page is bad.
//!
//! Protocol: [`Object::poison`] marks it, for all objects that have it; a grace period, after which nobody has a grant of it; every translation to
//! it goes, on every machine; another grace period, for who uses it by what it asked before; [`crate::FramePool::seal`]. From the
//! first step on a grant of such a page is [`GrantError::Poisoned`](crate::GrantError::Poisoned), and an access [`AccessError::Poisoned`](crate::AccessError::Poisoned). The page is bad until it is
//! punched, and is vacant then; its frame is bad for ever.

use core::fmt;

use entresol_addr::Pfn;
use entresol_machine::Machine;

use super::{Kind, Object};
use crate::{OutOfMemory, Supply};

/// Why no frame became bad. Nothing changed, but that a block may be split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoisonError {
    /// Only frames of anonymous memory can be given up.
    Kind {
        /// What it is.
        kind: Kind,
    },
    /// Past the end of the object.
    Outside {
        /// The frame asked for.
        frame: u64,
        /// Frames of the object.
        frames: u64,
    },
    /// No frame is behind the page: it was never touched.
    Untouched,
    /// No frame is behind the page: a store has it.
    Stored,
    /// The frame is bad already.
    Already,
    /// No frame for the node that the block around it is split into.
    OutOfMemory,
}

impl fmt::Display for PoisonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kind { .. } => f.write_str("must be anonymous memory, not of a device or read-only"),
            Self::Outside { frame, frames } => write!(f, "frame {frame:#x}: the object has {frames:#x} frames"),
            Self::Untouched => f.write_str("must be memory that was touched"),
            Self::Stored => f.write_str("must be in memory, not in a store"),
            Self::Already => f.write_str("must not be poisoned already"),
            Self::OutOfMemory => OutOfMemory.fmt(f),
        }
    }
}

impl core::error::Error for PoisonError {}

impl Object {
    /// The frame behind frame `frame` is bad from now on, for whoever refers to it: returns which one it is. The caller is pinned.
    ///
    /// # Errors
    ///
    /// [`PoisonError`].
    pub fn poison<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Result<Pfn, PoisonError> {
        let Kind::Anonymous(_) = self.kind() else { return Err(PoisonError::Kind { kind: self.kind() }) };
        let frames = self.frames();
        if frame >= frames {
            return Err(PoisonError::Outside { frame, frames });
        }
        let _structure = self.structure.lock();
        self.tree.poison(supply, frame)
    }
}
