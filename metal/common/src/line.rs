//! The unfinished line of the console, so that a record of the log does not tear it.
//!
//! Purpose: guests print pieces of lines (a prompt, a program's progress), and the hypervisor's log comes in between. The
//! record then starts a line of its own, and what stood there before is printed again after it: a person sees the prompt
//! where it belongs, and so does a program that waits for it.
//!
//! Only what is seen is remembered: an escape sequence is not (a terminal would answer a question a second time), and a
//! backspace takes one character back. A line that is longer than [`MOST`] is not repeated.

/// Bytes of an unfinished line that are remembered.
pub const MOST: usize = 256;

const ESC: u8 = 0x1b;

/// Where in an escape sequence the last byte was (ECMA-48 5.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    None,
    /// ESC.
    Begun,
    /// CSI: ends with a byte of 0x40 to 0x7e.
    Control,
}

/// What stands on the line since it began.
#[derive(Clone, Debug)]
pub struct Line {
    bytes: [u8; MOST],
    used: usize,
    /// There was more than is remembered.
    cut: bool,
    escape: Escape,
}

impl Line {
    /// Nothing.
    pub const EMPTY: Self = Self { bytes: [0; MOST], used: 0, cut: false, escape: Escape::None };

    /// Whether something stands on the line.
    pub fn is_begun(&self) -> bool {
        self.used > 0 || self.cut
    }

    /// What is to be printed again.
    pub fn text(&self) -> &[u8] {
        if self.cut { &[] } else { &self.bytes[..self.used] }
    }

    /// `byte` was printed.
    pub fn put(&mut self, byte: u8) {
        match (self.escape, byte) {
            (_, ESC) => self.escape = Escape::Begun,
            (Escape::Begun, b'[') => self.escape = Escape::Control,
            (Escape::Begun, _) | (Escape::Control, 0x40..=0x7e) => self.escape = Escape::None,
            (Escape::Control, _) => {}
            (Escape::None, b'\n' | b'\r') => (self.used, self.cut) = (0, false),
            (Escape::None, 0x08) => self.used = self.used.saturating_sub(1),
            (Escape::None, b'\t' | 0x20..=0x7e | 0x80..) => self.keep(byte),
            (Escape::None, _) => {}
        }
    }

    fn keep(&mut self, byte: u8) {
        match self.bytes.get_mut(self.used) {
            Some(place) => {
                *place = byte;
                self.used += 1;
            }
            None => self.cut = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(text: &[u8]) -> Line {
        let mut line = Line::EMPTY;
        text.iter().for_each(|byte| line.put(*byte));
        line
    }

    #[test]
    fn what_is_seen_is_repeated() {
        for (printed, seen) in [
            (&b"one\ntwo"[..], &b"two"[..]),
            (b"one\r\n", b""),
            (b"10 %\r20 %", b"20 %"),
            (b"guest:/root# \x1b[6n", b"guest:/root# "),
            (b"\x1b[1;32mok\x1b[0m\x07", b"ok"),
            (b"\x1bcreset", b"reset"),
            (b"lx\x08s", b"ls"),
            (b"\x08\x08a", b"a"),
        ] {
            assert_eq!(after(printed).text(), seen, "{printed:?}");
            assert_eq!(after(printed).is_begun(), !seen.is_empty());
        }
    }

    #[test]
    fn a_long_line_is_begun_and_not_repeated() {
        let mut line = after(&[b'x'; MOST]);
        assert_eq!(line.text().len(), MOST);
        line.put(b'y');
        assert!(line.is_begun() && line.text().is_empty());
        line.put(b'\n');
        line.put(b'z');
        assert_eq!(line.text(), b"z");
    }
}
