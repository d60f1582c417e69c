//! Instructions that touch what is no memory, carried out.
//!
//! Purpose: an access to a device stops the guest in the middle of an instruction, and AMD's processors without decode assists do
//! not say which. So its bytes are fetched through the guest's own tables, decoded (`iced-x86`), and carried out on registers
//! and a [`Bus`], which is the guest's memory and its devices by linear address.
//!
//! Protocol: [`prepare`] once, before there is a guest; then for each access [`fetch`], [`Instruction::decode`],
//! [`Instruction::execute`]. A [`Bus`] that refuses ends the instruction with nothing changed in the registers; what it had
//! stored before is its own to answer for. A repeated string instruction is carried out once ([`Progress::Again`]: RIP is still
//! its own), so that no guest says how long an exit takes.
//!
//! What is carried out: MOV in all its forms but those of segment and control registers, MOVZX, MOVSX, MOVSXD, XCHG; ADD, ADC,
//! SUB, SBB, AND, OR, XOR, CMP, TEST with their flags; MOVS, STOS, LODS. What is not has a reason ([`Unsupported`]): the VM's
//! owner hears it.
//!
//! | room | question |
//! |---|---|
//! | `flags` | what does an operation leave in RFLAGS? |
//! | `registers` | what is in the part of a register that an instruction names? |
//!
//! Invariants: no bytes, registers or bus make it panic or loop. After [`prepare`] nothing is allocated.
//!
//! Known holes: segment limits and rights are not checked, so a bad access in 16- or 32-bit code comes to the bus; single steps
//! (TF) and hardware breakpoints do not fire; a LOCK prefix is not more atomic than the bus; a string instruction's two accesses
//! are made one after the other, and a store that is refused has had its load.

mod flags;
mod registers;
#[cfg(test)]
mod tests;

use core::fmt;

use entresol_addr::PAGE_SIZE;
use iced_x86::{
    Code as Opcode, Decoder, DecoderOptions, Instruction as Decoded, MemorySize, Mnemonic, OpKind, Register,
};

use flags::Arithmetic;
pub use registers::{Registers, Width};

/// Most bytes of an instruction.
pub const LONGEST: usize = 15;

/// What a default operand and an address are in the guest's code: CS.D and, in long mode, CS.L.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeSize {
    /// 16 bits.
    Bits16,
    /// 32 bits.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

impl CodeSize {
    /// By CS.D and CS.L; `long`: EFER.LMA.
    pub const fn of(long: bool, cs_l: bool, cs_d: bool) -> Self {
        match (long && cs_l, cs_d) {
            (true, _) => Self::Bits64,
            (false, true) => Self::Bits32,
            (false, false) => Self::Bits16,
        }
    }

    const fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }

    /// What a linear address keeps.
    const fn linear(self) -> u64 {
        if matches!(self, Self::Bits64) { u64::MAX } else { u32::MAX as u64 }
    }
}

/// The guest's memory and devices, by linear address.
pub trait Bus {
    /// Why an access cannot be made: a fault of the guest's tables, for instance.
    type Error;

    /// A load; the value is zero-extended.
    ///
    /// # Errors
    ///
    /// The implementor's.
    fn load(&mut self, linear: u64, width: Width) -> Result<u64, Self::Error>;

    /// A store of the low bytes of `value`.
    ///
    /// # Errors
    ///
    /// The implementor's.
    fn store(&mut self, linear: u64, width: Width, value: u64) -> Result<(), Self::Error>;
}

/// Why an instruction is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsupported {
    /// The bytes end inside it: what stopped the fetch is the answer, if something did.
    Truncated,
    /// The processor has no such instruction: the guest gets an invalid-opcode exception.
    Invalid,
    /// It touches no memory. The guest has changed its code meanwhile: have it try again.
    NoMemory,
    /// Bits of memory by number (BT, BTS, BTR, BTC), which may lie anywhere.
    BitString,
    /// A comparison and exchange, or an exchange and addition: no device answers them.
    Atomic,
    /// Vector or floating-point registers.
    Vector,
    /// The stack, or a jump through memory.
    ControlFlow,
    /// INS, OUTS.
    Port,
    /// A segment or control register, or a descriptor table.
    System,
    /// CMPS or SCAS, whose repetition depends on what they find.
    Comparison,
    /// Anything else.
    Other,
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Truncated => "its bytes cannot all be fetched",
            Self::Invalid => "no instruction",
            Self::NoMemory => "an instruction that touches no memory",
            Self::BitString => "a bit of memory by its number (BT, BTS, BTR or BTC)",
            Self::Atomic => "a comparison and exchange (CMPXCHG or XADD)",
            Self::Vector => "vector or floating-point registers",
            Self::ControlFlow => "the stack, or a jump through memory",
            Self::Port => "a port with data in memory (INS or OUTS)",
            Self::System => "a segment or control register, or a descriptor table",
            Self::Comparison => "a comparison of strings (CMPS or SCAS)",
            Self::Other => "an instruction that no driver uses on a device",
        })
    }
}

/// Bytes of code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes<E> {
    bytes: [u8; LONGEST],
    count: usize,
    /// What stopped the fetch before there were [`LONGEST`]: the answer, if the instruction is longer.
    pub stopped: Option<E>,
}

impl<E> Bytes<E> {
    /// Them.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.count]
    }
}

/// Bytes at the linear address `at`, by `read`, which is asked once for each page.
///
/// # Errors
///
/// What `read` says of the first byte.
pub fn fetch<E>(at: u64, mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>) -> Result<Bytes<E>, E> {
    let mut bytes = [0; LONGEST];
    let first = LONGEST.min((PAGE_SIZE - at % PAGE_SIZE) as usize);
    read(at, &mut bytes[..first])?;
    let (mut count, mut stopped) = (first, None);
    if first < LONGEST {
        match read(at.wrapping_add(first as u64), &mut bytes[first..]) {
            Ok(()) => count = LONGEST,
            Err(error) => stopped = Some(error),
        }
    }
    Ok(Bytes { bytes, count, stopped })
}

/// Has the decoder make its tables, some 80 KiB of heap in 2,000 pieces, which it does when it is first used. To be called while there is heap
/// to spare, and before a guest can be the first to use it.
pub fn prepare() {
    const NOP: [u8; 1] = [0x90];
    let decoded = Decoder::new(64, &NOP, DecoderOptions::NONE).decode();
    debug_assert!(!decoded.is_invalid());
}

/// What an instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Move,
    /// A narrow load into a wider register.
    Extend {
        signed: bool,
        from: Width,
    },
    Arithmetic(Arithmetic),
    Exchange,
    /// STOS.
    Fill,
    /// MOVS.
    Copy,
    /// LODS.
    Take,
}

/// An instruction that can be carried out.
#[derive(Clone, Copy, Debug)]
pub struct Instruction {
    decoded: Decoded,
    operation: Operation,
    width: Width,
    size: CodeSize,
}

/// How far it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// RIP is the next instruction's.
    Done,
    /// It was repeated once, and has to be again: RIP is still its own.
    Again,
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
        Ok(Self { decoded, operation, width, size })
    }

    /// Bytes of the access to memory.
    pub fn access_width(&self) -> Width {
        match self.operation {
            Operation::Extend { from, .. } => from,
            _ => self.width,
        }
    }

    /// Whether all its accesses are to the same bytes.
    pub fn touches_one_place(&self) -> bool {
        !matches!(self.operation, Operation::Copy)
    }

    /// Carries it out. RIP, RFLAGS and general registers are those after it; if the bus refuses, those before it.
    ///
    /// # Errors
    ///
    /// What `bus` says.
    pub fn execute<B: Bus>(&self, registers: &mut Registers, bus: &mut B) -> Result<Progress, B::Error> {
        match self.operation {
            Operation::Move => self.do_move(registers, bus)?,
            Operation::Extend { signed, from } => {
                let value = bus.load(self.linear(registers, 1), from)?;
                let value = if signed { from.sign_extended(value) } else { value };
                registers.set(self.decoded.op0_register(), value);
            }
            Operation::Arithmetic(operation) => self.compute(operation, registers, bus)?,
            Operation::Exchange => {
                let (memory, register) = self.sides();
                let at = self.linear(registers, memory);
                let loaded = bus.load(at, self.width)?;
                bus.store(at, self.width, registers.get(register))?;
                registers.set(register, loaded);
            }
            Operation::Fill | Operation::Copy | Operation::Take => return self.step_string(registers, bus),
        }
        registers.rip = self.next();
        Ok(Progress::Done)
    }

    fn do_move<B: Bus>(&self, registers: &mut Registers, bus: &mut B) -> Result<(), B::Error> {
        if self.decoded.op0_kind() == OpKind::Memory {
            bus.store(self.linear(registers, 0), self.width, self.source(registers))
        } else {
            let value = bus.load(self.linear(registers, 1), self.width)?;
            registers.set(self.decoded.op0_register(), value);
            Ok(())
        }
    }

    fn compute<B: Bus>(&self, operation: Arithmetic, registers: &mut Registers, bus: &mut B) -> Result<(), B::Error> {
        let in_memory = self.decoded.op0_kind() == OpKind::Memory;
        let at = self.linear(registers, if in_memory { 0 } else { 1 });
        let loaded = bus.load(at, self.width)?;
        let register = self.decoded.op0_register();
        let (left, right) =
            if in_memory { (loaded, self.source(registers)) } else { (registers.get(register), loaded) };
        let (value, rflags) = operation.apply(left, right, self.width, registers.rflags);
        if operation.stores() {
            if in_memory {
                bus.store(at, self.width, value)?;
            } else {
                registers.set(register, value);
            }
        }
        registers.rflags = rflags;
        Ok(())
    }

    /// One step of a string instruction.
    fn step_string<B: Bus>(&self, registers: &mut Registers, bus: &mut B) -> Result<Progress, B::Error> {
        let decoded = &self.decoded;
        let repeats = decoded.has_rep_prefix() || decoded.has_repne_prefix();
        let [source, destination, count] = registers::string(self.address_width());
        if repeats && registers.get(count) == 0 {
            registers.rip = self.next();
            return Ok(Progress::Done);
        }
        let accumulator = registers::accumulator(self.width);
        let value = match self.operation {
            Operation::Fill => registers.get(accumulator),
            _ => bus.load(self.linear(registers, 1), self.width)?,
        };
        match self.operation {
            Operation::Take => registers.set(accumulator, value),
            _ => bus.store(self.linear(registers, 0), self.width, value)?,
        }
        let step =
            if registers.rflags & flags::DF != 0 { self.width.bytes().wrapping_neg() } else { self.width.bytes() };
        for (register, moves) in
            [(source, self.operation != Operation::Fill), (destination, self.operation != Operation::Take)]
        {
            if moves {
                registers.set(register, registers.get(register).wrapping_add(step));
            }
        }
        if repeats {
            let left = registers.get(count).wrapping_sub(1);
            registers.set(count, left);
            if registers.get(count) != 0 {
                return Ok(Progress::Again);
            }
        }
        registers.rip = self.next();
        Ok(Progress::Done)
    }

    /// Width of a string instruction's addresses.
    fn address_width(&self) -> Width {
        let kinds = [self.decoded.op0_kind(), self.decoded.op1_kind()];
        let has = |wanted: [OpKind; 2]| kinds.iter().any(|kind| wanted.contains(kind));
        if has([OpKind::MemoryESRDI, OpKind::MemorySegRSI]) {
            Width::Long
        } else if has([OpKind::MemoryESEDI, OpKind::MemorySegESI]) {
            Width::Double
        } else {
            Width::Word
        }
    }

    /// Which operand is memory, and the register that the other is.
    fn sides(&self) -> (u32, Register) {
        if self.decoded.op0_kind() == OpKind::Memory {
            (0, self.decoded.op1_register())
        } else {
            (1, self.decoded.op0_register())
        }
    }

    /// The second operand where the first is memory: a register or a number.
    fn source(&self, registers: &Registers) -> u64 {
        if self.decoded.op1_kind() == OpKind::Register {
            registers.get(self.decoded.op1_register())
        } else {
            self.width.truncated(self.decoded.try_immediate(1).unwrap_or_default())
        }
    }

    /// The linear address of an operand in memory.
    fn linear(&self, registers: &Registers, operand: u32) -> u64 {
        let long = self.size == CodeSize::Bits64;
        let value = |register: Register, _, _| Some(registers.for_address(register, long));
        // The closure knows every register that an address may name.
        self.decoded.virtual_address(operand, 0, value).unwrap_or_default() & self.size.linear()
    }

    fn next(&self) -> u64 {
        let next = self.decoded.next_ip();
        match self.size {
            CodeSize::Bits16 => next & 0xffff,
            CodeSize::Bits32 => next & 0xffff_ffff,
            CodeSize::Bits64 => next,
        }
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
