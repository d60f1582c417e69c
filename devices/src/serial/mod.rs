//! What serial ports have in common: the terminal behind them, the line in front, and input that waits until somebody listens.
//!
//! Purpose: a [`Port`] is a lock around a register file ([`Registers`]), which knows what the guest's loads and stores mean; everything that
//! is the host's side of a port is here.
//!
//! Protocol: the host calls [`Port::offer`], which takes what fits and no more; nothing from the host ever overruns. Input is held
//! back until the guest listens ([`listener`]), because a driver that opens the port throws away what the FIFO holds, and whoever pipes a
//! script into a VM writes it before any driver is there. When `offer` took less than all, [`Terminal::input_wanted`] comes once the
//! guest listens and the FIFO is empty. The program that owns the VM calls [`Port::tick`] every 10 ms or so.
//!
//! Invariants: the line is as high as the registers say when an access returns. Characters accepted are read in order, each once.
//!
//! Lock order: the port's lock, then the terminal's `put` or the line. `input_wanted` is called with neither.
//!
//! Known holes: those of [`listener`].

pub(crate) mod fifo;
pub mod listener;

use entresol_sync::Mutex;
use serde::{Deserialize, Serialize};

use crate::bus::{Interrupt, Terminal};
use crate::saved::BadState;
use fifo::Fifo;
use listener::Listener;

/// What a register file keeps for its port.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receiver {
    pub(crate) fifo: Fifo,
    pub(crate) listener: Listener,
    /// Level of the line as last driven.
    high: bool,
    /// Input was refused since the terminal was last called for more.
    refused: bool,
}

impl Receiver {
    pub(crate) const fn new() -> Self {
        Self { fifo: Fifo::new(), listener: Listener::new(), high: false, refused: false }
    }
}

/// A register file.
pub trait Registers: Clone {
    /// As at power-on.
    fn new() -> Self;

    /// Whether a file that was read may be used.
    ///
    /// # Errors
    ///
    /// [`BadState`].
    fn check(&self) -> Result<(), BadState>;

    /// What it keeps for the port.
    fn receiver(&self) -> &Receiver;

    /// To be changed.
    fn receiver_mut(&mut self) -> &mut Receiver;

    /// Depth of the receiver's FIFO.
    fn depth(&self) -> usize;

    /// A character arrives.
    fn receive(&mut self, character: u16);

    /// Whether input would interrupt the guest.
    fn hears(&self) -> bool;

    /// Whether the receiver is on the line at all.
    fn is_connected(&self) -> bool {
        true
    }

    /// Whether an interrupt is due.
    fn is_due(&self) -> bool;
}

/// A register file outside of its port.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Saved<R>(R);

/// A port with its terminal and its interrupt line.
pub struct Port<R, T, L> {
    pub(crate) registers: Mutex<R>,
    pub(crate) terminal: T,
    line: L,
}

impl<R: Registers, T: Terminal, L: Interrupt> Port<R, T, L> {
    /// A port at power-on.
    pub fn new(terminal: T, line: L) -> Self {
        Self { registers: Mutex::new(R::new()), terminal, line }
    }

    /// A port in the same state for a copy of the virtual machine, on its own terminal. `line` is as high as this one's; input
    /// that this port's host still holds is not the copy's.
    pub fn fork(&self, terminal: T, line: L) -> Self {
        Self { registers: Mutex::new(self.copied()), terminal, line }
    }

    /// Its registers. Input that its host still holds is not among them.
    pub fn save(&self) -> Saved<R> {
        Saved(self.copied())
    }

    fn copied(&self) -> R {
        let mut registers = self.registers.lock().clone();
        registers.receiver_mut().refused = false;
        registers
    }

    /// Takes over registers that were saved.
    ///
    /// # Errors
    ///
    /// [`BadState`].
    pub fn load(&self, saved: Saved<R>) -> Result<(), BadState> {
        saved.0.receiver().fifo.check()?;
        saved.0.check()?;
        *self.registers.lock() = saved.0;
        Ok(())
    }

    /// Gives the guest input; returns how many of the first bytes it took. The rest is to be offered again after
    /// [`Terminal::input_wanted`].
    pub fn offer(&self, bytes: &[u8]) -> usize {
        let mut registers = self.registers.lock();
        let taken = acceptable(&*registers, bytes);
        for byte in &bytes[..taken] {
            registers.receive(u16::from(*byte));
            registers.receiver_mut().listener.given(*byte);
        }
        registers.receiver_mut().refused |= taken < bytes.len();
        drive(&mut *registers, &self.line);
        taken
    }

    /// Whether [`Self::offer`] would take a byte now.
    pub fn wants_input(&self) -> bool {
        let registers = self.registers.lock();
        listens(&*registers) && registers.receiver().fifo.room(registers.depth()) > 0
    }

    /// Whether the guest listens to this port, with or without room at the moment.
    pub fn is_heard(&self) -> bool {
        listens(&*self.registers.lock())
    }

    /// Time passes: to be called every 10 ms or so, while the guest runs. Guests that cannot otherwise be told from ones
    /// that are still setting the port up are heard after [`listener::TICKS`] of these.
    pub fn tick(&self) {
        self.access(|registers| {
            let hears = registers.hears();
            registers.receiver_mut().listener.tick(hears);
        });
    }

    /// Runs `act` on the registers, settles the line, and calls for input if the guest has come to want what was
    /// refused.
    pub(crate) fn access<A>(&self, act: impl FnOnce(&mut R) -> A) -> A {
        let mut registers = self.registers.lock();
        let result = act(&mut registers);
        drive(&mut *registers, &self.line);
        let receiver = registers.receiver();
        let call = receiver.refused && receiver.fifo.is_empty() && listens(&*registers);
        if call {
            registers.receiver_mut().refused = false;
        }
        drop(registers);
        if call {
            self.terminal.input_wanted();
        }
        result
    }

    /// Power comes back. The line's level is outside the register file, and so is what the host still holds.
    pub(crate) fn power_on(&self) {
        self.access(|registers| {
            let Receiver { high, refused, .. } = *registers.receiver();
            *registers = R::new();
            *registers.receiver_mut() = Receiver { high, refused, ..Receiver::new() };
        });
    }
}

/// Whether the guest takes input now.
fn listens(registers: &impl Registers) -> bool {
    registers.is_connected() && registers.receiver().listener.listens(registers.hears())
}

/// How many of the first bytes the guest takes now.
fn acceptable(registers: &impl Registers, bytes: &[u8]) -> usize {
    if !listens(registers) {
        return 0;
    }
    let receiver = registers.receiver();
    let room = receiver.fifo.room(registers.depth()).min(bytes.len());
    receiver.listener.portion(registers.hears(), &bytes[..room])
}

/// Drives the line to what the registers say, if that is a change.
fn drive(registers: &mut impl Registers, line: &impl Interrupt) {
    let due = registers.is_due();
    let high = &mut registers.receiver_mut().high;
    if due != *high {
        *high = due;
        line.set_level(due);
    }
}
