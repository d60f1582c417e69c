//! Register map of the PL011 (Arm DDI 0183G, chapter 3): offsets, bits, values at reset.

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

/// UARTPeriphID0–3 as QEMU's `virt` shows them: part 0x011, designer Arm (0x41), revision 1, whose FIFOs are 16 deep.
pub(super) const PERIPH_ID: [u8; 4] = [0x11, 0x10, 0x14, 0x00];

/// Data.
pub(super) const DR: u64 = 0x000;
/// Receive status (load), error clear (store).
pub(super) const RSR_ECR: u64 = 0x004;
/// Flags.
pub(super) const FR: u64 = 0x018;
/// IrDA low-power counter.
pub(super) const ILPR: u64 = 0x020;
/// Integer baud rate divisor.
pub(super) const IBRD: u64 = 0x024;
/// Fractional baud rate divisor.
pub(super) const FBRD: u64 = 0x028;
/// Line control.
pub(super) const LCR_H: u64 = 0x02c;
/// Control.
pub(super) const CR: u64 = 0x030;
/// Interrupt FIFO level select.
pub(super) const IFLS: u64 = 0x034;
/// Interrupt mask: a set bit lets the interrupt through.
pub(super) const IMSC: u64 = 0x038;
/// Raw interrupt status.
pub(super) const RIS: u64 = 0x03c;
/// Masked interrupt status.
pub(super) const MIS: u64 = 0x040;
/// Interrupt clear.
pub(super) const ICR: u64 = 0x044;
/// DMA control. Kept, without effect: the device tree names no DMA channel.
pub(super) const DMACR: u64 = 0x048;

/// UARTIFLS at reset: both FIFOs at half.
pub(super) const IFLS_RESET: u32 = 0x12;

bitflags! {
    /// UARTFR (3.3.3).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Flags: u32 {
        /// Clear to send.
        const CTS = 1 << 0;
        /// Data set ready.
        const DSR = 1 << 1;
        /// Data carrier detect.
        const DCD = 1 << 2;
        /// Receive FIFO empty.
        const RXFE = 1 << 4;
        /// Receive FIFO full.
        const RXFF = 1 << 6;
        /// Transmit FIFO empty.
        const TXFE = 1 << 7;
        /// Ring indicator.
        const RI = 1 << 8;
    }
}

bitflags! {
    /// UARTLCR_H (3.3.7), the bits that have an effect on a line without a wire.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub(super) struct LineControl: u32 {
        /// Send a break.
        const BRK = 1 << 0;
        /// FIFOs on; without it each is one character deep.
        const FEN = 1 << 4;
        const _ = 0xff;
    }
}

bitflags! {
    /// UARTCR (3.3.8).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub(super) struct Control: u32 {
        /// The UART works at all.
        const UARTEN = 1 << 0;
        /// Infrared encoding.
        const SIREN = 1 << 1;
        /// Infrared low-power mode.
        const SIRLP = 1 << 2;
        /// What is sent is received.
        const LBE = 1 << 7;
        /// Transmitter on.
        const TXE = 1 << 8;
        /// Receiver on.
        const RXE = 1 << 9;
        /// Data transmit ready.
        const DTR = 1 << 10;
        /// Request to send.
        const RTS = 1 << 11;
        /// Output 1: data carrier detect, as the other end sees it.
        const OUT1 = 1 << 12;
        /// Output 2: ring indicator, as the other end sees it.
        const OUT2 = 1 << 13;
        /// Hardware flow control of what is sent.
        const RTSEN = 1 << 14;
        /// Hardware flow control of what is received.
        const CTSEN = 1 << 15;
    }
}

impl Control {
    /// UARTCR at reset: disabled, with both directions on.
    pub(super) const RESET: Self = Self::TXE.union(Self::RXE);
}

bitflags! {
    /// UARTIMSC, UARTRIS, UARTMIS, UARTICR (3.3.10–3.3.13).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub(super) struct Interrupts: u32 {
        /// Ring indicator changed.
        const RI = 1 << 0;
        /// Clear to send changed.
        const CTS = 1 << 1;
        /// Data carrier detect changed.
        const DCD = 1 << 2;
        /// Data set ready changed.
        const DSR = 1 << 3;
        /// The receive FIFO reached its trigger level.
        const RX = 1 << 4;
        /// The transmit FIFO fell to its trigger level.
        const TX = 1 << 5;
        /// Received characters below the trigger level wait.
        const RT = 1 << 6;
        /// Framing error.
        const FE = 1 << 7;
        /// Parity error.
        const PE = 1 << 8;
        /// Break.
        const BE = 1 << 9;
        /// Overrun.
        const OE = 1 << 10;
    }
}
