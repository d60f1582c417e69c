//! Single steps of the protocol: what others see in the middle of an operation, in which order effects happen, and that
//! a refused operation changes nothing.

mod common;

use std::cell::RefCell;

use common::{Bench, Gone, Plain, VMID, gfns, leaf};
use entresol_addr::{Gfn, PageSize, Pfn, PfnRange};
use entresol_machine::flat::{Event, FlatMachine};
use entresol_machine::{Machine, TlbOp, Vmid};
use entresol_table::{
    Entry, Format, Leaf, MapError, Memory, MergeError, PageWork, Permissions, RelaxError, Reserve, RootError,
    SplitError, Straddle, Table,
};

const SMALL: PageSize = PageSize::Size4K;
const BLOCK: PageSize = PageSize::Size2M;
const HUGE: PageSize = PageSize::Size1G;
const RW: Permissions = Permissions::READ_WRITE;

/// Runs `f` where a page would be cleaned.
struct Prepare<F>(F);

impl<F: FnMut()> PageWork for Prepare<F> {
    fn must_prepare(&self) -> bool {
        true
    }

    fn prepare(&mut self) {
        (self.0)();
    }
}

/// Cleans like a machine without forced write-back: the new page before, the old one after the flush.
struct Clean<'m> {
    machine: &'m FlatMachine,
    pfn: Pfn,
}

impl PageWork for Clean<'_> {
    fn must_prepare(&self) -> bool {
        true
    }

    fn prepare(&mut self) {
        self.machine.clean_invalidate_to_poc(PfnRange::single(self.pfn));
        self.machine.complete();
    }

    fn flush_before_removed(&self) -> bool {
        true
    }

    fn removed(&mut self, _: Gfn, leaf: Leaf) {
        self.machine.clean_invalidate_to_poc(PfnRange::new(leaf.pfn, leaf.size.frames()).unwrap());
        self.machine.complete();
    }
}

fn words(events: &[Event]) -> usize {
    events.iter().filter(|event| matches!(event, Event::Word(..))).count()
}

#[test]
fn an_empty_page_costs_one_word() {
    let mut bench = Bench::new(40, 8);
    bench.map(0, &leaf(0x1000, SMALL, RW), &mut ()).unwrap();
    bench.audit();
    bench.map(1, &leaf(0x1001, SMALL, RW), &mut ()).unwrap();
    let events = bench.machine.events();
    assert!(matches!(events[..], [Event::Word(..)]), "{events:?}");
}

#[test]
fn every_refusal_for_want_of_tables_changes_nothing() {
    for bits in 32..=48 {
        for (there, wanted) in
            [(None, SMALL), (None, BLOCK), (Some(HUGE), SMALL), (Some(HUGE), BLOCK), (Some(BLOCK), SMALL)]
        {
            let mut bench = Bench::new(bits, 8);
            if let Some(size) = there
                && bench.map(0, &leaf(0, size, Permissions::READ), &mut ()).is_err()
            {
                continue; // 1 GiB below a root at level 2
            }
            let new = leaf(0x40_0000, wanted, RW);
            let needed = bench.table.needed(&bench.machine, Gfn::new(0), wanted);
            for short in 0..needed {
                let before = bench.leaves();
                bench.audit();
                let mut reserve = bench.reserve(short);
                let result = bench.table.map(&bench.machine, VMID, Gfn::new(0), &new, &mut reserve, &mut ());
                assert_eq!(result.unwrap_err(), MapError::NoTable { needed });
                assert_eq!(
                    words(&bench.machine.events()),
                    0,
                    "{bits} bits, {there:?} → {wanted:?}, {short} of {needed}"
                );
                assert_eq!(reserve.len(), short);
                bench.give_back(reserve);
                assert_eq!(bench.leaves(), before);
            }
            bench.map(0, &new, &mut ()).unwrap();
            bench.audit();
        }
    }
}

#[test]
fn a_split_without_a_table_changes_nothing() {
    let mut bench = Bench::new(40, 8);
    bench.map(0, &leaf(0, BLOCK, RW), &mut ()).unwrap();
    bench.audit();
    let refused = bench.table.split(&bench.machine, VMID, Gfn::new(3), &mut Reserve::new());
    assert_eq!(refused, Err(SplitError::NoTable));
    assert_eq!(words(&bench.machine.events()), 0);
}

#[test]
fn bad_requests_are_named_and_change_nothing() {
    let mut bench = Bench::new(34, 8);
    let end = Gfn::new(1 << 22);
    bench.machine.events();
    let mut map = |gfn: u64, leaf: Leaf| bench.map(gfn, &leaf, &mut ()).unwrap_err();
    assert_eq!(map(1 << 22, leaf(0, SMALL, RW)), MapError::Outside { gfn: end });
    assert_eq!(map(u64::MAX, leaf(0, SMALL, RW)), MapError::Outside { gfn: Gfn::new(u64::MAX) });
    let (gfn, pfn, size) = (Gfn::new(1), Pfn::new(0), BLOCK);
    assert_eq!(map(1, leaf(0, BLOCK, RW)), MapError::Misaligned { gfn, pfn, size });
    assert_eq!(map(0, leaf(1, BLOCK, RW)), MapError::Misaligned { gfn: Gfn::new(0), pfn: Pfn::new(1), size });
    assert_eq!(map(0, leaf(0, HUGE, RW)), MapError::TooLarge { size: HUGE });
    assert_eq!(map(0, leaf(1 << 40, SMALL, RW)), MapError::Unreachable { pfn: Pfn::new(1 << 40) });
    let (table, machine) = (&bench.table, &bench.machine);
    assert!(table.walk(machine, end).is_none());
    assert_eq!(table.needed(machine, end, SMALL), 0);
    assert_eq!(table.make_young(machine, end), Err(RelaxError::Outside { gfn: end }));
    assert_eq!(table.relax(machine, VMID, end, Pfn::new(0), RW, &mut ()), Err(RelaxError::Outside { gfn: end }));
    assert_eq!(table.split(machine, VMID, end, &mut Reserve::new()), Err(SplitError::Outside { gfn: end }));
    assert_eq!(table.merge(machine, VMID, end, BLOCK).unwrap_err(), MergeError::Outside { gfn: end });
    assert_eq!(table.protect(machine, VMID, gfns(1 << 22, 1 << 40), RW, Straddle::Whole), 0);
    assert!(bench.unmap(gfns(u64::MAX - 5, 5)).is_empty());
    assert_eq!(words(&bench.machine.events()), 0);
}

#[test]
fn a_root_that_does_not_fit_is_refused() {
    let machine = FlatMachine::coherent(Pfn::new(0), 64);
    let geometry = Plain.geometry(34).unwrap();
    let root = |start: u64, count: u64| {
        let range = PfnRange::new(Pfn::new(start), count).unwrap();
        Table::new(&machine, Plain, geometry, range).err()
    };
    assert_eq!(root(0, 15), Some(RootError::Count { needed: 16, offered: 15 }));
    assert_eq!(root(8, 16), Some(RootError::Misaligned { start: Pfn::new(8), alignment: 16 }));
    assert_eq!(root(1 << 40, 16), Some(RootError::Unreachable { start: Pfn::new(1 << 40) }));
    assert_eq!(root(16, 16), None);
}

/// While the winner prepares the page, nobody sees an entry and nobody else wins.
#[test]
fn a_claimed_entry_is_busy_for_everyone() {
    for old in [None, Some(leaf(0x9000, SMALL, RW))] {
        let mut bench = Bench::new(40, 8);
        bench.map(4, &leaf(0x8004, SMALL, RW), &mut ()).unwrap();
        if let Some(old) = old {
            bench.map(5, &old, &mut ()).unwrap();
        }
        let (table, machine) = (&bench.table, &bench.machine);
        let calls = RefCell::new(0);
        let mut work = Prepare(|| {
            let gfn = Gfn::new(5);
            *calls.borrow_mut() += 1;
            assert_eq!(table.walk(machine, gfn).unwrap().entry, Entry::Broken);
            let mut none = Reserve::new();
            let other = table.map(machine, VMID, gfn, &leaf(0x7000, SMALL, RW), &mut none, &mut ());
            assert_eq!(other.unwrap_err(), MapError::Busy);
            assert_eq!(table.relax(machine, VMID, gfn, Pfn::new(0x9000), RW, &mut ()), Err(RelaxError::Busy));
            assert_eq!(table.make_young(machine, gfn), Err(RelaxError::Busy));
            assert_eq!(table.split(machine, VMID, gfn, &mut none), Err(SplitError::Busy));
            assert_eq!(table.merge(machine, VMID, gfn, BLOCK).unwrap_err(), MergeError::NotUniform);
            // Its neighbour is not held up.
            assert_eq!(table.make_young(machine, Gfn::new(4)), Ok(leaf(0x8004, SMALL, RW)));
        });
        let new = leaf(0x6000, SMALL, RW);
        let mapped = table.map(machine, VMID, Gfn::new(5), &new, &mut Reserve::new(), &mut work).unwrap();
        assert!(mapped.retired.is_empty());
        assert_eq!(*calls.borrow(), 1);
        assert_eq!(table.walk(machine, Gfn::new(5)).unwrap().entry, Entry::Leaf(new));
        bench.audit();
    }
}

#[test]
fn a_page_is_clean_before_it_is_seen_and_after_it_was_last_used() {
    let mut bench = Bench::new(40, 8);
    bench.map(9, &leaf(0x1009, SMALL, RW), &mut ()).unwrap();
    bench.audit();
    let new = leaf(0x2009, SMALL, RW);
    let mut work = Clean { machine: &bench.machine, pfn: new.pfn };
    let mapped = bench.table.map(&bench.machine, VMID, Gfn::new(9), &new, &mut Reserve::new(), &mut work).unwrap();
    assert!(mapped.retired.is_empty());
    let word = bench.table.walk(&bench.machine, Gfn::new(9)).unwrap().word;
    let events = bench.machine.events();
    let [Event::Word(broken, _), rest @ ..] = &events[..] else { panic!("{events:?}") };
    assert_eq!(*broken, word);
    let expected = [
        Event::Tlb(TlbOp::Ipa { vmid: VMID, gfn: Gfn::new(9), size: SMALL, leaf_only: true }),
        Event::Complete,
        Event::Clean(PfnRange::single(Pfn::new(0x1009))),
        Event::Complete,
        Event::Clean(PfnRange::single(new.pfn)),
        Event::Complete,
        Event::Word(word, Plain.leaf(&new)),
    ];
    assert_eq!(rest, expected);
}

#[test]
fn unmapping_without_forced_write_back_flushes_before_each_clean() {
    let mut bench = Bench::new(40, 8);
    for gfn in 0..3 {
        bench.map(gfn, &leaf(0x1000 + gfn, SMALL, RW), &mut ()).unwrap();
    }
    bench.audit();
    // Whole table, and a part of one.
    for range in [gfns(0, 2), gfns(0, 512)] {
        let mut work = Clean { machine: &bench.machine, pfn: Pfn::new(0) };
        let debt = bench.table.unmap(&bench.machine, VMID, range, &mut work);
        let settled = debt.settle(&bench.machine, VMID);
        bench.retire(settled.retired);
        let events = bench.machine.events();
        let cleans = events.windows(3).filter(|seen| matches!(seen[2], Event::Clean(_)));
        let flushed = cleans.map(|seen| matches!(seen, [Event::Tlb(_), Event::Complete, _])).collect::<Vec<_>>();
        assert!(!flushed.is_empty() && flushed.iter().all(|flushed| *flushed), "{events:?}");
        bench.tlb.replay(events);
    }
    bench.audit();
}

/// Between unmap and settle nothing can be mapped, and no table page is anyone else's.
#[test]
fn what_is_not_flushed_is_not_reused() {
    let mut bench = Bench::new(40, 8);
    for gfn in [0, 1, 512] {
        bench.map(gfn, &leaf(0x1000 + gfn, SMALL, RW), &mut ()).unwrap();
    }
    let (table, machine) = (&bench.table, &bench.machine);
    for range in [gfns(1, 1), gfns(0, 1024)] {
        let debt = table.unmap(machine, VMID, range, &mut ());
        let mut reserve = Reserve::new();
        let result = table.map(machine, VMID, Gfn::new(1), &leaf(0x9001, SMALL, RW), &mut reserve, &mut ());
        assert_eq!(result.unwrap_err(), MapError::Busy);
        // A second unmap of the same finds nothing to remove, and flushes all the same.
        let second = table.unmap(machine, VMID, range, &mut ());
        if range.count() == 1 {
            assert!(second.gone().is_empty());
        }
        assert_eq!(second.range(), Some(range));
        machine.events();
        let settled = second.settle(machine, VMID);
        let events = machine.events();
        assert!(events.contains(&Event::Tlb(TlbOp::Range { vmid: VMID, range })), "{events:?}");
        assert!(settled.retired.is_empty() && settled.gone.is_empty());
        // Only the one who removed it may vacate it.
        assert_eq!(table.walk(machine, Gfn::new(1)).unwrap().entry, Entry::Broken);
        let first = debt.settle(machine, VMID);
        assert_eq!(first.gone.tables, first.retired.count());
        let free = &mut bench.free;
        first.retired.drain(machine, Plain, |frame| assert!(free.insert(frame)));
        assert_eq!(table.walk(machine, Gfn::new(1)).unwrap().entry, Entry::Vacant);
    }
    assert_eq!(bench.table.census().tables, 1, "the table of the first gigabyte stays");
}

/// While a subtree is taken out, a fault in it installs nothing.
#[test]
fn nothing_is_installed_in_a_page_that_is_being_unlinked() {
    struct Intruder<'a> {
        bench: &'a Bench,
        seen: Vec<Gfn>,
    }
    impl PageWork for Intruder<'_> {
        fn removed(&mut self, gfn: Gfn, _: Leaf) {
            let (table, machine) = (&self.bench.table, &self.bench.machine);
            self.seen.push(gfn);
            for other in [gfn.get(), gfn.get() + 1, 511] {
                let new = leaf(0x5000 + other, SMALL, RW);
                let result = table.map(machine, VMID, Gfn::new(other), &new, &mut Reserve::new(), &mut ());
                assert_eq!(result.unwrap_err(), MapError::Busy, "{other:#x} during {gfn:?}");
            }
        }
    }
    for replace in [false, true] {
        let mut bench = Bench::new(40, 8);
        for gfn in [0, 7, 300] {
            bench.map(gfn, &leaf(0x1000 + gfn, SMALL, RW), &mut ()).unwrap();
        }
        let mut work = Intruder { bench: &bench, seen: Vec::new() };
        let (table, machine) = (&bench.table, &bench.machine);
        let retired = if replace {
            let block = leaf(0x4000, BLOCK, RW);
            table.map(machine, VMID, Gfn::new(0), &block, &mut Reserve::new(), &mut work).unwrap().retired
        } else {
            table.unmap(machine, VMID, gfns(0, 512), &mut work).settle(machine, VMID).retired
        };
        assert_eq!(work.seen, [0, 7, 300].map(Gfn::new));
        assert_eq!(retired.count(), 1);
        bench.retire(retired);
        bench.audit();
    }
}

/// A walker that read the parent before a page was unlinked comes too late in every word of it.
#[test]
fn a_retired_page_stays_closed_until_it_is_reused() {
    let mut bench = Bench::new(40, 8);
    bench.map(3, &leaf(0x1003, SMALL, RW), &mut ()).unwrap();
    let page = bench.table.walk(&bench.machine, Gfn::new(3)).unwrap().word.frame();
    let settled = bench.table.unmap(&bench.machine, VMID, gfns(0, 512), &mut ()).settle(&bench.machine, VMID);
    assert_eq!(settled.gone.of(SMALL), 1);
    for index in 0..512 {
        let raw = bench.machine.load(entresol_machine::Word::new(page, index));
        assert_eq!(Plain.decode(raw, 3), Entry::Broken, "word {index}");
    }
    bench.retire(settled.retired);
    bench.audit();
}

#[test]
fn merging_is_undone_if_a_page_changes_under_it() {
    let mut bench = Bench::new(40, 8);
    bench.map(0, &leaf(0x4000, BLOCK, RW), &mut ()).unwrap();
    let mut reserve = bench.reserve(1);
    bench.table.split(&bench.machine, VMID, Gfn::new(0), &mut reserve).unwrap();
    bench.give_back(reserve);
    for odd in [0, 1, 511] {
        let whole = bench.leaves();
        bench.table.protect(&bench.machine, VMID, gfns(odd, 1), Permissions::WRITE, Straddle::Whole);
        let narrow = bench.leaves();
        assert_ne!(narrow, whole);
        assert_eq!(bench.table.merge(&bench.machine, VMID, Gfn::new(9), BLOCK).unwrap_err(), MergeError::NotUniform);
        assert_eq!(bench.leaves(), narrow);
        bench.table.relax(&bench.machine, VMID, Gfn::new(odd), Pfn::new(0x4000 + odd), RW, &mut ()).unwrap();
        bench.audit();
    }
    let retired = bench.table.merge(&bench.machine, VMID, Gfn::new(9), BLOCK).unwrap();
    bench.retire(retired);
    assert_eq!(bench.leaves(), [(Gfn::new(0), leaf(0x4000, BLOCK, RW))]);
    bench.audit();
}

#[test]
fn a_present_leaf_is_reported_and_relaxed() {
    let mut bench = Bench::new(40, 8);
    let narrow = leaf(0x1000, SMALL, Permissions::READ);
    bench.map(0, &narrow, &mut ()).unwrap();
    let wide = Leaf { permissions: RW, ..narrow };
    assert_eq!(bench.map(0, &wide, &mut ()), Err(MapError::Present(narrow)));
    assert_eq!(bench.map(0, &narrow, &mut ()), Err(MapError::Present(narrow)));
    bench.audit();
    let (table, machine) = (&bench.table, &bench.machine);
    let order = RefCell::new(Vec::new());
    let mut work = Prepare(|| order.borrow_mut().push(table.walk(machine, Gfn::new(0)).unwrap().entry));
    assert_eq!(table.relax(machine, VMID, Gfn::new(0), Pfn::new(0x1000), Permissions::WRITE, &mut work), Ok(wide));
    assert_eq!(*order.borrow(), [Entry::Leaf(narrow)], "the work comes before the wider entry");
    assert_eq!(table.relax(machine, VMID, Gfn::new(1), Pfn::new(0), RW, &mut ()), Err(RelaxError::Gone));
    // Other memory type: not the same leaf, so broken and made.
    let device = Leaf { memory: Memory::Device, ..wide };
    bench.map(0, &device, &mut ()).unwrap();
    assert_eq!(bench.leaves(), [(Gfn::new(0), device)]);
    bench.audit();
}

#[test]
fn a_block_that_serves_is_not_split() {
    let mut bench = Bench::new(40, 8);
    let block = leaf(0x4000, BLOCK, RW);
    bench.map(0, &block, &mut ()).unwrap();
    assert_eq!(bench.map(5, &leaf(0x4005, SMALL, Permissions::READ), &mut ()), Err(MapError::Present(block)));
    assert_eq!(bench.leaves().len(), 1);
    // More than the block gives: split, and the page is there to be relaxed.
    let page = leaf(0x4005, SMALL, Permissions::ALL);
    assert_eq!(bench.map(5, &page, &mut ()), Err(MapError::Present(Leaf { permissions: RW, ..page })));
    assert_eq!(bench.leaves().len(), 512);
    bench.audit();
}

#[test]
fn protecting_flushes_what_another_cpu_narrowed() {
    let mut bench = Bench::new(40, 8);
    bench.map(0, &leaf(0x4000, BLOCK, RW), &mut ()).unwrap();
    let (table, machine) = (&bench.table, &bench.machine);
    machine.events();
    let protect = |range, straddle| table.protect(machine, VMID, range, Permissions::WRITE, straddle);
    assert_eq!(protect(gfns(1, 3), Straddle::Skip), 0);
    assert!(machine.events().is_empty(), "a block that is left alone needs no flush");
    for changed in [1, 0] {
        assert_eq!(protect(gfns(1, 3), Straddle::Whole), changed);
        let events = machine.events();
        let block = TlbOp::Range { vmid: VMID, range: gfns(0, 512) };
        assert!(events.ends_with(&[Event::Tlb(block), Event::Complete]), "{events:?}");
    }
}

/// The word of an unmap in progress is invalid, but a TLB may still hold the entry as writable.
#[test]
fn protecting_flushes_what_an_unmap_removed() {
    let mut bench = Bench::new(40, 8);
    bench.map(0, &leaf(0x1000, SMALL, RW), &mut ()).unwrap();
    let (table, machine) = (&bench.table, &bench.machine);
    let debt = table.unmap(machine, VMID, gfns(0, 1), &mut ());
    let flush = [Event::Tlb(TlbOp::Range { vmid: VMID, range: gfns(0, 1) }), Event::Complete];
    machine.events();
    assert_eq!(table.protect(machine, VMID, gfns(0, 4), Permissions::WRITE, Straddle::Whole), 0);
    assert_eq!(machine.events(), flush);
    assert_eq!(table.protect_frames(machine, VMID, (0..4).map(Gfn::new)), 0);
    assert_eq!(machine.events(), flush);
    assert!(debt.settle(machine, VMID).retired.is_empty());
}

#[test]
fn frames_are_protected_one_by_one() {
    let mut bench = Bench::new(40, 8);
    for gfn in [0, 1, 2, 700] {
        bench.map(gfn, &leaf(0x1000 + gfn, SMALL, RW), &mut ()).unwrap();
    }
    bench.map(1024, &leaf(0x4000, BLOCK, RW), &mut ()).unwrap();
    let (table, machine) = (&bench.table, &bench.machine);
    machine.events();
    let frames = [0, 2, 3, 700, 1100, 1101, 1 << 28].map(Gfn::new);
    assert_eq!(table.protect_frames(machine, VMID, frames.into_iter()), 4);
    let range = gfns(0, 1024 + 512);
    assert!(machine.events().ends_with(&[Event::Tlb(TlbOp::Range { vmid: VMID, range }), Event::Complete]));
    let writable: Vec<_> = bench.leaves().iter().map(|(gfn, leaf)| (gfn.get(), leaf.permissions.write)).collect();
    assert_eq!(writable, [(0, false), (1, true), (2, false), (700, false), (1024, false)]);
    assert_eq!(bench.table.protect_frames(&bench.machine, VMID, [Gfn::new(9)].into_iter()), 0);
    assert!(bench.machine.events().is_empty(), "nothing was there");
}

/// The VMID is asked for after the entry is gone, each time anew.
#[test]
fn the_vmid_is_read_late() {
    let mut bench = Bench::new(40, 8);
    bench.map(0, &leaf(0x1000, SMALL, RW), &mut ()).unwrap();
    let (table, machine) = (&bench.table, &bench.machine);
    let vmid = || {
        assert_eq!(table.walk(machine, Gfn::new(0)).unwrap().entry, Entry::Broken);
        Vmid::new(0x55)
    };
    machine.events();
    let settled = table.unmap(machine, vmid, gfns(0, 1), &mut ()).settle(machine, vmid);
    assert_eq!(settled.gone.frames(), 1);
    let op = TlbOp::Ipa { vmid: Vmid::new(0x55), gfn: Gfn::new(0), size: SMALL, leaf_only: true };
    assert!(machine.events().contains(&Event::Tlb(op)));
}

#[test]
fn what_was_removed_is_heard_of() {
    let mut bench = Bench::new(40, 8);
    for gfn in [0, 511] {
        bench.map(gfn, &leaf(0x1000 + gfn, SMALL, RW), &mut ()).unwrap();
    }
    let mut gone = Gone::default();
    bench.map(0, &leaf(0x4000, BLOCK, RW), &mut gone).unwrap();
    let pages = [(0, 0x1000), (511, 0x11ff)].map(|(gfn, pfn)| (Gfn::new(gfn), leaf(pfn, SMALL, RW)));
    assert_eq!(gone.0, pages);
    let mut gone = Gone::default();
    bench.map(0, &leaf(0x6000, BLOCK, RW), &mut gone).unwrap();
    assert_eq!(gone.0, [(Gfn::new(0), leaf(0x4000, BLOCK, RW))]);
    bench.audit();
}

mod canary {
    //! The checker sees what it is there for.

    use super::*;

    fn replaced(between: &[Event]) {
        let mut bench = Bench::new(34, 8);
        let word = bench.table.walk(&bench.machine, Gfn::new(0)).unwrap().word;
        let [old, new] = [0x4000, 0x6000].map(|pfn| Plain.leaf(&leaf(pfn, BLOCK, RW)));
        let events = [&[Event::Word(word, old)], between, &[Event::Word(word, new)]].concat();
        bench.tlb.replay(events);
    }

    fn broken() -> Event {
        let bench = Bench::new(34, 8);
        Event::Word(bench.table.walk(&bench.machine, Gfn::new(0)).unwrap().word, Plain::BROKEN)
    }

    fn flush() -> Event {
        Event::Tlb(TlbOp::Ipa { vmid: VMID, gfn: Gfn::new(0), size: BLOCK, leaf_only: true })
    }

    #[test]
    fn break_flush_complete_make_passes() {
        replaced(&[broken(), flush(), Event::Complete]);
    }

    #[test]
    #[should_panic(expected = "INV-2")]
    fn no_break() {
        replaced(&[]);
    }

    #[test]
    #[should_panic(expected = "INV-2")]
    fn no_flush() {
        replaced(&[broken(), Event::Complete]);
    }

    #[test]
    #[should_panic(expected = "INV-2")]
    fn no_completion() {
        replaced(&[broken(), flush()]);
    }

    #[test]
    #[should_panic(expected = "INV-2")]
    fn flush_before_break() {
        replaced(&[flush(), broken(), Event::Complete]);
    }
}
