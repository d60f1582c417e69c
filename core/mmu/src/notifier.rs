//! The notifier: how a change of backing and a fault in flight find out about each other.
//!
//! Purpose: whoever is about to change what stands behind guest frames says so first (`start`), removes the
//! translations, changes the backing, and says that it is done (`end`). A fault samples the sequence before it decides
//! anything and asks again, with its own range, just before it publishes.
//!
//! Protocol:
//! - `start`: the range joins those in progress; then the caller waits a grace period, so that every fault which asked
//!   before the range joined has published or given up; then it unmaps. After that no translation reaches the range
//!   (INV-3), and every later fault in it sees the range in progress.
//! - `end`: the range goes into the history under the next sequence number, the number moves, the range leaves.
//! - `moved`: true if a range in progress overlaps, or one that ended since the sample does. Both tests are needed:
//!   the first misses an invalidation that began and ended in between, the second one that has not ended yet.
//!
//! Filtering: the history holds the last [`HISTORY`] ranges. A fault that slept through more than that retries; a
//! fault whose range nobody touched goes on.
//!
//! Invariants: INV-3. Lock order: the writers' lock is a leaf; faults take none.

use entresol_addr::{Gfn, GfnRange};
use entresol_sync::atomic::{AtomicU64, Ordering, fence};
use entresol_sync::{Mutex, ordering, planted, told};

/// Ended invalidations that can still be told apart by range. Under loom so few that one is overwritten while it is read.
const HISTORY: u64 = if cfg!(loom) { 2 } else { 8 };
/// Invalidations that may be in progress at once.
const IN_PROGRESS: usize = if cfg!(loom) { 2 } else { 8 };

/// A range that other CPUs read without a lock; `count` 0 means "none".
struct Shared {
    start: AtomicU64,
    count: AtomicU64,
}

impl Shared {
    const fn none() -> Self {
        Self { start: AtomicU64::new(0), count: AtomicU64::new(0) }
    }

    fn set(&self, range: GfnRange) {
        self.start.store(range.start().get(), Ordering::Relaxed);
        self.count.store(range.count(), Ordering::Release);
    }

    fn clear(&self) {
        self.count.store(0, Ordering::Release);
    }

    fn overlaps(&self, range: GfnRange) -> bool {
        let count = self.count.load(Ordering::Acquire);
        let start = Gfn::new(self.start.load(Ordering::Relaxed));
        GfnRange::new(start, count).is_none_or(|mine| mine.overlaps(range))
    }
}

/// The invalidation state of one virtual machine.
pub struct Notifier {
    sequence: AtomicU64,
    active: AtomicU64,
    progress: [Shared; IN_PROGRESS],
    history: [Shared; HISTORY as usize],
    writers: Mutex<()>,
}

/// The sequence as it was before a fault decided anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample(u64);

/// An invalidation in progress. Ends only through [`Notifier::end`].
#[must_use = "faults in the range retry for ever until the invalidation ends"]
#[derive(Debug)]
pub struct Invalidation {
    place: usize,
    range: GfnRange,
}

impl Invalidation {
    /// The guest frames being invalidated.
    pub fn range(&self) -> GfnRange {
        self.range
    }
}

/// As many invalidations are in progress as can be told apart; try again when one has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

impl Notifier {
    /// Nothing in progress, nothing in the history.
    pub const fn new() -> Self {
        Self {
            sequence: AtomicU64::new(HISTORY),
            active: AtomicU64::new(0),
            progress: [const { Shared::none() }; IN_PROGRESS],
            history: [const { Shared::none() }; HISTORY as usize],
            writers: Mutex::new(()),
        }
    }

    /// Samples the sequence: before anything about the fault is decided.
    #[inline]
    pub fn sample(&self) -> Sample {
        let sequence = self.sequence.load(ordering!(NotifierSample, Acquire, Relaxed));
        told!("the sequence is sampled: {sequence}");
        Sample(sequence)
    }

    /// Whether nothing at all changed, or is changing, since `sample`.
    #[inline]
    pub fn is_quiet(&self, sample: Sample) -> bool {
        self.active.load(Ordering::Acquire) == 0 && self.sequence.load(Ordering::Acquire) == sample.0
    }

    /// Whether anything in `range` changed, or is changing, since `sample`.
    #[inline]
    pub fn moved(&self, sample: Sample, range: GfnRange) -> bool {
        if self.is_quiet(sample) {
            return false;
        }
        self.moved_slow(sample, range)
    }

    #[cold]
    fn moved_slow(&self, sample: Sample, range: GfnRange) -> bool {
        // An invalidation enters the history before it leaves progress, so looking in this order misses none.
        if self.progress.iter().any(|place| place.overlaps(range)) && !planted!(ZA3) {
            return true;
        }
        if planted!(ZA4) {
            return false;
        }
        let now = self.sequence.load(Ordering::Acquire);
        if now - sample.0 >= HISTORY {
            return true;
        }
        let hit = (sample.0..now).any(|ended| self.history[(ended % HISTORY) as usize].overlaps(range));
        fence(Ordering::Acquire);
        // A history place may have been written again while it was read.
        hit || self.sequence.load(Ordering::Acquire) - sample.0 >= HISTORY
    }

    /// `invalidate_range_start`, first half: the range joins those in progress. The caller then waits a grace period
    /// before it unmaps.
    ///
    /// # Errors
    ///
    /// [`TooMany`] if no place is free; nothing changed.
    pub fn start(&self, range: GfnRange) -> Result<Invalidation, TooMany> {
        let _writers = self.writers.lock();
        let place = self.progress.iter().position(|place| place.count.load(Ordering::Relaxed) == 0).ok_or(TooMany)?;
        self.progress[place].set(range);
        self.active.fetch_add(1, Ordering::SeqCst);
        told!("invalidate_range_start: {} pages from gfn {:#x} are in progress", range.count(), range.start());
        Ok(Invalidation { place, range })
    }

    /// `invalidate_range_end`: the backing has its new state; faults that looked it up earlier will retry.
    pub fn end(&self, invalidation: Invalidation) {
        let _writers = self.writers.lock();
        self.pass(invalidation.range, "invalidate_range_end");
        self.progress[invalidation.place].clear();
        self.active.fetch_sub(1, Ordering::SeqCst);
    }

    /// Something about `range` has changed that nobody had to wait for: who sampled before looks again.
    pub fn told(&self, range: GfnRange) {
        let _writers = self.writers.lock();
        self.pass(range, "told");
    }

    /// The range goes into the history, and the sequence moves: because of `_what`, for the trace. The caller has the writers' lock.
    fn pass(&self, range: GfnRange, _what: &str) {
        let ended = self.sequence.load(Ordering::Relaxed);
        self.history[(ended % HISTORY) as usize].set(range);
        self.sequence.store(ended + 1, ordering!(NotifierEnd, Release, Relaxed));
        told!("{_what}: gfn {:#x}, the sequence is {}", range.start(), ended + 1);
    }

    /// Whether no invalidation but `mine` is in progress in `range`. One that starts later waits for the caller's pin.
    pub fn is_alone(&self, mine: &Invalidation, range: GfnRange) -> bool {
        let others = self.progress.iter().enumerate().filter(|(place, _)| *place != mine.place);
        !others.into_iter().any(|(_, place)| place.overlaps(range))
    }

    /// Whether any invalidation is in progress.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire) != 0
    }
}

impl Default for Notifier {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, count: u64) -> GfnRange {
        GfnRange::new(Gfn::new(start), count).unwrap()
    }

    #[test]
    fn in_progress_is_seen_only_where_it_overlaps() {
        let notifier = Notifier::new();
        let sample = notifier.sample();
        let invalidation = notifier.start(range(10, 5)).unwrap();
        assert!(notifier.moved(sample, range(14, 1)));
        assert!(!notifier.moved(sample, range(15, 1)));
        assert!(notifier.moved(notifier.sample(), range(12, 1)), "a fresh sample does not hide it");
        notifier.end(invalidation);
    }

    #[test]
    fn an_ended_invalidation_is_seen_by_older_samples() {
        let notifier = Notifier::new();
        let before = notifier.sample();
        let invalidation = notifier.start(range(10, 5)).unwrap();
        notifier.end(invalidation);
        assert!(notifier.moved(before, range(10, 1)));
        assert!(!notifier.moved(before, range(20, 1)));
        assert!(!notifier.moved(notifier.sample(), range(10, 1)));
    }

    #[test]
    fn a_sample_older_than_the_history_retries() {
        let notifier = Notifier::new();
        let before = notifier.sample();
        for _ in 0..HISTORY {
            let invalidation = notifier.start(range(1000, 1)).unwrap();
            notifier.end(invalidation);
        }
        assert!(notifier.moved(before, range(0, 1)));
    }

    #[test]
    fn overlapping_invalidations_end_one_by_one() {
        let notifier = Notifier::new();
        let first = notifier.start(range(0, 10)).unwrap();
        let second = notifier.start(range(5, 10)).unwrap();
        notifier.end(first);
        assert!(notifier.moved(notifier.sample(), range(7, 1)));
        assert!(!notifier.moved(notifier.sample(), range(2, 1)));
        notifier.end(second);
        assert!(!notifier.is_active());
    }

    #[test]
    fn a_full_house_is_an_error_and_changes_nothing() {
        let notifier = Notifier::new();
        let all: [_; IN_PROGRESS] = core::array::from_fn(|i| notifier.start(range(i as u64, 1)).unwrap());
        assert_eq!(notifier.start(range(100, 1)).unwrap_err(), TooMany);
        assert!(!notifier.moved(notifier.sample(), range(100, 1)));
        all.into_iter().for_each(|invalidation| notifier.end(invalidation));
    }
}
