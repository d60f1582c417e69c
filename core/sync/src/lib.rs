//! Locks and atomics behind one facade, and the grace period.
//!
//! Purpose: the core takes its locks and atomics from here only. On metal they are spin locks and the CPU's atomics;
//! in the lab the explorer schedules them. The hypervisor masks interrupts at its own exception level, so no lock is
//! ever taken by an interrupt handler on top of its holder.
//!
//! Protocol of the grace period: see [`epoch`].
#![no_std]
#![forbid(unsafe_code)]

pub mod atomic;
pub mod epoch;

pub use epoch::{Epoch, Pin};
pub use spin::{Mutex, MutexGuard, Once, RwLock};
