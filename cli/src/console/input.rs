//! Input on its way to a guest that may take it slowly, or not at all.
//!
//! Protocol: one request is under way at a time. The answer says how many bytes were taken; if not all, nothing is sent
//! until the hypervisor says that there is room. What was not taken stays at the front, in order.

use entresol_wire::control::CONSOLE_CHUNK;

/// Most bytes kept for a guest that does not take them.
pub const LIMIT: usize = 64 << 10;

/// Bytes that the guest has not taken.
#[derive(Debug, Default)]
pub struct Input {
    pending: Vec<u8>,
    /// Id and length of the request under way.
    under_way: Option<(u64, usize)>,
    /// The guest has no room.
    full: bool,
    /// Length of the chunk that [`Input::ready`] gave out last.
    offered: usize,
}

impl Input {
    /// Adds bytes; gives how many were dropped because too many are waiting.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let room = LIMIT - self.pending.len();
        let taken = bytes.len().min(room);
        self.pending.extend_from_slice(&bytes[..taken]);
        bytes.len() - taken
    }

    /// Whether a pipe should be read: there is room for what one read can give.
    pub fn wants_more(&self) -> bool {
        self.pending.len() <= LIMIT / 2
    }

    /// The bytes to send now, if any. [`Self::sent`] must follow.
    pub fn ready(&mut self) -> Option<&[u8]> {
        if self.pending.is_empty() || self.full || self.under_way.is_some() {
            return None;
        }
        self.offered = self.pending.len().min(CONSOLE_CHUNK);
        Some(&self.pending[..self.offered])
    }

    /// What [`Self::ready`] gave was sent as request `id`.
    pub fn sent(&mut self, id: u64) {
        self.under_way = Some((id, self.offered));
    }

    /// The answer to request `id`: so many bytes were taken.
    ///
    /// # Errors
    /// That request is not under way, or had fewer bytes.
    pub fn accepted(&mut self, id: u64, bytes: u32) -> Result<(), String> {
        let taken = bytes as usize;
        match self.under_way.take() {
            Some((sent, length)) if sent == id && taken <= length => {
                self.pending.drain(..taken);
                self.full = taken < length;
                Ok(())
            }
            other => Err(format!("{bytes} bytes of request {id} were taken, under way is {other:?}")),
        }
    }

    /// There is room again.
    pub fn resume(&mut self) {
        self.full = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_is_under_way_at_a_time() {
        let mut input = Input::default();
        assert_eq!(input.ready(), None);
        input.push(b"abc");
        assert_eq!(input.ready(), Some(&b"abc"[..]));
        input.sent(1);
        input.push(b"d");
        assert_eq!(input.ready(), None);
        input.accepted(1, 3).expect("under way");
        assert_eq!(input.ready(), Some(&b"d"[..]));
    }

    #[test]
    fn what_was_not_taken_waits_for_room() {
        let mut input = Input::default();
        input.push(b"abc");
        assert!(input.ready().is_some());
        input.sent(1);
        input.accepted(1, 1).expect("under way");
        assert_eq!(input.ready(), None);
        input.resume();
        assert_eq!(input.ready(), Some(&b"bc"[..]));
    }

    #[test]
    fn answers_that_make_no_sense_are_errors() {
        let mut input = Input::default();
        assert!(input.accepted(1, 0).is_err());
        input.push(b"abc");
        assert!(input.ready().is_some());
        input.sent(1);
        assert!(input.accepted(1, 4).is_err());
    }

    #[test]
    fn memory_is_bounded_and_chunks_fit_the_channel() {
        let mut input = Input::default();
        assert!(input.wants_more());
        assert_eq!(input.push(&vec![b'x'; LIMIT]), 0);
        assert!(!input.wants_more());
        assert_eq!(input.push(b"yz"), 2);
        assert_eq!(input.ready().map(<[u8]>::len), Some(CONSOLE_CHUNK));
    }
}
