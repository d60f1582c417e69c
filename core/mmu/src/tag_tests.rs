//! Which objects a machine with memory tagging shows, and what its guest finds there.

use entresol_addr::{Gpa, PAGE_SIZE, Pfn};
use entresol_backing::{ObjectHandle, Policy, Spec};
use entresol_fault::Access;
use entresol_machine::flat::FlatMachine;
use entresol_machine::{Features, Machine, Tags};
use entresol_slot::{Hint, SlotError, SlotFlags};
use entresol_table::{Entry, Memory};

use crate::tests::{CPU, OPTIONS, RAM, TestVm, coherent, host_beside_rom, memory, slot, touch};
use crate::{CopyError, Host, Options, Outcome, TagError, Vm};
use entresol_arch_arm64::stage2::Stage2;

/// Frames of the machine, and those of them that are no pool's.
const FRAMES: u64 = 2048;
const ROM: u64 = 4;

fn host() -> Host<FlatMachine> {
    host_beside_rom(FRAMES, ROM, Features { tags: true, ..coherent() })
}

fn vm<'h>(host: &'h Host<FlatMachine>) -> TestVm<'h> {
    Vm::new(host, CPU, Stage2 { fwb: true }, Options { tags: true, ..OPTIONS }).unwrap()
}

fn object(host: &Host<FlatMachine>, spec: Spec) -> ObjectHandle {
    host.objects.create(&host.supply(CPU), spec).unwrap()
}

/// How `gpa` is mapped.
fn entry(vm: &TestVm<'_>, gpa: u64) -> Entry {
    vm.table().walk(&vm.host().machine, entresol_addr::Gpa::new(gpa).frame()).unwrap().entry
}

#[test]
fn memory_without_tags_is_refused_and_changes_nothing() {
    let host = host();
    let vm = vm(&host);
    let plain = memory(&host, 8, Policy::Pages);
    let request = slot(0, RAM, 8, plain, SlotFlags::empty());
    let refused = vm.set_slot(CPU, &request).unwrap_err();
    assert!(matches!(refused, SlotError::NoTags { object } if object == request.object));
    assert!(std::format!("{refused}").contains("shows only memory that has tags"));
    assert_eq!(touch(&vm, RAM, Access::Read), Outcome::Mmio, "there is no slot");
    host.objects.destroy(&host.supply(CPU), &host.epoch, plain).expect("nobody holds it");
}

#[test]
fn what_a_guest_can_reach_has_valid_tags() {
    let host = host();
    let vm = vm(&host);
    let first = Pfn::new(0x8_0000 + FRAMES - ROM);
    let rom = object(&host, Spec::Rom { first, frames: ROM, owned: false });
    let ram = object(&host, Spec::Anonymous { frames: 600, policy: Policy::Blocks, tagged: true });
    vm.set_slot(CPU, &slot(0, RAM, 600, ram, SlotFlags::empty())).unwrap();
    vm.set_slot(CPU, &slot(1, 0, ROM, rom, SlotFlags::READ_ONLY)).unwrap();
    for gpa in [0, 3 * PAGE_SIZE, RAM, RAM + 511 * PAGE_SIZE, RAM + 599 * PAGE_SIZE] {
        assert_eq!(touch(&vm, gpa, Access::Read), Outcome::Resume);
        let Entry::Leaf(leaf) = entry(&vm, gpa) else { panic!("{gpa:#x} is mapped") };
        for offset in 0..leaf.size.frames() {
            assert_eq!(host.machine.load_tags(leaf.pfn.offset(offset)), Tags::ZERO, "{gpa:#x} and {offset} frames on");
        }
    }
}

#[test]
fn registers_are_a_device_and_have_none() {
    let host = host();
    let vm = vm(&host);
    let device = object(&host, Spec::Device { first: Pfn::new(0x900), frames: 1 });
    vm.set_slot(CPU, &slot(0, RAM, 1, device, SlotFlags::empty())).unwrap();
    assert_eq!(touch(&vm, RAM, Access::Write), Outcome::Resume);
    assert!(matches!(entry(&vm, RAM), Entry::Leaf(leaf) if leaf.memory == Memory::Device));
}

/// Pages with tags meet only those of equal bytes and tags; zeros with a tag stay.
#[test]
fn a_scan_merges_what_is_equal_to_the_tag() {
    let host = host();
    let machines = [0, 1].map(|_| {
        let vm = vm(&host);
        let ram = object(&host, Spec::Anonymous { frames: 600, policy: Policy::Pages, tagged: true });
        vm.set_slot(CPU, &slot(0, RAM, 600, ram, SlotFlags::empty())).unwrap();
        vm.enable_merging(CPU).unwrap();
        vm
    });
    let put = |vm: &TestVm<'_>, frame: u64, byte: u8, tag: u8| {
        let gpa = RAM + frame * PAGE_SIZE;
        assert_eq!(touch(vm, gpa, Access::Write), Outcome::Resume);
        let Entry::Leaf(leaf) = entry(vm, gpa) else { panic!("{gpa:#x} is mapped") };
        host.machine.write(leaf.pfn.base(), &[byte]);
        let mut tags = Tags::ZERO;
        tags.set(9, tag);
        host.machine.store_tags(leaf.pfn, &tags);
    };
    for frame in 0..40 {
        put(&machines[0], frame, 1 + frame as u8, 3);
        put(&machines[1], frame, 1 + frame as u8, if frame < 30 { 3 } else { 4 });
        put(&machines[0], 100 + frame, 0, 0);
        put(&machines[0], 200, 0, 5);
    }
    let mut sums = [0; 3];
    for _ in 0..3 {
        for vm in &machines {
            let scan = vm.merge_scan(CPU, u64::MAX);
            assert!(scan.round_over);
            sums = [sums[0] + scan.offered, sums[1] + scan.joined, sums[2] + scan.vacated];
        }
        host.merging.next_round();
    }
    assert_eq!(sums, [30, 30, 40], "offered, joined, given back as zeros");
    let differed: u64 = machines.iter().map(|vm| vm.stats.merge_differed.get()).sum();
    assert_eq!(differed, 0, "what cannot become one is not even tried");
}

/// Every row of the specification's table of access from outside.
#[test]
fn tags_are_read_and_written_from_outside() {
    let host = host();
    let (vm, plain) = (vm(&host), Vm::new(&host, CPU, Stage2 { fwb: true }, OPTIONS).unwrap());
    let first = Pfn::new(0x8_0000 + FRAMES - ROM);
    let rom = object(&host, Spec::Rom { first, frames: ROM, owned: false });
    let ram = object(&host, Spec::Anonymous { frames: 600, policy: Policy::Pages, tagged: true });
    let device = object(&host, Spec::Device { first: Pfn::new(0x900), frames: 1 });
    let beside = memory(&host, 8, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, 600, ram, SlotFlags::LOG_DIRTY)).unwrap();
    vm.set_slot(CPU, &slot(1, 0, ROM, rom, SlotFlags::READ_ONLY)).unwrap();
    vm.set_slot(CPU, &slot(2, RAM << 1, 1, device, SlotFlags::empty())).unwrap();
    plain.set_slot(CPU, &slot(0, RAM, 8, beside, SlotFlags::empty())).unwrap();
    let read = |vm: &TestVm<'_>, gpa| vm.read_tags(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(gpa));
    let write =
        |vm: &TestVm<'_>, gpa, tags: &Tags| vm.write_tags(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(gpa), tags);
    let mut some = Tags::ZERO;
    some.set(0, 3);
    some.set(255, 0xf);
    // Not a machine with tags; an address that is not aligned.
    assert_eq!((read(&plain, RAM), write(&plain, RAM, &some)), (Err(TagError::Untagged), Err(TagError::Untagged)));
    let unaligned = TagError::Unaligned { gpa: Gpa::new(RAM + 16) };
    assert_eq!((read(&vm, RAM + 16), write(&vm, RAM + 16, &some)), (Err(unaligned), Err(unaligned)));
    // Untouched: zeros, and it stays so.
    assert_eq!(read(&vm, RAM), Ok(Tags::ZERO));
    {
        let pin = host.epoch.pin(CPU);
        assert!(!host.objects.get(&pin, ram).unwrap().is_resident(&host.machine, 0));
    }
    assert_eq!(read(&vm, 0), Ok(Tags::ZERO), "read-only memory has none");
    // Written: there, and the page is dirty.
    assert_eq!(write(&vm, RAM + PAGE_SIZE, &some), Ok(()));
    assert_eq!(read(&vm, RAM + PAGE_SIZE), Ok(some));
    assert_eq!(touch(&vm, RAM + PAGE_SIZE, Access::Read), Outcome::Resume);
    let Entry::Leaf(leaf) = entry(&vm, RAM + PAGE_SIZE) else { panic!("it is mapped") };
    assert_eq!(host.machine.load_tags(leaf.pfn), some, "the guest finds them");
    // No slot, read-only memory, a device.
    let outside = |gpa| TagError::Copy(CopyError::Outside { gpa: Gpa::new(gpa) });
    let read_only = TagError::Copy(CopyError::ReadOnly { gpa: Gpa::new(0) });
    assert_eq!((read(&vm, 8 * RAM), write(&vm, 8 * RAM, &some)), (Err(outside(8 * RAM)), Err(outside(8 * RAM))));
    assert_eq!(write(&vm, 0, &some), Err(read_only));
    assert_eq!((read(&vm, RAM << 1), write(&vm, RAM << 1, &some)), (Err(outside(RAM << 1)), Err(outside(RAM << 1))));
    let mut dirty = [0; 10];
    assert_eq!(vm.get_dirty_log(CPU, 0, &mut dirty), Ok(1));
    assert_eq!(dirty[0], 1 << 1, "the page that was written");
}

#[test]
fn tags_that_are_written_are_the_writers_own() {
    let host = host();
    let parent = vm(&host);
    let ram = object(&host, Spec::Anonymous { frames: 600, policy: Policy::Pages, tagged: true });
    parent.set_slot(CPU, &slot(0, RAM, 600, ram, SlotFlags::empty())).unwrap();
    let mut tags = Tags::ZERO;
    tags.set(7, 3);
    let read = |vm: &TestVm<'_>| vm.read_tags(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(RAM));
    let write = |vm: &TestVm<'_>, tags: &Tags| vm.write_tags(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(RAM), tags);
    assert_eq!(write(&parent, &tags), Ok(()));
    let child = parent.fork(CPU).unwrap();
    assert_eq!(touch(&child, RAM, Access::Read), Outcome::Resume);
    let before = tags;
    tags.set(8, 4);
    assert_eq!(write(&child, &tags), Ok(()));
    assert_eq!((read(&parent), read(&child)), (Ok(before), Ok(tags)));
    assert_eq!(touch(&child, RAM, Access::Read), Outcome::Resume);
    let Entry::Leaf(leaf) = entry(&child, RAM) else { panic!("it is mapped") };
    assert_eq!(host.machine.load_tags(leaf.pfn), tags, "and the guest finds them");
}
