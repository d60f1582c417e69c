//! The grace period under weak orderings, by loom: `cargo xtask test --weak`.
#![cfg(loom)]

// loom's threads take turns on one of the host's.
use std::rc::Rc;

use entresol_sync::atomic::{AtomicU64, Ordering};
use entresol_sync::weak::{Place, Site, explore, must_find};
use entresol_sync::{Epoch, Mutex};
use loom::thread;

/// A place that is published by its number plus one, readers that use it pinned, and a writer that reuses it.
struct World {
    epoch: Epoch,
    published: AtomicU64,
    place: Place,
}

impl World {
    fn new() -> Rc<Self> {
        let world = Self { epoch: Epoch::new(), published: AtomicU64::new(1), place: Place::new() };
        // Everything is touched once before the threads exist.
        world.read(0);
        world.read(1);
        world.epoch.synchronize();
        Rc::new(world)
    }

    fn read(&self, cpu: usize) {
        let _pin = self.epoch.pin(cpu);
        if self.published.load(Ordering::Acquire) != 0 {
            self.place.read();
        }
    }

    fn reuse(&self) {
        self.published.store(0, Ordering::Release);
        self.epoch.synchronize();
        self.place.reuse();
    }
}

fn a_reader_and_a_writer() {
    let world = World::new();
    let reader = thread::spawn({
        let world = Rc::clone(&world);
        move || world.read(0)
    });
    world.reuse();
    reader.join().unwrap();
}

#[test]
fn nothing_is_reused_under_a_reader() {
    explore(3, a_reader_and_a_writer);
}

#[test]
fn nothing_is_reused_under_two_readers() {
    explore(2, || {
        let world = World::new();
        let readers = [0, 1].map(|cpu| {
            let world = Rc::clone(&world);
            thread::spawn(move || world.read(cpu))
        });
        world.reuse();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
}

fn a_reader_that_pins_again() {
    let world = World::new();
    let reader = thread::spawn({
        let world = Rc::clone(&world);
        move || {
            world.read(0);
            world.read(0);
        }
    });
    world.reuse();
    reader.join().unwrap();
}

#[test]
fn a_later_pin_does_not_hide_an_earlier_one() {
    explore(2, a_reader_that_pins_again);
}

#[test]
fn every_ordering_is_needed() {
    for site in [Site::Pin, Site::Unpin, Site::Over] {
        must_find(site, 3, a_reader_and_a_writer);
    }
    must_find(Site::PinAgain, 2, a_reader_that_pins_again);
}

#[test]
fn a_lock_orders_what_it_protects() {
    explore(3, || {
        let shared = Rc::new((Mutex::new(0), Place::new()));
        drop(shared.0.lock());
        let threads = [(); 2].map(|()| {
            let shared = Rc::clone(&shared);
            thread::spawn(move || {
                let mut count = shared.0.lock();
                *count += 1;
                shared.1.reuse();
            })
        });
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(*shared.0.lock(), 2);
    });
}
