//! Coalesced MMIO: small writes that nobody has to answer wait in a ring until their owner takes them.
//!
//! Purpose: a device that only listens (a framebuffer's registers, a log) needs no exit to its owner for each store. The
//! ring is the one of the KVM API ("Coalesced MMIO"): one page, two indices and [`ENTRIES`] entries of 24 bytes.
//!
//! Protocol: `last` is where the next write goes, `first` where the oldest is; both move round. Equal means empty, so one
//! entry is always empty and [`CoalescedRing::ROOM`] are usable, from **any** start position (Z-B6: distances that are computed modulo 2^32
//! are no distances modulo 170). A ring that is full refuses: then the store leaves to its owner like any other. Whoever
//! shares a ring locks it.
//!
//! Invariants: both indices are below [`ENTRIES`]; writes come out in the order in which they went in, each once.

use entresol_addr::{Gpa, PAGE_SIZE};
use entresol_sync::planted;

/// Entries of a ring.
const ENTRIES: u32 = 170;
/// A store of a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct CoalescedWrite {
    address: u64,
    length: u32,
    reserved: u32,
    data: [u8; 8],
}

impl CoalescedWrite {
    /// The low `size` bytes (at most 8) of `value`, stored at `gpa` with the lowest first.
    pub const fn new(gpa: Gpa, size: u8, value: u64) -> Self {
        let length = if size > 8 { 8 } else { size };
        Self { address: gpa.get(), length: length as u32, reserved: 0, data: value.to_le_bytes() }
    }

    /// Where it was stored.
    pub const fn gpa(&self) -> Gpa {
        Gpa::new(self.address)
    }

    /// What was stored, in the order of memory: 1, 2, 4 or 8 bytes.
    pub fn data(&self) -> &[u8] {
        &self.data[..self.length as usize]
    }
}

/// The ring is full: the write was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// Writes that wait.
#[derive(Debug)]
#[repr(C)]
pub struct CoalescedRing {
    first: u32,
    last: u32,
    entries: [CoalescedWrite; ENTRIES as usize],
}

const _: () = assert!(size_of::<CoalescedWrite>() == 24);
const _: () = assert!(size_of::<CoalescedRing>() <= PAGE_SIZE as usize);

const fn after(index: u32) -> u32 {
    (index + 1) % ENTRIES
}

impl CoalescedRing {
    /// Writes that a ring holds.
    pub const ROOM: usize = ENTRIES as usize - 1;

    /// Empty.
    pub const fn new() -> Self {
        Self { first: 0, last: 0, entries: [CoalescedWrite::new(Gpa::new(0), 0, 0); ENTRIES as usize] }
    }

    fn is_full(&self) -> bool {
        if planted!(ZB6) {
            return self.first.wrapping_sub(self.last).wrapping_sub(1).is_multiple_of(ENTRIES);
        }
        after(self.last) == self.first
    }

    /// Puts a write behind the others.
    ///
    /// # Errors
    ///
    /// [`Full`]; nothing changed.
    pub fn push(&mut self, write: CoalescedWrite) -> Result<(), Full> {
        if self.is_full() {
            return Err(Full);
        }
        self.entries[self.last as usize] = write;
        self.last = after(self.last);
        Ok(())
    }

    /// Takes the oldest write.
    pub fn pop(&mut self) -> Option<CoalescedWrite> {
        if self.first == self.last {
            return None;
        }
        let write = self.entries[self.first as usize];
        self.first = after(self.first);
        Some(write)
    }

    /// Writes that wait.
    pub const fn len(&self) -> usize {
        ((self.last + ENTRIES - self.first) % ENTRIES) as usize
    }

    /// Whether none waits.
    pub const fn is_empty(&self) -> bool {
        self.first == self.last
    }
}

impl Default for CoalescedRing {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use entresol_sync::zoo::{Bug, plant};
    use proptest::prelude::*;
    use std::collections::VecDeque;

    const ROOM: u32 = CoalescedRing::ROOM as u32;

    fn write(number: u64) -> CoalescedWrite {
        CoalescedWrite::new(Gpa::new(0x0c00_0000 + number * 8), 8, number)
    }

    /// A ring whose next write goes to entry `start`.
    fn started_at(start: u32) -> CoalescedRing {
        let mut ring = CoalescedRing::new();
        for number in 0..u64::from(start) {
            ring.push(write(number)).unwrap();
            ring.pop().unwrap();
        }
        ring
    }

    /// Writes taken until the ring refuses.
    fn room(ring: &mut CoalescedRing) -> u32 {
        (0..2 * ENTRIES).take_while(|number| ring.push(write((*number).into())).is_ok()).count() as u32
    }

    #[test]
    fn every_start_position_has_room_for_169() {
        for start in 0..ENTRIES {
            let mut ring = started_at(start);
            assert_eq!(room(&mut ring), ROOM, "from entry {start}");
            assert_eq!(ring.len(), ROOM as usize);
            assert!((0..u64::from(ROOM)).all(|number| ring.pop() == Some(write(number))) && ring.is_empty());
        }
    }

    /// Z-B6: with the plant, some start positions have less room.
    #[test]
    fn the_plant_is_found() {
        plant(&[Bug::ZB6]);
        let rooms: std::vec::Vec<u32> = (0..ENTRIES).map(|start| room(&mut started_at(start))).collect();
        plant(&[]);
        assert_eq!((rooms[0], rooms[100]), (85, ROOM), "half of the positions hide it: {rooms:?}");
    }

    #[test]
    fn data_is_in_the_order_of_memory() {
        let write = CoalescedWrite::new(Gpa::new(0x0c00_0010), 2, 0xffff_1234);
        assert_eq!((write.gpa(), write.data()), (Gpa::new(0x0c00_0010), &[0x34, 0x12][..]));
    }

    proptest! {
        /// A ring is a queue of 169.
        #[test]
        fn a_ring_is_a_bounded_queue(start in 0..ENTRIES, pushes in prop::collection::vec(any::<bool>(), 0..600)) {
            let (mut ring, mut queue) = (started_at(start), VecDeque::new());
            for (number, push) in (0..).zip(pushes) {
                if push {
                    let fits = queue.len() < ROOM as usize;
                    prop_assert_eq!(ring.push(write(number)).is_ok(), fits);
                    if fits {
                        queue.push_back(write(number));
                    }
                } else {
                    prop_assert_eq!(ring.pop(), queue.pop_front());
                }
                prop_assert_eq!(ring.len(), queue.len());
                prop_assert_eq!(ring.is_empty(), queue.is_empty());
            }
        }
    }
}
