//! The facade under loom, which tries what the orderings that the core asks for allow, and not only what one CPU after
//! the other would see.
//!
//! Purpose: the lab's explorer is sequentially consistent. The small lock-free pieces of the core, where a weaker order
//! shows, are tested here: built with `--cfg loom`, their atomics and locks are loom's, and `tests/loom.rs` of each crate
//! runs them for every interleaving with a bounded number of preemptions and every value that a load may return.
//! Nothing of this exists in any other build.
//!
//! Protocol: loom counts the making of an atomic as a plain write, and its atomics can only be made inside a model, where
//! ours are made by `const fn`. So a place becomes loom's when it is touched first. A test touches every place once
//! before its threads exist, by using the structure; loom reports one that it forgot as a causality violation.
//!
//! Planted bugs: [`plant`] weakens one ordering of the production code by its name in [`Site`], and the test that
//! plants it must fail. `ordering!` names such a place; it is the ordering itself in every other build.
//!
//! Known holes: loom treats sequentially consistent accesses as acquire and release; its fences are exact enough for
//! store buffering. `spin`'s own lock is not run here: loom's takes its place.

pub mod atomic;
mod mutex;

use core::cell::Cell;
use core::sync::atomic::Ordering;

pub use mutex::{Mutex, MutexGuard};

/// An ordering of the core that something depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// `Epoch::pin`: the barrier between the announcement and the first read.
    Pin,
    /// `Epoch::pin`: the section before is over when a later one is seen.
    PinAgain,
    /// `Pin`'s end: what was read is read before the pin is gone.
    Unpin,
    /// `Epoch::is_over`: what follows follows the unpinning that was seen.
    Over,
    /// `Slots::publish`: the set is written before the state names it.
    SlotsPublish,
    /// `Slots::find`: the set is read after the state that names it.
    SlotsFind,
    /// `Notifier::end`: the backing is changed before the sequence moves.
    NotifierEnd,
    /// `Notifier::sample`: the backing is asked after it.
    NotifierSample,
    /// `Vmids::load`: the number is announced before the guest runs.
    VmidLoad,
    /// `flush`: the entry is changed before the number is asked.
    TableFlush,
    /// `Flushes::enter` of x86-64's machine: the barrier between the announcement and the count.
    FlushEnter,
    /// `Cpu::leave` there: what the guest used was used before it is outside.
    FlushLeave,
    /// `Flushes::complete` there: the barrier between the count and the look at the announcements.
    FlushAsk,
}

std::thread_local! {
    static PLANTED: Cell<Option<Site>> = const { Cell::new(None) };
}

/// Weakens one ordering, or none, for all models that this test thread runs from now on. loom runs their threads on it.
pub fn plant(site: Option<Site>) {
    PLANTED.set(site);
}

/// The ordering of a place: `strong`, unless it is the one that was planted.
pub fn ordering(site: Site, strong: Ordering, weak: Ordering) -> Ordering {
    if PLANTED.get() == Some(site) { weak } else { strong }
}

/// Runs `model` for everything that loom can try with at most `preemptions` preemptions.
///
/// # Panics
///
/// If one of them panics.
pub fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder.check(model);
}

/// [`explore`] with a planted bug, which must be found: the model panics.
///
/// # Panics
///
/// If everything was tried and nothing was found.
pub fn must_find(site: Site, preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    plant(Some(site));
    let explored = std::panic::catch_unwind(core::panic::AssertUnwindSafe(|| explore(preemptions, model)));
    plant(None);
    assert!(explored.is_err(), "{site:?} was weakened, and nothing was found");
}

/// Something that is used, and afterwards reused by somebody else. loom finds a use that does not happen before.
#[derive(Debug, Default)]
pub struct Place(loom::cell::UnsafeCell<()>);

impl Place {
    /// A place in use.
    pub fn new() -> Self {
        Self::default()
    }

    /// A reader's use.
    #[track_caller]
    pub fn read(&self) {
        self.0.with(|_| ());
    }

    /// The owner writes it, or gives it to somebody else.
    #[track_caller]
    pub fn reuse(&self) {
        self.0.with_mut(|_| ());
    }
}
