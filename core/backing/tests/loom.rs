//! Frames between CPUs, under weak orderings, by loom: `cargo xtask test --weak`.
#![cfg(loom)]

// loom's threads take turns on one of the host's.
use std::rc::Rc;

use entresol_addr::{Pfn, PfnRange};
use entresol_backing::{FrameMeta, FramePool, Order};
use entresol_sync::Epoch;
use entresol_sync::atomic::{AtomicU64, Ordering};
use entresol_sync::weak::{Place, Site, explore, must_find};
use loom::thread;

struct World {
    epoch: Epoch,
    pool: FramePool,
    /// The frame that readers reach, plus one.
    published: AtomicU64,
    /// What each frame holds.
    content: [Place; 2],
}

impl World {
    fn new(frames: u64) -> Rc<Self> {
        let meta = (0..frames).map(|_| FrameMeta::new()).collect();
        let pool = FramePool::new(Pfn::new(0), meta, 2).expect("the heap has room");
        pool.add(PfnRange::new(Pfn::new(0), frames).expect("a range")).expect("nobody else's");
        let content = [Place::new(), Place::new()];
        let world = Self { epoch: Epoch::new(), pool, published: AtomicU64::new(0), content };
        // Everything is touched once before the threads exist.
        let all: Vec<_> = (0..frames).map(|_| world.take(0)).collect();
        all.into_iter().for_each(|frame| world.pool.give(1, frame, Order::PAGE));
        (0..2).for_each(|cpu| world.read(cpu));
        world.epoch.synchronize();
        world.pool.reap(&world.epoch, 0, 1);
        Rc::new(world)
    }

    /// Whoever has a frame may write it.
    fn take(&self, cpu: usize) -> Pfn {
        let frame = self.pool.take(cpu, Order::PAGE).expect("a frame is free");
        self.content[frame.get() as usize].reuse();
        frame
    }

    /// Takes up to `count` frames, writes them, and gives them back.
    fn take_and_give(&self, cpu: usize, count: usize) {
        let taken: Vec<_> = (0..count).map_while(|_| self.pool.take(cpu, Order::PAGE).ok()).collect();
        for frame in taken {
            self.content[frame.get() as usize].reuse();
            self.pool.give(cpu, frame, Order::PAGE);
        }
    }

    fn read(&self, cpu: usize) {
        let _pin = self.epoch.pin(cpu);
        if let Some(frame) = self.published.load(Ordering::Acquire).checked_sub(1) {
            self.content[frame as usize].read();
        }
    }
}

#[test]
fn a_frame_that_another_cpu_gave_back_is_not_its_any_more() {
    explore(2, || {
        let world = World::new(2);
        let other = thread::spawn({
            let world = Rc::clone(&world);
            move || world.take_and_give(1, 1)
        });
        // They come out of the other CPU's cache, or are in its hands: then this is out of memory.
        world.take_and_give(0, 2);
        other.join().unwrap();
        assert_eq!(world.pool.free_frames(), 2);
    });
}

fn a_deferred_frame_beside_a_reader() {
    let world = World::new(1);
    let frame = world.take(0);
    world.published.store(frame.get() + 1, Ordering::Release);
    let reader = thread::spawn({
        let world = Rc::clone(&world);
        move || world.read(1)
    });
    world.published.store(0, Ordering::Release);
    world.pool.defer(frame, Order::PAGE);
    while world.pool.reap(&world.epoch, 0, 1) == 0 {
        entresol_sync::hint::spin_loop();
    }
    let again = world.take(0);
    world.pool.give(0, again, Order::PAGE);
    reader.join().unwrap();
    assert_eq!((world.pool.free_frames(), world.pool.deferred_frames()), (1, 0));
}

#[test]
fn a_deferred_frame_is_not_given_out_under_a_reader() {
    explore(2, a_deferred_frame_beside_a_reader);
}

#[test]
fn every_ordering_is_needed() {
    for site in [Site::Pin, Site::Unpin, Site::Over] {
        must_find(site, 2, a_deferred_frame_beside_a_reader);
    }
}
