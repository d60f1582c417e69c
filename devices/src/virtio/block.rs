//! Block device (virtio 5.2).
//!
//! Purpose: a disk image as the guest's disk.
//!
//! Protocol: one queue. A request is a header of 16 bytes, data, and a status byte, in any segments. Data goes through
//! a buffer of 4 KiB that is made with the device, so no request allocates and none holds a reference into guest
//! memory. A request's progress is the number of data bytes moved; it goes on there after the bound of one part of the
//! work, and after [`DiskError::OutOfMemory`] or the guest memory's. The header is read anew and checked anew each time.
//!
//! Answers: OK; IOERR for what the disk refuses, for sectors outside it, lengths that are no whole sectors, and writes
//! to a read-only disk; UNSUPP for types of request that are not IN, OUT, FLUSH or GET_ID. Every request that has room
//! for a status gets one; one that has not is a broken driver. The length of a used buffer counts all of its writable
//! part, as the status is its last byte.
//!
//! A disk caches nothing on the way: FLUSH asks the disk to make durable what it was given.
//!
//! Lock order: the device's lock, then the disk's.

use alloc::vec::Vec;

use virtio::blk::{F, S, T};

use super::queue::{Head, Queue};
use super::{Broken, OutOfMemory, QUEUE_SIZE_MAX, Service, Stop, VirtioDevice, bounce, registers};
use crate::bus::{MemoryError, Work};

/// Bytes of a sector, whatever the disk's own blocks are (virtio 5.2.6).
pub const SECTOR: u64 = 512;

/// Bytes of the identity that GET_ID returns (virtio 5.2.6).
pub const ID_BYTES: usize = 20;

/// Bytes of a request's header.
const HEADER: u64 = 16;

/// Segments of data in one request: a chain without header and status.
const DATA_SEGMENTS: u32 = QUEUE_SIZE_MAX as u32 - 2;

/// Why a disk did not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DiskError {
    /// It failed; the guest is told.
    Io,
    /// The machine has no memory to hold what was written. It may be tried again when it has; the guest is not told.
    OutOfMemory,
}

/// What holds a guest's disk. Sectors are of 512 bytes; buffers are whole sectors inside the disk.
pub trait Disk: Send + Sync {
    /// Size in sectors; never changes.
    fn sectors(&self) -> u64;

    /// Whether writes are refused; never changes.
    fn is_read_only(&self) -> bool;

    /// Fills `to` from `sector` on.
    ///
    /// # Errors
    ///
    /// [`DiskError`]; the content of `to` is then unspecified.
    fn read(&self, sector: u64, to: &mut [u8]) -> Result<(), DiskError>;

    /// Stores `from` from `sector` on.
    ///
    /// # Errors
    ///
    /// [`DiskError`]; some of the sectors may have been stored.
    fn write(&self, sector: u64, from: &[u8]) -> Result<(), DiskError>;

    /// Makes all that was written durable, as far as the disk is.
    ///
    /// # Errors
    ///
    /// [`DiskError`].
    fn flush(&self) -> Result<(), DiskError>;
}

impl<T: Disk + ?Sized> Disk for alloc::sync::Arc<T> {
    fn sectors(&self) -> u64 {
        (**self).sectors()
    }

    fn is_read_only(&self) -> bool {
        (**self).is_read_only()
    }

    fn read(&self, sector: u64, to: &mut [u8]) -> Result<(), DiskError> {
        (**self).read(sector, to)
    }

    fn write(&self, sector: u64, from: &[u8]) -> Result<(), DiskError> {
        (**self).write(sector, from)
    }

    fn flush(&self) -> Result<(), DiskError> {
        (**self).flush()
    }
}

/// A block device on a disk.
pub struct Block<D> {
    disk: D,
    id: [u8; ID_BYTES],
    buffer: Vec<u8>,
}

/// How a request ends, or why it has not.
enum Answer {
    Status(S),
    /// The bound of this part of the work came first.
    Unfinished,
}

impl From<S> for Answer {
    fn from(status: S) -> Self {
        Self::Status(status)
    }
}

/// What `move_data` does with each piece.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    /// From the disk to the guest.
    In,
    /// From the guest to the disk.
    Out,
}

impl<D: Disk> Block<D> {
    /// A block device on `disk` that names itself `id`, of which the first 20 bytes count.
    ///
    /// # Errors
    ///
    /// If the heap has no room for its buffer.
    pub fn new(disk: D, id: &[u8]) -> Result<Self, OutOfMemory> {
        let mut padded = [0; ID_BYTES];
        for (to, from) in padded.iter_mut().zip(id) {
            *to = *from;
        }
        Ok(Self { disk, id: padded, buffer: bounce()? })
    }

    /// The same for a copy of the virtual machine, on the copy's disk.
    ///
    /// # Errors
    ///
    /// If the heap has no room for its buffer.
    pub fn fork(&self, disk: D) -> Result<Self, OutOfMemory> {
        Self::new(disk, &self.id)
    }

    /// Does what it can of the request in the service's chain; `true` if it is finished and given back.
    fn request(&mut self, head: Head, queue: &mut Queue, service: &mut Service<'_>) -> Result<bool, Stop> {
        let writable = service.chain.writable_bytes();
        let Some(room) = writable.checked_sub(1) else { return Err(Broken::Request.into()) };
        let mut header = [0; HEADER as usize];
        service.chain.read(service.memory, 0, &mut header)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let answer = match T::try_from(u32::from_le_bytes([t0, t1, t2, t3])) {
            Ok(T::In) => self.move_data(Direction::In, sector, room, queue, service)?,
            Ok(T::Out) if self.disk.is_read_only() => S::Ioerr.into(),
            Ok(T::Out) => {
                let data = service.chain.readable_bytes() - HEADER;
                self.move_data(Direction::Out, sector, data, queue, service)?
            }
            Ok(T::Flush) => status(self.disk.flush())?.into(),
            Ok(T::GetId) => {
                let bytes = usize::try_from(room).map_or(ID_BYTES, |room| room.min(ID_BYTES));
                service.chain.write(service.memory, 0, &self.id[..bytes])?;
                S::Ok.into()
            }
            _ => S::Unsupp.into(),
        };
        let Answer::Status(status) = answer else { return Ok(false) };
        service.chain.write(service.memory, room, &[status.into()])?;
        queue.complete(service.memory, head, u32::try_from(writable).unwrap_or(u32::MAX))?;
        Ok(true)
    }

    /// Moves the data of a request, `bytes` from `sector` on, from where it stands.
    fn move_data(
        &mut self,
        direction: Direction,
        sector: u64,
        bytes: u64,
        queue: &mut Queue,
        service: &mut Service<'_>,
    ) -> Result<Answer, Stop> {
        let end = sector.checked_add(bytes / SECTOR);
        if !bytes.is_multiple_of(SECTOR) || end.is_none_or(|end| end > self.disk.sectors()) {
            return Ok(S::Ioerr.into());
        }
        while queue.progress < bytes {
            if service.is_spent() {
                return Ok(Answer::Unfinished);
            }
            let rest = usize::try_from(bytes - queue.progress).unwrap_or(usize::MAX);
            let piece_bytes = rest.min(self.buffer.len());
            let piece = &mut self.buffer[..piece_bytes];
            // Below `end`, so it does not overflow; progress is whole sectors, as buffer and request are.
            let at = sector + queue.progress / SECTOR;
            let moved = match direction {
                Direction::In => self.disk.read(at, piece),
                Direction::Out => {
                    if copied(service.chain.read(service.memory, HEADER + queue.progress, piece))? != S::Ok {
                        return Ok(S::Ioerr.into());
                    }
                    self.disk.write(at, piece)
                }
            };
            let moved = status(moved)?;
            if moved != S::Ok {
                return Ok(moved.into());
            }
            if direction == Direction::In
                && copied(service.chain.write(service.memory, queue.progress, piece))? != S::Ok
            {
                return Ok(S::Ioerr.into());
            }
            service.spend(piece_bytes);
            queue.progress += piece_bytes as u64;
        }
        Ok(S::Ok.into())
    }
}

/// Of data: a bad page among it fails the request, and not the device.
fn copied(result: Result<(), Stop>) -> Result<S, Stop> {
    match result {
        Ok(()) => Ok(S::Ok),
        Err(Stop::Broken(Broken::Memory(MemoryError::Poisoned { .. }))) => Ok(S::Ioerr),
        Err(stop) => Err(stop),
    }
}

/// What the guest is told, unless it is to wait.
fn status(result: Result<(), DiskError>) -> Result<S, Stop> {
    match result {
        Ok(()) => Ok(S::Ok),
        Err(DiskError::Io) => Ok(S::Ioerr),
        Err(DiskError::OutOfMemory) => Err(Stop::OutOfMemory),
    }
}

impl<D: Disk> VirtioDevice for Block<D> {
    const ID: virtio::Id = virtio::Id::Block;
    const QUEUES: usize = 1;

    fn features(&self) -> u64 {
        let mut features = F::SEG_MAX | F::BLK_SIZE | F::FLUSH;
        if self.disk.is_read_only() {
            features |= F::RO;
        }
        features.bits().to_ne() as u64
    }

    fn config(&self) -> [u8; registers::CONFIG_BYTES] {
        let mut config = [0; registers::CONFIG_BYTES];
        config[0..8].copy_from_slice(&self.disk.sectors().to_le_bytes());
        config[12..16].copy_from_slice(&DATA_SEGMENTS.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        config
    }

    fn serve(&mut self, _index: usize, queue: &mut Queue, service: &mut Service<'_>) -> Result<Work, Stop> {
        while !service.is_spent() {
            let Some(head) = service.next(queue)? else { return Ok(Work::Idle) };
            if !self.request(head, queue, service)? {
                return Ok(Work::More);
            }
        }
        Ok(Work::More)
    }
}
