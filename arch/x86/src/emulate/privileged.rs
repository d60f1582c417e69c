//! Instructions that change how addresses are translated, of a guest on shadow tables: read, not carried out.
//!
//! Source: SDM volume 2, MOV to and from control registers, CLTS, LMSW, SMSW, INVLPG.

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction as Decoded, Mnemonic, OpKind, Register};

use super::{CodeSize, LONGEST, Registers, Unsupported, registers};

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privileged {
    /// MOV from control register `register` to general register `general`.
    ReadControl {
        /// 0–15.
        register: u8,
        /// 0–15.
        general: u8,
    },
    /// MOV to control register `register`.
    WriteControl {
        /// 0–15.
        register: u8,
        /// What is stored.
        value: u64,
    },
    /// CLTS.
    ClearTaskSwitched,
    /// LMSW of this value.
    LoadStatus(u16),
    /// SMSW to general register `general`, of which `bytes` change.
    StoreStatus {
        /// 0–15.
        general: u8,
        /// 2, 4 or 8.
        bytes: u8,
    },
    /// INVLPG of this linear address.
    InvalidatePage(u64),
}

/// The instruction that begins `code`, and what RIP is behind it. `from` are the registers before it.
///
/// # Errors
///
/// [`Unsupported`]: [`Unsupported::NoMemory`] if it is another by now, [`Unsupported::System`] if its operand is in memory.
pub fn privileged(code: &[u8], from: &Registers, size: CodeSize) -> Result<(Privileged, u64), Unsupported> {
    let mut decoder = Decoder::with_ip(size.bits(), code, from.rip, DecoderOptions::NONE);
    let decoded = decoder.decode();
    if decoded.is_invalid() {
        let cut_off = decoder.last_error() == DecoderError::NoMoreBytes && code.len() < LONGEST;
        return Err(if cut_off { Unsupported::Truncated } else { Unsupported::Invalid });
    }
    let control = |register: Register| {
        let number = (register as usize).checked_sub(Register::CR0 as usize).filter(|number| *number < 16);
        number.map(|number| number as u8)
    };
    let (first, second) = (decoded.op0_register(), decoded.op1_register());
    let what = match decoded.mnemonic() {
        Mnemonic::Mov => match (control(first), control(second)) {
            (Some(register), None) => Privileged::WriteControl { register, value: value(from, second) },
            (None, Some(register)) => Privileged::ReadControl { register, general: number(first) },
            _ => return Err(Unsupported::NoMemory),
        },
        Mnemonic::Clts => Privileged::ClearTaskSwitched,
        Mnemonic::Invlpg => Privileged::InvalidatePage(linear(&decoded, from, size)),
        Mnemonic::Lmsw | Mnemonic::Smsw if decoded.op0_kind() != OpKind::Register => return Err(Unsupported::System),
        Mnemonic::Lmsw => Privileged::LoadStatus(value(from, first) as u16),
        Mnemonic::Smsw => Privileged::StoreStatus {
            general: number(first),
            bytes: registers::width(first).map_or(0, |width| width.bytes() as u8),
        },
        _ => return Err(Unsupported::NoMemory),
    };
    let next = decoded.next_ip();
    let next = match size {
        CodeSize::Bits16 => next & 0xffff,
        CodeSize::Bits32 => next & 0xffff_ffff,
        CodeSize::Bits64 => next,
    };
    Ok((what, next))
}

/// Which general register, 0–15.
fn number(register: Register) -> u8 {
    registers::part(register).map_or(0, registers::Part::number)
}

/// What is in a general register, or a part of one; anything else is 0.
fn value(from: &Registers, register: Register) -> u64 {
    registers::part(register).map_or(0, |part| from.get(part))
}

/// The linear address of the operand in memory. 64-bit code has bases of FS and GS only.
fn linear(decoded: &Decoded, from: &Registers, size: CodeSize) -> u64 {
    let long = size == CodeSize::Bits64;
    let value = |register: Register, _, _| {
        let segment =
            (register as usize).checked_sub(Register::ES as usize).filter(|number| *number < from.bases.len());
        Some(match segment {
            Some(number) if long && number < 4 => 0,
            Some(number) => from.bases[number],
            None => value(from, register),
        })
    };
    // The closure knows every register that an address may name.
    decoded.virtual_address(0, 0, value).unwrap_or_default() & size.linear()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn before() -> Registers {
        let mut registers = Registers { rip: 0x1000, ..Registers::default() };
        for (number, general) in registers.general.iter_mut().enumerate() {
            *general = 0x1_0000_1000 * (number as u64 + 1);
        }
        registers.bases[5] = 0xffff_8000_0000_0000;
        registers
    }

    #[test]
    fn each_is_read_with_its_length() {
        use Privileged::*;
        let general = |number: usize| before().general[number];
        let rows: [(&[u8], Privileged); 9] = [
            (&[0x0f, 0x22, 0xd8], WriteControl { register: 3, value: general(0) }),
            (&[0x41, 0x0f, 0x22, 0xe1], WriteControl { register: 4, value: general(9) }),
            (&[0x0f, 0x20, 0xc3], ReadControl { register: 0, general: 3 }),
            (&[0x0f, 0x06], ClearTaskSwitched),
            (&[0x0f, 0x01, 0xf3], LoadStatus(0x4000)),
            (&[0x0f, 0x01, 0xe1], StoreStatus { general: 1, bytes: 4 }),
            (&[0x0f, 0x01, 0x3f], InvalidatePage(general(7))),
            (&[0x65, 0x0f, 0x01, 0x38], InvalidatePage(general(0) + 0xffff_8000_0000_0000)),
            (&[0x0f, 0x01, 0x7c, 0x8b, 0x10], InvalidatePage(general(3) + 4 * general(1) + 0x10)),
        ];
        for (bytes, expected) in rows {
            let mut code = Vec::from(bytes);
            let next = 0x1000 + code.len() as u64;
            code.resize(LONGEST, 0x90);
            assert_eq!(privileged(&code, &before(), CodeSize::Bits64), Ok((expected, next)), "{bytes:x?}");
        }
    }

    #[test]
    fn narrower_code_has_narrower_operands() {
        let read = |bytes: &[u8], size| privileged(bytes, &before(), size);
        let value = 0x1000;
        let store = Privileged::WriteControl { register: 0, value };
        assert_eq!(read(&[0x0f, 0x22, 0xc0], CodeSize::Bits32), Ok((store, 0x1003)));
        assert_eq!(read(&[0x0f, 0x22, 0xc0], CodeSize::Bits16), Ok((store, 0x1003)));
        let page = Privileged::InvalidatePage(0x8000);
        assert_eq!(read(&[0x0f, 0x01, 0x3f], CodeSize::Bits32), Ok((page, 0x1003)));
    }

    #[test]
    fn others_are_refused() {
        let read = |bytes: &[u8]| privileged(bytes, &before(), CodeSize::Bits64).unwrap_err();
        assert_eq!(read(&[0x0f, 0x22]), Unsupported::Truncated);
        assert_eq!(read(&[0x90; 15]), Unsupported::NoMemory);
        assert_eq!(read(&[0x48, 0x89, 0xc3, 0x90, 0x90]), Unsupported::NoMemory, "a MOV between general registers");
        assert_eq!(read(&[0x0f, 0x01, 0x30]), Unsupported::System, "LMSW from memory");
        assert_eq!(read(&[0x0f, 0x0b]), Unsupported::NoMemory);
        assert_eq!(read(&[0xf0; 15]), Unsupported::Invalid);
    }
}
