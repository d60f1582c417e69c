//! Atomics as the core uses them.

#[cfg(loom)]
pub use loom::sync::atomic::fence;

pub use core::sync::atomic::Ordering;
#[cfg(not(loom))]
pub use core::sync::atomic::fence;
#[cfg(not(any(feature = "lab", loom)))]
pub use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize};

#[cfg(all(feature = "lab", not(loom)))]
pub use crate::lab::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize};
#[cfg(loom)]
pub use crate::weak::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize};

/// The ordering of an access that something depends on: `$strong`. Under loom a test may plant `$weak` instead, by the
/// name of the place in `weak::Site`, and must then find what goes wrong.
#[cfg(not(loom))]
#[macro_export]
macro_rules! ordering {
    ($site:ident, $strong:ident, $weak:ident) => {
        $crate::atomic::Ordering::$strong
    };
}

/// The ordering of an access that something depends on: `$strong`. Under loom a test may plant `$weak` instead, by the
/// name of the place in `weak::Site`, and must then find what goes wrong.
#[cfg(loom)]
#[macro_export]
macro_rules! ordering {
    ($site:ident, $strong:ident, $weak:ident) => {
        $crate::weak::ordering(
            $crate::weak::Site::$site,
            $crate::atomic::Ordering::$strong,
            $crate::atomic::Ordering::$weak,
        )
    };
}
