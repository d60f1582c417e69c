//! A lock that tells the scheduler when it is wanted, held by another, and free again.

use core::fmt;
use core::ops::{Deref, DerefMut};
use core::panic::Location;

use super::{SCHEDULER, access};

/// The lock of the same name of `spin`, scheduled.
#[derive(Default)]
pub struct Mutex<T: ?Sized>(spin::Mutex<T>);

/// The lock is held; ends with `Drop`.
#[must_use = "dropping the guard releases the lock"]
pub struct MutexGuard<'a, T: ?Sized> {
    address: usize,
    /// `None` only inside `drop`.
    inner: Option<spin::MutexGuard<'a, T>>,
}

impl<T> Mutex<T> {
    /// As in `spin`.
    pub const fn new(value: T) -> Self {
        Self(spin::Mutex::new(value))
    }

    /// As in `spin`.
    pub fn into_inner(self) -> T {
        self.0.into_inner()
    }
}

impl<T: ?Sized> Mutex<T> {
    fn address(&self) -> usize {
        core::ptr::from_ref(self).cast::<u8>().addr()
    }

    /// As in `spin`; waits in the scheduler where there is one.
    #[track_caller]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        access(core::ptr::from_ref(self).cast::<u8>(), true);
        let inner = loop {
            if let Some(guard) = self.0.try_lock() {
                break guard;
            }
            match SCHEDULER.get() {
                Some(scheduler) => scheduler.blocked(self.address(), Location::caller()),
                None => core::hint::spin_loop(),
            }
        };
        MutexGuard { address: self.address(), inner: Some(inner) }
    }

    /// As in `spin`.
    #[track_caller]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        access(core::ptr::from_ref(self).cast::<u8>(), true);
        let inner = self.0.try_lock()?;
        Some(MutexGuard { address: self.address(), inner: Some(inner) })
    }

    /// As in `spin`.
    pub fn is_locked(&self) -> bool {
        self.0.is_locked()
    }

    /// As in `spin`.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut()
    }
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.inner.as_deref().expect("held until dropped")
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.inner.as_deref_mut().expect("held until dropped")
    }
}

impl<T: ?Sized> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        self.inner = None;
        if let Some(scheduler) = SCHEDULER.get() {
            scheduler.released(self.address);
        }
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
