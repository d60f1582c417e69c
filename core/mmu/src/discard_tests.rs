//! Memory given back on a flat machine: what is gone, what stays, what is refused, and that no frame is lost.

use std::vec::Vec;

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SIZE, PageSize, Pfn};
use entresol_backing::{ObjectHandle, Order, Policy, Spec};
use entresol_fault::Access;
use entresol_machine::flat::FlatMachine;
use entresol_slot::{Hint, ObjectId, SlotFlags, SlotRequest};
use proptest::prelude::*;

use crate::tests::{CPU, RAM, TestVm, host, memory, slot, touch, vm};
use crate::{Busy, Discarded, Host, Outcome};

/// Frames of the memory of the machines here.
const FRAMES: u64 = 2048;
/// Where the memory is shown a second time.
const ALIAS: u64 = 2 * RAM;

fn range(base: u64, frame: u64, count: u64) -> GfnRange {
    GfnRange::new(Gfn::new(base / PAGE_SIZE + frame), count).unwrap()
}

fn with_memory<'h>(host: &'h Host<FlatMachine>, policy: Policy, flags: SlotFlags) -> (TestVm<'h>, ObjectHandle) {
    let vm = vm(host);
    let object = memory(host, FRAMES, policy);
    vm.set_slot(CPU, &slot(0, RAM, FRAMES, object, flags)).unwrap();
    (vm, object)
}

fn store(vm: &TestVm<'_>, frame: u64, byte: u8) {
    while touch(vm, RAM + frame * PAGE_SIZE, Access::Write) != Outcome::Resume {}
    vm.write(&vm.host().epoch.pin(CPU), &Hint::new(), Gpa::new(RAM + frame * PAGE_SIZE), &[byte]).unwrap();
}

fn load(vm: &TestVm<'_>, frame: u64) -> u8 {
    let mut byte = [0xee];
    vm.read(&vm.host().epoch.pin(CPU), &Hint::new(), Gpa::new(RAM + frame * PAGE_SIZE), &mut byte).unwrap();
    byte[0]
}

fn resident(host: &Host<FlatMachine>, object: ObjectHandle) -> u64 {
    host.objects.get(&host.epoch.pin(CPU), object).unwrap().resident_frames()
}

/// The frame behind an address, if an entry shows one.
fn shown(vm: &TestVm<'_>, base: u64, frame: u64) -> Option<Pfn> {
    let gfn = Gfn::new(base / PAGE_SIZE + frame);
    match vm.table().walk(&vm.host().machine, gfn).unwrap().entry {
        entresol_table::Entry::Leaf(leaf) => Some(leaf.frame_of(gfn)),
        _ => None,
    }
}

/// Frames in use when everything is settled.
fn settled(host: &Host<FlatMachine>) -> u64 {
    while host.supply(CPU).reclaim(64) + host.pool.reap(&host.epoch, CPU, usize::MAX) as usize != 0 {}
    host.pool.total_frames() - host.pool.free_frames()
}

#[test]
fn what_was_given_back_is_free_and_reads_as_zero() {
    let host = host(8192);
    let (vm, object) = with_memory(&host, Policy::Pages, SlotFlags::empty());
    (0..8).for_each(|frame| store(&vm, frame, frame as u8 + 1));
    let before = settled(&host);
    let given = vm.discard(CPU, &[range(RAM, 6, 4), range(RAM, 1, 2)]).unwrap();
    assert_eq!(given, Discarded { frames: 4, ..Discarded::default() });
    assert_eq!((resident(&host, object), vm.stats.discarded.get()), (4, 4));
    assert_eq!(settled(&host), before - 4, "the batch itself gives them to the pool");
    assert_eq!([1, 2, 6, 7].map(|frame| shown(&vm, RAM, frame)), [None; 4]);
    assert_eq!([0, 1, 2, 3, 6, 7].map(|frame| load(&vm, frame)), [1, 0, 0, 4, 0, 0]);
    store(&vm, 2, 9);
    assert_eq!((load(&vm, 2), resident(&host, object)), (9, 5));
    assert!(!vm.notifier.is_active());
}

#[test]
fn a_whole_block_goes_as_one_and_a_single_page_splits_it() {
    let host = host(8192);
    let (vm, object) = with_memory(&host, Policy::Blocks, SlotFlags::empty());
    for frame in [0, 512, 1024] {
        store(&vm, frame, 7);
        store(&vm, frame + 300, 8);
    }
    assert_eq!((resident(&host, object), vm.census().of(PageSize::Size2M)), (1536, 3));
    assert_eq!(vm.discard(CPU, &[range(RAM, 0, 512)]).unwrap().frames, 512);
    assert!(host.pool.take_at_hand(Order::BLOCK).is_some());
    assert_eq!(vm.discard(CPU, &[range(RAM, 512 + 300, 1)]).unwrap().frames, 1);
    assert_eq!((resident(&host, object), vm.census().of(PageSize::Size2M)), (1023, 1));
    assert_eq!([0, 300, 512, 812, 1024, 1324].map(|frame| load(&vm, frame)), [0, 0, 7, 0, 7, 8]);
    assert_eq!(shown(&vm, RAM, 512), None, "the block's entry went as a whole");
    store(&vm, 512, 9);
    assert_eq!((load(&vm, 512), load(&vm, 813)), (9, 0));
}

#[test]
fn every_place_that_shows_the_page_forgets_it() {
    let host = host(8192);
    let (vm, object) = with_memory(&host, Policy::Pages, SlotFlags::empty());
    let alias = SlotRequest { offset: 4 * PAGE_SIZE, ..slot(1, ALIAS, 16, object, SlotFlags::empty()) };
    vm.set_slot(CPU, &alias).unwrap();
    for frame in 0..8 {
        store(&vm, frame, 1);
        assert_eq!(touch(&vm, ALIAS + frame * PAGE_SIZE, Access::Read), Outcome::Resume);
    }
    assert_eq!(shown(&vm, ALIAS, 1), shown(&vm, RAM, 5));
    assert_eq!(vm.discard(CPU, &[range(RAM, 5, 1)]).unwrap().frames, 1);
    assert_eq!((shown(&vm, ALIAS, 1), shown(&vm, RAM, 5)), (None, None));
    assert!(shown(&vm, ALIAS, 0).is_some() && shown(&vm, RAM, 4).is_some(), "neighbours stay");
    assert_eq!(vm.discard(CPU, &[range(ALIAS, 2, 1)]).unwrap().frames, 1);
    assert_eq!((load(&vm, 6), shown(&vm, RAM, 6)), (0, None), "through the alias, too");
}

#[test]
fn what_is_not_the_guests_to_give_is_refused_page_by_page() {
    let host = host(8192);
    let (vm, object) = with_memory(&host, Policy::Pages, SlotFlags::empty());
    let device = host.objects.create(&host.supply(CPU), Spec::Device { first: Pfn::new(0x9000), frames: 4 }).unwrap();
    vm.set_slot(CPU, &slot(1, ALIAS, 4, object, SlotFlags::READ_ONLY)).unwrap();
    vm.set_slot(CPU, &slot(2, ALIAS + 4 * PAGE_SIZE, 4, device, SlotFlags::empty())).unwrap();
    (0..4).for_each(|frame| store(&vm, frame, 5));
    let before = settled(&host);
    let refused = |ranges: &[GfnRange]| {
        let given = vm.discard(CPU, ranges).unwrap();
        assert_eq!((given.frames, given.kept), (0, 0));
        given.refused
    };
    assert_eq!(refused(&[range(ALIAS, 0, 4)]), 4, "read-only");
    assert_eq!(refused(&[range(ALIAS, 4, 4)]), 4, "a device");
    assert_eq!(refused(&[range(0, 0, 3), range(!0xfff, 0, 0), range(1 << 52, 0, 2)]), 5, "nothing");
    assert_eq!(refused(&[]), 0);
    let over = vm.discard(CPU, &[range(RAM, FRAMES - 1, 3)]).unwrap();
    assert_eq!(over, Discarded { refused: 2, ..Discarded::default() }, "over the end of a slot");
    host.objects.hold(object).unwrap();
    assert_eq!(refused(&[range(RAM, 0, 4)]), 4, "somebody else may show it");
    host.objects.release(object).unwrap();
    assert_eq!((settled(&host), load(&vm, 3)), (before, 5));
    let twice = vm.discard(CPU, &[range(RAM, 0, 4), range(RAM, 2, 2), range(ALIAS, 0, 1)]).unwrap();
    assert_eq!(twice, Discarded { frames: 4, refused: 1, kept: 0 });
}

#[test]
fn relatives_keep_what_they_share() {
    for policy in [Policy::Pages, Policy::Blocks] {
        let host = host(8192);
        let before = settled(&host);
        let (parent, object) = with_memory(&host, policy, SlotFlags::empty());
        [0, 1, 2, 600].iter().for_each(|frame| store(&parent, *frame, 3));
        let child = parent.fork(CPU).unwrap();
        assert_eq!(load(&child, 1), 3);
        assert!(child.discard(CPU, &[range(RAM, 1, 1), range(RAM, 512, 512)]).unwrap().frames > 0);
        assert_eq!([0, 1, 2, 600].map(|frame| load(&child, frame)), [3, 0, 3, 0]);
        assert_eq!([0, 1, 2, 600].map(|frame| load(&parent, frame)), [3; 4]);
        parent.discard(CPU, &[range(RAM, 2, 1)]).unwrap();
        assert_eq!((load(&parent, 2), load(&child, 2)), (0, 3));
        store(&child, 1, 4);
        assert_eq!((load(&parent, 1), load(&child, 1)), (3, 4));
        let its = {
            let pin = host.epoch.pin(CPU);
            ObjectHandle::from_raw(child.slots().find(&pin, Gpa::new(RAM).frame(), &Hint::new()).unwrap().object.get())
        };
        {
            let pin = host.epoch.pin(CPU);
            let (mine, base) = (host.objects.get(&pin, its).unwrap(), host.objects.get(&pin, object).unwrap());
            let differs = |frame| {
                mine.differences(&host.supply(CPU), base, 0)
                    .unwrap()
                    .any(|(start, count)| (start..start + count).contains(&frame))
            };
            assert!([1, 2, 600].into_iter().all(differs), "a page given back is a difference");
        }
        for (vm, object) in [(child, its), (parent, object)] {
            vm.destroy(CPU);
            host.objects.destroy(&host.supply(CPU), &host.epoch, object).unwrap();
        }
        // The zero page stays the pool's own.
        assert!(settled(&host) <= before + 1, "{} frames, {before} before", settled(&host));
    }
}

#[test]
fn a_page_given_back_is_dirty_if_there_was_one() {
    let host = host(8192);
    let (vm, object) = with_memory(&host, Policy::Pages, SlotFlags::LOG_DIRTY);
    vm.set_slot(CPU, &slot(1, ALIAS, 4, object, SlotFlags::LOG_DIRTY)).unwrap();
    (0..3).for_each(|frame| store(&vm, frame, 1));
    let mut words = [0; FRAMES as usize / 64];
    assert_eq!(vm.get_dirty_log(CPU, 0, &mut words).unwrap(), 3);
    assert_eq!(vm.discard(CPU, &[range(RAM, 1, 5)]).unwrap().frames, 2);
    assert_eq!(vm.get_dirty_log(CPU, 0, &mut words).unwrap(), 2);
    assert_eq!(words[0], 0b110, "pages 3 to 5 read as they did before");
    assert_eq!(vm.get_dirty_log(CPU, 1, &mut words[..1]).unwrap(), 2, "in every slot that shows it");
}

#[test]
fn a_block_that_cannot_be_split_stays() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 512, Policy::Blocks);
    vm.set_slot(CPU, &slot(0, RAM, 512, object, SlotFlags::empty())).unwrap();
    store(&vm, 7, 7);
    let mut hoard = Vec::new();
    while let Ok(frame) = host.pool.take(CPU, Order::PAGE) {
        hoard.push(frame);
    }
    let given = vm.discard(CPU, &[range(RAM, 0, 2), range(RAM, 7, 1)]).unwrap();
    assert_eq!(given, Discarded { frames: 0, refused: 0, kept: 3 });
    assert_eq!((load(&vm, 7), resident(&host, object)), (7, 512));
    host.pool.give(CPU, hoard.pop().unwrap(), Order::PAGE);
    let given = vm.discard(CPU, &[range(RAM, 7, 1)]).unwrap();
    assert_eq!(given, Discarded { frames: 1, refused: 0, kept: 0 });
    assert_eq!((load(&vm, 7), resident(&host, object)), (0, 511));
}

#[test]
fn too_many_changes_at_once_are_tried_again() {
    let host = host(8192);
    let (vm, _) = with_memory(&host, Policy::Pages, SlotFlags::empty());
    store(&vm, 1, 1);
    let elsewhere = range(1 << 36, 0, 1);
    let others: Vec<_> = std::iter::from_fn(|| vm.invalidate_range_start(CPU, elsewhere).ok()).take(1000).collect();
    assert_eq!(vm.discard(CPU, &[range(RAM, 1, 1)]), Err(Busy));
    assert_eq!(load(&vm, 1), 1);
    others.into_iter().for_each(|other| vm.invalidate_range_end(other));
    assert_eq!(vm.discard(CPU, &[range(RAM, 1, 1)]).unwrap().frames, 1);
}

#[derive(Clone, Debug)]
enum Step {
    Store(u64, u8),
    Discard(Vec<(u64, u64)>),
}

fn step() -> impl Strategy<Value = Step> {
    let frame = || prop_oneof![0u64..24, 500u64..530, 0u64..1100];
    let piece = (frame(), prop_oneof![3 => 1u64..6, 1 => Just(512u64), 1 => 0u64..700]);
    prop_oneof![
        3 => (frame(), 1u8..).prop_map(|(frame, byte)| Step::Store(frame, byte)),
        2 => prop::collection::vec(piece, 0..5).prop_map(Step::Discard),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever is stored and given back in whatever order: what is read is what a plain array has, and in the end every
    /// frame is back.
    #[test]
    fn memory_reads_as_a_plain_array(steps in prop::collection::vec(step(), 1..24), blocks in any::<bool>()) {
        let host = host(8192);
        let before = settled(&host);
        let policy = if blocks { Policy::Blocks } else { Policy::Pages };
        let vm = vm(&host);
        let object = memory(&host, 1024, policy);
        vm.set_slot(CPU, &slot(0, RAM, 1024, object, SlotFlags::empty())).unwrap();
        let alias = SlotRequest { object: ObjectId::new(object.raw()), ..slot(1, ALIAS, 64, object, SlotFlags::empty()) };
        vm.set_slot(CPU, &alias).unwrap();
        let mut naive = [0u8; 1024];
        for step in steps {
            match step {
                Step::Store(frame, byte) if frame < 1024 => {
                    store(&vm, frame, byte);
                    naive[frame as usize] = byte;
                }
                Step::Store(..) => {}
                Step::Discard(pieces) => {
                    let ranges: Vec<_> = pieces.iter().map(|(frame, count)| range(RAM, *frame, *count)).collect();
                    let outside = pieces.iter().map(|(frame, count)| (frame + count).saturating_sub(1024.max(*frame)));
                    let given = vm.discard(CPU, &ranges).unwrap();
                    prop_assert_eq!((given.refused, given.kept), (outside.sum::<u64>(), 0));
                    for (frame, count) in pieces {
                        (frame..(frame + count).min(1024)).for_each(|frame| naive[frame as usize] = 0);
                    }
                }
            }
            for (frame, byte) in naive.iter().enumerate() {
                prop_assert_eq!(load(&vm, frame as u64), *byte, "frame {}", frame);
            }
        }
        vm.discard(CPU, &[range(RAM, 0, 1024)]).unwrap();
        prop_assert_eq!(resident(&host, object), 0);
        vm.destroy(CPU);
        host.objects.destroy(&host.supply(CPU), &host.epoch, object).unwrap();
        prop_assert_eq!(settled(&host), before);
    }
}
