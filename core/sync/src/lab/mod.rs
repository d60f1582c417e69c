//! The facade as the explorer schedules it.
//!
//! Protocol: a thread that explores enters with [`enter`]; until it leaves with [`leave`], every operation of an
//! atomic, a lock or a waiting loop on that thread calls its [`Scheduler`] first, which may let other CPUs run before it
//! returns. Other threads are not affected: with the feature on and no scheduler entered, everything behaves as on
//! metal. So one build serves unit tests and the lab.
//!
//! Every CPU of a model runs on one thread, one at a time: the memory is sequentially consistent, and the orderings that
//! the core asks for are not tried. That is for loom and Miri, on the pieces small enough for them.

pub mod atomic;
mod mutex;

use core::cell::Cell;
use core::fmt;
use core::panic::Location;

pub use mutex::{Mutex, MutexGuard};

/// A place in the source.
pub type Site = &'static Location<'static>;

/// One operation about to happen.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Where in the host's memory; equal for operations on one atomic or lock.
    pub address: usize,
    /// Whether it may change what is there.
    pub write: bool,
    /// Whose operation it is in the source.
    pub site: Site,
}

/// Who decides which CPU goes next.
pub trait Scheduler {
    /// An operation is about to happen.
    fn access(&self, access: Access);
    /// The CPU waits for a change of what it read since it last waited.
    fn spin(&self, site: Site);
    /// The CPU cannot go on before the lock at `address` is released.
    fn blocked(&self, address: usize, site: Site);
    /// The lock at `address` was released.
    fn released(&self, address: usize);
    /// Whether the schedule was given up.
    fn abandoned(&self) -> bool;
    /// Frames left the pool.
    fn taken(&self, first: u64, frames: u64);
    /// Frames went back to the pool.
    fn freed(&self, first: u64, frames: u64);
    /// Whether a request for a frame is to be refused.
    fn starved(&self) -> bool;
    /// For whoever reads what happened; nobody does, unless this says otherwise.
    fn told(&self, _what: fmt::Arguments<'_>) {}
}

std::thread_local! {
    static SCHEDULER: Cell<Option<&'static dyn Scheduler>> = const { Cell::new(None) };
}

/// From now on `scheduler` decides on this thread.
pub fn enter(scheduler: &'static dyn Scheduler) {
    SCHEDULER.set(Some(scheduler));
}

/// From now on nobody decides on this thread.
pub fn leave() {
    SCHEDULER.set(None);
}

#[inline]
#[track_caller]
pub(crate) fn access<T>(place: *const T, write: bool) {
    if let Some(scheduler) = SCHEDULER.get() {
        scheduler.access(Access { address: place.addr(), write, site: Location::caller() });
    }
}

/// See [`crate::hint::spin_loop`].
#[track_caller]
pub fn spin() {
    match SCHEDULER.get() {
        Some(scheduler) => scheduler.spin(Location::caller()),
        None => core::hint::spin_loop(),
    }
}

pub(crate) fn abandoned() -> bool {
    SCHEDULER.get().is_some_and(|scheduler| scheduler.abandoned())
}

pub(crate) fn taken(first: u64, frames: u64) {
    if let Some(scheduler) = SCHEDULER.get() {
        scheduler.taken(first, frames);
    }
}

pub(crate) fn freed(first: u64, frames: u64) {
    if let Some(scheduler) = SCHEDULER.get() {
        scheduler.freed(first, frames);
    }
}

pub(crate) fn starved() -> bool {
    SCHEDULER.get().is_some_and(|scheduler| scheduler.starved())
}

/// See [`crate::told`].
pub fn told(what: fmt::Arguments<'_>) {
    if let Some(scheduler) = SCHEDULER.get() {
        scheduler.told(what);
    }
}

#[cfg(test)]
mod tests {
    use core::cell::RefCell;

    use super::*;
    use crate::atomic::{AtomicU64, Ordering};

    std::thread_local! {
        static SEEN: RefCell<std::vec::Vec<(usize, bool, u32)>> = const { RefCell::new(std::vec::Vec::new()) };
    }

    struct Recorder;

    impl Scheduler for Recorder {
        fn access(&self, access: Access) {
            SEEN.with_borrow_mut(|seen| seen.push((access.address, access.write, access.site.line())));
        }
        fn spin(&self, _: Site) {}
        fn blocked(&self, _: usize, site: Site) {
            panic!("deadlock at {site}");
        }
        fn released(&self, _: usize) {}
        fn abandoned(&self) -> bool {
            false
        }
        fn taken(&self, _: u64, _: u64) {}
        fn freed(&self, _: u64, _: u64) {}
        fn starved(&self) -> bool {
            false
        }
    }

    #[test]
    fn operations_are_announced_with_their_place_in_the_source() {
        let (word, lock) = (AtomicU64::new(3), Mutex::new(1));
        word.store(4, Ordering::Relaxed);
        enter(&Recorder);
        let here = line!();
        assert_eq!(word.load(Ordering::Relaxed), 4);
        assert_eq!(word.fetch_add(1, Ordering::Relaxed), 4);
        *lock.lock() += 1;
        leave();
        word.store(9, Ordering::Relaxed);
        let seen = SEEN.take();
        assert_eq!(seen.iter().map(|(_, write, _)| *write).collect::<std::vec::Vec<_>>(), [false, true, true]);
        assert_eq!(seen.iter().map(|(.., line)| line - here).collect::<std::vec::Vec<_>>(), [1, 2, 3]);
        assert!(seen[0].0 == seen[1].0 && seen[1].0 != seen[2].0);
    }

    #[test]
    #[should_panic(expected = "deadlock at")]
    fn a_held_lock_blocks() {
        let lock = Mutex::new(());
        let _held = lock.lock();
        enter(&Recorder);
        let _again = lock.lock();
    }
}
