//! Grace periods: when nobody can still hold what was just unpublished.
//!
//! Purpose: readers of slots and walkers of tables take no lock (D7). A CPU *pins* itself while it handles a guest's
//! exit; what was reachable when it pinned stays usable until it unpins, which is at the latest when the guest runs
//! again. Whoever unpublishes something waits until every CPU that was pinned has unpinned once, and only then frees
//! or rewrites it.
//!
//! Protocol: `pin` stores the global count into the CPU's own word, then a full barrier; `advance` moves the global
//! count, then a full barrier. One of the two sees the other (store buffering is excluded by the two barriers): either
//! the pinned CPU already sees what was published before `advance`, or `is_over` sees it pinned at an older count.
//! Both stores of a CPU's word are releases, because a later pin may be all that `is_over` sees of an earlier unpinning.
//!
//! Invariants: a CPU pins at most once at a time. Zero in a CPU's word means "not pinned".
//! Lock order: none is taken.

use core::marker::PhantomData;

use crate::atomic::{AtomicU64, Ordering, fence};
use crate::{hint, ordering};

/// The most CPUs that one machine may have. Under loom as many as its tests have threads: each word is one more to try.
pub const MAX_CPUS: usize = if cfg!(loom) { 3 } else { 64 };

/// A CPU's word on a cache line of its own.
#[repr(align(128))]
struct Slot(AtomicU64);

/// The state of one machine's grace periods.
pub struct Epoch {
    now: AtomicU64,
    cpus: [Slot; MAX_CPUS],
}

/// A moment that a grace period began at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

/// Proof that a CPU is pinned; ends with `Drop`.
#[must_use = "dropping the pin ends the read section"]
pub struct Pin<'e> {
    epoch: &'e Epoch,
    cpu: usize,
    _not_send: PhantomData<*const ()>,
}

impl Epoch {
    /// Nobody pinned.
    pub const fn new() -> Self {
        Self { now: AtomicU64::new(1), cpus: [const { Slot(AtomicU64::new(0)) }; MAX_CPUS] }
    }

    /// Pins CPU `cpu`. The caller is that CPU, and is not pinned.
    ///
    /// # Panics
    ///
    /// If `cpu` is not below [`MAX_CPUS`], or is pinned already.
    #[inline]
    pub fn pin(&self, cpu: usize) -> Pin<'_> {
        let word = &self.cpus[cpu].0;
        assert_eq!(word.load(Ordering::Relaxed), 0, "a CPU pins once at a time");
        // Release: whoever sees this pin as a later one sees that the section before it has ended.
        word.store(self.now.load(Ordering::Relaxed), ordering!(PinAgain, Release, Relaxed));
        fence(ordering!(Pin, SeqCst, AcqRel));
        Pin { epoch: self, cpu, _not_send: PhantomData }
    }

    /// Begins a grace period: what was unpublished before this call is free of readers once [`Self::is_over`].
    pub fn advance(&self) -> Moment {
        fence(Ordering::SeqCst);
        let before = self.now.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        Moment(before)
    }

    /// Whether every CPU pinned at `moment` or before has unpinned.
    pub fn is_over(&self, moment: Moment) -> bool {
        self.cpus.iter().all(|cpu| {
            let pinned = cpu.0.load(ordering!(Over, Acquire, Relaxed));
            pinned == 0 || pinned > moment.0
        })
    }

    /// Waits until a grace period is over. The caller's own CPU must not be pinned, or this never returns.
    pub fn synchronize(&self) {
        let moment = self.advance();
        while !self.is_over(moment) && !hint::abandoned() {
            hint::spin_loop();
        }
    }
}

impl Default for Epoch {
    fn default() -> Self {
        Self::new()
    }
}

impl Pin<'_> {
    /// The CPU that is pinned.
    #[inline]
    pub fn cpu(&self) -> usize {
        self.cpu
    }
}

impl Drop for Pin<'_> {
    #[inline]
    fn drop(&mut self) {
        self.epoch.cpus[self.cpu].0.store(0, ordering!(Unpin, Release, Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_cpu_holds_the_grace_period_open() {
        let epoch = Epoch::new();
        let pin = epoch.pin(3);
        let moment = epoch.advance();
        assert!(!epoch.is_over(moment));
        drop(pin);
        assert!(epoch.is_over(moment));
    }

    #[test]
    fn a_cpu_that_pins_later_does_not() {
        let epoch = Epoch::new();
        let moment = epoch.advance();
        let _pin = epoch.pin(0);
        assert!(epoch.is_over(moment));
        assert!(!epoch.is_over(epoch.advance()));
    }

    #[test]
    #[should_panic(expected = "once at a time")]
    fn pinning_twice_is_refused() {
        let epoch = Epoch::new();
        let _first = epoch.pin(1);
        let _second = epoch.pin(1);
    }
}
