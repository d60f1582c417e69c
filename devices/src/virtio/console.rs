//! Console device (virtio 5.3), with one port.
//!
//! Purpose: a console that moves lines at a time where the serial port moves bytes.
//!
//! Protocol: queue 0 brings input to the guest, queue 1 brings its output. Output goes to the [`Terminal`] inside the
//! notification. Input goes straight into buffers that the driver has put up: [`VirtioMmio::offer`] takes what they
//! hold and no more, so nothing is lost before a driver is there. When it took less than all,
//! [`Terminal::input_wanted`] comes once the driver has put up more. Before there is a driver at work, a store to
//! `emerg_wr` in the configuration space sends a byte (virtio 5.3.4).
//!
//! Invariants: each byte of output reaches the terminal once, whatever interrupts the work; its progress is kept with
//! the queue.
//!
//! Lock order: the device's lock, then the terminal's `put`. `input_wanted` is called with no lock held.

use alloc::sync::Arc;
use alloc::vec::Vec;

use virtio::console::F;

use super::queue::Queue;
use super::{Broken, OutOfMemory, Service, Stop, VirtioDevice, VirtioMmio, bounce, registers};
use crate::bus::{GuestMemory, Interrupt, Terminal, Work};

/// The queue of input to the guest.
const RECEIVE: usize = 0;

/// Offset of `emerg_wr` in the configuration space.
const EMERGENCY_WRITE: u64 = 8;

/// Size of a terminal's screen in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Size {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// A console on a terminal.
pub struct Console {
    terminal: Arc<dyn Terminal>,
    size: Option<Size>,
    buffer: Vec<u8>,
    /// Input was refused since the terminal was last called for more.
    refused: bool,
    /// The driver has put up buffers that input may go to.
    room: bool,
}

impl Console {
    /// A console on `terminal`, whose size may be known.
    ///
    /// # Errors
    ///
    /// If the heap has no room for its buffer.
    pub fn new(terminal: Arc<dyn Terminal>, size: Option<Size>) -> Result<Self, OutOfMemory> {
        Ok(Self { terminal, size, buffer: bounce()?, refused: false, room: false })
    }

    /// The same for a copy of the virtual machine, on the copy's terminal. Input that this one's host still holds is not the
    /// copy's.
    ///
    /// # Errors
    ///
    /// If the heap has no room for its buffer.
    pub fn fork(&self, terminal: Arc<dyn Terminal>) -> Result<Self, OutOfMemory> {
        Ok(Self { room: self.room, ..Self::new(terminal, self.size)? })
    }

    /// Takes the guest's output.
    fn send(&mut self, queue: &mut Queue, service: &mut Service<'_>) -> Result<Work, Stop> {
        while !service.is_spent() {
            let Some(head) = service.next(queue)? else { return Ok(Work::Idle) };
            let bytes = service.chain.readable_bytes();
            while queue.progress < bytes {
                if service.is_spent() {
                    return Ok(Work::More);
                }
                let rest = usize::try_from(bytes - queue.progress).unwrap_or(usize::MAX);
                let piece_bytes = rest.min(self.buffer.len());
                let piece = &mut self.buffer[..piece_bytes];
                service.chain.read(service.memory, queue.progress, piece)?;
                self.terminal.put(piece);
                service.spend(piece_bytes);
                queue.progress += piece_bytes as u64;
            }
            queue.complete(service.memory, head, 0)?;
        }
        Ok(Work::More)
    }

    /// Gives the guest input; `taken` counts what buffers were filled with.
    fn receive(
        &mut self,
        bytes: &[u8],
        taken: &mut usize,
        queue: &mut Queue,
        service: &mut Service<'_>,
    ) -> Result<Work, Stop> {
        while let Some(rest) = bytes.get(*taken..).filter(|rest| !rest.is_empty()) {
            if service.is_spent() {
                self.room = true;
                return Ok(Work::Idle);
            }
            let Some(head) = service.next(queue)? else { return Ok(Work::Idle) };
            let room = usize::try_from(service.chain.writable_bytes()).unwrap_or(usize::MAX);
            if room == 0 {
                return Err(Broken::Request.into());
            }
            let piece = &rest[..rest.len().min(room)];
            service.chain.write(service.memory, 0, piece)?;
            queue.complete(service.memory, head, u32::try_from(piece.len()).unwrap_or(u32::MAX))?;
            service.spend(piece.len());
            *taken += piece.len();
        }
        Ok(Work::Idle)
    }
}

impl VirtioDevice for Console {
    const ID: virtio::Id = virtio::Id::Console;
    const QUEUES: usize = 2;

    fn features(&self) -> u64 {
        let mut features = F::EMERG_WRITE;
        if self.size.is_some() {
            features |= F::SIZE;
        }
        features.bits().to_ne() as u64
    }

    fn config(&self) -> [u8; registers::CONFIG_BYTES] {
        let mut config = [0; registers::CONFIG_BYTES];
        if let Some(size) = self.size {
            config[0..2].copy_from_slice(&size.columns.to_le_bytes());
            config[2..4].copy_from_slice(&size.rows.to_le_bytes());
        }
        // One port (virtio 5.3.4): read only with a feature that is not offered, and true all the same.
        config[4..8].copy_from_slice(&1u32.to_le_bytes());
        config
    }

    fn write_config(&mut self, offset: u64, size: u8, value: u64) {
        if offset == EMERGENCY_WRITE && matches!(size, 1 | 2 | 4) {
            self.terminal.put(&[value as u8]);
        }
    }

    fn serve(&mut self, index: usize, queue: &mut Queue, service: &mut Service<'_>) -> Result<Work, Stop> {
        if index != RECEIVE {
            return self.send(queue, service);
        }
        self.room = service.next(queue)?.is_some();
        Ok(Work::Idle)
    }

    fn input_wanted(&mut self) -> Option<Arc<dyn Terminal>> {
        if !(self.refused && self.room) {
            return None;
        }
        self.refused = false;
        self.room = false;
        Some(self.terminal.clone())
    }
}

impl<M: GuestMemory, L: Interrupt> VirtioMmio<Console, M, L> {
    /// Gives the guest input; returns how many of the first bytes it took. The rest is to be offered again after
    /// [`Terminal::input_wanted`].
    pub fn offer(&self, bytes: &[u8]) -> usize {
        self.access(|state, memory| {
            let mut taken = 0;
            state.device.room = false;
            state.serve_with(memory, RECEIVE, |console, queue, service| {
                console.receive(bytes, &mut taken, queue, service)
            });
            state.device.refused |= taken < bytes.len();
            taken
        })
    }

    /// Tells the guest that its terminal has another size. Without effect if the console was made without one.
    pub fn resize(&self, size: Size) {
        self.access(|state, _| {
            if state.device.size.is_some_and(|old| old != size) {
                state.device.size = Some(size);
                state.config_changed();
            }
        });
    }
}
