//! Addresses in bytes and frame numbers in 4 KiB, for the guest's side and the machine's.

use core::fmt;

use crate::{PAGE_SHIFT, PAGE_SIZE, PageSize};

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw number.
            #[inline]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The raw number.
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// `self + n`, or `None` past the end of 64 bits.
            #[inline]
            pub const fn checked_add(self, n: u64) -> Option<Self> {
                match self.0.checked_add(n) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

unit!(
    /// Guest physical address in bytes (the intermediate physical address of the Arm ARM).
    Gpa
);
unit!(
    /// Host physical address in bytes (output of the second stage).
    Hpa
);
unit!(
    /// Guest frame number: a [`Gpa`] divided by 4 KiB.
    Gfn
);
unit!(
    /// Physical frame number: an [`Hpa`] divided by 4 KiB.
    Pfn
);

macro_rules! pair {
    ($byte:ident, $frame:ident) => {
        impl $byte {
            /// The frame that holds this byte.
            #[inline]
            pub const fn frame(self) -> $frame {
                $frame(self.0 >> PAGE_SHIFT)
            }

            /// Bytes past the frame's start.
            #[inline]
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }
        }

        impl $frame {
            /// Address of the frame's first byte. Frame numbers above 52 bits lose their top bits.
            #[inline]
            pub const fn base(self) -> $byte {
                $byte(self.0 << PAGE_SHIFT)
            }

            /// `self + frames`, wrapping at 64 bits: for offsets already known to lie inside a range.
            #[inline]
            pub const fn offset(self, frames: u64) -> Self {
                Self(self.0.wrapping_add(frames))
            }

            /// Frames from `start` to `self`, wrapping at 64 bits.
            #[inline]
            pub const fn since(self, start: Self) -> u64 {
                self.0.wrapping_sub(start.0)
            }

            /// The first frame of the naturally aligned block of `size` around this one.
            #[inline]
            pub const fn align_down(self, size: PageSize) -> Self {
                Self(self.0 & !(size.frames() - 1))
            }

            /// Whether this is the first frame of a naturally aligned block of `size`.
            #[inline]
            pub const fn is_aligned(self, size: PageSize) -> bool {
                self.0 & (size.frames() - 1) == 0
            }
        }
    };
}

pair!(Gpa, Gfn);
pair!(Hpa, Pfn);
