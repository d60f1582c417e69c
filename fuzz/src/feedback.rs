//! What a run reached, and which request for a frame it is refused.

use std::cell::{Cell, RefCell};
use std::panic::Location;

use entresol_sync::lab::{self, Access, Scheduler, Site};

/// Transitions that are told apart.
const PLACES: usize = 1 << 16;

/// Watches the runs of one thread.
pub struct Feedback {
    before: Cell<u32>,
    reached: RefCell<Box<[bool]>>,
    /// Requests until one is refused; 0 is never.
    countdown: Cell<u32>,
    refused: Cell<bool>,
}

std::thread_local! {
    /// One for each thread, for as long as the program runs: the facade keeps a reference.
    static FEEDBACK: &'static Feedback = Box::leak(Box::new(Feedback {
        before: Cell::new(0),
        reached: RefCell::new(vec![false; PLACES].into_boxed_slice()),
        countdown: Cell::new(0),
        refused: Cell::new(false),
    }));
}

impl Feedback {
    /// This thread's.
    pub fn here() -> &'static Self {
        FEEDBACK.with(|feedback| *feedback)
    }

    /// Watches what `run` does.
    pub fn watch<R>(&'static self, run: impl FnOnce() -> R) -> R {
        self.before.set(0);
        self.reached.borrow_mut().fill(false);
        self.refuse_after(0);
        lab::enter(self);
        let result = run();
        lab::leave();
        result
    }

    /// The transitions that the last run made.
    pub fn reached(&self) -> Vec<u16> {
        let reached = self.reached.borrow();
        (0..=u16::MAX).filter(|place| reached[usize::from(*place)]).collect()
    }

    /// Something happened that no access tells: `what` is its number.
    pub fn note(&self, what: u32) {
        self.reach(what.wrapping_mul(0x9e37_79b1));
    }

    /// The `requests`-th request for a frame from now on is refused; 0 is none.
    pub fn refuse_after(&self, requests: u32) {
        self.countdown.set(requests);
        self.refused.set(false);
    }

    /// Whether a request was refused since [`Self::refuse_after`].
    pub fn has_refused(&self) -> bool {
        self.refused.get()
    }

    fn reach(&self, place: u32) {
        let transition = self.before.get().rotate_left(7) ^ place;
        let index = (transition ^ transition >> 16) as usize % PLACES;
        self.reached.borrow_mut()[index] = true;
        self.before.set(place);
    }
}

/// A number for a place in the source that is the same in every run of every build of it.
fn number(site: &Location<'_>) -> u32 {
    let file = site.file().as_bytes();
    let letter = file.get(file.len() / 2).copied().unwrap_or_default();
    let mixed = site.line() << 12 ^ site.column() << 4 ^ u32::from(letter) ^ (file.len() as u32) << 24;
    mixed.wrapping_mul(0x9e37_79b1)
}

impl Scheduler for Feedback {
    fn access(&self, access: Access) {
        self.reach(number(access.site));
    }

    fn spin(&self, site: Site) {
        // While a panic unwinds, `abandoned` ends the loops of destructors.
        assert!(std::thread::panicking(), "waits at {site} for somebody else, and there is nobody else");
    }

    fn blocked(&self, _: usize, site: Site) {
        panic!("waits at {site} for a lock that it holds");
    }

    fn released(&self, _: usize) {}

    fn abandoned(&self) -> bool {
        std::thread::panicking()
    }

    fn taken(&self, _: u64, _: u64) {}

    fn freed(&self, _: u64, _: u64) {}

    fn starved(&self) -> bool {
        let left = self.countdown.get();
        self.countdown.set(left.saturating_sub(1));
        let refused = left == 1;
        self.refused.set(self.refused.get() | refused);
        refused
    }
}
