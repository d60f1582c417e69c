//! Time: the time stamp counter, how fast it counts, and a timer that interrupts as [`crate::interrupts::TIMER`].
//!
//! Protocol: [`init`] once on the boot CPU, which compares the counter with counter 0 of the interval timer for a hundredth of a second,
//! and the local APIC's timer with the counter in the same time. Then every CPU has a deadline of its own.
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
/// Counter 0, low byte then high, mode 0: the output rises when the count has come to zero.
const ONE_SHOT: u8 = 3 << 4;
/// Read back the status of counter 0, not its count.
const STATUS: u8 = 3 << 6 | 1 << 5 | 1 << 1;
/// In the status: the output, and how the counter is set.
const OUTPUT: u8 = 1 << 7;
const SET: u8 = 0x3f;
/// Counts of the interval timer in a second, and in a hundredth.
const COUNTS: u64 = 1_193_182;
const HUNDREDTH: u16 = (COUNTS / 100) as u16;
/// Looks at the output after which there is no interval timer.
const MOST_LOOKS: u32 = 10_000_000;

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

/// Measures the rates.
///
/// # Panics
///
/// If the machine has no interval timer.
pub(crate) fn init() {
    let (mut control, mut counter) = (Port::<u8>::new(CONTROL), Port::<u8>::new(COUNTER));
    // SAFETY: the interval timer's first counter interrupts nobody, and nobody else uses it.
    let mut status = || unsafe {
        control.write(STATUS);
        Port::<u8>::new(COUNTER).read()
    };
    // SAFETY: as above.
    unsafe {
        Port::<u8>::new(CONTROL).write(ONE_SHOT);
        let [low, high] = HUNDREDTH.to_le_bytes();
        counter.write(low);
        counter.write(high);
    }
    let start = now();
    apic::set_count(u32::MAX);
    assert!(status() & SET == ONE_SHOT, "the interval timer does not answer: the machine must have one");
    let risen = (0..MOST_LOOKS).any(|_| status() & OUTPUT != 0);
    assert!(risen, "counter 0 of the interval timer does not count");
    let (counts, timer) = (now() - start, u32::MAX - apic::count());
    apic::set_count(0);
    TAKES_DEADLINES.store(apic::has_deadline(), Ordering::Relaxed);
    RATE.store((u64::from(timer) << 32) / counts.max(1), Ordering::Relaxed);
    FREQUENCY.store((counts * COUNTS / u64::from(HUNDREDTH)).max(1), Ordering::Relaxed);
}
