//! A lock that loom knows about.
//!
//! loom's own lock says who waits and what happens before what; the value lies beside it in a lock that is never waited
//! for, so that the whole can be made by `const fn` and hold what has no known size.

use core::fmt;
use core::ops::{Deref, DerefMut};
use std::sync::{OnceLock, PoisonError};

/// The lock of the same name of `spin`, explored.
#[derive(Default)]
pub struct Mutex<T: ?Sized> {
    order: OnceLock<loom::sync::Mutex<()>>,
    value: std::sync::Mutex<T>,
}

/// The lock is held; ends with `Drop`.
#[must_use = "dropping the guard releases the lock"]
pub struct MutexGuard<'a, T: ?Sized> {
    // Dropped in this order: the value is free before loom lets another thread have it.
    value: std::sync::MutexGuard<'a, T>,
    _order: loom::sync::MutexGuard<'a, ()>,
}

impl<T> Mutex<T> {
    /// As in `spin`.
    pub const fn new(value: T) -> Self {
        Self { order: OnceLock::new(), value: std::sync::Mutex::new(value) }
    }

    /// As in `spin`.
    pub fn into_inner(self) -> T {
        self.value.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: ?Sized> Mutex<T> {
    fn order(&self) -> &loom::sync::Mutex<()> {
        self.order.get_or_init(|| loom::sync::Mutex::new(()))
    }

    fn guard<'a>(&'a self, order: loom::sync::MutexGuard<'a, ()>) -> MutexGuard<'a, T> {
        // loom has just said that nobody holds it: this never waits. A model that panicked is not gone on with.
        MutexGuard { value: self.value.lock().unwrap_or_else(PoisonError::into_inner), _order: order }
    }

    /// As in `spin`.
    #[track_caller]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.guard(self.order().lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// As in `spin`.
    #[track_caller]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        Some(self.guard(self.order().try_lock().ok()?))
    }
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T: ?Sized> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mutex(..)")
    }
}
