//! Slots that show a virtual machine's memory a second time: at another address, read-only, or both.
//!
//! Protocol: the slots that the machine started with stay; these have numbers between them. Everything else about an update is the core's to decide ([`Vm::set_slot`] of
//! the memory); it waits for grace periods, so nobody asks with one pinned.

use core::fmt;

use crate::arch::cpu;
use entresol_addr::Gpa;
use entresol_slot::{ObjectId, SlotError, SlotRequest};

use super::Vm;
use super::pass_through::FIRST_SLOT;
use super::slots::ALIASES;

/// A slot as it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alias {
    /// Its number.
    pub number: u32,
    /// `entresol_slot::SlotFlags`.
    pub flags: u32,
    /// First guest physical address.
    pub base: u64,
    /// Bytes; 0 deletes.
    pub size: u64,
    /// The memory's byte behind the first.
    pub offset: u64,
}

/// Why it is refused; nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AliasError {
    /// Other numbers are those of the slots that the machine started with.
    NotAnAlias {
        /// What was asked for.
        number: u32,
    },
    /// A zone of coalesced MMIO or a doorbell is there.
    Posted {
        /// What was asked for.
        base: u64,
        /// Its bytes.
        size: u64,
    },
    /// A rule of every slot.
    Slot(SlotError),
}

impl fmt::Display for AliasError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAnAlias { number } => write!(f, "slot {number}: must be from {ALIASES} to {}", FIRST_SLOT - 1),
            Self::Posted { base, size } => {
                write!(f, "base {base:#x}: {size:#x} bytes from there must meet no coalesced zone and no doorbell")
            }
            Self::Slot(error) => error.fmt(f),
        }
    }
}

impl Vm {
    /// Makes, moves, changes or deletes a slot that shows the machine's own memory.
    ///
    /// # Errors
    ///
    /// [`AliasError`]; nothing changed.
    pub fn set_alias(&self, alias: &Alias) -> Result<(), AliasError> {
        let Alias { number, flags, base, size, offset } = *alias;
        if !(ALIASES..FIRST_SLOT).contains(&number) {
            return Err(AliasError::NotAnAlias { number });
        }
        if self.posted.meets(base, size) {
            return Err(AliasError::Posted { base, size });
        }
        let object = ObjectId::new(self.ram.raw());
        self.tracking.with_flags(flags, |flags| {
            let request = SlotRequest { id: number, base: Gpa::new(base), size, object, offset, flags };
            self.memory.set_slot(cpu::index(), &request).map_err(AliasError::Slot)
        })
    }
}
