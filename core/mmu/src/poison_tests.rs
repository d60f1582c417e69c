//! Bad frames on a flat machine: what reached them before, and what is told to whoever comes after.

use std::sync::atomic::{AtomicBool, Ordering};

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SIZE, PageSize, Pfn};
use entresol_backing::{ObjectHandle, PoisonError as ObjectError, Policy, Spec};
use entresol_fault::Access;
use entresol_machine::Machine;
use entresol_machine::flat::FlatMachine;
use entresol_slot::{Hint, SlotFlags};

use crate::fork_tests::{FRAMES, access, end, gpa, leaf, load, settled, store, with_memory};
use crate::tests::{CPU, RAM, TestVm, host, memory, slot, touch, vm};
use crate::{Abort, CacheError, CopyError, Host, Outcome, PoisonError};

/// Another CPU.
const OTHER: usize = 1;
/// Shows the memory a second time.
const ALIAS: u64 = RAM + (1 << 30);
const ABORTED: Outcome = Outcome::Inject(Abort::External);

/// As an owner of `all` does it.
fn poison(vm: &TestVm<'_>, all: &[&TestVm<'_>], gpa: u64) -> Result<Pfn, PoisonError> {
    let poisoned = vm.poison(CPU, Gpa::new(gpa))?;
    all.iter().for_each(|vm| vm.withdraw(CPU, &poisoned));
    Ok(poisoned.finish(vm.host()))
}

/// Whether some entry of `vm` reaches `pfn`.
fn reaches(vm: &TestVm<'_>, pfn: Pfn) -> bool {
    let everything = GfnRange::new(Gfn::new(0), 1 << 28).unwrap();
    let mut reaches = false;
    vm.table().visit(&vm.host().machine, everything, |_, leaf| {
        reaches |= pfn.since(leaf.pfn) < leaf.size.frames();
    });
    reaches
}

fn assert_aborts(vm: &TestVm<'_>, gpa: u64) {
    for kind in [Access::Read, Access::Write, Access::Fetch] {
        assert_eq!(touch(vm, gpa, kind), ABORTED, "{kind:?}");
    }
    assert!(leaf(vm, gpa).is_none());
    let (pin, at, hint) = (vm.host().epoch.pin(CPU), Gpa::new(gpa), Hint::new());
    let poisoned = CopyError::Poisoned { gpa: at };
    assert_eq!(vm.read(&pin, &hint, at, &mut [0; 8]), Err(poisoned));
    assert_eq!(vm.write(&pin, &hint, at, &[0; PAGE_SIZE as usize]), Err(poisoned), "all of it");
    assert_eq!(vm.lease(&pin, &hint, at).map(drop), Err(poisoned));
    assert_eq!(vm.frame_behind(&pin, &hint, at), None);
}

#[test]
fn whoever_shares_the_frame_is_aborted_and_everybody_goes_on() {
    for policy in [Policy::Pages, Policy::Blocks] {
        let host = host(16 * 512);
        // There from the beginning.
        host.pool.zero_page(&host.machine, CPU).unwrap();
        let before = settled(&host);
        let (parent, object) = with_memory(&host, policy);
        parent.set_slot(CPU, &slot(1, ALIAS, FRAMES, object, SlotFlags::empty())).unwrap();
        for page in 0..40 {
            store(&parent, gpa(page), page as u8);
        }
        let child = parent.fork(CPU).unwrap();
        let (stranger, _) = with_memory(&host, policy);
        store(&stranger, gpa(7), 70);
        for page in 0..40 {
            load(&child, gpa(page));
            load(&parent, gpa(page));
        }
        load(&parent, ALIAS + 7 * PAGE_SIZE);
        // The child has its own.
        store(&child, gpa(8), 80);
        let all = [&parent, &child, &stranger];
        let injected = [7, 8].map(|page| {
            let bad = poison(&parent, &all, gpa(page)).unwrap();
            assert!(all.iter().all(|vm| !reaches(vm, bad)), "{policy:?}");
            let before = parent.stats.poisoned.get();
            assert_aborts(&parent, gpa(page));
            parent.stats.poisoned.get() - before
        });
        assert!(injected.iter().all(|count| *count >= 3), "{injected:?}");
        assert_aborts(&parent, ALIAS + 7 * PAGE_SIZE);
        assert_aborts(&child, gpa(7));
        child.switches.force_notifier(true);
        assert_eq!(child.unshare(CPU, Gpa::new(gpa(7))), ABORTED);
        child.switches.force_notifier(false);
        assert_eq!([load(&child, gpa(8)), load(&stranger, gpa(7)), load(&parent, gpa(9))], [80, 70, 9]);
        for page in [6, 9] {
            store(&parent, gpa(page), 1);
            store(&child, gpa(page), 2);
            assert_eq!([load(&parent, gpa(page)), load(&child, gpa(page))], [1, 2], "{policy:?}");
        }
        // Given back, it is another page.
        let page = GfnRange::single(Gpa::new(gpa(7)).frame());
        assert_eq!(child.discard(CPU, &[page]).unwrap().frames, 1);
        assert_eq!(load(&child, gpa(7)), 0);
        store(&child, gpa(7), 5);
        assert_eq!(load(&child, gpa(7)), 5);
        assert_aborts(&parent, gpa(7));
        assert_eq!((host.pool.poisoned_frames(), host.pool.quarantined_frames()), (2, 0));
        for vm in [parent, child, stranger] {
            end(vm);
        }
        assert_eq!(settled(&host) - before, 2, "{policy:?}");
        assert_eq!(host.pool.quarantined_frames(), 2);
    }
}

#[test]
fn a_block_around_it_comes_back_page_by_page() {
    let host = host(8 * 512);
    let (vm, object) = with_memory(&host, Policy::Blocks);
    store(&vm, gpa(3), 3);
    assert_eq!(leaf(&vm, gpa(3)).unwrap().size, PageSize::Size2M);
    poison(&vm, &[&vm], gpa(4)).unwrap();
    assert_aborts(&vm, gpa(4));
    assert_eq!(load(&vm, gpa(3)), 3);
    // A log splits, and puts together what can be.
    for flags in [SlotFlags::LOG_DIRTY, SlotFlags::empty()] {
        vm.set_slot(CPU, &slot(0, RAM, FRAMES, object, flags)).unwrap();
        assert_aborts(&vm, gpa(4));
        store(&vm, gpa(3), 4);
        assert_eq!(leaf(&vm, gpa(3)).unwrap().size, PageSize::Size4K);
    }
    assert_eq!(load(&vm, gpa(3)), 4);
}

#[test]
fn a_cache_over_it_knows_nothing_and_its_lease_is_over() {
    for private in [false, true] {
        let host = host(8 * 512);
        let vm = vm(&host);
        let spec = if private {
            Spec::Private { frames: FRAMES, policy: Policy::Pages }
        } else {
            Spec::anonymous(FRAMES, Policy::Pages)
        };
        let object = host.objects.create(&host.supply(CPU), spec).unwrap();
        vm.set_slot(CPU, &slot(0, RAM, FRAMES, object, SlotFlags::empty())).unwrap();
        vm.make_caches(3).unwrap();
        let known = |index| vm.check(&host.epoch.pin(CPU), index, 8).is_some();
        for (index, page) in [(0, 3), (1, 3), (2, 4)] {
            vm.activate(CPU, index, Gpa::new(gpa(page) + 64 * index as u64), 8).unwrap();
        }
        let audit = || entresol_backing::audit(&host.supply(CPU), &host.objects, &host.epoch.pin(CPU));
        assert_eq!(audit().leased, if private { 2 } else { 0 });
        poison(&vm, &[&vm], gpa(3)).unwrap();
        assert_eq!([0, 1, 2].map(known), [false, false, true]);
        let (after, expected) = (audit(), if private { 1 } else { 0 });
        assert_eq!((after.leased, after.poisoned, after.wrong), (expected, 1, 0), "{after:?}");
        for index in [0, 1] {
            let gpa = Gpa::new(gpa(3) + 64 * index as u64);
            assert_eq!(vm.refresh(CPU, index), Err(CacheError::Memory(CopyError::Poisoned { gpa })));
        }
        assert_eq!(audit().leased, expected, "no lease of the bad one");
        vm.discard(CPU, &[GfnRange::single(Gpa::new(gpa(3)).frame())]).unwrap();
        vm.refresh(CPU, 0).unwrap();
        vm.deactivate(1).unwrap();
        assert_eq!([0, 1, 2].map(known), [true, false, true]);
        assert_eq!((audit().wrong, audit().leased), (0, if private { 2 } else { 0 }));
        end(vm);
        host.pool.reap(&host.epoch, CPU, usize::MAX);
        host.supply(CPU).scrub(usize::MAX);
        assert_eq!((audit().wrong, audit().leased, audit().poisoned), (0, 0, 1), "{:?}", audit());
    }
}

/// A slot that goes leaves the frame its object's: what the cache had leased, the refresh that fails gives back.
#[test]
fn a_refresh_that_fails_leaves_nothing_mapped() {
    let host = host(8 * 512);
    let vm = vm(&host);
    let spec = Spec::Private { frames: FRAMES, policy: Policy::Pages };
    let object = host.objects.create(&host.supply(CPU), spec).unwrap();
    vm.set_slot(CPU, &slot(0, RAM, FRAMES, object, SlotFlags::empty())).unwrap();
    vm.set_slot(CPU, &slot(1, ALIAS, FRAMES, object, SlotFlags::empty())).unwrap();
    vm.make_caches(1).unwrap();
    let leased = || entresol_backing::audit(&host.supply(CPU), &host.objects, &host.epoch.pin(CPU)).leased;
    for again in [true, false] {
        vm.activate(CPU, 0, Gpa::new(gpa(3)), 8).unwrap();
        assert_eq!(leased(), 1);
        let outside = CacheError::Memory(CopyError::Outside { gpa: Gpa::new(gpa(3)) });
        if again {
            // For another page, which cannot be had.
            let nowhere = Gpa::new(gpa(FRAMES));
            let outside = CacheError::Memory(CopyError::Outside { gpa: nowhere });
            assert_eq!(vm.activate(CPU, 0, nowhere, 8), Err(outside));
        } else {
            vm.set_slot(CPU, &slot(0, RAM, 0, object, SlotFlags::empty())).unwrap();
            assert_eq!(vm.refresh(CPU, 0), Err(outside));
        }
        assert_eq!(leased(), 0, "again: {again}");
    }
}

#[test]
fn what_cannot_be_bad_is_refused_with_the_rule() {
    let host = host(8 * 512);
    let (vm, _) = with_memory(&host, Policy::Pages);
    let rom = Spec::Rom { first: Pfn::new(1), frames: 4, owned: false };
    let rom = host.objects.create(&host.supply(CPU), rom).unwrap();
    vm.set_slot(CPU, &slot(1, ALIAS, 4, rom, SlotFlags::READ_ONLY)).unwrap();
    let kind = entresol_backing::Kind::Rom { owned: false };
    for (gpa, error, rule) in [
        (0, PoisonError::Outside, "must be memory"),
        (u64::MAX, PoisonError::Outside, "must be memory"),
        (gpa(3), PoisonError::Object(ObjectError::Untouched), "must be memory that was touched"),
        (
            ALIAS,
            PoisonError::Object(ObjectError::Kind { kind }),
            "must be anonymous memory, not of a device or read-only",
        ),
    ] {
        assert_eq!(poison(&vm, &[&vm], gpa), Err(error));
        assert_eq!(std::format!("{error}"), rule);
    }
    store(&vm, gpa(3), 1);
    poison(&vm, &[&vm], gpa(3) + 77).unwrap();
    assert_eq!(poison(&vm, &[&vm], gpa(3)), Err(PoisonError::Object(ObjectError::Already)));
    assert_eq!(host.pool.poisoned_frames(), 1);
}

fn child_of<'h>(parent: &TestVm<'h>) -> (TestVm<'h>, ObjectHandle) {
    let child = parent.fork(CPU).unwrap();
    let object = crate::fork_tests::child_object(&child);
    (child, object)
}

/// Two CPUs touch and copy all the time, one frame after the other goes bad: none of them is reached afterwards.
#[test]
fn no_entry_for_it_is_made_beside_the_change() {
    const PAGES: u64 = 64;
    let host: Host<FlatMachine> = host(16 * 512);
    let (parent, _) = with_memory(&host, Policy::Blocks);
    for page in 0..PAGES {
        store(&parent, gpa(page), 1);
    }
    let (child, _) = child_of(&parent);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 0u64;
            while !over.load(Ordering::Relaxed) {
                number += 1;
                let at = gpa(number.wrapping_mul(7) % PAGES);
                let kind = if number.is_multiple_of(5) { Access::Write } else { Access::Read };
                let fault = crate::tests::fault(at, kind);
                let _ = child.handle(&host.epoch.pin(OTHER), &Hint::new(), &fault);
            }
        });
        for page in (0..PAGES).step_by(3) {
            let bad = poison(&parent, &[&parent, &child], gpa(page)).unwrap();
            assert!(!reaches(&parent, bad) && !reaches(&child, bad), "page {page}");
            assert_eq!(touch(&parent, gpa(page), Access::Read), ABORTED);
        }
        over.store(true, Ordering::Relaxed);
    });
    for page in (0..PAGES).filter(|page| page % 3 != 0) {
        assert_eq!(load(&parent, gpa(page)), 1);
    }
    let one = memory(&host, 8, Policy::Pages);
    let vm = vm(&host);
    vm.set_slot(CPU, &slot(0, RAM, 8, one, SlotFlags::empty())).unwrap();
    let (_, fresh) = access(&vm, RAM, Access::Write);
    assert!(!host.pool.is_poisoned(fresh) && host.machine.is_mapped_own(fresh));
}
