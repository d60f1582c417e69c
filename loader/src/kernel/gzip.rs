//! gzip members (RFC 1952), inflated in pieces.
//!
//! Purpose: a compressed kernel goes straight into guest memory, 32 KiB at a time; DEFLATE itself is `miniz_oxide`'s.
//!
//! Invariants: memory use is the window plus the decompressor's tables, allocated fallibly; output never exceeds the size that
//! the caller allows; a member is good only if its length and CRC-32 agree with its trailer.
//!
//! Known holes: one member only; the decompressor's 11 KiB pass over the stack once, when an [`Inflater`] is made.

use alloc::vec::Vec;
use core::ops::ControlFlow;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

use super::le32;

/// DEFLATE's window, and the size of a piece.
const WINDOW: usize = 32 * 1024;
/// Fixed part of the header, and trailer.
const HEADER: usize = 10;
const TRAILER: usize = 8;

/// FLG bits (RFC 1952 2.3.1).
mod flag {
    pub const HEADER_CRC: u8 = 1 << 1;
    pub const EXTRA: u8 = 1 << 2;
    pub const NAME: u8 = 1 << 3;
    pub const COMMENT: u8 = 1 << 4;
    pub const RESERVED: u8 = 0b1110_0000;
}

/// What is wrong with compressed data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GzipError {
    /// The header's method is not DEFLATE, or it has reserved flags.
    #[error("the gzip header names an unknown method or flag")]
    Header,
    /// It ends too early.
    #[error("the gzip data is cut off")]
    Truncated,
    /// It is no DEFLATE stream.
    #[error("the gzip data is damaged")]
    Corrupt,
    /// The inflated data is not as long as the trailer says.
    #[error("the gzip data does not inflate to the {expected} bytes of its trailer")]
    Length {
        /// Bytes by the trailer.
        expected: u64,
    },
    /// The inflated data has another CRC-32 than the trailer says.
    #[error("the gzip data's CRC-32 is {found:#010x}; its trailer says {expected:#010x}")]
    Checksum {
        /// By the trailer.
        expected: u32,
        /// Computed.
        found: u32,
    },
    /// No memory for the window.
    #[error("no memory to inflate")]
    OutOfMemory,
}

/// Whether `bytes` begin like a gzip member.
pub(super) fn is_gzip(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x1f\x8b")
}

/// ISIZE: bytes of the inflated data, which must be less than 4 GiB. True only if the data turns out to be so long.
pub(super) fn inflated_size(member: &[u8]) -> Result<u64, GzipError> {
    let (compressed, trailer) = split(member)?;
    if compressed.is_empty() {
        return Err(GzipError::Truncated);
    }
    Ok(le32(trailer, 4).ok_or(GzipError::Truncated)?.into())
}

/// The DEFLATE stream and the trailer.
fn split(member: &[u8]) -> Result<(&[u8], &[u8]), GzipError> {
    let header = header_size(member)?;
    let end = member.len().checked_sub(TRAILER).filter(|end| *end >= header).ok_or(GzipError::Truncated)?;
    Ok((&member[header..end], &member[end..]))
}

/// Bytes before the DEFLATE stream.
fn header_size(member: &[u8]) -> Result<usize, GzipError> {
    let fixed = member.get(..HEADER).ok_or(GzipError::Truncated)?;
    let flags = fixed[3];
    if fixed[2] != 8 || flags & flag::RESERVED != 0 {
        return Err(GzipError::Header);
    }
    let mut at = HEADER;
    if flags & flag::EXTRA != 0 {
        let length = super::le16(member, at).ok_or(GzipError::Truncated)?;
        at += 2 + usize::from(length);
    }
    for text in [flag::NAME, flag::COMMENT] {
        if flags & text != 0 {
            let rest = member.get(at..).ok_or(GzipError::Truncated)?;
            at += rest.iter().position(|byte| *byte == 0).ok_or(GzipError::Truncated)? + 1;
        }
    }
    if flags & flag::HEADER_CRC != 0 {
        at += 2;
    }
    Ok(at)
}

/// A decompressor and its window.
pub(super) struct Inflater {
    state: Vec<DecompressorOxide>,
    window: Vec<u8>,
}

impl Inflater {
    /// Allocates both.
    pub(super) fn new() -> Result<Self, GzipError> {
        let (mut state, mut window) = (Vec::new(), Vec::new());
        state.try_reserve_exact(1).map_err(|_| GzipError::OutOfMemory)?;
        window.try_reserve_exact(WINDOW).map_err(|_| GzipError::OutOfMemory)?;
        state.push(DecompressorOxide::new());
        window.resize(WINDOW, 0);
        Ok(Self { state, window })
    }

    /// The first bytes of the inflated data, as many as there are and `head` takes.
    pub(super) fn head<'a>(&mut self, member: &[u8], head: &'a mut [u8]) -> Result<&'a [u8], GzipError> {
        let mut filled = 0;
        self.stream(split(member)?.0, |bytes| {
            let part = bytes.len().min(head.len() - filled);
            head[filled..filled + part].copy_from_slice(&bytes[..part]);
            filled += part;
            if filled == head.len() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        Ok(&head[..filled])
    }

    /// Inflates the member, hands its data to `sink` piece by piece with the offset of each, and checks the trailer. Stops with
    /// success where `sink` breaks. `size` is what [`inflated_size`] said; no more is handed out.
    pub(super) fn run(
        &mut self,
        member: &[u8],
        size: u64,
        mut sink: impl FnMut(u64, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), GzipError> {
        let (compressed, trailer) = split(member)?;
        let mut checksum = crc32fast::Hasher::new();
        let (mut offset, mut stopped) = (0, false);
        self.stream(compressed, |bytes| {
            let next = offset + bytes.len() as u64;
            if next > size {
                offset = next;
                return ControlFlow::Break(());
            }
            checksum.update(bytes);
            let flow = sink(offset, bytes);
            stopped = flow.is_break();
            offset = next;
            flow
        })?;
        if stopped {
            return Ok(());
        }
        if offset != size {
            return Err(GzipError::Length { expected: size });
        }
        let (expected, found) = (le32(trailer, 0).ok_or(GzipError::Truncated)?, checksum.finalize());
        if expected == found { Ok(()) } else { Err(GzipError::Checksum { expected, found }) }
    }

    /// Inflates a DEFLATE stream until its end, or until `sink` breaks. What follows the end is not looked at: a trailer that
    /// does not stand right behind it gives itself away by its length or checksum.
    fn stream(
        &mut self,
        mut compressed: &[u8],
        mut sink: impl FnMut(&[u8]) -> ControlFlow<()>,
    ) -> Result<(), GzipError> {
        let Some(state) = self.state.first_mut() else { return Err(GzipError::OutOfMemory) };
        state.init();
        let mut position = 0;
        loop {
            let (status, consumed, produced) = decompress(state, compressed, &mut self.window, position, 0);
            if produced != 0 && sink(&self.window[position..position + produced]).is_break() {
                return Ok(());
            }
            compressed = &compressed[consumed..];
            position = (position + produced) % WINDOW;
            match status {
                TINFLStatus::Done => return Ok(()),
                TINFLStatus::HasMoreOutput if consumed + produced != 0 => {}
                TINFLStatus::FailedCannotMakeProgress | TINFLStatus::NeedsMoreInput => {
                    return Err(GzipError::Truncated);
                }
                _ => return Err(GzipError::Corrupt),
            }
        }
    }
}
