//! Three ways to know what was written: log, rings and a mark name the same pages, those that a naive list has.

use std::collections::BTreeSet;

use entresol_addr::Gpa;
use entresol_backing::Policy;
use entresol_slot::SlotFlags;
use proptest::prelude::*;

use super::*;
use crate::tests::{CPU, TestVm, host, memory, slot, touch, vm};

const COUNT: u64 = 1024;

/// What happens to the memory between two looks.
#[derive(Clone, Debug)]
enum Step {
    Store {
        vcpu: u32,
        page: u64,
    },
    Read {
        page: u64,
    },
    /// Across the border of two pages, by a device that no vCPU made act.
    Device {
        page: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let page = prop_oneof![0..COUNT - 1, 500..530u64];
    prop_oneof![
        6 => (0u32..2, page.clone()).prop_map(|(vcpu, page)| Step::Store { vcpu, page }),
        2 => page.clone().prop_map(|page| Step::Read { page }),
        1 => page.prop_map(|page| Step::Device { page }),
    ]
}

fn run(vm: &TestVm<'_>, step: &Step) -> Vec<u64> {
    match *step {
        Step::Store { vcpu, page } => {
            while vm.enter(CPU, vcpu).is_err() {
                // Its pages are harvested later: the log has them, too.
                vm.disable_dirty_rings();
                vm.enable_dirty_rings(2, 128).unwrap();
            }
            store(vm, CPU, page);
            vm.leave(CPU);
            std::vec![page]
        }
        Step::Read { page } => {
            assert_eq!(touch(vm, RAM + page * PAGE_SIZE, entresol_fault::Access::Read), Outcome::Resume);
            Vec::new()
        }
        Step::Device { page } => {
            let gpa = Gpa::new(RAM + (page + 1) * PAGE_SIZE - 2);
            vm.write(&vm.host().epoch.pin(CPU), &Hint::new(), gpa, b"dma!").unwrap();
            std::vec![page, page + 1]
        }
    }
}

/// Stores to the first `count` pages.
fn store_each(vm: &TestVm<'_>, count: u64) {
    for page in 0..count {
        store(vm, CPU, page);
    }
}

/// What the rings name, and then what is left in the log.
fn harvest(vm: &TestVm<'_>) -> (BTreeSet<u64>, BTreeSet<u64>) {
    let mut named = BTreeSet::new();
    for ring in (0..2).filter_map(|vcpu| vm.dirty_ring(vcpu)) {
        ring.harvest(|_, page| {
            named.insert(page);
        });
    }
    vm.reset_dirty_rings(CPU);
    let mut words = [0; COUNT as usize / 64];
    vm.get_dirty_log(CPU, 0, &mut words).unwrap();
    (named, pages(&words).into_iter().collect())
}

fn written_since(vm: &TestVm<'_>, mark: &crate::Mark) -> BTreeSet<u64> {
    let pin = vm.host().epoch.pin(CPU);
    let slot = vm.slots().get(&pin, 0).unwrap();
    let parts = vm.written_since(&pin, mark, &slot, 0).unwrap();
    parts.flat_map(|(first, count)| first..first + count).collect()
}

proptest! {
    #[test]
    fn log_rings_and_mark_name_what_was_written(
        policy in prop::sample::select(&[Policy::Pages, Policy::Blocks][..]),
        rounds in prop::collection::vec(prop::collection::vec(step(), 0..150), 1..4),
    ) {
        let host = host(8192);
        let vm = vm(&host);
        let object = memory(&host, COUNT, policy);
        let set = |flags| vm.set_slot(CPU, &slot(0, RAM, COUNT, object, flags)).unwrap();
        set(SlotFlags::empty());
        // A block that is made by the first touch of one of its pages would be a difference as a whole.
        store_each(&vm, COUNT);
        set(SlotFlags::LOG_DIRTY);
        for (number, steps) in rounds.iter().enumerate() {
            vm.enable_dirty_rings(2, 128).unwrap();
            let mark = vm.mark(CPU).unwrap();
            let written: BTreeSet<u64> = steps.iter().flat_map(|step| run(&vm, step)).collect();
            check_writable(&vm, CPU, COUNT);
            let since = written_since(&vm, &mark);
            let (rings, left) = harvest(&vm);
            let all: BTreeSet<u64> = rings.union(&left).copied().collect();
            prop_assert_eq!(&since, &written, "mark, round {}", number);
            prop_assert_eq!(&all, &written, "rings and log, round {}", number);
            mark.give_back(&host, CPU);
            vm.disable_dirty_rings();
        }
        vm.destroy(CPU);
        host.objects.destroy(&host.supply(CPU), &host.epoch, object).unwrap();
        host.pool.reap(&host.epoch, CPU, usize::MAX);
    }
}

/// A mark whose objects are given back leaves no frame behind, whatever was copied meanwhile.
#[test]
fn a_mark_gives_everything_back() {
    let host = host(4096);
    let free = host.pool.free_frames();
    let vm = vm(&host);
    let object = memory(&host, COUNT, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, COUNT, object, SlotFlags::empty())).unwrap();
    store_each(&vm, 100);
    let mark = vm.mark(CPU).unwrap();
    store_each(&vm, 50);
    assert_eq!(written_since(&vm, &mark), (0..50).collect());
    let again = vm.mark(CPU).unwrap();
    assert!(written_since(&vm, &again).is_empty() && written_since(&vm, &mark).len() == 50);
    mark.give_back(&host, CPU);
    again.give_back(&host, CPU);
    vm.destroy(CPU);
    host.objects.destroy(&host.supply(CPU), &host.epoch, object).unwrap();
    host.pool.reap(&host.epoch, CPU, usize::MAX);
    assert!(free - host.pool.free_frames() <= 1, "only the zero page may stay");
}
