//! A ring of coalesced writes is a queue of 169, from any start position ("cache-ops", "The rest of the access table").
//!
//! Watches each write that the ring takes or refuses, and each that comes out: none is refused while there is room, none is
//! taken when there is none, and they come in order, each once.

use std::collections::VecDeque;

/// Writes that a ring holds: 170 entries of 24 bytes in a page, and one is always empty.
const ROOM: usize = 169;

/// What waits in a ring, kept the naive way.
#[derive(Debug, Default)]
pub struct Posted {
    waiting: VecDeque<u64>,
    next: u64,
}

impl Posted {
    /// The number of the next write.
    pub fn number(&self) -> u64 {
        self.next
    }

    /// The next write was put in, or refused.
    pub fn put(&mut self, accepted: bool) -> Option<String> {
        let waiting = self.waiting.len();
        if accepted {
            self.waiting.push_back(self.next);
            self.next += 1;
        }
        let did = if accepted { "took" } else { "refused" };
        (accepted == (waiting >= ROOM)).then(|| format!("the ring {did} a write while {waiting} of {ROOM} waited"))
    }

    /// The ring gave `number`, or says that nothing waits.
    pub fn took(&mut self, number: Option<u64>) -> Option<String> {
        let expected = self.waiting.pop_front();
        (number != expected).then(|| format!("the ring gave write {number:?}; the oldest that waited was {expected:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_queue_of_169() {
        let mut posted = Posted::default();
        assert!((0..ROOM).all(|_| posted.put(true).is_none()));
        assert!(posted.put(false).is_none() && posted.put(true).is_some(), "it is full");
        assert!(posted.took(Some(0)).is_none());
        assert!(posted.put(false).is_none(), "the wrong one is in it");
        assert!(posted.took(Some(2)).is_some(), "1 was lost");
        assert!(posted.took(Some(2)).is_none());
        assert!(posted.put(false).is_some(), "there is room");
    }
}
