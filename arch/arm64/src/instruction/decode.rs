//! Words to instructions. One function for each encoding group of Arm DDI 0487 C4.1 "Loads and Stores", in its order.

use crate::policy::{self, CacheOp, Policy};
use crate::sysreg::SysReg;

use super::{Address, Bank, Base, Extend, Instruction, Offset, Operation, Transfer, Writeback};

/// The load or store that `word` encodes; `None` for what the module's table leaves out, and for every other instruction.
pub const fn decode(word: u32) -> Option<Instruction> {
    // SYS: op1 18:16, CRn 15:12, CRm 11:8, op2 7:5.
    if word & 0xfff8_0000 == 0xd508_0000 {
        return maintenance(word);
    }
    // op0, bits 29:27, and V, bit 26, where a group is for both banks.
    match (word >> 27) & 0b111 {
        0b001 => ordered(word),
        0b011 if bit(word, 24) => ordered_unscaled(word),
        0b011 => literal(word),
        0b101 if !bit(word, 25) => pair(word),
        0b111 if !bit(word, 25) => register(word),
        _ => None,
    }
}

/// DC and IC by address, as [`policy::answer`] knows them.
const fn maintenance(word: u32) -> Option<Instruction> {
    let [op1, crn, crm, op2] = [field(word, 16, 3), field(word, 12, 4), field(word, 8, 4), field(word, 5, 3)];
    let operation = match policy::answer(SysReg::new(1, op1 as u8, crn as u8, crm as u8, op2 as u8), false) {
        Policy::Cache(CacheOp::Zero) => Operation::Zero,
        Policy::Cache(CacheOp::InstructionAll) => return None,
        Policy::Cache(operation) => Operation::Maintain(operation),
        _ => return None,
    };
    // Register 31 is zero here, not the stack pointer.
    let offset = Offset::Register { index: rt(word), extend: Extend::None, shift: 0 };
    Some(Instruction { operation, address: Address { base: Base::Zero, offset, writeback: Writeback::None } })
}

const fn bit(word: u32, number: u32) -> bool {
    word & 1 << number != 0
}

const fn field(word: u32, low: u32, bits: u32) -> u32 {
    (word >> low) & ((1 << bits) - 1)
}

/// The same, as a two's complement number.
const fn signed(word: u32, low: u32, bits: u32) -> i64 {
    ((word << (32 - low - bits)) as i32 >> (32 - bits)) as i64
}

const fn rt(word: u32) -> u8 {
    field(word, 0, 5) as u8
}

const fn rn(word: u32) -> u8 {
    field(word, 5, 5) as u8
}

const fn plain(base: u8, offset: i64) -> Address {
    Address { base: Base::Register(base), offset: Offset::Immediate(offset), writeback: Writeback::None }
}

const fn single(load: bool, size: u8, first: u8, bank: Bank) -> Transfer {
    Transfer { load, size, first, second: None, bank, unprivileged: false }
}

/// An instruction, unless its registers make it CONSTRAINED UNPREDICTABLE.
const fn checked(transfer: Transfer, address: Address) -> Option<Instruction> {
    let general = matches!(transfer.bank, Bank::General { .. });
    if let Some(second) = transfer.second
        && transfer.load
        && second == transfer.first
    {
        return None;
    }
    if let (Base::Register(base), true) = (address.base, general && !matches!(address.writeback, Writeback::None))
        && base != 31
    {
        let second = matches!(transfer.second, Some(second) if second == base);
        if transfer.first == base || second {
            return None;
        }
    }
    Some(Instruction { operation: Operation::Transfer(transfer), address })
}

/// Load/store ordered: LDAR, STLR, LDLAR, STLLR. size 31:30, o2 23, L 22, o1 21, Rs 20:16, o0 15, Rt2 14:10. With o2 clear
/// these are exclusives, with o1 set CAS.
const fn ordered(word: u32) -> Option<Instruction> {
    const UNUSED: u32 = 0x1f << 16 | 0x1f << 10;
    let named = field(word, 24, 6) == 0b00_1000 && bit(word, 23) && !bit(word, 21) && word & UNUSED == UNUSED;
    if !named {
        return None;
    }
    let bank = Bank::General { sign_extend: false, wide: false };
    checked(single(bit(word, 22), 1 << field(word, 30, 2), rt(word), bank), plain(rn(word), 0))
}

/// LDAPUR, STLUR: size 31:30, opc 23:22, imm9 20:12; bits 29:24, 21, 11:10 are fixed.
const fn ordered_unscaled(word: u32) -> Option<Instruction> {
    if field(word, 24, 6) != 0b01_1001 || bit(word, 21) || field(word, 10, 2) != 0 {
        return None;
    }
    match general(word) {
        Some(transfer) => checked(transfer, plain(rn(word), signed(word, 12, 9))),
        None => None,
    }
}

/// Load register (literal): opc 31:30, V 26, imm19 23:5.
const fn literal(word: u32) -> Option<Instruction> {
    if field(word, 24, 2) != 0 {
        return None;
    }
    let (size, bank) = match (bit(word, 26), field(word, 30, 2)) {
        (false, 0) => (4, Bank::General { sign_extend: false, wide: false }),
        (false, 1) => (8, Bank::General { sign_extend: false, wide: false }),
        (false, 2) => (4, Bank::General { sign_extend: true, wide: true }),
        (true, opc @ 0..=2) => (4 << opc, Bank::Vector),
        _ => return None,
    };
    let offset = Offset::Immediate(signed(word, 5, 19) * 4);
    let address = Address { base: Base::Pc, offset, writeback: Writeback::None };
    checked(single(true, size, rt(word), bank), address)
}

/// Load/store pair: opc 31:30, V 26, mode 24:23, L 22, imm7 21:15, Rt2 14:10.
const fn pair(word: u32) -> Option<Instruction> {
    let (load, mode) = (bit(word, 22), field(word, 23, 2));
    let (size, bank) = match (bit(word, 26), field(word, 30, 2)) {
        (false, 0) => (4, Bank::General { sign_extend: false, wide: false }),
        // LDPSW has no form with a hint, and its store is STGP.
        (false, 1) if load && mode != 0 => (4, Bank::General { sign_extend: true, wide: true }),
        (false, 2) => (8, Bank::General { sign_extend: false, wide: false }),
        (true, opc @ 0..=2) => (4 << opc, Bank::Vector),
        _ => return None,
    };
    let writeback = match mode {
        0b01 => Writeback::Post,
        0b11 => Writeback::Pre,
        _ => Writeback::None,
    };
    let transfer = Transfer { second: Some(field(word, 10, 5) as u8), ..single(load, size, rt(word), bank) };
    let offset = Offset::Immediate(signed(word, 15, 7) * size as i64);
    checked(transfer, Address { base: Base::Register(rn(word)), offset, writeback })
}

/// Load/store register: size 31:30, V 26, opc 23:22, and by bits 24, 21 and 11:10 the addressing mode.
const fn register(word: u32) -> Option<Instruction> {
    let bank = if bit(word, 26) { vector(word) } else { general(word) };
    let Some(transfer) = bank else { return acquire(word) };
    let base = Base::Register(rn(word));
    let (offset, writeback) = if bit(word, 24) {
        let offset = Offset::Immediate(field(word, 10, 12) as i64 * transfer.size as i64);
        (offset, Writeback::None)
    } else {
        let near = Offset::Immediate(signed(word, 12, 9));
        match (bit(word, 21), field(word, 10, 2)) {
            (false, 0b00) => (near, Writeback::None),
            (false, 0b01) => (near, Writeback::Post),
            (false, 0b11) => (near, Writeback::Pre),
            (false, 0b10) if !bit(word, 26) => {
                let address = Address { base, offset: near, writeback: Writeback::None };
                return checked(Transfer { unprivileged: true, ..transfer }, address);
            }
            (true, 0b10) => match index(word, transfer.size) {
                Some(offset) => (offset, Writeback::None),
                None => return None,
            },
            _ => return acquire(word),
        }
    };
    checked(transfer, Address { base, offset, writeback })
}

/// LDAPR, which stands among the atomics.
const fn acquire(word: u32) -> Option<Instruction> {
    if word & 0x3fff_fc00 != 0x38bf_c000 {
        return None;
    }
    let bank = Bank::General { sign_extend: false, wide: false };
    checked(single(true, 1 << field(word, 30, 2), rt(word), bank), plain(rn(word), 0))
}

/// A general register by size and opc 23:22; `None` for PRFM and what is unallocated.
const fn general(word: u32) -> Option<Transfer> {
    let size = field(word, 30, 2);
    let (load, sign_extend, wide) = match (field(word, 22, 2), size) {
        (0b00, _) => (false, false, false),
        (0b01, _) => (true, false, false),
        (0b10, 0..=2) => (true, true, true),
        (0b11, 0..=1) => (true, true, false),
        _ => return None,
    };
    Some(single(load, 1 << size, rt(word), Bank::General { sign_extend, wide }))
}

/// A vector register: opc\[1\]:size is the logarithm of its bytes, opc\[0\] says load.
const fn vector(word: u32) -> Option<Transfer> {
    let scale = field(word, 23, 1) << 2 | field(word, 30, 2);
    if scale > 4 {
        return None;
    }
    Some(single(bit(word, 22), 1 << scale, rt(word), Bank::Vector))
}

/// Register offset: Rm 20:16, option 15:13, S 12.
const fn index(word: u32, size: u8) -> Option<Offset> {
    let extend = match field(word, 13, 3) {
        0b010 => Extend::Uxtw,
        0b110 => Extend::Sxtw,
        0b011 | 0b111 => Extend::None,
        _ => return None,
    };
    let shift = if bit(word, 12) { size.trailing_zeros() as u8 } else { 0 };
    Some(Offset::Register { index: field(word, 16, 5) as u8, extend, shift })
}
