//! ACPI's sleep control and status registers and the reset register (ACPI 6.5, 4.8.4.1, 4.8.3.7) of a machine with reduced
//! hardware.
//!
//! Invariants: no state; only the two stores that the tables describe ask for anything.

/// Ports that it takes: sleep control, sleep status, reset.
pub const SIZE: u64 = 3;

/// SLP_TYP of S5, as the machine's DSDT says.
pub const SLEEP_OFF: u8 = 5;
/// What a store to the reset register must be, as its FADT says.
pub const RESET_VALUE: u8 = 1;

const CONTROL: u64 = 0;
const RESET: u64 = 2;
/// SLP_EN.
const SLEEP_ENABLE: u8 = 1 << 5;

/// What a guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// To be switched off.
    Off,
    /// To be reset.
    Reset,
}

/// A load: nothing sleeps, so nothing woke.
pub const fn read(_offset: u64) -> u8 {
    0
}

/// A store.
pub const fn write(offset: u64, value: u8) -> Option<Request> {
    match offset {
        CONTROL if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_OFF => Some(Request::Off),
        RESET if value == RESET_VALUE => Some(Request::Reset),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_tables_describe() {
        for offset in 0..=SIZE {
            for value in 0..=u8::MAX {
                let expected = match (offset, value) {
                    // SLP_EN and type 5; bits 0, 1, 6 and 7 are reserved, and ignored.
                    (0, _) if value & 0b0011_1100 == 0b0011_0100 => Some(Request::Off),
                    (2, 1) => Some(Request::Reset),
                    _ => None,
                };
                assert_eq!(write(offset, value), expected, "{offset} {value:#x}");
            }
        }
        assert_eq!(read(1), 0);
    }
}
