//! What time it is: the outer machine's clock, read once, and the counter since.

use crate::arch::boot::BootInfo;
use crate::arch::{self, timer};
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
    unix_at_zero() + timer::now() / timer::frequency()
}

/// Unix time at count 0 of the machine's counter, in seconds.
pub fn unix_at_zero() -> u64 {
    AT_ZERO.load(Ordering::Relaxed)
}
