//! Between registers and memory order.
//!
//! Bytes stand in the order of their addresses. An element (one register's bytes) is reversed as a whole where data is
//! big-endian, Q registers included (Arm DDI 0487 B2.8.2).

use super::{Bank, MAX_BYTES, Transfer};

/// A register: the low 64 bits, then those that only V registers have.
pub type Value = [u64; 2];

impl Transfer {
    /// What a load of element `index` (0, or 1 for a pair) puts into its register.
    pub fn loaded(&self, bytes: &[u8; MAX_BYTES], index: usize, big_endian: bool) -> Value {
        let size = usize::from(self.size);
        let mut element = [0; 16];
        let from = bytes.iter().skip(index * size).take(size);
        element.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        if big_endian {
            element[..size].reverse();
        }
        let value = u128::from_le_bytes(element);
        let (low, high) = (value as u64, (value >> 64) as u64);
        match self.bank {
            Bank::Vector => [low, high],
            Bank::General { sign_extend, wide } => [extend(low, self.size, sign_extend, wide), 0],
        }
    }

    /// Puts the value that a register holds where a store of element `index` has it.
    pub fn store(&self, bytes: &mut [u8; MAX_BYTES], index: usize, value: Value, big_endian: bool) {
        let size = usize::from(self.size);
        let mut element = (u128::from(value[1]) << 64 | u128::from(value[0])).to_le_bytes();
        if big_endian {
            element[..size].reverse();
        }
        let to = bytes.iter_mut().skip(index * size).take(size);
        to.zip(element).for_each(|(to, from)| *to = from);
    }
}

/// The low `size` bytes, at most 8, as a general register gets them (C6.2, LDR and LDRS*).
#[inline]
pub const fn extend(value: u64, size: u8, sign_extend: bool, wide: bool) -> u64 {
    if size >= 8 {
        return value;
    }
    let unused = 64 - size as u32 * 8;
    let high = value << unused;
    if !sign_extend {
        return high >> unused;
    }
    let signed = (high as i64 >> unused) as u64;
    if wide { signed } else { signed & 0xffff_ffff }
}

/// A naturally aligned part of an access, of 1, 2, 4 or 8 bytes: what a device sees as one. It lies in one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins.
    pub address: u64,
    /// How many bytes after the access's first it begins.
    pub offset: usize,
    /// Its bytes.
    pub size: u8,
}

/// The parts of an access of `length` bytes at `address`, as large as alignment allows but no larger than an element of
/// `element` bytes: each byte once, addresses ascending. Addresses wrap.
pub const fn pieces(address: u64, length: usize, element: u8) -> Pieces {
    Pieces { address, length, element, offset: 0 }
}

/// Iterator of [`pieces`].
#[derive(Clone, Debug)]
pub struct Pieces {
    address: u64,
    length: usize,
    element: u8,
    offset: usize,
}

impl Iterator for Pieces {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.offset >= self.length {
            return None;
        }
        let (offset, address) = (self.offset, self.address.wrapping_add(self.offset as u64));
        // What is left of this element; a device never sees bytes of two registers in one access.
        let left = self.element as usize - offset % self.element as usize;
        let size = 1 << address.trailing_zeros().min(left.ilog2()).min(3);
        self.offset += size;
        Some(Piece { address, offset, size: size as u8 })
    }
}
