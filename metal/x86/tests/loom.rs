//! A CPU that enters its guest beside one that takes a page away, under weak orderings, by loom: `cargo xtask test --weak`.
#![cfg(loom)]

// loom's threads take turns on one of the host's.
use std::rc::Rc;

use entresol_metal_x86::flush::{Cpu, Flushes, Tenant};
use entresol_sync::atomic::{AtomicU64, Ordering};
use entresol_sync::weak::{Place, Site, explore, must_find};
use loom::thread;

/// Enough for an entry, the taking, and what follows both.
const PREEMPTIONS: usize = 3;

struct World {
    flushes: Flushes,
    cpus: [Cpu; 2],
    /// What the guest's tables say of the page: 1, it is there.
    entry: AtomicU64,
    /// The page: a guest reads it, and whoever gets it next writes it.
    page: Place,
}

impl World {
    /// The guest was on CPU 1 before, so that everything is touched before the threads exist, and its translation is still known there.
    fn new() -> (Rc<Self>, Option<u64>) {
        let flushes = Flushes::new();
        let cpus = [const { Cpu::new() }; 2];
        let world = Self { flushes, cpus, entry: AtomicU64::new(1), page: Place::new() };
        world.cpus[1].load(1, &mut Tenant::default());
        world.cpus[0].leave();
        let mut known = None;
        world.turn(&mut known);
        (Rc::new(world), known)
    }

    /// CPU 1 enters its guest once, which reads the page if it can; `known` is what the CPU translates.
    fn turn(&self, known: &mut Option<u64>) {
        if self.flushes.enter(&self.cpus[1]) {
            *known = None;
        }
        // A walk may give either of two values that were there at the same time; so may what is known.
        let entry = known.unwrap_or_else(|| self.entry.load(Ordering::Relaxed));
        *known = (entry == 1).then_some(entry);
        if entry == 1 {
            self.page.read();
        }
        self.cpus[1].leave();
    }

    /// CPU 0 takes the page away and gives it to somebody else.
    fn take(&self) {
        self.entry.store(0, Ordering::Relaxed);
        self.flushes.ask();
        self.flushes.complete([(1, &self.cpus[1])].into_iter(), |_| (), thread::yield_now);
        self.page.reuse();
    }
}

fn a_page_is_taken() {
    let (world, mut known) = World::new();
    let taker = world.clone();
    let taker = thread::spawn(move || taker.take());
    world.turn(&mut known);
    world.turn(&mut known);
    taker.join().expect("the taker came to its end");
}

#[test]
fn no_guest_reads_a_page_that_was_taken() {
    explore(PREEMPTIONS, a_page_is_taken);
}

#[test]
fn each_ordering_is_needed() {
    for site in [Site::FlushEnter, Site::FlushLeave, Site::FlushAsk] {
        must_find(site, PREEMPTIONS, a_page_is_taken);
    }
}
