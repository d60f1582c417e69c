//! The machine's console: a 16550 at COM1 (National Semiconductor PC16550D, 8).
//!
//! Purpose: logs, panics and the guests' consoles go out of it, polled; what is typed comes in by interrupt.
//!
//! Protocol: output is [`entresol_metal_common::console`]'s; a panic takes no lock ([`emergency`]). Input has one reader at a time, under
//! a lock of its own.
//!
//! The registers are driven here and not by a crate, because the emergency path must work while another CPU is in the middle
//! of anything.
//!
//! Lock order: last; nothing is taken under it.
//!
//! Known holes: COM1 is taken for granted.

use core::fmt;

use entresol_metal_common::console::{Console, Uart};
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

static CONSOLE: Console<Com1> = Console::new(Com1);
static INPUT: Mutex<()> = Mutex::new(());

/// The port.
struct Com1;

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
    if log::set_logger(&CONSOLE).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}

impl Uart for Com1 {
    fn put(&self, byte: u8) {
        while register_read(LINE_STATUS) & EMPTY == 0 {
            core::hint::spin_loop();
        }
        register_write(DATA, byte);
    }
}

/// Writes bytes as they are, all of them before any other CPU's.
pub fn write_bytes(bytes: &[u8]) {
    CONSOLE.write_bytes(bytes);
}

/// Writes text, with CR before each LF, all of it before any other CPU's.
pub fn write_fmt(text: fmt::Arguments<'_>) {
    CONSOLE.write_fmt(text);
}

/// Writes text at once, whoever else is writing: for panics.
pub(crate) fn emergency(text: fmt::Arguments<'_>) {
    CONSOLE.print_at_once(text);
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
