//! Locks and atomics behind one facade, and the grace period.
//!
//! Purpose: the core takes its locks and atomics from here only, and says here when it waits. On metal they are spin
//! locks and the CPU's atomics; with the feature `lab` each operation asks a scheduler first, so that the explorer can
//! let another CPU go before it. Without the feature nothing of that is compiled: the names below are then those of
//! `core` and `spin`, and the functions of [`trace`] and [`hint`] are empty.
//!
//! The hypervisor masks interrupts at its own exception level, so no lock is ever taken by an interrupt handler on top
//! of its holder.
//!
//! Protocol of the grace period: see [`epoch`]. Protocol of the lab: see `lab`; of weak orderings under loom: `weak`.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(any(feature = "lab", loom))]
extern crate std;

pub mod atomic;
pub mod epoch;
pub mod hint;
#[cfg(feature = "lab")]
pub mod lab;
#[cfg(any(feature = "lab", loom))]
mod scheduled;
pub mod tally;
pub mod trace;
#[cfg(loom)]
pub mod weak;
#[cfg(feature = "zoo")]
pub mod zoo;

pub use epoch::{Epoch, Pin};
#[cfg(all(feature = "lab", not(loom)))]
pub use lab::{Mutex, MutexGuard};
#[cfg(not(any(feature = "lab", loom)))]
pub use spin::{Mutex, MutexGuard};
pub use spin::{Once, RwLock};
#[cfg(loom)]
pub use weak::{Mutex, MutexGuard};

/// Whether a bug of the zoo, named by a variant of `zoo::Bug`, is switched on. `false`, known to the compiler, wherever
/// the feature `zoo` is not.
#[cfg(feature = "zoo")]
#[macro_export]
macro_rules! planted {
    ($bug:ident) => {
        $crate::zoo::is_planted($crate::zoo::Bug::$bug)
    };
}

/// Writes into the lab's trace what no memory access shows by itself, as [`format_args!`] has it. Nothing at all without the
/// feature `lab`.
#[cfg(feature = "lab")]
#[macro_export]
macro_rules! told {
    ($($what:tt)+) => {
        $crate::lab::told(format_args!($($what)+))
    };
}

/// Writes into the lab's trace what no memory access shows by itself, as [`format_args!`] has it. Nothing at all without the
/// feature `lab`.
#[cfg(not(feature = "lab"))]
#[macro_export]
macro_rules! told {
    ($($what:tt)+) => {};
}

/// Whether a bug of the zoo, named by a variant of `zoo::Bug`, is switched on. `false`, known to the compiler, wherever
/// the feature `zoo` is not.
#[cfg(not(feature = "zoo"))]
#[macro_export]
macro_rules! planted {
    ($bug:ident) => {
        false
    };
}
