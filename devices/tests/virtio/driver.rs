//! A virtio driver in miniature: enough of virtio 3.1.1 and 2.7 to move data, and hooks to break every rule.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use entresol_devices::bus::{Device, Work};
use entresol_devices::virtio::{QUEUES_MAX, VirtioDevice, VirtioMmio};

use crate::host::{Line, Memory, RAM};

pub const STATUS: u64 = 0x70;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const NEEDS_RESET: u64 = 64;
pub const VERSION_1: u64 = 1 << 32;
pub const INDIRECT_DESC: u64 = 1 << 28;
pub const RING_RESET: u64 = 1 << 40;

/// Where a queue's areas and a test's buffers lie.
const QUEUES: u64 = RAM + 0x1_0000;
const QUEUE_STRIDE: u64 = 0x4000;
/// Free guest memory for buffers.
pub const BUFFERS: u64 = RAM + 0x10_0000;

/// One descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    pub gpa: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Desc {
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A device with its driver.
pub struct Driver<D> {
    pub device: VirtioMmio<D, Arc<Memory>, Arc<Line>>,
    pub memory: Arc<Memory>,
    pub line: Arc<Line>,
    pub size: u16,
    available: [u16; QUEUES_MAX],
    seen: [u16; QUEUES_MAX],
}

impl<D: VirtioDevice> Driver<D> {
    /// A device that no driver has touched.
    pub fn cold(device: D) -> Self {
        let (memory, line) = (Memory::new(), Arc::new(Line::default()));
        let device = VirtioMmio::new(device, memory.clone(), line.clone()).expect("the host has memory");
        Self { device, memory, line, size: 256, available: [0; QUEUES_MAX], seen: [0; QUEUES_MAX] }
    }

    /// A device brought up with `features` and queues of 256.
    pub fn new(device: D, features: u64) -> Self {
        let mut driver = Self::cold(device);
        driver.bring_up(features, 256);
        driver
    }

    pub fn load(&self, register: u64) -> u64 {
        self.device.read(register, 4)
    }

    pub fn store(&self, register: u64, value: u64) {
        assert_eq!(self.device.write(register, 4, value), Work::Idle);
    }

    /// All features that the device offers.
    pub fn offered(&self) -> u64 {
        self.store(0x14, 0);
        let low = self.load(0x10);
        self.store(0x14, 1);
        self.load(0x10) << 32 | low
    }

    /// Negotiates `features`; whether the device agrees.
    pub fn negotiate(&self, features: u64) -> bool {
        self.store(STATUS, 0);
        self.store(STATUS, 1);
        self.store(STATUS, 3);
        for half in 0..2 {
            self.store(0x24, half);
            self.store(0x20, features >> (32 * half) & 0xffff_ffff);
        }
        self.store(STATUS, 11);
        self.load(STATUS) & 8 != 0
    }

    /// From reset to DRIVER_OK.
    pub fn bring_up(&mut self, features: u64, size: u16) {
        assert!(self.negotiate(features | VERSION_1));
        self.size = size;
        for index in 0..D::QUEUES {
            self.set_up_queue(index);
        }
        self.store(STATUS, 15);
        assert_eq!(self.load(STATUS), 15);
    }

    pub fn set_up_queue(&mut self, index: usize) {
        let areas = [self.table(index), self.driver_area(index), self.device_area(index)];
        self.store(0x30, index as u64);
        assert_eq!(self.load(0x34), 256);
        assert_eq!(self.load(0x44), 0);
        self.store(0x38, self.size.into());
        for (register, area) in [0x80, 0x90, 0xa0].into_iter().zip(areas) {
            self.store(register, area & 0xffff_ffff);
            self.store(register + 4, area >> 32);
        }
        self.memory.poke(self.driver_area(index), &[0; 4]);
        self.memory.poke(self.device_area(index), &[0; 4]);
        (self.available[index], self.seen[index]) = (0, 0);
        self.store(0x44, 1);
        assert_eq!(self.load(0x44), 1);
    }

    pub fn table(&self, index: usize) -> u64 {
        QUEUES + index as u64 * QUEUE_STRIDE
    }

    pub fn driver_area(&self, index: usize) -> u64 {
        self.table(index) + 0x1000
    }

    pub fn device_area(&self, index: usize) -> u64 {
        self.table(index) + 0x2000
    }

    /// Writes descriptor `at` of queue `index`.
    pub fn set_descriptor(&self, index: usize, at: u16, desc: Desc) {
        self.memory.poke(self.table(index) + 16 * u64::from(at), &desc.bytes());
    }

    /// Writes a chain from descriptor `first` on: `(address, length, device writes)` each.
    pub fn chain(&self, index: usize, first: u16, segments: &[(u64, u32, bool)]) {
        for (n, (gpa, len, writable)) in segments.iter().enumerate() {
            let at = first + n as u16;
            let last = n + 1 == segments.len();
            let flags = if last { 0 } else { NEXT } | if *writable { WRITE } else { 0 };
            self.set_descriptor(index, at, Desc { gpa: *gpa, len: *len, flags, next: at + 1 });
        }
    }

    /// Makes the chain at `head` available, without a notification.
    pub fn make_available(&mut self, index: usize, head: u16) {
        let slot = u64::from(self.available[index] % self.size);
        self.memory.poke(self.driver_area(index) + 4 + 2 * slot, &head.to_le_bytes());
        self.available[index] = self.available[index].wrapping_add(1);
        self.memory.poke(self.driver_area(index) + 2, &self.available[index].to_le_bytes());
    }

    pub fn notify(&self, index: usize) -> Work {
        self.device.write(0x50, 4, index as u64)
    }

    /// Makes a chain available, notifies, and lets the device work until it is idle.
    pub fn submit(&mut self, index: usize, segments: &[(u64, u32, bool)]) {
        self.chain(index, 0, segments);
        self.make_available(index, 0);
        let mut work = self.notify(index);
        while work == Work::More {
            work = self.device.run();
        }
        assert_eq!(work, Work::Idle);
    }

    /// The next used element, as head and length.
    pub fn used(&mut self, index: usize) -> Option<(u32, u32)> {
        let count = self.used_index(index);
        if count == self.seen[index] {
            return None;
        }
        let slot = u64::from(self.seen[index] % self.size);
        self.seen[index] = self.seen[index].wrapping_add(1);
        let element = self.memory.peek(self.device_area(index) + 4 + 8 * slot, 8);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
        Some((word(0), word(4)))
    }

    pub fn used_index(&self, index: usize) -> u16 {
        u16::from_le_bytes(self.memory.peek(self.device_area(index) + 2, 2).try_into().unwrap())
    }

    /// Handles an interrupt as Linux does: reads the reasons and acknowledges them.
    pub fn take_interrupt(&self) -> u64 {
        let reasons = self.load(0x60);
        self.store(0x64, reasons);
        reasons
    }

    pub fn high(&self) -> bool {
        self.line.high.load(Ordering::Relaxed)
    }
}
