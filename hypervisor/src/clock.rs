//! What time it is: the outer machine's clock, read once, and the counter since.

use crate::arch::boot::BootInfo;
use crate::arch::{self, timer};
use entresol_devices::pl031::Clock;
use entresol_sync::atomic::{AtomicU64, Ordering};

/// Unix time at count 0.
static AT_ZERO: AtomicU64 = AtomicU64::new(0);

/// Reads the outer machine's clock. A machine without one begins in 1970.
pub fn init(info: &BootInfo) {
    let Some(now) = arch::unix_seconds(info) else { return };
    AT_ZERO.store(now.saturating_sub(timer::now() / timer::frequency()), Ordering::Relaxed);
}

/// Seconds of Unix time.
pub fn unix_seconds() -> u64 {
    AT_ZERO.load(Ordering::Relaxed) + timer::now() / timer::frequency()
}

/// The count of the physical counter at which `unix_seconds` begins.
pub fn count_at(unix_seconds: u64) -> u64 {
    unix_seconds.saturating_sub(AT_ZERO.load(Ordering::Relaxed)).saturating_mul(timer::frequency())
}

/// The clock as guests get it.
pub struct WallClock;

impl Clock for WallClock {
    fn unix_seconds(&self) -> u64 {
        unix_seconds()
    }
}
