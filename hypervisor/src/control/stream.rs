//! Lines in and lines out, over a channel that takes and gives pieces.
//!
//! Invariants: all room is made once. A line goes out whole or not at all: it is written only while there is room for
//! the longest ([`Writer::has_room`]), and whoever would write more waits with the reason for it, not with the line. So an
//! answer is never lost, and a request whose answer would have no room is not read: its client waits.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use entresol_sync::Mutex;
use entresol_wire::control::{Code, Error, LineTooLong, Lines, MAX_LINE, Message, Response};

use super::channel::{BUFFER, Channel, Received};
use crate::vm::OutOfHeap;

/// Bytes of lines that wait for room in the channel.
const WAITING: usize = 2 * MAX_LINE;

/// A piece of memory that is made once.
pub fn room(bytes: usize) -> Result<Box<[u8]>, OutOfHeap> {
    let mut room = Vec::new();
    room.try_reserve_exact(bytes).map_err(|_| OutOfHeap)?;
    room.resize(bytes, 0);
    Ok(room.into_boxed_slice())
}

/// What the host says, in lines.
pub struct Reader {
    lines: Lines,
    piece: Box<[u8; BUFFER]>,
    /// The part of `piece` that is not yet cut into lines.
    start: usize,
    end: usize,
}

/// The next thing that the host says.
pub enum Said<'a> {
    /// A line, or that it was too long.
    Line(Result<&'a [u8], LineTooLong>),
    /// Nobody is there any more; a line that was begun is forgotten.
    Closed,
    /// Nothing, for now.
    Nothing,
}

impl Reader {
    /// Nothing was said yet.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn new() -> Result<Self, OutOfHeap> {
        let lines = Lines::new(MAX_LINE - 1).map_err(|_| OutOfHeap)?;
        let piece = room(BUFFER)?.try_into().expect("it is that long");
        Ok(Self { lines, piece, start: 0, end: 0 })
    }

    /// The next thing; reads `channel` as far as it must.
    pub fn next(&mut self, channel: &Mutex<Channel>) -> Said<'_> {
        loop {
            let mut rest = &self.piece[self.start..self.end];
            // The borrow of a line that is returned would last over the loop: so it is found first, and fetched after.
            if self.lines.find(&mut rest) {
                break;
            }
            self.start = self.end - rest.len();
        }
        Said::Nothing
    }
}
