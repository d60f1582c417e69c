//! Pages that are not in memory: what a fault, a copy and cache maintenance say of them, and what comes after.

use entresol_backing::{Fetch, StoreSlot};
use entresol_machine::Machine;
use entresol_sync::Pin;

use super::*;
use crate::tests::{host, touch};
use crate::{Absent, CopyError, Maintenance, Reason};

/// A machine whose frame `FRAME` is stored in place 3 of a store.
const FRAME: u64 = 77;

fn stored(host: &Host<FlatMachine>, policy: Policy) -> (TestVm<'_>, ObjectHandle, StoreSlot) {
    let (vm, object) = with_memory(host, policy);
    let slot = StoreSlot::new(host.pool.stores().open(8).unwrap(), 3);
    let pin = host.epoch.pin(CPU);
    host.objects.get(&pin, object).unwrap().put_stored(&host.supply(CPU), FRAME, slot).unwrap();
    (vm, object, slot)
}

/// What the owner does when it is told.
fn bring(vm: &TestVm<'_>, gpa: u64, byte: u8) {
    let host = vm.host();
    let absent = vm.absent(&host.epoch.pin(CPU), Gpa::new(gpa)).unwrap();
    let mut fetch = Fetch::new(&host.supply(CPU), absent.slot).unwrap().unwrap();
    host.machine.write(fetch.pfn().base(), &[byte; PAGE_SIZE as usize]);
    fetch.filled(&host.supply(CPU), None);
    let pin = host.epoch.pin(CPU);
    assert!(host.objects.get(&pin, absent.object).unwrap().restore(&host.supply(CPU), absent.frame, &fetch));
    fetch.give_back(&host.supply(CPU));
}

fn read(vm: &TestVm<'_>, pin: &Pin<'_>, gpa: u64) -> Result<u8, CopyError> {
    let mut byte = [0];
    vm.read(pin, &Hint::new(), Gpa::new(gpa), &mut byte).map(|()| byte[0])
}

#[test]
fn every_access_says_what_it_waits_for_and_then_goes_on() {
    for kind in [Access::Read, Access::Write, Access::Fetch] {
        let host = host(4096);
        let (vm, object, slot) = stored(&host, Policy::Pages);
        let at = gpa(FRAME) + 8;
        for _ in 0..2 {
            assert_eq!(touch(&vm, at, kind), Outcome::Exit(Reason::Stored { slot }));
        }
        let pin = host.epoch.pin(CPU);
        assert_eq!(vm.absent(&pin, Gpa::new(at)), Some(Absent { object, frame: FRAME, slot }));
        assert_eq!(vm.absent(&pin, Gpa::new(at + PAGE_SIZE)), None);
        let absent = CopyError::Absent { gpa: Gpa::new(at), slot };
        assert_eq!(read(&vm, &pin, at), Err(absent));
        assert_eq!(vm.write(&pin, &Hint::new(), Gpa::new(at), &[1]), Err(absent));
        // What no frame has is in no cache.
        let maintained = vm.maintain(&pin, &Hint::new(), Gpa::new(at), Maintenance::Clean);
        assert_eq!(maintained, Outcome::Skip);
        drop(pin);
        assert_eq!((vm.stats.absent.get(), leaf(&vm, at)), (2, None));
        bring(&vm, at, 0x5a);
        assert_eq!(touch(&vm, at, kind), Outcome::Resume);
        // One trap for a page that is written at once; one that was read first is made writable by two more.
        let shown = leaf(&vm, at).unwrap();
        assert_eq!(shown.permissions.write, kind == Access::Write);
        assert_eq!(load(&vm, at), 0x5a);
        assert!(store(&vm, at, 0x77) <= if kind == Access::Write { 0 } else { 2 });
        assert_eq!(leaf(&vm, at).unwrap().pfn, shown.pfn, "in place");
        assert_eq!((load(&vm, at), load(&vm, at - 8)), (0x77, 0x5a));
        assert_eq!(host.pool.stores().close(slot.store()), Ok(()));
        end(vm);
        assert_eq!(settled(&host), 0);
    }
}

#[test]
fn a_copy_for_the_guest_makes_the_page_its_own() {
    let host = host(4096);
    let (vm, _, slot) = stored(&host, Policy::Blocks);
    bring(&vm, gpa(FRAME), 0x5a);
    assert_eq!(load(&vm, gpa(FRAME)), 0x5a);
    vm.write(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(gpa(FRAME)), &[1]).unwrap();
    assert_eq!((load(&vm, gpa(FRAME)), load(&vm, gpa(FRAME) + 1)), (1, 0x5a));
    assert_eq!(host.pool.stores().references(slot.store()), Some(0));
    end(vm);
    assert_eq!(settled(&host), 0);
}

#[test]
fn relatives_wait_for_the_same_page_and_write_their_own() {
    let host = host(8192);
    let (parent, _, slot) = stored(&host, Policy::Pages);
    let child = parent.fork(CPU).unwrap();
    let stored = Outcome::Exit(Reason::Stored { slot });
    assert_eq!([&parent, &child].map(|vm| touch(vm, gpa(FRAME), Access::Write)), [stored; 2]);
    // A neighbour that the child writes copies the node: the page comes for each by itself.
    store(&child, gpa(FRAME + 1), 1);
    bring(&child, gpa(FRAME), 0x5a);
    assert_eq!(touch(&parent, gpa(FRAME), Access::Read), stored);
    store(&child, gpa(FRAME), 2);
    bring(&parent, gpa(FRAME), 0x5a);
    assert_eq!((load(&parent, gpa(FRAME)), load(&child, gpa(FRAME))), (0x5a, 2));
    store(&parent, gpa(FRAME), 3);
    assert_eq!((load(&parent, gpa(FRAME)), load(&child, gpa(FRAME))), (3, 2));
    end(parent);
    end(child);
    assert_eq!(settled(&host), 0);
    assert_eq!(host.pool.stores().close(slot.store()), Ok(()));
}
