//! The PC's real-time clock and its memory (Motorola MC146818A), as far as a kernel reads and sets the time of day by it.
//!
//! Protocol: the index goes to the first port, data through the second. Time comes in as Unix seconds with each access. The
//! clock shows the host's time plus an offset; a guest that sets it does so as the chip asks: SET in register B, the fields, SET
//! off, which is when the offset is made. Registers are BCD or binary, 24 hours, as register B says.
//!
//! Invariants: total; dates from 1970 to 2099.
//!
//! Known holes: no alarm, no periodic and no update interrupt (enabling them is remembered, and nothing comes); 12-hour mode is
//! not offered; daylight saving is not known.

use entresol_sync::Mutex;
use serde::{Deserialize, Serialize};

/// Ports that it takes.
pub const SIZE: u64 = 2;

const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const A: u8 = 10;
const B: u8 = 11;
const C: u8 = 12;
const D: u8 = 13;
/// Where PCs keep the century.
const CENTURY: u8 = 0x32;

/// Register A: the 32,768 Hz time base, and no update in progress.
const A_VALUE: u8 = 0x26;
/// Register B: SET, the interrupts that can be enabled, binary, 24 hours.
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
/// Register D: the battery is good.
const D_VALUE: u8 = 0x80;

const DAY_SECONDS: u64 = 86_400;

/// The clock.
pub struct Cmos {
    state: Mutex<State>,
}

/// The registers of a clock, outside of it: what it showed is part of them as an offset from the host's time.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Saved(State);

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    index: u8,
    /// Seconds that it is ahead of the host's time.
    offset: i64,
    b: u8,
    /// The fields while SET is on.
    held: Option<Fields>,
    /// Registers 14–127, but for the century.
    memory: Memory,
}

/// 128 bytes, of which those that are registers are not used.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Memory([[u8; 32]; 4]);

/// A date and a time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    second: u8,
    minute: u8,
    hour: u8,
    /// 1 is Sunday.
    weekday: u8,
    day: u8,
    month: u8,
    /// Of the century.
    year: u8,
    century: u8,
}

impl Default for Cmos {
    fn default() -> Self {
        Self::new()
    }
}

impl Cmos {
    /// A clock at power-on.
    pub const fn new() -> Self {
        let memory = Memory([[0; 32]; 4]);
        Self { state: Mutex::new(State { index: 0, offset: 0, b: B_24_HOURS, held: None, memory }) }
    }

    /// The same for a copy of the virtual machine.
    pub fn fork(&self) -> Self {
        Self { state: Mutex::new(self.state.lock().clone()) }
    }

    /// Its registers.
    pub fn save(&self) -> Saved {
        Saved(self.state.lock().clone())
    }

    /// Takes over registers that were saved; there is nothing that a guest could not have stored.
    pub fn load(&self, saved: Saved) {
        *self.state.lock() = saved.0;
    }

    /// A load of one byte at Unix time `now`, in seconds. The index cannot be read.
    pub fn read(&self, offset: u64, now: u64) -> u8 {
        let state = self.state.lock();
        if offset == 1 { state.load(now) } else { 0xff }
    }

    /// A store of one byte at Unix time `now`, in seconds.
    pub fn write(&self, offset: u64, value: u8, now: u64) {
        let mut state = self.state.lock();
        match offset {
            // Bit 7 masks the non-maskable interrupt, which nobody raises.
            0 => state.index = value & 0x7f,
            1 => state.store(value, now),
            _ => {}
        }
    }
}

impl State {
    fn shown(&self, now: u64) -> Fields {
        self.held.unwrap_or_else(|| Fields::of(now.saturating_add_signed(self.offset)))
    }

    fn load(&self, now: u64) -> u8 {
        match self.index {
            A => A_VALUE,
            B => self.b,
            C => 0,
            D => D_VALUE,
            index => match self.shown(now).field(index) {
                Some(value) => self.encode(value),
                None => self.memory.0[usize::from(index) / 32][usize::from(index) % 32],
            },
        }
    }

    fn store(&mut self, value: u8, now: u64) {
        match self.index {
            A | C | D => {}
            B => self.set_control(value, now),
            index => {
                let decoded = self.decode(value);
                if let Some(mut fields) = self.held {
                    fields.set(index, decoded);
                    self.held = Some(fields);
                }
                let is_field = Fields::of(0).field(index).is_some();
                if !is_field {
                    self.memory.0[usize::from(index) / 32][usize::from(index) % 32] = value;
                }
            }
        }
    }

    /// A store to register B. SET holds the fields; when it goes, they are the time.
    fn set_control(&mut self, value: u8, now: u64) {
        match (self.held, value & B_SET != 0) {
            (None, true) => self.held = Some(self.shown(now)),
            (Some(fields), false) => {
                self.offset = fields.seconds() as i64 - now as i64;
                self.held = None;
            }
            _ => {}
        }
        self.b = value | B_24_HOURS;
    }

    fn encode(&self, value: u8) -> u8 {
        if self.b & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.b & B_BINARY != 0 { value } else { (value >> 4).wrapping_mul(10).wrapping_add(value & 0xf) }
    }
}

impl Fields {
    /// The fields at a Unix time; the calendar of 400 years counts from 1 March 2000, so that leap days come last.
    fn of(seconds: u64) -> Self {
        // Days from 1 March 1600, which a Unix time is well after.
        const BEFORE_1970: u64 = 135_080;
        const ERA: u64 = 146_097;
        let (days, rest) = (seconds / DAY_SECONDS, seconds % DAY_SECONDS);
        let shifted = days + BEFORE_1970;
        let of_era = shifted % ERA;
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / (ERA - 1)) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * of_year + 2) / 153;
        let day = of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = 1600 + 400 * (shifted / ERA) + year_of_era + u64::from(month <= 2);
        Self {
            second: (rest % 60) as u8,
            minute: (rest / 60 % 60) as u8,
            hour: (rest / 3600) as u8,
            weekday: ((days + 4) % 7 + 1) as u8,
            day: day as u8,
            month: month as u8,
            year: (year % 100) as u8,
            century: (year / 100 % 100) as u8,
        }
    }

    /// Their Unix time. What is no date counts as the first of what is out of range.
    fn seconds(&self) -> u64 {
        let year = if self.century == 19 && self.year >= 70 { 1900 } else { 2000 } + u64::from(self.year.min(99));
        let month = u64::from(self.month.clamp(1, 12));
        let (from_march, year) = if month > 2 { (month - 3, year) } else { (month + 9, year - 1) };
        let since = year - 1600;
        let days = since * 365 + since / 4 - since / 100 + since / 400 + (153 * from_march + 2) / 5;
        let days = days + u64::from(self.day.clamp(1, 31)) - 1 - 135_080;
        let time = u64::from(self.hour.min(23)) * 3600 + u64::from(self.minute.min(59)) * 60;
        days * DAY_SECONDS + time + u64::from(self.second.min(59))
    }

    fn field(&self, index: u8) -> Option<u8> {
        Some(match index {
            SECONDS => self.second,
            MINUTES => self.minute,
            HOURS => self.hour,
            WEEKDAY => self.weekday,
            DAY => self.day,
            MONTH => self.month,
            YEAR => self.year,
            CENTURY => self.century,
            _ => return None,
        })
    }

    fn set(&mut self, index: u8, value: u8) {
        match index {
            SECONDS => self.second = value,
            MINUTES => self.minute = value,
            HOURS => self.hour = value,
            WEEKDAY => self.weekday = value,
            DAY => self.day = value,
            MONTH => self.month = value,
            YEAR => self.year = value,
            CENTURY => self.century = value,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(cmos: &Cmos, index: u8, now: u64) -> u8 {
        cmos.write(0, index, now);
        cmos.read(1, now)
    }

    fn write(cmos: &Cmos, index: u8, value: u8, now: u64) {
        cmos.write(0, index, now);
        cmos.write(1, value, now);
    }

    #[test]
    fn the_time_of_day_in_bcd() {
        let cmos = Cmos::new();
        // 2024-02-29 23:59:58 UTC, a Thursday.
        let now = 1_709_251_198;
        let show = |now| [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|it| read(&cmos, it, now));
        assert_eq!(show(now), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
        assert_eq!(show(now + 2), [0x20, 0x24, 0x03, 0x01, 6, 0, 0, 0]);
        assert_eq!(show(0), [0x19, 0x70, 1, 1, 5, 0, 0, 0]);
        assert_eq!([A, B, C, D].map(|index| read(&cmos, index, now)), [0x26, 2, 0, 0x80]);
    }

    #[test]
    fn a_guest_sets_the_time_as_the_chip_asks() {
        let cmos = Cmos::new();
        let now = 1_000_000_000;
        write(&cmos, HOURS, 0x12, now);
        assert_eq!(read(&cmos, HOURS, now), 0x01, "without SET the time goes on");
        write(&cmos, B, 0x82, now);
        for (index, value) in
            [(CENTURY, 0x20), (YEAR, 0x30), (MONTH, 0x12), (DAY, 0x31), (HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x59)]
        {
            write(&cmos, index, value, now);
        }
        assert_eq!(read(&cmos, SECONDS, now + 7), 0x59, "it is held");
        write(&cmos, B, 0x02, now + 10);
        assert_eq!([YEAR, MONTH, DAY, SECONDS].map(|it| read(&cmos, it, now + 11)), [0x31, 1, 1, 0]);
        write(&cmos, B, 0x06, now);
        assert_eq!(read(&cmos, YEAR, now + 11), 31, "binary");
        let copy = cmos.fork();
        assert_eq!(read(&copy, YEAR, now + 11), 31);
    }

    #[test]
    fn memory_is_memory() {
        let cmos = Cmos::new();
        for index in (14..128).filter(|index| *index != CENTURY) {
            write(&cmos, index, index ^ 0x55, 0);
        }
        for index in (14..128).filter(|index| *index != CENTURY) {
            assert_eq!(read(&cmos, index, 0), index ^ 0x55);
        }
        assert_eq!(cmos.read(0, 0), 0xff);
    }

    proptest! {
        #[test]
        fn dates_and_seconds_are_inverse(seconds in 0u64..4_102_444_800) {
            prop_assert_eq!(Fields::of(seconds).seconds(), seconds);
        }

        #[test]
        fn any_guest(stores in prop::collection::vec((0u64..3, any::<u8>(), any::<u64>()), 0..200)) {
            let cmos = Cmos::new();
            for (offset, value, now) in stores {
                cmos.write(offset, value, now);
                let _ = cmos.read(1, now);
            }
        }
    }
}
