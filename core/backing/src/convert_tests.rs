//! Pages of private memory that the guest shares and takes back: the frame follows the attribute, and what the page holds stays.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::vec;
use std::vec::Vec;

use entresol_addr::{Hpa, PAGE_SIZE, Pfn};
use entresol_machine::Machine;

use crate::tests::Host;
use crate::{AccessError, ConvertError, ObjectHandle, Policy, Reach, Spec};

const POLICIES: [Policy; 3] = [Policy::Pages, Policy::Blocks, Policy::WholeBlocks];

impl Host {
    fn convert(&self, handle: ObjectHandle, start: u64, count: u64, open: bool) -> Result<u64, ConvertError> {
        self.on(handle, |object, supply| object.convert(supply, start, count, open))
    }

    fn is_open(&self, handle: ObjectHandle, frame: u64) -> bool {
        self.on(handle, |object, supply| object.is_open(supply.machine, frame))
    }

    /// The four bytes at the beginning of a page as somebody sees them who reaches open pages only.
    fn seen(&self, handle: ObjectHandle, frame: u64) -> Result<[u8; 4], AccessError> {
        let mut bytes = [0xee; 4];
        let at = frame * PAGE_SIZE + 7;
        self.on(handle, |object, supply| object.read_as(supply, Reach::Open, at, &mut bytes)).map(|()| bytes)
    }

    fn is_mapped(&self, pfn: Pfn) -> bool {
        self.machine.is_mapped_own(pfn)
    }
}

#[test]
fn an_open_page_is_mapped_and_holds_what_it_held() {
    for policy in POLICIES {
        let host = Host::new(6 * 512);
        let free = host.pool.free_frames();
        let handle = host.private(1024, policy);
        host.set(handle, 3, b"mine");
        let pfn = host.frame_of(handle, 3);
        assert_eq!(host.convert(handle, 3, 2, true), Ok(2), "{policy:?}");
        assert_eq!((host.frame_of(handle, 3), host.is_mapped(pfn)), (pfn, true), "{policy:?}: the same frame");
        let mut bytes = [0; 4];
        host.machine.read(Hpa::new(pfn.base().get() + 7), &mut bytes);
        assert_eq!(&bytes, b"mine");
        let audit = host.audit();
        let backed = if policy == Policy::Pages { 1 } else { 2 };
        assert_eq!((audit.open, audit.leased, audit.wrong), (backed, 0, 0), "{policy:?}: {audit:?}");
        assert_eq!([2, 3, 4, 5].map(|frame| host.is_open(handle, frame)), [false, true, true, false]);
        assert_eq!(host.convert(handle, 3, 2, true), Ok(0), "they are open");

        assert_eq!(host.convert(handle, 2, 2, false), Ok(1));
        assert_eq!((host.is_mapped(pfn), host.get(handle, 3, 4)), (false, b"mine".to_vec()));
        assert_eq!(host.audit().wrong, 0);
        host.destroy(handle);
        host.settle_private();
        assert_eq!((host.pool.free_frames(), host.pool.private_frames(), host.audit().open), (free, 0, 0));
    }
}

#[test]
fn who_reaches_open_pages_only_is_refused_private_ones_vacant_or_not() {
    let host = Host::new(4 * 512);
    let handle = host.private(600, Policy::Blocks);
    host.set(handle, 0, b"mine");
    host.convert(handle, 1, 1, true).unwrap();
    host.convert(handle, 597, 1, true).unwrap();
    assert_eq!(host.seen(handle, 1), Ok([0; 4]));
    assert_eq!(host.seen(handle, 597), Ok([0; 4]), "vacant, and open");
    for private in [0, 2, 596, 598] {
        assert_eq!(host.seen(handle, private), Err(AccessError::Private { frame: private }));
    }
    let write = |at, bytes: &[u8]| host.on(handle, |object, supply| object.write_as(supply, Reach::Open, at, bytes));
    assert_eq!(write(PAGE_SIZE + 7, b"come"), Ok(()));
    assert_eq!(write(598 * PAGE_SIZE - 2, b"come"), Err(AccessError::Private { frame: 598 }));
    assert_eq!((host.get(handle, 1, 4), host.get(handle, 597, 4)), (b"come".to_vec(), [0; 4].to_vec()));
    assert_eq!(write(597 * PAGE_SIZE, b"made"), Ok(()), "a page made for a device is open");
    assert!(host.is_mapped(host.frame_of(handle, 597)));
    assert_eq!(host.audit().wrong, 0);
}

#[test]
fn the_attribute_survives_holes_touches_and_forks() {
    for policy in POLICIES {
        let host = Host::new(12 * 512);
        let free = host.pool.free_frames();
        let parent = host.private(1024, policy);
        host.set(parent, 5, b"five");
        host.set(parent, 700, b"rest");
        host.convert(parent, 4, 3, true).unwrap();
        host.on(parent, |object, supply| object.punch(supply, 0, 1024).unwrap());
        assert_eq!((host.is_open(parent, 5), host.is_open(parent, 7)), (true, false), "{policy:?}: a hole");
        host.set(parent, 5, b"anew");
        assert!(host.is_mapped(host.frame_of(parent, 5)), "{policy:?}");

        let child = host.objects.fork(&host.supply(0), &host.epoch, parent).unwrap();
        assert_eq!([4, 5, 6, 7].map(|frame| host.is_open(child, frame)), [true, true, true, false]);
        assert_eq!(host.seen(child, 5), Ok(*b"anew"));
        host.set(child, 5, b"copy");
        let (old, copy) = (host.frame_of(parent, 5), host.frame_of(child, 5));
        assert!(
            old != copy && host.is_mapped(copy) && host.is_mapped(old),
            "{policy:?}: a copy of an open page is open"
        );
        assert_eq!(host.convert(child, 4, 1, false), Ok(1));
        assert_eq!(host.convert(parent, 5, 1, false), Ok(1));
        assert_eq!((host.is_mapped(host.frame_of(parent, 5)), host.is_mapped(copy)), (false, true));
        assert_eq!((host.is_open(parent, 4), host.is_open(child, 4), host.is_open(child, 5)), (true, false, true));
        assert_eq!(host.get(parent, 5, 4), b"anew");
        // What both still share: the child's hole is its own.
        let third = host.objects.fork(&host.supply(0), &host.epoch, child).unwrap();
        host.on(third, |object, supply| object.punch(supply, 0, 512).unwrap());
        assert_eq!((host.is_open(third, 6), host.seen(third, 5)), (true, Ok([0; 4])), "{policy:?}");
        assert_eq!((host.seen(child, 5), host.audit().wrong), (Ok(*b"copy"), 0));
        [parent, child, third].into_iter().for_each(|handle| host.destroy(handle));
        host.settle_private();
        assert_eq!((host.pool.free_frames(), host.pool.private_frames()), (free, 0), "{policy:?}");
    }
}

/// The parts of an object tell of each page what the page says itself, whatever was converted, backed and shared before.
#[test]
fn the_parts_of_an_object_say_what_each_page_does() {
    for policy in POLICIES {
        let host = Host::new(6 * 512);
        let frames = 1500;
        let handle = host.private(frames, policy);
        let parts = |handle| {
            let mut all = Vec::new();
            host.on(handle, |object, supply| {
                while let Some((open, end)) = object.open_part(supply.machine, all.len() as u64) {
                    assert!(end > all.len() as u64, "each part has a page");
                    all.resize(end as usize, open);
                }
            });
            all
        };
        assert_eq!(parts(handle), vec![false; frames as usize], "{policy:?}");
        host.set(handle, 700, b"mine");
        let mut expected = vec![false; frames as usize];
        for (start, count, open) in [(3, 2, true), (510, 5, true), (700, 1, true), (1499, 1, true), (512, 1, false)] {
            host.convert(handle, start, count, open).unwrap();
            expected[start as usize..][..count as usize].fill(open);
            assert_eq!(parts(handle), expected, "{policy:?}");
        }
        let child = host.objects.fork(&host.supply(0), &host.epoch, handle).unwrap();
        host.convert(handle, 0, frames, false).unwrap();
        assert_eq!((parts(handle), parts(child)), (vec![false; frames as usize], expected), "{policy:?}");
        let plain = host.anonymous(9, policy);
        assert_eq!(parts(plain), [true; 9], "what is not private is all open");
    }
}

#[test]
fn a_page_that_relatives_share_is_copied_before_it_changes() {
    let host = Host::new(8 * 512);
    let parent = host.private(64, Policy::Pages);
    host.set(parent, 1, b"both");
    let child = host.objects.fork(&host.supply(0), &host.epoch, parent).unwrap();
    let theirs = host.frame_of(parent, 1);
    assert_eq!(host.convert(child, 1, 1, true), Ok(1));
    let own = host.frame_of(child, 1);
    assert!(own != theirs && host.is_mapped(own) && !host.is_mapped(theirs));
    assert_eq!((host.get(child, 1, 4), host.get(parent, 1, 4)), (b"both".to_vec(), b"both".to_vec()));
    assert_eq!(host.audit().wrong, 0);
}

#[test]
fn leases_and_the_attribute_each_keep_a_frame_mapped() {
    let host = Host::new(2 * 512);
    let handle = host.private(2, Policy::Pages);
    let pfn = host.frame_of(handle, 0);
    let (machine, pool) = (&host.machine, &host.pool);
    let lease = pool.lease(machine, pfn).unwrap();
    host.convert(handle, 0, 1, true).unwrap();
    pool.release_lease(machine, lease);
    assert!(host.is_mapped(pfn), "open");
    let lease = pool.lease(machine, pfn).unwrap();
    host.convert(handle, 0, 1, false).unwrap();
    assert!(host.is_mapped(pfn), "leased");
    assert_eq!((host.audit().leased, host.audit().open, host.audit().wrong), (1, 0, 0));
    pool.release_lease(machine, lease);
    assert!(!host.is_mapped(pfn));
    let lease = pool.lease(machine, pfn).unwrap();
    machine.fail_removals(3);
    pool.release_lease(machine, lease);
    assert_eq!(pool.stuck_frames(), 1);
    host.convert(handle, 0, 1, true).unwrap();
    assert_eq!((pool.stuck_frames(), host.audit().wrong), (0, 0), "mapped by right");
}

#[test]
fn what_cannot_be_converted_is_refused_and_nothing_changes() {
    let host = Host::new(4 * 512);
    let handle = host.private(600, Policy::Pages);
    let outside = ConvertError::Outside { start: 599, count: 2, frames: 600 };
    assert_eq!(host.convert(handle, 599, 2, true), Err(outside));
    assert!(host.convert(handle, u64::MAX, 2, true).is_err());
    let plain = host.objects.create(&host.supply(0), Spec::anonymous(8, Policy::Pages)).unwrap();
    assert_eq!(host.convert(plain, 0, 1, true), Err(ConvertError::NotPrivate));
    assert!(host.is_open(plain, 0) && !host.is_open(handle, 599) && !host.is_open(handle, 600));
    // No frame for the node: nothing at all is open.
    let mut taken = std::vec::Vec::new();
    while let Ok(pfn) = host.pool.take(0, crate::Order::PAGE) {
        taken.push(pfn);
    }
    assert_eq!(host.convert(handle, 0, 600, true), Err(ConvertError::OutOfMemory));
    assert!((0..600).all(|frame| !host.is_open(handle, frame)));
    taken.into_iter().for_each(|pfn| host.pool.give(0, pfn, crate::Order::PAGE));
    assert_eq!(host.convert(handle, 0, 600, true), Ok(600));
}

/// One CPU converts, one punches, one writes by both reaches and leases, one forks, while another audits.
#[test]
fn traffic_keeps_every_frame_where_its_attribute_says() {
    const ROUNDS: u64 = 2_000;
    const FRAMES: u64 = 24;
    let host = Host::new(16 * 512);
    let free = host.pool.free_frames();
    let handle = host.private(1024, Policy::Blocks);
    let (start, over) = (Barrier::new(4), AtomicBool::new(false));
    let (seen, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        let (host, start, seen, refused) = (&host, &start, &seen, &refused);
        let workers: [_; 3] = core::array::from_fn(|cpu| {
            scope.spawn(move || {
                let cpu = cpu + 1;
                start.wait();
                let met = |counts: [&AtomicU64; 2]| counts.iter().all(|count| count.load(Ordering::Relaxed) != 0);
                let mut round = 0;
                // However late the others begin.
                while round < ROUNDS || !met([seen, refused]) {
                    round += 1;
                    let frame = round * 5 % FRAMES;
                    let (supply, pin) = (host.supply(cpu), host.epoch.pin(cpu));
                    let object = host.objects.get(&pin, handle).unwrap();
                    let enough = |answer: Result<u64, ConvertError>| {
                        assert!(!matches!(answer, Err(ConvertError::NotPrivate | ConvertError::Outside { .. })));
                    };
                    match cpu {
                        1 => enough(object.convert(&supply, frame, 1 + round % 3, round / 7 % 2 == 0)),
                        2 if round % 3 == 0 => drop(object.punch(&supply, frame, 2)),
                        2 => drop(object.write(&supply, frame * PAGE_SIZE, &round.to_le_bytes())),
                        _ => {
                            let at = frame * PAGE_SIZE + 64;
                            match object.write_as(&supply, Reach::Open, at, &round.to_le_bytes()) {
                                Ok(()) => seen.fetch_add(1, Ordering::Relaxed),
                                Err(AccessError::Private { .. }) => refused.fetch_add(1, Ordering::Relaxed),
                                Err(error) => {
                                    assert_eq!(error, AccessError::OutOfMemory);
                                    0
                                }
                            };
                        }
                    }
                    drop(pin);
                    host.pool.reap(&host.epoch, cpu, 8);
                    supply.scrub(4);
                }
            })
        });
        start.wait();
        while !over.load(Ordering::Relaxed) {
            let audit = host.audit();
            assert_eq!(audit.wrong, 0, "{audit:?}");
            over.store(workers.iter().all(|worker| worker.is_finished()), Ordering::Relaxed);
        }
    });
    host.destroy(handle);
    host.settle_private();
    assert_eq!((host.pool.free_frames(), host.pool.private_frames(), host.audit().wrong), (free, 0, 0));
}
