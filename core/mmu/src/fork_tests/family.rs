//! Machines of a family: each is an array of its own, whoever of them runs, is forked or ends.

use std::vec::Vec;

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SIZE, PageSize};
use entresol_arch_arm64::stage2::Stage2;
use entresol_backing::{Order, Policy};
use entresol_fault::{Access, Cause, Fault};
use entresol_slot::{Hint, SlotFlags};
use proptest::prelude::*;

use super::{FRAMES, end, gpa, leaf, load, settled, store, with_memory};
use crate::tests::{CPU, OPTIONS, RAM, TestVm, fault, host, memory, slot, touch, vm};
use crate::{CopyError, ForkError, Outcome, Reason, Vm};

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
