//! Frames that are found to be bad: for whoever refers to them, in every kind of sharing, and never given out again.

use std::collections::{BTreeMap, BTreeSet};
use std::vec;
use std::vec::Vec;

use entresol_addr::{PAGE_SIZE, PageSize, Pfn};
use entresol_machine::Machine;
use entresol_machine::own::Work;
use proptest::prelude::*;

use crate::fork_tests::FRAMES;
use crate::out_tests::Device;
use crate::tests::Host;
use crate::*;

impl Host {
    /// Marks the frame behind a page, and seals it: nobody shows it here.
    fn poison(&self, handle: ObjectHandle, frame: u64) -> Result<Pfn, PoisonError> {
        let pfn = self.on(handle, |object, supply| object.poison(supply, frame))?;
        self.epoch.synchronize();
        self.pool.seal(&self.machine, pfn);
        Ok(pfn)
    }

    /// Every way to the page says that it is bad.
    fn assert_bad(&self, handle: ObjectHandle, frame: u64) {
        self.on(handle, |object, supply| {
            let poisoned = AccessError::Poisoned { frame };
            let (offset, whole) = (frame * PAGE_SIZE, vec![1; PAGE_SIZE as usize]);
            for write in [false, true] {
                assert_eq!(object.grant_waiting(supply, frame, write), Err(GrantError::Poisoned));
            }
            for write in [false, true] {
                assert_eq!(object.grant(supply, frame, write), Err(GrantError::Poisoned));
            }
            assert_eq!(object.own(supply, frame), Err(GrantError::Poisoned));
            assert_eq!(object.read(supply, offset + 8, &mut [0]), Err(poisoned));
            assert_eq!(object.write(supply, offset, &whole), Err(poisoned), "all of it");
            assert_eq!((object.tags(supply, frame), object.set_tags(supply, frame, &entresol_machine::Tags::ZERO)), {
                (Err(poisoned), Err(poisoned))
            });
            let populated = object.populate(supply, frame, 1);
            assert_eq!(populated, Err(PopulateError { done: 0, error: GrantError::Poisoned }));
            assert_eq!((object.present(supply, frame), object.is_resident(supply.machine, frame)), (None, true));
            assert_eq!(object.standing(supply, frame), Standing::Other);
            assert!(object.hold_offered(supply, frame).is_none());
            object.copy_ahead(supply, frame).unwrap().give_back(supply);
        });
        assert_eq!(self.poison(handle, frame), Err(PoisonError::Already));
    }

    /// Every frame that can be had, given back.
    fn everything(&self) -> BTreeSet<Pfn> {
        let frames: BTreeSet<_> = core::iter::from_fn(|| self.pool.take(0, Order::PAGE).ok()).collect();
        frames.iter().for_each(|pfn| self.pool.give(0, *pfn, Order::PAGE));
        frames
    }

    fn punch(&self, handle: ObjectHandle, frame: u64, count: u64) {
        self.on(handle, |object, supply| object.punch(supply, frame, count)).unwrap();
    }
}

#[test]
fn a_bad_page_is_made_anew_and_its_frame_is_never_seen_again() {
    for policy in [Policy::Pages, Policy::Blocks, Policy::WholeBlocks] {
        let host = Host::new(4 * 512);
        let free = host.pool.free_frames();
        let handle = host.anonymous(FRAMES, policy);
        for frame in [6, 7, 8] {
            host.put(handle, frame, 9).unwrap();
        }
        let bad = host.poison(handle, 7).unwrap();
        host.assert_bad(handle, 7);
        assert_eq!([6, 8].map(|frame| host.byte(handle, frame)), [9, 9], "{policy:?}: only the page");
        assert_eq!((host.pool.poisoned_frames(), host.pool.quarantined_frames()), (1, 0));
        host.assert_exact_family(&[handle]);
        host.punch(handle, 7, 1);
        assert_eq!((host.pool.poisoned_frames(), host.pool.quarantined_frames()), (1, 1));
        assert_eq!(host.byte(handle, 7), 0);
        host.put(handle, 7, 3).unwrap();
        assert_eq!(host.byte(handle, 7), 3);
        host.destroy(handle);
        host.settle();
        assert_eq!(host.pool.free_frames(), free - 1, "{policy:?}");
        assert!(!host.everything().contains(&bad));
        assert!(host.pool.take_at_hand(Order::BLOCK).is_some(), "other blocks are whole again");
    }
}

#[test]
fn what_has_no_frame_of_its_own_is_refused() {
    let host = Host::new(4 * 512);
    let mut device = Device::new(&host, 4);
    let handle = host.anonymous(FRAMES, Policy::Pages);
    host.put(handle, 3, 7).unwrap();
    assert!(device.put_out(&host, handle, 3));
    let outside = PoisonError::Outside { frame: FRAMES, frames: FRAMES };
    let refused = [(2, PoisonError::Untouched), (3, PoisonError::Stored), (FRAMES, outside)];
    for (frame, error) in refused {
        assert_eq!(host.poison(handle, frame), Err(error));
    }
    let child = host.fork(handle);
    assert_eq!(host.byte(child, 2), 0);
    assert_eq!(host.poison(child, 2), Err(PoisonError::Untouched), "not the zero page");
    let first = Pfn::new(1 << 20);
    for spec in [Spec::Device { first, frames: 2 }, Spec::Rom { first, frames: 2, owned: false }] {
        let handle = host.objects.create(&host.supply(0), spec).unwrap();
        let kind = host.on(handle, |object, _| object.kind());
        assert_eq!(host.poison(handle, 0), Err(PoisonError::Kind { kind }));
    }
    assert_eq!(host.pool.poisoned_frames(), 0);
    host.put(handle, 600, 1).unwrap();
    while host.pool.take(0, Order::PAGE).is_ok() {}
    host.poison(handle, 600).expect("a page needs no memory");
}

#[test]
fn a_block_that_cannot_be_split_stays_good() {
    let host = Host::new(2 * 512);
    let handle = host.anonymous(FRAMES, Policy::Blocks);
    host.put(handle, 5, 1).unwrap();
    let mut taken: Vec<_> = core::iter::from_fn(|| host.pool.take(0, Order::PAGE).ok()).collect();
    assert_eq!(host.poison(handle, 5), Err(PoisonError::OutOfMemory));
    assert_eq!((host.pool.poisoned_frames(), host.byte(handle, 5)), (0, 1));
    assert_eq!(host.on(handle, |object, supply| object.present(supply, 5).unwrap().size), PageSize::Size2M);
    host.pool.give(0, taken.pop().unwrap(), Order::PAGE);
    host.poison(handle, 5).unwrap();
    host.assert_bad(handle, 5);
}

#[test]
fn relatives_share_a_bad_page_until_each_has_given_it_back() {
    for policy in [Policy::Pages, Policy::Blocks, Policy::WholeBlocks] {
        let host = Host::new(8 * 512);
        let free = host.pool.free_frames();
        let parent = host.anonymous(FRAMES, policy);
        for frame in 0..10 {
            host.put(parent, frame, 4).unwrap();
        }
        let (one, other) = (host.fork(parent), host.fork(parent));
        host.put(one, 8, 5).unwrap();
        let bad = host.poison(other, 7).unwrap();
        // A block that was copied whole before is its own.
        let copied = policy == Policy::WholeBlocks;
        let sharers: &[_] = if copied { &[parent, other] } else { &[parent, one, other] };
        sharers.iter().for_each(|handle| host.assert_bad(*handle, 7));
        for handle in sharers {
            let near = host.on(*handle, |object, supply| object.grant(supply, 6, false).unwrap());
            assert_eq!((near.size, host.byte(*handle, 6)), (PageSize::Size4K, 4), "{policy:?}: the page alone");
            host.put(*handle, 6, 6).unwrap();
            assert_eq!(host.byte(*handle, 9), 4);
        }
        host.assert_exact_family(&[parent, one, other]);
        for (left, handle) in (0..sharers.len()).rev().zip(sharers) {
            assert_eq!(host.pool.quarantined_frames(), 0);
            if left.is_multiple_of(2) {
                host.punch(*handle, 7, 1)
            } else {
                host.punch(*handle, 0, 512)
            }
            assert_eq!(host.byte(*handle, 7), 0);
        }
        host.settle();
        assert_eq!(host.pool.quarantined_frames(), 1);
        [parent, one, other].into_iter().for_each(|handle| host.destroy(handle));
        host.settle();
        assert_eq!(host.pool.free_frames(), free - 1 - u64::from(host.pool.total_frames() != 8 * 512));
        assert!(!host.everything().contains(&bad));
    }
}

#[test]
fn strangers_that_became_one_share_a_bad_page_and_nobody_joins_it() {
    let host = Host::new(64);
    let [one, other] = [0; 2].map(|_| {
        let handle = host.anonymous(FRAMES, Policy::Pages);
        host.on(handle, |object, _| object.take_part());
        handle
    });
    for (handle, frame) in [(one, 7), (other, 1000), (other, 1001)] {
        host.put(handle, frame, 5).unwrap();
    }
    assert_eq!(host.merge((one, 7), (other, 1000)), Merged::Done);
    // Held by who is about to join it.
    let held = host.on(one, |object, supply| object.hold_offered(supply, 7)).unwrap();
    host.poison(other, 1000).unwrap();
    for (handle, frame) in [(one, 7), (other, 1000)] {
        host.assert_bad(handle, frame);
    }
    let joined = host.on(other, |object, supply| object.join(supply, 1001, held));
    assert_eq!((joined, host.byte(other, 1001)), (Merged::Differs, 5));
    host.destroy(one);
    host.assert_bad(other, 1000);
    host.destroy(other);
    host.settle();
    assert_eq!((host.pool.quarantined_frames(), host.pool.deferred_frames()), (1, 0));
}

#[test]
fn what_a_store_has_too_is_read_from_there_by_whoever_asks_it() {
    let host = Host::new(64);
    let mut device = Device::new(&host, 4);
    let parent = host.anonymous(FRAMES, Policy::Pages);
    host.put(parent, 3, 7).unwrap();
    assert!(device.put_out(&host, parent, 3));
    let child = host.fork(parent);
    device.bring(&host, parent, 3);
    // The child's word is the parent's: both have the frame by now. One writes another page, so that the paths part.
    host.put(child, 4, 1).unwrap();
    assert!(host.on(child, |object, supply| object.discard(supply, 3)));
    let slot = host.on(child, |object, supply| object.stored_at(supply.machine, 3)).unwrap();
    let late = host.on(child, |_, supply| Fetch::cached(supply, slot)).expect("the parent's frame");
    host.poison(parent, 3).unwrap();
    host.assert_bad(parent, 3);
    assert!(!host.on(child, |object, supply| object.restore(supply, 3, &late)), "it was on its way");
    late.give_back(&host.supply(0));
    assert!(host.on(child, |_, supply| Fetch::cached(supply, slot)).is_none());
    device.bring(&host, child, 3);
    assert_eq!(host.byte(child, 3), 7);
    // It never leaves for the store again; a writing that was on its way ends as any other.
    assert!(!device.begin(&host, parent, 3).unwrap() && !host.on(parent, |object, supply| object.discard(supply, 3)));
    host.put(child, 9, 2).unwrap();
    assert!(device.begin(&host, child, 9).unwrap());
    host.poison(child, 9).unwrap();
    device.finish(&host, 0, true);
    assert!(!host.on(child, |object, supply| object.discard(supply, 9)));
    host.assert_bad(child, 9);
    [parent, child].into_iter().for_each(|handle| host.destroy(handle));
    host.settle();
    assert_eq!((device.taken(&host), host.pool.quarantined_frames()), (0, 2));
    assert_eq!(host.pool.free_frames() + 2, host.pool.total_frames());
}

#[test]
fn a_private_frame_stays_absent_and_its_leases_die_with_it() {
    for open in [false, true] {
        let host = Host::new(4 * 512);
        let free = host.pool.free_frames();
        let handle = host.private(600, Policy::Pages);
        host.set(handle, 3, b"secret");
        host.set(handle, 4, b"stays");
        host.on(handle, |object, supply| object.convert(supply, 3, 1, open)).unwrap();
        let pfn = host.frame_of(handle, 3);
        let (machine, pool) = (&host.machine, &host.pool);
        let [first, late] = [0; 2].map(|_| pool.lease(machine, pfn).unwrap());
        assert!(machine.is_mapped_own(pfn));
        assert_eq!(host.poison(handle, 3), Ok(pfn));
        assert!(!machine.is_mapped_own(pfn), "open: {open}");
        host.assert_bad(handle, 3);
        pool.release_lease(machine, first);
        let audit = host.audit();
        assert_eq!((audit.poisoned, audit.wrong, audit.leased, audit.open), (1, 0, 0, 0), "{audit:?}");
        // The attribute is the page's, and not the frame's.
        host.on(handle, |object, supply| {
            assert_eq!(object.convert(supply, 2, 3, !open), Ok(if open { 1 } else { 3 }));
            assert_eq!(object.is_open(supply.machine, 3), !open);
            assert_eq!(object.convert(supply, 0, 600, false), Ok(if open { 0 } else { 3 }));
        });
        assert!(!machine.is_mapped_own(pfn));
        assert_eq!((host.audit().wrong, host.get(handle, 4, 5)), (0, b"stays".to_vec()));
        host.punch(handle, 3, 1);
        host.set(handle, 3, b"anew");
        assert!(host.frame_of(handle, 3) != pfn && host.get(handle, 3, 6) == *b"anew\0\0");
        host.destroy(handle);
        host.settle_private();
        pool.release_lease(machine, late);
        // Its block cannot be whole again: 511 frames wait for the next private owner.
        assert_eq!((pool.private_frames(), pool.free_frames(), pool.dirty_frames()), (512, free - 512, 0));
        let heir = host.private(600, Policy::Pages);
        let got: Vec<_> = (0..600).map(|frame| host.frame_of(heir, frame)).collect();
        assert!(!got.contains(&pfn) && !machine.is_mapped_own(pfn));
        let audit = host.audit();
        assert_eq!((audit.poisoned, audit.wrong, audit.private), (1, 0, 1024), "{audit:?}");
    }
}

#[test]
fn a_removal_that_fails_is_tried_again() {
    let host = Host::new(2 * 512);
    let handle = host.private(2, Policy::Pages);
    let pfn = host.frame_of(handle, 0);
    let lease = host.pool.lease(&host.machine, pfn).unwrap();
    host.machine.fail_removals(1000);
    host.poison(handle, 0).unwrap();
    let audit = host.audit();
    assert_eq!((audit.stuck, audit.poisoned, audit.wrong), (1, 1, 0), "{audit:?}");
    host.machine.fail_removals(0);
    host.settle_private();
    host.supply(0).scrub(1);
    assert_eq!((host.audit().stuck, host.machine.is_mapped_own(pfn)), (0, false));
    host.pool.release_lease(&host.machine, lease);
    let mut byte = [0];
    host.pool.access(&host.machine, host.frame_of(handle, 1), Work::Read { at: 0, to: &mut byte });
    assert_eq!(host.audit().wrong, 0);
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Write(u64, u8),
    Punch(u64, u64),
    Poison(u64),
    Fork,
    End,
}

fn act() -> impl Strategy<Value = (usize, Act)> {
    // Two spans, so that blocks are met in part.
    let frame = prop_oneof![0u64..6, 510u64..516];
    let act = prop_oneof![
        4 => (frame.clone(), 1u8..).prop_map(|(frame, byte)| Act::Write(frame, byte)),
        2 => (frame.clone(), 1u64..8).prop_map(|(frame, count)| Act::Punch(frame, count)),
        1 => (0u64..4, Just(512)).prop_map(|(frame, count)| Act::Punch(frame, count)),
        3 => frame.prop_map(Act::Poison),
        2 => Just(Act::Fork),
        1 => Just(Act::End),
    ];
    (0usize..4, act)
}

/// A page of the naive family: what it reads as, and which one of all pages that ever were it is. Sharers have the same.
type Page = (u8, u64);

proptest! {
    /// Every sequence of writes, holes, forks, ends and bad frames, against naive maps: each page reads as there or is bad for exactly those who
    /// share it, and every frame is somebody's, free, or in quarantine.
    #[test]
    fn a_family_knows_its_bad_pages(
        acts in prop::collection::vec(act(), 1..40), private in any::<bool>(),
    ) {
        const LONG: u64 = 520;
        let host = Host::new(12 * 512);
        let first = if private { host.private(LONG, Policy::Pages) } else { host.anonymous(LONG, Policy::Pages) };
        let mut family: Vec<(ObjectHandle, BTreeMap<u64, Page>)> = vec![(first, BTreeMap::new())];
        let (mut bad, mut pages) = (BTreeSet::new(), 0);
        for (who, act) in acts {
            let who = who % family.len();
            let room = family.len() < 4;
            let last = family.len() == 1;
            let (handle, naive) = &mut family[who];
            let handle = *handle;
            match act {
                Act::Write(frame, byte) => {
                    let is_bad = naive.get(&frame).is_some_and(|(_, page)| bad.contains(page));
                    let written = host.put(handle, frame, byte);
                    prop_assert_eq!(written, if is_bad { Err(AccessError::Poisoned { frame }) } else { Ok(()) });
                    if !is_bad {
                        pages += 1;
                        naive.insert(frame, (byte, pages));
                    }
                }
                Act::Punch(frame, count) => {
                    let count = count.min(LONG - frame);
                    host.punch(handle, frame, count);
                    naive.retain(|at, _| !(frame..frame + count).contains(at));
                }
                Act::Poison(frame) => {
                    let expected = match naive.get(&frame) {
                        None => Err(PoisonError::Untouched),
                        Some((_, page)) if !bad.insert(*page) => Err(PoisonError::Already),
                        Some(_) => Ok(()),
                    };
                    prop_assert_eq!(host.poison(handle, frame).map(drop), expected);
                }
                Act::Fork if room => {
                    let naive = naive.clone();
                    family.push((host.fork(handle), naive));
                }
                Act::End if !last => {
                    host.destroy(handle);
                    family.remove(who);
                }
                Act::Fork | Act::End => {}
            }
            prop_assert_eq!(host.pool.poisoned_frames(), bad.len() as u64);
        }
        for (handle, naive) in &family {
            for frame in (0..8).chain(508..LONG) {
                let mut byte = [0xee];
                let read = host.on(*handle, |object, supply| object.read(supply, frame * PAGE_SIZE + 5, &mut byte));
                match naive.get(&frame) {
                    Some((_, page)) if bad.contains(page) => prop_assert_eq!(read, Err(AccessError::Poisoned { frame })),
                    known => prop_assert_eq!((read, byte[0]), (Ok(()), known.map_or(0, |(byte, _)| *byte))),
                }
            }
        }
        let held: BTreeSet<_> = family.iter().flat_map(|(_, naive)| naive.values()).map(|(_, page)| *page).collect();
        host.settle_private();
        prop_assert_eq!(host.pool.quarantined_frames(), bad.difference(&held).count() as u64);
        prop_assert_eq!((host.audit().wrong, host.audit().poisoned), (0, bad.len() as u64));
        if !private {
            let handles: Vec<_> = family.iter().map(|(handle, _)| *handle).collect();
            host.assert_exact_family(&handles);
        }
        for (handle, _) in family {
            host.destroy(handle);
        }
        host.settle_private();
        let zero = u64::from(host.pool.total_frames() != 12 * 512);
        let kept = host.pool.private_frames().max(host.pool.quarantined_frames());
        prop_assert_eq!(host.pool.free_frames() + kept + zero, 12 * 512);
        prop_assert_eq!(host.pool.quarantined_frames(), bad.len() as u64);
    }

    /// The same of blocks, whose pages are bad one by one.
    #[test]
    fn blocks_have_bad_pages(
        acts in prop::collection::vec((0usize..3, 0u64..1024, 0u8..3), 1..30), whole in any::<bool>(),
    ) {
        let policy = if whole { Policy::WholeBlocks } else { Policy::Blocks };
        let host = Host::new(16 * 512);
        let parent = host.anonymous(1024, policy);
        host.put(parent, 0, 1).unwrap();
        host.put(parent, 600, 1).unwrap();
        let family = [parent, host.fork(parent), host.fork(parent)];
        for (who, frame, what) in acts {
            let is_bad = host.on(family[who], |object, supply| {
                object.is_resident(supply.machine, frame) && object.present(supply, frame).is_none()
            });
            match what {
                0 => prop_assert_eq!(host.put(family[who], frame, 2).is_err(), is_bad),
                1 => prop_assert_eq!(host.poison(family[who], frame).is_err(), is_bad || {
                    host.on(family[who], |object, supply| !object.is_resident(supply.machine, frame))
                }),
                _ => host.punch(family[who], frame, (1024 - frame).min(9)),
            }
        }
        for handle in family {
            let named: BTreeSet<_> = host.on(handle, |object, supply| {
                (0..1024).filter_map(|frame| object.present(supply, frame).map(|grant| grant.frame(frame))).collect()
            });
            prop_assert!(named.iter().all(|pfn| !host.pool.is_poisoned(*pfn)), "a bad frame is granted");
        }
        host.assert_exact_family(&family);
        let bad = host.pool.poisoned_frames();
        family.into_iter().for_each(|handle| host.destroy(handle));
        host.settle();
        prop_assert_eq!(host.pool.quarantined_frames(), bad);
        prop_assert_eq!(host.pool.free_frames() + bad, host.pool.total_frames());
    }
}
