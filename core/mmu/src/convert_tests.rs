//! Conversions on a flat machine: entries, kinds of access, page-frame caches.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use entresol_addr::{GfnRange, Gpa, PAGE_SIZE, PageSize};
use entresol_backing::{Audit, Policy, Reach, Spec};
use entresol_fault::Access;
use entresol_machine::flat::FlatMachine;
use entresol_slot::{Hint, SlotFlags};

use crate::tests::{CPU, RAM, TestVm, fault, host, memory, slot, touch, vm};
use crate::{ConvertError, CopyError, Host, MemoryFault, Outcome, Reason};

const FRAMES: u64 = 1024;
/// Another CPU.
const OTHER: usize = 1;
/// Shows the memory a second time.
const ALIAS: u64 = RAM + (1 << 30);

fn private<'h>(host: &'h Host<FlatMachine>, policy: Policy) -> TestVm<'h> {
    let vm = vm(host);
    let object = host.objects.create(&host.supply(CPU), Spec::Private { frames: FRAMES, policy }).unwrap();
    vm.set_slot(CPU, &slot(0, RAM, FRAMES, object, SlotFlags::empty())).unwrap();
    vm.set_slot(CPU, &slot(1, ALIAS, FRAMES, object, SlotFlags::empty())).unwrap();
    vm.make_caches(2).unwrap();
    vm
}

fn pages(base: u64, first: u64, count: u64) -> GfnRange {
    GfnRange::new(Gpa::new(base + first * PAGE_SIZE).frame(), count).unwrap()
}

fn audit(host: &Host<FlatMachine>) -> Audit {
    host.pool.reap(&host.epoch, CPU, usize::MAX);
    host.supply(CPU).scrub(usize::MAX);
    let audit = entresol_backing::audit(&host.supply(CPU), &host.objects, &host.epoch.pin(CPU));
    assert_eq!((audit.wrong, audit.stuck), (0, 0), "{audit:?}");
    audit
}

fn touch_as(vm: &TestVm<'_>, gpa: u64, private: bool) -> Outcome {
    vm.touch_as(&vm.host().epoch.pin(CPU), &Hint::new(), &fault(gpa, Access::Write), private)
}

#[test]
fn a_conversion_takes_every_entry_away_and_the_pages_come_back_as_they_were() {
    for policy in [Policy::Pages, Policy::Blocks] {
        let host = host(8 * 512);
        let vm = private(&host, policy);
        for base in [RAM, ALIAS] {
            assert_eq!(touch(&vm, base + 5 * PAGE_SIZE, Access::Write), Outcome::Resume);
        }
        let at = Gpa::new(RAM + 5 * PAGE_SIZE);
        vm.write(&host.epoch.pin(CPU), &Hint::new(), at, b"stays").unwrap();
        assert_eq!(vm.convert(CPU, pages(ALIAS, 4, 4), true), Ok(4));
        assert_eq!(vm.census().of(PageSize::Size4K) + vm.census().of(PageSize::Size2M), 0, "{policy:?}");
        let is_open = |page: u64| vm.is_open(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(RAM + page * PAGE_SIZE));
        assert_eq!([3, 4, 7, 8].map(is_open), [false, true, true, false].map(Some));
        assert_eq!(vm.is_open(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(0)), None);
        assert_eq!(touch(&vm, RAM + 5 * PAGE_SIZE, Access::Read), Outcome::Resume);
        assert_eq!(vm.census().of(PageSize::Size4K), 1, "no block has pages of both kinds");
        let mut bytes = [0; 5];
        vm.read_as(&host.epoch.pin(CPU), &Hint::new(), Reach::Open, at, &mut bytes).unwrap();
        assert_eq!((&bytes, audit(&host).leased), (b"stays", 0));
        assert_eq!(vm.convert(CPU, pages(RAM, 0, FRAMES), false), Ok(4));
        assert_eq!(audit(&host).open, 0);
    }
}

#[test]
fn an_access_of_the_other_kind_exits_and_maps_nothing() {
    let host = host(8 * 512);
    let vm = private(&host, Policy::Pages);
    vm.convert(CPU, pages(RAM, 1, 1), true).unwrap();
    let fault = |page: u64, private| {
        let at = Gpa::new(RAM + page * PAGE_SIZE);
        Outcome::Exit(Reason::MemoryFault(MemoryFault::new(at, private)))
    };
    assert_eq!(touch_as(&vm, RAM + 8, false), fault(0, false));
    assert_eq!(touch_as(&vm, RAM + PAGE_SIZE + 8, true), fault(1, true));
    assert_eq!(vm.census().of(PageSize::Size4K), 0);
    assert_eq!(touch_as(&vm, RAM + 8, true), Outcome::Resume);
    assert_eq!(touch_as(&vm, RAM + PAGE_SIZE, false), Outcome::Resume);
    assert_eq!(vm.census().of(PageSize::Size4K), 2);
    assert_eq!(touch_as(&vm, 0x1000, false), Outcome::Mmio, "what is no memory is of no kind");
    let invalidation = vm.invalidate_range_start(CPU, pages(RAM, 0, 1)).unwrap();
    assert_eq!(touch_as(&vm, RAM, true), Outcome::Retry);
    assert_eq!(touch_as(&vm, RAM, false), Outcome::Retry, "it may change");
    vm.invalidate_range_end(invalidation);

    let pin = host.epoch.pin(CPU);
    let open = |gpa: u64, bytes: &[u8]| vm.write_as(&pin, &Hint::new(), Reach::Open, Gpa::new(gpa), bytes);
    assert_eq!(open(RAM + PAGE_SIZE, b"in"), Ok(()));
    let refused = Err(CopyError::MemoryFault(MemoryFault::new(Gpa::new(RAM + 2 * PAGE_SIZE), false)));
    assert_eq!(open(RAM + 2 * PAGE_SIZE - 1, b"in"), refused);
    let mut bytes = [0; 2];
    assert_eq!(vm.read_as(&pin, &Hint::new(), Reach::Open, Gpa::new(RAM + 2 * PAGE_SIZE - 1), &mut bytes), refused);
}

#[test]
fn memory_that_is_not_private_is_open_to_everybody() {
    let host = host(8 * 512);
    let vm = vm(&host);
    let object = memory(&host, FRAMES, Policy::Blocks);
    vm.set_slot(CPU, &slot(0, RAM, FRAMES, object, SlotFlags::empty())).unwrap();
    assert_eq!(vm.convert(CPU, pages(RAM, 0, 1), true), Err(ConvertError::NotPrivate));
    assert_eq!(touch_as(&vm, RAM, false), Outcome::Resume);
    vm.write_as(&host.epoch.pin(CPU), &Hint::new(), Reach::Open, Gpa::new(RAM), b"open").unwrap();
}

#[test]
fn a_range_that_is_not_the_guests_is_refused_whole() {
    let host = host(8 * 512);
    let vm = private(&host, Policy::Pages);
    let rom = host.objects.create(&host.supply(CPU), Spec::Private { frames: 4, policy: Policy::Pages }).unwrap();
    vm.set_slot(CPU, &slot(2, 0x1000, 4, rom, SlotFlags::READ_ONLY)).unwrap();
    let both = GfnRange::new(Gpa::new(RAM).frame().offset(FRAMES - 1), 2).unwrap();
    for range in [pages(0, 9, 1), pages(0, 1, 1), both] {
        assert_eq!(vm.convert(CPU, range, true), Err(ConvertError::NotPrivate), "{range:?}");
    }
    // Another machine shows it, too.
    let other = crate::tests::vm(&host);
    let shown = vm.slots().find(&host.epoch.pin(CPU), Gpa::new(RAM).frame(), &Hint::new()).unwrap().object;
    let object = entresol_backing::ObjectHandle::from_raw(shown.get());
    other.set_slot(CPU, &slot(0, RAM, FRAMES, object, SlotFlags::empty())).unwrap();
    assert_eq!(vm.convert(CPU, pages(RAM, 0, 1), true), Err(ConvertError::NotPrivate));
    assert_eq!(audit(&host).open, 0);
}

#[test]
fn a_conversion_has_page_frame_caches_give_their_leases_back() {
    let host = host(8 * 512);
    let vm = private(&host, Policy::Pages);
    let record = |index: u64| Gpa::new(RAM + 64 * index);
    for index in 0..2 {
        vm.activate(CPU, index, record(index as u64), 64).unwrap();
    }
    let page = pages(RAM, 0, 1);
    assert_eq!(audit(&host).leased, 1);
    for open in [true, false] {
        vm.convert(CPU, page, open).unwrap();
        let found = audit(&host);
        assert_eq!((found.leased, found.open), (0, u64::from(open)), "nobody looks again yet");
        for index in 0..2 {
            assert!(vm.check(&host.epoch.pin(CPU), index, 1).is_none());
            vm.refresh(CPU, index).unwrap();
        }
        assert_eq!(audit(&host).leased, 1);
    }
    // A conversion, then a hole before anybody looks again; then the other way round.
    vm.convert(CPU, page, true).unwrap();
    assert_eq!(vm.discard(CPU, &[page]).unwrap().frames, 1);
    assert_eq!((audit(&host).leased, audit(&host).open), (0, 0));
    vm.refresh(CPU, 0).unwrap();
    assert_eq!((audit(&host).leased, audit(&host).open), (1, 1), "the hole is open, too");
    vm.discard(CPU, &[page]).unwrap();
    vm.convert(CPU, page, false).unwrap();
    vm.refresh(CPU, 0).unwrap();
    (0..2).for_each(|index| vm.deactivate(index).unwrap());
    assert_eq!((audit(&host).leased, audit(&host).open), (0, 0));
}

/// A page that is converted, punched and touched again and again while one CPU tells through a cache and one reaches open pages
/// only, by copies and by a cache: a use of an absent frame stops the flat machine, what was refused was private, and the cache knows
/// nothing as long as the page is.
#[test]
fn caches_and_devices_meet_a_page_that_changes() {
    const ROUNDS: u64 = 400;
    let host = host(16 * 512);
    let vm = private(&host, Policy::Pages);
    vm.write(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(RAM + PAGE_SIZE), &[1]).unwrap();
    let (page, over) = (pages(RAM, 0, 1), AtomicBool::new(false));
    let (told, seen) = (AtomicU64::new(0), [const { AtomicU64::new(0) }; 3]);
    std::thread::scope(|scope| {
        let (vm, host, over, told, seen) = (&vm, &host, &over, &told, &seen);
        scope.spawn(move || {
            while vm.activate(OTHER, 0, Gpa::new(RAM + 64), 8).is_err() {}
            while !over.load(Ordering::Relaxed) {
                let piece = vm.refresh(OTHER, 0).is_ok();
                let pin = host.epoch.pin(OTHER);
                if let Some(piece) = vm.check(&pin, 0, 8).filter(|_| piece) {
                    vm.write_piece(&piece, &told.fetch_add(1, Ordering::Relaxed).to_le_bytes());
                }
            }
        });
        scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                // While the page is private, or changes.
                let _ = vm.activate_as(2, 1, Reach::Open, Gpa::new(RAM + 256), 8);
                let pin = host.epoch.pin(2);
                seen[2].fetch_add(u64::from(vm.check(&pin, 1, 8).is_some()), Ordering::Relaxed);
                match vm.write_as(&pin, &Hint::new(), Reach::Open, Gpa::new(RAM + 128), b"device") {
                    Ok(()) => drop(seen[0].fetch_add(1, Ordering::Relaxed)),
                    Err(CopyError::MemoryFault(fault)) => {
                        assert_eq!((fault.gpa().get(), fault.private()), (RAM, false));
                        seen[1].fetch_add(1, Ordering::Relaxed);
                    }
                    Err(CopyError::Busy | CopyError::OutOfMemory) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
        });
        let met = || seen.iter().chain([told]).all(|count| count.load(Ordering::Relaxed) != 0);
        let mut round = 0;
        // However late the others begin.
        while round < ROUNDS || !met() {
            round += 1;
            while vm.convert(CPU, page, round % 2 == 0).is_err() {}
            if round % 5 == 0 {
                while vm.discard(CPU, &[page]).is_err() {}
            }
            let private = round % 2 != 0;
            assert!(
                !private || vm.check(&host.epoch.pin(CPU), 1, 8).is_none(),
                "a private page is known to the device"
            );
            audit(host);
        }
        over.store(true, Ordering::Relaxed);
    });
    (0..2).for_each(|index| vm.deactivate(index).unwrap());
    assert_eq!(audit(&host).leased, 0);
}
