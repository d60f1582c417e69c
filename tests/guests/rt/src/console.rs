//! The PL011 (Arm DDI 0183, chapter 3) as a place to print to, from any CPU, and to read from.

use core::fmt::{self, Write};
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::machine::UART;
use crate::memory;

const DR: u64 = UART;
const FR: u64 = UART + 0x18;
const LCR_H: u64 = UART + 0x2c;
const CR: u64 = UART + 0x30;
const IMSC: u64 = UART + 0x38;
/// FR: the receive FIFO is empty.
const RXFE: u32 = 1 << 4;
/// FR: the transmit FIFO is full.
const TXFF: u32 = 1 << 5;
/// LCR_H: 8 bits, FIFOs on.
const WORD_8_FIFO: u32 = 3 << 5 | 1 << 4;
/// CR: receive, transmit, the UART itself.
const ENABLE: u32 = 1 << 9 | 1 << 8 | 1;

static BUSY: AtomicBool = AtomicBool::new(false);

/// Makes the UART transmit, whatever was done to it before.
pub fn init() {
    memory::store32(CR, 0);
    memory::store32(LCR_H, WORD_8_FIFO);
    memory::store32(IMSC, 0);
    memory::store32(CR, ENABLE);
}

/// Prints; lines of several CPUs do not mix.
pub fn print(arguments: fmt::Arguments<'_>) {
    while BUSY.swap(true, Ordering::Acquire) {
        spin_loop();
    }
    // The UART takes every byte: its formatter has no error to return.
    let _infallible = Port.write_fmt(arguments);
    BUSY.store(false, Ordering::Release);
}

/// Waits for the next byte that somebody sends.
pub fn read() -> u8 {
    while memory::load32(FR) & RXFE != 0 {
        spin_loop();
    }
    memory::load32(DR) as u8
}

/// Prints although another CPU may have stopped while it printed.
pub(crate) fn print_last(arguments: fmt::Arguments<'_>) {
    BUSY.store(false, Ordering::Release);
    print(arguments);
}

struct Port;

impl Write for Port {
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

fn put(byte: u8) {
    while memory::load32(FR) & TXFF != 0 {
        spin_loop();
    }
    memory::store32(DR, byte.into());
}

/// Prints a line.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => { $crate::console::print(format_args!("{}\n", format_args!($($argument)*))) };
}
