//! Pages that leave memory for a swap device and come back, of one machine and of relatives that share them.

use std::collections::BTreeMap;
use std::vec;

use entresol_arch_arm64::stage2::Stage2;
use entresol_backing::{Fetch, OutError, StoreError, StoreId};
use entresol_machine::Machine;

use super::*;
use crate::tests::host;
use crate::{CacheError, CopyError, Frames, LeaveError, Reason, Shown, begin_out, discard};

type Shows<'a, 'h> = Shown<'a, 'h, FlatMachine, Stage2>;

/// A swap device.
struct Device {
    store: StoreId,
    holds: BTreeMap<u64, Vec<u8>>,
}

impl Device {
    fn new(host: &Host<FlatMachine>, slots: u64) -> Self {
        Self { store: host.pool.stores().open_counted(slots).unwrap(), holds: BTreeMap::new() }
    }

    fn begin(&mut self, shown: &[Shows<'_, '_>], frames: Frames) -> Result<(), LeaveError> {
        let host = shown[0].vm.host();
        let mut outs = Vec::new();
        let begun = begin_out(CPU, shown, frames, self.store, |_, out| outs.push(out));
        for out in outs {
            let mut page = vec![0; PAGE_SIZE as usize];
            host.machine.read(out.pfn().base(), &mut page);
            self.holds.insert(out.slot().index(), page);
            out.finish(&host.supply(CPU), true);
        }
        begun
    }

    fn put_out(&mut self, shown: &[Shows<'_, '_>], frames: Frames) -> u64 {
        self.begin(shown, frames).unwrap();
        discard(CPU, shown, frames).unwrap()
    }

    /// A guest's load, with all that is needed for it.
    fn load(&self, vm: &TestVm<'_>, at: u64) -> u8 {
        let host = vm.host();
        let absent = vm.absent(&host.epoch.pin(CPU), Gpa::new(at));
        if let Some(absent) = absent {
            let stored = Outcome::Exit(Reason::Stored { slot: absent.slot });
            assert_eq!(crate::tests::touch(vm, at, Access::Read), stored);
            let pin = host.epoch.pin(CPU);
            let supply = host.supply(CPU);
            let fetch = Fetch::cached(&supply, absent.slot).unwrap_or_else(|| {
                let mut fetch = Fetch::new(&supply, absent.slot).unwrap().unwrap();
                host.machine.write(fetch.pfn().base(), &self.holds[&absent.slot.index()]);
                fetch.filled(&supply, None);
                fetch
            });
            assert!(host.objects.get(&pin, absent.object).unwrap().restore(&supply, absent.frame, &fetch));
            fetch.give_back(&supply);
        }
        load(vm, at)
    }
}

fn frames(start: u64, count: u64) -> Frames {
    Frames { start, count }
}

#[test]
fn what_leaves_is_not_mapped_and_reads_the_same_after() {
    for policy in [Policy::Pages, Policy::Blocks] {
        let host = host(8192);
        let (vm, object) = with_memory(&host, policy);
        let mut device = Device::new(&host, 2048);
        for frame in 0..600 {
            store(&vm, gpa(frame), frame as u8);
        }
        let shown = [Shown { vm: &vm, object }];
        let before = settled(&host);
        let left: u64 = (0..10).map(|part| device.put_out(&shown, frames(part * 64, 64))).sum();
        let most = if policy == Policy::Blocks { 640 } else { 600 };
        assert_eq!(left, most, "{policy:?}");
        // A block became pages, with a node for them.
        assert_eq!(before - settled(&host), left - u64::from(policy == Policy::Blocks) * 2);
        assert!((0..640).all(|frame| leaf(&vm, gpa(frame)).is_none()));
        for frame in [0, 77, 599] {
            assert_eq!(device.load(&vm, gpa(frame)), frame as u8);
            assert!(!leaf(&vm, gpa(frame)).unwrap().permissions.write);
        }
        store(&vm, gpa(77), 1);
        assert_eq!(device.put_out(&shown, frames(0, 64)), 1, "clean: nothing to write");
        device.holds.retain(|_, page| page[0] != 0);
        assert_eq!(device.put_out(&shown, frames(77, 1)), 1, "written again");
        assert_eq!(device.load(&vm, gpa(77)), 1);
        assert_eq!(vm.stats.stored.get(), left + 2);
        end(vm);
        assert_eq!(settled(&host), 0);
        assert_eq!(host.pool.stores().close(device.store), Ok(()));
    }
}

/// A page-frame cache knows nothing of a page that is out, and what is written through it after is not what the device has.
#[test]
fn a_cache_lets_its_page_go_and_finds_it_again() {
    let host = host(4096);
    let (vm, object) = with_memory(&host, Policy::Pages);
    let mut device = Device::new(&host, 8);
    let shown = [Shown { vm: &vm, object }];
    vm.make_caches(1).unwrap();
    store(&vm, gpa(5), 1);
    vm.activate(CPU, 0, Gpa::new(gpa(5)), 8).unwrap();
    for value in 2..5 {
        assert_eq!(device.put_out(&shown, frames(5, 1)), 1, "a cache keeps nothing in memory");
        assert!(vm.check(&host.epoch.pin(CPU), 0, 8).is_none());
        let refused = vm.refresh(CPU, 0);
        assert!(matches!(refused, Err(CacheError::Memory(CopyError::Absent { .. }))), "{refused:?}");
        assert_eq!(device.load(&vm, gpa(5)), value - 1);
        assert!(vm.check(&host.epoch.pin(CPU), 0, 8).is_none());
        vm.refresh(CPU, 0).unwrap();
        let pin = host.epoch.pin(CPU);
        vm.write_piece(&vm.check(&pin, 0, 1).unwrap(), &[value]);
        drop(pin);
        assert_eq!(load(&vm, gpa(5)), value);
    }
    end(vm);
    assert_eq!(settled(&host), 0);
    assert_eq!(host.pool.stores().close(device.store), Ok(()));
}

#[test]
fn a_page_that_is_touched_on_its_way_out_needs_no_reading() {
    let host = host(4096);
    let (vm, object) = with_memory(&host, Policy::Pages);
    let mut device = Device::new(&host, 8);
    let shown = [Shown { vm: &vm, object }];
    for frame in 0..3 {
        store(&vm, gpa(frame), 7);
    }
    device.begin(&shown, frames(0, 3)).unwrap();
    assert_eq!(load(&vm, gpa(0)), 7);
    assert!(store(&vm, gpa(1), 8) <= 2, "at once, or mapped around the other and then made writable");
    assert_eq!(discard(CPU, &shown, frames(0, 3)), Ok(2), "what was written stays");
    assert_eq!([0, 1, 2].map(|frame| device.load(&vm, gpa(frame))), [7, 8, 7]);
    end(vm);
    assert_eq!(settled(&host), 0);
}

#[test]
fn a_page_on_its_way_out_that_the_hypervisor_writes_is_shown_as_written() {
    let host = host(4096);
    let (vm, object) = with_memory(&host, Policy::Pages);
    let device = Device::new(&host, 8);
    let shown = [Shown { vm: &vm, object }];
    store(&vm, gpa(0), 7);
    let mut outs = Vec::new();
    begin_out(CPU, &shown, frames(0, 1), device.store, |_, out| outs.push(out)).unwrap();
    assert_eq!(load(&vm, gpa(0)), 7, "mapped, read-only");
    // What is being written to the store keeps the frame, so the write goes to a copy.
    vm.write(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(gpa(0)), &[8]).unwrap();
    assert_eq!(load(&vm, gpa(0)), 8);
    outs.into_iter().for_each(|out| out.finish(&host.supply(CPU), true));
    assert_eq!(discard(CPU, &shown, frames(0, 1)), Ok(0), "what was written stays");
    assert_eq!(load(&vm, gpa(0)), 8);
    end(vm);
    assert_eq!(settled(&host), 0);
}

#[test]
fn relatives_lose_their_translations_too_and_share_again() {
    let host = host(8192);
    let (parent, object) = with_memory(&host, Policy::Pages);
    let mut device = Device::new(&host, 512);
    for frame in 0..64 {
        store(&parent, gpa(frame), frame as u8);
    }
    let child = parent.fork(CPU).unwrap();
    // Some of it shows what both share, some what is the child's.
    for frame in 0..64 {
        load(&child, gpa(frame));
    }
    for frame in 0..64 {
        load(&parent, gpa(frame));
    }
    store(&child, gpa(5), 99);
    let before = settled(&host);
    let family = [Shown { vm: &parent, object }, Shown { vm: &child, object: child_object(&child) }];
    assert_eq!(device.put_out(&family, frames(0, 64)), 64);
    assert!((0..64).all(|frame| [&parent, &child].iter().all(|vm| leaf(vm, gpa(frame)).is_none())));
    let other = [Shown { vm: &child, object: child_object(&child) }, Shown { vm: &parent, object }];
    assert_eq!(device.put_out(&other, frames(0, 64)), 64);
    assert_eq!(before - settled(&host), 65);
    for frame in 0..64 {
        let expected = if frame == 5 { 99 } else { frame as u8 };
        assert_eq!((device.load(&child, gpa(frame)), device.load(&parent, gpa(frame))), (expected, frame as u8));
        let same = leaf(&child, gpa(frame)).unwrap().pfn == leaf(&parent, gpa(frame)).unwrap().pfn;
        assert_eq!(same, frame != 5, "one frame for both");
    }
    assert_eq!(before, settled(&host));
    end(parent);
    end(child);
    assert_eq!(settled(&host), 0);
    assert_eq!(host.pool.stores().close(device.store), Ok(()));
}

#[test]
fn a_full_device_is_said_and_what_was_begun_goes_on() {
    let host = host(4096);
    let (vm, object) = with_memory(&host, Policy::Pages);
    let mut device = Device::new(&host, 2);
    let shown = [Shown { vm: &vm, object }];
    for frame in 0..4 {
        store(&vm, gpa(frame), 7);
    }
    let full = LeaveError::Out(OutError::Store(StoreError::Full { store: device.store }));
    assert_eq!(device.begin(&shown, frames(0, 4)), Err(full));
    assert_eq!(discard(CPU, &shown, frames(0, 4)), Ok(2));
    (0..4).for_each(|frame| assert_eq!(device.load(&vm, gpa(frame)), 7));
    let beyond = frames(FRAMES - 1, 5);
    assert_eq!(discard(CPU, &shown, beyond), Ok(0), "what lies outside is nothing");
    end(vm);
}
