//! From bytes to an instruction: what the decoder (`iced-x86`) says, in the few words that carrying it out needs.
//!
//! Purpose: the decoder's own form answers many questions, each at a price. An instruction that touches a device is often carried out
//! again, so everything is asked once, here.
//!
//! Invariants: pure and total; what an [`Instruction`] is depends on its own bytes, its RIP and the code's size, and on nothing else.

use iced_x86::{
    Code as Opcode, Decoder, DecoderOptions, Instruction as Decoded, MemorySize, Mnemonic, OpKind, Register,
};

use super::flags::Arithmetic;
use super::registers::{self, Width};
use super::{Address, CodeSize, Instruction, LONGEST, Operation, Unsupported};

/// Has the decoder make its tables, some 80 KiB of heap in 2,000 pieces, which it does when it is first used. To be called while there is heap
/// to spare, and before a guest can be the first to use it.
pub fn prepare() {
    const NOP: [u8; 1] = [0x90];
    let decoded = Decoder::new(64, &NOP, DecoderOptions::NONE).decode();
    debug_assert!(!decoded.is_invalid());
}

impl Instruction {
    /// The instruction that begins `code`, whose RIP is `rip`.
    ///
    /// # Errors
    ///
    /// [`Unsupported`].
    pub fn decode(code: &[u8], rip: u64, size: CodeSize) -> Result<Self, Unsupported> {
        let mut decoder = Decoder::with_ip(size.bits(), code, rip, DecoderOptions::NONE);
        let decoded = decoder.decode();
        if decoded.is_invalid() {
            let cut_off = decoder.last_error() == iced_x86::DecoderError::NoMoreBytes && code.len() < LONGEST;
            return Err(if cut_off { Unsupported::Truncated } else { Unsupported::Invalid });
        }
        let operation = operation(&decoded)?;
        let width = match operation {
            Operation::Extend { .. } => registers::width(decoded.op0_register()).ok_or(Unsupported::Other)?,
            _ => memory_width(&decoded).ok_or(Unsupported::Vector)?,
        };
        let to_memory = decoded.op0_kind() == OpKind::Memory;
        let other = u32::from(to_memory);
        let is_register = decoded.op_count() > other && decoded.op_kind(other) == OpKind::Register;
        let register = if is_register { registers::part(decoded.op_register(other)) } else { None };
        let immediate = if to_memory { width.truncated(decoded.try_immediate(1).unwrap_or_default()) } else { 0 };
        let addresses = string_addresses(&decoded);
        let (memory, destination) = match operation {
            Operation::Fill | Operation::Copy | Operation::Take => {
                let at = |number, segment| Address {
                    base: Some(number),
                    index: None,
                    shift: 0,
                    segment: self::segment(segment, size),
                    displacement: 0,
                    mask: addresses.mask(),
                };
                (at(registers::SOURCE, decoded.memory_segment()), at(registers::DESTINATION, Register::ES))
            }
            _ => (address(&decoded, size), address(&decoded, size)),
        };
        let next = decoded.next_ip();
        let next = match size {
            CodeSize::Bits16 => next & 0xffff,
            CodeSize::Bits32 => next & 0xffff_ffff,
            CodeSize::Bits64 => next,
        };
        Ok(Self {
            operation,
            width,
            to_memory,
            register,
            immediate,
            memory,
            destination,
            addresses,
            repeats: decoded.has_rep_prefix() || decoded.has_repne_prefix(),
            next,
            length: decoded.len() as u8,
            linear: size.linear(),
        })
    }
}

/// Which segment's base counts: in 64-bit code those of FS and GS only.
fn segment(register: Register, size: CodeSize) -> Option<u8> {
    let number = (register as u8).checked_sub(Register::ES as u8).filter(|number| *number < 6)?;
    (size != CodeSize::Bits64 || number >= 4).then_some(number)
}

/// Where the operand that ModRM or an offset names is.
fn address(decoded: &Decoded, size: CodeSize) -> Address {
    let (base, index) = (decoded.memory_base(), decoded.memory_index());
    let number = |register| registers::part(register).map(|part| part.number());
    let wide = |register| match register {
        Register::RIP => Some(Width::Long),
        Register::EIP => Some(Width::Double),
        register => registers::width(register),
    };
    let said = match decoded.memory_displ_size() {
        2 => Some(Width::Word),
        4 => Some(Width::Double),
        8 => Some(Width::Long),
        _ => None,
    };
    let default = match size {
        CodeSize::Bits16 => Width::Word,
        CodeSize::Bits32 => Width::Double,
        CodeSize::Bits64 => Width::Long,
    };
    Address {
        base: number(base),
        index: number(index),
        shift: decoded.memory_index_scale().trailing_zeros() as u8,
        segment: segment(decoded.memory_segment(), size),
        displacement: decoded.memory_displacement64(),
        mask: wide(base).or_else(|| wide(index)).or(said).unwrap_or(default).mask(),
    }
}

/// Width of a string instruction's addresses.
fn string_addresses(decoded: &Decoded) -> Width {
    let kinds = [decoded.op0_kind(), decoded.op1_kind()];
    let has = |wanted: [OpKind; 2]| kinds.iter().any(|kind| wanted.contains(kind));
    if has([OpKind::MemoryESRDI, OpKind::MemorySegRSI]) {
        Width::Long
    } else if has([OpKind::MemoryESEDI, OpKind::MemorySegESI]) {
        Width::Double
    } else {
        Width::Word
    }
}

/// What an instruction does, or why not.
fn operation(decoded: &Decoded) -> Result<Operation, Unsupported> {
    match decoded.code() {
        Opcode::Stosb_m8_AL | Opcode::Stosw_m16_AX | Opcode::Stosd_m32_EAX | Opcode::Stosq_m64_RAX => {
            return Ok(Operation::Fill);
        }
        Opcode::Movsb_m8_m8 | Opcode::Movsw_m16_m16 | Opcode::Movsd_m32_m32 | Opcode::Movsq_m64_m64 => {
            return Ok(Operation::Copy);
        }
        Opcode::Lodsb_AL_m8 | Opcode::Lodsw_AX_m16 | Opcode::Lodsd_EAX_m32 | Opcode::Lodsq_RAX_m64 => {
            return Ok(Operation::Take);
        }
        _ => {}
    }
    let narrow = || memory_width(decoded).ok_or(Unsupported::Other);
    let operation = match decoded.mnemonic() {
        Mnemonic::Mov => Operation::Move,
        Mnemonic::Xchg => Operation::Exchange,
        Mnemonic::Movzx => Operation::Extend { signed: false, from: memory(decoded).and_then(|()| narrow())? },
        Mnemonic::Movsx | Mnemonic::Movsxd => {
            Operation::Extend { signed: true, from: memory(decoded).and_then(|()| narrow())? }
        }
        mnemonic => Operation::Arithmetic(Arithmetic::of(mnemonic).ok_or_else(|| reason(decoded))?),
    };
    memory(decoded)?;
    let segments =
        [decoded.op0_register(), decoded.op1_register()].iter().any(|register| registers::is_system(*register));
    if segments { Err(Unsupported::System) } else { Ok(operation) }
}

/// That one of the first two operands is in memory.
fn memory(decoded: &Decoded) -> Result<(), Unsupported> {
    let found = decoded.op0_kind() == OpKind::Memory || decoded.op1_kind() == OpKind::Memory;
    if found { Ok(()) } else { Err(Unsupported::NoMemory) }
}

/// Bytes that an operand in memory has, where a general register could hold them.
fn memory_width(decoded: &Decoded) -> Option<Width> {
    match decoded.memory_size() {
        MemorySize::UInt8 | MemorySize::Int8 => Some(Width::Byte),
        MemorySize::UInt16 | MemorySize::Int16 => Some(Width::Word),
        MemorySize::UInt32 | MemorySize::Int32 => Some(Width::Double),
        MemorySize::UInt64 | MemorySize::Int64 => Some(Width::Long),
        _ => None,
    }
}

/// Why an instruction with an unknown mnemonic is not carried out.
fn reason(decoded: &Decoded) -> Unsupported {
    let touches = decoded.op_kinds().any(|kind| kind >= OpKind::MemorySegSI);
    match decoded.mnemonic() {
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc if touches => Unsupported::BitString,
        Mnemonic::Cmpxchg | Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b | Mnemonic::Xadd if touches => {
            Unsupported::Atomic
        }
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd | Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => {
            Unsupported::Port
        }
        Mnemonic::Cmpsb
        | Mnemonic::Cmpsw
        | Mnemonic::Cmpsq
        | Mnemonic::Scasb
        | Mnemonic::Scasw
        | Mnemonic::Scasd
        | Mnemonic::Scasq => Unsupported::Comparison,
        Mnemonic::Lgdt
        | Mnemonic::Lidt
        | Mnemonic::Sgdt
        | Mnemonic::Sidt
        | Mnemonic::Lldt
        | Mnemonic::Ltr
        | Mnemonic::Lmsw
        | Mnemonic::Smsw
        | Mnemonic::Sldt
        | Mnemonic::Str => Unsupported::System,
        Mnemonic::Push
        | Mnemonic::Pop
        | Mnemonic::Call
        | Mnemonic::Jmp
        | Mnemonic::Ret
        | Mnemonic::Enter
        | Mnemonic::Leave
        | Mnemonic::Pushf
        | Mnemonic::Pushfq
        | Mnemonic::Popf
        | Mnemonic::Popfq
        | Mnemonic::Iretq
        | Mnemonic::Iretd => Unsupported::ControlFlow,
        // The encoder's string comparison of double words shares its name with SSE's.
        _ if decoded.code() == Opcode::Cmpsd_m32_m32 => Unsupported::Comparison,
        _ if !touches => Unsupported::NoMemory,
        _ if memory_width(decoded).is_none()
            || decoded.op_kinds().enumerate().any(|(index, kind)| {
                kind == OpKind::Register && registers::is_vector(decoded.op_register(index as u32))
            }) =>
        {
            Unsupported::Vector
        }
        _ => Unsupported::Other,
    }
}
