//! The machine's console, whatever carries its bytes.
//!
//! Purpose: logs, panics and the guests' consoles go out of one line, polled.
//!
//! Protocol: one lock, so that lines of several CPUs do not mix. A record of the log has lines of its own, and repeats the line
//! that it interrupted ([`Line`]). A panic takes no lock ([`Console::print_at_once`]): its output may cut a line in two, but it
//! always comes.
//!
//! Lock order: last; nothing is taken under it.

use core::fmt::{self, Write};

use entresol_sync::Mutex;

use crate::line::Line;

/// What sends bytes. It works at any time, also while another CPU is in the middle of anything.
pub trait Uart {
    /// Sends a byte, when there is room.
    fn put(&self, byte: u8);
}

/// The console on a port.
pub struct Console<U> {
    uart: U,
    line: Mutex<Line>,
}

impl<U: Uart> Console<U> {
    /// Nothing stands on its line.
    pub const fn new(uart: U) -> Self {
        Self { uart, line: Mutex::new(Line::EMPTY) }
    }

    /// Writes bytes as they are, all of them before any other CPU's.
    pub fn write_bytes(&self, bytes: &[u8]) {
        self.write_on(&mut self.line.lock(), bytes);
    }

    /// Writes text, with CR before each LF, all of it before any other CPU's.
    pub fn write_fmt(&self, text: fmt::Arguments<'_>) {
        self.print_on(&mut self.line.lock(), text);
    }

    /// Writes text at once, whoever else is writing.
    pub fn print_at_once(&self, text: fmt::Arguments<'_>) {
        self.print(|bytes| bytes.iter().for_each(|byte| self.uart.put(*byte)), text);
    }

    /// Writes a record on lines of its own.
    fn write_record(&self, record: &log::Record<'_>) {
        let mut line = self.line.lock();
        let interrupted = line.clone();
        if interrupted.is_begun() {
            self.write_on(&mut line, b"\r\n");
        }
        self.print_on(&mut line, format_args!("[{}] {}: {}\n", record.level(), record.target(), record.args()));
        self.write_on(&mut line, interrupted.text());
    }

    fn write_on(&self, line: &mut Line, bytes: &[u8]) {
        for byte in bytes {
            line.put(*byte);
            self.uart.put(*byte);
        }
    }

    fn print_on(&self, line: &mut Line, text: fmt::Arguments<'_>) {
        self.print(|bytes| self.write_on(line, bytes), text);
    }

    fn print(&self, write: impl FnMut(&[u8]), text: fmt::Arguments<'_>) {
        // A formatter that gives up cuts the text short; there is nobody left to tell.
        if Text(write).write_fmt(text).is_err() {
            b"<formatting failed>\r\n".iter().for_each(|byte| self.uart.put(*byte));
        }
    }
}

impl<U: Uart + Send + Sync> log::Log for Console<U> {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            self.write_record(record);
        }
    }

    fn flush(&self) {}
}

/// Text, with CR before each LF.
struct Text<W>(W);

impl<W: FnMut(&[u8])> fmt::Write for Text<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for piece in text.as_bytes().split_inclusive(|byte| *byte == b'\n') {
            match piece.split_last() {
                Some((b'\n', body)) => {
                    (self.0)(body);
                    (self.0)(b"\r\n");
                }
                _ => (self.0)(piece),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use log::Log;
    use std::string::String;
    use std::vec::Vec;

    #[derive(Default)]
    struct Sent(Mutex<Vec<u8>>);

    impl Uart for Sent {
        fn put(&self, byte: u8) {
            self.0.lock().push(byte);
        }
    }

    fn sent(console: &Console<Sent>) -> String {
        String::from_utf8(core::mem::take(&mut *console.uart.0.lock())).unwrap()
    }

    #[test]
    fn a_record_has_lines_of_its_own_and_gives_the_line_back() {
        let console = Console::new(Sent::default());
        log::set_max_level(log::LevelFilter::Info);
        let record = |level, text: fmt::Arguments<'_>| {
            console.log(&log::Record::builder().level(level).target("here").args(text).build());
            sent(&console)
        };
        assert_eq!(record(log::Level::Warn, format_args!("one\ntwo")), "[WARN] here: one\r\ntwo\r\n");
        console.write_bytes(b"guest:~# ");
        assert_eq!(sent(&console), "guest:~# ");
        assert_eq!(record(log::Level::Info, format_args!("three")), "\r\n[INFO] here: three\r\nguest:~# ");
        assert_eq!(record(log::Level::Debug, format_args!("not asked for")), "");
    }

    #[test]
    fn text_has_cr_before_each_lf_and_bytes_are_as_they_are() {
        let console = Console::new(Sent::default());
        console.write_fmt(format_args!("\n{}b\n", "a\n"));
        assert_eq!(sent(&console), "\r\na\r\nb\r\n");
        console.write_bytes(b"\n");
        assert_eq!(sent(&console), "\n");
    }

    #[test]
    fn a_panic_waits_for_nobody() {
        let console = Console::new(Sent::default());
        let held = console.line.lock();
        console.print_at_once(format_args!("PANIC\n"));
        assert_eq!(sent(&console), "PANIC\r\n");
        drop(held);
    }

    #[test]
    fn what_cannot_be_formatted_says_so() {
        struct Bad;
        impl fmt::Display for Bad {
            fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
                Err(fmt::Error)
            }
        }
        let console = Console::new(Sent::default());
        console.write_fmt(format_args!("at {Bad}\n"));
        assert_eq!(sent(&console), "at <formatting failed>\r\n");
    }
}
