//! Private objects: absent from the first moment, reached by windows and leases only, zero for whoever comes next. The
//! flat machine panics on any access to an absent frame, so every test here shows INV-10 from that side, too.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::vec;
use std::vec::Vec;

use entresol_addr::{Hpa, PAGE_SIZE, Pfn};
use entresol_machine::Machine;
use entresol_machine::flat::Event;
use entresol_machine::own::Work;

use crate::tests::Host;
use crate::{AccessError, Audit, GrantError, LeaseError, ObjectHandle, Policy, Spec, audit};

const POLICIES: [Policy; 3] = [Policy::Pages, Policy::Blocks, Policy::WholeBlocks];

impl Host {
    pub(crate) fn private(&self, frames: u64, policy: Policy) -> ObjectHandle {
        self.objects.create(&self.supply(0), Spec::Private { frames, policy }).unwrap()
    }

    pub(crate) fn set(&self, handle: ObjectHandle, frame: u64, bytes: &[u8]) {
        self.on(handle, |object, supply| object.write(supply, frame * PAGE_SIZE + 7, bytes).unwrap());
    }

    pub(crate) fn get(&self, handle: ObjectHandle, frame: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; len];
        self.on(handle, |object, supply| object.read(supply, frame * PAGE_SIZE + 7, &mut bytes).unwrap());
        bytes
    }

    pub(crate) fn frame_of(&self, handle: ObjectHandle, frame: u64) -> Pfn {
        self.on(handle, |object, supply| object.grant(supply, frame, false).unwrap().frame(frame))
    }

    /// Everything that was given back is free, and zero.
    pub(crate) fn settle_private(&self) {
        loop {
            let reclaimed = self.supply(0).reclaim(64) as u64;
            let reaped = self.pool.reap(&self.epoch, 0, usize::MAX);
            if reclaimed + reaped + self.supply(0).scrub(64) == 0 {
                return;
            }
        }
    }

    pub(crate) fn audit(&self) -> Audit {
        audit(&self.supply(0), &self.objects, &self.epoch.pin(0))
    }
}

#[test]
fn a_private_page_is_absent_from_before_it_is_granted() {
    for policy in POLICIES {
        let host = Host::new(4 * 512);
        let handle = host.private(600, policy);
        let pfn = host.frame_of(handle, 3);
        assert!(host.pool.is_private(pfn) && !host.machine.is_mapped_own(pfn), "{policy:?}");
        host.set(handle, 3, b"secret");
        assert_eq!(host.get(handle, 3, 6), b"secret");
        assert_eq!(host.get(handle, 4, 2), [0, 0], "untouched");
        host.set(handle, 599, &[9; 4000]);
        let audit = host.audit();
        assert_eq!((audit.wrong, audit.leased, audit.stuck), (0, 0, 0), "{audit:?}");
        assert!(audit.pages >= 2 && audit.private >= 512, "{audit:?}");
    }
}

#[test]
fn absence_is_complete_before_the_frame_is_anybodys() {
    let host = Host::new(2 * 512);
    let handle = host.private(4, Policy::Pages);
    host.machine.events();
    host.frame_of(handle, 0);
    let events = host.machine.events();
    let own: Vec<_> = events.iter().filter(|event| !matches!(event, Event::Word(..))).collect();
    let is = |index: usize, what: fn(&Event) -> bool| own.get(index).is_some_and(|event| what(event));
    assert!(is(0, |event| matches!(event, Event::Zero(frames) if frames.count() == 512)), "{own:?}");
    assert!(is(1, |event| matches!(event, Event::UnmapOwn(_))), "{own:?}");
    assert!(is(2, |event| matches!(event, Event::Tlb(entresol_machine::TlbOp::Own(_)))), "{own:?}");
    assert!(is(3, |event| *event == Event::Complete), "{own:?}");
}

#[test]
fn what_is_given_back_is_zero_and_mapped_again() {
    for policy in POLICIES {
        let host = Host::new(4 * 512);
        let free = host.pool.free_frames();
        let handle = host.private(700, policy);
        (0..700).for_each(|frame| host.set(handle, frame, &[0xa5; 64]));
        let frames: Vec<_> = (0..700).map(|frame| host.frame_of(handle, frame)).collect();
        host.destroy(handle);
        host.settle_private();
        assert_eq!((host.pool.free_frames(), host.pool.private_frames(), host.pool.dirty_frames()), (free, 0, 0));
        for pfn in frames {
            let mut bytes = [1; 4096];
            host.machine.read(pfn.base(), &mut bytes);
            assert_eq!(bytes, [0; 4096], "{policy:?}: frame {pfn:#x}");
        }
        assert_eq!(host.audit().wrong, 0);
    }
}

#[test]
fn the_next_private_owner_gets_zero_without_a_way_through_the_mapping() {
    let host = Host::new(2 * 512);
    let (one, other) = (host.private(2, Policy::Pages), host.private(1, Policy::Pages));
    host.set(one, 0, b"one's");
    host.set(one, 1, b"stays");
    let pfn = host.frame_of(one, 0);
    host.on(one, |object, supply| object.punch(supply, 0, 1).unwrap());
    host.settle_private();
    assert!(!host.machine.is_mapped_own(pfn), "its block is in use");
    assert_eq!(host.frame_of(other, 0), pfn, "the last that came is the first that goes");
    assert_eq!(host.get(other, 0, 5), [0; 5]);
    assert_eq!(host.get(one, 1, 5), b"stays");
}

#[test]
fn leases_are_counted() {
    let host = Host::new(2 * 512);
    let handle = host.private(1, Policy::Pages);
    let pfn = host.frame_of(handle, 0);
    let (machine, pool) = (&host.machine, &host.pool);
    let first = pool.lease(machine, pfn).unwrap();
    let second = pool.lease(machine, pfn).unwrap();
    assert!(machine.is_mapped_own(pfn));
    pool.release_lease(machine, first);
    machine.write(Hpa::new(pfn.base().get() + 8), b"by address");
    let mut bytes = [0; 10];
    pool.access(machine, pfn, Work::Read { at: 8, to: &mut bytes });
    assert_eq!(&bytes, b"by address");
    assert_eq!((host.audit().leased, host.audit().wrong), (1, 0));
    machine.events();
    pool.release_lease(machine, second);
    assert!(!machine.is_mapped_own(pfn));
    let frame = entresol_addr::PfnRange::single(pfn);
    let flushed = [Event::UnmapOwn(frame), Event::Tlb(entresol_machine::TlbOp::Own(frame)), Event::Complete];
    assert_eq!(machine.events(), flushed);
}

#[test]
fn a_late_release_does_nothing() {
    let host = Host::new(2 * 512);
    let handle = host.private(2, Policy::Pages);
    host.set(handle, 1, b"keeps the block private");
    let pfn = host.frame_of(handle, 0);
    host.set(handle, 0, b"old");
    let late = host.pool.lease(&host.machine, pfn).unwrap();
    host.on(handle, |object, supply| object.punch(supply, 0, 1).unwrap());
    host.settle_private();
    assert!(!host.machine.is_mapped_own(pfn), "the lease died with its frame");
    let other = host.private(1, Policy::Pages);
    assert_eq!(host.frame_of(other, 0), pfn);
    let lease = host.pool.lease(&host.machine, pfn).unwrap();
    host.pool.release_lease(&host.machine, late);
    assert!(host.machine.is_mapped_own(pfn), "another owner's");
    assert_eq!(host.get(other, 0, 3), [0; 3]);
    host.pool.release_lease(&host.machine, lease);
    assert!(!host.machine.is_mapped_own(pfn));
}

#[test]
fn a_failed_removal_does_not_count_as_absent_and_is_tried_again() {
    let host = Host::new(2 * 512);
    let handle = host.private(3, Policy::Pages);
    (0..3).for_each(|frame| host.set(handle, frame, b"secret"));
    let pfn = host.frame_of(handle, 0);
    let leave_stuck = || {
        let lease = host.pool.lease(&host.machine, pfn).unwrap();
        host.machine.fail_removals(3);
        host.pool.release_lease(&host.machine, lease);
        assert_eq!((host.pool.stuck_frames(), host.machine.is_mapped_own(pfn)), (1, true));
        let audit = host.audit();
        assert_eq!((audit.stuck, audit.wrong), (1, 0));
    };
    leave_stuck();
    host.supply(0).scrub(0);
    assert_eq!((host.pool.stuck_frames(), host.machine.is_mapped_own(pfn)), (0, false), "by housekeeping");
    leave_stuck();
    assert_eq!(host.get(handle, 0, 6), b"secret");
    assert_eq!((host.pool.stuck_frames(), host.machine.is_mapped_own(pfn)), (0, false), "by the next access");
    leave_stuck();
    let lease = host.pool.lease(&host.machine, pfn).unwrap();
    assert_eq!(host.pool.stuck_frames(), 0, "leased again: mapped by right");
    host.machine.fail_removals(6);
    host.on(handle, |object, supply| object.punch(supply, 0, 1).unwrap());
    host.pool.reap(&host.epoch, 0, usize::MAX);
    host.pool.reap(&host.epoch, 0, usize::MAX);
    assert_eq!(host.supply(0).scrub(8), 0, "it cannot leave");
    assert_eq!(host.pool.dirty_frames(), 1);
    assert_ne!(host.frame_of(handle, 0), pfn, "it is nobody's");
    host.settle_private();
    assert_eq!((host.pool.dirty_frames(), host.pool.stuck_frames(), host.audit().wrong), (0, 0, 0));
    host.pool.release_lease(&host.machine, lease);
    assert_eq!(host.audit().wrong, 0);
}

#[test]
fn a_machine_that_refuses_gives_no_private_memory_and_loses_no_frame() {
    let host = Host::new(512);
    let free = host.pool.free_frames();
    let handle = host.private(1, Policy::Pages);
    host.machine.fail_removals(1);
    let refused = host.on(handle, |object, supply| object.grant(supply, 0, true));
    assert_eq!(refused, Err(GrantError::OutOfMemory));
    host.destroy(handle);
    assert_eq!(host.pool.free_frames(), free);
}

#[test]
fn leases_have_a_limit_that_is_a_value() {
    let host = Host::new(2 * 512);
    let handle = host.private(1, Policy::Pages);
    let pfn = host.frame_of(handle, 0);
    let leases: Vec<_> = (0..4095).map(|_| host.pool.lease(&host.machine, pfn).unwrap()).collect();
    assert_eq!(host.pool.lease(&host.machine, pfn), Err(LeaseError::TooMany));
    leases.into_iter().for_each(|lease| host.pool.release_lease(&host.machine, lease));
    assert!(!host.machine.is_mapped_own(pfn));
}

#[test]
fn one_off_accesses_leave_nothing_mapped_by_either_way() {
    let host = Host::new(2 * 512);
    let handle = host.private(1, Policy::Pages);
    for in_place in [false, true] {
        host.pool.access_in_place(in_place);
        host.set(handle, 0, &[u8::from(in_place); 32]);
        host.machine.events();
        assert_eq!(host.get(handle, 0, 32), [u8::from(in_place); 32]);
        let events = host.machine.events();
        let flushes = events.iter().filter(|event| matches!(event, Event::Tlb(_))).count();
        assert_eq!(flushes, usize::from(in_place), "a window needs no broadcast");
        assert_eq!(host.audit().wrong, 0);
    }
}

#[test]
fn relatives_of_private_memory_are_private() {
    for policy in POLICIES {
        let host = Host::new(8 * 512);
        let free = host.pool.free_frames();
        let parent = host.private(1024, policy);
        (0..1024).step_by(100).for_each(|frame| host.set(parent, frame, b"before"));
        let child = host.objects.fork(&host.supply(0), &host.epoch, parent).unwrap();
        assert!(host.on(child, |object, _| object.is_private()));
        host.set(child, 100, b"child ");
        host.set(parent, 200, b"parent");
        assert_eq!((host.get(parent, 100, 6), host.get(child, 100, 6)), (b"before".to_vec(), b"child ".to_vec()));
        assert_eq!((host.get(parent, 200, 6), host.get(child, 200, 6)), (b"parent".to_vec(), b"before".to_vec()));
        let pfn = host.frame_of(child, 100);
        assert!(host.pool.is_private(pfn) && !host.machine.is_mapped_own(pfn));
        assert_eq!(host.audit().wrong, 0, "{policy:?}");
        host.destroy(parent);
        host.destroy(child);
        host.settle_private();
        assert_eq!((host.pool.free_frames(), host.pool.private_frames()), (free, 0), "{policy:?}");
    }
}

/// CPUs that touch, write, punch and lease pages of private objects whose blocks come and go, beside one that audits.
#[test]
fn traffic_keeps_every_frame_where_it_belongs() {
    const ROUNDS: u64 = 3_000;
    let host = Host::new(16 * 512);
    let written = AtomicU64::new(0);
    let free = host.pool.free_frames();
    let (start, handles) = (Barrier::new(3), [host.private(40, Policy::Pages), host.private(1024, Policy::Blocks)]);
    thread::scope(|scope| {
        for cpu in 1..3 {
            let (host, start, written) = (&host, &start, &written);
            scope.spawn(move || {
                start.wait();
                for round in 0..ROUNDS {
                    let (frame, handle) = (round * 7 % 40, handles[(round % 2) as usize]);
                    let (supply, pin) = (host.supply(cpu), host.epoch.pin(cpu));
                    let object = host.objects.get(&pin, handle).unwrap();
                    // The audit's pin keeps what is given back waiting, and there may be no more for a while.
                    match object.write(&supply, frame * PAGE_SIZE, &round.to_le_bytes()) {
                        Ok(()) => drop(written.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => assert_eq!(error, AccessError::OutOfMemory),
                    }
                    let pfn = object.present(&supply, frame).map(|grant| grant.frame(frame));
                    let lease = pfn.map(|pfn| host.pool.lease(&host.machine, pfn).unwrap());
                    if round % 5 == 0 {
                        object.punch(&supply, frame, 3).unwrap();
                    }
                    if let Some(lease) = lease {
                        host.pool.release_lease(&host.machine, lease);
                    }
                    drop(pin);
                    host.pool.reap(&host.epoch, cpu, 8);
                    supply.scrub(4);
                }
            });
        }
        start.wait();
        for _ in 0..50 {
            let audit = host.audit();
            assert_eq!(audit.wrong, 0, "{audit:?}");
        }
    });
    assert!(written.into_inner() > ROUNDS, "most writes find memory");
    handles.into_iter().for_each(|handle| host.destroy(handle));
    host.settle_private();
    assert_eq!((host.pool.free_frames(), host.pool.private_frames(), host.audit().wrong), (free, 0, 0));
}

#[test]
fn private_memory_is_not_put_into_a_store() {
    let host = Host::new(2 * 512);
    let handle = host.private(2, Policy::Pages);
    let store = host.pool.stores().open(4).unwrap();
    let slot = crate::StoreSlot::new(store, 1);
    let refused = host.on(handle, |object, supply| object.put_stored(supply, 0, slot));
    assert_eq!(refused, Err(crate::PutError::Private));
}

#[test]
fn private_memory_is_not_merged() {
    let host = Host::new(2 * 512);
    let handle = host.private(2, Policy::Pages);
    (0..2).for_each(|frame| host.set(handle, frame, b"the same"));
    host.on(handle, |object, supply| {
        assert_eq!(object.standing(supply, 0), crate::Standing::Other);
        assert!(!object.can_merge() && !object.offer(supply, 0), "nobody may join it");
    });
}
