//! Time: the time stamp counter, and how fast it counts.
//!
//! Protocol: [`init`] once on the boot CPU, which compares it with counter 2 of the interval timer for a hundredth of a second.
//!
//! Sources: Intel 8254 (modes and control word); port 61h of the PC (gate and output of counter 2).
//!
//! Known holes: nothing interrupts at a moment; the counter is taken to have one rate.

use entresol_sync::atomic::{AtomicU64, Ordering};
use x86_64::instructions::port::Port;

const COUNTER: u16 = 0x42;
const CONTROL: u16 = 0x43;
const GATE: u16 = 0x61;
/// Counter 2, low byte then high, mode 0: the output rises when the count has come to zero.
const ONE_SHOT: u8 = 2 << 6 | 3 << 4;
const GATE_OPEN: u8 = 1 << 0;
const SPEAKER: u8 = 1 << 1;
const OUTPUT: u8 = 1 << 5;
/// Counts of the interval timer in a second, and in a hundredth.
const COUNTS: u64 = 1_193_182;
const HUNDREDTH: u16 = (COUNTS / 100) as u16;
/// Looks at the output after which there is no interval timer.
const MOST_LOOKS: u32 = 10_000_000;

static FREQUENCY: AtomicU64 = AtomicU64::new(0);

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

/// Measures the rate.
///
/// # Panics
///
/// If the machine has no interval timer.
pub(crate) fn init() {
    let (mut gate, mut control, mut counter) =
        (Port::<u8>::new(GATE), Port::<u8>::new(CONTROL), Port::<u8>::new(COUNTER));
    // SAFETY: the interval timer's second counter drives the speaker only, which is off; nobody else uses it.
    let counts = unsafe {
        let kept = gate.read();
        gate.write(kept & !SPEAKER | GATE_OPEN);
        control.write(ONE_SHOT);
        let [low, high] = HUNDREDTH.to_le_bytes();
        counter.write(low);
        counter.write(high);
        let start = now();
        let risen = (0..MOST_LOOKS).any(|_| gate.read() & OUTPUT != 0);
        assert!(risen, "counter 2 of the interval timer does not count: the machine must have one");
        let counts = now() - start;
        gate.write(kept);
        counts
    };
    FREQUENCY.store((counts * COUNTS / u64::from(HUNDREDTH)).max(1), Ordering::Relaxed);
}
