//! A64 loads and stores that the syndrome does not describe (ESR_EL2.ISS.ISV = 0): what the instruction says.
//!
//! Purpose: a device answers an access only if address, size, direction and registers are known. The hardware tells them
//! for single registers without writeback; for everything else the instruction has to be read from the guest's memory.
//! [`decode`] gives it a type, [`data`] moves bytes between registers and memory order. Nothing here touches a register or
//! memory: that is the caller's, who also decides what an access means.
//!
//! Source: Arm DDI 0487 C4.1 "Loads and Stores" for the encodings, C3.2 for what they do, C6.2 and C7.2 for each one.
//!
//! | instruction | here |
//! |---|---|
//! | LDR, STR and their B, H, SB, SH, SW forms, all addressing modes | yes |
//! | LDUR, STUR; LDTR, STTR (as EL0 would access) | yes |
//! | LDP, STP, LDPSW; LDNP, STNP (the hint means nothing to a device) | yes |
//! | LDR, STR, LDUR, STUR, LDP, STP, LDNP, STNP of B, H, S, D and Q registers | yes |
//! | LDAR, STLR, LDLAR, STLLR, LDAPR, LDAPUR, STLUR | yes: the caller's own barriers order them, an exit is one |
//! | LDR (literal) | yes: data of a program may lie beside a device in virtual addresses |
//! | DC ZVA | yes: stores of zero |
//! | DC and IC by address | yes: some machines fault on them without saying that it is cache maintenance |
//! | exclusives (LDXR, STXR, LDXP, ...) | no: a monitor on a device is nothing that a guest can rely on (B2.12.5), and a loop that waits for STXR to succeed would never end |
//! | LSE atomics, CAS, CASP, SWP | no: no device holds a register still between a read and a write, so that it would not be atomic; hardware may refuse them on any Device memory too (B2.12.7) |
//! | LDRAA, LDRAB | no: their address is authenticated with keys that EL2 does not use |
//! | LD1–LD4, ST1–ST4 | no: no driver uses them on a device |
//! | memory copy and set, tags, LD64B, ST64B | no |
//! | PRFM and its like | never abort |
//!
//! What is CONSTRAINED UNPREDICTABLE (C6.2: a base that is also loaded, a pair into one register) is not decoded either.
//!
//! Invariants: pure; any word is accepted. Register numbers are below 32, sizes are 1, 2, 4, 8 or 16, an access is at most
//! [`MAX_BYTES`] long.

pub mod data;
mod decode;
#[cfg(test)]
mod tests;

use crate::policy::CacheOp;
pub use decode::decode;

/// Bytes of the longest transfer: a pair of Q registers.
pub const MAX_BYTES: usize = 32;

/// A load or store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What it does at its address.
    pub operation: Operation,
    /// Where that is.
    pub address: Address,
}

/// What is done at the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Registers are loaded or stored.
    Transfer(Transfer),
    /// DC ZVA: the block around the address (DCZID_EL0.BS) becomes zero.
    Zero,
    /// Cache maintenance by address.
    Maintain(CacheOp),
}

/// Registers to or from memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Memory is read.
    pub load: bool,
    /// Bytes of one register in memory: 1, 2, 4, 8, and 16 for Q registers.
    pub size: u8,
    /// The first register, at the lower address.
    pub first: u8,
    /// The second, behind it.
    pub second: Option<u8>,
    /// Which registers, and how a load fills them.
    pub bank: Bank,
    /// The access is made with EL0's rights (LDTR, STTR).
    pub unprivileged: bool,
}

/// Which registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bank {
    /// X0–X30; 31 is zero.
    General {
        /// A load extends the sign, else zero.
        sign_extend: bool,
        /// The sign is extended to 64 bits, else to 32; the rest becomes zero.
        wide: bool,
    },
    /// V0–V31; what a load does not fill becomes zero.
    Vector,
}

/// How an address is made, and what becomes of the base register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The base.
    pub base: Base,
    /// What is added to it.
    pub offset: Offset,
    /// When the sum goes back to the base register.
    pub writeback: Writeback,
}

/// A base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// X0–X30; 31 is the stack pointer.
    Register(u8),
    /// The instruction's own address.
    Pc,
    /// Zero: the offset is all.
    Zero,
}

/// An offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offset {
    /// Bytes.
    Immediate(i64),
    /// X0–X30, 31 is zero; extended, then shifted left.
    Register {
        /// Which.
        index: u8,
        /// How it becomes 64 bits.
        extend: Extend,
        /// 0–4.
        shift: u8,
    },
}

/// How an index register becomes 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extend {
    /// The low 32 bits, zero-extended.
    Uxtw,
    /// The low 32 bits, sign-extended.
    Sxtw,
    /// It has 64 already (LSL and SXTX).
    None,
}

/// When a base register changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writeback {
    /// Never.
    None,
    /// Before the access: it is made at the sum.
    Pre,
    /// After the access, which is made at the old base.
    Post,
}

/// An address, made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Where the access begins.
    pub address: u64,
    /// What the base register becomes.
    pub base: Option<u64>,
}

impl Address {
    /// The address with this value of the base; `register` reads a general register, where 31 is zero.
    pub fn resolve(&self, base: u64, register: impl Fn(u8) -> u64) -> Resolved {
        let offset = match self.offset {
            Offset::Immediate(bytes) => bytes as u64,
            Offset::Register { index, extend, shift } => extend.apply(register(index)).wrapping_shl(shift.into()),
        };
        let sum = base.wrapping_add(offset);
        match self.writeback {
            Writeback::None => Resolved { address: sum, base: None },
            Writeback::Pre => Resolved { address: sum, base: Some(sum) },
            Writeback::Post => Resolved { address: base, base: Some(sum) },
        }
    }
}

impl Extend {
    const fn apply(self, value: u64) -> u64 {
        match self {
            Self::Uxtw => value as u32 as u64,
            Self::Sxtw => value as i32 as u64,
            Self::None => value,
        }
    }
}

impl Transfer {
    /// Bytes of the whole access, at most [`MAX_BYTES`].
    pub const fn length(&self) -> usize {
        (self.size as usize) << self.second.is_some() as u32
    }
}
