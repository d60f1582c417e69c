//! What can be chosen about copy-on-write while a virtual machine runs: mostly to measure what each choice is worth.

use entresol_sync::atomic::Ordering;
use entresol_sync::tally::AtomicU64;

/// The choices of one virtual machine. Any thread may change one at any time: faults from then on follow it.
#[derive(Debug)]
pub struct Switches {
    fault_around: AtomicU64,
    force_notifier: AtomicU64,
    protect_at_fork: AtomicU64,
}

impl Switches {
    /// The most frames that a fault looks at.
    pub const MOST_AROUND: u64 = 64;

    /// A fault that maps what is shared also maps what is present in the aligned span of so many frames around it: a power
    /// of two up to [`Self::MOST_AROUND`], other numbers are rounded down; 0 and 1 are "the frame alone". 16 at first.
    pub fn set_fault_around(&self, frames: u64) {
        let rounded = frames.min(Self::MOST_AROUND).checked_ilog2().map_or(1, |log| 1 << log);
        self.fault_around.store(rounded, Ordering::Relaxed);
    }

    /// A write that breaks sharing goes through the notifier ([`crate::Outcome::Unshare`]) instead of being done in its own
    /// trap. Off at first.
    pub fn force_notifier(&self, forced: bool) {
        self.force_notifier.store(forced.into(), Ordering::Relaxed);
    }

    /// A fork walks the parent's tables and takes write permission away, instead of detaching them. Off at first.
    pub fn protect_at_fork(&self, protect: bool) {
        self.protect_at_fork.store(protect.into(), Ordering::Relaxed);
    }

    pub(crate) fn around(&self) -> u64 {
        self.fault_around.load(Ordering::Relaxed)
    }

    pub(crate) fn forces_notifier(&self) -> bool {
        self.force_notifier.load(Ordering::Relaxed) != 0
    }

    pub(crate) fn protects_at_fork(&self) -> bool {
        self.protect_at_fork.load(Ordering::Relaxed) != 0
    }
}

impl Default for Switches {
    fn default() -> Self {
        Self { fault_around: AtomicU64::new(16), force_notifier: AtomicU64::new(0), protect_at_fork: AtomicU64::new(0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_a_power_of_two() {
        let switches = Switches::default();
        for (asked, got) in [(0, 1), (1, 1), (3, 2), (16, 16), (1000, 64)] {
            switches.set_fault_around(asked);
            assert_eq!(switches.around(), got, "{asked}");
        }
    }
}
