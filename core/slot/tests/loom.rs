//! Readers of slots beside an update, under weak orderings, by loom: `cargo xtask test --weak`.
#![cfg(loom)]

// loom's threads take turns on one of the host's.
use std::rc::Rc;

use entresol_addr::{Gfn, Gpa, PAGE_SIZE};
use entresol_slot::{Hint, ObjectId, ObjectShape, SlotFlags, SlotRequest, Slots, Update};
use entresol_sync::Epoch;
use entresol_sync::atomic::{AtomicU64, Ordering};
use entresol_sync::weak::{Site, explore, must_find};
use loom::thread;

const BASE: u64 = 0x100;
const FRAMES: u64 = 4;
const OFFSET: u64 = 9;
const SHAPE: Option<ObjectShape> = Some(ObjectShape { frames: 100, private: false });

struct World {
    epoch: Epoch,
    slots: Slots,
    hint: Hint,
    /// What the guest may reach through the second stage: 0 or 1.
    entry: AtomicU64,
}

fn request(count: u64) -> SlotRequest {
    SlotRequest {
        id: 0,
        base: Gpa::new(BASE * PAGE_SIZE),
        size: count * PAGE_SIZE,
        object: ObjectId::new(5),
        offset: OFFSET * PAGE_SIZE,
        flags: SlotFlags::empty().bits(),
    }
}

impl World {
    /// A slot that was made, and deleted and made again, so that everything is touched before the threads exist.
    fn new(present: bool) -> Rc<Self> {
        let slots = Slots::with_capacity(1, 0x1000).expect("the heap has room");
        let world = Self { epoch: Epoch::new(), slots, hint: Hint::new(), entry: AtomicU64::new(0) };
        world.update(FRAMES);
        world.fault(0);
        world.fault(1);
        if !present {
            world.update(0);
        }
        Rc::new(world)
    }

    /// As the pipeline handles a fault: find, check, publish.
    fn fault(&self, cpu: usize) {
        let pin = self.epoch.pin(cpu);
        let Some(found) = self.slots.find(&pin, Gfn::new(BASE + 1), &self.hint) else { return };
        assert_eq!((found.base, found.count, found.offset), (Gfn::new(BASE), FRAMES, OFFSET), "a mixed slot");
        assert_eq!(found.object, ObjectId::new(5), "a mixed slot");
        if self.slots.is_current(&found, &pin) {
            self.entry.store(1, Ordering::Release);
        }
    }

    /// As the pipeline updates: withdraw, flush, commit.
    fn update(&self, count: u64) {
        match self.slots.update(&self.epoch, &request(count), SHAPE).expect("a good request") {
            Update::Unchanged => {}
            Update::Publish(ready) => ready.commit(),
            Update::Withdraw(withdraw) => {
                let ready = withdraw.invalidate();
                self.entry.store(0, Ordering::Release);
                ready.commit();
            }
        }
    }
}

fn a_fault_beside(present: bool, count: u64) {
    let world = World::new(present);
    let fault = thread::spawn({
        let world = Rc::clone(&world);
        move || world.fault(0)
    });
    world.update(count);
    if count == 0 {
        // Nobody reaches a deleted slot from here on (INV-9), whoever is still in the middle of a fault.
        assert_eq!(world.entry.load(Ordering::Acquire), 0, "the flush missed an entry");
    }
    fault.join().unwrap();
    assert!(count != 0 || world.entry.load(Ordering::Acquire) == 0, "an entry came after the flush");
}

#[test]
fn a_slot_that_appears_is_whole() {
    explore(2, || a_fault_beside(false, FRAMES));
}

#[test]
fn nothing_is_published_for_a_slot_that_goes() {
    explore(2, || a_fault_beside(true, 0));
}

#[test]
fn every_ordering_is_needed() {
    for site in [Site::SlotsPublish, Site::SlotsFind] {
        must_find(site, 2, || a_fault_beside(false, FRAMES));
    }
    must_find(Site::Pin, 2, || a_fault_beside(true, 0));
}
