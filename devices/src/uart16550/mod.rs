//! 16550 serial port (Texas Instruments TL16C550C, SLLS177): COM1 of a PC.
//!
//! Purpose: the console of x86-64 guests, as unmodified Linux's 8250 driver expects it: probed as a 16550A, with FIFOs,
//! interrupts and loopback.
//!
//! Sending: a byte goes to the [`Terminal`] inside the store, so the transmitter is always empty, and its interrupt comes at
//! once after each byte and when it is enabled; reading IIR, when it names it, takes it back. In loopback (MCR bit 4) bytes go to
//! the receiver instead.
//!
//! Receiving: as every port of ours ([`crate::serial`]). In the rules of [`listener`](crate::serial::listener) LSR stands for UARTFR, THR for UARTDR, IER for UARTIMSC,
//! and FCR, LCR and MCR for the registers that set the port up. The character timeout, which hardware raises after four
//! character times of silence, comes at once: the host's bytes arrive in no time, so silence has always passed.
//!
//! Where it is not the chip: switching the FIFOs on or off keeps what was received (a driver that wants them empty says so by
//! FCR bits 1 and 2; Linux switches them on after it has enabled the interrupt, and would lose input).
//!
//! Invariants: the line is high exactly if IIR names an interrupt and MCR.OUT2, which gates it on a PC, is on outside
//! loopback.
//!
//! Known holes: no baud timing; the modem is always there (CTS, DSR, DCD on) and never rings.

mod registers;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::bus::{Device, Interrupt, Terminal, Work};
use crate::saved::{BadState, check};
use crate::serial::fifo::{BREAK, DEPTH, Fifo};
use crate::serial::{self, Port, Receiver, Registers};
use registers::{Enable, FifoControl, LineControl, LineStatus, Modem, ModemStatus, Source};

/// Ports that it takes.
pub const SIZE: u64 = 8;

/// A 16550 with its terminal and its interrupt line.
pub type Uart16550<T, L> = Port<State, T, L>;

/// The registers of a port, outside of it.
pub type Saved = serial::Saved<State>;

/// The register file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    receiver: Receiver,
    /// OE and BI of LSR, until it is read.
    errors: LineStatus,
    enable: Enable,
    fifo: FifoControl,
    line_control: LineControl,
    modem: Modem,
    /// Bits 0–3 of MSR: what has changed since it was read.
    deltas: ModemStatus,
    scratch: u8,
    divisor: u16,
    /// The transmitter's interrupt waits.
    emptied: bool,
}

/// Offsets are port numbers from the first; the port has registers of one byte. What an access of more than one byte does on a
/// PC's bus is two or four accesses.
impl<T: Terminal, L: Interrupt> Device for Uart16550<T, L> {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let bytes = (0..u64::from(size.min(4))).map(|index| {
            let register = offset.checked_add(index).filter(|register| *register < SIZE);
            register.map_or(0xff, |register| self.access(|state| state.load(register)))
        });
        bytes.enumerate().fold(0, |value, (index, byte)| value | u64::from(byte) << (8 * index))
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Work {
        for index in 0..u64::from(size.min(4)) {
            if let Some(register) = offset.checked_add(index).filter(|register| *register < SIZE) {
                self.access(|state| state.store(register, (value >> (8 * index)) as u8, &self.terminal));
            }
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
            errors: LineStatus::empty(),
            enable: Enable::empty(),
            fifo: FifoControl::empty(),
            line_control: LineControl::empty(),
            modem: Modem::empty(),
            deltas: ModemStatus::empty(),
            scratch: 0,
            divisor: 12,
            emptied: false,
        }
    }

    fn check(&self) -> Result<(), BadState> {
        let controls = Enable::all().contains(self.enable)
            && FifoControl::KEPT.contains(self.fifo)
            && Modem::all().contains(self.modem);
        let flags = LineStatus::STICKY.contains(self.errors) && ModemStatus::DELTAS.contains(self.deltas);
        check(controls && flags, "serial", "must have no bits that the port has not")
    }

    fn receiver(&self) -> &Receiver {
        &self.receiver
    }

    fn receiver_mut(&mut self) -> &mut Receiver {
        &mut self.receiver
    }

    fn depth(&self) -> usize {
        if self.fifo.contains(FifoControl::ENABLE) { DEPTH } else { 1 }
    }

    fn receive(&mut self, character: u16) {
        if !self.receiver.fifo.push(character, self.depth()) {
            self.errors.insert(LineStatus::OVERRUN);
        } else if self.receiver.fifo.len() == 1 {
            self.look_at_front();
        }
    }

    fn hears(&self) -> bool {
        self.unmasked() && self.gated()
    }

    /// In loopback the receiver is not on the line.
    fn is_connected(&self) -> bool {
        !self.modem.contains(Modem::LOOP)
    }

    fn is_due(&self) -> bool {
        self.gated() && self.source().is_some()
    }
}

impl State {
    fn load(&mut self, register: u64) -> u8 {
        let latch = self.line_control.contains(LineControl::DLAB);
        match register {
            registers::DATA if latch => self.divisor as u8,
            registers::IER if latch => (self.divisor >> 8) as u8,
            registers::DATA => self.take_character(),
            registers::IER => self.enable.bits(),
            registers::IIR_FCR => self.identify(),
            registers::LCR => self.line_control.bits(),
            registers::MCR => self.modem.bits(),
            registers::LSR => self.line_status(),
            registers::MSR => (self.modem_lines() | core::mem::take(&mut self.deltas)).bits(),
            registers::SCR => self.scratch,
            _ => 0xff,
        }
    }

    fn store(&mut self, register: u64, value: u8, terminal: &impl Terminal) {
        let latch = self.line_control.contains(LineControl::DLAB);
        match register {
            registers::DATA if latch => self.divisor = self.divisor & 0xff00 | u16::from(value),
            registers::IER if latch => self.divisor = self.divisor & 0xff | u16::from(value) << 8,
            registers::DATA => self.send(value, terminal),
            registers::IER => self.set_enable(Enable::from_bits_truncate(value)),
            registers::IIR_FCR => self.set_fifo(FifoControl::from_bits_truncate(value)),
            registers::LCR => self.set_line_control(LineControl::from_bits_retain(value)),
            registers::MCR => self.set_modem(Modem::from_bits_truncate(value)),
            registers::SCR => self.scratch = value,
            _ => {}
        }
        match register {
            registers::IIR_FCR | registers::LCR | registers::MCR => self.receiver.listener.set_up(self.unmasked()),
            registers::IER if !latch => self.receiver.listener.set_mask(self.unmasked(), self.hears()),
            registers::DATA if !latch => self.receiver.listener.sent(),
            _ => {}
        }
    }

    /// Whether received data may interrupt, as far as the port's own mask goes.
    fn unmasked(&self) -> bool {
        self.enable.contains(Enable::RECEIVED)
    }

    /// Whether interrupts leave the port: OUT2 gates them, and loopback switches it off.
    fn gated(&self) -> bool {
        self.modem & (Modem::OUT2 | Modem::LOOP) == Modem::OUT2
    }

    /// The most urgent interrupt that is enabled.
    fn source(&self) -> Option<Source> {
        let waiting = self.receiver.fifo.len();
        let full = waiting >= self.fifo.trigger();
        let sources = [
            (Enable::LINE_STATUS, !self.errors.is_empty(), Source::LineStatus),
            (Enable::RECEIVED, waiting != 0 && full, Source::Received),
            (Enable::RECEIVED, waiting != 0, Source::Timeout),
            (Enable::EMPTIED, self.emptied, Source::Emptied),
            (Enable::MODEM, !self.deltas.is_empty(), Source::Modem),
        ];
        sources.into_iter().find(|(enable, raised, _)| *raised && self.enable.contains(*enable)).map(|(.., it)| it)
    }

    /// A load of IIR.
    fn identify(&mut self) -> u8 {
        let source = self.source();
        if source == Some(Source::Emptied) {
            self.emptied = false;
        }
        let fifos = if self.fifo.contains(FifoControl::ENABLE) { registers::IIR_FIFOS } else { 0 };
        fifos | source.map_or(registers::IIR_NONE, |source| source as u8)
    }

    /// A load of LSR; counts loads that find nothing.
    fn line_status(&mut self) -> u8 {
        if self.receiver.fifo.is_empty() {
            self.receiver.listener.polled();
        }
        let mut status = LineStatus::EMPTY | core::mem::take(&mut self.errors);
        status.set(LineStatus::DATA_READY, !self.receiver.fifo.is_empty());
        status.bits()
    }

    /// The modem's lines: in loopback, our own outputs.
    fn modem_lines(&self) -> ModemStatus {
        if !self.modem.contains(Modem::LOOP) {
            return ModemStatus::CTS | ModemStatus::DSR | ModemStatus::DCD;
        }
        let mut lines = ModemStatus::empty();
        for (output, input) in registers::LOOPBACK {
            lines.set(input, self.modem.contains(output));
        }
        lines
    }

    /// A load of RBR.
    fn take_character(&mut self) -> u8 {
        let Some(character) = self.receiver.fifo.pop() else { return 0 };
        self.look_at_front();
        character as u8
    }

    /// A break shows in LSR when it has come to the front.
    fn look_at_front(&mut self) {
        if self.receiver.fifo.front().is_some_and(|front| front & BREAK != 0) {
            self.errors.insert(LineStatus::BREAK);
        }
    }

    /// A store to THR.
    fn send(&mut self, byte: u8, terminal: &impl Terminal) {
        if self.modem.contains(Modem::LOOP) {
            self.receive(u16::from(byte));
        } else {
            terminal.put(&[byte]);
        }
        self.emptied = true;
    }

    /// A store to IER. The transmitter is empty when its interrupt is enabled, and says so.
    fn set_enable(&mut self, new: Enable) {
        if (new & !self.enable).contains(Enable::EMPTIED) {
            self.emptied = true;
        }
        self.enable = new;
    }

    fn set_fifo(&mut self, new: FifoControl) {
        if new.contains(FifoControl::CLEAR_RECEIVER) {
            self.receiver.fifo = Fifo::new();
        }
        // The other bits mean nothing while the FIFOs are off.
        self.fifo = if new.contains(FifoControl::ENABLE) { new & FifoControl::KEPT } else { FifoControl::empty() };
    }

    fn set_line_control(&mut self, new: LineControl) {
        let break_begins = (new & !self.line_control).contains(LineControl::BREAK);
        self.line_control = new;
        if break_begins && self.modem.contains(Modem::LOOP) {
            self.receive(BREAK);
        }
    }

    /// A store to MCR. Lines that a change of loopback moves leave their mark; RI does when it falls.
    fn set_modem(&mut self, new: Modem) {
        let before = self.modem_lines();
        self.modem = new;
        let now = self.modem_lines();
        let moved = (before ^ now) & !ModemStatus::RI | before & !now & ModemStatus::RI;
        self.deltas |= moved.deltas();
    }
}
