//! Forked virtual machines on a flat machine: what each reads and writes, what is mapped, and what it costs.
//!
//! Here is what all of them need; [`family`] is whole machines, [`copies`] one page on its way, [`absent`] one that is not in
//! memory, [`difference`] what two
//! relatives do not share.

mod absent;
mod copies;
mod difference;
mod family;
mod out;

use std::vec::Vec;

use entresol_addr::{Gpa, PAGE_SIZE, Pfn};
use entresol_backing::{ObjectHandle, Policy};
use entresol_fault::{Access, Cause, Fault};
use entresol_machine::flat::FlatMachine;
use entresol_slot::{Hint, SlotFlags};
use entresol_table::{Entry, Leaf};

use crate::tests::{CPU, RAM, TestVm, fault, memory, slot, vm};
use crate::{Host, Outcome};

/// Frames of the memory of most machines here.
pub(crate) const FRAMES: u64 = 1024;

pub(crate) fn gpa(frame: u64) -> u64 {
    RAM + frame * PAGE_SIZE
}

pub(crate) fn leaf(vm: &TestVm<'_>, gpa: u64) -> Option<Leaf> {
    match vm.table().walk(&vm.host().machine, Gpa::new(gpa).frame()).unwrap().entry {
        Entry::Leaf(leaf) => Some(leaf),
        _ => None,
    }
}

/// Makes one access as a CPU does: faults with what the tables say, until it is served. Returns the traps it took and the
/// frame that it reached.
pub(crate) fn access(vm: &TestVm<'_>, gpa: u64, kind: Access) -> (usize, Pfn) {
    for traps in 0..20 {
        let cause = match leaf(vm, gpa) {
            Some(leaf) if leaf.permissions.write || kind != Access::Write => {
                return (traps, leaf.frame_of(Gpa::new(gpa).frame()));
            }
            Some(_) => Cause::Permission { level: 3 },
            None => Cause::Translation,
        };
        let outcome = vm.handle(&vm.host().epoch.pin(CPU), &Hint::new(), &Fault { cause, ..fault(gpa, kind) });
        match outcome {
            Outcome::Resume | Outcome::Retry => {}
            Outcome::Unshare => assert_eq!(vm.unshare(CPU, Gpa::new(gpa)), Outcome::Retry),
            other => panic!("{other:?}"),
        }
    }
    panic!("{kind:?} at {gpa:#x} makes no progress: {:?}", leaf(vm, gpa));
}

/// A guest's store of one byte.
pub(crate) fn store(vm: &TestVm<'_>, gpa: u64, byte: u8) -> usize {
    use entresol_machine::Machine;
    let (traps, pfn) = access(vm, gpa, Access::Write);
    vm.host().machine.write(entresol_addr::Hpa::new(pfn.base().get() + gpa % PAGE_SIZE), &[byte]);
    traps
}

/// A guest's load of one byte.
pub(crate) fn load(vm: &TestVm<'_>, gpa: u64) -> u8 {
    use entresol_machine::Machine;
    let (_, pfn) = access(vm, gpa, Access::Read);
    let mut byte = [0];
    vm.host().machine.read(entresol_addr::Hpa::new(pfn.base().get() + gpa % PAGE_SIZE), &mut byte);
    byte[0]
}

pub(crate) fn with_memory<'h>(host: &'h Host<FlatMachine>, policy: Policy) -> (TestVm<'h>, ObjectHandle) {
    let vm = vm(host);
    let object = memory(host, FRAMES, policy);
    vm.set_slot(CPU, &slot(0, RAM, FRAMES, object, SlotFlags::empty())).unwrap();
    (vm, object)
}

/// Ends a machine and its memory.
pub(crate) fn end(vm: TestVm<'_>) {
    let host = vm.host();
    let objects: Vec<_> = {
        let pin = host.epoch.pin(CPU);
        vm.slots().iter(&pin).map(|slot| ObjectHandle::from_raw(slot.object.get())).collect()
    };
    vm.destroy(CPU);
    for object in objects {
        // Two slots may show one object.
        let _ = host.objects.destroy(&host.supply(CPU), &host.epoch, object);
    }
}

pub(crate) fn settled(host: &Host<FlatMachine>) -> u64 {
    while host.supply(CPU).reclaim(64) + host.pool.reap(&host.epoch, CPU, usize::MAX) as usize != 0 {}
    host.pool.total_frames() - host.pool.free_frames()
}

pub(crate) fn child_object(vm: &TestVm<'_>) -> ObjectHandle {
    let pin = vm.host().epoch.pin(CPU);
    ObjectHandle::from_raw(vm.slots().iter(&pin).next().unwrap().object.get())
}
