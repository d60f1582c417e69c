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
//! Receiving: the host calls [`Pl011::offer`], which takes what fits and no more; nothing from the host ever overruns.
//!
//! Input is held back until the guest listens ([`listener`]), because a driver that opens the port throws away what the
//! FIFO holds, and whoever pipes a script into a VM writes it before any driver is there. When [`Pl011::offer`] took
//! less than all, [`Terminal::input_wanted`] comes once the guest listens and the FIFO is empty. The program that owns
//! the VM calls [`Pl011::tick`] every 10 ms or so.
//!
//! Receive interrupts: UARTRXINTR comes when a character brings the FIFO to its trigger level and goes when it falls
//! below, or by UARTICR. UARTRTINTR, which hardware raises after 32 bit times of silence, comes at once: the host's
//! bytes arrive in no time, so silence has always passed. It goes when the FIFO is empty, or by UARTICR until the next
//! character comes or goes.
//!
//! Invariants: the line is high exactly if UARTMIS is not zero. Characters accepted are read in order, each once.
//!
//! Lock order: the port's lock, then the terminal's `put` or the line. `input_wanted` is called with neither.
//!
//! Known holes: no baud timing; no modem on the line, so CTS, DSR, DCD and RI read as zero outside loopback; and those of
//! [`listener`].

pub(crate) mod fifo;
pub mod listener;
mod registers;
#[cfg(test)]
mod tests;

use entresol_sync::Mutex;
use fifo::Fifo;
use listener::Listener;
use registers::{Control, Flags, Interrupts, LineControl};
use serde::{Deserialize, Serialize};

use crate::bus::{Device, Interrupt, Terminal, Work};
use crate::primecell;
use crate::saved::{BadState, check};

/// Bytes of guest address space that it takes.
pub const SIZE: u64 = 0x1000;

/// A PL011 with its terminal and its interrupt line.
pub struct Pl011<T, L> {
    state: Mutex<State>,
    terminal: T,
    line: L,
}

/// Each modem line with the interrupt that its change raises.
const MODEM_LINES: [(Flags, Interrupts); 4] = [
    (Flags::CTS, Interrupts::CTS),
    (Flags::DSR, Interrupts::DSR),
    (Flags::DCD, Interrupts::DCD),
    (Flags::RI, Interrupts::RI),
];

/// The registers of a port, outside of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Saved(State);

/// The register file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    receive: Fifo,
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
    listener: Listener,
    /// Level of the line as last driven.
    high: bool,
    /// Input was refused since the terminal was last called for more.
    refused: bool,
}

impl<T: Terminal, L: Interrupt> Pl011<T, L> {
    /// A port at power-on.
    pub fn new(terminal: T, line: L) -> Self {
        Self { state: Mutex::new(State::new()), terminal, line }
    }

    /// A port in the same state for a copy of the virtual machine, on its own terminal. `line` is as high as this one's; input
    /// that this port's host still holds is not the copy's.
    pub fn fork(&self, terminal: T, line: L) -> Self {
        let state = State { refused: false, ..self.state.lock().clone() };
        Self { state: Mutex::new(state), terminal, line }
    }

    /// Its registers. Input that its host still holds is not among them.
    pub fn save(&self) -> Saved {
        Saved(State { refused: false, ..self.state.lock().clone() })
    }

    /// Takes over registers that were saved.
    ///
    /// # Errors
    ///
    /// [`BadState`].
    pub fn load(&self, saved: Saved) -> Result<(), BadState> {
        saved.0.receive.check()?;
        let flags = [saved.0.mask, saved.0.raw].iter().all(|flags| Interrupts::all().contains(*flags));
        let controls = Control::all().contains(saved.0.control) && LineControl::all().contains(saved.0.line_control);
        check(flags && controls, "serial", "must have no bits that the port has not")?;
        *self.state.lock() = saved.0;
        Ok(())
    }

    /// Gives the guest input; returns how many of the first bytes it took. The rest is to be offered again after
    /// [`Terminal::input_wanted`].
    pub fn offer(&self, bytes: &[u8]) -> usize {
        let mut state = self.state.lock();
        let taken = state.acceptable(bytes);
        for byte in &bytes[..taken] {
            state.receive(u16::from(*byte));
            state.listener.given(*byte);
        }
        state.refused |= taken < bytes.len();
        state.drive(&self.line);
        taken
    }

    /// Whether [`Self::offer`] would take a byte now.
    pub fn wants_input(&self) -> bool {
        let state = self.state.lock();
        state.listens() && state.receive.room(state.depth()) > 0
    }

    /// Whether the guest listens to this port, with or without room at the moment.
    pub fn is_heard(&self) -> bool {
        self.state.lock().listens()
    }

    /// Time passes: to be called every 10 ms or so, while the guest runs. Guests that cannot otherwise be told from ones
    /// that are still setting the port up are heard after [`listener::TICKS`] of these.
    pub fn tick(&self) {
        self.access(|state| state.listener.tick(state.hears()));
    }

    /// Runs `act` on the registers, settles the line, and calls for input if the guest has come to want what was
    /// refused.
    fn access<R>(&self, act: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.state.lock();
        let result = act(&mut state);
        state.drive(&self.line);
        let call = state.refused && state.listens() && state.receive.is_empty();
        if call {
            state.refused = false;
        }
        drop(state);
        if call {
            self.terminal.input_wanted();
        }
        result
    }
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
        self.access(|state| {
            // The line's level is outside the register file, and so is what the host still holds.
            let (high, refused) = (state.high, state.refused);
            *state = State { high, refused, ..State::new() };
        });
    }
}

impl State {
    const fn new() -> Self {
        Self {
            receive: Fifo::new(),
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
            listener: Listener::new(),
            high: false,
            refused: false,
        }
    }

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
            registers::DR => self.listener.sent(),
            registers::LCR_H | registers::IFLS | registers::CR => self.listener.set_up(self.unmasked()),
            registers::IMSC => self.listener.set_mask(self.unmasked(), self.hears()),
            registers::ICR => self.listener.cleared(),
            _ => {}
        }
    }

    /// Whether the mask lets a receive interrupt through.
    fn unmasked(&self) -> bool {
        self.mask.intersects(Interrupts::RX | Interrupts::RT)
    }

    /// Whether input would interrupt the guest.
    fn hears(&self) -> bool {
        self.unmasked() && self.control.contains(Control::UARTEN | Control::RXE)
    }

    /// Whether the guest takes input now.
    fn listens(&self) -> bool {
        self.listener.listens(self.hears())
    }

    /// How many of the first bytes the guest takes now.
    fn acceptable(&self, bytes: &[u8]) -> usize {
        if !self.listens() {
            return 0;
        }
        let room = self.receive.room(self.depth()).min(bytes.len());
        self.listener.portion(self.hears(), &bytes[..room])
    }

    /// Depth of the FIFOs.
    fn depth(&self) -> usize {
        if self.line_control.contains(LineControl::FEN) { fifo::DEPTH } else { 1 }
    }

    /// Characters at which UARTRXINTR comes.
    fn trigger(&self) -> usize {
        if self.line_control.contains(LineControl::FEN) { fifo::receive_trigger(self.ifls) } else { 1 }
    }

    /// UARTFR; counts loads that find nothing.
    fn poll_flags(&mut self) -> Flags {
        if self.receive.is_empty() {
            self.listener.polled();
        }
        let mut flags = Flags::TXFE | self.modem();
        flags.set(Flags::RXFE, self.receive.is_empty());
        flags.set(Flags::RXFF, self.receive.room(self.depth()) == 0);
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
        let Some(character) = self.receive.pop() else { return 0 };
        let character = u32::from(character);
        // Bits 2:0 are this character's; bit 3, overrun, stays until UARTECR.
        self.receive_status = (self.receive_status & 0x8) | (character >> 8 & 0x7);
        if self.receive.len() < self.trigger() {
            self.raw.remove(Interrupts::RX);
        }
        self.raw.set(Interrupts::RT, !self.receive.is_empty());
        character
    }

    /// A character arrives.
    fn receive(&mut self, character: u16) {
        if !self.receive.push(character, self.depth()) {
            self.receive_status |= 0x8;
            self.raw.insert(Interrupts::OE);
            return;
        }
        if character & fifo::BREAK != 0 {
            self.raw.insert(Interrupts::BE);
        }
        if self.receive.len() >= self.trigger() {
            self.raw.insert(Interrupts::RX);
        }
        self.raw.insert(Interrupts::RT);
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

    /// Drives the line to what UARTMIS says, if that is a change.
    fn drive(&mut self, line: &impl Interrupt) {
        let high = self.raw.intersects(self.mask);
        if high != self.high {
            self.high = high;
            line.set_level(high);
        }
    }
}
