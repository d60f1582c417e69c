//! The machine's console: a PL011 (Arm DDI 0183, chapter 3).
//!
//! Purpose: logs, panics and the guests' consoles go out of it, polled; what is typed comes in by interrupt.
//!
//! Protocol: output is [`entresol_metal_common::console`]'s; a panic takes no lock ([`emergency`]). Input has one reader at a time, under
//! a lock of its own.
//!
//! The registers are driven here and not by a crate, because the emergency path must work without the MMU, without
//! atomics, and while another CPU is in the middle of anything.
//!
//! Lock order: last; nothing is taken under it.

use core::fmt;
use core::ptr;

use entresol_metal_common::console::{Console, Uart};
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
static CONSOLE: Console<Pl011> = Console::new(Pl011);
static INPUT: Mutex<()> = Mutex::new(());

/// The port.
struct Pl011;

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
    if log::set_logger(&CONSOLE).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}

impl Uart for Pl011 {
    fn put(&self, byte: u8) {
        let base = BASE.load(Ordering::Relaxed);
        if base == 0 {
            return;
        }
        while register_read(base, FR) & FR_TXFF != 0 {
            core::hint::spin_loop();
        }
        register_write(base, DR, u32::from(byte));
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
