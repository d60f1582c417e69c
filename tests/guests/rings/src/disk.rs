//! A driver for a virtio disk that puts its rings where it is told (virtio 1.2: 2.7, 3.1.1, 4.2, 5.2).

use guest_rt::machine::{RAM, VIRTIO};
use guest_rt::memory::{barrier, load32, load64, store16, store32, store64};

const DEVICE_ID: u64 = 0x08;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_AREAS: [u64; 3] = [0x80, 0x90, 0xa0];
const QUEUE_RESET: u64 = 0xc0;

/// DeviceID of a disk.
const DISK: u32 = 2;
/// ACKNOWLEDGE, DRIVER, FEATURES_OK; and DRIVER_OK.
const READY: u32 = 11;
const WORKS: u32 = 15;
const NEEDS_RESET: u32 = 64;
/// VERSION_1 and RING_RESET, of the features from bit 32 on.
const FEATURES: u32 = 1 | 1 << 8;
/// Descriptors of the queue.
pub const SIZE: u64 = 16;
/// Descriptor flags.
const NEXT: u32 = 1;
const WRITE: u32 = 2;
/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Status of a request that nobody has answered.
const UNANSWERED: u32 = 0x55;

/// Where a queue's areas are: descriptor table, available ring, used ring.
pub type Places = [u64; 3];

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The sector is there, and the used ring says so.
    Served,
    /// The device asks for a reset.
    NeedsReset,
    /// Nothing.
    Nothing,
    /// Something that no device may do.
    Wrong,
}

/// A disk, whose first sector is all `byte`.
pub struct Disk {
    transport: u64,
    byte: u8,
    /// A page for requests.
    buffers: u64,
    /// Where memory ends.
    end: u64,
    places: Places,
    /// Requests that were made available.
    asked: u16,
}

impl Disk {
    /// The first disk.
    pub fn find(byte: u8, buffers: u64, end: u64) -> Option<Self> {
        let (first, count, step) = VIRTIO;
        let mut transports = (0..count).map(|index| first + index * step);
        let transport = transports.find(|transport| load32(transport + DEVICE_ID) == DISK)?;
        Some(Self { transport, byte, buffers, end, places: [0; 3], asked: 0 })
    }

    fn store(&self, register: u64, value: u32) {
        barrier();
        store32(self.transport + register, value);
    }

    fn status(&self) -> u32 {
        load32(self.transport + STATUS)
    }

    /// Resets the device.
    pub fn reset(&self) {
        self.store(STATUS, 0);
    }

    /// From reset to work, with rings at `places`. Whether the device wants them there.
    pub fn begin(&mut self, places: Places) -> bool {
        self.reset();
        self.store(STATUS, 1);
        self.store(STATUS, 3);
        for (half, features) in [(0, 0), (1, FEATURES)] {
            self.store(DRIVER_FEATURES_SEL, half);
            self.store(DRIVER_FEATURES, features);
        }
        self.store(STATUS, READY);
        self.set_queue(places);
        self.store(STATUS, WORKS);
        self.status() == WORKS
    }

    /// Resets the queue alone, and puts its rings elsewhere.
    pub fn move_queue(&mut self, places: Places) {
        self.store(QUEUE_SEL, 0);
        self.store(QUEUE_RESET, 1);
        self.set_queue(places);
    }

    fn set_queue(&mut self, places: Places) {
        (self.places, self.asked) = (places, 0);
        for place in places {
            // Flags and index of rings, and a piece of the table, which is written again.
            self.put(place, 0);
            self.put(place.wrapping_add(2), 0);
        }
        self.store(QUEUE_SEL, 0);
        self.store(QUEUE_NUM, SIZE as u32);
        for (register, place) in QUEUE_AREAS.into_iter().zip(places) {
            self.store(register, place as u32);
            self.store(register + 4, (place >> 32) as u32);
        }
        self.store(QUEUE_READY, 1);
    }

    /// Whether there is memory that this program may store to.
    fn has(&self, place: u64) -> bool {
        place.is_multiple_of(2) && (RAM..self.end).contains(&place)
    }

    /// Stores where there is memory.
    fn put(&self, place: u64, value: u16) {
        if self.has(place) {
            store16(place, value);
        }
    }

    /// Asks for the first sector.
    pub fn ask(&mut self) -> Answer {
        let [table, available, used] = self.places;
        let (header, data, status) = (self.buffers, self.buffers + SECTOR, self.buffers + 2 * SECTOR);
        (0..16).step_by(8).for_each(|at| store64(header + at, 0));
        (0..SECTOR).step_by(8).for_each(|at| store64(data + at, 0));
        store32(status, UNANSWERED);
        let chain = [(header, 16, NEXT), (data, SECTOR, NEXT | WRITE), (status, 1, WRITE)];
        for (index, (address, bytes, flags)) in (0..).zip(chain) {
            let descriptor = table.wrapping_add(16 * u64::from(index));
            let words = [address, bytes | u64::from(flags | (index + 1) << 16) << 32];
            for (at, word) in (0..).step_by(8).zip(words) {
                let halves = (0..8).step_by(2).map(|half| (half, (word >> (8 * half)) as u16));
                halves.for_each(|(half, value)| self.put(descriptor.wrapping_add(at + half), value));
            }
        }
        self.put(available.wrapping_add(4 + 2 * (u64::from(self.asked) % SIZE)), 0);
        barrier();
        self.asked = self.asked.wrapping_add(1);
        self.put(available.wrapping_add(2), self.asked);
        self.store(QUEUE_NOTIFY, 0);
        self.store(INTERRUPT_ACK, 3);
        if self.status() & NEEDS_RESET != 0 {
            return Answer::NeedsReset;
        }
        if !self.has(used) {
            return Answer::Wrong;
        }
        // Index in the upper half, flags below it: the ring is aligned to 4.
        if load32(used) >> 16 != self.asked.into() {
            let untouched = load32(status) == UNANSWERED;
            return if untouched { Answer::Nothing } else { Answer::Wrong };
        }
        let element = used + 4 + 8 * (u64::from(self.asked.wrapping_sub(1)) % SIZE);
        let word = u64::from_ne_bytes([self.byte; 8]);
        let right = (load32(element), u64::from(load32(element + 4))) == (0, SECTOR + 1)
            && load32(status) == UNANSWERED & !0xff
            && (0..SECTOR).step_by(8).all(|at| load64(data + at) == word);
        if right { Answer::Served } else { Answer::Wrong }
    }
}
