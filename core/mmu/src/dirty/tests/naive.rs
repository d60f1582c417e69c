//! Log, ring and a set of page numbers name the same pages, whatever happens between.

use std::collections::BTreeSet;
use std::vec;

use entresol_addr::{GfnRange, Gpa};
use entresol_backing::Policy;
use entresol_slot::SlotFlags;
use proptest::prelude::*;

use super::*;
use crate::tests::{CPU, TestVm, host, memory, slot, vm};

const COUNT: u64 = 1024 + 100;

#[derive(Clone, Debug)]
enum Step {
    Store { vcpu: u32, page: u64 },
    Read { page: u64 },
    Device { page: u64 },
    Get,
    Clear { word: u64, mask: u64 },
    Harvest,
    Reset,
    Age { page: u64 },
    Zap { page: u64 },
    SplitAhead,
    Toggle,
}

fn step() -> impl Strategy<Value = Step> {
    let page = prop_oneof![0..COUNT, 500..530u64, 1100..COUNT];
    prop_oneof![
        8 => (0u32..2, page.clone()).prop_map(|(vcpu, page)| Step::Store { vcpu, page }),
        2 => page.clone().prop_map(|page| Step::Read { page }),
        2 => page.clone().prop_map(|page| Step::Device { page }),
        1 => Just(Step::Get),
        1 => (0..COUNT.div_ceil(64), any::<u64>()).prop_map(|(word, mask)| Step::Clear { word, mask }),
        2 => Just(Step::Harvest),
        2 => Just(Step::Reset),
        1 => page.clone().prop_map(|page| Step::Age { page }),
        1 => page.prop_map(|page| Step::Zap { page }),
        1 => Just(Step::SplitAhead),
        1 => Just(Step::Toggle),
    ]
}

/// What is known without looking at the virtual machine.
#[derive(Default)]
struct Naive {
    /// Written since it was last cleared.
    dirty: BTreeSet<u64>,
    /// Harvested from a ring and not reset yet.
    harvested: BTreeSet<u64>,
    /// Entered a ring and was not harvested yet.
    ringed: BTreeSet<u64>,
}

impl Naive {
    fn written(&mut self, page: u64, rings: bool) {
        if self.dirty.insert(page) && rings {
            self.ringed.insert(page);
        }
    }

    fn cleared(&mut self, page: u64) {
        self.dirty.remove(&page);
    }
}

fn run(vm: &TestVm<'_>, naive: &mut Naive, step: &Step, rings: bool) -> Result<(), TestCaseError> {
    let range = |page: u64| GfnRange::new(Gfn::new(FIRST + page), 3).unwrap();
    match *step {
        Step::Store { vcpu, page } => {
            if vm.enter(CPU, vcpu).is_ok() {
                prop_assert!(store(vm, CPU, page) <= 2, "INV-15");
                naive.written(page, rings);
                vm.leave(CPU);
            }
        }
        Step::Read { page } => {
            let outcome = crate::tests::touch(vm, RAM + page * PAGE_SIZE, Access::Read);
            prop_assert_eq!(outcome, Outcome::Resume);
        }
        Step::Device { page } => {
            vm.write(&vm.host().epoch.pin(CPU), &Hint::new(), Gpa::new(RAM + page * PAGE_SIZE), b"dma").unwrap();
            naive.written(page, false);
        }
        Step::Get => {
            let mut words = [0; COUNT.div_ceil(64) as usize];
            vm.get_dirty_log(CPU, 0, &mut words).unwrap();
            prop_assert!(pages(&words).iter().eq(&naive.dirty));
            naive.dirty.clear();
        }
        Step::Clear { word, mask } => {
            let count = 64.min(COUNT - word * 64);
            let gone: Vec<u64> =
                naive.dirty.iter().copied().filter(|page| page / 64 == word && mask >> (page % 64) & 1 != 0).collect();
            prop_assert_eq!(vm.clear_dirty_log(CPU, 0, word * 64, count, &[mask]), Ok(gone.len() as u64));
            gone.into_iter().for_each(|page| naive.cleared(page));
        }
        Step::Harvest => {
            let mut named = BTreeSet::new();
            for ring in (0..2).filter_map(|vcpu| vm.dirty_ring(vcpu)) {
                ring.harvest(|slot, page| {
                    assert_eq!(slot, 0);
                    named.insert(page);
                });
            }
            prop_assert_eq!(&named, &naive.ringed);
            naive.ringed.clear();
            naive.harvested.extend(named);
        }
        Step::Reset => {
            vm.reset_dirty_rings(CPU);
            core::mem::take(&mut naive.harvested).into_iter().for_each(|page| naive.cleared(page));
        }
        Step::Age { page } => drop(vm.clear_young(CPU, range(page)).unwrap()),
        Step::Zap { page } => vm.zap(CPU, range(page)).unwrap(),
        Step::SplitAhead => drop(vm.split_ahead(CPU, 0).unwrap()),
        Step::Toggle => {}
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn log_ring_and_a_set_name_the_same_pages(
        steps in prop::collection::vec(step(), 1..120), blocks: bool, rings: bool, before in 0..COUNT,
    ) {
        let host = host(4096);
        let vm = vm(&host);
        let object = memory(&host, COUNT, if blocks { Policy::Blocks } else { Policy::Pages });
        let set = |flags| vm.set_slot(CPU, &slot(0, RAM, COUNT, object, flags)).unwrap();
        set(SlotFlags::empty());
        store(&vm, CPU, before);
        set(SlotFlags::LOG_DIRTY);
        if rings {
            vm.enable_dirty_rings(2, 128).unwrap();
        }
        let mut naive = Naive::default();
        for step in steps {
            if matches!(step, Step::Toggle) {
                // A new log; what the rings still name is of the old one.
                set(SlotFlags::empty());
                set(SlotFlags::LOG_DIRTY);
                naive.dirty.clear();
            }
            run(&vm, &mut naive, &step, rings)?;
            check_writable(&vm, CPU, COUNT);
            let log: Vec<u64> = {
                let mut words = [0; COUNT.div_ceil(64) as usize];
                vm.read_dirty_log(CPU, 0, &mut words).unwrap();
                pages(&words)
            };
            prop_assert!(log.iter().eq(&naive.dirty), "after {:?}: {:?} and {:?}", step, log, naive.dirty);
        }
        vm.destroy(CPU);
        host.objects.destroy(&host.supply(CPU), &host.epoch, object).unwrap();
        host.pool.reap(&host.epoch, CPU, usize::MAX);
        prop_assert_eq!(host.pool.free_frames(), 4096);
    }
}
