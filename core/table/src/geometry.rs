//! Levels, indices and the shape of a tree.

use entresol_addr::{Gfn, GfnRange, PageSize};

/// The level whose leaves are 4 KiB.
pub const LEAF_LEVEL: u8 = 3;

/// Words per table frame, as a shift.
pub(crate) const INDEX_BITS: u32 = 9;

/// Base-two logarithm of the frames behind one word of a table at `level` (0–3).
#[inline]
pub const fn shift(level: u8) -> u32 {
    INDEX_BITS * (LEAF_LEVEL - level) as u32
}

/// Number, modulo 512, of the word for `gfn` in its table at `level` (0–3).
#[inline]
pub const fn index(gfn: Gfn, level: u8) -> u16 {
    (gfn.get() >> shift(level)) as u16 & ((1 << INDEX_BITS) - 1)
}

/// The level whose leaves have this size.
#[inline]
pub const fn level_of(size: PageSize) -> u8 {
    LEAF_LEVEL - size as u8
}

/// The size of a leaf at `level`, or `None` at level 0, which has tables only.
#[inline]
pub const fn size_at(level: u8) -> Option<PageSize> {
    match level {
        1 => Some(PageSize::Size1G),
        2 => Some(PageSize::Size2M),
        3 => Some(PageSize::Size4K),
        _ => None,
    }
}

/// The shape of a tree: how many address bits it translates, the level of its root, and how many frames, one after the
/// other in memory and aligned to their total size, the root has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    ipa_bits: u8,
    root_level: u8,
    root_frames: u8,
}

impl Geometry {
    /// Fewest address bits that a tree translates.
    pub const MIN_IPA_BITS: u8 = 32;
    /// Most address bits that a tree translates.
    pub const MAX_IPA_BITS: u8 = 48;

    /// The tree of fewest levels that translates `ipa_bits` with a root of at most `most_root_frames` concatenated
    /// frames; `None` outside 32–48 bits or if no level is high enough.
    pub const fn new(ipa_bits: u8, most_root_frames: u8) -> Option<Self> {
        if ipa_bits < Self::MIN_IPA_BITS || ipa_bits > Self::MAX_IPA_BITS {
            return None;
        }
        let mut root_level = LEAF_LEVEL;
        while root_level > 0 {
            root_level -= 1;
            let words = 1u64 << (ipa_bits as u32 - entresol_addr::PAGE_SHIFT - shift(root_level));
            let frames = words.div_ceil(1 << INDEX_BITS);
            if frames <= most_root_frames as u64 {
                return Some(Self { ipa_bits, root_level, root_frames: frames as u8 });
            }
        }
        None
    }

    /// Bits of a guest physical address that are translated, 32–48.
    #[inline]
    pub const fn ipa_bits(self) -> u8 {
        self.ipa_bits
    }

    /// Level of the root, 0–2.
    #[inline]
    pub const fn root_level(self) -> u8 {
        self.root_level
    }

    /// Frames of the root.
    #[inline]
    pub const fn root_frames(self) -> u64 {
        self.root_frames as u64
    }

    /// Guest frames that are translated, from frame 0.
    #[inline]
    pub const fn frames(self) -> u64 {
        1 << (self.ipa_bits as u32 - entresol_addr::PAGE_SHIFT)
    }

    /// Whether `gfn` is translated.
    #[inline]
    pub const fn contains(self, gfn: Gfn) -> bool {
        gfn.get() < self.frames()
    }

    /// The translated part of `range`, as first frame and one past the last; empty as `0..0`.
    pub(crate) fn clip(self, range: GfnRange) -> (u64, u64) {
        let end = range.end().get().min(self.frames());
        let start = range.start().get();
        if start < end { (start, end) } else { (0, 0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn concatenation_decides_the_root() {
        for bits in 0..=64 {
            let shape = Geometry::new(bits, 16).map(|g| (g.root_level(), g.root_frames()));
            let expected = match bits {
                32..=34 => Some((2, 1 << (bits - 30))),
                35..=39 => Some((1, 1)),
                40..=43 => Some((1, 1 << (bits - 39))),
                44..=48 => Some((0, 1)),
                _ => None,
            };
            assert_eq!(shape, expected, "{bits} bits");
        }
    }

    #[test]
    fn without_concatenation_the_root_is_one_frame() {
        for bits in 32..=48 {
            let shape = Geometry::new(bits, 1).unwrap();
            assert_eq!(shape.root_frames(), 1);
            assert_eq!(shape.root_level(), if bits <= 39 { 1 } else { 0 });
        }
    }

    #[test]
    fn a_gfn_is_its_indices() {
        let gfn = Gfn::new(1 << 27 | 2 << 18 | 3 << 9 | 4);
        assert_eq!([0, 1, 2, 3].map(|level| index(gfn, level)), [1, 2, 3, 4]);
    }

    #[test]
    fn levels_and_sizes_agree() {
        for size in PageSize::ALL {
            assert_eq!(size_at(level_of(size)), Some(size));
            assert_eq!(1 << shift(level_of(size)), size.frames());
        }
        assert_eq!(size_at(0), None);
    }
}
