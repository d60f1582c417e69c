//! Half-open ranges of frames, the unit of everything that acts on more than one page.

use crate::{Gfn, PageSize, Pfn};

/// `start .. start + count`, in frames. Never wraps: [`FrameRange::new`] refuses that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameRange<F> {
    start: F,
    count: u64,
}

/// A range of guest frames.
pub type GfnRange = FrameRange<Gfn>;
/// A range of the machine's frames.
pub type PfnRange = FrameRange<Pfn>;

macro_rules! range {
    ($frame:ident) => {
        impl FrameRange<$frame> {
            /// `count` frames from `start`, or `None` if that wraps 64 bits.
            #[inline]
            pub const fn new(start: $frame, count: u64) -> Option<Self> {
                match start.get().checked_add(count) {
                    Some(_) => Some(Self { start, count }),
                    None => None,
                }
            }

            /// The single frame `frame`.
            #[inline]
            pub const fn single(frame: $frame) -> Self {
                Self { start: frame, count: 1 }
            }

            /// The naturally aligned block of `size` around `frame`.
            #[inline]
            pub const fn block(frame: $frame, size: PageSize) -> Self {
                Self { start: frame.align_down(size), count: size.frames() }
            }

            /// First frame.
            #[inline]
            pub const fn start(self) -> $frame {
                self.start
            }

            /// Number of frames.
            #[inline]
            pub const fn count(self) -> u64 {
                self.count
            }

            /// One past the last frame.
            #[inline]
            pub const fn end(self) -> $frame {
                $frame::new(self.start.get() + self.count)
            }

            /// Whether nothing is in it.
            #[inline]
            pub const fn is_empty(self) -> bool {
                self.count == 0
            }

            /// Whether `frame` lies inside.
            #[inline]
            pub const fn contains(self, frame: $frame) -> bool {
                frame.since(self.start) < self.count
            }

            /// Whether all of `other` lies inside.
            #[inline]
            pub const fn covers(self, other: Self) -> bool {
                other.start.get() >= self.start.get() && other.end().get() <= self.end().get()
            }

            /// Whether the two share a frame.
            #[inline]
            pub const fn overlaps(self, other: Self) -> bool {
                self.count != 0
                    && other.count != 0
                    && self.start.get() < other.end().get()
                    && other.start.get() < self.end().get()
            }

            /// The frames both have, or `None` if there are none.
            #[inline]
            pub const fn intersect(self, other: Self) -> Option<Self> {
                if !self.overlaps(other) {
                    return None;
                }
                let start = if self.start.get() > other.start.get() { self.start } else { other.start };
                let end = if self.end().get() < other.end().get() { self.end() } else { other.end() };
                Some(Self { start, count: end.get() - start.get() })
            }
        }
    };
}

range!(Gfn);
range!(Pfn);

#[cfg(test)]
mod tests {
    use super::*;

    fn gfns(start: u64, count: u64) -> GfnRange {
        GfnRange::new(Gfn::new(start), count).unwrap()
    }

    #[test]
    fn a_wrapping_range_is_refused() {
        assert_eq!(GfnRange::new(Gfn::new(u64::MAX), 1), None);
        assert!(GfnRange::new(Gfn::new(u64::MAX), 0).is_some());
    }

    #[test]
    fn touching_ranges_do_not_overlap() {
        assert!(!gfns(0, 4).overlaps(gfns(4, 4)));
        assert!(gfns(0, 5).overlaps(gfns(4, 4)));
        assert!(!gfns(0, 0).overlaps(gfns(0, 4)));
    }

    #[test]
    fn intersection_is_what_both_contain() {
        for (a, b) in [(0, 4), (2, 9), (7, 1), (3, 0)] {
            for (c, d) in [(0, 1), (1, 6), (5, 5), (9, 9)] {
                let (left, right) = (gfns(a, b), gfns(c, d));
                let both = left.intersect(right);
                for frame in (0..20).map(Gfn::new) {
                    let inside = left.contains(frame) && right.contains(frame);
                    assert_eq!(inside, both.is_some_and(|range| range.contains(frame)));
                }
            }
        }
    }

    #[test]
    fn a_block_is_aligned_and_contains_its_seed() {
        for size in PageSize::ALL {
            let block = GfnRange::block(Gfn::new(0x12_3456), size);
            assert!(block.contains(Gfn::new(0x12_3456)));
            assert!(block.start().is_aligned(size));
            assert_eq!(block.count(), size.frames());
        }
    }
}
