//! Virtio devices over MMIO (Virtual I/O Device, version 1.2; "virtio" below).
//!
//! Purpose: disk, console, entropy and a memory balloon for guests, by the modern register layout (version 2, virtio 4.2)
//! with split virtqueues (2.7). Drivers that speak only the legacy layout see a version that they refuse.
//!
//! Rooms: [`mmio`] is the register file and the life of a device; [`queue`] takes buffers from the driver and gives
//! them back; [`chain`] is one buffer, a list of segments; [`block`], [`console`], [`entropy`] and [`balloon`] say what
//! a buffer means; [`empty`] answers where the map has a slot and nobody is home.
//!
//! Protocol: a store to QueueNotify processes that queue in the exit that the store caused. A part of the work is
//! bounded ([`Service::spend`]); what remains is announced as [`crate::bus::Work`] and done by later calls. A request
//! that was interrupted in its middle, by the bound or because the machine has no memory left, stays at the head of
//! its queue with its progress ([`queue::Queue::progress`]), and is read anew when it goes on. All the driver sees is
//! that it takes longer.
//!
//! Features: VERSION_1, INDIRECT_DESC and RING_RESET, and what a type adds. EVENT_IDX is not offered: requests finish
//! inside the exit that announced them, so there are neither notifications nor interrupts to suppress.
//!
//! Invariants: nothing in guest memory is trusted or read twice for one decision. Each part of the work ends after a
//! bounded number of descriptors and bytes, whatever other CPUs of the guest write meanwhile. A driver that breaks the
//! format gets DEVICE_NEEDS_RESET, once, with the reason kept for its owner ([`Broken`]); no other device notices.
//!
//! Lock order: the device's lock, then guest memory, the disk, the terminal's `put`, or the line.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod console;
pub mod empty;
pub mod entropy;
pub mod mmio;
pub mod queue;
mod registers;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use chain::Chain;
use entresol_addr::Gpa;
pub use mmio::{Saved, VirtioMmio};
use queue::Queue;

use crate::bus::{GuestMemory, MemoryError, Terminal, Work};

/// The most descriptors of a virtqueue, and the most segments of a buffer.
pub const QUEUE_SIZE_MAX: u16 = 256;

/// The most virtqueues of one device.
pub const QUEUES_MAX: usize = 5;

/// Bytes of guest address space that a device takes: QEMU's `virt` puts one every 512 bytes.
pub const SIZE: u64 = 0x200;

/// The machine had no memory for a device that was to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory;

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no memory to make the device")
    }
}

/// How a driver broke the format of a virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Broken {
    /// A queue was made ready with a size that is zero, no power of two, or above [`QUEUE_SIZE_MAX`].
    QueueSize {
        /// What the driver had written to QueueNum.
        size: u32,
    },
    /// A queue was made ready with an area that is misaligned (virtio 2.7) or wraps the address space.
    QueueArea {
        /// Where the area was to be.
        gpa: Gpa,
    },
    /// The driver's index ran ahead by more than the size of the queue.
    AvailableIndex {
        /// The index.
        index: u16,
    },
    /// A descriptor outside its table was named.
    DescriptorIndex {
        /// Its index.
        index: u16,
    },
    /// A chain is longer than its table, or runs in a circle.
    ChainLength,
    /// The bytes of a chain are more than 2³², or run past the address space.
    ChainBytes,
    /// A descriptor that the device only reads follows one that it writes.
    ReadAfterWrite,
    /// An indirect table inside another, one that chains on, one that is not whole descriptors, or without the feature.
    Indirect,
    /// A buffer lies where the VM has no memory, none that may be written, or a page that is bad.
    Memory(MemoryError),
    /// A request is too short for its header or has nowhere to put its answer.
    Request,
    /// Before its state was saved; how is not known any more.
    Before,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QueueSize { size } => {
                write!(f, "queue size {size} is not a power of two from 1 to {QUEUE_SIZE_MAX}")
            }
            Self::QueueArea { gpa } => write!(f, "queue area at {gpa:#x} is misaligned or wraps"),
            Self::AvailableIndex { index } => write!(f, "available index {index} is ahead by more than the queue"),
            Self::DescriptorIndex { index } => write!(f, "descriptor {index} is outside its table"),
            Self::ChainLength => f.write_str("descriptor chain is longer than its table"),
            Self::ChainBytes => f.write_str("descriptor chain has more than 2^32 bytes or wraps"),
            Self::ReadAfterWrite => f.write_str("readable descriptor after a writable one"),
            Self::Indirect => f.write_str("indirect descriptor where none may be"),
            Self::Memory(error) => write!(f, "buffer cannot be accessed: {error:?}"),
            Self::Request => f.write_str("request lacks room for its header or its answer"),
            Self::Before => f.write_str("broken before its state was saved"),
        }
    }
}

/// Why a queue's processing ended before the queue was empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The driver broke the format; the device needs a reset.
    Broken(Broken),
    /// The machine has no memory for what the guest asked. Goes on later where it was.
    OutOfMemory,
    /// A page of the guest's is not in memory now. Goes on where it was when the page has come.
    Absent,
}

impl From<Broken> for Stop {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}

impl From<MemoryError> for Stop {
    fn from(error: MemoryError) -> Self {
        match error {
            MemoryError::OutOfMemory => Self::OutOfMemory,
            MemoryError::Absent => Self::Absent,
            MemoryError::Outside { .. }
            | MemoryError::ReadOnly { .. }
            | MemoryError::Private { .. }
            | MemoryError::Poisoned { .. } => Self::Broken(Broken::Memory(error)),
        }
    }
}

/// Bytes that one part of a device's work may copy.
const BYTES_PER_PART: u32 = 256 << 10;

/// What reading a descriptor costs, in bytes copied: about as many instructions.
const DESCRIPTOR_COST: u32 = 512;

/// Bytes of the buffer through which a device copies.
const BOUNCE_BYTES: usize = 4096;

/// A buffer to copy through, made with the device.
fn bounce() -> Result<Vec<u8>, OutOfMemory> {
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(BOUNCE_BYTES).map_err(|_| OutOfMemory)?;
    buffer.resize(BOUNCE_BYTES, 0);
    Ok(buffer)
}

/// What a device needs while it processes a queue.
pub struct Service<'a> {
    /// The VM's memory.
    pub memory: &'a dyn GuestMemory,
    /// Room for the buffer at hand.
    pub chain: &'a mut Chain,
    budget: u32,
}

impl<'a> Service<'a> {
    /// For one part of the work.
    pub(crate) fn new(memory: &'a dyn GuestMemory, chain: &'a mut Chain) -> Self {
        Self { memory, chain, budget: BYTES_PER_PART }
    }

    /// Charges `bytes` copied to this part of the work.
    pub fn spend(&mut self, bytes: usize) {
        self.budget = self.budget.saturating_sub(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    /// Whether this part of the work has come to its bound.
    pub fn is_spent(&self) -> bool {
        self.budget == 0
    }

    /// Reads the next buffer of `queue` into [`Self::chain`], charges it, and returns where it is to be given back.
    /// `None` if the driver has made none available.
    ///
    /// # Errors
    ///
    /// Those of [`Queue::peek`].
    pub fn next(&mut self, queue: &mut Queue) -> Result<Option<queue::Head>, Stop> {
        let head = queue.peek(self.memory, self.chain)?;
        self.spend(self.chain.descriptors() * DESCRIPTOR_COST as usize);
        Ok(head)
    }
}

/// A type of virtio device: what it adds to queues and registers that all have.
///
/// The methods are called with the device's lock held.
pub trait VirtioDevice: Send {
    /// DeviceID (virtio 5).
    const ID: virtio::Id;
    /// Number of virtqueues, up to [`QUEUES_MAX`].
    const QUEUES: usize;

    /// Features that this type offers beside those of the transport.
    fn features(&self) -> u64;

    /// The configuration space, little-endian (virtio 2.5).
    fn config(&self) -> [u8; registers::CONFIG_BYTES];

    /// A driver's store to the configuration space, `offset` bytes from its start.
    fn write_config(&mut self, _offset: u64, _size: u8, _value: u64) {}

    /// The device was reset: what its type keeps for a driver is forgotten.
    fn reset(&mut self) {}

    /// The terminal to call because input that it offered and was refused is wanted now; asked after every access.
    fn input_wanted(&mut self) -> Option<Arc<dyn Terminal>> {
        None
    }

    /// Takes buffers from queue `index` until it is empty or the bound is reached.
    ///
    /// # Errors
    ///
    /// [`Stop`]: see there. The buffer at hand stays the queue's next.
    fn serve(&mut self, index: usize, queue: &mut Queue, service: &mut Service<'_>) -> Result<Work, Stop>;
}
