//! Relatives against naive maps of pages, against memory that runs out at every point, and against each other's CPUs.

use std::collections::{BTreeMap, BTreeSet};
use std::vec;
use std::vec::Vec;

use entresol_addr::{PAGE_SIZE, PageSize, Pfn};
use entresol_machine::flat::Event;
use proptest::prelude::*;

use crate::tests::{CPUS, Host};
use crate::*;

/// Long enough for two levels below the root, a tail shorter than a block, and blocks.
pub(crate) const FRAMES: u64 = 3 * 512 + 100;

impl Host {
    pub(crate) fn fork(&self, handle: ObjectHandle) -> ObjectHandle {
        self.objects.fork(&self.supply(0), &self.epoch, handle).unwrap()
    }

    pub(crate) fn put(&self, handle: ObjectHandle, frame: u64, byte: u8) -> Result<(), AccessError> {
        self.on(handle, |object, supply| object.write(supply, frame * PAGE_SIZE + 5, &[byte]))
    }

    pub(crate) fn byte(&self, handle: ObjectHandle, frame: u64) -> u8 {
        let mut byte = [0xee];
        self.on(handle, |object, _| object.read(&self.supply(0), frame * PAGE_SIZE + 5, &mut byte).unwrap());
        byte[0]
    }

    pub(crate) fn settle(&self) {
        while self.supply(0).reclaim(16) != 0 {}
        while self.pool.reap(&self.epoch, 0, usize::MAX) != 0 {}
    }

    /// INV-7: what the relatives reach, each frame once, is all that is neither free nor in quarantine.
    pub(crate) fn assert_exact_family(&self, family: &[ObjectHandle]) {
        self.settle();
        let mut reached = BTreeSet::new();
        for handle in family {
            self.on(*handle, |object, _| object.visit_frames(&self.machine, &mut |pfn| reached.extend([pfn])));
        }
        let used = self.pool.total_frames() - self.pool.free_frames() - self.pool.quarantined_frames();
        assert_eq!(used, reached.len() as u64);
    }

    pub(crate) fn differing(&self, one: ObjectHandle, other: ObjectHandle) -> BTreeSet<u64> {
        let pin = self.epoch.pin(0);
        let get = |handle| self.objects.get(&pin, handle).unwrap();
        let parts: Vec<_> = get(one).differences(&self.supply(0), get(other), 0).unwrap().collect();
        assert!(parts.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "in order: {parts:?}");
        parts.into_iter().flat_map(|(start, count)| start..start + count).collect()
    }
}

#[test]
fn a_child_reads_what_was_and_writes_what_is_its_own() {
    for policy in [Policy::Pages, Policy::Blocks, Policy::WholeBlocks] {
        let host = Host::new(8 * 512);
        let parent = host.anonymous(FRAMES, policy);
        host.put(parent, 7, 1).unwrap();
        host.put(parent, 1000, 2).unwrap();
        let child = host.fork(parent);
        assert_eq!([7, 1000, 8].map(|frame| host.byte(child, frame)), [1, 2, 0]);
        host.put(child, 7, 9).unwrap();
        host.put(parent, 1000, 8).unwrap();
        assert_eq!([7, 1000].map(|frame| host.byte(parent, frame)), [1, 8], "{policy:?}");
        assert_eq!([7, 1000].map(|frame| host.byte(child, frame)), [9, 2], "{policy:?}");
        host.assert_exact_family(&[parent, child]);
        host.destroy(parent);
        assert_eq!([7, 1000].map(|frame| host.byte(child, frame)), [9, 2], "{policy:?}");
        host.assert_exact_family(&[child]);
        host.destroy(child);
        assert_eq!(host.pool.free_frames(), host.pool.total_frames());
    }
}

#[test]
fn a_fork_takes_no_frame_but_the_new_objects_own() {
    let host = Host::new(4 * 512);
    let parent = host.anonymous(1 << 28, Policy::Pages);
    for frame in 0..600 {
        host.put(parent, frame * 100_003, 1).unwrap();
    }
    let before = host.pool.free_frames();
    let children: Vec<_> = (0..6).map(|_| host.fork(parent)).collect();
    assert_eq!(host.pool.free_frames(), before);
    // Two nodes more and the root, which the parent owned alone, and the page.
    host.put(children[0], 100_003, 2).unwrap();
    host.settle();
    assert_eq!(before - host.pool.free_frames(), 5);
    for child in children {
        host.destroy(child);
    }
    assert_eq!(host.pool.free_frames(), before);
}

#[test]
fn what_is_shared_is_granted_for_reading_and_untouched_memory_is_the_zero_page() {
    let host = Host::new(64);
    let parent = host.anonymous(700, Policy::Pages);
    host.put(parent, 3, 7).unwrap();
    let child = host.fork(parent);
    for handle in [parent, child] {
        host.on(handle, |object, supply| {
            let before = host.pool.free_frames();
            let shared = object.grant(supply, 3, false).unwrap();
            assert!(!shared.writable && !shared.fresh);
            assert_eq!(object.grant(supply, 3, true), Err(GrantError::Shared));
            let zero = object.grant(supply, 600, false).unwrap();
            assert!(!zero.writable && host.pool.is_zero_page(zero.pfn));
            assert!(object.is_still(supply, 600, &zero) && object.is_still(supply, 3, &shared));
            assert_eq!(object.grant(supply, 600, true), Err(GrantError::Shared));
            assert_eq!(object.present(supply, 600), None);
            assert!(before - host.pool.free_frames() <= 1, "only the zero page is made, once");
            let own = object.own(supply, 600).unwrap();
            assert!(own.writable && own.fresh && !object.is_still(supply, 600, &zero));
            let own = object.own(supply, 3).unwrap();
            assert!(own.writable && !own.fresh && own.pfn != shared.pfn && !object.is_still(supply, 3, &shared));
            assert_eq!(object.own(supply, 3), Ok(own), "once");
            assert_eq!(object.own(supply, 700), Err(GrantError::Outside { frame: 700, frames: 700 }));
        });
    }
    host.assert_exact_family(&[parent, child]);
}

#[test]
fn a_shared_block_is_broken_by_pages_or_copied_whole() {
    for (policy, size, copied) in [(Policy::Blocks, PageSize::Size4K, 1), (Policy::WholeBlocks, PageSize::Size2M, 512)]
    {
        let host = Host::new(5 * 512);
        let parent = host.anonymous(1024, policy);
        host.put(parent, 20, 1).unwrap();
        let child = host.fork(parent);
        host.machine.events();
        host.on(child, |object, supply| {
            let old = object.present(supply, 20).unwrap();
            assert_eq!((old.size, old.writable), (PageSize::Size2M, false));
            let own = object.own(supply, 20).unwrap();
            assert_eq!((own.size, own.writable), (size, true));
            let copies = host.machine.events().into_iter().filter(|event| matches!(event, Event::Copy(..)));
            let from = old.frame(20).align_down(size);
            assert_eq!(copies.collect::<Vec<_>>(), [Event::Copy(from, own.pfn, copied)]);
            let beside = object.present(supply, 21).unwrap();
            assert_eq!(beside.writable, size == PageSize::Size2M);
            assert_eq!(beside.frame(21) == old.frame(21), size == PageSize::Size4K);
        });
        let expected = if size == PageSize::Size4K { 20..21 } else { 0..512 };
        assert_eq!(host.differing(child, parent), expected.collect());
        host.assert_exact_family(&[parent, child]);
        // The parent still says "block"; the counts are of pages by now.
        host.put(parent, 21, 3).unwrap();
        let grandchild = host.fork(parent);
        host.assert_exact_family(&[parent, child, grandchild]);
        host.destroy(parent);
        host.assert_exact_family(&[child, grandchild]);
        assert_eq!((host.byte(child, 20), host.byte(grandchild, 21)), (1, 3));
        host.destroy(child);
        host.destroy(grandchild);
        assert_eq!(host.pool.free_frames(), host.pool.total_frames());
    }
}

#[test]
fn a_frozen_object_is_read_and_not_written() {
    let host = Host::new(64);
    let parent = host.anonymous(100, Policy::Pages);
    host.put(parent, 3, 7).unwrap();
    let frozen = host.objects.freeze(parent).unwrap();
    assert_eq!(host.objects.freeze(parent).err(), Some(ForkError::Forking));
    assert_eq!(host.objects.fork(&host.supply(0), &host.epoch, parent), Err(ForkError::Forking));
    assert_eq!(host.put(parent, 3, 8), Err(AccessError::Forking));
    assert_eq!(host.put(parent, 4, 8), Err(AccessError::Forking));
    host.on(parent, |object, supply| {
        assert_eq!(object.own(supply, 3), Err(GrantError::Forking));
        assert_eq!(object.punch(supply, 0, 100), Err(PunchError::Forking));
        assert_eq!(object.grant(supply, 3, false).map(|grant| grant.writable), Ok(false));
    });
    assert_eq!((host.byte(parent, 3), host.byte(parent, 4)), (7, 0));
    assert!(matches!(host.objects.destroy(&host.supply(0), &host.epoch, parent), Err(DestroyError::Held { holds: 1 })));
    drop(frozen);
    host.put(parent, 3, 8).unwrap();
    assert_eq!(host.byte(parent, 3), 8);
    host.assert_exact_family(&[parent]);
}

#[test]
fn bad_forks_are_refused_and_change_nothing() {
    let host = Host::new(64);
    let parent = host.anonymous(100, Policy::Pages);
    let supply = host.supply(0);
    let device = host.objects.create(&supply, Spec::Device { first: Pfn::new(8), frames: 4 }).unwrap();
    let fork = |handle| host.objects.fork(&supply, &host.epoch, handle);
    assert_eq!(fork(device), Err(ForkError::Kind { kind: Kind::Device }));
    let unknown = ObjectHandle::from_raw(0x7_0000);
    assert_eq!(fork(unknown), Err(ForkError::Unknown { handle: unknown }));
    let (other, touched) = (host.anonymous(101, Policy::Pages), host.anonymous(100, Policy::Pages));
    host.put(touched, 0, 1).unwrap();
    let frozen = host.objects.freeze(parent).unwrap();
    for child in [other, touched, device, parent] {
        assert_eq!(frozen.share_with(&supply, child), Err(ForkError::Shape { handle: child }));
    }
    drop(frozen);
    assert_eq!(host.objects.len(), 4);
    let pin = host.epoch.pin(0);
    let get = |handle| host.objects.get(&pin, handle).unwrap();
    assert!(get(parent).differences(&host.supply(0), get(other), 0).is_err());
    assert!(get(parent).differences(&host.supply(0), get(device), 0).is_err());
}

/// Whichever frame is the last, what is read stays the same, counts stay exact, and with memory the same write succeeds.
#[test]
fn memory_that_runs_out_anywhere_changes_nothing_that_is_read() {
    for policy in [Policy::Pages, Policy::Blocks, Policy::WholeBlocks] {
        for spare in 0..7 {
            let host = Host::new(6 * 512);
            let parent = host.anonymous(1 << 27, policy);
            host.put(parent, 100_000, 1).unwrap();
            let child = host.fork(parent);
            host.on(child, |object, supply| object.grant(supply, 5, false)).unwrap();
            let mut hoard = Vec::new();
            while host.pool.free_frames() > spare {
                hoard.push(host.pool.take(1, Order::PAGE).unwrap());
            }
            let wrote = host.put(child, 100_000, 2);
            // The root, two or one nodes, in a block one more, and the page; memory that blocks have is all hoarded.
            let needed = 4;
            assert_eq!(wrote.is_ok(), spare >= needed, "{policy:?}, {spare} to spare: {wrote:?}");
            let expected = if wrote.is_ok() { 2 } else { 1 };
            assert_eq!((host.byte(parent, 100_000), host.byte(child, 100_000)), (1, expected));
            host.on(child, |object, supply| {
                let punched = object.punch(supply, 99_999, 3);
                assert!(matches!(punched, Ok(1..) | Err(PunchError::OutOfMemory)), "{punched:?}");
            });
            assert_eq!(host.byte(parent, 100_000), 1);
            hoard.into_iter().for_each(|pfn| host.pool.give(1, pfn, Order::PAGE));
            host.assert_exact_family(&[parent, child]);
            host.put(child, 100_000, 3).unwrap();
            assert_eq!((host.byte(parent, 100_000), host.byte(child, 100_000)), (1, 3));
            host.destroy(parent);
            host.destroy(child);
            assert_eq!(host.pool.free_frames(), host.pool.total_frames());
        }
    }
}

/// CPUs that write relatives, and the same relative, in parallel with forks, punches and ends of others.
#[test]
fn relatives_are_written_in_parallel() {
    for policy in [Policy::Pages, Policy::Blocks] {
        let host = Host::new(24 * 512);
        let parent = host.anonymous(FRAMES, policy);
        (0..FRAMES).step_by(3).for_each(|frame| host.put(parent, frame, 1).unwrap());
        let children: Vec<_> = (0..3).map(|_| host.fork(parent)).collect();
        let write = |cpu: usize, handle, frame: u64, byte| loop {
            let pin = host.epoch.pin(cpu);
            let object = host.objects.get(&pin, handle).unwrap();
            // Each CPU has bytes of its own in every page.
            let outcome = object.write(&host.supply(cpu), frame * PAGE_SIZE + 8 * cpu as u64, &[byte]);
            drop(pin);
            match outcome {
                Ok(()) => break,
                Err(error) => assert_eq!(error, AccessError::Forking),
            }
            std::thread::yield_now();
        };
        std::thread::scope(|scope| {
            for cpu in 1..CPUS {
                let (host, write, children) = (&host, &write, &children);
                scope.spawn(move || {
                    for round in 0..3000 {
                        let frame = round * 7 % FRAMES;
                        write(cpu, children[cpu - 1], frame, 10 + cpu as u8);
                        write(cpu, children[0], frame, 20 + cpu as u8);
                        if round % 64 == 0 {
                            host.supply(cpu).reclaim(4);
                            host.pool.reap(&host.epoch, cpu, 256);
                        }
                    }
                });
            }
            for round in 0..60 {
                let Ok(child) = host.objects.fork(&host.supply(0), &host.epoch, children[round % 3]) else { continue };
                host.put(child, round as u64, 99).unwrap();
                host.on(child, |object, supply| object.punch(supply, 400, 700)).unwrap();
                assert_eq!(host.byte(child, 500), 0);
                host.destroy(child);
            }
        });
        for (place, child) in children.iter().enumerate() {
            for frame in (0..3000).map(|round| round * 7 % FRAMES) {
                for cpu in 1..CPUS {
                    let mut byte = [0];
                    let offset = frame * PAGE_SIZE + 8 * cpu as u64;
                    host.on(*child, |object, _| object.read(&host.supply(0), offset, &mut byte).unwrap());
                    let expected = match (place, place + 1 == cpu) {
                        (0, _) => 20 + cpu as u8,
                        (_, true) => 10 + cpu as u8,
                        (_, false) => 0,
                    };
                    assert_eq!(byte[0], expected, "child {place}, frame {frame}, CPU {cpu}");
                }
            }
        }
        (0..FRAMES).for_each(|frame| assert_eq!(host.byte(parent, frame), u8::from(frame % 3 == 0)));
        let family: Vec<_> = children.iter().copied().chain([parent]).collect();
        host.assert_exact_family(&family);
        family.into_iter().for_each(|handle| host.destroy(handle));
        assert_eq!(host.pool.free_frames(), host.pool.total_frames());
    }
}

#[derive(Clone, Debug)]
enum Act {
    Write {
        member: usize,
        frame: u64,
        byte: u8,
    },
    Read {
        member: usize,
        frame: u64,
    },
    Punch {
        member: usize,
        start: u64,
        count: u64,
    },
    Fork {
        member: usize,
    },
    Drop {
        member: usize,
    },
    /// So many frames are left for what follows.
    Starve {
        spare: u64,
    },
}

fn any_act() -> impl Strategy<Value = Act> {
    let frame = || prop_oneof![0..FRAMES, 500u64..530, 0u64..4];
    let count = prop_oneof![0u64..8, 0..FRAMES, Just(512u64)];
    prop_oneof![
        6 => (0usize..8, frame(), 1u8..).prop_map(|(member, frame, byte)| Act::Write { member, frame, byte }),
        2 => (0usize..8, frame()).prop_map(|(member, frame)| Act::Read { member, frame }),
        2 => (0usize..8, frame(), count).prop_map(|(member, start, count)| Act::Punch { member, start, count }),
        2 => (0usize..8).prop_map(|member| Act::Fork { member }),
        1 => (0usize..8).prop_map(|member| Act::Drop { member }),
        1 => (0u64..6).prop_map(|spare| Act::Starve { spare }),
    ]
}

/// One relative: its handle, its bytes by frame, and for each frame the number of its last change.
struct Member {
    handle: ObjectHandle,
    bytes: BTreeMap<u64, u8>,
    changed: Vec<u64>,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn relatives_read_as_maps_of_their_own(
        policy in prop_oneof![Just(Policy::Pages), Just(Policy::Blocks), Just(Policy::WholeBlocks)],
        acts in prop::collection::vec(any_act(), 1..60),
    ) {
        let host = Host::new(20 * 512);
        let handle = host.anonymous(FRAMES, policy);
        let mut family = vec![Member { handle, bytes: BTreeMap::new(), changed: vec![0; FRAMES as usize] }];
        let mut hoard = Vec::new();
        for (now, act) in (1u64..).zip(acts) {
            match act {
                Act::Write { member, frame, byte } => {
                    let at = member % family.len();
                    let member = &mut family[at];
                    if host.put(member.handle, frame, byte).is_ok() {
                        member.bytes.insert(frame, byte);
                        member.changed[frame as usize] = now;
                    }
                }
                Act::Read { member, frame } => {
                    let member = &family[member % family.len()];
                    host.on(member.handle, |object, supply| {
                        let grant = object.grant(supply, frame, false);
                        assert!(matches!(grant, Ok(_) | Err(GrantError::OutOfMemory)), "{grant:?}");
                    });
                    let expected = member.bytes.get(&frame).copied().unwrap_or(0);
                    prop_assert_eq!(host.byte(member.handle, frame), expected);
                }
                Act::Punch { member, start, count } => {
                    let at = member % family.len();
                    let member = &mut family[at];
                    let punched = host.on(member.handle, |object, supply| object.punch(supply, start, count));
                    prop_assert!(start + count <= FRAMES || punched.is_err());
                    if punched.is_ok() {
                        member.bytes.retain(|frame, _| !(start..start + count).contains(frame));
                        member.changed[start as usize..(start + count) as usize].fill(now);
                    }
                }
                Act::Fork { member } if family.len() < 7 => {
                    let parent = &family[member % family.len()];
                    // Out of memory: nothing changed.
                    if let Ok(handle) = host.objects.fork(&host.supply(0), &host.epoch, parent.handle) {
                        let child = Member { handle, bytes: parent.bytes.clone(), changed: parent.changed.clone() };
                        family.push(child);
                    }
                }
                Act::Drop { member } if family.len() > 1 => {
                    let member = family.swap_remove(member % family.len());
                    host.destroy(member.handle);
                }
                Act::Fork { .. } | Act::Drop { .. } => {}
                Act::Starve { spare } => {
                    host.settle();
                    hoard.drain(..).for_each(|pfn| host.pool.give(1, pfn, Order::PAGE));
                    while spare != 0 && host.pool.free_frames() > spare * 2 {
                        hoard.push(host.pool.take(1, Order::PAGE).unwrap());
                    }
                }
            }
        }
        hoard.drain(..).for_each(|pfn| host.pool.give(1, pfn, Order::PAGE));
        let handles: Vec<_> = family.iter().map(|member| member.handle).collect();
        host.assert_exact_family(&handles);
        for member in &family {
            for frame in 0..FRAMES {
                let expected = member.bytes.get(&frame).copied().unwrap_or(0);
                prop_assert_eq!(host.byte(member.handle, frame), expected, "frame {}", frame);
            }
        }
        for (one, other) in family.iter().zip(family.iter().skip(1)) {
            let differing = host.differing(one.handle, other.handle);
            for frame in 0..FRAMES {
                let changed = one.changed[frame as usize] != other.changed[frame as usize];
                let differs = differing.contains(&frame);
                // Nothing that changed is missed.
                let bytes = [one, other].map(|member| member.bytes.get(&frame).copied().unwrap_or(0));
                prop_assert!(differs || bytes[0] == bytes[1], "frame {} is missed", frame);
                // Nothing is named that did not: blocks are made and copied whole, so it is pages that tell.
                prop_assert!(changed || !differs || policy != Policy::Pages, "frame {} did not change", frame);
            }
        }
        handles.into_iter().for_each(|handle| host.destroy(handle));
        prop_assert_eq!(host.pool.free_frames(), host.pool.total_frames());
    }
}
