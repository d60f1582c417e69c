//! The I/O APIC (Intel 82093AA, 290566): inputs, and what each of them sends.
//!
//! A level-triggered input that is high sends once and waits (remote IRR) until the vCPU ends the interrupt; if it is still high
//! then, it sends again. An edge on an input that is masked is lost, as on the chip.
//!
//! Invariants: remote IRR is set only in level-triggered entries. Polarity is kept and not looked at: lines here say whether they
//! are active.

use serde::{Deserialize, Serialize};

use super::MAX_INPUTS;
use super::message::Message;
use crate::saved::{BadState, check};

/// Version 11h: without a register for EOI.
const VERSION: u32 = 0x11;

/// Offsets of the two registers in memory.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

/// Indices behind the window.
mod index {
    pub const ID: u8 = 0;
    pub const VERSION: u8 = 1;
    pub const ARBITRATION: u8 = 2;
    pub const REDIRECTION: u8 = 0x10;
}

/// Bits of a redirection entry.
mod entry {
    pub const STATUS: u64 = 1 << 12;
    pub const REMOTE_IRR: u64 = 1 << 14;
    pub const LEVEL: u64 = 1 << 15;
    pub const MASKED: u64 = 1 << 16;
    /// What can be stored.
    pub const WRITABLE: u64 = 0xff << 56 | 0x1_afff;
}

const ROW: usize = 16;

/// Its state.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Io {
    id: u8,
    select: u8,
    /// Rows of 16, which have a saved form.
    entries: [[u64; ROW]; MAX_INPUTS / ROW],
    /// Lines as their devices drive them.
    high: u64,
}

impl Io {
    /// After power-on: everything masked.
    pub const fn new(id: u8) -> Self {
        Self { id, select: 0, entries: [[entry::MASKED; ROW]; MAX_INPUTS / ROW], high: 0 }
    }

    /// Back to that, with the lines as they are.
    pub fn reset(&mut self, id: u8) {
        *self = Self { high: self.high, ..Self::new(id) };
    }

    /// Whether a state that was read may be used.
    pub fn check(&self) -> Result<(), BadState> {
        let right = |entry: &u64| {
            entry & !(entry::WRITABLE | entry::REMOTE_IRR) == 0
                && (entry & entry::REMOTE_IRR == 0 || entry & entry::LEVEL != 0)
        };
        check(self.entries.iter().flatten().all(right), "apic.io.entries", "must have no bits that an entry has not")?;
        check(self.high >> MAX_INPUTS == 0, "apic.io.high", "must have as many lines as there are inputs")
    }

    fn entry(&mut self, input: usize) -> &mut u64 {
        &mut self.entries[input / ROW][input % ROW]
    }

    /// A load of four bytes at `offset`.
    pub fn load(&self, offset: u64) -> u32 {
        match offset {
            SELECT => u32::from(self.select),
            WINDOW => self.window(),
            _ => 0,
        }
    }

    fn window(&self) -> u32 {
        match self.select {
            index::ID | index::ARBITRATION => u32::from(self.id) << 24,
            index::VERSION => VERSION | (MAX_INPUTS as u32 - 1) << 16,
            select => match place(select) {
                Some((input, high)) => (self.entries[input / ROW][input % ROW] >> if high { 32 } else { 0 }) as u32,
                None => 0,
            },
        }
    }

    /// A store of four bytes at `offset`; what is to be sent.
    pub fn store(&mut self, offset: u64, value: u32) -> Option<(usize, Message)> {
        match offset {
            SELECT => self.select = value as u8,
            WINDOW if self.select == index::ID => self.id = (value >> 24) as u8,
            WINDOW => {
                let (input, high) = place(self.select)?;
                self.redirect(input, high, value);
                return self.level(input);
            }
            _ => {}
        }
        None
    }

    fn redirect(&mut self, input: usize, high: bool, value: u32) {
        let entry = self.entry(input);
        let (shift, kept) = if high { (32, 0xffff_ffff) } else { (0, !0xffff_ffff) };
        let own = *entry & (entry::STATUS | entry::REMOTE_IRR);
        let new = (*entry & kept | u64::from(value) << shift) & entry::WRITABLE;
        // An entry that becomes edge-triggered waits for nobody: kernels end interrupts so where they must.
        let own = if new & entry::LEVEL == 0 { own & !entry::REMOTE_IRR } else { own };
        *entry = new | own;
    }

    /// A line changes; what is to be sent.
    pub fn drive(&mut self, input: usize, high: bool) -> Option<(usize, Message)> {
        let was = self.high >> input & 1 != 0;
        self.high = self.high & !(1 << input) | u64::from(high) << input;
        let entry = *self.entry(input);
        if entry & entry::LEVEL != 0 {
            return self.level(input);
        }
        (high && !was && entry & entry::MASKED == 0)
            .then(|| Message::redirection(entry))
            .flatten()
            .map(|it| (input, it))
    }

    /// What a level-triggered input sends now.
    fn level(&mut self, input: usize) -> Option<(usize, Message)> {
        let entry = *self.entry(input);
        let sends = entry & (entry::LEVEL | entry::MASKED | entry::REMOTE_IRR) == entry::LEVEL;
        (sends && self.high >> input & 1 != 0).then(|| Message::redirection(entry)).flatten().map(|it| (input, it))
    }

    /// Somebody accepted what a level-triggered input sent.
    pub fn accepted(&mut self, input: usize) {
        let entry = self.entry(input);
        if *entry & entry::LEVEL != 0 {
            *entry |= entry::REMOTE_IRR;
        }
    }

    /// An interrupt with `vector` ended at a vCPU: what `input` sends again, if it waited for that.
    pub fn ended(&mut self, input: usize, vector: u8) -> Option<(usize, Message)> {
        let entry = self.entry(input);
        if *entry & entry::REMOTE_IRR == 0 || *entry as u8 != vector {
            return None;
        }
        *entry &= !entry::REMOTE_IRR;
        self.level(input)
    }
}

/// The input that an index behind the window belongs to, and whether it is the entry's high half.
fn place(select: u8) -> Option<(usize, bool)> {
    let at = usize::from(select.checked_sub(index::REDIRECTION)?);
    (at / 2 < MAX_INPUTS).then_some((at / 2, at % 2 != 0))
}
