//! One page on its way from shared to a machine's own.

use entresol_addr::{GfnRange, Gpa, PAGE_SIZE, PageSize, PfnRange};
use entresol_backing::Policy;
use entresol_fault::{Access, Cause, Fault};
use entresol_machine::Features;
use entresol_machine::flat::Event;
use entresol_slot::{Hint, SlotFlags};

use super::{FRAMES, access, end, gpa, leaf, load, settled, store, with_memory};
use crate::Outcome;
use crate::tests::{CPU, RAM, coherent, fault, host, host_with, slot};

/// D4, and the specification's table: one trap whether the old page is mapped or not, clean before it is seen.
#[test]
fn a_write_to_a_shared_page_takes_one_trap() {
    let features = Features { forced_write_back: false, ..coherent() };
    let host = host_with(4096, features);
    let (parent, _) = with_memory(&host, Policy::Pages);
    store(&parent, gpa(5), 1);
    let child = parent.fork(CPU).unwrap();
    assert_eq!(load(&child, gpa(5)), 1);
    let old = leaf(&child, gpa(5)).unwrap();
    assert!(!old.permissions.write);
    host.machine.events();
    assert_eq!(store(&child, gpa(5), 2), 1);
    let new = leaf(&child, gpa(5)).unwrap();
    assert!(new.permissions.write && new.pfn != old.pfn);
    let at = child.table().walk(&host.machine, Gpa::new(gpa(5)).frame()).unwrap();
    let events = host.machine.events();
    let place = |wanted: &dyn Fn(&Event) -> bool| events.iter().position(wanted).expect("it happened");
    let source = place(&|event| *event == Event::Clean(PfnRange::single(old.pfn)));
    let copied = place(&|event| *event == Event::Copy(old.pfn, new.pfn, 1));
    let flushed = place(&|event| matches!(event, Event::Tlb(_)));
    let cleaned = place(&|event| *event == Event::Clean(PfnRange::single(new.pfn)));
    let published = place(&|event| *event == Event::Word(at.word, at.raw));
    assert!(source < copied && copied < flushed && copied < cleaned);
    assert!(flushed < published && cleaned < published);
    assert_eq!((child.stats.copied.get(), child.stats.invalidations.get()), (1, 0));
    assert_eq!(load(&parent, gpa(5)), 1);
}

/// The specification's nine steps, in their order, when the notifier is forced.
#[test]
fn the_notifiers_way_takes_nine_steps() {
    let host = host_with(4096, Features { forced_write_back: false, ..coherent() });
    let (parent, _) = with_memory(&host, Policy::Pages);
    store(&parent, gpa(5), 1);
    let child = parent.fork(CPU).unwrap();
    child.switches.force_notifier(true);
    assert_eq!(load(&child, gpa(5)), 1);
    let old = leaf(&child, gpa(5)).unwrap();
    let write = Fault { cause: Cause::Permission { level: 3 }, ..fault(gpa(5), Access::Write) };
    host.machine.events();
    // 1, 2: the write faults, and is told to unpin.
    assert_eq!(child.handle(&host.epoch.pin(CPU), &Hint::new(), &write), Outcome::Unshare);
    assert_eq!(host.machine.events(), []);
    // 3 to 7: filled, started and unmapped, changed, installed read-only, ended, and back to the guest.
    let sample = child.notifier.sample();
    assert_eq!(child.unshare(CPU, Gpa::new(gpa(5))), Outcome::Retry);
    let new = leaf(&child, gpa(5)).unwrap();
    assert!(!new.permissions.write && new.pfn != old.pfn);
    assert!(child.notifier.moved(sample, GfnRange::new(Gpa::new(gpa(5)).frame(), 1).unwrap()));
    let at = child.table().walk(&host.machine, Gpa::new(gpa(5)).frame()).unwrap();
    let events = host.machine.events();
    let place = |wanted: &dyn Fn(&Event) -> bool| events.iter().position(wanted).expect("it happened");
    let steps = [
        place(&|event| *event == Event::Copy(old.pfn, new.pfn, 1)),
        place(&|event| matches!(event, Event::Tlb(_))),
        place(&|event| *event == Event::Clean(PfnRange::single(new.pfn))),
        place(&|event| *event == Event::Word(at.word, at.raw)),
    ];
    assert!(steps.is_sorted(), "{steps:?} in {events:?}");
    assert_eq!((child.stats.invalidations.get(), child.stats.changed.get()), (1, 1));
    // 8, 9: the instruction again: a permission fault, relaxed in place.
    assert_eq!(child.handle(&host.epoch.pin(CPU), &Hint::new(), &write), Outcome::Resume);
    let relaxed = leaf(&child, gpa(5)).unwrap();
    assert_eq!((relaxed.permissions.write, relaxed.pfn), (true, new.pfn));
    end(child);
    end(parent);
    assert_eq!(settled(&host), 0);
}

#[test]
fn a_change_installs_every_size_inside_its_range_only() {
    let host = host(4096);
    let (vm, _) = with_memory(&host, Policy::Blocks);
    store(&vm, gpa(3), 1);
    let frame = |frame| Gpa::new(gpa(frame)).frame();
    for (start, count, size) in [(0, 512, PageSize::Size2M), (3, 1, PageSize::Size4K)] {
        let range = GfnRange::new(frame(start), count).unwrap();
        let invalidation = vm.invalidate_range_start(CPU, range).unwrap();
        let pin = host.epoch.pin(CPU);
        assert_eq!(leaf(&vm, gpa(3)), None);
        assert!(!vm.change(&pin, &invalidation, frame(600)), "outside");
        assert!(vm.change(&pin, &invalidation, frame(3)));
        let installed = leaf(&vm, gpa(3)).unwrap();
        assert_eq!((installed.size, installed.permissions.write), (size, false));
        drop(pin);
        vm.invalidate_range_end(invalidation);
        assert_eq!(access(&vm, gpa(3), Access::Write).0, 1, "relaxed");
    }
    // Somebody else's invalidation of the same place: nothing may appear there.
    let range = GfnRange::new(frame(0), 512).unwrap();
    let (mine, other) =
        (vm.invalidate_range_start(CPU, range).unwrap(), vm.invalidate_range_start(CPU, range).unwrap());
    assert!(!vm.change(&host.epoch.pin(CPU), &mine, frame(3)));
    vm.invalidate_range_end(other);
    assert!(vm.change(&host.epoch.pin(CPU), &mine, frame(3)));
    vm.invalidate_range_end(mine);
}

#[test]
fn around_a_fault_what_is_present_is_mapped_too() {
    let host = host(4096);
    let (parent, _) = with_memory(&host, Policy::Pages);
    for frame in [32, 33, 40, 47, 48] {
        store(&parent, gpa(frame), 1);
    }
    for (span, mapped) in [(1, 1), (16, 4), (64, 5)] {
        let child = parent.fork(CPU).unwrap();
        child.switches.set_fault_around(span);
        access(&child, gpa(33), Access::Read);
        assert_eq!(child.census().of(PageSize::Size4K), mapped, "span {span}");
        assert_eq!(child.stats.around.get(), mapped - 1);
        assert!([32, 33].iter().all(|frame| leaf(&child, gpa(*frame)).is_none_or(|leaf| !leaf.permissions.write)));
        end(child);
    }
    // The parent's own copy comes back writable.
    store(&parent, gpa(40), 2);
    let frame = Gpa::new(gpa(32)).frame();
    parent.zap(CPU, GfnRange::new(frame, 16).unwrap()).unwrap();
    access(&parent, gpa(33), Access::Read);
    assert!(leaf(&parent, gpa(40)).unwrap().permissions.write && !leaf(&parent, gpa(47)).unwrap().permissions.write);
}

#[test]
fn untouched_memory_of_a_forked_machine_is_the_zero_page_until_it_is_written() {
    let host = host(4096);
    let (parent, _) = with_memory(&host, Policy::Pages);
    let child = parent.fork(CPU).unwrap();
    assert_eq!(load(&child, gpa(9)), 0);
    assert_eq!(load(&parent, gpa(10)), 0);
    assert_eq!(leaf(&child, gpa(9)).unwrap().pfn, leaf(&parent, gpa(10)).unwrap().pfn);
    assert_eq!(store(&child, gpa(9), 7), 1);
    assert_eq!((load(&child, gpa(9)), load(&parent, gpa(9)), load(&parent, gpa(10))), (7, 0, 0));
    // Executed first where the caches need it.
    let fetch = fault(gpa(11), Access::Fetch);
    assert_eq!(child.handle(&host.epoch.pin(CPU), &Hint::new(), &fetch), Outcome::Resume);
}

/// The hypervisor's own writes are seen by a guest that has the page mapped, at every place where it has it.
#[test]
fn what_a_device_writes_is_seen_through_every_alias() {
    let host = host(4096);
    let (parent, object) = with_memory(&host, Policy::Pages);
    let alias = RAM + (1 << 32);
    parent.set_slot(CPU, &slot(1, alias, FRAMES, object, SlotFlags::READ_ONLY)).unwrap();
    store(&parent, gpa(5), 1);
    let child = parent.fork(CPU).unwrap();
    for vm in [&parent, &child] {
        assert_eq!([load(vm, gpa(5)), load(vm, alias + 5 * PAGE_SIZE)], [1, 1]);
    }
    child.write(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(gpa(5)), &[2]).unwrap();
    assert_eq!([load(&child, gpa(5)), load(&child, alias + 5 * PAGE_SIZE)], [2, 2]);
    store(&parent, gpa(5), 3);
    assert_eq!([load(&parent, gpa(5)), load(&parent, alias + 5 * PAGE_SIZE)], [3, 3]);
    assert!(!leaf(&parent, alias + 5 * PAGE_SIZE).unwrap().permissions.write, "INV-13");
    assert_eq!([load(&child, gpa(5)), load(&child, alias + 5 * PAGE_SIZE)], [2, 2]);
    let mut byte = [0];
    child.read(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(gpa(5)), &mut byte).unwrap();
    assert_eq!(byte, [2]);
    end(child);
    end(parent);
    assert_eq!(settled(&host), 0);
}
