//! One virtio block device, driven without ever waiting for it (virtio 1.2, 5.2).
//!
//! Protocol: [`Disk::submit`] gives the device a [`Request`] with its buffer; its interrupt raises the owner's work; the owner
//! takes what is done with [`Disk::take`], buffer and all. Requests are done in any order; who needs an order waits for one
//! before it submits the next, and what was written is on the medium when a flush is done that was submitted after.
//!
//! Trust: the device belongs to the outer machine. One that breaks the rules of its queue is reset and left alone: what it
//! had comes back as failed.
//!
//! Invariants: a buffer is inside the driver from `submit` to `take`. Headers and statuses live as long as the program.
//! Lock order: a leaf.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::ptr::NonNull;

use crate::arch::boot::Device;
use crate::arch::timer;
use entresol_sync::Mutex;
use entresol_sync::atomic::{Ordering, fence};
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::{DeviceStatus, Transport};
use virtio_drivers::{Error, PAGE_SIZE};

use super::Buffer;
use crate::dma::Identity;
use crate::host_work::{self, Work};

/// Bytes of a sector (virtio 1.2, 5.2.4).
pub const SECTOR: u64 = 512;
/// Requests that a device has at most.
pub const DEPTH: usize = 16;
/// Descriptors: header, data and status for each.
const DESCRIPTORS: usize = 64;
/// The queue of requests.
const QUEUE: u16 = 0;
/// How long a device may take to say its name, in seconds.
const NAME_SECONDS: u64 = 10;
/// Bytes of a serial number (virtio 1.2, 5.2.6.1).
const SERIAL: usize = 20;

/// VIRTIO_BLK_F_RO, VIRTIO_BLK_F_FLUSH (virtio 1.2, 5.2.3), VIRTIO_F_VERSION_1 (6).
const READ_ONLY: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const VERSION_1: u64 = 1 << 32;

const _: () = assert!(3 * DEPTH <= DESCRIPTORS);

/// What a request asks for; the values are VIRTIO_BLK_T_* (virtio 1.2, 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill the buffer from the disk.
    Read = 0,
    /// Write the buffer to the disk.
    Write = 1,
    /// Everything that was written before is to stay.
    Flush = 4,
    /// The device's name.
    GetId = 8,
}

/// A request.
#[derive(Debug)]
pub struct Request {
    /// What.
    pub operation: Operation,
    /// First sector of 512 bytes.
    pub sector: u64,
    /// Bytes from the start of the buffer, whole sectors; 0 for a flush.
    pub len: usize,
    /// Where to or where from; none for a flush.
    pub buffer: Option<Buffer>,
    /// The owner's, to know it again.
    pub tag: u64,
}

/// A request that was not taken.
#[derive(Debug)]
pub struct Refused {
    /// It.
    pub request: Request,
    /// Why.
    pub error: DiskError,
}

/// A request that is done.
#[derive(Debug)]
pub struct Completion {
    /// It, with its buffer.
    pub request: Request,
    /// How it went.
    pub result: Result<(), DiskError>,
}

/// Why a disk did not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// It has as many requests as it takes: try again after a completion.
    Full,
    /// Past its end, no whole sectors, or no buffer for them.
    Outside {
        /// The first sector.
        sector: u64,
        /// Bytes.
        len: usize,
        /// Sectors that it has.
        sectors: u64,
    },
    /// A write to a disk that is only read.
    ReadOnly,
    /// The device says that it failed (VIRTIO_BLK_S_IOERR).
    Io,
    /// The device does not know the request (VIRTIO_BLK_S_UNSUPP).
    Unsupported,
    /// The device broke the rules and is not used any more.
    Broken,
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("the disk has too many requests"),
            Self::Outside { sector, len, sectors } => {
                write!(f, "sector {sector} with {len} bytes: must be whole sectors within the disk's {sectors}")
            }
            Self::ReadOnly => f.write_str("the disk is read-only"),
            Self::Io => f.write_str("the disk reports an input/output error"),
            Self::Unsupported => f.write_str("the disk does not know the request"),
            Self::Broken => f.write_str("the disk broke the rules of its queue and is not used any more"),
        }
    }
}

/// A request's header and status as the device sees them.
#[repr(C, align(32))]
struct Frame {
    header: [u8; 16],
    status: u8,
}

impl Frame {
    /// A status that no device writes.
    const UNTOUCHED: u8 = 0xff;
    const NEW: Self = Self { header: [0; 16], status: Self::UNTOUCHED };
}

/// A disk of the outer machine.
pub struct Disk {
    /// Its interrupt.
    pub device: Device,
    work: Work,
    sectors: u64,
    read_only: bool,
    inner: Mutex<Inner>,
}

struct Inner {
    transport: MmioTransport<'static>,
    queue: VirtQueue<Identity, DESCRIPTORS>,
    flushes: bool,
    frames: NonNull<[Frame; DEPTH]>,
    /// The request in each frame.
    lent: [Option<Request>; DEPTH],
    /// The frame of the chain that begins at each descriptor.
    frame_of: [Option<u8>; DESCRIPTORS],
    /// What is done without the device.
    done: Vec<Completion>,
    broken: bool,
}

// SAFETY: the frames belong to the disk and to its device alone; which CPU asks does not matter.
unsafe impl Send for Inner {}

impl Disk {
    /// Starts a device (virtio 1.2, 3.1.1) and asks its name. The interrupt is not enabled yet.
    ///
    /// # Errors
    ///
    /// [`Error::DmaError`]: the heap has no room. Others: the device does not do what it should; it is reset.
    pub fn start(
        transport: MmioTransport<'static>,
        device: Device,
        work_of: impl FnOnce(&[u8]) -> Option<Work>,
    ) -> Result<Option<Self>, Error> {
        let (mut inner, features) = Inner::start(transport)?;
        let config = |offset| inner.transport.read_config_space::<u32>(offset).map(u64::from);
        let sectors = config(0)? | config(4)? << 32;
        let serial = inner.name().inspect_err(|_| inner.reset())?;
        let end = serial.iter().position(|byte| *byte == 0).unwrap_or(SERIAL);
        let Some(work) = work_of(&serial[..end]) else {
            // Somebody else's, a guest's perhaps.
            inner.reset();
            return Ok(None);
        };
        let inner = Mutex::new(inner);
        Ok(Some(Self { device, work, sectors, read_only: features & READ_ONLY != 0, inner }))
    }

    /// Sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The work that its interrupt raises.
    pub fn work(&self) -> Work {
        self.work
    }

    /// Its interrupt has come.
    pub fn acknowledge(&self) {
        self.inner.lock().transport.ack_interrupt();
    }

    /// Gives the device a request.
    ///
    /// # Errors
    ///
    /// [`Refused`]; the request comes back with it.
    pub fn submit(&self, request: Request) -> Result<(), Refused> {
        match self.check(&request) {
            Ok(()) => self.inner.lock().submit(request, self.work),
            Err(error) => Err(Refused { request, error }),
        }
    }

    fn check(&self, request: &Request) -> Result<(), DiskError> {
        let (sector, len, sectors) = (request.sector, request.len, self.sectors);
        let outside = Err(DiskError::Outside { sector, len, sectors });
        let room = request.buffer.as_ref().map_or(0, Buffer::len);
        match request.operation {
            Operation::Flush if len == 0 => Ok(()),
            Operation::Write if self.read_only => Err(DiskError::ReadOnly),
            Operation::Read | Operation::Write => {
                let end = sector.checked_add(len as u64 / SECTOR).filter(|end| *end <= sectors);
                let whole = len != 0 && (len as u64).is_multiple_of(SECTOR) && len <= room;
                if end.is_some() && whole { Ok(()) } else { outside }
            }
            Operation::Flush | Operation::GetId => outside,
        }
    }

    /// Takes the next request that is done.
    pub fn take(&self) -> Option<Completion> {
        self.inner.lock().take()
    }
}

impl Inner {
    fn start(mut transport: MmioTransport<'static>) -> Result<(Self, u64), Error> {
        let begun = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        transport.set_status(DeviceStatus::empty());
        transport.set_status(begun);
        let features = transport.read_device_features() & (READ_ONLY | FLUSH | VERSION_1);
        transport.write_driver_features(features);
        transport.set_status(begun | DeviceStatus::FEATURES_OK);
        if !transport.get_status().contains(DeviceStatus::FEATURES_OK) {
            return Err(Error::Unsupported);
        }
        transport.set_guest_page_size(PAGE_SIZE as u32);
        let mut frames = Vec::new();
        frames.try_reserve_exact(1).map_err(|_| Error::DmaError)?;
        frames.push([const { Frame::NEW }; DEPTH]);
        let mut done = Vec::new();
        done.try_reserve_exact(DEPTH).map_err(|_| Error::DmaError)?;
        let queue = VirtQueue::new(&mut transport, QUEUE, false, false)?;
        transport.finish_init();
        let inner = Self {
            transport,
            queue,
            flushes: features & FLUSH != 0,
            frames: NonNull::from(Box::leak(frames.into_boxed_slice())).cast(),
            lent: [const { None }; DEPTH],
            frame_of: [None; DESCRIPTORS],
            done,
            broken: false,
        };
        Ok((inner, features))
    }

    /// The device's serial number, padded with zeros. At boot, when nothing else could run meanwhile.
    fn name(&mut self) -> Result<[u8; SERIAL], Error> {
        let buffer = Some(Buffer::take(entresol_backing::Order::PAGE).map_err(|_| Error::DmaError)?);
        let request = Request { operation: Operation::GetId, sector: 0, len: SERIAL, buffer, tag: 0 };
        self.submit(request, Work::Store).map_err(|_| Error::IoError)?;
        let deadline = timer::now() + NAME_SECONDS * timer::frequency();
        let done = loop {
            match self.take() {
                Some(done) => break done,
                None if timer::now() > deadline => return Err(Error::NotReady),
                None => core::hint::spin_loop(),
            }
        };
        self.transport.ack_interrupt();
        done.result.map_err(|_| Error::IoError)?;
        let buffer = done.request.buffer.as_ref();
        buffer.and_then(|buffer| buffer.bytes().first_chunk().copied()).ok_or(Error::IoError)
    }

    fn submit(&mut self, request: Request, work: Work) -> Result<(), Refused> {
        if self.broken {
            return Err(Refused { request, error: DiskError::Broken });
        }
        let free = self.lent.iter().position(Option::is_none).filter(|_| self.done.len() < DEPTH);
        let Some(index) = free else { return Err(Refused { request, error: DiskError::Full }) };
        if request.operation == Operation::Flush && !self.flushes {
            // A device without a cache: what it has written stays. No interrupt will tell.
            self.done.push(Completion { request, result: Ok(()) });
            host_work::raise(work);
            return Ok(());
        }
        let mut header = [0; 16];
        header[..4].copy_from_slice(&(request.operation as u32).to_le_bytes());
        header[8..].copy_from_slice(&request.sector.to_le_bytes());
        self.lent[index] = Some(request);
        match self.lend(index, header) {
            Ok(token) => {
                self.frame_of[usize::from(token)] = Some(index as u8);
                // The index must be visible before the device's wish not to be told is read (virtio 1.2, 2.7.13.4).
                fence(Ordering::SeqCst);
                if self.queue.should_notify() {
                    self.transport.notify(QUEUE);
                }
                Ok(())
            }
            Err(error) => {
                log::error!("disk: {error}");
                let request = self.lent[index].take().expect("it was put there above");
                Err(Refused { request, error: DiskError::Broken })
            }
        }
    }

    /// Puts the request of frame `index` into the queue.
    fn lend(&mut self, index: usize, header: [u8; 16]) -> Result<u16, Error> {
        let Some(request) = &mut self.lent[index] else { return Err(Error::WrongToken) };
        // SAFETY: the frame exists as long as the program, and the device does not have it: its request was just put there.
        // The buffer is the request's, stays in `lent` until `take` has popped the chain, and is not touched meanwhile; its
        // frames do not move with it.
        unsafe {
            let frame = &mut (*self.frames.as_ptr())[index];
            frame.header = header;
            frame.status = Frame::UNTOUCHED;
            let status = core::slice::from_mut(&mut frame.status);
            let data = request.buffer.as_mut().map_or(&mut [][..], Buffer::bytes_mut);
            let data = &mut data[..request.len];
            match request.operation {
                Operation::Flush => self.queue.add(&[&frame.header], &mut [status]),
                Operation::Write => self.queue.add(&[&frame.header, data], &mut [status]),
                Operation::Read | Operation::GetId => self.queue.add(&[&frame.header], &mut [data, status]),
            }
        }
    }

    fn take(&mut self) -> Option<Completion> {
        if let Some(done) = self.done.pop() {
            return Some(done);
        }
        if self.broken {
            let request = self.lent.iter_mut().find_map(Option::take)?;
            return Some(Completion { request, result: Err(DiskError::Broken) });
        }
        let token = self.queue.peek_used()?;
        match self.pop(token) {
            Ok(done) => Some(done),
            Err(error) => {
                log::error!("disk: {error}: it is not used any more");
                self.reset();
                self.take()
            }
        }
    }

    /// Takes the chain that begins at descriptor `token` back.
    fn pop(&mut self, token: u16) -> Result<Completion, Error> {
        let index = self.frame_of.get_mut(usize::from(token)).and_then(Option::take).ok_or(Error::WrongToken)?;
        let index = usize::from(index);
        let mut request = self.lent[index].take().ok_or(Error::WrongToken)?;
        // SAFETY: these are the buffers that were added under this token, and the device is done with them.
        let (popped, status) = unsafe {
            let frame = &mut (*self.frames.as_ptr())[index];
            let status = core::slice::from_mut(&mut frame.status);
            let data = request.buffer.as_mut().map_or(&mut [][..], Buffer::bytes_mut);
            let data = &mut data[..request.len];
            let popped = match request.operation {
                Operation::Flush => self.queue.pop_used(token, &[&frame.header], &mut [status]),
                Operation::Write => self.queue.pop_used(token, &[&frame.header, data], &mut [status]),
                Operation::Read | Operation::GetId => self.queue.pop_used(token, &[&frame.header], &mut [data, status]),
            };
            (popped, core::ptr::read_volatile(&(*self.frames.as_ptr())[index].status))
        };
        if let Err(error) = popped {
            // It comes back with the others.
            self.lent[index] = Some(request);
            return Err(error);
        }
        // VIRTIO_BLK_S_* (virtio 1.2, 5.2.6).
        let result = match status {
            0 => Ok(()),
            2 => Err(DiskError::Unsupported),
            _ => Err(DiskError::Io),
        };
        Ok(Completion { request, result })
    }

    /// Takes every buffer from the device, for good.
    fn reset(&mut self) {
        self.transport.set_status(DeviceStatus::empty());
        self.broken = true;
    }
}
