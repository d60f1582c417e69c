//! Registers of the 16550 (SLLS177, "Principles of operation").

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

/// RBR and THR; with LCR.DLAB the low byte of the divisor.
pub(super) const DATA: u64 = 0;
/// Interrupt enable; with LCR.DLAB the high byte of the divisor.
pub(super) const IER: u64 = 1;
/// Interrupt identification; stores go to FIFO control.
pub(super) const IIR_FCR: u64 = 2;
/// Line control.
pub(super) const LCR: u64 = 3;
/// Modem control.
pub(super) const MCR: u64 = 4;
/// Line status.
pub(super) const LSR: u64 = 5;
/// Modem status.
pub(super) const MSR: u64 = 6;
/// Scratch.
pub(super) const SCR: u64 = 7;

/// IIR: no interrupt.
pub(super) const IIR_NONE: u8 = 1;
/// IIR: the FIFOs are on.
pub(super) const IIR_FIFOS: u8 = 0xc0;

/// What IIR names, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    LineStatus = 0b0110,
    Received = 0b0100,
    Timeout = 0b1100,
    Emptied = 0b0010,
    Modem = 0b0000,
}

bitflags! {
    /// IER.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub(super) struct Enable: u8 {
        const RECEIVED = 1 << 0;
        const EMPTIED = 1 << 1;
        const LINE_STATUS = 1 << 2;
        const MODEM = 1 << 3;
    }

    /// FCR.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub(super) struct FifoControl: u8 {
        const ENABLE = 1 << 0;
        const CLEAR_RECEIVER = 1 << 1;
        const TRIGGER = 0b11 << 6;
        /// What is not done at once.
        const KEPT = Self::ENABLE.bits() | Self::TRIGGER.bits();
    }

    /// LCR. Parity and length mean nothing without a wire, and are kept.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub(super) struct LineControl: u8 {
        const BREAK = 1 << 6;
        const DLAB = 1 << 7;
        const _ = !0;
    }

    /// LSR.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub(super) struct LineStatus: u8 {
        const DATA_READY = 1 << 0;
        const OVERRUN = 1 << 1;
        const BREAK = 1 << 4;
        /// THRE and TEMT: the transmitter has nothing.
        const EMPTY = 0b11 << 5;
        /// What stays until it is read.
        const STICKY = Self::OVERRUN.bits() | Self::BREAK.bits();
    }

    /// MCR.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub(super) struct Modem: u8 {
        const DTR = 1 << 0;
        const RTS = 1 << 1;
        const OUT1 = 1 << 2;
        const OUT2 = 1 << 3;
        const LOOP = 1 << 4;
    }

    /// MSR.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    pub(super) struct ModemStatus: u8 {
        const DELTAS = 0x0f;
        const CTS = 1 << 4;
        const DSR = 1 << 5;
        const RI = 1 << 6;
        const DCD = 1 << 7;
    }
}

/// Which output is which input in loopback.
pub(super) const LOOPBACK: [(Modem, ModemStatus); 4] = [
    (Modem::RTS, ModemStatus::CTS),
    (Modem::DTR, ModemStatus::DSR),
    (Modem::OUT1, ModemStatus::RI),
    (Modem::OUT2, ModemStatus::DCD),
];

impl ModemStatus {
    /// The marks that changes of these lines leave.
    pub(super) const fn deltas(self) -> Self {
        Self::from_bits_retain(self.bits() >> 4)
    }
}

impl Default for LineStatus {
    fn default() -> Self {
        Self::empty()
    }
}

impl FifoControl {
    /// Characters at which the received-data interrupt comes.
    pub(super) const fn trigger(self) -> usize {
        if !self.contains(Self::ENABLE) {
            return 1;
        }
        [1, 4, 8, 14][(self.bits() >> 6) as usize]
    }
}
