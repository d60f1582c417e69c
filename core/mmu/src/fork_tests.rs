//! Forked virtual machines on a flat machine: what each reads and writes, what is mapped, and what it costs.

use std::vec::Vec;

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SIZE, PageSize, Pfn, PfnRange};
use entresol_arch_arm64::stage2::Stage2;
use entresol_backing::{ObjectHandle, Order, Policy};
use entresol_fault::{Access, Cause, Fault};
use entresol_machine::Features;
use entresol_machine::flat::{Event, FlatMachine};
use entresol_slot::{Hint, SlotFlags};
use entresol_table::{Entry, Leaf};
use proptest::prelude::*;

use crate::tests::{CPU, OPTIONS, RAM, TestVm, coherent, fault, host, host_with, memory, slot, touch, vm};
use crate::{CopyError, ForkError, Host, Outcome, Reason, Vm};

/// Frames of the memory of most machines here.
const FRAMES: u64 = 1024;

fn gpa(frame: u64) -> u64 {
    RAM + frame * PAGE_SIZE
}

fn leaf(vm: &TestVm<'_>, gpa: u64) -> Option<Leaf> {
    match vm.table().walk(&vm.host().machine, Gpa::new(gpa).frame()).unwrap().entry {
        Entry::Leaf(leaf) => Some(leaf),
        _ => None,
    }
}

/// Makes one access as a CPU does: faults with what the tables say, until it is served. Returns the traps it took and the
/// frame that it reached.
fn access(vm: &TestVm<'_>, gpa: u64, kind: Access) -> (usize, Pfn) {
    for traps in 0..20 {
        let cause = match leaf(vm, gpa) {
            Some(leaf) if leaf.permissions.write || kind != Access::Write => {
                return (traps, leaf.frame_of(Gpa::new(gpa).frame()));
            }
            Some(_) => Cause::Permission { level: 3 },
            None => Cause::Translation,
        };
        let outcome = vm.handle(&vm.host().epoch.pin(CPU), &Hint::new(), &Fault { cause, ..fault(gpa, kind) });
        match outcome {
            Outcome::Resume | Outcome::Retry => {}
            Outcome::Unshare => assert_eq!(vm.unshare(CPU, Gpa::new(gpa)), Outcome::Retry),
            other => panic!("{other:?}"),
        }
    }
    panic!("{kind:?} at {gpa:#x} makes no progress: {:?}", leaf(vm, gpa));
}

/// A guest's store of one byte.
fn store(vm: &TestVm<'_>, gpa: u64, byte: u8) -> usize {
    use entresol_machine::Machine;
    let (traps, pfn) = access(vm, gpa, Access::Write);
    vm.host().machine.write(entresol_addr::Hpa::new(pfn.base().get() + gpa % PAGE_SIZE), &[byte]);
    traps
}

/// A guest's load of one byte.
fn load(vm: &TestVm<'_>, gpa: u64) -> u8 {
    use entresol_machine::Machine;
    let (_, pfn) = access(vm, gpa, Access::Read);
    let mut byte = [0];
    vm.host().machine.read(entresol_addr::Hpa::new(pfn.base().get() + gpa % PAGE_SIZE), &mut byte);
    byte[0]
}

fn with_memory<'h>(host: &'h Host<FlatMachine>, policy: Policy) -> (TestVm<'h>, ObjectHandle) {
    let vm = vm(host);
    let object = memory(host, FRAMES, policy);
    vm.set_slot(CPU, &slot(0, RAM, FRAMES, object, SlotFlags::empty())).unwrap();
    (vm, object)
}

/// Ends a machine and its memory.
fn end(vm: TestVm<'_>) {
    let host = vm.host();
    let objects: Vec<_> = {
        let pin = host.epoch.pin(CPU);
        vm.slots().iter(&pin).map(|slot| ObjectHandle::from_raw(slot.object.get())).collect()
    };
    vm.destroy(CPU);
    for object in objects {
        // Two slots may show one object.
        let _ = host.objects.destroy(&host.supply(CPU), &host.epoch, object);
    }
}

fn settled(host: &Host<FlatMachine>) -> u64 {
    while host.supply(CPU).reclaim(64) + host.pool.reap(&host.epoch, CPU, usize::MAX) as usize != 0 {}
    host.pool.total_frames() - host.pool.free_frames()
}

#[test]
fn a_child_goes_its_own_way_and_everything_comes_back() {
    for protect in [false, true] {
        for policy in [Policy::Pages, Policy::Blocks, Policy::WholeBlocks] {
            let host = host(8192);
            let (parent, _) = with_memory(&host, policy);
            parent.switches.protect_at_fork(protect);
            for frame in [0, 1, 2, 600] {
                store(&parent, gpa(frame), 1);
            }
            let child = parent.fork(CPU).unwrap();
            assert_eq!(store(&child, gpa(1), 2), 1, "one trap for one copy-on-write");
            store(&parent, gpa(2), 3);
            assert_eq!([0, 1, 2, 600, 700].map(|frame| load(&parent, gpa(frame))), [1, 1, 3, 1, 0]);
            assert_eq!([0, 1, 2, 600, 700].map(|frame| load(&child, gpa(frame))), [1, 2, 1, 1, 0]);
            let grandchild = child.fork(CPU).unwrap();
            store(&grandchild, gpa(700), 4);
            end(child);
            assert_eq!([0, 1, 2, 600, 700].map(|frame| load(&grandchild, gpa(frame))), [1, 2, 1, 1, 4]);
            end(parent);
            assert_eq!([0, 1, 2, 600, 700].map(|frame| load(&grandchild, gpa(frame))), [1, 2, 1, 1, 4]);
            end(grandchild);
            assert_eq!(settled(&host), 0, "{policy:?}, protect {protect}");
        }
    }
}

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

/// Copies are logged as writes, entries of what is shared are not writable under logging (INV-4), and the log names what
/// differs from a relative that nobody writes.
#[test]
fn the_log_and_the_difference_name_the_same_pages() {
    for policy in [Policy::Pages, Policy::Blocks] {
        let host = host(8192);
        let (parent, object) = with_memory(&host, policy);
        for frame in 0..40 {
            store(&parent, gpa(frame), 1);
        }
        let child = parent.fork(CPU).unwrap();
        child.set_slot(CPU, &slot(0, RAM, FRAMES, child_object(&child), SlotFlags::LOG_DIRTY)).unwrap();
        assert_eq!((load(&child, gpa(3)), load(&child, gpa(700))), (1, 0));
        store(&child, gpa(5), 2);
        store(&child, gpa(3), 2);
        store(&child, gpa(701), 2);
        child.write(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(gpa(9)), &[3]).unwrap();
        assert_eq!([3, 5, 9, 700, 701, 4].map(|frame| load(&child, gpa(frame))), [2, 2, 3, 0, 2, 1]);
        for frame in 0..FRAMES {
            let writable = leaf(&child, gpa(frame)).is_some_and(|leaf| leaf.permissions.write);
            assert_eq!(writable, [3, 5, 701].contains(&frame), "{policy:?}, frame {frame}");
        }
        let mut log = [0; FRAMES as usize / 64];
        child.get_dirty_log(CPU, 0, &mut log).unwrap();
        let logged: Vec<_> = (0..FRAMES).filter(|frame| log[*frame as usize / 64] >> (frame % 64) & 1 != 0).collect();
        assert_eq!(logged, [3, 5, 9, 701]);
        assert_eq!(store(&child, gpa(5), 4), 1, "protected again");
        let copy = child_object(&child);
        let pin = host.epoch.pin(CPU);
        let get = |handle| host.objects.get(&pin, handle).unwrap();
        let parts = get(copy).differences(&host.machine, get(object), 0).unwrap();
        let differing: Vec<_> = parts.flat_map(|(start, count)| start..start + count).collect();
        match policy {
            Policy::Pages => assert_eq!(differing, logged),
            // Where nothing was, a block is made.
            _ => assert!(logged.iter().all(|frame| differing.contains(frame)) && !differing.contains(&4)),
        }
        drop(pin);
        end(child);
        end(parent);
        assert_eq!(settled(&host), 0);
    }
}

/// Z-G2: what the difference must not miss.
#[test]
fn a_difference_that_misses_a_page_is_noticed() {
    let host = host(8192);
    let (parent, object) = with_memory(&host, Policy::Blocks);
    store(&parent, gpa(5), 1);
    let child = parent.fork(CPU).unwrap();
    store(&child, gpa(5), 2);
    let copy = child_object(&child);
    let differing = || {
        let pin = host.epoch.pin(CPU);
        let get = |handle| host.objects.get(&pin, handle).unwrap();
        get(copy).differences(&host.machine, get(object), 0).unwrap().collect::<Vec<_>>()
    };
    assert_eq!(differing(), [(5, 1)]);
    entresol_sync::zoo::plant(&[entresol_sync::zoo::Bug::ZG2]);
    let planted = differing();
    entresol_sync::zoo::plant(&[]);
    assert_eq!(planted, [], "the bug is there, so a test that compares would fail");
}

fn child_object(vm: &TestVm<'_>) -> ObjectHandle {
    let pin = vm.host().epoch.pin(CPU);
    ObjectHandle::from_raw(vm.slots().iter(&pin).next().unwrap().object.get())
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

#[test]
fn a_machine_that_shows_what_another_shows_is_not_forked() {
    let host = host(4096);
    let (parent, object) = with_memory(&host, Policy::Pages);
    let other = vm(&host);
    other.set_slot(CPU, &slot(0, RAM, FRAMES, object, SlotFlags::empty())).unwrap();
    assert_eq!(parent.fork(CPU).err(), Some(ForkError::SharedObject { handle: object }));
    other.destroy(CPU);
    let frozen = host.objects.freeze(object).unwrap();
    assert_eq!(parent.fork(CPU).err(), Some(ForkError::SharedObject { handle: object }));
    let stopped = parent.write(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(RAM), &[1]);
    assert_eq!(stopped, Err(CopyError::Busy));
    assert_eq!(touch(&parent, RAM, Access::Write), Outcome::Retry);
    drop(frozen);
    end(parent.fork(CPU).unwrap());
    end(parent);
    assert_eq!(settled(&host), 0);
}

/// Whichever frame is missing, a fork gives everything back and changes nothing; and so does a copy.
#[test]
fn every_allocation_of_a_fork_and_of_a_copy_may_fail() {
    let mut forked = 0;
    for spare in 0..14 {
        let host = host(256);
        let (parent, _) = with_memory(&host, Policy::Pages);
        store(&parent, gpa(5), 1);
        let mut hoard = Vec::new();
        while host.pool.free_frames() > spare {
            hoard.push(host.pool.take(CPU, Order::PAGE).unwrap());
        }
        let fork = parent.fork(CPU);
        if let Err(error) = &fork {
            settled(&host);
            assert_eq!(host.pool.free_frames(), spare, "{error}");
        } else {
            forked += 1;
        }
        let write = parent.handle(&host.epoch.pin(CPU), &Hint::new(), &fault(gpa(5), Access::Write));
        assert!(matches!(write, Outcome::Resume | Outcome::Exit(Reason::OutOfMemory)), "{write:?}");
        for pfn in hoard {
            host.pool.give(CPU, pfn, Order::PAGE);
        }
        store(&parent, gpa(5), 2);
        assert_eq!(load(&parent, gpa(5)), 2);
        if let Ok(child) = fork {
            assert_eq!(load(&child, gpa(5)), 1);
            end(child);
        }
        end(parent);
        assert_eq!(settled(&host), 0);
    }
    assert!((4..10).contains(&forked), "some fail, some do not: {forked}");
}

/// D3: what a fork asks of the machine does not grow with what is mapped.
#[test]
fn the_pause_is_flat() {
    let events = |pages: u64| {
        let host = host(8192);
        let (parent, _) = with_memory(&host, Policy::Pages);
        for frame in 0..pages {
            store(&parent, gpa(frame), 1);
        }
        host.machine.events();
        let child = parent.fork(CPU).unwrap();
        let events = host.machine.events().len();
        assert_eq!(leaf(&parent, gpa(0)), None, "detached");
        assert_eq!(parent.census().of(PageSize::Size4K), pages, "until it is taken apart");
        while !parent.reclaim(CPU, 1) {}
        assert!(parent.census().is_empty());
        end(child);
        end(parent);
        assert_eq!(settled(&host), 0);
        events
    };
    assert_eq!(events(1), events(FRAMES));
}

/// vCPUs of parent and children write, read and are zapped while the parent is forked again and again. Each has a byte of
/// its own in each page, so whatever it wrote last is what it reads, in whichever machine.
#[test]
fn running_machines_are_forked() {
    let host = host(16384);
    let (parent, _) = with_memory(&host, Policy::Pages);
    let own = |frame: u64, cpu: usize| gpa(frame) + 8 * cpu as u64;
    let run = |vm: &TestVm<'_>, cpu: usize, gpa: u64, byte: Option<u8>| loop {
        use entresol_machine::Machine;
        let pin = vm.host().epoch.pin(cpu);
        let write = byte.is_some();
        // The walk and the access are one step for a CPU; a flush waits for it, and so does a pin here.
        if let Some(leaf) = leaf(vm, gpa).filter(|leaf| leaf.permissions.write || !write) {
            let at = leaf.frame_of(Gpa::new(gpa).frame()).base().get() + gpa % PAGE_SIZE;
            let mut found = [0];
            match byte {
                Some(byte) => vm.host().machine.write(entresol_addr::Hpa::new(at), &[byte]),
                None => vm.host().machine.read(entresol_addr::Hpa::new(at), &mut found),
            }
            return found[0];
        }
        let kind = if write { Access::Write } else { Access::Read };
        let cause = if leaf(vm, gpa).is_some() { Cause::Permission { level: 3 } } else { Cause::Translation };
        let outcome = vm.handle(&pin, &Hint::new(), &Fault { cause, ..fault(gpa, kind) });
        assert!(matches!(outcome, Outcome::Resume | Outcome::Retry), "{outcome:?}");
    };
    for round in 0..4 {
        let child = parent.fork(CPU).unwrap();
        std::thread::scope(|scope| {
            for cpu in 1..4 {
                let (vm, run, host) = (if cpu == 3 { &child } else { &parent }, &run, &host);
                scope.spawn(move || {
                    for step in 0..6000 {
                        let at = own(step * 13 % 200, cpu);
                        let byte = (step % 251) as u8;
                        if cpu == 1 {
                            // The device's way.
                            let pin = host.epoch.pin(cpu);
                            let wrote = vm.write(&pin, &Hint::new(), Gpa::new(at), &[byte]);
                            drop(pin);
                            if wrote == Err(CopyError::Busy) {
                                continue;
                            }
                            wrote.unwrap();
                        } else {
                            run(vm, cpu, at, Some(byte));
                        }
                        assert_eq!(run(vm, cpu, at, None), byte, "round {round}, CPU {cpu}");
                        if step % 128 == 0 {
                            host.supply(cpu).reclaim(8);
                            host.pool.reap(&host.epoch, cpu, 512);
                        }
                    }
                });
            }
            for step in 0..12 {
                parent.zap(CPU, GfnRange::new(Gpa::new(gpa(step * 7)).frame(), 60).unwrap()).unwrap();
                let second = child.fork(CPU).unwrap();
                let before = load(&second, own(step, 3));
                store(&second, own(step, 3), 255);
                let again = second.fork(CPU).unwrap();
                assert_eq!(load(&again, own(step, 3)), 255, "after {before}");
                end(second);
                end(again);
            }
        });
        end(child);
    }
    end(parent);
    assert_eq!(settled(&host), 0);
}

#[derive(Clone, Debug)]
enum Act {
    Store { vm: usize, frame: u64, byte: u8 },
    Load { vm: usize, frame: u64 },
    Device { vm: usize, frame: u64, byte: u8 },
    Zap { vm: usize, frame: u64, count: u64 },
    Fork { vm: usize },
    End { vm: usize },
}

fn any_act() -> impl Strategy<Value = Act> {
    let frame = || prop_oneof![0..FRAMES, 0u64..8, 508u64..516];
    prop_oneof![
        5 => (0usize..8, frame(), any::<u8>()).prop_map(|(vm, frame, byte)| Act::Store { vm, frame, byte }),
        3 => (0usize..8, frame()).prop_map(|(vm, frame)| Act::Load { vm, frame }),
        2 => (0usize..8, frame(), any::<u8>()).prop_map(|(vm, frame, byte)| Act::Device { vm, frame, byte }),
        1 => (0usize..8, frame(), 1u64..600).prop_map(|(vm, frame, count)| Act::Zap { vm, frame, count }),
        2 => (0usize..8).prop_map(|vm| Act::Fork { vm }),
        1 => (0usize..8).prop_map(|vm| Act::End { vm }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Every machine of a family reads as an array of its own, whatever the switches.
    #[test]
    fn machines_of_a_family_read_as_arrays(
        acts in prop::collection::vec(any_act(), 1..80),
        policy in prop_oneof![Just(Policy::Pages), Just(Policy::Blocks), Just(Policy::WholeBlocks)],
        largest in prop_oneof![Just(PageSize::Size4K), Just(PageSize::Size1G)],
        (around, notifier, protect) in (prop_oneof![Just(1u64), Just(16), Just(64)], any::<bool>(), any::<bool>()),
    ) {
        let host = host(16384);
        let first = Vm::new(&host, CPU, Stage2 { fwb: true }, crate::Options { largest, ..OPTIONS }).unwrap();
        let object = memory(&host, FRAMES, policy);
        first.set_slot(CPU, &slot(0, RAM, FRAMES, object, SlotFlags::empty())).unwrap();
        let mut family = std::vec![(first, std::vec![0u8; FRAMES as usize])];
        for act in acts {
            for (vm, _) in &family {
                vm.switches.set_fault_around(around);
                vm.switches.force_notifier(notifier);
                vm.switches.protect_at_fork(protect);
            }
            match act {
                Act::Store { vm, frame, byte } => {
                    let at = vm % family.len();
                    let (vm, bytes) = &mut family[at];
                    store(vm, gpa(frame), byte);
                    bytes[frame as usize] = byte;
                }
                Act::Load { vm, frame } => {
                    let (vm, bytes) = &family[vm % family.len()];
                    prop_assert_eq!(load(vm, gpa(frame)), bytes[frame as usize]);
                }
                Act::Device { vm, frame, byte } => {
                    let at = vm % family.len();
                    let (vm, bytes) = &mut family[at];
                    vm.write(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(gpa(frame)), &[byte]).unwrap();
                    bytes[frame as usize] = byte;
                }
                Act::Zap { vm, frame, count } => {
                    let (vm, _) = &family[vm % family.len()];
                    vm.zap(CPU, GfnRange::new(Gfn::new((RAM >> 12) + frame), count).unwrap()).unwrap();
                }
                Act::Fork { vm } if family.len() < 7 => {
                    let (vm, bytes) = &family[vm % family.len()];
                    let child = (vm.fork(CPU).unwrap(), bytes.clone());
                    family.push(child);
                }
                Act::End { vm } if family.len() > 1 => {
                    let (vm, _) = family.swap_remove(vm % family.len());
                    end(vm);
                }
                Act::Fork { .. } | Act::End { .. } => {}
            }
            for (vm, bytes) in &family {
                for frame in [0, 1, 7, 508, 511, 512, 515, 1023] {
                    prop_assert_eq!(load(vm, gpa(frame)), bytes[frame as usize], "frame {}", frame);
                }
            }
            host.pool.reap(&host.epoch, CPU, usize::MAX);
        }
        family.into_iter().for_each(|(vm, _)| end(vm));
        prop_assert_eq!(settled(&host), 0);
    }
}
