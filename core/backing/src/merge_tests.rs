//! Merged pages against naive maps: of one object, of several that are no relatives, and of relatives, with memory that
//! runs out.

use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;

use entresol_addr::PAGE_SIZE;
use proptest::prelude::*;

use crate::fork_tests::FRAMES;
use crate::tests::Host;
use crate::*;

/// A page of one object, by its frame.
type Place = (ObjectHandle, u64);

impl Host {
    fn taking_part(&self, policy: Policy) -> ObjectHandle {
        let handle = self.anonymous(FRAMES, policy);
        self.on(handle, |object, _| object.take_part());
        handle
    }

    /// What a scanner does for a pair: breaks blocks, keeps the one, has the other join it.
    pub(crate) fn merge(&self, offered: Place, joins: Place) -> Merged {
        for (handle, frame) in [offered, joins] {
            if self.on(handle, |object, supply| object.break_block(supply, frame)).is_err() {
                return Merged::Gone;
            }
        }
        self.on(offered.0, |object, supply| object.offer(supply, offered.1));
        let pin = self.epoch.pin(0);
        let get = |handle| self.objects.get(&pin, handle).unwrap();
        let supply = self.supply(0);
        match get(offered.0).hold_offered(&supply, offered.1) {
            Some(frame) => get(joins.0).join(&supply, joins.1, frame),
            None => Merged::Gone,
        }
    }

    fn standing(&self, (handle, frame): Place) -> Standing {
        self.on(handle, |object, supply| object.standing(supply, frame))
    }

    fn free(&self) -> u64 {
        self.settle();
        self.pool.free_frames()
    }
}

#[test]
fn strangers_become_one_frame_and_part_by_writing() {
    let host = Host::new(64);
    let (one, other) = (host.taking_part(Policy::Pages), host.taking_part(Policy::Pages));
    for (handle, frame) in [(one, 7), (other, 1000), (other, 1001)] {
        host.put(handle, frame, 5).unwrap();
    }
    let before = host.free();
    assert_eq!(host.merge((one, 7), (other, 1000)), Merged::Done);
    assert_eq!(host.merge((one, 7), (other, 1001)), Merged::Done, "also twice in one object");
    assert_eq!(host.free() - before, 2);
    let Standing::Offered(shared) = host.standing((one, 7)) else { panic!("{:?}", host.standing((one, 7))) };
    for place in [(other, 1000), (other, 1001)] {
        assert_eq!(host.standing(place), Standing::Offered(shared));
        host.on(place.0, |object, supply| {
            assert_eq!(object.grant(supply, place.1, true), Err(GrantError::Shared));
            assert!(!object.grant(supply, place.1, false).unwrap().writable);
        });
    }
    assert_eq!(host.merge((one, 7), (other, 1000)), Merged::Gone, "it is joined");
    host.put(other, 1000, 6).unwrap();
    assert_eq!([host.byte(one, 7), host.byte(other, 1000), host.byte(other, 1001)], [5, 6, 5]);
    host.assert_exact_family(&[one, other]);
    // The one that was offered goes first.
    host.destroy(one);
    assert_eq!([host.byte(other, 1000), host.byte(other, 1001)], [6, 5]);
    host.assert_exact_family(&[other]);
    host.destroy(other);
    assert_eq!(host.free(), host.pool.total_frames());
}

#[test]
fn only_equal_own_pages_of_memory_are_merged() {
    let host = Host::new(2048);
    let one = host.taking_part(Policy::Pages);
    host.put(one, 1, 5).unwrap();
    host.put(one, 2, 6).unwrap();
    assert_eq!(host.merge((one, 1), (one, 2)), Merged::Differs);
    assert_eq!(host.merge((one, 1), (one, 3)), Merged::Gone, "nothing is there");
    assert_eq!(host.merge((one, 3), (one, 1)), Merged::Gone, "nothing can be offered");
    let child = host.fork(one);
    assert_eq!(host.standing((one, 1)), Standing::Other, "relatives share the way to it");
    assert_eq!(host.merge((child, 1), (child, 1)), Merged::Gone);
    let device = host.objects.create(&host.supply(0), Spec::Device { first: entresol_addr::Pfn::new(16), frames: 8 });
    let device = device.unwrap();
    host.on(device, |object, supply| {
        object.take_part();
        assert_eq!(object.standing(supply, 0), Standing::Other);
        assert_eq!(object.span(&host.machine, 0), Span::Nothing { next: u64::MAX });
        assert!(!object.offer(supply, 0) && object.hold_offered(supply, 0).is_none());
        assert_eq!((object.vacate(supply, 0), object.vacate_block(supply, 0)), (Merged::Gone, Merged::Gone));
        assert_eq!(object.break_block(supply, 0), Ok(false));
    });
    [one, child, device].into_iter().for_each(|handle| host.destroy(handle));
    assert_eq!(host.free(), host.pool.total_frames());
}

#[test]
fn zeros_become_vacant_pages_and_whole_blocks() {
    let host = Host::new(8 * 512);
    let handle = host.taking_part(Policy::Blocks);
    host.put(handle, 3, 0).unwrap();
    host.put(handle, 600, 1).unwrap();
    host.on(handle, |object, supply| {
        assert_eq!((object.span(&host.machine, 0), object.resident_frames()), (Span::Block, 1024));
        assert_eq!(object.vacate(supply, 3), Merged::Gone, "a block is not a page");
        assert_eq!(object.vacate_block(supply, 3), Merged::Done);
        assert_eq!(object.vacate_block(supply, 600), Merged::Differs);
        assert_eq!(object.break_block(supply, 600), Ok(true));
        assert_eq!((object.vacate(supply, 600), object.vacate(supply, 601)), (Merged::Differs, Merged::Done));
        assert_eq!((object.span(&host.machine, 512), object.resident_frames()), (Span::Pages, 511));
        let zero = object.grant(supply, 601, false).unwrap();
        assert!(host.pool.is_zero_page(zero.pfn) && !zero.writable);
    });
    assert_eq!([host.byte(handle, 3), host.byte(handle, 600), host.byte(handle, 601)], [0, 1, 0]);
    host.assert_exact_family(&[handle]);
    host.destroy(handle);
}

/// Each frame takes so many pages and no more, so a count cannot overflow.
#[test]
fn a_frame_is_joined_by_a_bounded_number_of_pages() {
    let host = Host::new(2048);
    let handle = host.taking_part(Policy::Pages);
    (0..200).for_each(|frame| host.put(handle, frame, 5).unwrap());
    let joined = (1..200).filter(|frame| host.merge((handle, 0), (handle, *frame)) == Merged::Done).count();
    assert_eq!(joined, 128);
    host.assert_exact_family(&[handle]);
    host.destroy(handle);
    assert_eq!(host.free(), host.pool.total_frames());
}

#[derive(Clone, Debug)]
enum Act {
    Write { at: usize, frame: u64, byte: u8 },
    Touch { at: usize, frame: u64 },
    Punch { at: usize, start: u64, count: u64 },
    Merge { offered: (usize, u64), joins: (usize, u64) },
    Vacate { at: usize, frame: u64 },
    VacateBlock { at: usize, frame: u64 },
    Fork { at: usize },
    Drop { at: usize },
    Starve { spare: u64 },
}

fn any_act() -> impl Strategy<Value = Act> {
    let at = || 0usize..8;
    let frame = || prop_oneof![3 => 0u64..4, 2 => 510u64..514, 1 => 0..FRAMES];
    prop_oneof![
        6 => (at(), frame(), 0u8..3).prop_map(|(at, frame, byte)| Act::Write { at, frame, byte }),
        1 => (at(), frame()).prop_map(|(at, frame)| Act::Touch { at, frame }),
        1 => (at(), frame(), 0u64..600).prop_map(|(at, start, count)| Act::Punch { at, start, count }),
        6 => ((at(), frame()), (at(), frame())).prop_map(|(offered, joins)| Act::Merge { offered, joins }),
        2 => (at(), frame()).prop_map(|(at, frame)| Act::Vacate { at, frame }),
        1 => (at(), frame()).prop_map(|(at, frame)| Act::VacateBlock { at, frame }),
        1 => at().prop_map(|at| Act::Fork { at }),
        1 => at().prop_map(|at| Act::Drop { at }),
        1 => (0u64..6).prop_map(|spare| Act::Starve { spare }),
    ]
}

/// One object: its handle, and its bytes by frame.
type Member = (ObjectHandle, BTreeMap<u64, u8>);

fn byte_of(member: &Member, frame: u64) -> u8 {
    member.1.get(&frame).copied().unwrap_or(0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Merging changes nothing that is read, happens exactly to pages that read the same, and loses no frame.
    #[test]
    fn merging_is_not_read(
        policy in prop_oneof![Just(Policy::Pages), Just(Policy::Blocks)],
        acts in prop::collection::vec(any_act(), 1..80),
    ) {
        let host = Host::new(20 * 512);
        let mut all: Vec<Member> = (0..3).map(|_| (host.taking_part(policy), BTreeMap::new())).collect();
        let mut hoard = Vec::new();
        for act in acts {
            let pick = |at: usize, all: &[Member]| at % all.len();
            match act {
                Act::Write { at, frame, byte } => {
                    let at = pick(at, &all);
                    if host.put(all[at].0, frame, byte).is_ok() {
                        all[at].1.insert(frame, byte);
                    }
                }
                Act::Touch { at, frame } => {
                    host.on(all[pick(at, &all)].0, |object, supply| {
                        let grant = object.grant(supply, frame, false);
                        assert!(matches!(grant, Ok(_) | Err(GrantError::OutOfMemory)), "{grant:?}");
                    });
                }
                Act::Punch { at, start, count } => {
                    let at = pick(at, &all);
                    if host.on(all[at].0, |object, supply| object.punch(supply, start, count)).is_ok() {
                        all[at].1.retain(|frame, _| !(start..start + count).contains(frame));
                    }
                }
                Act::Merge { offered, joins } => {
                    let (left, right) = (pick(offered.0, &all), pick(joins.0, &all));
                    let bytes = [byte_of(&all[left], offered.1), byte_of(&all[right], joins.1)];
                    match host.merge((all[left].0, offered.1), (all[right].0, joins.1)) {
                        Merged::Done => prop_assert_eq!(bytes[0], bytes[1]),
                        Merged::Differs => prop_assert!(bytes[0] != bytes[1]),
                        Merged::Gone => {}
                    }
                }
                Act::Vacate { at, frame } => {
                    let at = pick(at, &all);
                    match host.on(all[at].0, |object, supply| object.vacate(supply, frame)) {
                        Merged::Done => prop_assert_eq!(byte_of(&all[at], frame), 0),
                        Merged::Differs => prop_assert!(byte_of(&all[at], frame) != 0),
                        Merged::Gone => {}
                    }
                }
                Act::VacateBlock { at, frame } => {
                    let at = pick(at, &all);
                    let start = frame & !511;
                    let zeros = (start..start + 512).all(|frame| byte_of(&all[at], frame) == 0);
                    match host.on(all[at].0, |object, supply| object.vacate_block(supply, frame)) {
                        Merged::Done => prop_assert!(zeros),
                        Merged::Differs => prop_assert!(!zeros),
                        Merged::Gone => {}
                    }
                }
                Act::Fork { at } if all.len() < 6 => {
                    let parent = &all[pick(at, &all)];
                    if let Ok(handle) = host.objects.fork(&host.supply(0), &host.epoch, parent.0) {
                        let child = (handle, parent.1.clone());
                        all.push(child);
                    }
                }
                Act::Drop { at } if all.len() > 1 => {
                    let member = all.swap_remove(pick(at, &all));
                    host.destroy(member.0);
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
        let handles: Vec<_> = all.iter().map(|member| member.0).collect();
        host.assert_exact_family(&handles);
        for member in &all {
            let mut page = vec![0; PAGE_SIZE as usize];
            for frame in 0..FRAMES {
                host.on(member.0, |object, supply| object.read(supply, frame * PAGE_SIZE, &mut page).unwrap());
                let mut expected = vec![0; PAGE_SIZE as usize];
                expected[5] = byte_of(member, frame);
                prop_assert_eq!(&page, &expected, "frame {}", frame);
            }
        }
        handles.into_iter().for_each(|handle| host.destroy(handle));
        prop_assert_eq!(host.free(), host.pool.total_frames());
    }
}
