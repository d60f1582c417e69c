//! Stolen time: how long a vCPU was ready and another had its CPU. The scheduler counts; the architecture's room tells the guest.

use entresol_sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::arch::timer;

/// A second in nanoseconds.
const NANOSECONDS: u128 = 1_000_000_000;

/// How long a vCPU has been ready and not on a CPU.
#[derive(Debug, Default)]
pub struct Wait {
    /// Count at which it became ready.
    since: AtomicU64,
    /// Counts so far.
    total: AtomicU64,
    /// The guest has asked for it.
    told: AtomicBool,
}

impl Wait {
    /// The same for a copy of the virtual machine.
    pub fn fork(&self) -> Self {
        let copy = |value: &AtomicU64| AtomicU64::new(value.load(Ordering::Relaxed));
        let told = AtomicBool::new(self.told.load(Ordering::Relaxed));
        Self { since: AtomicU64::new(0), total: copy(&self.total), told }
    }

    /// Outside the machine: nanoseconds, and whether the guest has asked for them.
    pub fn save(&self) -> (u64, bool) {
        (self.nanoseconds(), self.told.load(Ordering::Relaxed))
    }

    /// As it was saved.
    pub fn load((nanoseconds, told): (u64, bool)) -> Self {
        let counts = u128::from(nanoseconds) * u128::from(timer::frequency()) / NANOSECONDS;
        let total = AtomicU64::new(u64::try_from(counts).unwrap_or(u64::MAX));
        Self { since: AtomicU64::new(0), total, told: AtomicBool::new(told) }
    }

    /// It is ready from now on. For the scheduler, under its lock.
    pub fn begin(&self) {
        self.since.store(timer::now(), Ordering::Relaxed);
    }

    /// It has a CPU. For the scheduler, under its lock.
    pub fn end(&self) {
        let waited = timer::now().saturating_sub(self.since.load(Ordering::Relaxed));
        self.total.fetch_add(waited, Ordering::Relaxed);
    }

    /// Whether the guest has asked for it.
    #[cfg_attr(target_arch = "x86_64", expect(dead_code, reason = "no guest of x86-64 is told of it yet"))]
    #[inline]
    pub fn is_told(&self) -> bool {
        self.told.load(Ordering::Relaxed)
    }

    /// The guest asks for it, or is not told after all.
    #[cfg_attr(target_arch = "x86_64", expect(dead_code, reason = "no guest of x86-64 is told of it yet"))]
    pub fn tell(&self, told: bool) {
        self.told.store(told, Ordering::Relaxed);
    }

    /// Nanoseconds so far.
    pub fn nanoseconds(&self) -> u64 {
        let counts = u128::from(self.total.load(Ordering::Relaxed));
        u64::try_from(counts * NANOSECONDS / u128::from(timer::frequency().max(1))).unwrap_or(u64::MAX)
    }
}
