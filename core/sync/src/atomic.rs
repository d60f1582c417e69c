//! Atomics as the core uses them.

pub use core::sync::atomic::{Ordering, fence};

#[cfg(not(feature = "lab"))]
pub use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize};

#[cfg(feature = "lab")]
pub use crate::lab::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize};
