//! Objects against a naive model, against memory that runs out at every point, and against each other's CPUs.

use std::collections::{BTreeMap, BTreeSet};
use std::string::ToString;
use std::vec;
use std::vec::Vec;

use entresol_addr::{PAGE_SIZE, PageSize, Pfn, PfnRange};
use entresol_machine::flat::{Event, FlatMachine};
use entresol_sync::Epoch;
use proptest::prelude::*;

use crate::*;

pub(crate) const CPUS: usize = 4;
/// Not aligned to a block, so that alignment is never an accident.
const FIRST: u64 = 0x4_0003;

pub(crate) struct Host {
    pub(crate) machine: FlatMachine,
    pub(crate) pool: FramePool,
    pub(crate) objects: Objects,
    pub(crate) epoch: Epoch,
}

impl Host {
    /// A machine of `frames` frames for the pool, and `beside` more that are not the pool's.
    fn with(frames: u64, beside: u64) -> Self {
        let first = Pfn::new(FIRST);
        let meta = (0..frames + beside).map(|_| FrameMeta::new()).collect();
        let pool = FramePool::new(first, meta, CPUS).unwrap();
        pool.add(PfnRange::new(first, frames).unwrap()).unwrap();
        let machine = FlatMachine::coherent(first, frames + beside);
        Self { machine, pool, objects: Objects::with_capacity(8).unwrap(), epoch: Epoch::new() }
    }

    pub(crate) fn new(frames: u64) -> Self {
        Self::with(frames, 0)
    }

    pub(crate) fn supply(&self, cpu: usize) -> Supply<'_, FlatMachine> {
        Supply::new(&self.machine, &self.pool, cpu)
    }

    pub(crate) fn anonymous(&self, frames: u64, policy: Policy) -> ObjectHandle {
        self.objects.create(&self.supply(0), Spec::anonymous(frames, policy)).unwrap()
    }

    pub(crate) fn on<T>(&self, handle: ObjectHandle, act: impl FnOnce(&Object, &Supply<'_, FlatMachine>) -> T) -> T {
        let pin = self.epoch.pin(0);
        act(self.objects.get(&pin, handle).unwrap(), &self.supply(0))
    }

    pub(crate) fn destroy(&self, handle: ObjectHandle) {
        self.objects.destroy(&self.supply(0), &self.epoch, handle).unwrap();
        while self.pool.reap(&self.epoch, 0, usize::MAX) != 0 {}
    }

    /// INV-7: what is free, deferred, and held by the object is all there is.
    fn assert_exact(&self, object: &Object) {
        let held = object.resident_frames() + object.node_frames();
        assert_eq!(self.pool.free_frames() + self.pool.deferred_frames() + held, self.pool.total_frames());
    }
}

#[test]
fn a_page_is_made_once_zeroed_and_then_found() {
    let host = Host::new(16);
    let handle = host.anonymous(700, Policy::Pages);
    host.on(handle, |object, supply| {
        assert!(!object.is_resident(&host.machine, 600));
        let fresh = object.grant(supply, 600, false).unwrap();
        assert_eq!((fresh.fresh, fresh.writable, fresh.size), (true, true, PageSize::Size4K));
        assert_eq!((fresh.memory, fresh.extent_start, fresh.frame(600)), (Memory::Normal, 600, fresh.pfn));
        assert!(host.machine.events().contains(&Event::Zero(PfnRange::single(fresh.pfn))));
        let again = object.grant(supply, 600, true).unwrap();
        assert_eq!(again, Grant { fresh: false, ..fresh });
        assert_eq!(object.present(supply, 600), Some(again));
        assert_eq!(object.present(supply, 601), None);
        // A root of level 1 and one node below it.
        assert_eq!((object.resident_frames(), object.node_frames()), (1, 2));
        let outside = GrantError::Outside { frame: 700, frames: 700 };
        assert_eq!(object.grant(supply, 700, false), Err(outside));
    });
    host.destroy(handle);
    assert_eq!(host.pool.free_frames(), 16);
}

#[test]
fn trees_of_every_height_hold_their_last_frame() {
    let host = Host::new(16);
    let sizes = [1, 512, 513, 1 << 18, (1 << 18) + 1, 1 << 27, (1 << 27) + 1, 1 << 36];
    for (frames, nodes) in sizes.into_iter().zip([1, 1, 2, 2, 3, 3, 4, 4]) {
        let handle = host.anonymous(frames, Policy::Pages);
        host.on(handle, |object, supply| {
            let last = object.grant(supply, frames - 1, true).unwrap();
            assert_eq!(object.present(supply, frames - 1).unwrap().pfn, last.pfn);
            assert_eq!(object.node_frames(), nodes, "{frames:#x}");
            assert!(frames == 1 || !object.is_resident(&host.machine, 0));
        });
        host.destroy(handle);
        assert_eq!(host.pool.free_frames(), 16);
    }
}

#[test]
fn blocks_where_they_fit_and_pages_where_not() {
    let host = Host::new(3 * 512);
    let handle = host.anonymous(512 + 300, Policy::Blocks);
    host.on(handle, |object, supply| {
        let block = object.grant(supply, 77, true).unwrap();
        assert_eq!((block.size, block.extent_start, block.pfn.get() % 512), (PageSize::Size2M, 0, 0));
        assert_eq!(block.frame(77), block.pfn.offset(77));
        let narrow = block.narrow(77, PageSize::Size4K);
        assert_eq!((narrow.pfn, narrow.extent_start, narrow.size), (block.frame(77), 77, PageSize::Size4K));
        // The tail is shorter than a block: it must not reach past the object (INV-5).
        assert_eq!(object.grant(supply, 600, true).unwrap().size, PageSize::Size4K);
        assert_eq!((object.resident_frames(), object.node_frames()), (513, 2));
        host.assert_exact(object);
    });
    host.destroy(handle);
    assert_eq!(host.pool.free_frames(), 3 * 512);
}

#[test]
fn without_a_free_block_pages_serve() {
    // Fewer frames than a block has, so there is none.
    let host = Host::new(100);
    let handle = host.anonymous(1024, Policy::Blocks);
    host.on(handle, |object, supply| {
        assert_eq!(object.grant(supply, 5, true).unwrap().size, PageSize::Size4K);
        assert_eq!(object.grant(supply, 6, true).unwrap().size, PageSize::Size4K);
        assert_eq!((object.resident_frames(), object.node_frames()), (2, 2));
    });
    host.destroy(handle);
    assert_eq!(host.pool.free_frames(), 100);
}

#[test]
fn memory_that_runs_out_anywhere_leaves_exact_counts() {
    for policy in [Policy::Pages, Policy::Blocks] {
        for frames in 0..40 {
            let host = Host::new(frames);
            let Ok(handle) = host.objects.create(&host.supply(0), Spec::anonymous(1 << 28, policy)) else {
                assert_eq!((frames, host.pool.free_frames()), (0, 0), "only the root's frame can be missing");
                continue;
            };
            host.on(handle, |object, supply| {
                // Spread, so that nodes of every level fail too.
                let failed = (0u64..30).map(|n| n * 0x2_3457 % (1 << 28)).find_map(|frame| {
                    let before = (object.resident_frames(), object.is_resident(&host.machine, frame));
                    let error = object.grant(supply, frame, true).err()?;
                    assert_eq!(before, (object.resident_frames(), object.is_resident(&host.machine, frame)));
                    host.assert_exact(object);
                    // Not `Busy`: whoever failed has left the word vacant.
                    assert_eq!(object.grant(supply, frame, true), Err(error));
                    Some(error)
                });
                assert_eq!(failed, Some(GrantError::OutOfMemory));
                host.assert_exact(object);
                let outcome = object.write(supply, 0x7_0000_0ff0, &[1; 0x40]);
                assert_eq!(outcome, Err(AccessError::OutOfMemory));
            });
            host.destroy(handle);
            assert_eq!(host.pool.free_frames(), frames);
        }
    }
}

#[test]
fn after_memory_came_back_the_same_fault_succeeds() {
    let host = Host::new(4);
    let handle = host.anonymous(10, Policy::Pages);
    let taken: Vec<_> = (0..3).map(|_| host.pool.take(1, Order::PAGE).unwrap()).collect();
    host.on(handle, |object, supply| {
        assert_eq!(object.grant(supply, 3, false), Err(GrantError::OutOfMemory));
        host.pool.give(1, taken[0], Order::PAGE);
        assert!(object.grant(supply, 3, false).unwrap().fresh);
    });
}

#[test]
fn cpus_racing_for_one_page_use_one_frame() {
    for (policy, resident) in [(Policy::Pages, 40), (Policy::Blocks, 1024)] {
        let host = Host::new(3000);
        let handle = host.anonymous(1024, policy);
        let seen: Vec<BTreeMap<u64, Pfn>> = std::thread::scope(|scope| {
            let cpus: Vec<_> = (0..CPUS)
                .map(|cpu| {
                    let host = &host;
                    scope.spawn(move || {
                        let grant = |frame| loop {
                            let pin = host.epoch.pin(cpu);
                            let object = host.objects.get(&pin, handle).unwrap();
                            match object.grant(&host.supply(cpu), frame, true) {
                                Ok(grant) => return (frame, grant.frame(frame)),
                                Err(error) => assert_eq!(error, GrantError::Busy),
                            }
                            drop(pin);
                            std::thread::yield_now();
                        };
                        (0..40).map(|n| n * 25).map(grant).collect()
                    })
                })
                .collect();
            cpus.into_iter().map(|cpu| cpu.join().unwrap()).collect()
        });
        assert!(seen.windows(2).all(|pair| pair[0] == pair[1]), "all see the same frames");
        let distinct: BTreeSet<_> = seen[0].values().collect();
        assert_eq!(distinct.len(), 40);
        host.on(handle, |object, _| {
            assert_eq!(object.resident_frames(), resident);
            host.assert_exact(object);
        });
        host.destroy(handle);
        assert_eq!(host.pool.free_frames(), 3000);
    }
}

#[test]
fn faults_and_punches_in_parallel_lose_and_double_nothing() {
    let host = Host::new(2600);
    let handle = host.anonymous(1500, Policy::Blocks);
    std::thread::scope(|scope| {
        for cpu in 1..CPUS {
            let host = &host;
            scope.spawn(move || {
                for round in 0..3000u64 {
                    let pin = host.epoch.pin(cpu);
                    let (object, supply) = (host.objects.get(&pin, handle).unwrap(), host.supply(cpu));
                    let frame = round * 37 * cpu as u64 % 1500;
                    if round % 50 == 0 {
                        let punched = object.punch(&supply, frame / 2, (round * 11 % 600).min(700));
                        assert!(matches!(punched, Ok(_) | Err(PunchError::OutOfMemory)), "{punched:?}");
                    } else if let Ok(grant) = object.grant(&supply, frame, true) {
                        assert!(host.machine.frames().contains(grant.frame(frame)));
                    }
                    drop(pin);
                    host.pool.reap(&host.epoch, cpu, 64);
                }
            });
        }
    });
    host.on(handle, |object, _| host.assert_exact(object));
    host.destroy(handle);
    assert_eq!(host.pool.free_frames(), 2600);
}

#[test]
fn a_punched_frame_waits_for_its_readers() {
    let host = Host::new(8);
    let handle = host.anonymous(4, Policy::Pages);
    let reader = host.epoch.pin(1);
    let old = host.objects.get(&reader, handle).unwrap().grant(&host.supply(1), 2, true).unwrap();
    let punched = host.on(handle, |object, supply| object.punch(supply, 0, 4));
    assert_eq!(punched, Ok(1));
    host.pool.reap(&host.epoch, 0, 10);
    let taken: Vec<_> = std::iter::from_fn(|| host.pool.take(0, Order::PAGE).ok()).collect();
    assert!(!taken.contains(&old.pfn), "the reader may still be using it");
    drop(reader);
    assert_eq!(host.pool.reap(&host.epoch, 0, 10), 1);
    assert_eq!(host.pool.take(0, Order::PAGE), Ok(old.pfn));
}

#[test]
fn punching_a_part_of_a_block_keeps_the_rest_in_place() {
    let host = Host::new(3 * 512);
    let handle = host.anonymous(512, Policy::Blocks);
    host.on(handle, |object, supply| {
        let block = object.grant(supply, 0, true).unwrap();
        object.write(supply, 9 * PAGE_SIZE, &[9; 3]).unwrap();
        object.write(supply, 100 * PAGE_SIZE, &[100; 3]).unwrap();
        assert_eq!(object.punch(supply, 10, 400), Ok(400));
        assert_eq!(object.present(supply, 9).unwrap().frame(9), block.frame(9));
        assert_eq!(object.present(supply, 410).unwrap().frame(410), block.frame(410));
        assert_eq!(object.present(supply, 10), None);
        let mut bytes = [7; 3];
        object.read(&host.supply(0), 9 * PAGE_SIZE, &mut bytes).unwrap();
        assert_eq!(bytes, [9; 3]);
        object.read(&host.supply(0), 100 * PAGE_SIZE, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 3]);
        assert_eq!(object.resident_frames(), 112);
        host.assert_exact(object);
        let outside = PunchError::Outside { start: 500, count: 13, frames: 512 };
        assert_eq!(object.punch(supply, 500, 13), Err(outside));
        assert!(matches!(object.punch(supply, u64::MAX, 2), Err(PunchError::Outside { .. })));
    });
    host.destroy(handle);
    assert_eq!(host.pool.free_frames(), 3 * 512);
}

#[test]
fn a_block_that_cannot_be_split_stays() {
    let host = Host::new(1024 + 600);
    let handle = host.anonymous(512, Policy::Blocks);
    host.on(handle, |object, supply| {
        object.grant(supply, 0, true).unwrap();
        while host.pool.take(1, Order::PAGE).is_ok() {}
        assert_eq!(object.punch(supply, 1, 1), Err(PunchError::OutOfMemory));
        assert_eq!(object.present(supply, 1).unwrap().size, PageSize::Size2M);
        assert_eq!(object.punch(supply, 0, 512), Ok(512), "a whole block needs no split");
    });
}

#[test]
fn a_device_is_what_it_is() {
    let host = Host::new(8);
    let first = Pfn::new(0x8_01f0);
    let frames = 3 * PageSize::Size1G.frames();
    let handle = host.objects.create(&host.supply(0), Spec::Device { first, frames }).unwrap();
    host.on(handle, |object, supply| {
        for (frame, size) in [
            (0, PageSize::Size4K),
            (0x10, PageSize::Size2M),
            (0x4_0000 - 0x1f0, PageSize::Size1G),
            (frames - 1, PageSize::Size4K),
        ] {
            let grant = object.grant(supply, frame, true).unwrap();
            assert_eq!((grant.size, grant.memory, grant.writable), (size, Memory::Device, true), "{frame:#x}");
            assert_eq!(grant.frame(frame), first.offset(frame));
            assert!(grant.pfn.is_aligned(size) && grant.extent_start + size.frames() <= frames);
            let page = grant.narrow(frame, PageSize::Size4K);
            assert_eq!((page.pfn, page.extent_start), (first.offset(frame), frame));
        }
        assert_eq!(object.read(&host.supply(0), 0, &mut [0]), Err(AccessError::Device));
        assert_eq!(object.punch(supply, 0, 1), Err(PunchError::Kind { kind: Kind::Device }));
    });
    host.destroy(handle);
}

#[test]
fn rom_is_read_and_never_written() {
    let host = Host::with(8, 3);
    let first = Pfn::new(FIRST + 8);
    let spec = |owned| Spec::Rom { first, frames: 3, owned };
    host.machine.write(first.offset(1).base(), b"bytes");
    for owned in [false, true] {
        let handle = host.objects.create(&host.supply(0), spec(owned)).unwrap();
        host.on(handle, |object, supply| {
            let grant = object.grant(supply, 1, false).unwrap();
            assert_eq!((grant.writable, grant.memory, grant.frame(1)), (false, Memory::Normal, first.offset(1)));
            assert_eq!(object.grant(supply, 1, true), Err(GrantError::ReadOnly));
            assert_eq!(object.write(supply, PAGE_SIZE, &[0]), Err(AccessError::ReadOnly));
            let mut bytes = [0; 5];
            object.read(&host.supply(0), PAGE_SIZE, &mut bytes).unwrap();
            assert_eq!(&bytes, b"bytes");
        });
        host.destroy(handle);
        assert_eq!(host.pool.free_frames(), if owned { 11 } else { 8 });
    }
    let pool_frame = CreateError::PoolFrame { pfn: first };
    assert_eq!(host.objects.create(&host.supply(0), spec(false)), Err(pool_frame), "now it is the pool's");
}

#[test]
fn bad_specs_name_field_value_and_rule() {
    let host = Host::new(8);
    let say = |spec| host.objects.create(&host.supply(0), spec).unwrap_err().to_string();
    assert_eq!(say(Spec::anonymous(0, Policy::Pages)), "frames 0x0: must be 1 to 0x1000000000");
    let too_large = Spec::anonymous((1 << 36) + 1, Policy::Pages);
    assert_eq!(say(too_large), "frames 0x1000000001: must be 1 to 0x1000000000");
    let beyond = Spec::Device { first: Pfn::new((1 << 36) - 1), frames: 2 };
    assert!(say(beyond).contains("must end by frame 0x1000000000"));
    let pool = Spec::Device { first: Pfn::new(FIRST - 5), frames: 6 };
    assert!(say(pool).contains("frame 0x40003 must not be the frame pool's"));
    let unowned = Spec::Rom { first: Pfn::new(FIRST + 8), frames: 1, owned: true };
    assert!(say(unowned).contains("must lie in the memory that the pool describes"));
    assert!(host.objects.is_empty());
    assert_eq!(host.pool.free_frames(), 8);
    assert_eq!(Objects::with_capacity(0).err(), Some(TableError::Capacity { value: 0 }));
}

#[test]
fn places_are_used_again_and_old_handles_name_nothing() {
    let host = Host::new(8);
    let spec = Spec::anonymous(1, Policy::Pages);
    let all: Vec<_> = (0..8).map(|_| host.objects.create(&host.supply(0), spec).unwrap()).collect();
    assert_eq!(host.objects.create(&host.supply(0), spec), Err(CreateError::TableFull { capacity: 8 }));
    host.destroy(all[2]);
    let next = host.objects.create(&host.supply(0), spec).unwrap();
    assert_ne!(next, all[2]);
    let pin = host.epoch.pin(0);
    assert!(host.objects.get(&pin, all[2]).is_none() && host.objects.get(&pin, next).is_some());
    for raw in [0, 3, 0xffff_ffff, 0x1_0008] {
        assert!(host.objects.get(&pin, ObjectHandle::from_raw(raw)).is_none(), "{raw:#x}");
    }
    drop(pin);
    let unknown = DestroyError::Unknown { handle: all[2] };
    assert_eq!(host.objects.destroy(&host.supply(0), &host.epoch, all[2]), Err(unknown));
    assert_eq!(host.objects.hold(all[2]), Err(unknown));
}

#[test]
fn a_held_object_is_not_destroyed() {
    let host = Host::new(8);
    let handle = host.anonymous(1, Policy::Pages);
    host.objects.hold(handle).unwrap();
    let destroy = || host.objects.destroy(&host.supply(0), &host.epoch, handle);
    assert_eq!(destroy(), Err(DestroyError::Held { holds: 1 }));
    host.objects.release(handle).unwrap();
    destroy().unwrap();
    assert_eq!((host.objects.len(), host.pool.free_frames()), (0, 8));
}

#[test]
fn populating_says_how_far_it_came() {
    let host = Host::new(20);
    let handle = host.anonymous(100, Policy::Pages);
    host.on(handle, |object, supply| {
        object.populate(supply, 3, 5).unwrap();
        assert_eq!(object.resident_frames(), 5);
        let stopped = object.populate(supply, 0, 100).unwrap_err();
        // One frame is the root; 0, 1, 2 and 3 to 7 are there, 11 more fit.
        assert_eq!(stopped, PopulateError { done: 19, error: GrantError::OutOfMemory });
        assert_eq!(object.resident_frames(), 19);
        for (start, frame) in [(u64::MAX, u64::MAX), (98, 100)] {
            let error = GrantError::Outside { frame, frames: 100 };
            assert_eq!(object.populate(supply, start, 5), Err(PopulateError { done: 0, error }));
        }
    });
}

/// An anonymous object as a vector of bytes and a set of pages.
struct Naive {
    bytes: Vec<u8>,
    resident: BTreeSet<u64>,
}

#[derive(Clone, Debug)]
enum Act {
    Write { offset: u64, len: usize, byte: u8 },
    Touch { frame: u64 },
    Punch { start: u64, count: u64 },
}

fn any_act(frames: u64) -> impl Strategy<Value = Act> {
    let bytes = frames * PAGE_SIZE;
    prop_oneof![
        (0..bytes, 0usize..9000, 1u8..).prop_map(|(offset, len, byte)| Act::Write { offset, len, byte }),
        (0..frames).prop_map(|frame| Act::Touch { frame }),
        (0..frames, prop_oneof![0u64..8, 0..frames]).prop_map(|(start, count)| Act::Punch { start, count }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn an_object_reads_as_a_vector_of_bytes(
        blocks in any::<bool>(),
        acts in prop::collection::vec(any_act(1100), 1..25),
    ) {
        const FRAMES: u64 = 1100;
        let host = Host::new(4 * 512);
        let handle = host.anonymous(FRAMES, if blocks { Policy::Blocks } else { Policy::Pages });
        let mut naive = Naive { bytes: vec![0; (FRAMES * PAGE_SIZE) as usize], resident: BTreeSet::new() };
        for act in acts {
            let pin = host.epoch.pin(0);
            let (object, supply) = (host.objects.get(&pin, handle).unwrap(), host.supply(0));
            match act {
                Act::Write { offset, len, byte } => {
                    let outcome = object.write(&supply, offset, &vec![byte; len]);
                    let end = offset as usize + len;
                    prop_assert_eq!(outcome.is_ok(), end <= naive.bytes.len());
                    if outcome.is_ok() && len != 0 {
                        naive.bytes[offset as usize..end].fill(byte);
                        naive.resident.extend(offset / PAGE_SIZE..(end as u64).div_ceil(PAGE_SIZE));
                    }
                }
                Act::Touch { frame } => {
                    let fresh = object.grant(&supply, frame, false).unwrap().fresh;
                    let absent = naive.resident.insert(frame);
                    // A block makes its neighbours too.
                    prop_assert!(fresh == absent || (blocks && absent));
                }
                Act::Punch { start, count } => {
                    let outcome = object.punch(&supply, start, count);
                    prop_assert_eq!(outcome.is_ok(), start + count <= FRAMES);
                    if outcome.is_ok() {
                        naive.bytes[(start * PAGE_SIZE) as usize..((start + count) * PAGE_SIZE) as usize].fill(0);
                        naive.resident.retain(|frame| !(start..start + count).contains(frame));
                    }
                }
            }
            host.assert_exact(object);
            for frame in 0..FRAMES {
                let resident = object.is_resident(&host.machine, frame);
                let touched = naive.resident.contains(&frame);
                prop_assert!(resident == touched || (blocks && resident), "frame {}", frame);
            }
            prop_assert!(blocks || object.resident_frames() == naive.resident.len() as u64);
            for frame in [0, 1, 511, 512, 1023, 1024, 1099].into_iter().chain(naive.resident.iter().copied()) {
                let mut bytes = [0; PAGE_SIZE as usize];
                object.read(&host.supply(0), frame * PAGE_SIZE, &mut bytes).unwrap();
                let start = (frame * PAGE_SIZE) as usize;
                prop_assert!(bytes[..] == naive.bytes[start..start + bytes.len()], "frame {}", frame);
            }
            drop(pin);
            host.pool.reap(&host.epoch, 0, 100);
        }
        host.destroy(handle);
        prop_assert_eq!(host.pool.free_frames(), host.pool.total_frames());
    }
}
