//! Machines that merge, on a flat machine: what comes together, what must not, what a guest reads, and that every frame
//! comes back.

use std::collections::BTreeMap;
use std::vec::Vec;

use entresol_addr::{Gpa, PAGE_SIZE, PageSize};
use entresol_backing::{ObjectHandle, Order, Policy, Spec};
use entresol_fault::{Access, Cause, Fault};
use entresol_machine::Features;
use entresol_machine::flat::FlatMachine;
use entresol_slot::{Hint, SlotFlags};
use proptest::prelude::*;

use super::index::{Index, Location};
use super::{BREAK_AT, Scan};
use crate::fork_tests::{FRAMES, access, end, gpa, leaf, load, settled, store, with_memory};
use crate::tests::{CPU, RAM, TestVm, coherent, fault, host, host_with, memory, slot, vm};
use crate::{Host, MergeRefusal, Outcome};

fn merging<'h>(host: &'h Host<FlatMachine>, policy: Policy) -> (TestVm<'h>, ObjectHandle) {
    let (vm, object) = with_memory(host, policy);
    vm.enable_merging(CPU).unwrap();
    (vm, object)
}

/// One round over all.
fn round(vms: &[&TestVm<'_>]) -> Scan {
    let mut sum = Scan::default();
    for vm in vms {
        loop {
            let step = vm.merge_scan(CPU, 64);
            sum.pages += step.pages;
            sum.offered += step.offered;
            sum.joined += step.joined;
            sum.vacated += step.vacated;
            sum.broken += step.broken;
            if step.round_over {
                break;
            }
        }
    }
    vms[0].host().merging.next_round();
    sum
}

/// So many rounds; what the last one did.
fn rounds(count: usize, vms: &[&TestVm<'_>]) -> Scan {
    (0..count).fold(Scan::default(), |_, _| round(vms))
}

fn used(host: &Host<FlatMachine>) -> u64 {
    settled(host) - host.merging.held_frames()
}

/// A page that becomes one with a stranger's is its own again before anything is written through a page-frame cache.
#[test]
fn a_cache_of_a_page_that_was_merged_writes_a_page_of_its_own() {
    let host = host(8192);
    let (one, _) = merging(&host, Policy::Pages);
    let (other, _) = merging(&host, Policy::Pages);
    one.make_caches(1).unwrap();
    for vm in [&one, &other] {
        store(vm, gpa(3), 7);
    }
    one.activate(CPU, 0, Gpa::new(gpa(3)), 8).unwrap();
    assert!(one.check(&host.epoch.pin(CPU), 0, 8).is_some());
    assert_eq!(rounds(2, &[&one, &other]).joined, 1);
    assert!(one.check(&host.epoch.pin(CPU), 0, 8).is_none(), "the page is shared");
    one.refresh(CPU, 0).unwrap();
    let pin = host.epoch.pin(CPU);
    one.write_piece(&one.check(&pin, 0, 1).unwrap(), &[9]);
    drop(pin);
    assert_eq!([load(&one, gpa(3)), load(&other, gpa(3))], [9, 7]);
    end(one);
    end(other);
}

#[test]
fn equal_pages_of_strangers_become_one_and_part_in_one_trap() {
    for features in [coherent(), Features { forced_write_back: false, ..coherent() }] {
        let host = host_with(8192, features);
        let (one, _) = merging(&host, Policy::Pages);
        let (other, _) = merging(&host, Policy::Pages);
        for frame in 0..100 {
            store(&one, gpa(frame), frame as u8 + 1);
            store(&other, gpa(600 + frame), frame as u8 + 1);
        }
        store(&other, gpa(0), 200);
        let before = used(&host);
        assert_eq!(round(&[&one, &other]).joined, 0, "nothing is known to stay as it is");
        let second = round(&[&one, &other]);
        assert_eq!((second.offered, second.joined, second.broken), (100, 100, 0));
        assert_eq!(before - used(&host), 100 + 2, "two tables have no entry any more");
        let third = round(&[&one, &other]);
        assert_eq!((third.offered, third.joined, third.pages), (0, 0, 1), "what is offered is not read again");
        assert_eq!(leaf(&other, gpa(600)), None, "the translation is gone");
        assert_eq!(store(&other, gpa(600), 77), 1, "one trap for a write");
        assert_eq!(other.stats.copied.get(), 1 + 101, "and for each first touch: the zero page gave way");
        assert_eq!([load(&one, gpa(0)), load(&other, gpa(600)), load(&other, gpa(601))], [1, 77, 2]);
        assert!(!leaf(&other, gpa(601)).unwrap().permissions.write);
        end(one);
        for frame in 1..100 {
            assert_eq!(load(&other, gpa(600 + frame)), frame as u8 + 1);
        }
        end(other);
        assert_eq!(settled(&host), 0);
    }
}

/// Private memory is neither compared nor joined, not even with itself, whatever the owner asks; other memory of the machine is.
#[test]
fn private_memory_is_not_merged() {
    let host = host(8 * 512);
    let vm = vm(&host);
    let spec = Spec::Private { frames: FRAMES, policy: Policy::Pages };
    let object = host.objects.create(&host.supply(CPU), spec).unwrap();
    vm.set_slot(CPU, &slot(0, RAM, FRAMES, object, SlotFlags::empty())).unwrap();
    let (other, _) = merging(&host, Policy::Pages);
    vm.enable_merging(CPU).unwrap();
    let at = |frame| Gpa::new(gpa(frame));
    for frame in 0..4 {
        vm.write(&host.epoch.pin(CPU), &Hint::new(), at(frame), &[7]).unwrap();
        store(&other, gpa(frame), 7);
    }
    assert_eq!(vm.merge_pages(CPU, at(1), &vm, at(0)), Err(MergeRefusal::NoPage { gpa: at(0) }));
    assert_eq!(vm.merge_pages(CPU, at(1), &other, at(0)), Err(MergeRefusal::Differs));
    assert_eq!(other.merge_pages(CPU, at(1), &vm, at(0)), Err(MergeRefusal::NoPage { gpa: at(0) }));
    let scanned = rounds(3, &[&vm]);
    assert_eq!((scanned.pages, scanned.offered, scanned.joined), (0, 0, 0));
    rounds(3, &[&vm, &other]);
    assert!(host.merging.held_frames() > 0, "other memory is merged");
    let mut found = [0];
    vm.read(&host.epoch.pin(CPU), &Hint::new(), at(1), &mut found).unwrap();
    assert_eq!((found, load(&other, gpa(1))), ([7], 7));
    end(vm);
    end(other);
}

#[test]
fn what_changes_from_round_to_round_is_left_alone() {
    let host = host(4096);
    let (one, _) = merging(&host, Policy::Pages);
    let (other, _) = merging(&host, Policy::Pages);
    for now in 1..8 {
        store(&one, gpa(0), now);
        store(&other, gpa(0), now);
        store(&one, gpa(1), 9);
        assert_eq!(round(&[&one, &other]), Scan { pages: 3, ..Scan::default() }, "round {now}");
    }
    end(one);
    end(other);
    assert_eq!(settled(&host), 0);
}

/// A write between the plan and the invalidation: the comparison sees it.
#[test]
fn a_sum_decides_nothing() {
    let host = host(4096);
    let (vm, object) = merging(&host, Policy::Pages);
    for frame in [0, 1] {
        store(&vm, gpa(frame), 5);
    }
    let frame = |frame| Gpa::new(gpa(frame));
    vm.merge_pages(CPU, frame(1), &vm, frame(0)).unwrap();
    store(&vm, gpa(1), 6);
    assert_eq!(vm.merge_pages(CPU, frame(1), &vm, frame(0)), Err(MergeRefusal::Differs));
    assert_eq!(vm.stats.merge_differed.get(), 1);
    assert_eq!(vm.merge_pages(CPU, frame(1), &vm, frame(7)), Err(MergeRefusal::NoPage { gpa: frame(7) }));
    let outside = Gpa::new(RAM - PAGE_SIZE);
    assert_eq!(vm.merge_pages(CPU, outside, &vm, frame(0)), Err(MergeRefusal::NoPage { gpa: outside }));
    // Shown by another machine too: whose translations are not known here.
    let stranger = crate::tests::vm(&host);
    stranger.set_slot(CPU, &slot(0, RAM, FRAMES, object, SlotFlags::empty())).unwrap();
    store(&vm, gpa(1), 5);
    assert_eq!(vm.merge_pages(CPU, frame(1), &vm, frame(0)), Err(MergeRefusal::Shown));
    (0..3).for_each(|_| assert_eq!((round(&[&vm]).joined, round(&[&vm]).offered), (0, 0)));
    stranger.destroy(CPU);
    end(vm);
    assert_eq!(settled(&host), 0);
}

#[test]
fn blocks_are_broken_where_it_pays_and_zeros_go_whole() {
    let host = host(16 * 512);
    let (one, object) = merging(&host, Policy::Blocks);
    let (other, _) = merging(&host, Policy::Blocks);
    let few = BREAK_AT as u64 / 2;
    for frame in 0..512u64 {
        // The first block has few pages in common, the second all.
        let differs = frame >= few;
        store(&one, gpa(frame), 1);
        store(&other, gpa(frame), 1);
        for (vm, byte) in [(&one, 3), (&other, 4)] {
            let common = (frame as u8, (frame >> 8) as u8 + 1);
            store(vm, gpa(frame) + 1, common.0);
            store(vm, gpa(frame) + 2, common.1);
            store(vm, gpa(512 + frame) + 1, common.0);
            store(vm, gpa(512 + frame) + 2, common.1 + 2);
            if differs {
                store(vm, gpa(frame) + 3, byte);
            }
        }
    }
    let size = |vm: &TestVm<'_>, frame| leaf(vm, gpa(frame)).map(|leaf| leaf.size);
    assert_eq!([size(&one, 0), size(&other, 512)], [Some(PageSize::Size2M); 2]);
    let before = used(&host);
    let rounds: Vec<_> = (0..4).map(|_| round(&[&one, &other])).collect();
    assert_eq!(
        rounds.iter().map(|round| (round.offered, round.joined, round.broken)).collect::<Vec<_>>(),
        [(0, 0, 0), (512, 512, 2), (0, 0, 0), (0, 0, 0)]
    );
    assert_eq!(before - used(&host), 512 - 2, "two nodes were made");
    assert_eq!([size(&one, 0), size(&one, 512)], [Some(PageSize::Size2M), None]);
    assert_eq!(load(&other, gpa(513) + 1), 1);
    // A guest that zeroes what it had.
    for frame in 0..512 {
        for byte in 0..4 {
            store(&one, gpa(frame) + byte, 0);
        }
        assert_eq!(size(&one, frame), Some(PageSize::Size2M));
    }
    let before = used(&host);
    assert_eq!([round(&[&one]).vacated, round(&[&one]).vacated], [0, 512]);
    assert_eq!(before - used(&host), 512);
    assert_eq!([load(&one, gpa(3)), load(&one, gpa(515) + 1)], [0, 3]);
    store(&one, gpa(3), 9);
    assert_eq!(size(&one, 3), Some(PageSize::Size2M), "a block again");
    host.objects.get(&host.epoch.pin(CPU), object).unwrap();
    end(other);
    end(one);
    assert_eq!(settled(&host), 0);
}

/// INV-4: merging is no write, and hides none; both places of an alias change together.
#[test]
fn logs_and_aliases_stay_true() {
    let host = host(4096);
    let (vm, object) = with_memory(&host, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, FRAMES, object, SlotFlags::LOG_DIRTY)).unwrap();
    vm.set_slot(CPU, &slot(1, RAM + FRAMES * PAGE_SIZE, FRAMES, object, SlotFlags::empty())).unwrap();
    vm.enable_merging(CPU).unwrap();
    for frame in [3, 5, 9] {
        store(&vm, gpa(frame), 1);
        assert_eq!(load(&vm, gpa(FRAMES + frame)), 1);
    }
    let mut words = [0; FRAMES as usize / 64];
    assert_eq!(vm.get_dirty_log(CPU, 0, &mut words).unwrap(), 3);
    rounds(2, &[&vm]);
    let third = round(&[&vm]);
    assert_eq!(vm.stats.merge_joined.get(), 2, "{third:?}");
    assert_eq!([leaf(&vm, gpa(5)), leaf(&vm, gpa(FRAMES + 5))], [None, None]);
    assert_eq!(vm.get_dirty_log(CPU, 0, &mut words).unwrap(), 0, "merging writes nothing");
    assert_eq!(load(&vm, gpa(FRAMES + 5)), 1);
    store(&vm, gpa(5), 2);
    assert_eq!([3, 5, 9].map(|frame| load(&vm, gpa(FRAMES + frame))), [1, 2, 1]);
    assert_eq!(vm.get_dirty_log(CPU, 0, &mut words).unwrap(), 1);
    end(vm);
    assert_eq!(settled(&host), 0);
}

#[test]
fn hints_go_before_a_guest_runs_out_of_memory() {
    let host = host(1200);
    let (vm, _) = merging(&host, Policy::Pages);
    for frame in 0..200 {
        store(&vm, gpa(frame), frame as u8 + 1);
    }
    round(&[&vm]);
    let held = host.merging.held_frames();
    assert!(held > 1, "{held}");
    let mut hoard = Vec::new();
    while let Ok(pfn) = host.pool.take(CPU, Order::PAGE) {
        hoard.push(pfn);
    }
    store(&vm, gpa(300), 7);
    assert_eq!(host.merging.held_frames(), 0);
    assert_eq!(round(&[&vm]).pages, 201, "without hints it still goes round");
    assert_eq!(host.merging.held_frames(), 0, "and takes none");
    hoard.into_iter().for_each(|pfn| host.pool.give(CPU, pfn, Order::PAGE));
    assert_eq!((load(&vm, gpa(5)), load(&vm, gpa(300))), (6, 7));
    end(vm);
    assert_eq!(settled(&host), 0);
}

/// A fault that meets a merge tries again, and the owner's writes are told to.
#[test]
fn relatives_and_strangers_merge_side_by_side() {
    let host = host(8192);
    let (parent, _) = merging(&host, Policy::Blocks);
    let (stranger, _) = merging(&host, Policy::Blocks);
    for frame in 0..300u64 {
        for vm in [&parent, &stranger] {
            store(vm, gpa(frame), frame as u8);
            store(vm, gpa(frame) + 1, 1 + (frame >> 8) as u8);
        }
    }
    rounds(2, &[&parent, &stranger]);
    assert_eq!(stranger.stats.merge_joined.get(), 300);
    let child = parent.fork(CPU).unwrap();
    child.enable_merging(CPU).unwrap();
    store(&child, gpa(3), 99);
    store(&stranger, gpa(3), 99);
    store(&parent, gpa(4), 98);
    rounds(4, &[&parent, &stranger, &child]);
    assert!(child.stats.merge_offered.get() + child.stats.merge_joined.get() > 0, "{:?}", child.stats);
    for (vm, third, fourth) in [(&parent, 3, 98), (&stranger, 99, 4), (&child, 99, 4)] {
        assert_eq!([3, 4, 5].map(|frame| load(vm, gpa(frame))), [third, fourth, 5]);
    }
    end(stranger);
    end(parent);
    assert_eq!(load(&child, gpa(3)), 99);
    end(child);
    assert_eq!(settled(&host), 0);
}

#[derive(Clone, Debug)]
enum Act {
    Store { at: usize, frame: u64, byte: u8 },
    Load { at: usize, frame: u64 },
    Write { at: usize, frame: u64, byte: u8 },
    Scan { at: usize, budget: u64 },
    Round,
    Fork { at: usize },
    Punch { at: usize, frame: u64, count: u64 },
    End { at: usize },
    Starve { spare: u64 },
}

fn any_act() -> impl Strategy<Value = Act> {
    let at = || 0usize..6;
    let frame = || prop_oneof![4 => 0u64..6, 2 => 508u64..516, 1 => 0..FRAMES];
    prop_oneof![
        8 => (at(), frame(), 0u8..3).prop_map(|(at, frame, byte)| Act::Store { at, frame, byte }),
        2 => (at(), frame()).prop_map(|(at, frame)| Act::Load { at, frame }),
        2 => (at(), frame(), 0u8..3).prop_map(|(at, frame, byte)| Act::Write { at, frame, byte }),
        6 => (at(), 0u64..600).prop_map(|(at, budget)| Act::Scan { at, budget }),
        4 => Just(Act::Round),
        1 => at().prop_map(|at| Act::Fork { at }),
        1 => (at(), frame(), 0u64..600).prop_map(|(at, frame, count)| Act::Punch { at, frame, count }),
        1 => at().prop_map(|at| Act::End { at }),
        1 => (0u64..40).prop_map(|spare| Act::Starve { spare }),
    ]
}

type Member<'h> = (TestVm<'h>, BTreeMap<u64, u8>);

/// A guest's store, if there is a frame for it.
fn try_store(vm: &TestVm<'_>, frame: u64, byte: u8) -> bool {
    let write = Fault { cause: Cause::Translation, ..fault(gpa(frame), Access::Write) };
    for _ in 0..20 {
        if leaf(vm, gpa(frame)).is_some_and(|leaf| leaf.permissions.write) {
            store(vm, gpa(frame), byte);
            return true;
        }
        let level = leaf(vm, gpa(frame)).map(|_| Cause::Permission { level: 3 });
        let cause = level.unwrap_or(Cause::Translation);
        match vm.handle(&vm.host().epoch.pin(CPU), &Hint::new(), &Fault { cause, ..write }) {
            Outcome::Resume | Outcome::Retry => {}
            Outcome::Exit(_) => return false,
            other => panic!("{other:?}"),
        }
    }
    panic!("no progress at frame {frame}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn guests_read_what_they_wrote_whatever_is_merged(
        policy in prop_oneof![Just(Policy::Pages), Just(Policy::Blocks)],
        acts in prop::collection::vec(any_act(), 1..80),
    ) {
        let host = host(10 * 512);
        let mut all: Vec<Member<'_>> = (0..2).map(|_| (merging(&host, policy).0, BTreeMap::new())).collect();
        let mut hoard = Vec::new();
        for act in acts {
            let count = all.len();
            match act {
                Act::Store { at, frame, byte } => {
                    let member = &mut all[at % count];
                    if try_store(&member.0, frame, byte) {
                        member.1.insert(frame, byte);
                    }
                }
                Act::Load { at, frame } if hoard.is_empty() => {
                    let member = &all[at % count];
                    prop_assert_eq!(load(&member.0, gpa(frame)), member.1.get(&frame).copied().unwrap_or(0));
                }
                Act::Write { at, frame, byte } => {
                    let member = &mut all[at % count];
                    let pin = host.epoch.pin(CPU);
                    if member.0.write(&pin, &Hint::new(), Gpa::new(gpa(frame)), &[byte]).is_ok() {
                        member.1.insert(frame, byte);
                    }
                }
                Act::Scan { at, budget } => {
                    let scan = all[at % count].0.merge_scan(CPU, budget);
                    prop_assert!(scan.joined + scan.offered + scan.vacated <= scan.looked);
                }
                Act::Round => {
                    round(&all.iter().map(|member| &member.0).collect::<Vec<_>>());
                }
                Act::Fork { at } if count < 5 => {
                    let parent = &all[at % count];
                    if let Ok(child) = parent.0.fork(CPU) {
                        // Without heap or room it merely does not take part.
                        let _ = child.enable_merging(CPU);
                        let bytes = parent.1.clone();
                        all.push((child, bytes));
                    }
                }
                Act::Punch { at, frame, count: pages } if frame + pages <= FRAMES => {
                    let member = &mut all[at % count];
                    let everything = member.0.everything();
                    let invalidation = member.0.invalidate_range_start(CPU, everything).unwrap();
                    let punched = {
                        let pin = host.epoch.pin(CPU);
                        let shown = member.0.slots().iter(&pin).next().unwrap().object.get();
                        let object = host.objects.get(&pin, ObjectHandle::from_raw(shown)).unwrap();
                        object.punch(&host.supply(CPU), frame, pages)
                    };
                    member.0.invalidate_range_end(invalidation);
                    if punched.is_ok() {
                        member.1.retain(|page, _| !(frame..frame + pages).contains(page));
                    }
                }
                Act::End { at } if count > 1 => end(all.swap_remove(at % count).0),
                Act::Load { .. } | Act::Fork { .. } | Act::Punch { .. } | Act::End { .. } => {}
                Act::Starve { spare } => {
                    settled(&host);
                    hoard.drain(..).for_each(|pfn| host.pool.give(CPU, pfn, Order::PAGE));
                    while spare >= 20 && host.pool.free_frames() > spare {
                        hoard.push(host.pool.take(CPU, Order::PAGE).unwrap());
                    }
                }
            }
        }
        hoard.drain(..).for_each(|pfn| host.pool.give(CPU, pfn, Order::PAGE));
        for (vm, bytes) in &all {
            for frame in (0..FRAMES).filter(|frame| frame % 37 == 0 || bytes.contains_key(frame)) {
                prop_assert_eq!(load(vm, gpa(frame)), bytes.get(&frame).copied().unwrap_or(0), "frame {}", frame);
            }
        }
        all.into_iter().for_each(|member| end(member.0));
        prop_assert_eq!(settled(&host), 0);
    }
}

/// An index that is half full has lost no entry, and one that is nearly full few: no sum is left out because others have its bucket.
#[test]
fn an_index_with_room_loses_nothing() {
    let host = host(4096);
    let (machine, mut index) = (&host.machine, Index::new());
    index.reserve(4096).unwrap();
    // A counter through an odd factor and back through shifts (Vigna's splitmix64): every sum is another.
    let sum = |number: u64| {
        let mut sum = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        sum = (sum ^ sum >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        sum = (sum ^ sum >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        sum ^ sum >> 31
    };
    let here = |frame| Location { object: ObjectHandle::from_raw(0x1_0001), frame };
    let found = |index: &Index, numbers: core::ops::Range<u64>| {
        let right =
            |number: &u64| index.find(machine, sum(*number)).is_some_and(|found| found.location == here(*number));
        numbers.filter(right).count()
    };
    for number in 1..=3584 {
        index.insert(&host.supply(CPU), sum(number), here(number));
        if number == 2048 {
            assert_eq!(found(&index, 1..2049), 2048, "half full");
        }
    }
    assert!(found(&index, 1..3585) >= 3584 - 64, "seven eighths full: {}", found(&index, 1..3585));
    assert_eq!(index.frames(), 16);
    // What nobody found true for a round and another is none, and gives its place.
    (0..2).for_each(|_| index.next_round());
    assert_eq!(found(&index, 1..3585), 0);
    (5000..7048).for_each(|number| index.insert(&host.supply(CPU), sum(number), here(number)));
    assert_eq!(found(&index, 5000..7048), 2048);
    index.clear(&mut |pfn| host.pool.give(CPU, pfn, Order::PAGE));
    assert_eq!(settled(&host), 0);
}

/// Machines without memory, or with devices only, take part in nothing.
#[test]
fn nothing_to_merge_is_a_round_of_its_own() {
    let host = host(256);
    let empty = vm(&host);
    empty.enable_merging(CPU).unwrap();
    assert_eq!(empty.merge_scan(CPU, 0), Scan { round_over: true, ..Scan::default() });
    let object = memory(&host, 16, Policy::Pages);
    empty.set_slot(CPU, &slot(0, RAM, 16, object, SlotFlags::empty())).unwrap();
    assert_eq!(access(&empty, RAM, Access::Write).0, 1);
    assert_eq!(empty.merge_scan(CPU, 100).pages, 0, "shown after it began");
    empty.enable_merging(CPU).unwrap();
    assert_eq!(empty.merge_scan(CPU, 100).pages, 1);
    end(empty);
    assert_eq!((host.merging.held_frames(), settled(&host)), (0, 0));
}
