//! Pages with tags that leave memory and come back: bytes and tags are the same however they went (INV-11, INV-12).

use std::collections::{BTreeMap, BTreeSet};
use std::vec;
use std::vec::Vec;

use entresol_machine::{Machine, Tags};
use proptest::prelude::*;

use crate::out_tests::{Device, FOREIGN};
use crate::tests::Host;
use crate::*;

/// Two nodes and a tail.
const FRAMES: u64 = 2 * 512 + 20;

fn tagged(host: &Host, policy: Policy) -> ObjectHandle {
    host.objects.create(&host.supply(0), Spec::Anonymous { frames: FRAMES, policy, tagged: true }).unwrap()
}

/// The tags that a guest finds where a page is in memory.
fn tags(host: &Host, handle: ObjectHandle, frame: u64) -> Tags {
    host.on(handle, |object, supply| {
        let grant = object.grant_waiting(supply, frame, false).unwrap();
        host.machine.load_tags(grant.frame(frame))
    })
}

/// What a guest's STG does to a page that is in memory: it needs write permission, as every store.
fn tag(host: &Host, handle: ObjectHandle, frame: u64, granule: usize, tag: u8) {
    host.on(handle, |object, supply| {
        let pfn = object.grant_waiting(supply, frame, true).unwrap().frame(frame);
        let mut tags = host.machine.load_tags(pfn);
        tags.set(granule, tag);
        host.machine.store_tags(pfn, &tags);
    });
}

/// The order of the origin's trap: out, in for a read, out again with nothing to write, in.
#[test]
fn tags_come_back_as_often_as_the_page_does() {
    let host = Host::new(64);
    let mut device = Device::new(&host, 4);
    let handle = tagged(&host, Policy::Pages);
    host.put(handle, 3, 7).unwrap();
    tag(&host, handle, 3, 200, 0xa);
    let before = tags(&host, handle, 3);
    assert!(device.put_out(&host, handle, 3));
    for _ in 0..3 {
        device.bring(&host, handle, 3);
        assert_eq!((host.byte(handle, 3), tags(&host, handle, 3)), (7, before));
        assert!(!device.begin(&host, handle, 3).unwrap(), "the place is still right: nothing to write");
        assert!(host.on(handle, |object, supply| object.discard(supply, 3)));
        assert_eq!(device.taken(&host), 1);
    }
    device.bring(&host, handle, 3);
    tag(&host, handle, 3, 0, 0xb);
    assert_eq!(device.taken(&host), 0, "a tag that is stored makes the page dirty: its place went");
    device.holds.clear();
    assert!(device.put_out(&host, handle, 3));
    device.bring(&host, handle, 3);
    let after = tags(&host, handle, 3);
    assert_eq!((after.get(0), after.get(200), host.byte(handle, 3)), (0xb, 0xa, 7));
    host.destroy(handle);
    assert_eq!(host.pool.stores().close(device.store), Ok(()));
    assert_eq!(host.pool.free_frames(), host.pool.total_frames());
}

/// A place that had tags is another page's without.
#[test]
fn a_place_has_tags_only_for_a_page_that_has() {
    let host = Host::new(128);
    let mut device = Device::new(&host, 1);
    let (plain, with) = (host.anonymous(FRAMES, Policy::Pages), tagged(&host, Policy::Pages));
    for handle in [with, plain, with, plain] {
        host.put(handle, 3, 7).unwrap();
        assert!(device.put_out(&host, handle, 3));
        let (_, held) = device.holds[&0];
        assert_eq!(held.is_some(), handle == with);
        device.bring(&host, handle, 3);
        assert_eq!(host.byte(handle, 3), 7);
        assert!(handle == plain || tags(&host, handle, 3) == Tags::ZERO);
        assert_eq!(host.on(handle, |object, supply| object.punch(supply, 3, 1)), Ok(1));
        assert_eq!(device.taken(&host), 0);
    }
}

#[test]
fn a_store_with_tags_is_for_memory_with_tags() {
    let host = Host::new(128);
    let stores = host.pool.stores();
    let (plain, with) = (host.anonymous(FRAMES, Policy::Pages), tagged(&host, Policy::Pages));
    let (bytes, both) = (stores.open(4).unwrap(), stores.open_tagged(4).unwrap());
    let put = |handle, store| host.on(handle, |object, supply| object.put_stored(supply, 9, StoreSlot::new(store, 1)));
    assert_eq!(put(plain, both), Err(PutError::Tags { object: false }));
    assert_eq!(put(with, bytes), Err(PutError::Tags { object: true }));
    assert_eq!((put(plain, bytes), put(with, both)), (Ok(()), Ok(())));
    let mut device = Device { store: both, holds: BTreeMap::from([(1, (7, Some(FOREIGN)))]), writing: Vec::new() };
    device.bring(&host, with, 9);
    assert_eq!((host.byte(with, 9), tags(&host, with, 9)), (7, FOREIGN));
    device.store = bytes;
    device.holds.insert(1, (8, None));
    device.bring(&host, plain, 9);
    assert_eq!(host.byte(plain, 9), 8);
    [with, plain].into_iter().for_each(|handle| host.destroy(handle));
    assert_eq!([bytes, both].map(|store| stores.close(store)), [Ok(()), Ok(())]);
}

#[derive(Clone, Debug)]
enum Act {
    Begin(u64),
    Finish(usize, bool),
    Discard(u64),
    PutOut(u64),
    Bring(u64),
    Write(u64, u8),
    Tag(u64, usize, u8),
    Punch(u64, u64),
    /// The frame of another joins this one.
    Merge(u64, usize, u64),
    Fork,
    Drop,
}

fn acts() -> impl Strategy<Value = Vec<(usize, Act)>> {
    let frame = || prop_oneof![508u64..516, 0u64..4];
    let act = prop_oneof![
        4 => frame().prop_map(Act::Begin),
        4 => (0usize..8, prop::bool::weighted(0.7)).prop_map(|(place, written)| Act::Finish(place, written)),
        4 => frame().prop_map(Act::Discard),
        5 => frame().prop_map(Act::PutOut),
        5 => frame().prop_map(Act::Bring),
        3 => (frame(), 0u8..3).prop_map(|(frame, byte)| Act::Write(frame, byte)),
        5 => (frame(), 0..Tags::GRANULES, 1u8..16).prop_map(|(frame, granule, tag)| Act::Tag(frame, granule, tag)),
        1 => (frame(), 0u64..30).prop_map(|(start, count)| Act::Punch(start, count)),
        3 => (frame(), 0usize..5, frame()).prop_map(|(frame, other, at)| Act::Merge(frame, other, at)),
        2 => Just(Act::Fork),
        1 => Just(Act::Drop),
    ];
    prop::collection::vec((0usize..5, act), 1..120)
}

/// One machine's memory, and what its own history gave it.
struct Member {
    handle: ObjectHandle,
    bytes: BTreeMap<u64, u8>,
    tags: BTreeMap<(u64, usize), u8>,
}

impl Member {
    fn new(handle: ObjectHandle) -> Self {
        Self { handle, bytes: BTreeMap::new(), tags: BTreeMap::new() }
    }

    fn expected(&self, frame: u64) -> (u8, Tags) {
        let mut tags = Tags::ZERO;
        for ((_, granule), tag) in self.tags.range((frame, 0)..(frame + 1, 0)) {
            tags.set(*granule, *tag);
        }
        (self.bytes.get(&frame).copied().unwrap_or(0), tags)
    }

    fn act(&mut self, host: &Host, device: &mut Device, act: &Act) {
        match *act {
            Act::Begin(frame) => {
                let full = Err(OutError::Store(StoreError::Full { store: device.store }));
                let begun = device.begin(host, self.handle, frame);
                assert!(begun.is_ok() || begun == full);
            }
            Act::Finish(place, written) if !device.writing.is_empty() => {
                device.finish(host, place % device.writing.len(), written);
            }
            Act::Discard(frame) => {
                host.on(self.handle, |object, supply| object.discard(supply, frame));
            }
            Act::PutOut(frame) => {
                device.put_out(host, self.handle, frame);
            }
            Act::Bring(frame) => device.bring(host, self.handle, frame),
            Act::Write(frame, byte) => {
                device.bring(host, self.handle, frame);
                host.put(self.handle, frame, byte).unwrap();
                self.bytes.insert(frame, byte);
            }
            Act::Tag(frame, granule, value) => {
                device.bring(host, self.handle, frame);
                tag(host, self.handle, frame, granule, value);
                self.tags.insert((frame, granule), value);
            }
            Act::Punch(start, count) => {
                host.on(self.handle, |object, supply| object.punch(supply, start, count)).unwrap();
                self.bytes.retain(|frame, _| !(start..start + count).contains(frame));
                self.tags.retain(|(frame, _), _| !(start..start + count).contains(frame));
            }
            Act::Finish(..) | Act::Merge(..) | Act::Fork | Act::Drop => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn bytes_and_tags_are_the_same_wherever_the_page_is(
        policy in prop_oneof![Just(Policy::Pages), Just(Policy::Blocks)],
        places in prop_oneof![Just(3u64), Just(64)],
        acts in acts(),
    ) {
        let host = Host::new(8 * 512);
        let mut device = Device::new(&host, places);
        // Two that are no relatives.
        let mut all: Vec<Member> = (0..2).map(|_| Member::new(tagged(&host, policy))).collect();
        all.iter().for_each(|member| host.on(member.handle, |object, _| object.take_part()));
        for (who, act) in acts {
            let (who, count) = (who % all.len(), all.len());
            match act {
                Act::Merge(frame, other, at) => {
                    host.merge((all[who].handle, frame), (all[other % count].handle, at));
                }
                Act::Fork if count < 5 => {
                    let Member { bytes, tags, .. } = &all[who];
                    let (bytes, tags) = (bytes.clone(), tags.clone());
                    all.push(Member { handle: host.fork(all[who].handle), bytes, tags });
                }
                Act::Drop if count > 1 => host.destroy(all.swap_remove(who).handle),
                act => all[who].act(&host, &mut device, &act),
            }
        }
        while !device.writing.is_empty() {
            device.finish(&host, 0, true);
        }
        for member in &all {
            let known: BTreeSet<u64> = member.tags.keys().map(|(frame, _)| *frame).collect();
            for frame in known.into_iter().chain(member.bytes.keys().copied()).chain([0, 513, FRAMES - 1]) {
                device.bring(&host, member.handle, frame);
                let found = (host.byte(member.handle, frame), tags(&host, member.handle, frame));
                prop_assert_eq!(found, member.expected(frame), "frame {}", frame);
            }
        }
        all.into_iter().for_each(|member| host.destroy(member.handle));
        host.settle();
        prop_assert_eq!(host.pool.free_frames(), host.pool.total_frames());
        prop_assert_eq!(host.pool.stores().taken(device.store), Some(0));
        prop_assert_eq!(host.pool.stores().close(device.store), Ok(()));
    }
}
