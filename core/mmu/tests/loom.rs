//! Faults beside a change of backing, and beside a change of VMID, under weak orderings, by loom:
//! `cargo xtask test --weak`.
#![cfg(loom)]

use std::cell::Cell;
// loom's threads take turns on one of the host's.
use std::rc::Rc;

use entresol_addr::{Gfn, GfnRange, Pfn, PfnRange};
use entresol_arch_arm64::stage2::Stage2;
use entresol_machine::flat::FlatMachine;
use entresol_mmu::{Notifier, VmVmid, Vmids};
use entresol_sync::Epoch;
use entresol_sync::atomic::{AtomicU64, Ordering};
use entresol_sync::weak::{Site, explore, must_find};
use entresol_table::{Format, Table, Vmid};
use loom::thread;

fn range() -> GfnRange {
    GfnRange::single(Gfn::new(7))
}

/// A page's backing, a frame's number, and its entry, which is the frame's number or 0.
struct World {
    epoch: Epoch,
    notifier: Notifier,
    backing: AtomicU64,
    entry: AtomicU64,
}

impl World {
    fn new() -> Rc<Self> {
        let world = Self {
            epoch: Epoch::new(),
            notifier: Notifier::new(),
            backing: AtomicU64::new(1),
            entry: AtomicU64::new(0),
        };
        // Everything is touched once before the threads exist: both places in progress, both of the history.
        let other = |frame| GfnRange::single(Gfn::new(frame));
        let sample = world.notifier.sample();
        let both = [100, 200].map(|frame| world.notifier.start(other(frame)).expect("two places"));
        world.notifier.moved(sample, range());
        both.into_iter().for_each(|invalidation| world.notifier.end(invalidation));
        world.fault(0);
        world.fault(1);
        Rc::new(world)
    }

    /// As the pipeline: sample, ask the backing, ask again, publish.
    fn fault(&self, cpu: usize) {
        let _pin = self.epoch.pin(cpu);
        let sample = self.notifier.sample();
        let frame = self.backing.load(Ordering::Relaxed);
        if !self.notifier.moved(sample, range()) {
            self.entry.store(frame, Ordering::Release);
        }
    }

    /// As the pipeline: announce, wait, unmap, change, end.
    fn change(&self, to: u64) {
        let invalidation = self.notifier.start(range()).expect("a place");
        self.epoch.synchronize();
        self.entry.store(0, Ordering::Release);
        self.backing.store(to, Ordering::Relaxed);
        self.notifier.end(invalidation);
    }
}

fn a_fault_beside_changes(changes: u64) {
    let world = World::new();
    let fault = thread::spawn({
        let world = Rc::clone(&world);
        move || world.fault(0)
    });
    (0..changes).for_each(|change| world.change(change + 2));
    fault.join().unwrap();
    let entry = world.entry.load(Ordering::Acquire);
    assert!(entry == 0 || entry == changes + 1, "the entry leads to frame {entry}, which was taken away (INV-3)");
}

#[test]
fn no_entry_leads_to_what_was_taken_away() {
    explore(3, || a_fault_beside_changes(1));
}

#[test]
fn a_history_that_is_overwritten_is_noticed() {
    explore(2, || a_fault_beside_changes(2));
}

#[test]
fn every_ordering_of_the_notifier_is_needed() {
    for site in [Site::Pin, Site::NotifierEnd, Site::NotifierSample] {
        must_find(site, 3, || a_fault_beside_changes(1));
    }
}

const FORMAT: Stage2 = Stage2 { fwb: true };
/// Frames of the root of 40 bits.
const ROOT: u64 = 2;

/// A CPU gives a virtual machine its VMID and lets it run, beside a table operation that changes an entry and flushes
/// under the VMID that it sees.
fn a_first_run_beside_a_flush() {
    let machine = Rc::new(FlatMachine::coherent(Pfn::new(0), ROOT));
    let root = PfnRange::new(Pfn::new(0), ROOT).expect("a range");
    let geometry = FORMAT.geometry(40).expect("arm64 has 40 bits");
    let table = Table::new(&*machine, FORMAT, geometry, root).expect("a root");
    let shared = Rc::new((Vmids::new(8).expect("the heap has room"), VmVmid::new(), AtomicU64::new(1)));
    // Everything is touched once before the threads exist.
    let (vmids, vm, word) = &*shared;
    vmids.load(&*machine, 1, &VmVmid::new());
    vmids.put(1);
    vmids.put(0);
    vm.number();
    word.load(Ordering::Relaxed);
    let run = thread::spawn({
        let (machine, shared) = (Rc::clone(&machine), Rc::clone(&shared));
        move || {
            let (vmids, vm, word) = &*shared;
            let number = vmids.load(&*machine, 0, vm);
            // The guest's hardware walk: unordered.
            (number, word.load(Ordering::Relaxed))
        }
    });
    word.store(0, Ordering::Relaxed);
    // Any operation that flushes: the end of a table is the shortest.
    let flushed = Cell::new(Vmid::new(0));
    let number = || {
        flushed.set(vm.number());
        flushed.get()
    };
    table.destroy(&*machine, number, |_| {});
    let (number, walked) = run.join().unwrap();
    assert!(
        flushed.get() == number || walked == 0,
        "the guest holds a translation that the flush under another VMID missed"
    );
}

#[test]
fn a_flush_reaches_whoever_can_hold_the_old_entry() {
    explore(3, a_first_run_beside_a_flush);
}

#[test]
fn both_barriers_of_a_vmid_are_needed() {
    for site in [Site::VmidLoad, Site::TableFlush] {
        must_find(site, 3, a_first_run_beside_a_flush);
    }
}
