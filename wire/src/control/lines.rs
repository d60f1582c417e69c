//! Lines out of a stream that arrives in pieces.
//!
//! Protocol: bytes go in as they arrive, whole lines come out. A line that grows past the limit is reported once, at the
//! byte that is too much, and skipped up to its newline; the next line is read as if nothing had been. Empty lines
//! are dropped, and so is a carriage return before the newline.
//!
//! Invariants: the buffer is made once and never grows, whatever arrives.

use alloc::collections::TryReserveError;
use alloc::vec::Vec;

/// Collects one line at a time.
#[derive(Debug)]
pub struct Lines {
    buffer: Vec<u8>,
    limit: usize,
    state: Reading,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    /// The buffer holds the start of a line.
    Line,
    /// The buffer holds a line that was given out.
    Given,
    /// The rest of a line that was too long goes by.
    Skipping,
}

/// A line was longer than the limit; it is skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a line is longer than {limit} bytes")]
pub struct LineTooLong {
    /// The most bytes that a line may have, without its newline.
    pub limit: usize,
}

impl Lines {
    /// For lines of at most `limit` bytes, newline not counted.
    ///
    /// # Errors
    /// There is no heap for the buffer.
    pub fn new(limit: usize) -> Result<Self, TryReserveError> {
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(limit)?;
        Ok(Self { buffer, limit, state: Reading::Line })
    }

    /// Takes bytes from the front of `chunk` up to the end of a line, and gives that line; `None` when `chunk` is empty
    /// and the line goes on. Call it until then.
    ///
    /// # Errors
    /// The line is too long. Go on calling: it will be skipped.
    pub fn next<'a>(&'a mut self, chunk: &mut &[u8]) -> Option<Result<&'a [u8], LineTooLong>> {
        if self.state == Reading::Given {
            self.buffer.clear();
            self.state = Reading::Line;
        }
        while !chunk.is_empty() {
            let newline = chunk.iter().position(|&byte| byte == b'\n');
            let (piece, rest) = chunk.split_at(newline.unwrap_or(chunk.len()));
            *chunk = rest.get(1..).unwrap_or_default();
            if self.state == Reading::Line && piece.len() > self.limit - self.buffer.len() {
                self.buffer.clear();
                self.state = if newline.is_some() { Reading::Line } else { Reading::Skipping };
                return Some(Err(LineTooLong { limit: self.limit }));
            }
            if self.state == Reading::Line {
                self.buffer.extend_from_slice(piece);
            }
            if newline.is_none() {
                continue;
            }
            if self.state == Reading::Skipping {
                self.state = Reading::Line;
                continue;
            }
            if self.buffer.last() == Some(&b'\r') {
                self.buffer.pop();
            }
            if !self.buffer.is_empty() {
                self.state = Reading::Given;
                return Some(Ok(&self.buffer));
            }
        }
        None
    }
}
