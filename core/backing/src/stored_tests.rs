//! Pages that come from a store: against naive maps, fetches that fail, memory that runs out, and each other's CPUs.

use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;

use entresol_addr::{PAGE_SIZE, Pfn};
use proptest::prelude::*;

use crate::tests::{CPUS, Host};
use crate::*;

/// Two levels, and a tail.
const FRAMES: u64 = 2 * 512 + 20;
/// The byte of a page where `fork_tests` writes.
const AT: u64 = 5;

/// What place `index` of a store holds at [`AT`].
fn content(index: u64) -> u8 {
    (index * 7 + 3) as u8
}

impl Host {
    fn store(&self, slots: u64) -> StoreId {
        self.pool.stores().open(slots).unwrap()
    }

    fn put_stored(&self, handle: ObjectHandle, frame: u64, slot: StoreSlot) -> Result<(), PutError> {
        self.on(handle, |object, supply| object.put_stored(supply, frame, slot))
    }

    /// A frame filled from `slot`, as the keeper of the store would.
    fn fetch(&self, cpu: usize, slot: StoreSlot) -> Option<Fetch> {
        let supply = self.supply(cpu);
        let mut fetch = Fetch::new(&supply, slot).unwrap()?;
        let mut page = vec![0; PAGE_SIZE as usize];
        page[AT as usize] = content(slot.index());
        entresol_machine::Machine::write(&self.machine, fetch.pfn().base(), &page);
        fetch.filled(&supply, None);
        Some(fetch)
    }

    /// Fetches and puts in what frame `frame` waits for, as long as it waits.
    fn bring(&self, cpu: usize, handle: ObjectHandle, frame: u64) {
        loop {
            let pin = self.epoch.pin(cpu);
            let object = self.objects.get(&pin, handle).unwrap();
            let Some(slot) = object.stored_at(&self.machine, frame) else { return };
            drop(pin);
            let Some(fetch) = self.fetch(cpu, slot) else { continue };
            let pin = self.epoch.pin(cpu);
            self.objects.get(&pin, handle).unwrap().restore(&self.supply(cpu), frame, &fetch);
            fetch.give_back(&self.supply(cpu));
        }
    }

    /// Writes a byte, fetching first what has to be.
    fn write_fetching(&self, cpu: usize, handle: ObjectHandle, frame: u64, at: u64, byte: u8) {
        loop {
            let pin = self.epoch.pin(cpu);
            let object = self.objects.get(&pin, handle).unwrap();
            let outcome = object.write(&self.supply(cpu), frame * PAGE_SIZE + at, &[byte]);
            drop(pin);
            match outcome {
                Ok(()) => return,
                Err(AccessError::Stored { frame, .. }) => self.bring(cpu, handle, frame),
                Err(error) => assert_eq!(error, AccessError::Forking),
            }
        }
    }
}

#[test]
fn frames_stop_keeping_a_store_open_and_stay_what_they_are() {
    let host = Host::new(64);
    let handle = host.anonymous(FRAMES, Policy::Pages);
    let (store, other) = (host.store(10), host.store(10));
    for index in 0..6 {
        host.put_stored(handle, index, StoreSlot::new(if index < 4 { store } else { other }, index)).unwrap();
        host.bring(0, handle, index);
    }
    let references = |store| host.pool.stores().references(store).unwrap();
    assert_eq!((references(store), references(other)), (4, 2), "frames are known to hold the same");
    let mut from = Some(0);
    while let Some(index) = from {
        let _pin = host.epoch.pin(0);
        from = host.pool.stop_keeping_for(store, index, 7);
    }
    assert_eq!((references(store), references(other)), (0, 2));
    host.pool.stores().close(store).unwrap();
    for index in 0..6 {
        let mut byte = [0];
        host.on(handle, |object, supply| object.read(supply, index * PAGE_SIZE + AT, &mut byte)).unwrap();
        assert_eq!(byte, [content(index)]);
        host.write_fetching(0, handle, index, AT, 99);
    }
    assert_eq!(references(other), 0, "what was written is another");
}

#[test]
fn a_stored_page_is_waited_for_read_and_then_written() {
    let host = Host::new(64);
    let handle = host.anonymous(FRAMES, Policy::Blocks);
    let store = host.store(10);
    let slot = StoreSlot::new(store, 4);
    assert_eq!((slot.store(), slot.index()), (store, 4));
    host.put_stored(handle, 3, slot).unwrap();
    assert_eq!(host.pool.stores().close(store), Err(StoreError::InUse { references: 1 }));
    host.on(handle, |object, supply| {
        assert_eq!((object.resident_frames(), object.stored_at(&host.machine, 3)), (0, Some(slot)));
        for write in [false, true] {
            assert_eq!(object.grant(supply, 3, write), Err(GrantError::Stored { slot }));
        }
        assert_eq!(object.own(supply, 3), Err(GrantError::Stored { slot }));
        let stored = AccessError::Stored { frame: 3, slot };
        assert_eq!(object.read(&host.supply(0), 3 * PAGE_SIZE - 8, &mut [0; 16]), Err(stored));
        assert_eq!(object.write(supply, 3 * PAGE_SIZE, &[1]), Err(stored));
        assert_eq!(object.present(supply, 3), None);
        assert_eq!(object.grant(supply, 4, true).map(|grant| grant.writable), Ok(true));
    });
    let other = host.fetch(0, StoreSlot::new(store, 5)).unwrap();
    let fetch = host.fetch(0, slot).unwrap();
    let clean = host.on(handle, |object, supply| {
        assert!(!object.restore(supply, 3, &other) && !object.restore(supply, 4, &fetch));
        assert!(object.restore(supply, 3, &fetch) && !object.restore(supply, 3, &fetch), "once");
        let clean = object.grant(supply, 3, false).unwrap();
        assert_eq!((clean.pfn, clean.writable), (fetch.pfn(), false));
        assert_eq!(object.grant(supply, 3, true), Err(GrantError::Shared));
        clean
    });
    assert_eq!(host.byte(handle, 3), content(4));
    fetch.give_back(&host.supply(0));
    other.give_back(&host.supply(0));
    // The frame is known to hold what the place does.
    assert_eq!(host.pool.stores().references(store), Some(1));
    host.on(handle, |object, supply| {
        let own = object.own(supply, 3).unwrap();
        assert_eq!((own.pfn, own.writable), (clean.pfn, true), "nobody else has it");
        assert_eq!(object.grant(supply, 3, true), Ok(own));
    });
    assert_eq!(host.byte(handle, 3), content(4));
    assert_eq!(host.pool.stores().close(store), Ok(()));
    host.destroy(handle);
    assert_eq!(host.pool.free_frames(), host.pool.total_frames());
}

#[test]
fn who_writes_while_another_has_the_frame_gets_a_copy() {
    let host = Host::new(64);
    let (one, two) = (host.anonymous(100, Policy::Pages), host.anonymous(100, Policy::Pages));
    let store = host.store(1);
    let slot = StoreSlot::new(store, 0);
    host.put_stored(one, 3, slot).unwrap();
    host.put_stored(two, 7, slot).unwrap();
    // One reading for both.
    let fetch = host.fetch(0, slot).unwrap();
    for (handle, frame) in [(one, 3), (two, 7)] {
        assert!(host.on(handle, |object, supply| object.restore(supply, frame, &fetch)));
    }
    fetch.give_back(&host.supply(0));
    host.put(one, 3, 99).unwrap();
    assert_eq!((host.byte(one, 3), host.byte(two, 7)), (99, content(0)));
    assert_eq!(host.pool.stores().references(store), Some(1));
    host.put(two, 7, 98).unwrap();
    assert_eq!((host.byte(one, 3), host.byte(two, 7)), (99, 98));
    assert_eq!(host.pool.stores().references(store), Some(0));
    host.assert_exact_family(&[one, two]);
}

#[test]
fn relatives_share_what_is_stored_and_do_not_differ_in_it() {
    let host = Host::new(128);
    let parent = host.anonymous(FRAMES, Policy::Pages);
    let store = host.store(8);
    for frame in 0..4 {
        host.put_stored(parent, frame, StoreSlot::new(store, frame)).unwrap();
    }
    let child = host.fork(parent);
    assert!(host.differing(child, parent).is_empty());
    // The node is shared: a page that comes for one comes for both.
    host.bring(0, child, 0);
    assert_eq!((host.byte(parent, 0), host.byte(child, 0)), (content(0), content(0)));
    assert!(host.differing(child, parent).is_empty());
    // The node is copied: each fetches for itself, and still reads the same.
    host.write_fetching(0, child, 9, AT, 1);
    host.bring(0, child, 1);
    assert_eq!(host.differing(child, parent), [9].into());
    host.bring(0, parent, 1);
    assert_eq!(host.differing(child, parent), [9].into());
    host.write_fetching(0, child, 1, AT, content(1));
    host.write_fetching(0, parent, 2, AT, 77);
    assert_eq!(host.differing(child, parent), [1, 2, 9].into(), "what was written, even with the same");
    assert_eq!((host.byte(parent, 1), host.byte(parent, 2)), (content(1), 77));
    host.bring(0, child, 2);
    assert_eq!((host.byte(child, 1), host.byte(child, 2)), (content(1), content(2)));
    host.assert_exact_family(&[parent, child]);
    host.destroy(parent);
    host.bring(0, child, 3);
    assert_eq!(host.byte(child, 3), content(3));
    host.destroy(child);
    host.settle();
    assert_eq!(host.pool.free_frames(), host.pool.total_frames());
    assert_eq!(host.pool.stores().close(store), Ok(()));
}

#[test]
fn bad_places_are_refused_and_change_nothing() {
    let host = Host::new(64);
    let handle = host.anonymous(FRAMES, Policy::Blocks);
    let stores = host.pool.stores();
    for value in [0, (1 << 48) + 1, u64::MAX] {
        assert_eq!(stores.open(value), Err(StoreError::Slots { value, limit: 1 << 48 }));
    }
    let store = host.store(5);
    let beyond = StoreSlot::new(store, 5);
    assert_eq!(host.put_stored(handle, 0, beyond), Err(StoreError::Outside { slot: beyond, slots: 5 }.into()));
    let outside = GrantError::Outside { frame: FRAMES, frames: FRAMES };
    let slot = StoreSlot::new(store, 0);
    assert_eq!(host.put_stored(handle, FRAMES, slot), Err(PutError::Grant(outside)));
    host.put(handle, 1, 1).unwrap();
    host.put_stored(handle, 2, slot).unwrap();
    for frame in [1, 2] {
        assert_eq!(host.put_stored(handle, frame, slot), Err(PutError::Occupied { frame }));
    }
    let device = host.objects.create(&host.supply(0), Spec::Device { first: Pfn::new(8), frames: 4 }).unwrap();
    assert_eq!(host.put_stored(device, 0, slot), Err(PutError::Kind { kind: Kind::Device }));
    host.on(handle, |object, supply| assert_eq!(object.punch(supply, 0, FRAMES), Ok(2)));
    assert_eq!(stores.close(store), Ok(()));
    assert_eq!((stores.close(store), stores.references(store)), (Err(StoreError::Unknown { store }), None));
    assert_eq!(host.put_stored(handle, 2, slot), Err(StoreError::Unknown { store }.into()));
    assert!(Fetch::new(&host.supply(0), slot).unwrap().is_none(), "nobody waits");
    let all: Vec<_> = (0..MAX_STORES).map(|_| host.store(1)).collect();
    assert_eq!(stores.open(1), Err(StoreError::TooMany));
    all.into_iter().for_each(|store| stores.close(store).unwrap());
    host.destroy(device);
    host.destroy(handle);
    assert_eq!(host.pool.free_frames(), host.pool.total_frames());
}

/// CPUs that bring pages in place below what is shared, while others copy and free the nodes that they are in.
#[test]
fn pages_come_in_place_while_their_nodes_are_copied() {
    let host = Host::new(16 * 512);
    let store = host.store(FRAMES);
    for round in 0..6 {
        let parent = host.anonymous(FRAMES, Policy::Pages);
        for frame in 0..FRAMES {
            host.put_stored(parent, frame, StoreSlot::new(store, frame)).unwrap();
        }
        let children: Vec<_> = (1..CPUS).map(|_| host.fork(parent)).collect();
        std::thread::scope(|scope| {
            for cpu in 1..CPUS {
                let (host, children) = (&host, &children);
                scope.spawn(move || {
                    for step in 0..400 {
                        let frame = (step * 31 + cpu as u64) % FRAMES;
                        // Of one that each shares with the next, and of what all share.
                        host.bring(cpu, parent, frame);
                        host.write_fetching(cpu, children[cpu - 1], frame, 16 + cpu as u64, step as u8);
                        host.write_fetching(cpu, children[0], frame, 32 + cpu as u64, step as u8);
                        if step % 32 == 0 {
                            host.supply(cpu).reclaim(4);
                            host.pool.reap(&host.epoch, cpu, 64);
                        }
                    }
                });
            }
            for round in 0..20 {
                let Ok(child) = host.objects.fork(&host.supply(0), &host.epoch, children[round % 3]) else { continue };
                host.write_fetching(0, child, round as u64, AT, 1);
                host.on(child, |object, supply| object.punch(supply, 100, 600)).unwrap();
                host.destroy(child);
            }
        });
        for handle in children.iter().chain([&parent]) {
            for frame in (0..FRAMES).step_by(3) {
                host.bring(0, *handle, frame);
                assert_eq!(host.byte(*handle, frame), content(frame), "round {round}, frame {frame}");
            }
        }
        let family: Vec<_> = children.iter().copied().chain([parent]).collect();
        host.assert_exact_family(&family);
        family.into_iter().for_each(|handle| host.destroy(handle));
        host.settle();
        assert_eq!(host.pool.free_frames(), host.pool.total_frames());
        assert_eq!(host.pool.stores().references(store), Some(0));
    }
}

#[derive(Clone, Debug)]
enum Act {
    Store {
        member: usize,
        frame: u64,
        index: u64,
    },
    Bring {
        member: usize,
        frame: u64,
    },
    /// A reading that fails.
    Fail {
        member: usize,
        frame: u64,
    },
    /// One reading for every relative that waits for the same.
    BringAll {
        member: usize,
        frame: u64,
    },
    Write {
        member: usize,
        frame: u64,
        byte: u8,
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
}

fn any_act() -> impl Strategy<Value = Act> {
    let frame = || prop_oneof![500u64..520, 0u64..4];
    let member = || 0usize..6;
    prop_oneof![
        6 => (member(), frame(), 0u64..9).prop_map(|(member, frame, index)| Act::Store { member, frame, index }),
        4 => (member(), frame()).prop_map(|(member, frame)| Act::Bring { member, frame }),
        1 => (member(), frame()).prop_map(|(member, frame)| Act::Fail { member, frame }),
        2 => (member(), frame()).prop_map(|(member, frame)| Act::BringAll { member, frame }),
        4 => (member(), frame(), 1u8..).prop_map(|(member, frame, byte)| Act::Write { member, frame, byte }),
        1 => (member(), frame(), 0u64..30).prop_map(|(member, start, count)| Act::Punch { member, start, count }),
        2 => member().prop_map(|member| Act::Fork { member }),
        1 => member().prop_map(|member| Act::Drop { member }),
    ]
}

/// A relative: its handle, its bytes by frame, and the number of each frame's last change.
struct Member {
    handle: ObjectHandle,
    bytes: BTreeMap<u64, u8>,
    changed: BTreeMap<u64, u64>,
}

impl Member {
    fn expected(&self, frame: u64) -> u8 {
        self.bytes.get(&frame).copied().unwrap_or(0)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn stored_pages_read_as_what_was_stored(acts in prop::collection::vec(any_act(), 1..80)) {
        let host = Host::new(4 * 512);
        let store = host.store(9);
        let handle = host.anonymous(FRAMES, Policy::Pages);
        let mut family = vec![Member { handle, bytes: BTreeMap::new(), changed: BTreeMap::new() }];
        for (now, act) in (1u64..).zip(acts) {
            let count = family.len();
            match act {
                Act::Store { member, frame, index } => {
                    let member = &mut family[member % count];
                    if host.put_stored(member.handle, frame, StoreSlot::new(store, index)).is_ok() {
                        prop_assert!(!member.bytes.contains_key(&frame));
                        member.bytes.insert(frame, content(index));
                        member.changed.insert(frame, now);
                    }
                }
                Act::Bring { member, frame } => {
                    let member = &family[member % count];
                    host.bring(0, member.handle, frame);
                    prop_assert_eq!(host.byte(member.handle, frame), member.expected(frame));
                }
                Act::Fail { member, frame } => {
                    let handle = family[member % count].handle;
                    if let Some(slot) = host.on(handle, |object, _| object.stored_at(&host.machine, frame)) {
                        Fetch::new(&host.supply(0), slot).unwrap().unwrap().give_back(&host.supply(0));
                    }
                }
                Act::BringAll { member, frame } => {
                    let handle = family[member % count].handle;
                    let slot = host.on(handle, |object, _| object.stored_at(&host.machine, frame));
                    if let Some(fetch) = slot.and_then(|slot| host.fetch(0, slot)) {
                        for member in &family {
                            host.on(member.handle, |object, supply| object.restore(supply, frame, &fetch));
                        }
                        fetch.give_back(&host.supply(0));
                    }
                }
                Act::Write { member, frame, byte } => {
                    let member = &mut family[member % count];
                    host.write_fetching(0, member.handle, frame, AT, byte);
                    member.bytes.insert(frame, byte);
                    member.changed.insert(frame, now);
                }
                Act::Punch { member, start, count: frames } => {
                    let member = &mut family[member % count];
                    host.on(member.handle, |object, supply| object.punch(supply, start, frames)).unwrap();
                    member.bytes.retain(|frame, _| !(start..start + frames).contains(frame));
                    member.changed.extend((start..start + frames).map(|frame| (frame, now)));
                }
                Act::Fork { member } if count < 6 => {
                    let parent = &family[member % count];
                    let handle = host.fork(parent.handle);
                    let child = Member { handle, bytes: parent.bytes.clone(), changed: parent.changed.clone() };
                    family.push(child);
                }
                Act::Drop { member } if count > 1 => {
                    let member = family.swap_remove(member % count);
                    host.destroy(member.handle);
                }
                Act::Fork { .. } | Act::Drop { .. } => {}
            }
        }
        let handles: Vec<_> = family.iter().map(|member| member.handle).collect();
        host.assert_exact_family(&handles);
        for (one, other) in family.iter().zip(family.iter().skip(1)) {
            let differing = host.differing(one.handle, other.handle);
            for frame in (0..4).chain(500..550) {
                let (differs, changed) = (differing.contains(&frame), one.changed.get(&frame) != other.changed.get(&frame));
                prop_assert!(differs || one.expected(frame) == other.expected(frame), "frame {} is missed", frame);
                prop_assert!(changed || !differs, "frame {} did not change", frame);
            }
        }
        for member in &family {
            for frame in (0..4).chain(500..550) {
                host.bring(0, member.handle, frame);
                prop_assert_eq!(host.byte(member.handle, frame), member.expected(frame), "frame {}", frame);
            }
        }
        host.assert_exact_family(&handles);
        handles.into_iter().for_each(|handle| host.destroy(handle));
        host.settle();
        prop_assert_eq!(host.pool.free_frames(), host.pool.total_frames());
        prop_assert_eq!(host.pool.stores().close(store), Ok(()));
    }
}
