//! The chips' command interface: which command they are in, what they read as, and what they are told to do to their cells.
//!
//! Pure: a store is an offset and up to four bytes; what must happen to the cells is an [`Action`], whose end the bank tells.
//! Both chips are always in one state, so there is one.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::{BLOCK, BackingError, CHIPS, FlashError, WORD, cfi};

/// Bytes of the write buffer: what [`cfi`] says of one chip's.
pub const BUFFER: usize = CHIPS << cfi::BUFFER_SHIFT;
/// Most stores that fill it: a word of 32 bits each.
const MOST_STORES: usize = BUFFER / WORD as usize;

/// First cycles of commands (P30 datasheet, "Device Command Codes").
mod command {
    pub const PROGRAM_ALTERNATE: u8 = 0x10;
    pub const ERASE: u8 = 0x20;
    pub const PROGRAM: u8 = 0x40;
    pub const CLEAR_STATUS: u8 = 0x50;
    pub const PROTECT: u8 = 0x60;
    pub const READ_STATUS: u8 = 0x70;
    pub const READ_IDENTIFIER: u8 = 0x90;
    pub const READ_QUERY: u8 = 0x98;
    pub const BUFFERED_PROGRAM: u8 = 0xe8;
    pub const READ_ARRAY: u8 = 0xff;
}

/// Second cycles.
mod confirm {
    pub const LOCK: u8 = 0x01;
    pub const CONFIGURE: u8 = 0x03;
    pub const LOCK_DOWN: u8 = 0x2f;
    /// Of erase, buffered program and unlock.
    pub const GO: u8 = 0xd0;
}

/// Bits of the status register (P30 datasheet, "Status Register").
mod status {
    pub const LOCKED: u8 = 1 << 1;
    /// The supply was not good: what stands for a backing without memory.
    pub const SUPPLY: u8 = 1 << 3;
    pub const PROGRAM: u8 = 1 << 4;
    pub const ERASE: u8 = 1 << 5;
    /// Both: the cycles made no command.
    pub const SEQUENCE: u8 = PROGRAM | ERASE;
    pub const READY: u8 = 1 << 7;
}

/// What the chips read as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Its cells.
    Array,
    /// Its status register.
    Status,
    /// Who made it, what it is, which blocks are locked.
    Identifier,
    /// The CFI table.
    Query,
}

/// What is to be done to the cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The first `count` bytes of the buffer, to offset `first` and those behind it, all in one block.
    Program {
        /// First byte.
        first: u64,
        /// Bytes.
        count: usize,
    },
    /// Every byte of a block.
    Erase {
        /// The block.
        block: u64,
    },
}

/// What the next store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// A command.
    Command,
    /// New values of some cells.
    Program,
    /// The confirmation of an erasure.
    Erase,
    /// What shall become of a block's lock.
    Protect,
    /// The number of stores for the buffer less one; they go to this block.
    Count { block: u64 },
    /// Bytes for the buffer.
    Data(Fill),
    /// The confirmation of a buffered program.
    Confirm(Fill),
}

/// A write buffer that is being filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fill {
    /// The block that the command named.
    block: u64,
    /// Where its first byte goes, once there was one.
    first: Option<u64>,
    /// Bytes from there to the last that was given.
    count: usize,
    /// Stores still to come: at least one until all are there.
    left: usize,
    /// Every store so far had an address that it may have.
    good: bool,
}

/// Bits for the blocks.
const LOCKS: usize = (super::MAX_SIZE / BLOCK).div_ceil(64) as usize;

/// The chips' state.
pub struct Chip {
    mode: Mode,
    next: Next,
    /// Errors since they were cleared.
    errors: u8,
    /// A bit for each block.
    locked: [u64; LOCKS],
    buffer: Box<[u8]>,
}

impl Chip {
    /// At power-on.
    ///
    /// # Errors
    ///
    /// [`FlashError::OutOfMemory`].
    pub fn new() -> Result<Self, FlashError> {
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(BUFFER).map_err(|_| FlashError::OutOfMemory)?;
        buffer.resize(BUFFER, u8::MAX);
        let buffer = buffer.into_boxed_slice();
        Ok(Self { mode: Mode::Array, next: Next::Command, errors: 0, locked: [0; LOCKS], buffer })
    }

    /// Chips in the same state.
    ///
    /// # Errors
    ///
    /// [`FlashError::OutOfMemory`].
    pub fn fork(&self) -> Result<Self, FlashError> {
        let mut copy = Self::new()?;
        copy.buffer.copy_from_slice(&self.buffer);
        (copy.mode, copy.next, copy.errors, copy.locked) = (self.mode, self.next, self.errors, self.locked);
        Ok(copy)
    }

    /// Back to power-on.
    pub fn reset(&mut self) {
        (self.mode, self.next, self.errors) = (Mode::Array, Next::Command, 0);
        self.locked.fill(0);
    }

    /// What it reads as.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// What it was given to program.
    pub fn buffer(&self) -> &[u8] {
        &self.buffer
    }

    /// What each chip gives for `offset` in a mode that is not [`Mode::Array`]; each has `bytes` bytes.
    pub fn register(&self, offset: u64, bytes: u64) -> u16 {
        match self.mode {
            Mode::Array | Mode::Status => (status::READY | self.errors).into(),
            Mode::Identifier => match offset % BLOCK / WORD {
                0 => cfi::MANUFACTURER.into(),
                1 => cfi::DEVICE.into(),
                2 => self.is_locked(offset / BLOCK).into(),
                _ => 0,
            },
            Mode::Query => cfi::query(offset / WORD, bytes).into(),
        }
    }

    /// A store of `data`, four bytes at most, to `offset`: what must be done to the cells.
    pub fn store(&mut self, offset: u64, data: &[u8]) -> Option<Action> {
        let (low, block) = (data.first().copied().unwrap_or(0), offset / BLOCK);
        match core::mem::replace(&mut self.next, Next::Command) {
            Next::Command => self.command(block, low),
            Next::Program => {
                self.buffer[..data.len()].copy_from_slice(data);
                let action = Action::Program { first: offset, count: data.len() };
                return self.unless_locked(block, status::PROGRAM, action);
            }
            Next::Erase if low == confirm::GO => {
                return self.unless_locked(block, status::ERASE, Action::Erase { block });
            }
            Next::Protect => self.protect(block, low),
            Next::Count { block: asked } => match count(data) {
                Some(left) if asked == block => {
                    self.buffer.fill(u8::MAX);
                    self.next = Next::Data(Fill { block, first: None, count: 0, left, good: true });
                }
                _ => self.errors |= status::SEQUENCE,
            },
            Next::Data(fill) => self.data(fill, offset, data),
            // At whatever address: EDK2 confirms at the bank's first.
            Next::Confirm(Fill { block, first: Some(first), count, good: true, .. }) if low == confirm::GO => {
                return self.unless_locked(block, status::PROGRAM, Action::Program { first, count });
            }
            Next::Erase | Next::Confirm(_) => self.errors |= status::SEQUENCE,
        }
        None
    }

    fn command(&mut self, block: u64, low: u8) {
        let (mode, next) = match low {
            command::READ_ARRAY => (Mode::Array, Next::Command),
            command::READ_STATUS => (Mode::Status, Next::Command),
            command::READ_IDENTIFIER => (Mode::Identifier, Next::Command),
            command::READ_QUERY => (Mode::Query, Next::Command),
            command::PROGRAM | command::PROGRAM_ALTERNATE => (Mode::Status, Next::Program),
            command::ERASE => (Mode::Status, Next::Erase),
            command::PROTECT => (Mode::Status, Next::Protect),
            command::BUFFERED_PROGRAM => (Mode::Status, Next::Count { block }),
            command::CLEAR_STATUS => {
                self.errors = 0;
                return;
            }
            // Suspend and resume of what is done already, other makers' commands, noise.
            _ => return,
        };
        (self.mode, self.next) = (mode, next);
    }

    fn protect(&mut self, block: u64, low: u8) {
        let bit = 1 << (block % 64);
        let Some(locked) = self.locked.get_mut(block as usize / 64) else { return };
        match low {
            confirm::LOCK | confirm::LOCK_DOWN => *locked |= bit,
            confirm::GO => *locked &= !bit,
            // How the bus is clocked: there is no clock.
            confirm::CONFIGURE => {}
            _ => self.errors |= status::SEQUENCE,
        }
    }

    /// Bytes for the buffer. As many stores as were announced are taken whatever their addresses: data never becomes a command.
    fn data(&mut self, mut fill: Fill, offset: u64, data: &[u8]) {
        let first = *fill.first.get_or_insert(offset);
        let end = (offset.wrapping_sub(first) as usize).saturating_add(data.len());
        // From the first on, in the buffer, and all in the command's block.
        let last = offset + data.len() as u64 - 1;
        fill.good &= end <= BUFFER && first / BLOCK == fill.block && last / BLOCK == fill.block;
        if fill.good {
            self.buffer[end - data.len()..end].copy_from_slice(data);
            fill.count = fill.count.max(end);
        }
        fill.left -= 1;
        self.next = if fill.left == 0 { Next::Confirm(fill) } else { Next::Data(fill) };
    }

    fn is_locked(&self, block: u64) -> bool {
        self.locked.get(block as usize / 64).is_some_and(|bits| bits >> (block % 64) & 1 != 0)
    }

    fn unless_locked(&mut self, block: u64, error: u8, action: Action) -> Option<Action> {
        if self.is_locked(block) {
            self.errors |= error | status::LOCKED;
            return None;
        }
        Some(action)
    }

    /// How `action` ended.
    pub fn ended(&mut self, action: Action, done: Result<(), BackingError>) {
        let error = match action {
            Action::Program { .. } => status::PROGRAM,
            Action::Erase { .. } => status::ERASE,
        };
        if done.is_err() {
            self.errors |= error | status::SUPPLY;
        }
    }
}

/// How many stores `data` announces, if that many fit into the buffer.
fn count(data: &[u8]) -> Option<usize> {
    let more = u16::from_le_bytes([*data.first()?, data.get(1).copied().unwrap_or(0)]);
    Some(usize::from(more) + 1).filter(|count| *count <= MOST_STORES)
}
