//! Whether anybody in the guest listens to the port.
//!
//! Purpose: bytes that a driver throws away while it opens the port are lost to the guest, and a level interrupt that
//! comes in the middle of it can drown a driver that does not yet answer. So input is held back until the guest has
//! shown that it listens, from how it uses the registers alone.
//!
//! A driver that interrupts listens while UARTIMSC lets RX or RT through and UARTCR has UARTEN and RXE. That alone is
//! not enough: Linux sets the mask, installs its handler with nothing to answer for, enables the UART, clears UARTICR,
//! empties the FIFO, and only then sets the mask for good. Firmware before it may have left the UART enabled. So one
//! of these must come:
//!
//! - a store to UARTIMSC after a load of UARTFR has seen RXFE, without a store to UARTICR or UARTCR between: the driver
//!   has emptied the FIFO and is done;
//! - [`TICKS`] ticks without a store to the registers that set the port up: the driver does it in another order, for
//!   instance mask first and UARTEN last, and has been done for long.
//!
//! Afterwards the mask may come and go, as it does when a terminal is full and drained. A store to the registers that
//! set the port up while the mask is closed begins anew: another driver, or another opening.
//!
//! A program that polls listens when [`POLLS`] loads of UARTFR in a row have seen RXFE. A store to UARTDR, UARTLCR_H,
//! UARTIFLS, UARTCR or UARTIMSC starts the count again: a transmitter that looks at UARTFR before each byte is not
//! waiting, and neither is a driver at its set-up. It gets no more than a line at a time, because what follows a line
//! may be for whoever the line starts: a boot loader reads its command, not the script of the system that it boots.
//!
//! Known holes: a program that polls UARTRIS or UARTDR, and never UARTFR, is not heard. A driver that is kept from
//! running for [`TICKS`] in the middle of opening the port may lose up to a FIFO of input.

use serde::{Deserialize, Serialize};

/// Loads of UARTFR that find no input, in a row, after which a program counts as waiting for some.
pub const POLLS: u8 = 16;

/// Ticks after which a set-up counts as finished.
pub const TICKS: u8 = 10;

/// How far a driver that interrupts has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Driver {
    /// None, or its mask has been closed since it began.
    Absent,
    /// It has opened the mask and may not be done; so many ticks ago it last did something about it.
    SettingUp(u8),
    /// It listens whenever the mask is open.
    Ready,
}

/// What the guest's use of the registers has shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Listener {
    driver: Driver,
    /// The FIFO was seen empty since interrupts were last cleared or the UART set up.
    seen_empty: bool,
    /// Loads of UARTFR that found no input, in a row, up to [`POLLS`].
    polls: u8,
}

impl Listener {
    pub(crate) const fn new() -> Self {
        Self { driver: Driver::Absent, seen_empty: false, polls: 0 }
    }

    /// Whether the guest takes input; `hears`: it would interrupt.
    pub(crate) fn listens(&self, hears: bool) -> bool {
        self.is_ready(hears) || self.polls >= POLLS
    }

    /// How many of `bytes` a guest that listens is given at once.
    pub(crate) fn portion(&self, hears: bool, bytes: &[u8]) -> usize {
        if self.is_ready(hears) {
            return bytes.len();
        }
        bytes.iter().position(|byte| ends_line(*byte)).map_or(bytes.len(), |end| end + 1)
    }

    /// The guest was given `byte`.
    pub(crate) fn given(&mut self, byte: u8) {
        if ends_line(byte) {
            self.polls = 0;
        }
    }

    /// A load of UARTFR saw RXFE.
    pub(crate) fn polled(&mut self) {
        self.seen_empty = true;
        self.polls = self.polls.saturating_add(1).min(POLLS);
    }

    /// A store to UARTDR.
    pub(crate) fn sent(&mut self) {
        self.polls = 0;
    }

    /// A store to UARTICR.
    pub(crate) fn cleared(&mut self) {
        self.seen_empty = false;
    }

    /// A store to UARTLCR_H, UARTIFLS or UARTCR; `unmasked`: a receive interrupt is let through.
    pub(crate) fn set_up(&mut self, unmasked: bool) {
        self.polls = 0;
        self.seen_empty = false;
        self.driver = match self.driver {
            Driver::Ready if unmasked => Driver::Ready,
            _ if unmasked => Driver::SettingUp(0),
            _ => Driver::Absent,
        };
    }

    /// A store to UARTIMSC; `unmasked`: it lets a receive interrupt through; `hears`: and the UART is on.
    pub(crate) fn set_mask(&mut self, unmasked: bool, hears: bool) {
        self.polls = 0;
        self.driver = match self.driver {
            Driver::Ready => Driver::Ready,
            _ if hears && self.seen_empty => Driver::Ready,
            _ if unmasked => Driver::SettingUp(0),
            _ => Driver::Absent,
        };
    }

    /// A tick; `hears`: input would interrupt.
    pub(crate) fn tick(&mut self, hears: bool) {
        if let Driver::SettingUp(ticks) = self.driver
            && hears
        {
            self.driver = if ticks + 1 >= TICKS { Driver::Ready } else { Driver::SettingUp(ticks + 1) };
        }
    }

    fn is_ready(&self, hears: bool) -> bool {
        hears && self.driver == Driver::Ready
    }
}

/// Whether a line ends with `byte`, as terminals and scripts end them.
fn ends_line(byte: u8) -> bool {
    matches!(byte, b'\r' | b'\n')
}
