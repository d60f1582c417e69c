//! Bytes of an object, for loaders and for devices that act on guest memory.
//!
//! Protocol: an access is checked whole before a byte moves. Reading makes nothing: vacant memory reads as zero.
//! Writing makes every page first, then writes (D8). The guest may run meanwhile; what it sees of a write in progress
//! is what it would see of another CPU's. Private memory is reached frame by frame, each in one locked access (INV-10).

use core::fmt;

use entresol_addr::{Hpa, PAGE_SHIFT, PAGE_SIZE, Pfn};
use entresol_machine::own::Work;
use entresol_machine::{Machine, Tags};

use super::{Kind, Object};
use crate::tree::Look;
use crate::{Grant, GrantError, OutOfMemory, StoreSlot, Supply};

/// Why no bytes moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessError {
    /// Past the end of the object.
    Outside {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes of the object.
        extent: u64,
    },
    /// Registers are not bytes.
    Device,
    /// A write to ROM.
    ReadOnly,
    /// No frame for a page that must be written. Pages made for this write stay; they read as before.
    OutOfMemory,
    /// A write while the object is being forked: unpin, then try again.
    Forking,
    /// A page is private, and the access is of somebody who sees only what the guest shares.
    Private {
        /// The object's frame.
        frame: u64,
    },
    /// The frame behind a page is bad.
    Poisoned {
        /// The object's frame.
        frame: u64,
    },
    /// A page is not in memory: fetch it ([`crate::Fetch`]), then make the whole access again.
    Stored {
        /// The object's frame.
        frame: u64,
        /// The place that has it.
        slot: StoreSlot,
    },
}

impl fmt::Display for AccessError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outside { offset, len, extent } => {
                write!(f, "offset {offset:#x}: with {len:#x} bytes it must end within the object's {extent:#x}")
            }
            Self::Device => f.write_str("object: a device cannot be read or written as bytes"),
            Self::ReadOnly => f.write_str("write: the object is read-only"),
            Self::OutOfMemory => OutOfMemory.fmt(f),
            Self::Forking => GrantError::Forking.fmt(f),
            Self::Private { frame } => write!(f, "frame {frame:#x}: must be shared with the hypervisor"),
            Self::Poisoned { frame } => write!(f, "frame {frame:#x}: {}", GrantError::Poisoned),
            Self::Stored { frame, slot } => write!(f, "frame {frame:#x}: {}", GrantError::Stored { slot: *slot }),
        }
    }
}

impl core::error::Error for AccessError {}

/// How much of an object somebody may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// All of it: the loader, and devices that the owner trusts with private pages for one copy each.
    Everything,
    /// What is not private: of private objects the open pages.
    Open,
}

impl Reach {
    /// Whether the page at `frame` is in reach, at this moment.
    #[inline]
    fn covers<M: Machine>(self, object: &Object, machine: &M, frame: u64) -> bool {
        self == Self::Everything || object.is_open(machine, frame)
    }

    /// Does `work` to the frame behind `frame`, a page of private memory. Whether it is in reach is asked under the frame's lock.
    fn access<M: Machine>(
        self,
        supply: &Supply<'_, M>,
        pfn: Pfn,
        work: Work<'_>,
        frame: u64,
    ) -> Result<(), AccessError> {
        match self {
            Self::Everything => supply.pool.access(supply.machine, pfn, work),
            Self::Open if !supply.pool.access_open(supply.machine, pfn, work) => {
                return Err(AccessError::Private { frame });
            }
            Self::Open => {}
        }
        Ok(())
    }
}

/// A part of an access that lies in one frame.
struct Piece {
    frame: u64,
    /// Byte in the frame.
    within: u64,
    /// Where it lies in the caller's buffer.
    buffer: core::ops::Range<usize>,
}

impl Piece {
    fn address(&self, grant: &Grant) -> Hpa {
        Hpa::new(grant.frame(self.frame).base().get() + self.within)
    }
}

/// The pieces of `len` bytes at `offset`, which do not wrap.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    core::iter::from_fn(move || {
        let at = offset + done as u64;
        let within = at & (PAGE_SIZE - 1);
        let size = (len - done).min((PAGE_SIZE - within) as usize);
        let piece = Piece { frame: at >> PAGE_SHIFT, within, buffer: done..done + size };
        done += size;
        (size != 0).then_some(piece)
    })
}

impl Object {
    /// Reads `to.len()` bytes at byte `offset`. The caller is pinned, on the supply's CPU.
    ///
    /// # Errors
    ///
    /// [`AccessError::Outside`], [`AccessError::Device`], [`AccessError::Stored`], [`AccessError::Poisoned`]: of the last two, the bytes before
    /// that page may have been read.
    pub fn read<M: Machine>(&self, supply: &Supply<'_, M>, offset: u64, to: &mut [u8]) -> Result<(), AccessError> {
        self.read_as(supply, Reach::Everything, offset, to)
    }

    /// The same for somebody who reaches as far as `reach`.
    ///
    /// # Errors
    ///
    /// As [`Self::read`], and [`AccessError::Private`]: the bytes before that page may have been read.
    pub fn read_as<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        reach: Reach,
        offset: u64,
        to: &mut [u8],
    ) -> Result<(), AccessError> {
        self.check_bytes(offset, to.len())?;
        for piece in pieces(offset, to.len()) {
            let bytes = &mut to[piece.buffer.clone()];
            match self.look(supply.machine, piece.frame) {
                Look::Present(grant) if supply.pool.is_poisoned(grant.frame(piece.frame)) => {
                    return Err(AccessError::Poisoned { frame: piece.frame });
                }
                Look::Present(grant) if self.is_private() => {
                    let work = Work::Read { at: piece.within as u16, to: bytes };
                    reach.access(supply, grant.frame(piece.frame), work, piece.frame)?;
                }
                Look::Vacant if !reach.covers(self, supply.machine, piece.frame) => {
                    return Err(AccessError::Private { frame: piece.frame });
                }
                Look::Present(grant) => supply.machine.read(piece.address(&grant), bytes),
                Look::Stored(slot) => return Err(AccessError::Stored { frame: piece.frame, slot }),
                Look::Vacant => bytes.fill(0),
            }
        }
        Ok(())
    }

    /// Writes the bytes of `from` at byte `offset`. The caller is pinned, and where the object is shown to a guest it has
    /// made what it writes the object's own before, with the translations to what was there gone ([`Object::own`]).
    ///
    /// # Errors
    ///
    /// [`AccessError`]; what the object reads as did not change, but by a page that is taken out of memory meanwhile, of which
    /// there is nothing yet, but maybe of those before.
    pub fn write<M: Machine>(&self, supply: &Supply<'_, M>, offset: u64, from: &[u8]) -> Result<(), AccessError> {
        self.write_as(supply, Reach::Everything, offset, from)
    }

    /// The same for somebody who reaches as far as `reach`.
    ///
    /// # Errors
    ///
    /// As [`Self::write`], and [`AccessError::Private`]: nothing was written, but to the pages before one that was made private
    /// meanwhile.
    pub fn write_as<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        reach: Reach,
        offset: u64,
        from: &[u8],
    ) -> Result<(), AccessError> {
        self.check_bytes(offset, from.len())?;
        if let Some(piece) = pieces(offset, from.len()).find(|piece| !reach.covers(self, supply.machine, piece.frame)) {
            return Err(AccessError::Private { frame: piece.frame });
        }
        let granted = |piece: &Piece| {
            self.grant_waiting(supply, piece.frame, true).map_err(|error| AccessError::of(error, piece.frame))
        };
        for piece in pieces(offset, from.len()) {
            granted(&piece)?;
        }
        for piece in pieces(offset, from.len()) {
            let grant = granted(&piece)?;
            let bytes = &from[piece.buffer.clone()];
            if self.is_private() {
                let work = Work::Write { at: piece.within as u16, from: bytes };
                reach.access(supply, grant.frame(piece.frame), work, piece.frame)?;
            } else {
                supply.machine.write(piece.address(&grant), bytes);
            }
        }
        Ok(())
    }

    /// The tags of frame `frame`: zero where nothing is, or nothing that has tags; then it stays so. The caller is pinned.
    ///
    /// # Errors
    ///
    /// As [`Self::read`].
    pub fn tags<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Result<Tags, AccessError> {
        self.check_frame(frame)?;
        match self.look(supply.machine, frame) {
            Look::Present(grant) if supply.pool.is_poisoned(grant.frame(frame)) => Err(AccessError::Poisoned { frame }),
            Look::Present(grant) if self.is_tagged() => Ok(supply.machine.load_tags(grant.frame(frame))),
            Look::Stored(slot) => Err(AccessError::Stored { frame, slot }),
            Look::Present(_) | Look::Vacant => Ok(Tags::ZERO),
        }
    }

    /// Gives frame `frame` these tags: a write as any other, see [`Self::write`]. `false`: it has none, and nothing changed.
    ///
    /// # Errors
    ///
    /// [`AccessError`]; nothing changed.
    pub fn set_tags<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64, tags: &Tags) -> Result<bool, AccessError> {
        self.check_frame(frame)?;
        let grant = self.grant_waiting(supply, frame, true).map_err(|error| AccessError::of(error, frame))?;
        let tagged = self.is_tagged();
        if tagged {
            supply.machine.store_tags(grant.frame(frame), tags);
        }
        Ok(tagged)
    }

    fn check_frame(&self, frame: u64) -> Result<(), AccessError> {
        let extent = self.frames() << PAGE_SHIFT;
        let outside = AccessError::Outside { offset: u64::MAX, len: PAGE_SIZE, extent };
        self.check_bytes(frame.checked_mul(PAGE_SIZE).ok_or(outside)?, PAGE_SIZE as usize)
    }

    fn check_bytes(&self, offset: u64, len: usize) -> Result<(), AccessError> {
        let (len, extent) = (len as u64, self.frames() << PAGE_SHIFT);
        if self.kind() == Kind::Device {
            return Err(AccessError::Device);
        }
        match offset.checked_add(len) {
            Some(end) if end <= extent => Ok(()),
            _ => Err(AccessError::Outside { offset, len, extent }),
        }
    }
}

impl AccessError {
    fn of(error: GrantError, frame: u64) -> Self {
        match error {
            GrantError::Stored { slot } => Self::Stored { frame, slot },
            GrantError::Poisoned => Self::Poisoned { frame },
            GrantError::OutOfMemory => Self::OutOfMemory,
            GrantError::ReadOnly => Self::ReadOnly,
            GrantError::Outside { .. } => unreachable!("the extent was checked"),
            GrantError::Forking => Self::Forking,
            GrantError::Busy | GrantError::Shared => unreachable!("waited for, and copied"),
        }
    }
}
