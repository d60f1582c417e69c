//! Time: the time stamp counter, how fast it counts, and a timer that interrupts as [`crate::interrupts::TIMER`].
//!
//! Protocol: [`init`] once on the boot CPU, which compares the counter with counter 0 of the interval timer for a fiftieth of a second,
//! and with the local APIC's timer in the same time. Then every CPU has a deadline of its own. Whoever runs beneath us may stop us
//! between two instructions, so each clock is read several times, and the reading counts that took the shortest ([`Sample`]).
//!
//! Where the processor has no deadlines in counts of the time stamp counter, the local APIC's timer counts down what is left. It has 32
//! bits and a rate that was measured, so it may interrupt early, never late by more than the measure's error: who set a
//! deadline looks at the counter, and sets it again.
//!
//! Counter 2 would interrupt nobody, but its gate and its output are at a port that not every machine has; the interrupt of counter 0 is
//! masked.
//!
//! Sources: Intel 8254 (modes, control word, read-back command); APM volume 2, 16.4.1 (APIC timer).
//!
//! Known holes: the counter is taken to have one rate, and to be the same on all CPUs.

use entresol_sync::atomic::{AtomicBool, AtomicU64, Ordering};
use x86_64::instructions::port::Port;

use crate::apic;

const COUNTER: u16 = 0x40;
const CONTROL: u16 = 0x43;
/// Counter 0, low byte then high, mode 0: counts down once; the output is low until it has come to zero.
const ONE_SHOT: u8 = 3 << 4;
/// Read back status and count of counter 0, as they are at one moment.
const READ_BACK: u8 = 3 << 6 | 1 << 1;
/// In the status: the output; the count has not begun; how the counter is set.
const OUTPUT: u8 = 1 << 7;
const NOT_BEGUN: u8 = 1 << 6;
const SET: u8 = 0x3f;
/// Counts of the interval timer in a second, and in a fiftieth.
const COUNTS: u64 = 1_193_182;
const FIFTIETH: u16 = (COUNTS / 50) as u16;
/// Readings of a clock for one sample; samples until a fiftieth has passed; attempts, since one ends where the counter has come to zero.
const READINGS: u32 = 8;
const MOST_SAMPLES: u32 = 1_000_000;
const MOST_ATTEMPTS: u32 = 20;

static FREQUENCY: AtomicU64 = AtomicU64::new(0);
/// Whether the processor takes deadlines; if not, counts of the local APIC's timer for 2³² of the time stamp counter.
static TAKES_DEADLINES: AtomicBool = AtomicBool::new(false);
static RATE: AtomicU64 = AtomicU64::new(0);

/// Counts of the time stamp counter since the machine started.
#[inline]
pub fn now() -> u64 {
    // SAFETY: every 64-bit processor has it, and CR4.TSD is ours and clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Counts in a second.
#[inline]
pub fn frequency() -> u64 {
    FREQUENCY.load(Ordering::Relaxed)
}

/// Nanoseconds of `counts`.
pub fn nanoseconds(counts: u64) -> u64 {
    let exact = u128::from(counts) * 1_000_000_000 / u128::from(frequency());
    u64::try_from(exact).unwrap_or(u64::MAX)
}

/// Counts in `nanoseconds`.
pub fn counts(nanoseconds: u64) -> u64 {
    let exact = u128::from(nanoseconds) * u128::from(frequency()) / 1_000_000_000;
    u64::try_from(exact).unwrap_or(u64::MAX)
}

/// This CPU's timer interrupts when the counter reaches `count`, or at once if it has; perhaps a little early. Once.
#[inline]
pub fn set_deadline(count: u64) {
    if TAKES_DEADLINES.load(Ordering::Relaxed) {
        return apic::set_deadline(count.max(1));
    }
    let left = u128::from(count.saturating_sub(now()));
    let counts = (left * u128::from(RATE.load(Ordering::Relaxed))) >> 32;
    apic::set_count(u32::try_from(counts).unwrap_or(u32::MAX).max(1));
}

/// No deadline.
#[inline]
pub fn clear() {
    if TAKES_DEADLINES.load(Ordering::Relaxed) { apic::set_deadline(0) } else { apic::set_count(0) }
}

/// A reading of a clock, and when it was.
#[derive(Clone, Copy)]
struct Sample<T> {
    /// Counts of the time stamp counter, as near as can be said.
    at: u64,
    /// How long it took.
    width: u64,
    value: T,
}

impl<T> Sample<T> {
    /// The quickest of several readings.
    fn take(read: impl Fn() -> (u64, T, u64)) -> Self {
        let one = || {
            let (before, value, after) = read();
            let width = after.wrapping_sub(before);
            Self { at: before + width / 2, width, value }
        };
        (1..READINGS).fold(one(), |best, _| {
            let next = one();
            if next.width < best.width { next } else { best }
        })
    }
}

/// The interval timer's counter 0.
#[derive(Clone, Copy)]
struct Interval {
    status: u8,
    count: u16,
}

impl Interval {
    /// Begins with the largest count.
    fn start() {
        // SAFETY: the interval timer's first counter, whose interrupt is masked, and which nobody else uses.
        unsafe {
            Port::new(CONTROL).write(ONE_SHOT);
            Port::new(COUNTER).write(u8::MAX);
            Port::new(COUNTER).write(u8::MAX);
        }
    }

    /// What it says, between two counts of the time stamp counter.
    fn read() -> (u64, Self, u64) {
        let mut port = Port::new(COUNTER);
        let before = now();
        // SAFETY: as above.
        unsafe {
            Port::new(CONTROL).write(READ_BACK);
            let after = now();
            let [status, low, high] = [port.read(), port.read(), port.read()];
            (before, Self { status, count: u16::from_le_bytes([low, high]) }, after)
        }
    }
}

/// Compares the clocks: what the time stamp counter has counted, the interval timer in that time, and the local APIC's timer in as much.
/// `None`: the interval timer came to its end first, because somebody stopped us.
fn compare() -> Option<(u64, u64, u64)> {
    let apic = || Sample::take(|| (now(), apic::count(), now()));
    Interval::start();
    apic::set_count(u32::MAX);
    let (first, first_apic) = (Sample::take(Interval::read), apic());
    assert!(first.value.status & SET == ONE_SHOT, "the interval timer does not answer: the machine must have one");
    for _ in 0..MOST_SAMPLES {
        let (last, last_apic) = (Sample::take(Interval::read), apic());
        if last.value.status & OUTPUT != 0 {
            return None;
        }
        let passed = first.value.count.wrapping_sub(last.value.count);
        if (first.value.status | last.value.status) & NOT_BEGUN == 0 && passed >= FIFTIETH {
            let (counts, apic_counts) = (last.at - first.at, last_apic.at - first_apic.at);
            let apic = u64::from(first_apic.value - last_apic.value);
            return Some((counts, u64::from(passed), apic * counts / apic_counts.max(1)));
        }
    }
    panic!("the interval timer does not count")
}

/// Measures the rates.
///
/// # Panics
///
/// If the machine has no interval timer.
pub(crate) fn init() {
    let (counts, interval, apic) =
        (0..MOST_ATTEMPTS).find_map(|_| compare()).expect("a fiftieth of a second on the machine");
    apic::set_count(0);
    TAKES_DEADLINES.store(apic::has_deadline(), Ordering::Relaxed);
    RATE.store((apic << 32) / counts.max(1), Ordering::Relaxed);
    FREQUENCY.store((counts * COUNTS / interval).max(1), Ordering::Relaxed);
}
