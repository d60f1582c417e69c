//! The CPU's random numbers (APM volume 3, RDRAND).

use core::arch::x86_64::_rdrand64_step;

use entresol_sync::Once;
use raw_cpuid::CpuId;

/// Refusals in a row, after which the generator is broken: one that works is asked once or twice.
const MOST_REFUSALS: u32 = 10_000;

/// Whether the CPU has a generator that works.
pub fn is_implemented() -> bool {
    static IMPLEMENTED: Once<bool> = Once::new();
    *IMPLEMENTED
        .call_once(|| CpuId::new().get_feature_info().is_some_and(|features| features.has_rdrand()) && ask().is_some())
}

/// 64 random bits; only where [`is_implemented`].
///
/// # Panics
///
/// If the generator has stopped working.
pub fn next() -> u64 {
    ask().expect("the CPU's random number generator gives numbers")
}

fn ask() -> Option<u64> {
    (0..MOST_REFUSALS).find_map(|_| step())
}

#[target_feature(enable = "rdrand")]
fn rdrand() -> Option<u64> {
    let mut value = 0;
    (_rdrand64_step(&mut value) == 1).then_some(value)
}

fn step() -> Option<u64> {
    // SAFETY: the CPU has the instruction, as callers of `ask` know.
    let value = unsafe { rdrand() };
    if value.is_none() {
        core::hint::spin_loop();
    }
    value
}
