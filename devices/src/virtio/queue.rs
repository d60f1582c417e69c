//! A split virtqueue, the device's side (virtio 2.7).
//!
//! Purpose: finds the buffer that the driver has made available next, and gives it back used.
//!
//! Protocol: [`Queue::peek`] reads the next buffer without taking it; the device works on it, as often and in as many
//! parts as it needs; [`Queue::complete`] gives it back and moves on. A failure in between leaves the buffer next, so
//! everything can be tried again.
//!
//! Order of accesses: the index before the ring entry, the entry and the descriptors before their use (load-acquire of
//! the driver's index); the used element before the used index (store-release); the used index before the driver's
//! wish for interrupts (full barrier: virtio 2.7.7.2).
//!
//! The three areas are reached as the queue's [rings](Ring), so that the memory may remember where they lie; indirect tables and
//! what descriptors name lie elsewhere each time.
//!
//! Invariants: a queue is ready only with a size that is a power of two up to [`QUEUE_SIZE_MAX`] and areas that are
//! aligned and do not wrap. Reading a chain ends after as many descriptors as its tables have, and at most twice
//! [`QUEUE_SIZE_MAX`].
//!
//! Lock order: part of the device's state, under its lock.

use entresol_addr::Gpa;
use entresol_sync::atomic::{Ordering, fence};
use serde::{Deserialize, Serialize};
use virtio::le16;
use virtio::virtq::{AvailF, DescF};

use super::chain::Chain;
use super::{Broken, QUEUE_SIZE_MAX, Stop};
use crate::bus::{Area, GuestMemory, MemoryError, Ring};
use crate::saved::BadState;

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;

/// The descriptor that a buffer starts with: how the driver knows it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head(u16);

/// A split virtqueue.
#[derive(Clone, Debug)]
pub struct Queue {
    /// Which of its device's it is.
    number: usize,
    /// QueueNum, as written.
    size: u32,
    /// Addresses of the areas, as written.
    areas: [u64; 3],
    ready: bool,
    /// The driver may use indirect descriptors.
    indirect: bool,
    next_available: u16,
    next_used: u16,
    /// A buffer was given back since this was last asked.
    used: bool,
    /// How far the request at the head of the queue has come, in the device's own measure; zero for a new one.
    pub progress: u64,
}

/// A queue, outside of its device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedQueue {
    size: u32,
    areas: [u64; 3],
    ready: bool,
    next_available: u16,
    next_used: u16,
    used: bool,
    progress: u64,
}

/// A descriptor as read.
struct Descriptor {
    gpa: Gpa,
    len: u32,
    flags: DescF,
    next: u16,
}

impl Descriptor {
    /// From its bytes (virtio 2.7.5).
    fn decode(bytes: [u8; DESCRIPTOR as usize]) -> Self {
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        Self {
            gpa: Gpa::new(u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7])),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: DescF::from_bits_retain(le16::from_le_bytes([f0, f1])),
            next: u16::from_le_bytes([n0, n1]),
        }
    }
}

impl Queue {
    /// Queue `number` of its device, which does not work.
    pub(super) fn new(number: usize) -> Self {
        Self {
            number,
            size: 0,
            areas: [0; 3],
            ready: false,
            indirect: false,
            next_available: 0,
            next_used: 0,
            used: false,
            progress: 0,
        }
    }

    /// Reads the next available buffer into `chain`; `None` if there is none. The buffer stays next until
    /// [`Self::complete`].
    ///
    /// # Errors
    ///
    /// [`Stop`] if the rings or the chain break the format or cannot be read.
    pub fn peek(&mut self, memory: &dyn GuestMemory, chain: &mut Chain) -> Result<Option<Head>, Stop> {
        chain.clear();
        let index = self.read_u16(memory, 2)?;
        let ahead = index.wrapping_sub(self.next_available);
        if ahead == 0 {
            return Ok(None);
        }
        if u32::from(ahead) > self.size {
            return Err(Broken::AvailableIndex { index }.into());
        }
        fence(Ordering::Acquire);
        let head = self.read_u16(memory, 4 + 2 * self.slot(self.next_available))?;
        self.walk(memory, head, chain)?;
        Ok(Some(Head(head)))
    }

    /// Gives back the buffer that [`Self::peek`] found, with `written` bytes of answer in it.
    ///
    /// # Errors
    ///
    /// [`Stop`] if the used ring cannot be written; the buffer is then still the next.
    pub fn complete(&mut self, memory: &dyn GuestMemory, head: Head, written: u32) -> Result<(), Stop> {
        let [i0, i1, i2, i3] = u32::from(head.0).to_le_bytes();
        let [l0, l1, l2, l3] = written.to_le_bytes();
        let (ring, element) = (self.ring(Area::Device), self.at(Area::Device, 4 + 8 * self.slot(self.next_used)));
        memory.write_ring(ring, element, &[i0, i1, i2, i3, l0, l1, l2, l3])?;
        fence(Ordering::Release);
        let index = self.next_used.wrapping_add(1);
        memory.write_ring(ring, self.at(Area::Device, 2), &index.to_le_bytes())?;
        self.next_used = index;
        self.next_available = self.next_available.wrapping_add(1);
        self.progress = 0;
        self.used = true;
        Ok(())
    }

    /// It, outside of its device.
    pub(super) fn save(&self) -> SavedQueue {
        let Self { size, areas, ready, next_available, next_used, used, progress, .. } = *self;
        SavedQueue { size, areas, ready, next_available, next_used, used, progress }
    }

    /// Queue `number` of its device, which was saved.
    ///
    /// # Errors
    ///
    /// [`BadState`]: it was ready with a size or an area that no queue may have.
    pub(super) fn load(number: usize, saved: &SavedQueue, indirect: bool) -> Result<Self, BadState> {
        let mut queue = Self { size: saved.size, areas: saved.areas, ..Self::new(number) };
        if saved.ready {
            let rule = "must have a size and areas that a queue may have";
            queue.enable(indirect).map_err(|_| BadState { field: "virtio.queues", rule })?;
            queue.next_available = saved.next_available;
            queue.next_used = saved.next_used;
            queue.used = saved.used;
            queue.progress = saved.progress;
        }
        Ok(queue)
    }

    /// Whether the queue works.
    pub(super) fn is_ready(&self) -> bool {
        self.ready
    }

    /// Whether buffers were given back since this was last asked.
    pub(super) fn take_used(&mut self) -> bool {
        core::mem::take(&mut self.used)
    }

    /// Whether the driver wants an interrupt for used buffers (virtio 2.7.7).
    pub(super) fn wants_interrupt(&self, memory: &dyn GuestMemory) -> Result<bool, Stop> {
        fence(Ordering::SeqCst);
        let flags = self.read_u16(memory, 0)?;
        Ok(!AvailF::from_bits_retain(le16::from_ne(flags)).contains(AvailF::NO_INTERRUPT))
    }

    /// QueueNum. A working queue keeps its size.
    pub(super) fn set_size(&mut self, size: u32) {
        if !self.ready {
            self.size = size;
        }
    }

    /// One half of an area's address. A working queue keeps its areas.
    pub(super) fn set_area(&mut self, area: Area, high: bool, half: u32) {
        if self.ready {
            return;
        }
        let address = &mut self.areas[area as usize];
        *address = if high {
            (*address & 0xffff_ffff) | u64::from(half) << 32
        } else {
            (*address & !0xffff_ffff) | u64::from(half)
        };
    }

    /// Makes the queue work from its first entries on.
    ///
    /// # Errors
    ///
    /// [`Broken::QueueSize`], [`Broken::QueueArea`]; the queue then does not work.
    pub(super) fn enable(&mut self, indirect: bool) -> Result<(), Broken> {
        if !self.size.is_power_of_two() || self.size > QUEUE_SIZE_MAX.into() {
            return Err(Broken::QueueSize { size: self.size });
        }
        let size = u64::from(self.size);
        let areas = [
            (Area::Descriptors, DESCRIPTOR, DESCRIPTOR * size),
            (Area::Driver, 2, 6 + 2 * size),
            (Area::Device, 4, 6 + 8 * size),
        ];
        for (area, alignment, bytes) in areas {
            let address = self.areas[area as usize];
            if !address.is_multiple_of(alignment) || address.checked_add(bytes).is_none() {
                return Err(Broken::QueueArea { gpa: Gpa::new(address) });
            }
        }
        *self = Self { size: self.size, areas: self.areas, ready: true, indirect, ..Self::new(self.number) };
        Ok(())
    }

    /// Stops the queue and forgets it.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.number);
    }

    /// Reads the chain that starts at descriptor `head`.
    fn walk(&self, memory: &dyn GuestMemory, head: u16, chain: &mut Chain) -> Result<(), Stop> {
        let mut table = Gpa::new(self.areas[Area::Descriptors as usize]);
        let mut entries = self.size;
        // A chain that reads more descriptors than its table has runs in a circle.
        let mut left = entries;
        let mut inside_indirect = false;
        let mut index = head;
        loop {
            if u32::from(index) >= entries {
                return Err(Broken::DescriptorIndex { index }.into());
            }
            if left == 0 {
                return Err(Broken::ChainLength.into());
            }
            left -= 1;
            chain.count_descriptor();
            let mut bytes = [0; DESCRIPTOR as usize];
            let gpa = offset(table, DESCRIPTOR * u64::from(index));
            if inside_indirect {
                memory.read(gpa, &mut bytes)?;
            } else {
                memory.read_ring(self.ring(Area::Descriptors), gpa, &mut bytes)?;
            }
            let descriptor = Descriptor::decode(bytes);
            let has_next = descriptor.flags.contains(DescF::NEXT);
            if descriptor.flags.contains(DescF::INDIRECT) {
                let whole = descriptor.len != 0 && descriptor.len.is_multiple_of(DESCRIPTOR as u32);
                if inside_indirect || has_next || !self.indirect || !whole {
                    return Err(Broken::Indirect.into());
                }
                if descriptor.gpa.checked_add(descriptor.len.into()).is_none() {
                    return Err(Broken::ChainBytes.into());
                }
                inside_indirect = true;
                table = descriptor.gpa;
                entries = descriptor.len / DESCRIPTOR as u32;
                left = entries.min(QUEUE_SIZE_MAX.into());
                index = 0;
                continue;
            }
            chain.push(descriptor.gpa, descriptor.len, descriptor.flags.contains(DescF::WRITE))?;
            if !has_next {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    /// The ring slot of a free-running index.
    fn slot(&self, index: u16) -> u64 {
        u64::from(index) & u64::from(self.size.wrapping_sub(1))
    }

    /// One of its areas, as the memory knows it.
    fn ring(&self, area: Area) -> Ring {
        Ring { queue: self.number, area }
    }

    /// The 16-bit field of the available ring `bytes` into it.
    fn read_u16(&self, memory: &dyn GuestMemory, bytes: u64) -> Result<u16, MemoryError> {
        let mut field = [0; 2];
        memory.read_ring(self.ring(Area::Driver), self.at(Area::Driver, bytes), &mut field)?;
        Ok(u16::from_le_bytes(field))
    }

    /// The address `bytes` into an area.
    fn at(&self, area: Area, bytes: u64) -> Gpa {
        offset(Gpa::new(self.areas[area as usize]), bytes)
    }
}

/// `base + bytes` in an area that was seen not to wrap.
fn offset(base: Gpa, bytes: u64) -> Gpa {
    Gpa::new(base.get().wrapping_add(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_read_as_the_specification_lays_it_out() {
        let descriptor = Descriptor::decode([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 3, 0, 14, 15]);
        assert_eq!(descriptor.gpa, Gpa::new(0x0807_0605_0403_0201));
        assert_eq!(descriptor.len, 0x0c0b_0a09);
        assert_eq!(descriptor.flags, DescF::NEXT | DescF::WRITE);
        assert_eq!(descriptor.next, 0x0f0e);
    }

    #[test]
    fn only_sound_queues_become_ready() {
        let refused = |size, areas| {
            let mut queue = Queue { size, areas, ..Queue::new(0) };
            let result = queue.enable(false);
            assert_eq!(queue.is_ready(), result.is_ok());
            result.err()
        };
        for size in [0, 3, 255, 512, 1 << 16, u32::MAX] {
            assert_eq!(refused(size, [0; 3]), Some(Broken::QueueSize { size }));
        }
        for areas in [[8, 0, 0], [0, 1, 0], [0, 0, 2], [!0xf, 0, 0], [0, !1, 0], [0, 0, !3]] {
            let gpa = Gpa::new(areas.into_iter().max().unwrap());
            assert_eq!(refused(16, areas), Some(Broken::QueueArea { gpa }));
        }
        for size in [1, 2, 128, 256] {
            assert_eq!(refused(size, [0x10, 2, 4]), None);
        }
    }

    #[test]
    fn a_ready_queue_keeps_its_place() {
        let mut queue = Queue::new(0);
        queue.set_size(8);
        queue.set_area(Area::Driver, true, 0x1234_5678);
        queue.set_area(Area::Driver, false, 0x9abc_def0);
        assert_eq!(queue.areas, [0, 0x1234_5678_9abc_def0, 0]);
        queue.enable(false).unwrap();
        queue.set_size(16);
        queue.set_area(Area::Driver, false, 0);
        assert_eq!((queue.size, queue.areas[1]), (8, 0x1234_5678_9abc_def0));
    }
}
