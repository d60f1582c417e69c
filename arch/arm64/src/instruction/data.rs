//! Between registers and memory order.
//!
//! Bytes stand in the order of their addresses. An element (one register's bytes) is reversed as a whole where data is
//! big-endian, Q registers included (Arm DDI 0487 B2.8.2).

use super::{Bank, MAX_BYTES, Transfer};

/// A register: the low 64 bits, then those that only V registers have.
pub type Value = [u64; 2];

impl Transfer {
    /// What a load of element `index` (0, or 1 for a pair) puts into its register.
    #[inline]
    pub fn loaded(&self, bytes: &[u8; MAX_BYTES], index: usize, big_endian: bool) -> Value {
        let at = index * usize::from(self.size);
        let [low, high] = match self.size {
            16 if big_endian => [chunk(bytes, at + 8).swap_bytes(), chunk(bytes, at).swap_bytes()],
            16 => [chunk(bytes, at), chunk(bytes, at + 8)],
            size => [ordered(get(bytes, at, size), size, big_endian), 0],
        };
        match self.bank {
            Bank::Vector => [low, high],
            Bank::General { sign_extend, wide } => [extend(low, self.size, sign_extend, wide), 0],
        }
    }

    /// Puts the value that a register holds where a store of element `index` has it.
    #[inline]
    pub fn store(&self, bytes: &mut [u8; MAX_BYTES], index: usize, value: Value, big_endian: bool) {
        let at = index * usize::from(self.size);
        let [low, high] = value;
        match self.size {
            16 => {
                let [first, second] = if big_endian { [high.swap_bytes(), low.swap_bytes()] } else { [low, high] };
                put(bytes, at, 8, first);
                put(bytes, at + 8, 8, second);
            }
            size => put(bytes, at, size, ordered(extend(low, size, false, false), size, big_endian)),
        }
    }
}

/// The low `size` bytes of a value, at most 8 and the rest zero, in the other order if data is big-endian.
#[inline]
const fn ordered(value: u64, size: u8, big_endian: bool) -> u64 {
    if big_endian { value.swap_bytes() >> (64 - size as u32 * 8) } else { value }
}

/// Eight bytes, the first the lowest; what would lie past the end is zero.
#[inline]
fn chunk(bytes: &[u8; MAX_BYTES], at: usize) -> u64 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// `size` bytes (1, 2, 4 or 8) at `at`, the first the lowest: as a little-endian device sees them.
#[inline]
pub fn get(bytes: &[u8; MAX_BYTES], at: usize, size: u8) -> u64 {
    let bytes = bytes.get(at..).unwrap_or_default();
    let value = match size {
        1 => bytes.first().map(|byte| u64::from(*byte)),
        2 => bytes.first_chunk().map(|bytes| u16::from_le_bytes(*bytes).into()),
        4 => bytes.first_chunk().map(|bytes| u32::from_le_bytes(*bytes).into()),
        _ => bytes.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)),
    };
    value.unwrap_or(0)
}

/// Puts the low `size` bytes of `value` at `at`; nothing if they do not fit.
#[inline]
pub fn put(bytes: &mut [u8; MAX_BYTES], at: usize, size: u8, value: u64) {
    let bytes = bytes.get_mut(at..).unwrap_or_default();
    match size {
        1 => bytes.first_chunk_mut().map(|bytes| *bytes = (value as u8).to_le_bytes()),
        2 => bytes.first_chunk_mut().map(|bytes| *bytes = (value as u16).to_le_bytes()),
        4 => bytes.first_chunk_mut().map(|bytes| *bytes = (value as u32).to_le_bytes()),
        _ => bytes.first_chunk_mut().map(|bytes| *bytes = value.to_le_bytes()),
    };
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
