//! General registers, and the parts of them that instructions name.

use iced_x86::Register;

/// Bytes of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 1.
    Byte = 1,
    /// 2.
    Word = 2,
    /// 4.
    Double = 4,
    /// 8.
    Long = 8,
}

impl Width {
    /// As a number.
    pub const fn bytes(self) -> u64 {
        self as u64
    }

    const fn bits(self) -> u32 {
        self as u32 * 8
    }

    /// The bits that it has.
    pub(super) const fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// Its highest bit.
    pub(super) const fn sign(self) -> u64 {
        1 << (self.bits() - 1)
    }

    pub(super) const fn truncated(self, value: u64) -> u64 {
        value & self.mask()
    }

    pub(super) const fn sign_extended(self, value: u64) -> u64 {
        let unused = 64 - self.bits();
        ((value << unused) as i64 >> unused) as u64
    }
}

/// What an instruction reads and changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8–R15: as instructions number them.
    pub general: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Bases of ES, CS, SS, DS, FS, GS. 64-bit code uses the last two only.
    pub bases: [u64; 6],
}

/// Where each kind of register begins in the decoder's list, whose order is the instructions' own but for bytes.
const BYTES: [u8; 20] = [0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
/// In [`BYTES`]: from here on AH, CH, DH and BH.
const HIGH: u8 = 16;

/// A part of a general register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Below 16.
    index: u8,
    shift: u8,
    width: Width,
}

impl Part {
    /// The low bytes of register `index`.
    const fn low(index: u8, width: Width) -> Self {
        Self { index, shift: 0, width }
    }

    /// The register's number, where an address names it.
    pub(super) const fn number(self) -> u8 {
        self.index
    }
}

/// What string instructions use.
pub(super) const SOURCE: u8 = 6;
pub(super) const DESTINATION: u8 = 7;
const COUNT: u8 = 1;

/// The part that a register is, if it is one.
pub(super) fn part(register: Register) -> Option<Part> {
    let number = register as usize;
    let group = |first: Register, width| {
        let index = number.checked_sub(first as usize).filter(|index| *index < 16)?;
        Some(Part::low(index as u8, width))
    };
    let byte = || {
        let place = *BYTES.get(number.checked_sub(Register::AL as usize)?)?;
        let (index, shift) = if place >= HIGH { (place - HIGH, 8) } else { (place, 0) };
        Some(Part { index, shift, width: Width::Byte })
    };
    group(Register::RAX, Width::Long)
        .or_else(|| group(Register::EAX, Width::Double))
        .or_else(|| group(Register::AX, Width::Word))
        .or_else(byte)
}

/// Bytes of a general register.
pub(super) fn width(register: Register) -> Option<Width> {
    part(register).map(|part| part.width)
}

/// Whether a register is one of segments, control, debug or test.
pub(super) fn is_system(register: Register) -> bool {
    (Register::ES..=Register::GS).contains(&register) || (Register::CR0..=Register::DR15).contains(&register)
}

/// Whether a register belongs to SSE, AVX, MMX or the floating-point unit.
pub(super) fn is_vector(register: Register) -> bool {
    register >= Register::XMM0 && !is_system(register)
}

/// Source, destination and count of a string instruction with addresses of this width.
pub(super) const fn string(width: Width) -> [Part; 3] {
    [Part::low(SOURCE, width), Part::low(DESTINATION, width), Part::low(COUNT, width)]
}

/// The accumulator of this width.
pub(super) const fn accumulator(width: Width) -> Part {
    Part::low(0, width)
}

impl Registers {
    /// A part of a general register.
    pub(super) const fn get(&self, part: Part) -> u64 {
        part.width.truncated(self.general[part.index as usize & 15] >> (part.shift & 63))
    }

    /// Stores to a part: 32 bits clear the upper half, fewer leave the rest (SDM volume 1, 3.4.1.1).
    pub(super) const fn set(&mut self, part: Part, value: u64) {
        let (register, shift) = (&mut self.general[part.index as usize & 15], part.shift & 63);
        let kept = match part.width {
            Width::Long | Width::Double => 0,
            width => *register & !(width.mask() << shift),
        };
        *register = kept | part.width.truncated(value) << shift;
    }
}
