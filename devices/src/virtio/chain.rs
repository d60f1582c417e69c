//! One buffer of a virtqueue: the segments of its descriptor chain, copied out and checked (virtio 2.7.4, 2.7.5).
//!
//! Purpose: requests are read and written by offset, whatever segments the driver cut them into (virtio 2.7.4.1: a
//! device must not care).
//!
//! Invariants: readable segments come before writable ones. The number of segments is at most [`QUEUE_SIZE_MAX`], for
//! which there is room from the start: nothing allocates. The bytes of both parts together are at most 2³², and no
//! segment wraps the address space.

use alloc::vec::Vec;

use entresol_addr::Gpa;

use super::{Broken, OutOfMemory, QUEUE_SIZE_MAX, Stop};
use crate::bus::{GuestMemory, MemoryError};

/// The most bytes of one chain (virtio 2.7.5).
const BYTES_MAX: u64 = 1 << 32;

/// Contiguous guest memory.
#[derive(Clone, Copy, Debug)]
struct Segment {
    gpa: Gpa,
    len: u32,
}

/// Room for one buffer, used again for the next.
#[derive(Debug)]
pub struct Chain {
    segments: Vec<Segment>,
    /// How many of the segments are readable; they come first.
    readable: usize,
    readable_bytes: u64,
    writable_bytes: u64,
    descriptors: usize,
}

impl Chain {
    /// Room for the longest chain, empty.
    ///
    /// # Errors
    ///
    /// If the heap has none.
    pub fn new() -> Result<Self, OutOfMemory> {
        let mut segments = Vec::new();
        segments.try_reserve_exact(usize::from(QUEUE_SIZE_MAX)).map_err(|_| OutOfMemory)?;
        Ok(Self { segments, readable: 0, readable_bytes: 0, writable_bytes: 0, descriptors: 0 })
    }

    /// Bytes that the driver has written for the device.
    pub fn readable_bytes(&self) -> u64 {
        self.readable_bytes
    }

    /// Bytes of room for the device's answer.
    pub fn writable_bytes(&self) -> u64 {
        self.writable_bytes
    }

    /// Address and bytes of every segment, for requests that are about the memory itself and not about what it holds.
    pub fn segments(&self) -> impl Iterator<Item = (Gpa, u32)> {
        self.segments.iter().map(|segment| (segment.gpa, segment.len))
    }

    /// Descriptors that were read to learn this.
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// Copies the readable part from byte `offset` on.
    ///
    /// # Errors
    ///
    /// [`Broken::Request`] if the part ends before `to` is full; those of the guest's memory.
    pub fn read(&self, memory: &dyn GuestMemory, offset: u64, to: &mut [u8]) -> Result<(), Stop> {
        let part = self.segments.get(..self.readable).unwrap_or_default();
        pieces(part, offset, to.len(), |gpa, range| match to.get_mut(range) {
            Some(piece) => memory.read(gpa, piece),
            None => Ok(()),
        })
    }

    /// Copies to the writable part from byte `offset` on.
    ///
    /// # Errors
    ///
    /// [`Broken::Request`] if the part ends before all of `from` is stored; those of the guest's memory.
    pub fn write(&self, memory: &dyn GuestMemory, offset: u64, from: &[u8]) -> Result<(), Stop> {
        let part = self.segments.get(self.readable..).unwrap_or_default();
        pieces(part, offset, from.len(), |gpa, range| match from.get(range) {
            Some(piece) => memory.write(gpa, piece),
            None => Ok(()),
        })
    }

    /// Makes room for the next chain.
    pub(super) fn clear(&mut self) {
        self.segments.clear();
        self.readable = 0;
        self.readable_bytes = 0;
        self.writable_bytes = 0;
        self.descriptors = 0;
    }

    /// Notes that a descriptor was read.
    pub(super) fn count_descriptor(&mut self) {
        self.descriptors += 1;
    }

    /// Adds the segment of a descriptor. One of no bytes adds nothing.
    pub(super) fn push(&mut self, gpa: Gpa, len: u32, writable: bool) -> Result<(), Broken> {
        if !writable && self.writable_bytes > 0 {
            return Err(Broken::ReadAfterWrite);
        }
        if len == 0 {
            return Ok(());
        }
        let bytes = self.readable_bytes + self.writable_bytes + u64::from(len);
        if bytes > BYTES_MAX || gpa.checked_add(u64::from(len)).is_none() {
            return Err(Broken::ChainBytes);
        }
        if self.segments.len() >= usize::from(QUEUE_SIZE_MAX) {
            return Err(Broken::ChainLength);
        }
        self.segments.push(Segment { gpa, len });
        if writable {
            self.writable_bytes += u64::from(len);
        } else {
            self.readable_bytes += u64::from(len);
            self.readable += 1;
        }
        Ok(())
    }
}

/// Cuts the bytes `offset .. offset + len` of a part at the ends of its segments: `copy` gets each piece's address and
/// its range of the host's buffer.
fn pieces(
    part: &[Segment],
    offset: u64,
    len: usize,
    mut copy: impl FnMut(Gpa, core::ops::Range<usize>) -> Result<(), MemoryError>,
) -> Result<(), Stop> {
    let mut skip = offset;
    let mut done = 0;
    for segment in part {
        if done == len {
            break;
        }
        let bytes = u64::from(segment.len);
        if skip >= bytes {
            skip -= bytes;
            continue;
        }
        let room = usize::try_from(bytes - skip).unwrap_or(usize::MAX);
        let piece = room.min(len - done);
        // `push` has seen that the segment does not wrap, and `skip` is inside it.
        copy(Gpa::new(segment.gpa.get() + skip), done..done + piece)?;
        done += piece;
        skip = 0;
    }
    if done == len { Ok(()) } else { Err(Broken::Request.into()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rules_of_the_format() {
        let mut chain = Chain::new().unwrap();
        chain.push(Gpa::new(0), 8, true).unwrap();
        assert_eq!(chain.push(Gpa::new(0), 8, false), Err(Broken::ReadAfterWrite));
        assert_eq!(chain.push(Gpa::new(u64::MAX - 3), 8, true), Err(Broken::ChainBytes));
        assert_eq!(chain.push(Gpa::new(0), u32::MAX, true), Err(Broken::ChainBytes));
        for _ in 1..QUEUE_SIZE_MAX {
            chain.push(Gpa::new(0), 1, true).unwrap();
        }
        let room = chain.segments.capacity();
        assert_eq!(chain.push(Gpa::new(0), 1, true), Err(Broken::ChainLength));
        assert_eq!(chain.segments.capacity(), room);
        chain.clear();
        chain.push(Gpa::new(0), 8, false).unwrap();
        assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (8, 0));
    }

    proptest! {
        #[test]
        fn pieces_are_the_bytes_asked_for(
            lens in prop::collection::vec(1u32..20, 0..12),
            offset in 0u64..120,
            len in 0usize..120,
        ) {
            // Segment n lies at 1000 × n: the address of each byte of the part.
            let part: Vec<_> =
                lens.iter().enumerate().map(|(n, len)| Segment { gpa: Gpa::new(1000 * n as u64), len: *len }).collect();
            let bytes: Vec<u64> =
                part.iter().flat_map(|s| (0..u64::from(s.len)).map(|n| s.gpa.get() + n)).collect();
            let mut seen = Vec::new();
            let result = pieces(&part, offset, len, |gpa, range| {
                assert_eq!(range.start, seen.len());
                seen.extend((0..range.len() as u64).map(|n| gpa.get() + n));
                Ok(())
            });
            let expected: Vec<u64> = bytes.iter().skip(offset as usize).take(len).copied().collect();
            prop_assert_eq!(result.is_ok(), expected.len() == len);
            prop_assert_eq!(seen, expected);
        }
    }
}
