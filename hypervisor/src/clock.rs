//! What time it is: the outer machine's clock, read once, and the counter since.

use entresol_devices::pl031::Clock;
use entresol_metal_arm64::boot::BootInfo;
use entresol_metal_arm64::timer;
use entresol_sync::atomic::{AtomicU64, Ordering};

/// PL031 RTCDR: seconds of Unix time (DDI 0224, 3.3.1).
const DATA: u64 = 0;

/// Unix time at count 0.
static AT_ZERO: AtomicU64 = AtomicU64::new(0);

/// Reads the outer machine's clock. A machine without one begins in 1970.
pub fn init(info: &BootInfo) {
    let Some(rtc) = &info.rtc else { return };
    // SAFETY: the device tree names a PL031 there; EL2 maps it as Device memory, and reading the time changes nothing.
    let now = unsafe { ((rtc.registers.start + DATA) as *const u32).read_volatile() };
    AT_ZERO.store(u64::from(now).saturating_sub(timer::now() / timer::frequency()), Ordering::Relaxed);
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
