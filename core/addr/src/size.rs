//! The sizes a second-stage entry of the 4 KiB granule can have.

use crate::PAGE_SHIFT;

/// Size of the memory behind one entry (Arm DDI 0487 D8.2.6, 4 KiB granule; AMD APM vol. 2, 5.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// A page, 4 KiB.
    Size4K,
    /// A block of the last level but one, 2 MiB.
    Size2M,
    /// A block of the level above that, 1 GiB.
    Size1G,
}

impl PageSize {
    /// Every size, smallest first.
    pub const ALL: [Self; 3] = [Self::Size4K, Self::Size2M, Self::Size1G];

    /// Base-two logarithm of the size in bytes.
    #[inline]
    pub const fn shift(self) -> u32 {
        PAGE_SHIFT + 9 * self as u32
    }

    /// Size in bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// Size in 4 KiB frames.
    #[inline]
    pub const fn frames(self) -> u64 {
        1 << (9 * self as u32)
    }

    /// The next smaller size, if there is one.
    #[inline]
    pub const fn smaller(self) -> Option<Self> {
        match self {
            Self::Size4K => None,
            Self::Size2M => Some(Self::Size4K),
            Self::Size1G => Some(Self::Size2M),
        }
    }
}
