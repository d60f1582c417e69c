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
//! | `decode` | which instruction do these bytes begin with? |
//! | `flags` | what does an operation leave in RFLAGS? |
//! | `registers` | what is in the part of a register that an instruction names? |
//! | [`memo`] | was it decoded before? |
//! | `privileged` | which control register does it load, which page does it flush? |
//!
//! Invariants: no bytes, registers or bus make it panic or loop. After [`prepare`] nothing is allocated.
//!
//! Known holes: segment limits and rights are not checked, so a bad access in 16- or 32-bit code comes to the bus; single steps
//! (TF) and hardware breakpoints do not fire; a LOCK prefix is not more atomic than the bus; a string instruction's two accesses
//! are made one after the other, and a store that is refused has had its load.

mod decode;
mod flags;
pub mod memo;
mod privileged;
mod registers;
#[cfg(test)]
mod tests;

use core::fmt;

pub use decode::prepare;
use entresol_addr::PAGE_SIZE;
use flags::Arithmetic;
pub use privileged::{Privileged, privileged};
use registers::Part;
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

/// Where an operand in memory is: what is added up, and how many bits of the sum count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Address {
    /// Numbers of general registers.
    base: Option<u8>,
    index: Option<u8>,
    /// Of the index.
    shift: u8,
    /// Among the segments' bases; `None` where the mode takes it for zero.
    segment: Option<u8>,
    /// What the instruction says itself; RIP is in it.
    displacement: u64,
    /// Bits of an offset.
    mask: u64,
}

/// An instruction that can be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    operation: Operation,
    width: Width,
    /// Of its operands, the first is in memory, not the second.
    to_memory: bool,
    /// The operand that is a register; `None`: a number.
    register: Option<Part>,
    /// That.
    immediate: u64,
    /// The operand in memory. Of a string instruction, the source.
    memory: Address,
    /// Of a string instruction.
    destination: Address,
    /// Of a string instruction: the width of its addresses, and whether it has a repeat prefix.
    addresses: Width,
    repeats: bool,
    /// RIP of the next one.
    next: u64,
    length: u8,
    /// What linear addresses keep.
    linear: u64,
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
    /// Its bytes.
    pub fn length(&self) -> usize {
        self.length.into()
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
                let value = bus.load(self.linear(&self.memory, registers), from)?;
                let value = if signed { from.sign_extended(value) } else { value };
                self.set_register(registers, value);
            }
            Operation::Arithmetic(operation) => self.compute(operation, registers, bus)?,
            Operation::Exchange => {
                let at = self.linear(&self.memory, registers);
                let loaded = bus.load(at, self.width)?;
                bus.store(at, self.width, self.source(registers))?;
                self.set_register(registers, loaded);
            }
            Operation::Fill | Operation::Copy | Operation::Take => return self.step_string(registers, bus),
        }
        registers.rip = self.next;
        Ok(Progress::Done)
    }

    fn do_move<B: Bus>(&self, registers: &mut Registers, bus: &mut B) -> Result<(), B::Error> {
        let at = self.linear(&self.memory, registers);
        if self.to_memory {
            return bus.store(at, self.width, self.source(registers));
        }
        let value = bus.load(at, self.width)?;
        self.set_register(registers, value);
        Ok(())
    }

    fn compute<B: Bus>(&self, operation: Arithmetic, registers: &mut Registers, bus: &mut B) -> Result<(), B::Error> {
        let at = self.linear(&self.memory, registers);
        let (loaded, other) = (bus.load(at, self.width)?, self.source(registers));
        let (left, right) = if self.to_memory { (loaded, other) } else { (other, loaded) };
        let (value, rflags) = operation.apply(left, right, self.width, registers.rflags);
        if operation.stores() {
            if self.to_memory {
                bus.store(at, self.width, value)?;
            } else {
                self.set_register(registers, value);
            }
        }
        registers.rflags = rflags;
        Ok(())
    }

    /// One step of a string instruction.
    fn step_string<B: Bus>(&self, registers: &mut Registers, bus: &mut B) -> Result<Progress, B::Error> {
        let [source, destination, count] = registers::string(self.addresses);
        if self.repeats && registers.get(count) == 0 {
            registers.rip = self.next;
            return Ok(Progress::Done);
        }
        let accumulator = registers::accumulator(self.width);
        let value = match self.operation {
            Operation::Fill => registers.get(accumulator),
            _ => bus.load(self.linear(&self.memory, registers), self.width)?,
        };
        match self.operation {
            Operation::Take => registers.set(accumulator, value),
            _ => bus.store(self.linear(&self.destination, registers), self.width, value)?,
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
        if self.repeats {
            let left = registers.get(count).wrapping_sub(1);
            registers.set(count, left);
            if registers.get(count) != 0 {
                return Ok(Progress::Again);
            }
        }
        registers.rip = self.next;
        Ok(Progress::Done)
    }

    /// The operand that is not in memory.
    fn source(&self, registers: &Registers) -> u64 {
        self.register.map_or(self.immediate, |part| registers.get(part))
    }

    fn set_register(&self, registers: &mut Registers, value: u64) {
        if let Some(part) = self.register {
            registers.set(part, value);
        }
    }

    /// The linear address of an operand.
    fn linear(&self, address: &Address, registers: &Registers) -> u64 {
        let general = |number: Option<u8>| number.map_or(0, |number| registers.general[usize::from(number & 15)]);
        let index = general(address.index) << (address.shift & 3);
        let offset = address.displacement.wrapping_add(general(address.base)).wrapping_add(index) & address.mask;
        let base = address.segment.and_then(|segment| registers.bases.get(usize::from(segment)));
        offset.wrapping_add(base.copied().unwrap_or(0)) & self.linear
    }
}
