//! Entropy device (virtio 5.4).
//!
//! Purpose: random bytes for guests, which have few sources of their own.
//!
//! Protocol: one queue of buffers to fill. Each gets as many bytes as fit into the device's own buffer, which may be
//! fewer than the driver has room for (virtio 5.4.6.1); it asks again. The buffer is wiped before the lock is free, so
//! no guest's randomness stays.

use alloc::vec::Vec;

use super::queue::Queue;
use super::{Broken, OutOfMemory, Service, Stop, VirtioDevice, bounce, registers};
use crate::bus::Work;

/// A source of random bytes, fit for keys.
pub trait Entropy: Send + Sync {
    /// Fills `to`.
    fn fill(&self, to: &mut [u8]);
}

impl<T: Entropy + ?Sized> Entropy for alloc::sync::Arc<T> {
    fn fill(&self, to: &mut [u8]) {
        (**self).fill(to);
    }
}

/// An entropy device on a source.
pub struct EntropySource<E> {
    source: E,
    buffer: Vec<u8>,
}

impl<E: Entropy> EntropySource<E> {
    /// An entropy device on `source`.
    ///
    /// # Errors
    ///
    /// If the heap has no room for its buffer.
    pub fn new(source: E) -> Result<Self, OutOfMemory> {
        Ok(Self { source, buffer: bounce()? })
    }

    /// Fills buffers until there are none or the bound is reached.
    fn fill_buffers(&mut self, queue: &mut Queue, service: &mut Service<'_>) -> Result<Work, Stop> {
        while !service.is_spent() {
            let Some(head) = service.next(queue)? else { return Ok(Work::Idle) };
            let room = usize::try_from(service.chain.writable_bytes()).unwrap_or(usize::MAX);
            if room == 0 {
                return Err(Broken::Request.into());
            }
            let bytes = room.min(self.buffer.len());
            let piece = &mut self.buffer[..bytes];
            self.source.fill(piece);
            service.chain.write(service.memory, 0, piece)?;
            queue.complete(service.memory, head, bytes as u32)?;
            service.spend(bytes);
        }
        Ok(Work::More)
    }
}

impl<E: Entropy> VirtioDevice for EntropySource<E> {
    const ID: virtio::Id = virtio::Id::Rng;
    const QUEUES: usize = 1;

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> [u8; registers::CONFIG_BYTES] {
        [0; registers::CONFIG_BYTES]
    }

    fn serve(&mut self, _index: usize, queue: &mut Queue, service: &mut Service<'_>) -> Result<Work, Stop> {
        let outcome = self.fill_buffers(queue, service);
        self.buffer.fill(0);
        outcome
    }
}

#[cfg(test)]
mod tests {
    use entresol_addr::Gpa;
    use entresol_sync::Mutex;

    use super::*;
    use crate::bus::{Area, GuestMemory, MemoryError};
    use crate::virtio::chain::Chain;

    /// A few bytes of guest memory from address 0 on.
    struct Memory(Mutex<[u8; 256]>);

    impl GuestMemory for Memory {
        fn read(&self, gpa: Gpa, to: &mut [u8]) -> Result<(), MemoryError> {
            let at = gpa.get() as usize;
            to.copy_from_slice(&self.0.lock()[at..at + to.len()]);
            Ok(())
        }

        fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
            let at = gpa.get() as usize;
            self.0.lock()[at..at + from.len()].copy_from_slice(from);
            Ok(())
        }
    }

    struct Ones;

    impl Entropy for Ones {
        fn fill(&self, to: &mut [u8]) {
            to.fill(0xff);
        }
    }

    #[test]
    fn no_randomness_stays_behind() {
        let memory = Memory(Mutex::new([0; 256]));
        // One descriptor: 16 bytes at 0x80, for the device to write. The available ring at 0x20 names it.
        memory.write(Gpa::new(0), &[0x80, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 2, 0, 0, 0]).unwrap();
        memory.write(Gpa::new(0x22), &[1]).unwrap();
        let mut queue = Queue::new(0);
        queue.set_size(1);
        queue.set_area(Area::Driver, false, 0x20);
        queue.set_area(Area::Device, false, 0x40);
        queue.enable(false).unwrap();
        let mut chain = Chain::new().unwrap();
        let mut device = EntropySource::new(Ones).unwrap();
        let work = device.serve(0, &mut queue, &mut Service::new(&memory, &mut chain));
        assert_eq!(work, Ok(Work::Idle));
        assert_eq!(memory.0.lock()[0x80..0x91], [[0xff; 16].as_slice(), &[0]].concat());
        assert!(device.buffer.iter().all(|byte| *byte == 0));
    }
}
