//! What a chip says of itself: the CFI query table (JESD68.01, section 4) and its identifiers.
//!
//! Numbers are one chip's: a driver that finds two side by side doubles them.

use super::{BLOCK, CHIPS};

/// Intel.
pub const MANUFACTURER: u8 = 0x89;
/// The device that QEMU's `virt` shows.
pub const DEVICE: u8 = 0x18;
/// Bytes of the write buffer, as a power of two.
pub const BUFFER_SHIFT: u8 = 10;

/// Where the primary command set's own table begins.
const EXTENDED: u8 = 0x31;

/// The fixed part, from 0x10. Times are powers of two and mean nothing: everything is done at once.
#[rustfmt::skip]
const TABLE: [u8; 0x31] = [
    b'Q', b'R', b'Y',
    0x01, 0x00,         // 13: primary command set: Intel extended
    EXTENDED, 0x00,     // 15: its table
    0x00, 0x00,         // 17: no other command set
    0x00, 0x00,         // 19
    0x17, 0x20,         // 1b: 1.7–2.0 V
    0x85, 0x95,         // 1d: programming voltage 8.5–9.5 V
    0x06, 0x09,         // 1f: 64 µs for a word, 512 µs for a buffer
    0x0a, 0x00,         // 21: 1 s for a block; no erasure of the chip
    0x01, 0x01,         // 23: at most twice that
    0x02, 0x00,         // 25: at most four times that
    0x00,               // 27: bytes of the chip, filled in
    0x01, 0x00,         // 28: 16-bit bus
    BUFFER_SHIFT, 0x00, // 2a: write buffer
    0x01,               // 2c: all blocks have one size
    0x00, 0x00,         // 2d: blocks less one, filled in
    0x00, 0x00,         // 2f: bytes of a block / 256, filled in
    b'P', b'R', b'I',   // 31
    b'1', b'0',         // 34: version
    0x20, 0, 0, 0,      // 36: each block can be locked at once, nothing else
    0x00,               // 3a: nothing while suspended
    0x01, 0x00,         // 3b: a block's lock can be read
    0x18, 0x90,         // 3d: best at 1.8 V and 9.0 V
    0x00,               // 3f: no protection registers
    0x00,               // 40
];

/// Word `word` of the query for a chip of `bytes` bytes, a power of two.
pub fn query(word: u64, bytes: u64) -> u8 {
    let chip_block = BLOCK / CHIPS as u64;
    let [more, more_high, ..] = (bytes / chip_block - 1).to_le_bytes();
    let [size, size_high, ..] = (chip_block / 256).to_le_bytes();
    // Eight address lines are decoded, so the 0x55 of the command needs no care.
    match word & 0xff {
        0x00 => MANUFACTURER,
        0x01 => DEVICE,
        0x27 => bytes.trailing_zeros() as u8,
        0x2d => more,
        0x2e => more_high,
        0x2f => size,
        0x30 => size_high,
        at => at.checked_sub(0x10).and_then(|index| TABLE.get(index as usize)).copied().unwrap_or(0),
    }
}
