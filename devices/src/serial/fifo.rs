//! The receive FIFO: characters with their error bits, 16 deep or one (Arm DDI 0183G, 2.4.3).

use serde::{Deserialize, Serialize};

use crate::saved::{BadState, check};

/// Depth with FIFOs on, at the revision that we show.
pub(crate) const DEPTH: usize = 16;

/// A break in a received character's error bits (UARTDR, 3.3.1).
pub(crate) const BREAK: u16 = 1 << 10;
/// An overrun in a received character's error bits: something before it was lost.
pub(crate) const OVERRUN: u16 = 1 << 11;

/// Received characters, oldest first. Each is a byte and the error bits of UARTDR above it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Fifo {
    slots: [u16; DEPTH],
    head: usize,
    len: usize,
    overrun: bool,
}

impl Fifo {
    pub(crate) const fn new() -> Self {
        Self { slots: [0; DEPTH], head: 0, len: 0, overrun: false }
    }

    /// Whether a FIFO that was read may be used.
    pub(crate) fn check(&self) -> Result<(), BadState> {
        check(self.head < DEPTH && self.len <= DEPTH, "serial.receive", "must have at most 16 characters in 16 places")
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Room for characters if the FIFO is `depth` deep now. What was queued before it became shallower stays.
    pub(crate) fn room(&self, depth: usize) -> usize {
        depth.min(DEPTH).saturating_sub(self.len)
    }

    /// Queues a character; `false` if it was lost for want of room, which the next one that fits will carry.
    pub(crate) fn push(&mut self, character: u16, depth: usize) -> bool {
        if self.room(depth) == 0 {
            self.overrun = true;
            return false;
        }
        let mark = if core::mem::take(&mut self.overrun) { OVERRUN } else { 0 };
        self.slots[(self.head + self.len) % DEPTH] = character | mark;
        self.len += 1;
        true
    }

    /// The oldest character, which stays.
    pub(crate) fn front(&self) -> Option<u16> {
        (self.len != 0).then(|| self.slots[self.head])
    }

    /// The oldest character.
    pub(crate) fn pop(&mut self) -> Option<u16> {
        if self.len == 0 {
            return None;
        }
        let character = self.slots[self.head];
        self.head = (self.head + 1) % DEPTH;
        self.len -= 1;
        Some(character)
    }
}

/// Characters at which the receive interrupt comes, from UARTIFLS bits 5:3 (3.3.9). Reserved encodings count as the
/// highest.
pub(crate) fn receive_trigger(ifls: u32) -> usize {
    match (ifls >> 3) & 7 {
        0 => DEPTH / 8,
        1 => DEPTH / 4,
        2 => DEPTH / 2,
        3 => DEPTH * 3 / 4,
        _ => DEPTH * 7 / 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_leave_in_order_across_the_wrap() {
        let mut fifo = Fifo::new();
        let mut next_in = 0u16;
        let mut next_out = 0u16;
        for round in 0..40 {
            for _ in 0..(round % DEPTH) {
                next_in += u16::from(fifo.push(next_in, DEPTH));
            }
            for _ in 0..(round % 7) {
                if let Some(character) = fifo.pop() {
                    assert_eq!(character & !OVERRUN, next_out);
                    next_out += 1;
                }
            }
            assert_eq!(fifo.len(), usize::from(next_in - next_out));
        }
    }

    #[test]
    fn an_overrun_marks_the_next_character_that_fits() {
        let mut fifo = Fifo::new();
        assert!(fifo.push(1, 1));
        assert!(!fifo.push(2, 1));
        assert_eq!(fifo.pop(), Some(1));
        assert!(fifo.push(3, 1));
        assert_eq!(fifo.pop(), Some(3 | OVERRUN));
        assert!(fifo.push(4, 1));
        assert_eq!(fifo.pop(), Some(4));
        assert_eq!(fifo.pop(), None);
    }

    #[test]
    fn a_fifo_made_shallower_keeps_what_it_holds() {
        let mut fifo = Fifo::new();
        for character in 0..5 {
            assert!(fifo.push(character, DEPTH));
        }
        assert_eq!(fifo.room(1), 0);
        assert_eq!((0..5).map(|_| fifo.pop().unwrap()).sum::<u16>(), 10);
    }

    #[test]
    fn trigger_levels_are_the_manuals() {
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(|n| receive_trigger(n << 3)), [2, 4, 8, 12, 14, 14, 14, 14]);
        assert_eq!(receive_trigger(0x07), 2, "the transmit field does not matter");
    }
}
