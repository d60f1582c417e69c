//! What arithmetic leaves in RFLAGS (SDM volume 1, 3.4.3.1 and appendix A).

use iced_x86::Mnemonic;

use super::registers::Width;

const CF: u64 = 1 << 0;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
/// The direction of string instructions.
pub(super) const DF: u64 = 1 << 10;
const OF: u64 = 1 << 11;

/// An operation with two operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arithmetic {
    Add,
    AddWithCarry,
    Subtract,
    SubtractWithBorrow,
    Compare,
    And,
    Test,
    Or,
    Xor,
}

impl Arithmetic {
    pub(super) const fn of(mnemonic: Mnemonic) -> Option<Self> {
        Some(match mnemonic {
            Mnemonic::Add => Self::Add,
            Mnemonic::Adc => Self::AddWithCarry,
            Mnemonic::Sub => Self::Subtract,
            Mnemonic::Sbb => Self::SubtractWithBorrow,
            Mnemonic::Cmp => Self::Compare,
            Mnemonic::And => Self::And,
            Mnemonic::Test => Self::Test,
            Mnemonic::Or => Self::Or,
            Mnemonic::Xor => Self::Xor,
            _ => return None,
        })
    }

    /// Whether the result goes anywhere but into flags.
    pub(super) const fn stores(self) -> bool {
        !matches!(self, Self::Compare | Self::Test)
    }

    /// The result, and RFLAGS after it. Operands have no bits beyond `width`.
    pub(super) const fn apply(self, left: u64, right: u64, width: Width, rflags: u64) -> (u64, u64) {
        let carry = rflags & CF;
        let (value, flags) = match self {
            Self::Add => add(left, right, 0, width),
            Self::AddWithCarry => add(left, right, carry, width),
            Self::Subtract | Self::Compare => subtract(left, right, 0, width),
            Self::SubtractWithBorrow => subtract(left, right, carry, width),
            Self::And | Self::Test => (left & right, 0),
            Self::Or => (left | right, 0),
            Self::Xor => (left ^ right, 0),
        };
        (value, rflags & !(CF | PF | AF | ZF | SF | OF) | flags | of_result(value, width))
    }
}

/// Sum, with CF, AF and OF.
const fn add(left: u64, right: u64, carry: u64, width: Width) -> (u64, u64) {
    let wide = left as u128 + right as u128 + carry as u128;
    let value = width.truncated(wide as u64);
    let out = if wide > width.mask() as u128 { CF } else { 0 };
    let overflows = (left ^ value) & (right ^ value) & width.sign() != 0;
    (value, out | half(left, right, value) | if overflows { OF } else { 0 })
}

/// Difference, with CF, AF and OF.
const fn subtract(left: u64, right: u64, borrow: u64, width: Width) -> (u64, u64) {
    let value = width.truncated(left.wrapping_sub(right).wrapping_sub(borrow));
    let out = if (left as u128) < right as u128 + borrow as u128 { CF } else { 0 };
    let overflows = (left ^ right) & (left ^ value) & width.sign() != 0;
    (value, out | half(left, right, value) | if overflows { OF } else { 0 })
}

/// AF: a carry out of bit 3, or a borrow into it.
const fn half(left: u64, right: u64, value: u64) -> u64 {
    (left ^ right ^ value) & AF
}

/// ZF, SF and PF, which is of the lowest byte.
const fn of_result(value: u64, width: Width) -> u64 {
    let zero = if value == 0 { ZF } else { 0 };
    let sign = if value & width.sign() != 0 { SF } else { 0 };
    let parity = if (value as u8).count_ones().is_multiple_of(2) { PF } else { 0 };
    zero | sign | parity
}
