//! The machine's console: a PL011 (Arm DDI 0183, chapter 3).
//!
//! Purpose: logs, panics and the guests' consoles go out of it, polled; what is typed comes in by interrupt.
//!
//! Protocol: one lock for output, so that lines of several CPUs do not mix. A record of the log has lines of its own, and
//! repeats the line that it interrupted ([`Line`]). A panic takes no lock ([`Emergency`]): its output may cut a line in
//! two, but it always comes. Input has one reader at a time, under its own lock.
//!
//! The registers are driven here and not by a crate, because the emergency path must work without the MMU, without
//! atomics, and while another CPU is in the middle of anything.
//!
//! Lock order: last; nothing is taken under it.

use core::fmt::{self, Write};
use core::ptr;

use entresol_metal_common::line::Line;
use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicU64, Ordering};

use crate::boot::BootInfo;

/// Data.
const DR: u64 = 0x00;
/// Flags.
const FR: u64 = 0x18;
/// Line control.
const LCR_H: u64 = 0x2c;
/// Control.
const CR: u64 = 0x30;
/// FIFO levels.
const IFLS: u64 = 0x34;
/// Interrupt mask: one enables.
const IMSC: u64 = 0x38;
/// Interrupt clear.
const ICR: u64 = 0x44;

const FR_RXFE: u32 = 1 << 4;
const FR_TXFF: u32 = 1 << 5;
/// Eight bits, FIFOs on.
const LCR_H_FIFO_8N1: u32 = 0b111 << 4;
/// UARTEN, TXE, RXE.
const CR_ON: u32 = 1 << 0 | 1 << 8 | 1 << 9;
/// Receive (4), receive timeout (6), overrun (10).
const RX_INTERRUPTS: u32 = 1 << 4 | 1 << 6 | 1 << 10;

/// Registers' address; zero before the device tree was read.
static BASE: AtomicU64 = AtomicU64::new(0);
/// What stands on the last line.
static OUTPUT: Mutex<Line> = Mutex::new(Line::EMPTY);
static INPUT: Mutex<()> = Mutex::new(());

fn register_read(base: u64, register: u64) -> u32 {
    // SAFETY: `base` is a PL011 that the device tree names, mapped as Device memory, or untranslated.
    unsafe { ptr::read_volatile((base + register) as *const u32) }
}

fn register_write(base: u64, register: u64, value: u32) {
    // SAFETY: as above.
    unsafe { ptr::write_volatile((base + register) as *mut u32, value) }
}

/// Makes panics visible. Before the MMU is on.
pub(crate) fn early_init(base: u64) {
    BASE.store(base, Ordering::Relaxed);
    register_write(base, LCR_H, LCR_H_FIFO_8N1);
    register_write(base, CR, CR_ON);
}

/// Connects the log. Once, with MMU and caches on.
pub(crate) fn init(info: &BootInfo) {
    early_init(info.uart.registers.start);
    if log::set_logger(&Logger).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}

fn put(byte: u8) {
    let base = BASE.load(Ordering::Relaxed);
    if base == 0 {
        return;
    }
    while register_read(base, FR) & FR_TXFF != 0 {
        core::hint::spin_loop();
    }
    register_write(base, DR, u32::from(byte));
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
        for piece in text.as_bytes().split_inclusive(|byte| *byte == b'\n') {
            let (body, end) = match piece.split_last() {
                Some((b'\n', body)) => (body, &b"\r\n"[..]),
                _ => (piece, &[][..]),
            };
            write_on(self.line, body);
            write_on(self.line, end);
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

/// Lets received bytes interrupt. The caller routes and enables the interrupt (`BootInfo::uart.intid`).
pub fn enable_rx_interrupt() {
    let base = BASE.load(Ordering::Relaxed);
    register_write(base, IFLS, 0);
    register_write(base, ICR, RX_INTERRUPTS);
    register_write(base, IMSC, RX_INTERRUPTS);
}

/// Takes the next received byte, if there is one. Reading until `None` ends the interrupt. Bytes with line errors are
/// delivered as they came; what the FIFO had no room for is lost.
pub fn read_byte() -> Option<u8> {
    let _turn = INPUT.lock();
    let base = BASE.load(Ordering::Relaxed);
    if register_read(base, FR) & FR_RXFE != 0 {
        // Cleared first, looked at again after: a byte that comes in between is either seen here or interrupts anew.
        register_write(base, ICR, RX_INTERRUPTS);
        if register_read(base, FR) & FR_RXFE != 0 {
            return None;
        }
    }
    Some(register_read(base, DR) as u8)
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
