//! A virtqueue with a buffer for each of its descriptors.
//!
//! Protocol: a buffer is idle, ours to read and write, or lent, the device's. It is lent with [`Ring::send`] or
//! [`Ring::lend_all`] and comes back with [`Ring::take_back`]; nothing here waits. Every chain has one descriptor.
//!
//! Invariants: the buffers live as long as the program; a lent one is not touched. What the device says of a
//! buffer is believed only if it has that buffer.
//!
//! Source: virtio 1.2, 2.7 (split virtqueues).

use alloc::vec::Vec;
use core::ptr::NonNull;

use entresol_sync::atomic::{Ordering, fence};
use virtio_drivers::Error;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

use crate::dma::Identity;

/// A queue of `SIZE` descriptors, a power of two up to 32, with buffers of `BYTES` bytes.
pub struct Ring<const SIZE: usize, const BYTES: usize> {
    queue: VirtQueue<Identity, SIZE>,
    number: u16,
    /// The device fills the buffers; else it reads them.
    fills: bool,
    buffers: NonNull<[u8; BYTES]>,
    /// Bit for each buffer that is ours.
    idle: u32,
    /// The buffer that is lent under each descriptor.
    lent: [Option<u8>; SIZE],
}

// SAFETY: the buffers belong to the ring and to the device alone; which CPU asks for them does not matter.
unsafe impl<const SIZE: usize, const BYTES: usize> Send for Ring<SIZE, BYTES> {}

impl<const SIZE: usize, const BYTES: usize> Ring<SIZE, BYTES> {
    /// Sets up queue `number`, whose buffers the device fills or reads. Before DRIVER_OK.
    ///
    /// # Errors
    ///
    /// [`Error::DmaError`]: the heap has no room. Others: the device has no such queue.
    pub fn new(transport: &mut impl Transport, number: u16, fills: bool) -> Result<Self, Error> {
        const { assert!(SIZE <= 32 && BYTES > 0) };
        let mut buffers = Vec::new();
        buffers.try_reserve_exact(SIZE).map_err(|_| Error::DmaError)?;
        buffers.resize(SIZE, [0; BYTES]);
        let queue = VirtQueue::new(transport, number, false, false)?;
        let buffers = NonNull::from(buffers.leak()).cast();
        let idle = u32::MAX >> (32 - SIZE);
        Ok(Self { queue, number, fills, buffers, idle, lent: [None; SIZE] })
    }

    /// Buffer `index`, which is idle.
    fn buffer(&mut self, index: usize) -> &mut [u8; BYTES] {
        assert!(self.idle >> index & 1 != 0, "buffer {index} is the device's");
        // SAFETY: there are SIZE buffers, `idle` has a bit for each and for no other, and they are never freed. The device
        // does not have this one, and `&mut self` keeps everybody else from it.
        unsafe { self.buffers.add(index).as_mut() }
    }

    fn any_idle(&self) -> Option<usize> {
        (self.idle != 0).then_some(self.idle.trailing_zeros() as usize)
    }

    /// Gives idle buffer `index` to the device: its first `len` bytes to read, or all of it to fill.
    fn lend(&mut self, index: usize, len: usize) -> Result<(), Error> {
        let buffer = NonNull::from(self.buffer(index));
        // SAFETY: the buffer lives as long as the program, and is not touched until `take_back`: its bit in `idle` is
        // cleared below. If the queue refuses it, no reference is kept.
        let token = unsafe {
            if self.fills {
                self.queue.add(&[], &mut [&mut *buffer.as_ptr()])
            } else {
                self.queue.add(&[&(&*buffer.as_ptr())[..len]], &mut [])
            }
        }?;
        self.idle &= !(1 << index);
        self.lent[usize::from(token)] = Some(index as u8);
        Ok(())
    }

    /// Tells the device that it has new buffers.
    fn notify(&mut self, transport: &mut impl Transport) {
        // The index must be visible before the device's wish not to be told is read (virtio 1.2, 2.7.13.4).
        fence(Ordering::SeqCst);
        if self.queue.should_notify() {
            transport.notify(self.number);
        }
    }

    /// Gives every idle buffer to the device, to be filled.
    ///
    /// # Errors
    ///
    /// The queue refuses one.
    pub fn lend_all(&mut self, transport: &mut impl Transport) -> Result<(), Error> {
        while let Some(index) = self.any_idle() {
            self.lend(index, BYTES)?;
        }
        self.notify(transport);
        Ok(())
    }

    /// Copies bytes to idle buffers and gives these to the device; returns how many there was room for.
    ///
    /// # Errors
    ///
    /// The queue refuses one.
    pub fn send(&mut self, transport: &mut impl Transport, bytes: &[u8]) -> Result<usize, Error> {
        let mut rest = bytes;
        while let Some(index) = self.any_idle().filter(|_| !rest.is_empty()) {
            let (piece, after) = rest.split_at(rest.len().min(BYTES));
            self.buffer(index)[..piece.len()].copy_from_slice(piece);
            self.lend(index, piece.len())?;
            rest = after;
        }
        let sent = bytes.len() - rest.len();
        if sent > 0 {
            self.notify(transport);
        }
        Ok(sent)
    }

    /// Whether the device has given a buffer back that is not yet taken.
    pub fn has_come_back(&self) -> bool {
        self.queue.can_pop()
    }

    /// Takes the next buffer that the device gave back: what it filled it with.
    ///
    /// # Errors
    ///
    /// The device gives back what it does not have.
    pub fn take_back(&mut self) -> Result<Option<&[u8]>, Error> {
        let Some(token) = self.queue.peek_used() else { return Ok(None) };
        let index = self.lent.get_mut(usize::from(token)).and_then(Option::take).ok_or(Error::WrongToken)?;
        // SAFETY: this is the buffer that was lent under this token: one descriptor, and the device is done with it.
        let len = unsafe {
            let buffer = self.buffers.add(usize::from(index)).as_mut();
            if self.fills {
                self.queue.pop_used(token, &[], &mut [buffer])
            } else {
                self.queue.pop_used(token, &[buffer], &mut [])
            }
        }?;
        self.idle |= 1 << index;
        let len = (len as usize).min(BYTES);
        Ok(Some(&self.buffer(usize::from(index))[..len]))
    }

    /// Takes back every buffer that the device has read.
    ///
    /// # Errors
    ///
    /// As [`Ring::take_back`].
    pub fn reclaim(&mut self) -> Result<(), Error> {
        while self.take_back()?.is_some() {}
        Ok(())
    }

    /// Whether the device has no buffer.
    pub fn is_idle(&self) -> bool {
        self.idle.count_ones() as usize == SIZE
    }

    /// Says whether the device shall interrupt when it gives a buffer back. What came back before may not interrupt: look
    /// with [`Ring::has_come_back`] after.
    pub fn interrupts(&mut self, wanted: bool) {
        self.queue.set_dev_notify(wanted);
        // As above, the other way round (virtio 1.2, 2.7.10).
        fence(Ordering::SeqCst);
    }
}
