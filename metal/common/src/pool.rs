//! Which frames the core may ask for.
//!
//! Purpose: every access of the core to a frame is checked, so the check must be cheap. RAM is two large ranges, before and
//! after the boot bundle, and crumbs between what the loader placed; the pool has the large ones only.

use entresol_addr::PfnRange;
use entresol_sync::atomic::{AtomicU64, Ordering};

/// Ranges of a pool.
pub const RANGES: usize = 2;

/// One range: first frame and number.
struct Range {
    start: AtomicU64,
    count: AtomicU64,
}

impl Range {
    const fn none() -> Self {
        Self { start: AtomicU64::new(0), count: AtomicU64::new(0) }
    }

    #[inline]
    fn covers(&self, frames: PfnRange) -> bool {
        covers(self.start.load(Ordering::Relaxed), self.count.load(Ordering::Relaxed), frames)
    }
}

#[inline]
fn covers(start: u64, count: u64, frames: PfnRange) -> bool {
    let offset = frames.start().get().wrapping_sub(start);
    offset < count && frames.count() <= count - offset
}

/// The frames that the core may ask for.
pub struct Pool([Range; RANGES]);

impl Default for Pool {
    fn default() -> Self {
        Self::new()
    }
}

impl Pool {
    /// No frames.
    pub const fn new() -> Self {
        Self([const { Range::none() }; RANGES])
    }

    /// Names the frames, the range that is used most first. Once, before other CPUs check.
    ///
    /// # Panics
    ///
    /// If there are more than [`RANGES`].
    pub fn set(&self, ranges: &[PfnRange]) {
        assert!(ranges.len() <= RANGES, "a pool has at most {RANGES} ranges, not {}", ranges.len());
        for (place, range) in self.0.iter().zip(ranges) {
            place.start.store(range.start().get(), Ordering::Relaxed);
            place.count.store(range.count(), Ordering::Release);
        }
    }

    /// Whether all of `frames` may be asked for.
    #[inline]
    pub fn covers(&self, frames: PfnRange) -> bool {
        self.0[0].covers(frames) || self.0[1].covers(frames)
    }

    /// Panics unless all of `frames` may be asked for.
    #[inline]
    pub fn check(&self, frames: PfnRange) {
        if !self.covers(frames) {
            refuse(frames);
        }
    }
}

/// The same as plain values, for a machine that names the frames before anything reads them, and never again: a load that is no atomic
/// is part of the instruction that compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fixed([(u64, u64); RANGES]);

impl Fixed {
    /// No frames.
    pub const NONE: Self = Self([(0, 0); RANGES]);

    /// These frames, the range that is used most first.
    ///
    /// # Panics
    ///
    /// If there are more than [`RANGES`].
    pub fn new(ranges: &[PfnRange]) -> Self {
        assert!(ranges.len() <= RANGES, "a pool has at most {RANGES} ranges, not {}", ranges.len());
        let mut fixed = Self::NONE;
        for (place, range) in fixed.0.iter_mut().zip(ranges) {
            *place = (range.start().get(), range.count());
        }
        fixed
    }

    /// As [`Pool::covers`].
    #[inline]
    pub fn covers(&self, frames: PfnRange) -> bool {
        let [(start, count), (second, more)] = &self.0;
        covers(*start, *count, frames) || covers(*second, *more, frames)
    }

    /// As [`Pool::check`].
    #[inline]
    pub fn check(&self, frames: PfnRange) {
        if !self.covers(frames) {
            refuse(frames);
        }
    }
}

#[cold]
#[inline(never)]
fn refuse(frames: PfnRange) -> ! {
    panic!("{frames:x?} are not in the frame pool")
}

#[cfg(test)]
mod tests {
    use super::*;
    use entresol_addr::Pfn;
    use std::panic::catch_unwind;

    fn range(start: u64, count: u64) -> PfnRange {
        PfnRange::new(Pfn::new(start), count).unwrap()
    }

    #[test]
    fn exactly_the_frames_of_the_ranges_pass() {
        let ranges = [range(12, 6), range(4, 5)];
        for frames in (0..20).flat_map(|start| (1..8).map(move |count| range(start, count))) {
            let mine = ranges.iter().any(|range| range.covers(frames));
            let passes = catch_unwind(|| {
                let pool = Pool::new();
                pool.set(&ranges);
                pool.check(frames);
            });
            assert_eq!(passes.is_ok(), mine, "{frames:?}");
            let pool = Pool::new();
            pool.set(&ranges);
            assert_eq!(pool.covers(frames), mine, "{frames:?}");
            let fixed = Fixed::new(&ranges);
            assert_eq!(fixed.covers(frames), mine, "{frames:?}");
            assert_eq!(catch_unwind(|| fixed.check(frames)).is_ok(), mine, "{frames:?}");
            assert!(!Fixed::NONE.covers(frames));
        }
    }
}
