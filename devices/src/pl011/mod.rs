//! PL011 serial port (Arm DDI 0183G).
//!
//! Purpose: the console of every guest, from flat programs that store a byte and hope, through U-Boot and EDK2, which
//! poll, to Linux, which interrupts.
//!
//! Sending: a byte goes to the [`Terminal`] inside the store, whether or not UARTEN and TXE are set, because on QEMU's
//! `virt` programs may leave them clear. So the transmit FIFO is always empty, UARTFR never shows BUSY or TXFF, and
//! UARTTXINTR, which marks the passage down through the trigger level, comes at once after each byte; it stays until
//! UARTICR clears it. In loopback mode (UARTCR.LBE) bytes go to the receive FIFO instead.
//!
//! Receiving: as every port of ours ([`crate::serial`]).
//!
//! Receive interrupts: UARTRXINTR comes when a character brings the FIFO to its trigger level and goes when it falls
//! below, or by UARTICR. UARTRTINTR, which hardware raises after 32 bit times of silence, comes at once: the host's
//! bytes arrive in no time, so silence has always passed. It goes when the FIFO is empty, or by UARTICR until the next
//! character comes or goes.
//!
//! Invariants: the line is high exactly if UARTMIS is not zero.
//!
//! Known holes: no baud timing; no modem on the line, so CTS, DSR, DCD and RI read as zero outside loopback.

mod registers;
#[cfg(test)]
mod tests;

use registers::{Control, Flags, Interrupts, LineControl};
use serde::{Deserialize, Serialize};

use crate::bus::{Device, Interrupt, Terminal, Work};
use crate::primecell;
use crate::saved::{BadState, check};
use crate::serial::{self, Port, Receiver, Registers, fifo};

/// Bytes of guest address space that it takes.
pub const SIZE: u64 = 0x1000;

/// A PL011 with its terminal and its interrupt line.
pub type Pl011<T, L> = Port<State, T, L>;

/// The registers of a port, outside of it.
pub type Saved = serial::Saved<State>;

/// Each modem line with the interrupt that its change raises.
const MODEM_LINES: [(Flags, Interrupts); 4] = [
    (Flags::CTS, Interrupts::CTS),
    (Flags::DSR, Interrupts::DSR),
    (Flags::DCD, Interrupts::DCD),
    (Flags::RI, Interrupts::RI),
];

/// The register file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    receiver: Receiver,
    receive_status: u32,
    ilpr: u32,
    ibrd: u32,
    fbrd: u32,
    line_control: LineControl,
    control: Control,
    ifls: u32,
    mask: Interrupts,
    raw: Interrupts,
    dmacr: u32,
}

impl<T: Terminal, L: Interrupt> Device for Pl011<T, L> {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let Some((register, shift)) = primecell::lane(offset, size) else { return 0 };
        let value = self.access(|state| state.load(register));
        primecell::extract(value, shift, size)
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Work {
        if let Some((register, value)) = primecell::stored(offset, size, value) {
            self.access(|state| state.store(register, value, &self.terminal));
        }
        Work::Idle
    }

    fn reset(&self) {
        self.power_on();
    }
}

impl Registers for State {
    fn new() -> Self {
        Self {
            receiver: Receiver::new(),
            receive_status: 0,
            ilpr: 0,
            ibrd: 0,
            fbrd: 0,
            line_control: LineControl::empty(),
            control: Control::RESET,
            ifls: registers::IFLS_RESET,
            mask: Interrupts::empty(),
            raw: Interrupts::empty(),
            dmacr: 0,
        }
    }

    fn check(&self) -> Result<(), BadState> {
        let flags = [self.mask, self.raw].iter().all(|flags| Interrupts::all().contains(*flags));
        let controls = Control::all().contains(self.control) && LineControl::all().contains(self.line_control);
        check(flags && controls, "serial", "must have no bits that the port has not")
    }

    fn receiver(&self) -> &Receiver {
        &self.receiver
    }

    fn receiver_mut(&mut self) -> &mut Receiver {
        &mut self.receiver
    }

    fn depth(&self) -> usize {
        if self.line_control.contains(LineControl::FEN) { fifo::DEPTH } else { 1 }
    }

    fn receive(&mut self, character: u16) {
        if !self.receiver.fifo.push(character, self.depth()) {
            self.receive_status |= 0x8;
            self.raw.insert(Interrupts::OE);
            return;
        }
        if character & fifo::BREAK != 0 {
            self.raw.insert(Interrupts::BE);
        }
        if self.receiver.fifo.len() >= self.trigger() {
            self.raw.insert(Interrupts::RX);
        }
        self.raw.insert(Interrupts::RT);
    }

    fn hears(&self) -> bool {
        self.unmasked() && self.control.contains(Control::UARTEN | Control::RXE)
    }

    fn is_due(&self) -> bool {
        self.raw.intersects(self.mask)
    }
}

impl State {
    fn load(&mut self, register: u64) -> u32 {
        match register {
            registers::DR => self.take_character(),
            registers::RSR_ECR => self.receive_status,
            registers::FR => self.poll_flags().bits(),
            registers::ILPR => self.ilpr,
            registers::IBRD => self.ibrd,
            registers::FBRD => self.fbrd,
            registers::LCR_H => self.line_control.bits(),
            registers::CR => self.control.bits(),
            registers::IFLS => self.ifls,
            registers::IMSC => self.mask.bits(),
            registers::RIS => self.raw.bits(),
            registers::MIS => (self.raw & self.mask).bits(),
            registers::DMACR => self.dmacr,
            _ => primecell::identification(registers::PERIPH_ID, register).unwrap_or(0),
        }
    }

    fn store(&mut self, register: u64, value: u32, terminal: &impl Terminal) {
        match register {
            registers::DR => self.send(value as u8, terminal),
            registers::RSR_ECR => self.receive_status = 0,
            registers::ILPR => self.ilpr = value & 0xff,
            registers::IBRD => self.ibrd = value & 0xffff,
            registers::FBRD => self.fbrd = value & 0x3f,
            registers::LCR_H => self.set_line_control(LineControl::from_bits_truncate(value)),
            registers::CR => self.set_control(Control::from_bits_truncate(value)),
            registers::IFLS => self.ifls = value & 0x3f,
            registers::IMSC => self.mask = Interrupts::from_bits_truncate(value),
            registers::ICR => self.raw &= !Interrupts::from_bits_truncate(value),
            registers::DMACR => self.dmacr = value & 7,
            _ => {}
        }
        match register {
            registers::DR => self.receiver.listener.sent(),
            registers::LCR_H | registers::IFLS | registers::CR => self.receiver.listener.set_up(self.unmasked()),
            registers::IMSC => self.receiver.listener.set_mask(self.unmasked(), self.hears()),
            registers::ICR => self.receiver.listener.cleared(),
            _ => {}
        }
    }

    /// Whether the mask lets a receive interrupt through.
    fn unmasked(&self) -> bool {
        self.mask.intersects(Interrupts::RX | Interrupts::RT)
    }

    /// Characters at which UARTRXINTR comes.
    fn trigger(&self) -> usize {
        if self.line_control.contains(LineControl::FEN) { fifo::receive_trigger(self.ifls) } else { 1 }
    }

    /// UARTFR; counts loads that find nothing.
    fn poll_flags(&mut self) -> Flags {
        if self.receiver.fifo.is_empty() {
            self.receiver.listener.polled();
        }
        let mut flags = Flags::TXFE | self.modem();
        flags.set(Flags::RXFE, self.receiver.fifo.is_empty());
        flags.set(Flags::RXFF, self.receiver.fifo.room(self.depth()) == 0);
        flags
    }

    /// The modem's lines: in loopback, our own outputs (UARTCR.LBE, 3.3.8); else nobody drives them.
    fn modem(&self) -> Flags {
        let mut lines = Flags::empty();
        if self.control.contains(Control::LBE) {
            lines.set(Flags::CTS, self.control.contains(Control::RTS));
            lines.set(Flags::DSR, self.control.contains(Control::DTR));
            lines.set(Flags::DCD, self.control.contains(Control::OUT1));
            lines.set(Flags::RI, self.control.contains(Control::OUT2));
        }
        lines
    }

    /// A load of UARTDR: the oldest character and its errors, which UARTRSR repeats.
    fn take_character(&mut self) -> u32 {
        let Some(character) = self.receiver.fifo.pop() else { return 0 };
        let character = u32::from(character);
        // Bits 2:0 are this character's; bit 3, overrun, stays until UARTECR.
        self.receive_status = (self.receive_status & 0x8) | (character >> 8 & 0x7);
        if self.receiver.fifo.len() < self.trigger() {
            self.raw.remove(Interrupts::RX);
        }
        self.raw.set(Interrupts::RT, !self.receiver.fifo.is_empty());
        character
    }

    /// A store to UARTDR.
    fn send(&mut self, byte: u8, terminal: &impl Terminal) {
        if self.control.contains(Control::LBE) {
            self.receive(u16::from(byte));
        } else {
            terminal.put(&[byte]);
        }
        self.raw.insert(Interrupts::TX);
    }

    fn set_line_control(&mut self, new: LineControl) {
        let break_begins = (new & !self.line_control).contains(LineControl::BRK);
        self.line_control = new;
        if break_begins && self.control.contains(Control::LBE) {
            self.receive(fifo::BREAK);
        }
    }

    /// A store to UARTCR. Modem lines that a change of loopback moves raise their interrupts.
    fn set_control(&mut self, new: Control) {
        let before = self.modem();
        self.control = new;
        let moved = before ^ self.modem();
        for (line, interrupt) in MODEM_LINES {
            if moved.contains(line) {
                self.raw.insert(interrupt);
            }
        }
    }
}
