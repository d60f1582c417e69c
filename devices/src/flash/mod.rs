//! NOR flash with the Intel command set (CFI primary command set 0x0001), as QEMU's `virt` has it: two 16-bit chips side by
//! side on a 32-bit bus, in erase blocks of 256 KiB across both.
//!
//! Purpose: a guest keeps settings in it over its resets: EDK2's NorFlash driver, U-Boot's and Linux's CFI drivers. The
//! bytes are somebody else's ([`Backing`]).
//!
//! Protocol: while the chips read their arrays the backing is *shown*: the guest reads it as memory, without an exit, and only
//! its stores come here. A command hides it; then loads come here too, and both chips answer what their mode says. When they read
//! their arrays again it is shown again. A command completes before its store does, so the status is always "ready".
//!
//! Both chips hear every store, whatever its width, as QEMU's do: U-Boot takes the bank for one of 16 bits, and finds its settings
//! saved because of that. A store's first byte is the command; where data is due, its bytes are the data.
//!
//! Invariants: the cells change only while they are hidden, and by a chip's own program and erase operations alone (INV-13): so
//! no translation of a guest's reaches bytes that change, and what maps them anew makes them visible (INV-1). Programming
//! only clears bits; only erasing sets them. One store erases at most one block, of 256 KiB, and allocates nothing.
//!
//! Lock order: the flash's lock, then the backing's.
//!
//! Known holes: blocks are unlocked at power-on, as QEMU's are, where a real part locks them. There is no suspend, no protection
//! register and no time: whatever asks for those is ignored. One chip cannot be spoken to alone.
//!
//! Sources: Intel, StrataFlash Embedded Memory (P30) datasheet 306666, "Device Command Codes" and "Status Register"; JEDEC
//! JEP137B and JESD68.01 (CFI).

mod cfi;
mod chip;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use entresol_sync::Mutex;

use crate::bus::{Device, Work};
use chip::{Action, BUFFER, Chip, Mode};

/// Bytes of an erase block, across both chips.
pub const BLOCK: u64 = 256 << 10;
/// Most bytes of a flash: a bank of QEMU's `virt`.
pub const MAX_SIZE: u64 = 64 << 20;

/// Chips side by side.
const CHIPS: usize = 2;
/// Bytes of a word of the bus: one word of each chip.
const WORD: u64 = 4;
/// Bytes that are changed at a time.
const PIECE: usize = 4096;

// A buffered program is one piece, and a block is whole pieces.
const _: () = assert!(BUFFER <= PIECE && BLOCK.is_multiple_of(PIECE as u64));

/// Why cells could not be read or written. None of them changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingError;

/// Where the bytes of a flash are, and what the guest sees of them.
pub trait Backing: Send + Sync {
    /// Bytes: a power of two, from [`BLOCK`] to [`MAX_SIZE`]. It never changes.
    fn size(&self) -> u64;

    /// Copies the bytes at `offset` to `to`. The range lies inside.
    ///
    /// # Errors
    ///
    /// [`BackingError`].
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), BackingError>;

    /// Stores `from`, at most a page and its neighbour, at `offset`. The range lies inside.
    ///
    /// # Errors
    ///
    /// [`BackingError`], out of memory for one; nothing changed.
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), BackingError>;

    /// From now on the guest reads the bytes as memory. False if it cannot: then its loads go on to come to the flash, which
    /// asks again after the next store.
    fn show(&self) -> bool;

    /// When this returns no access of the guest reaches the bytes.
    fn hide(&self);
}

/// Why there is no flash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlashError {
    /// The backing's size is not one that a flash has.
    Size {
        /// Bytes.
        value: u64,
    },
    /// The heap has no room.
    OutOfMemory,
}

impl fmt::Display for FlashError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size { value } => {
                write!(f, "flash = {value:#x} bytes: must be a power of two from {BLOCK:#x} to {MAX_SIZE:#x}")
            }
            Self::OutOfMemory => f.write_str("the heap has no room for a flash"),
        }
    }
}

/// A bank of flash.
pub struct Flash<B> {
    state: Mutex<State>,
    backing: B,
    size: u64,
}

struct State {
    chip: Chip,
    shown: bool,
    /// Bytes on their way from and to the backing.
    piece: Box<[u8]>,
}

impl<B: Backing> Flash<B> {
    /// A flash at power-on. Its backing is shown already.
    ///
    /// # Errors
    ///
    /// [`FlashError`].
    pub fn new(backing: B) -> Result<Self, FlashError> {
        let size = backing.size();
        if !size.is_power_of_two() || !(BLOCK..=MAX_SIZE).contains(&size) {
            return Err(FlashError::Size { value: size });
        }
        Self::with(backing, Chip::new()?, true)
    }

    fn with(backing: B, chip: Chip, shown: bool) -> Result<Self, FlashError> {
        let mut piece = Vec::new();
        piece.try_reserve_exact(PIECE).map_err(|_| FlashError::OutOfMemory)?;
        piece.resize(PIECE, 0);
        let (size, state) = (backing.size(), State { chip, shown, piece: piece.into_boxed_slice() });
        Ok(Self { state: Mutex::new(state), backing, size })
    }

    /// A flash in the same state, in the middle of a command too, over `backing`: as long, with the same bytes, and shown if this
    /// one is.
    ///
    /// # Errors
    ///
    /// [`FlashError::OutOfMemory`].
    pub fn fork<C: Backing>(&self, backing: C) -> Result<Flash<C>, FlashError> {
        let state = self.state.lock();
        Flash::with(backing, state.chip.fork()?, state.shown)
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The part of `size` bytes at `offset` that lies in the flash, 8 at most.
    fn inside(&self, offset: u64, size: u8) -> usize {
        self.size.saturating_sub(offset).min(u64::from(size)).min(8) as usize
    }
}

impl<B: Backing> Device for Flash<B> {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let mut bytes = [0; 8];
        let bytes_here = &mut bytes[..self.inside(offset, size)];
        if bytes_here.is_empty() {
            return 0;
        }
        let state = self.state.lock();
        if state.chip.mode() == Mode::Array {
            if self.backing.read(offset, bytes_here).is_err() {
                // An array that cannot be read floats.
                bytes_here.fill(0xff);
            }
            return u64::from_le_bytes(bytes);
        }
        for (at, byte) in (offset..).zip(bytes_here) {
            let register = state.chip.register(at, self.size / CHIPS as u64);
            *byte = register.to_le_bytes()[(at % 2) as usize];
        }
        u64::from_le_bytes(bytes)
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Work {
        let bytes = &value.to_le_bytes()[..self.inside(offset, size)];
        let mut state = self.state.lock();
        // The bus has 32 bits: what is wider is two stores.
        for (offset, bytes) in (offset..).step_by(WORD as usize).zip(bytes.chunks(WORD as usize)) {
            state.store(&self.backing, offset, bytes);
        }
        Work::Idle
    }

    fn reset(&self) {
        let mut state = self.state.lock();
        state.chip.reset();
        state.follow(&self.backing);
    }
}

impl State {
    /// A store to the chips.
    fn store(&mut self, backing: &impl Backing, offset: u64, bytes: &[u8]) {
        let action = self.chip.store(offset, bytes);
        // Before a command may change cells.
        self.follow(backing);
        if let Some(action) = action {
            let done = match action {
                Action::Program { first, count } => self.program(backing, first, count),
                Action::Erase { block } => self.erase(backing, block),
            };
            self.chip.ended(action, done);
        }
    }

    /// Shows or hides the backing as the chips' mode says.
    fn follow(&mut self, backing: &impl Backing) {
        match (self.chip.mode() == Mode::Array, self.shown) {
            (true, false) => self.shown = backing.show(),
            (false, true) => {
                backing.hide();
                self.shown = false;
            }
            (true, true) | (false, false) => {}
        }
    }

    /// Clears the bits of `count` bytes from `first` that the buffer has clear.
    fn program(&mut self, backing: &impl Backing, first: u64, count: usize) -> Result<(), BackingError> {
        assert!(!self.shown, "cells change only while they are hidden");
        let piece = &mut self.piece[..count];
        backing.read(first, piece)?;
        piece.iter_mut().zip(self.chip.buffer()).for_each(|(cell, value)| *cell &= value);
        backing.write(first, piece)
    }

    /// Sets every bit of block `block`. If it stops, the pieces before are erased.
    fn erase(&mut self, backing: &impl Backing, block: u64) -> Result<(), BackingError> {
        assert!(!self.shown, "cells change only while they are hidden");
        self.piece.fill(0xff);
        let start = block * BLOCK;
        (start..start + BLOCK).step_by(PIECE).try_for_each(|offset| backing.write(offset, &self.piece))
    }
}

#[cfg(test)]
mod tests;
