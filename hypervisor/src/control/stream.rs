//! Lines in and lines out, over a channel that takes and gives pieces.
//!
//! Invariants: all room is made once. A line goes out whole or not at all: it is written only while there is room for
//! the longest ([`Writer::has_room`]), and whoever would write more waits with the reason for it, not with the line. So an
//! answer is never lost, and a request whose answer would have no room is not read: its client waits.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use entresol_sync::Mutex;
use entresol_wire::control::{Code, Error, Event, LineTooLong, Lines, MAX_LINE, Message, Response};

use super::channel::{BUFFER, Channel, Received};
use crate::vm::OutOfHeap;

/// Bytes of lines that wait for room in the channel.
const WAITING: usize = 2 * MAX_LINE;

/// A piece of memory that is made once.
///
/// # Errors
///
/// [`OutOfHeap`].
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

impl Reader {
    /// Nothing was said yet.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn new() -> Result<Self, OutOfHeap> {
        let lines = Lines::new(MAX_LINE - 1).map_err(|_| OutOfHeap)?;
        let piece = room(BUFFER)?.try_into().map_err(|_| OutOfHeap)?;
        Ok(Self { lines, piece, start: 0, end: 0 })
    }

    /// The next line of what was filled in.
    pub fn line(&mut self) -> Option<Result<&[u8], LineTooLong>> {
        let mut rest = &self.piece[self.start..self.end];
        let line = self.lines.next(&mut rest);
        self.start = self.end - rest.len();
        line
    }

    /// Reads more; when [`Reader::line`] has nothing more to give.
    pub fn fill(&mut self, channel: &Mutex<Channel>) -> Option<Received> {
        let received = channel.lock().receive(&mut self.piece);
        (self.start, self.end) = match received {
            Some(Received::Bytes(count)) => (0, count),
            Some(Received::Closed) | None => (0, 0),
        };
        received
    }

    /// Forgets a line that was begun.
    pub fn reset(&mut self) {
        // A line's end gives what was there as a line, which nobody wants.
        let _unfinished = self.lines.next(&mut &b"\n"[..]);
        (self.start, self.end) = (0, 0);
    }
}

/// What we say, in lines.
pub struct Writer {
    waiting: VecDeque<u8>,
    line: Box<[u8]>,
}

impl Writer {
    /// Nothing is said yet.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn new() -> Result<Self, OutOfHeap> {
        let mut waiting = VecDeque::new();
        waiting.try_reserve_exact(WAITING).map_err(|_| OutOfHeap)?;
        Ok(Self { waiting, line: room(MAX_LINE)? })
    }

    /// Whether there is room for any line.
    pub fn has_room(&self) -> bool {
        WAITING - self.waiting.len() >= MAX_LINE
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Forgets what waits.
    pub fn reset(&mut self) {
        self.waiting.clear();
    }

    /// Says a response. There is room.
    pub fn respond(&mut self, id: Option<u64>, response: Response<'_>) {
        if self.put(&Message::Response(response)) {
            return;
        }
        let error = Error::new(Code::AnswerTooLong, "the answer does not fit into a line");
        let fits = self.put(&Message::Response(Response { id, result: Err(error) }));
        assert!(fits, "a refusal is short");
    }

    /// Says an event. There is room.
    pub fn tell(&mut self, event: Event<'_>) {
        let fits = self.put(&Message::Event(event));
        assert!(fits, "the parts of an event are bounded so that it fits");
    }

    fn put(&mut self, message: &Message<'_>) -> bool {
        assert!(self.has_room());
        let encoded = message.encode(&mut self.line);
        encoded.is_ok_and(|line| {
            self.waiting.extend(line);
            true
        })
    }

    /// Gives the channel what it takes.
    pub fn push(&mut self, channel: &Mutex<Channel>) {
        let mut channel = channel.lock();
        loop {
            let (first, _) = self.waiting.as_slices();
            let sent = channel.send(first);
            self.waiting.drain(..sent);
            if sent == 0 {
                return;
            }
        }
    }
}
