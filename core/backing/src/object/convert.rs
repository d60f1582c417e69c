//! Pages of private objects that the guest shares with the hypervisor, and takes back.
//!
//! Protocol: [`crate::tree`]'s. The caller has removed the translations to the pages, and keeps new ones from being made
//! meanwhile, as for a hole.

use core::fmt;

use entresol_addr::Pfn;
use entresol_machine::Machine;

use super::{Kind, Object};
use crate::{GrantError, OutOfMemory, Supply};

/// Why no page was converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConvertError {
    /// The object is not private memory: all of it is shared with the hypervisor.
    NotPrivate,
    /// Past the end of the object.
    Outside {
        /// First frame.
        start: u64,
        /// Frames.
        count: u64,
        /// Frames of the object.
        frames: u64,
    },
    /// No frame for a node, or for the copy of a page that relatives share.
    OutOfMemory,
    /// The object is being forked: unpin, then try again.
    Forking,
}

impl fmt::Display for ConvertError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPrivate => f.write_str("object: must be private memory"),
            Self::Outside { start, count, frames } => {
                write!(f, "start {start:#x}: with {count:#x} frames it must end within the object's {frames:#x}")
            }
            Self::OutOfMemory => OutOfMemory.fmt(f),
            Self::Forking => GrantError::Forking.fmt(f),
        }
    }
}

impl core::error::Error for ConvertError {}

impl Object {
    /// Whether the page at `frame` is shared with the hypervisor: always, but in private objects.
    pub fn is_open<M: Machine>(&self, machine: &M, frame: u64) -> bool {
        !self.is_private() || self.check_inside(frame).is_ok() && self.tree.is_open(machine, frame)
    }

    /// The pages from `start` on, in parts that are shared with the hypervisor or are not, neighbours of one kind maybe in several:
    /// whether, and the frame behind the part; `None` at the end. What is not private memory is one part.
    pub fn open_part<M: Machine>(&self, machine: &M, start: u64) -> Option<(bool, u64)> {
        let frames = self.frames();
        if start >= frames {
            return None;
        }
        let (open, end) = if self.is_private() { self.tree.open_until(machine, start) } else { (true, frames) };
        Some((open, end.min(frames)))
    }

    /// Makes the pages `start .. start + count` private, or open: shared with the hypervisor, in whose mapping their frames are.
    /// What they hold stays. Returns how many changed. The caller is pinned, has removed the translations to them, and keeps new
    /// ones from being made meanwhile.
    ///
    /// # Errors
    ///
    /// [`ConvertError`]; no page changed.
    pub fn convert<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        start: u64,
        count: u64,
        open: bool,
    ) -> Result<u64, ConvertError> {
        if !self.is_private() {
            return Err(ConvertError::NotPrivate);
        }
        let frames = self.frames();
        let end = start.checked_add(count).filter(|end| *end <= frames);
        let end = end.ok_or(ConvertError::Outside { start, count, frames })?;
        let _structure = self.structure.lock();
        self.tree.convert(supply, start, end, open).map_err(|error| match error {
            GrantError::Forking => ConvertError::Forking,
            GrantError::OutOfMemory => ConvertError::OutOfMemory,
            GrantError::Busy
            | GrantError::Shared
            | GrantError::ReadOnly
            | GrantError::Stored { .. }
            | GrantError::Poisoned
            | GrantError::Outside { .. } => {
                unreachable!("a tree waits for who is busy, private memory is in no store, a bad page is not copied, and the extent was checked")
            }
        })
    }

    /// Calls `visit` with every page of content of an anonymous object: its frame here, and the machine's. The caller is pinned.
    pub(crate) fn visit_content<M: Machine>(&self, machine: &M, visit: &mut impl FnMut(u64, Pfn, bool)) {
        if let Kind::Anonymous(_) = self.kind() {
            self.tree.visit_content(machine, visit);
        }
    }

    /// Whether the frame behind the page at `frame` is in the mapping, or not, as the page's attribute says. The caller is pinned.
    pub(crate) fn is_followed<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> bool {
        let _no_conversion = self.structure.lock();
        self.tree.is_followed(supply, frame)
    }
}
