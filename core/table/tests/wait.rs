//! An operation on a range waits for a claim in it, and then acts on what the claimant published: nothing slips through
//! between the two.
//!
//! The claimant holds its claim until the other thread has looked at words so often that it must be waiting, or has
//! ended, which it must not.

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::{FIRST, Plain, VMID, gfns, leaf};
use entresol_addr::{Gfn, PageSize, Pfn, PfnRange};
use entresol_machine::flat::FlatMachine;
use entresol_table::{Entry, Format, Geometry, Leaf, PageWork, Permissions, Reserve, Straddle, Table};

/// More looks than any of these operations needs.
const MANY: usize = 4_000;

/// [`Plain`], which counts how often it is asked.
#[derive(Clone, Copy)]
struct Counted<'a>(&'a AtomicUsize);

impl Format for Counted<'_> {
    const BROKEN: u64 = Plain::BROKEN;
    const FRAME_BITS: u32 = Plain::FRAME_BITS;

    fn geometry(&self, ipa_bits: u8) -> Option<Geometry> {
        Plain.geometry(ipa_bits)
    }

    fn decode(&self, raw: u64, level: u8) -> Entry {
        self.0.fetch_add(1, Ordering::Relaxed);
        Plain.decode(raw, level)
    }

    fn leaf(&self, leaf: &Leaf) -> u64 {
        Plain.leaf(leaf)
    }

    fn table(&self, frame: Pfn) -> u64 {
        Plain.table(frame)
    }

    fn young(&self, raw: u64) -> u64 {
        Plain.young(raw)
    }
}

/// Lets the other thread go, and returns when it waits or has ended.
struct Hold<'a> {
    looks: &'a AtomicUsize,
    go: &'a AtomicBool,
    ended: &'a AtomicBool,
}

impl PageWork for Hold<'_> {
    fn must_prepare(&self) -> bool {
        true
    }

    fn prepare(&mut self) {
        let before = self.looks.load(Ordering::Relaxed);
        self.go.store(true, Ordering::Release);
        while self.looks.load(Ordering::Relaxed) - before < MANY && !self.ended.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        assert!(!self.ended.load(Ordering::Acquire), "the other did not wait");
    }
}

/// Tells that the thread has ended, also by a panic.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Runs `other` while page 5 of 8 is claimed, and returns what page 5 says after both.
fn while_claimed(other: impl Fn(&Table<Counted>, &FlatMachine) + Sync) -> Entry {
    let (looks, go, ended) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicBool::new(false));
    let machine = FlatMachine::coherent(Pfn::new(FIRST), 18);
    let geometry = Plain.geometry(32).unwrap();
    let root = PfnRange::new(Pfn::new(FIRST), geometry.root_frames()).unwrap();
    let table = Table::new(&machine, Counted(&looks), geometry, root).unwrap();
    let mut reserve = Reserve::new();
    let frame = Pfn::new(FIRST + 17);
    entresol_machine::Machine::zero(&machine, PfnRange::single(frame));
    reserve.push(frame).unwrap();
    let page = |pfn| leaf(pfn, PageSize::Size4K, Permissions::READ_WRITE);
    let mapped = table.map(&machine, VMID, Gfn::new(5), &page(0x1005), &mut reserve, &mut ()).unwrap();
    assert!(mapped.retired.is_empty() && reserve.is_empty());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !go.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            let _end = End(&ended);
            other(&table, &machine);
        });
        let mut work = Hold { looks: &looks, go: &go, ended: &ended };
        let mapped = table.map(&machine, VMID, Gfn::new(5), &page(0x2005), &mut reserve, &mut work);
        assert!(mapped.expect("the claimant wins").retired.is_empty());
    });
    table.walk(&machine, Gfn::new(5)).unwrap().entry
}

#[test]
fn protect_waits() {
    let end = while_claimed(|table, machine| {
        let changed = table.protect(machine, VMID, gfns(0, 8), Permissions::WRITE, Straddle::Whole);
        assert_eq!(changed, 1);
    });
    assert_eq!(end, Entry::Leaf(leaf(0x2005, PageSize::Size4K, Permissions::READ)));
}

#[test]
fn protect_of_single_frames_waits() {
    let end = while_claimed(|table, machine| {
        assert_eq!(table.protect_frames(machine, VMID, [Gfn::new(5)].into_iter()), 1);
    });
    assert_eq!(end, Entry::Leaf(leaf(0x2005, PageSize::Size4K, Permissions::READ)));
}

#[test]
fn age_waits() {
    let end = while_claimed(|table, machine| assert_eq!(table.age(machine, VMID, gfns(0, 8)), 1));
    assert!(matches!(end, Entry::Leaf(Leaf { young: false, .. })), "{end:?}");
}

#[test]
fn unmap_of_a_part_waits() {
    let end = while_claimed(|table, machine| {
        let settled = table.unmap(machine, VMID, gfns(0, 8), &mut ()).settle(machine, VMID);
        assert_eq!(settled.gone.of(PageSize::Size4K), 1);
        assert!(settled.retired.is_empty());
    });
    assert_eq!(end, Entry::Vacant);
}

#[test]
fn unmap_of_a_whole_table_waits() {
    let end = while_claimed(|table, machine| {
        let settled = table.unmap(machine, VMID, gfns(0, 512), &mut ()).settle(machine, VMID);
        assert_eq!((settled.gone.of(PageSize::Size4K), settled.retired.count()), (1, 1));
    });
    assert_eq!(end, Entry::Vacant);
}
