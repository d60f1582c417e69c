//! What time it is when the machine starts: its real-time clock, read once.
//!
//! Purpose: the clock of a PC keeps a date in UTC, in one of four notations; [`unix_seconds`] reads it, [`Reading::unix_seconds`] is the
//! pure part.
//!
//! Sources: Motorola MC146818A (registers A, B; BCD and 12-hour notation); the century is where PCs keep it, register 32h.
//!
//! Known holes: a clock whose register 32h is no century is taken to be in this one; one that keeps local time is wrong by that.

#[cfg(target_os = "none")]
use x86_64::instructions::port::Port;

/// Index and data ports.
#[cfg(target_os = "none")]
const PORTS: (u16, u16) = (0x70, 0x71);
/// The index port's upper bit masks NMIs.
#[cfg(target_os = "none")]
const NO_NMI: u8 = 1 << 7;

/// Registers: seconds, minutes, hours, day, month, year; the century.
const REGISTERS: [u8; 7] = [0x00, 0x02, 0x04, 0x07, 0x08, 0x09, 0x32];
/// Register A: an update is in progress. Register B: binary, 24 hours.
#[cfg(target_os = "none")]
const A: u8 = 0x0a;
const B: u8 = 0x0b;
#[cfg(target_os = "none")]
const UPDATING: u8 = 1 << 7;
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
/// Hours: afternoon, in 12-hour notation.
const AFTERNOON: u8 = 1 << 7;
/// Looks after which a clock that is always updating is none; readings after which one that always changes is none.
#[cfg(target_os = "none")]
const MOST_LOOKS: u32 = 1_000_000;
#[cfg(target_os = "none")]
const MOST_READINGS: u32 = 8;
/// Where the century is not to be believed.
const THIS_CENTURY: u64 = 20;

/// The registers of the date, and register B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    date: [u8; REGISTERS.len()],
    status: u8,
}

impl Reading {
    /// Reads them through `read`.
    pub fn take(mut read: impl FnMut(u8) -> u8) -> Self {
        Self { date: REGISTERS.map(&mut read), status: read(B) }
    }

    /// Seconds since 1970, if it is a date.
    pub fn unix_seconds(&self) -> Option<u64> {
        let binary = self.status & BINARY != 0;
        let number = |value: u8| match (binary, value >> 4, value & 0xf) {
            (true, ..) => Some(u64::from(value)),
            (false, tens @ 0..=9, ones @ 0..=9) => Some(u64::from(tens * 10 + ones)),
            _ => None,
        };
        let [seconds, minutes, hours, day, month, year, century] = self.date;
        let hours = if self.status & HOURS_24 != 0 {
            number(hours)?
        } else {
            let hour = number(hours & !AFTERNOON).filter(|hour| (1..=12).contains(hour))? % 12;
            hour + if hours & AFTERNOON != 0 { 12 } else { 0 }
        };
        let century = number(century).filter(|century| (19..=29).contains(century)).unwrap_or(THIS_CENTURY);
        let year = number(year).filter(|year| *year < 100)? + 100 * century;
        let (month, day) = (number(month).filter(|month| (1..=12).contains(month))?, number(day)?);
        let (seconds, minutes) = (number(seconds)?, number(minutes)?);
        let valid = year >= 1970 && (1..=31).contains(&day) && hours < 24 && minutes < 60 && seconds < 60;
        valid.then(|| ((days(year, month, day) * 24 + hours) * 60 + minutes) * 60 + seconds)
    }
}

/// Days from 1970-01-01 to a date of the Gregorian calendar, counting years from March so that a leap day is the last.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leaps = |year: u64| year / 4 - year / 100 + year / 400;
    let since = |year: u64, month: u64, day: u64| 365 * year + leaps(year) + (153 * month + 2) / 5 + day;
    since(year, month, day) - since(1969, 10, 1)
}

/// Seconds since 1970, if the machine has a clock that goes.
#[cfg(target_os = "none")]
pub fn unix_seconds() -> Option<u64> {
    let read = |register: u8| {
        // SAFETY: the clock's ports, which nobody else uses; reading changes no time. Where there is no clock, nobody answers.
        unsafe {
            Port::new(PORTS.0).write(register | NO_NMI);
            Port::new(PORTS.1).read()
        }
    };
    let settled = || (0..MOST_LOOKS).any(|_| read(A) & UPDATING == 0);
    // Two readings that agree were taken within one second.
    (0..MOST_READINGS).find_map(|_| {
        let [first, second] = [(), ()].map(|()| settled().then(|| Reading::take(read)));
        first.filter(|first| second == Some(*first))?.unix_seconds()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(date: [u8; 7], status: u8) -> Reading {
        Reading { date, status }
    }

    #[test]
    fn a_date_is_read_in_every_notation() {
        const NOW: u64 = 1_795_320_872;
        let bcd = [0x32, 0x14, 0x16, 0x22, 0x11, 0x26, 0x20];
        assert_eq!(reading(bcd, HOURS_24).unix_seconds(), Some(1_795_364_072));
        let binary = [32, 14, 4, 22, 11, 26, 20];
        assert_eq!(reading(binary, HOURS_24 | BINARY).unix_seconds(), Some(NOW));
        let [seconds, minutes, _, day, month, year, century] = bcd;
        let afternoon = [seconds, minutes, 0x04 | AFTERNOON, day, month, year, century];
        assert_eq!(reading(afternoon, 0).unix_seconds(), Some(NOW + 12 * 3600));
        let noon = [0, 0, 0x12 | AFTERNOON, 1, 1, 0x70, 0x19];
        assert_eq!(reading(noon, 0).unix_seconds(), Some(12 * 3600));
        assert_eq!(reading([0, 0, 0x12, 1, 1, 0x70, 0x19], 0).unix_seconds(), Some(0));
    }

    #[test]
    fn leap_years_count() {
        let at = |century, year, month, day| {
            reading([0, 0, 0, day, month, year, century], HOURS_24).unix_seconds().unwrap() / 86_400
        };
        assert_eq!(at(0x20, 0x00, 0x02, 0x29), 11_016);
        assert_eq!(at(0x20, 0x00, 0x03, 0x01), 11_017);
        assert_eq!(at(0x21, 0x00, 0x03, 0x01) - at(0x21, 0x00, 0x02, 0x28), 1);
        assert_eq!(at(0x20, 0x24, 0x03, 0x01) - at(0x20, 0x24, 0x02, 0x28), 2);
    }

    #[test]
    fn what_is_no_date_is_none() {
        let good = [0x00, 0x00, 0x00, 0x01, 0x01, 0x26, 0x20];
        assert!(reading(good, HOURS_24).unix_seconds().is_some());
        for (place, value) in
            [(0, 0x60), (1, 0x99), (2, 0x24), (3, 0), (3, 0x32), (4, 0), (4, 0x13), (5, 0xff), (0, 0x0a)]
        {
            let mut bad = good;
            bad[place] = value;
            assert_eq!(reading(bad, HOURS_24).unix_seconds(), None, "register {place} = {value:#x}");
        }
        // No clock at all.
        assert_eq!(Reading::take(|_| 0xff).unix_seconds(), None);
        assert_eq!(
            reading([0, 0, 0, 1, 1, 0x26, 0xff], HOURS_24).unix_seconds(),
            reading(good, HOURS_24).unix_seconds()
        );
    }
}
