//! Frames that are kept are behind their pages as long as they are said to be.

use std::vec::Vec;

use entresol_addr::{Gfn, GfnRange, Gpa, Pfn};
use entresol_backing::{ObjectHandle, Policy};
use entresol_slot::{Hint, SlotFlags};
use proptest::prelude::*;

use crate::Kept;
use crate::fork_tests::{FRAMES, end, gpa, load, store, with_memory};
use crate::tests::{CPU, RAM, TestVm, host, slot};

/// What one vCPU keeps.
struct Keeper {
    kept: Kept,
    frames: Vec<(Gpa, Pfn)>,
}

impl Keeper {
    fn new(vm: &TestVm<'_>, pages: impl Iterator<Item = u64>) -> Self {
        let (pin, hint, kept) = (vm.host().epoch.pin(CPU), Hint::new(), vm.keep());
        let frames = pages.map(|page| Gpa::new(gpa(page)));
        Self { kept, frames: frames.filter_map(|at| Some((at, vm.frame_to_keep(&pin, &hint, at)?))).collect() }
    }

    fn is_kept(&self, vm: &TestVm<'_>) -> bool {
        vm.is_kept(&vm.host().epoch.pin(CPU), &self.kept)
    }

    /// Whether all of it is so.
    fn is_true(&self, vm: &TestVm<'_>) -> bool {
        let (pin, hint) = (vm.host().epoch.pin(CPU), Hint::new());
        self.frames.iter().all(|(at, frame)| vm.frame_behind(&pin, &hint, *at) == Some(*frame))
    }
}

#[test]
fn what_stays_is_kept() {
    let host = host(8 * 512);
    let (vm, _) = with_memory(&host, Policy::Pages);
    store(&vm, gpa(1), 1);
    let keeper = Keeper::new(&vm, 0..3);
    assert_eq!(keeper.frames.len(), 1, "what nobody has touched has no frame");
    store(&vm, gpa(2), 2);
    store(&vm, gpa(1), 3);
    assert_eq!(load(&vm, gpa(1)), 3);
    assert!(keeper.is_kept(&vm) && keeper.is_true(&vm), "faults and stores change no frame");
}

#[test]
fn what_is_announced_is_not_kept() {
    let host = host(8 * 512);
    let (vm, object) = with_memory(&host, Policy::Pages);
    store(&vm, gpa(1), 1);
    let page = GfnRange::single(Gfn::new(RAM >> 12).offset(1));
    let changes: [(&str, &dyn Fn()); 4] = [
        ("an invalidation", &|| {
            let invalidation = vm.invalidate_range_start(CPU, page).unwrap();
            assert!(!Keeper::new(&vm, 1..2).is_kept(&vm), "in the middle of an invalidation");
            vm.invalidate_range_end(invalidation);
        }),
        ("a slot's flags", &|| {
            vm.set_slot(CPU, &slot(0, RAM, FRAMES, object, SlotFlags::LOG_DIRTY)).unwrap();
        }),
        ("a page given back", &|| assert_eq!(vm.discard(CPU, &[page]).unwrap().frames, 1)),
        ("a bad frame", &|| {
            store(&vm, gpa(1), 1);
            let poisoned = vm.poison(CPU, Gpa::new(gpa(1))).unwrap();
            vm.withdraw(CPU, &poisoned);
            let _frame = poisoned.finish(vm.host());
        }),
    ];
    for (what, change) in changes {
        let keeper = Keeper::new(&vm, 0..3);
        assert!(keeper.is_kept(&vm), "before {what}");
        change();
        assert!(!keeper.is_kept(&vm), "after {what}");
    }
    assert!(Keeper::new(&vm, 1..2).frames.is_empty(), "a bad frame is not given");
}

#[test]
fn what_a_fork_shares_is_not_kept() {
    let host = host(8 * 512);
    let (vm, _) = with_memory(&host, Policy::Pages);
    store(&vm, gpa(1), 1);
    let keeper = Keeper::new(&vm, 0..3);
    let child = vm.fork(CPU).unwrap();
    assert!(!keeper.is_kept(&vm));
    for vm in [&vm, &child] {
        assert!(Keeper::new(vm, 0..3).frames.is_empty(), "a store gives it another frame, and tells nobody");
    }
    end(child);
    end(vm);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Keep,
    Store(u64),
    StoreChild(u64),
    Discard(u64),
    Zap(u64),
    Log(bool),
    Fork,
    EndChild,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Keep),
        4 => (0..6u64).prop_map(Step::Store),
        1 => (0..6u64).prop_map(Step::StoreChild),
        1 => (0..6u64).prop_map(Step::Discard),
        1 => (0..6u64).prop_map(Step::Zap),
        1 => any::<bool>().prop_map(Step::Log),
        1 => Just(Step::Fork),
        1 => Just(Step::EndChild),
    ]
}

fn page(number: u64) -> GfnRange {
    GfnRange::single(Gfn::new(RAM >> 12).offset(number))
}

fn set_log(vm: &TestVm<'_>, object: ObjectHandle, on: bool) {
    let flags = if on { SlotFlags::LOG_DIRTY } else { SlotFlags::empty() };
    vm.set_slot(CPU, &slot(0, RAM, FRAMES, object, flags)).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever its owner and its guest do, what is said to be kept is what a look-up finds.
    #[test]
    fn kept_frames_are_those_of_a_look_up(steps in proptest::collection::vec(step(), 1..40)) {
        let host = host(8 * 512);
        let (vm, object) = with_memory(&host, Policy::Pages);
        let (mut child, mut keepers) = (None, Vec::new());
        for step in steps {
            match step {
                Step::Keep => keepers.push(Keeper::new(&vm, 0..6)),
                Step::Store(number) => {
                    store(&vm, gpa(number), 1);
                }
                Step::StoreChild(number) => {
                    if let Some(child) = &child {
                        store(child, gpa(number), 2);
                    }
                }
                Step::Discard(number) => drop(vm.discard(CPU, &[page(number)]).unwrap()),
                Step::Zap(number) => vm.zap(CPU, page(number)).unwrap(),
                Step::Log(on) => set_log(&vm, object, on),
                Step::Fork if child.is_none() => child = Some(vm.fork(CPU).unwrap()),
                Step::Fork => {}
                Step::EndChild => {
                    if let Some(child) = child.take() {
                        end(child);
                    }
                }
            }
            for keeper in keepers.iter().filter(|keeper| keeper.is_kept(&vm)) {
                prop_assert!(keeper.is_true(&vm), "after {step:?}");
            }
        }
        if let Some(child) = child {
            end(child);
        }
        end(vm);
    }
}
