//! The machine's console: a 16550 at COM1 (National Semiconductor PC16550D, 8).
//!
//! Purpose: logs, panics and the guests' consoles go out of it, polled; what is typed comes in by interrupt.
//!
//! Protocol: one lock for output, so that lines of several CPUs do not mix. A record of the log has lines of its own, and
//! repeats the line that it interrupted ([`Line`]). A panic takes no lock ([`Emergency`]): its output may cut a line in
//! two, but it always comes. Input has one reader at a time, under its own lock.
//!
//! The registers are driven here and not by a crate, because the emergency path must work while another CPU is in the middle
//! of anything.
//!
//! Lock order: last; nothing is taken under it.
//!
//! Known holes: COM1 is taken for granted.

use core::fmt::{self, Write};

use entresol_metal_common::line::Line;
use entresol_sync::Mutex;
use x86_64::instructions::port::Port;

/// COM1's first port.
const COM1: u16 = 0x3f8;
/// Offsets: data, or the divisor's low half; interrupt enable, or its high half; FIFO control; line control; modem control; line status.
const DATA: u16 = 0;
const INTERRUPTS: u16 = 1;
const FIFO: u16 = 2;
const LINE_CONTROL: u16 = 3;
const MODEM: u16 = 4;
const LINE_STATUS: u16 = 5;

/// Line control: the divisor is seen; eight bits, no parity, one stop bit.
const DIVISOR: u8 = 1 << 7;
const EIGHT_N_1: u8 = 0b11;
/// 115,200 baud.
const FASTEST: u8 = 1;
/// FIFOs on and empty.
const FIFO_ON: u8 = 0b111;
/// DTR, RTS; OUT2, which lets a PC's interrupt through.
const READY: u8 = 0b11;
const OUT2: u8 = 1 << 3;
/// Interrupts: received data, and that some wait.
const RECEIVED: u8 = 1 << 0;
/// Line status: there is data; the transmitter takes a byte.
const THERE: u8 = 1 << 0;
const EMPTY: u8 = 1 << 5;

static OUTPUT: Mutex<Line> = Mutex::new(Line::EMPTY);
static INPUT: Mutex<()> = Mutex::new(());

fn register_read(offset: u16) -> u8 {
    // SAFETY: a register of COM1, which nobody else has.
    unsafe { Port::new(COM1 + offset).read() }
}

fn register_write(offset: u16, value: u8) {
    // SAFETY: a register of COM1, which nobody else has.
    unsafe { Port::new(COM1 + offset).write(value) }
}

/// Makes panics visible.
pub(crate) fn early_init() {
    register_write(INTERRUPTS, 0);
    register_write(LINE_CONTROL, DIVISOR);
    register_write(DATA, FASTEST);
    register_write(INTERRUPTS, 0);
    register_write(LINE_CONTROL, EIGHT_N_1);
    register_write(FIFO, FIFO_ON);
    register_write(MODEM, READY);
}

/// Connects the log. Once.
pub(crate) fn init() {
    if log::set_logger(&Logger).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}

fn put(byte: u8) {
    while register_read(LINE_STATUS) & EMPTY == 0 {
        core::hint::spin_loop();
    }
    register_write(DATA, byte);
}

/// Writes bytes as they are, all of them before any other CPU's.
pub fn write_bytes(bytes: &[u8]) {
    write_on(&mut OUTPUT.lock(), bytes);
}

fn write_on(line: &mut Line, bytes: &[u8]) {
    for byte in bytes {
        line.put(*byte);
        put(*byte);
    }
}

/// Writes text, with CR before each LF, all of it before any other CPU's.
pub fn write_fmt(text: fmt::Arguments<'_>) {
    print(&mut OUTPUT.lock(), text);
}

/// Writes a record on lines of its own.
fn write_record(record: &log::Record<'_>) {
    let mut line = OUTPUT.lock();
    let interrupted = line.clone();
    if interrupted.is_begun() {
        write_on(&mut line, b"\r\n");
    }
    print(&mut line, format_args!("[{}] {}: {}\n", record.level(), record.target(), record.args()));
    write_on(&mut line, interrupted.text());
}

fn print(line: &mut Line, text: fmt::Arguments<'_>) {
    // A formatter that gives up cuts the text short; there is nobody left to tell.
    if (Text { line }).write_fmt(text).is_err() {
        b"<formatting failed>\r\n".iter().copied().for_each(put);
    }
}

/// Text on a line, with CR before each LF.
struct Text<'a> {
    line: &'a mut Line,
}

impl fmt::Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                write_on(self.line, b"\r");
            }
            write_on(self.line, &[byte]);
        }
        Ok(())
    }
}

/// The console without its lock, for panics.
pub(crate) struct Emergency;

impl Emergency {
    /// Writes text at once, whoever else is writing.
    pub fn print(text: fmt::Arguments<'_>) {
        // A formatter that gives up cuts the text short; there is nobody left to tell.
        if Emergency.write_fmt(text).is_err() {
            b"<formatting failed>\r\n".iter().copied().for_each(put);
        }
    }
}

impl fmt::Write for Emergency {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                put(b'\r');
            }
            put(byte);
        }
        Ok(())
    }
}

/// Lets received bytes interrupt. The caller enables the interrupt (`BootInfo::uart.intid`).
pub fn enable_rx_interrupt() {
    register_write(MODEM, READY | OUT2);
    register_write(INTERRUPTS, RECEIVED);
}

/// Takes the next received byte, if there is one. Reading until `None` ends the interrupt. Bytes with line errors are
/// delivered as they came; what the FIFO had no room for is lost.
pub fn read_byte() -> Option<u8> {
    let _turn = INPUT.lock();
    (register_read(LINE_STATUS) & THERE != 0).then(|| register_read(DATA))
}

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            write_record(record);
        }
    }

    fn flush(&self) {}
}
