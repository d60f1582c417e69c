//! kvm-clock: nanoseconds from the TSC, by a record in guest memory (Linux, Documentation/virt/kvm/x86/msr.rst,
//! MSR_KVM_SYSTEM_TIME_NEW and MSR_KVM_WALL_CLOCK_NEW).
//!
//! Purpose: the record's layout and its numbers. A guest computes `system_time + scale(TSC - tsc_timestamp)`, where `scale` shifts
//! by `tsc_shift` and takes the upper half of the product with `tsc_to_system_mul`.
//!
//! Protocol: whoever writes a record makes the version odd, then stores the rest, then makes the version even and higher
//! ([`Record::stores`] gives the three stores in order): a reader that sees an odd version, or another one afterwards, reads again.
//!
//! Invariants: time never goes back. Within a record it follows from the product; from a record to the one that [`Clock::rebased`]
//! makes of it, what rounding may lose is added. No number overflows, whatever the TSC says.

use entresol_addr::{Gpa, PAGE_SIZE};

use crate::msr::Refused;

/// Bytes of a record.
pub const RECORD_SIZE: usize = 32;
/// Bytes of the wall clock.
pub const WALL_CLOCK_SIZE: usize = 12;
/// The clock is the same on every vCPU, and never goes back from one to another (PVCLOCK_TSC_STABLE_BIT).
const STABLE: u8 = 1 << 0;
/// Bit 0 of the MSR: the record is in use.
const ENABLED: u64 = 1 << 0;
const SECOND: u64 = 1_000_000_000;

/// What rounding loses at most where a record follows another: less than one nanosecond by the shift, and one by the product.
const ROUNDING: u64 = 2;

/// How ticks become nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    mul: u32,
    shift: i8,
}

impl Scale {
    /// For a TSC of `hertz`; `None` below 1 kHz, which no TSC has.
    pub const fn of(hertz: u64) -> Option<Self> {
        if hertz < 1000 {
            return None;
        }
        // 2^32 / ticks in a nanosecond, halved or doubled until it has 32 bits.
        let mut mul = ((SECOND as u128) << 96) / hertz as u128;
        let mut shift = -64i8;
        while mul > u32::MAX as u128 {
            mul >>= 1;
            shift += 1;
        }
        Some(Self { mul: mul as u32, shift })
    }

    /// Nanoseconds in `ticks`, rounded down; at most what 64 bits hold.
    pub fn nanoseconds(self, ticks: u64) -> u64 {
        let shifted = if self.shift < 0 {
            u128::from(ticks) >> u32::from(self.shift.unsigned_abs())
        } else {
            u128::from(ticks) << u32::from(self.shift.unsigned_abs())
        };
        u64::try_from(shifted.saturating_mul(u128::from(self.mul)) >> 32).unwrap_or(u64::MAX)
    }
}

/// A guest's clock from some moment on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// The guest's TSC at that moment.
    pub tsc: u64,
    /// What the clock showed then, in nanoseconds.
    pub nanoseconds: u64,
    /// The rate.
    pub scale: Scale,
}

impl Clock {
    /// What it shows when the guest's TSC is `tsc`. A TSC from before the record counts as its own moment.
    pub fn at(&self, tsc: u64) -> u64 {
        self.nanoseconds.saturating_add(self.scale.nanoseconds(tsc.saturating_sub(self.tsc)))
    }

    /// The same clock from `tsc` on, at another rate perhaps: no earlier than this one shows at any moment until then.
    pub fn rebased(&self, tsc: u64, scale: Scale) -> Self {
        Self { tsc, nanoseconds: self.at(tsc).saturating_add(ROUNDING), scale }
    }

    /// The wall clock's bytes: the moment, in Unix nanoseconds, at which this clock showed 0, if it shows `shown` at Unix time
    /// `unix`. The version must be the even one that follows the last; the guest's kernel reads it once, after its own store.
    pub fn wall_clock(version: u32, unix: u64, shown: u64) -> [u8; WALL_CLOCK_SIZE] {
        let start = unix.saturating_sub(shown);
        // Seconds fit 32 bits until 2106.
        let words = [version, (start / SECOND) as u32, (start % SECOND) as u32];
        let mut bytes = [0; WALL_CLOCK_SIZE];
        for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// One vCPU's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it says.
    pub clock: Clock,
    /// The last version that was stored, even.
    pub version: u32,
}

/// Bytes for a record, from `offset` in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Store<'a> {
    /// Where in the record.
    pub offset: usize,
    /// What.
    pub bytes: &'a [u8],
}

/// The stores that bring a record up to date.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stores {
    odd: [u8; 4],
    body: [u8; RECORD_SIZE - 4],
    even: [u8; 4],
    /// The version to go on from.
    pub version: u32,
}

impl Stores {
    /// In this order, each visible before the next.
    pub fn in_order(&self) -> [Store<'_>; 3] {
        [(0, &self.odd[..]), (4, &self.body[..]), (0, &self.even[..])].map(|(offset, bytes)| Store { offset, bytes })
    }
}

impl Record {
    /// What to store.
    pub fn stores(&self) -> Stores {
        let odd = (self.version | 1).wrapping_add(if self.version & 1 == 0 { 0 } else { 2 });
        let version = odd.wrapping_add(1);
        let mut body = [0; RECORD_SIZE - 4];
        let mut put = |at: usize, bytes: &[u8]| body[at - 4..at - 4 + bytes.len()].copy_from_slice(bytes);
        put(8, &self.clock.tsc.to_le_bytes());
        put(16, &self.clock.nanoseconds.to_le_bytes());
        put(24, &self.clock.scale.mul.to_le_bytes());
        put(28, &self.clock.scale.shift.to_le_bytes());
        put(29, &[STABLE]);
        Stores { odd: odd.to_le_bytes(), body, even: version.to_le_bytes(), version }
    }
}

/// Where a store to the record's MSR puts it; `None` switches it off.
///
/// # Errors
///
/// A record that is not aligned to four bytes or crosses a page.
pub const fn system_time(value: u64) -> Result<Option<Gpa>, Refused> {
    if value & ENABLED == 0 {
        return Ok(None);
    }
    match place(value & !ENABLED, RECORD_SIZE) {
        Ok(gpa) => Ok(Some(gpa)),
        Err(refused) => Err(refused),
    }
}

/// Where a store to the wall clock's MSR wants it.
///
/// # Errors
///
/// As [`system_time`].
pub const fn wall_clock(value: u64) -> Result<Gpa, Refused> {
    place(value, WALL_CLOCK_SIZE)
}

const fn place(address: u64, size: usize) -> Result<Gpa, Refused> {
    if address & 3 != 0 || address % PAGE_SIZE + size as u64 > PAGE_SIZE {
        return Err(Refused);
    }
    Ok(Gpa::new(address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rates_are_exact_to_a_billionth() {
        for hertz in [1000, 1_000_000, 999_999_999, SECOND, SECOND + 1, 2_400_000_000, 3_792_918_001, 100 * SECOND] {
            let scale = Scale::of(hertz).unwrap();
            assert!(scale.mul >= 1 << 31, "all 32 bits are used");
            let hour = scale.nanoseconds(hertz * 3600);
            assert!(hour.abs_diff(3600 * SECOND) <= (3600 * SECOND) >> 31, "{hertz}: {hour}");
        }
        assert_eq!(Scale::of(SECOND), Some(Scale { mul: 1 << 31, shift: 1 }));
        assert_eq!([0, 999].map(Scale::of), [None; 2]);
    }

    /// A guest's reading of the bytes.
    fn read(bytes: &[u8; RECORD_SIZE], tsc: u64) -> u64 {
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let mul = u64::from(number(24) as u32);
        let shift = bytes[28] as i8;
        let delta = tsc.wrapping_sub(number(8));
        let delta = if shift < 0 { delta >> -shift } else { delta << shift };
        number(16) + ((u128::from(delta) * u128::from(mul)) >> 32) as u64
    }

    #[test]
    fn a_reader_between_two_stores_reads_again() {
        let clock = Clock { tsc: 5, nanoseconds: 7, scale: Scale::of(SECOND).unwrap() };
        let mut bytes = [0u8; RECORD_SIZE];
        for start in [0, 2, 7, u32::MAX, u32::MAX - 1] {
            let stores = Record { clock, version: start }.stores();
            let versions = stores.in_order().map(|store| {
                bytes[store.offset..store.offset + store.bytes.len()].copy_from_slice(store.bytes);
                u32::from_le_bytes(bytes[..4].try_into().unwrap())
            });
            assert_eq!(versions.map(|version| version & 1), [1, 1, 0]);
            assert!(versions[2] != start && versions[2] == stores.version);
        }
        assert_eq!((bytes[29], read(&bytes, 105)), (1, 107));
    }

    #[test]
    fn records_lie_in_one_page() {
        assert_eq!(system_time(0x1000), Ok(None));
        assert_eq!(system_time(0x1fe1), Ok(Some(Gpa::new(0x1fe0))));
        for bad in [0x1fe5, 0x1003, 0x1fff] {
            assert_eq!(system_time(bad), Err(Refused));
        }
        assert_eq!((wall_clock(0x1ff4), wall_clock(0x1ff8)), (Ok(Gpa::new(0x1ff4)), Err(Refused)));
        let bytes = Clock::wall_clock(2, 1_700_000_000 * SECOND + 5, 2 * SECOND);
        assert_eq!(bytes[..8], [2, 0, 0, 0, 0xfe, 0xf0, 0x53, 0x65]);
        assert_eq!(Clock::wall_clock(2, 5, 6)[4..], [0; 8]);
    }

    proptest! {
        /// What a guest reads goes up with the TSC, in one record and over new ones, at whatever rates.
        #[test]
        fn time_never_goes_back(
            hertz in 1_000_000u64..10_000_000_000,
            next_hertz in 1_000_000u64..10_000_000_000,
            start in 0u64..1 << 60,
            steps in prop::collection::vec((0u64..1 << 36, any::<bool>()), 1..40),
        ) {
            let mut clock = Clock { tsc: start, nanoseconds: 0, scale: Scale::of(hertz).unwrap() };
            let (mut tsc, mut last) = (start, 0);
            for (step, rebase) in steps {
                tsc += step;
                let mut bytes = [0; RECORD_SIZE];
                bytes[4..].copy_from_slice(&Record { clock, version: 0 }.stores().body);
                let shown = read(&bytes, tsc);
                prop_assert_eq!(shown, clock.at(tsc), "the guest computes what we do");
                prop_assert!(shown >= last);
                last = shown;
                if rebase {
                    clock = clock.rebased(tsc, Scale::of(next_hertz).unwrap());
                }
            }
        }

        /// A new record at the same rate is never behind the old one, and hardly ahead.
        #[test]
        fn records_follow_each_other(hertz in 1_000_000u64..10_000_000_000, at in 0u64..1 << 50, later in 0u64..1 << 50) {
            let clock = Clock { tsc: 0, nanoseconds: 0, scale: Scale::of(hertz).unwrap() };
            let next = clock.rebased(at, clock.scale);
            let (old, new) = (clock.at(at + later), next.at(at + later));
            prop_assert!(new >= old && new - old <= ROUNDING, "{} {}", old, new);
        }

        #[test]
        fn nothing_overflows(hertz in 1000u64.., ticks: u64, nanoseconds: u64, tsc: u64) {
            let clock = Clock { tsc, nanoseconds, scale: Scale::of(hertz).unwrap() };
            prop_assert!(clock.at(ticks) >= nanoseconds);
            prop_assert!(clock.rebased(ticks, clock.scale).nanoseconds >= clock.at(ticks));
        }
    }
}
