//! The pipeline end to end on a flat machine, with arm64's descriptors: faults, invalidations, slots, memory running out.

use std::boxed::Box;
use std::vec::Vec;

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SIZE, PageSize, Pfn, PfnRange};
use entresol_arch_arm64::stage2::Stage2;
use entresol_backing::{FrameMeta, FramePool, ObjectHandle, Objects, Policy, Spec};
use entresol_fault::{Access, Cause, Fault};
use entresol_machine::Features;
use entresol_machine::flat::{Event, FlatMachine};
use entresol_slot::{Hint, ObjectId, SlotFlags, SlotRequest};
use entresol_table::Entry;
use proptest::prelude::*;

use crate::{Abort, CopyError, Host, Maintenance, Options, Outcome, ReadOnlyIvac, Reason, Vm};

pub(crate) const CPU: usize = 0;
pub(crate) const RAM: u64 = 0x4000_0000;
pub(crate) const OPTIONS: Options =
    Options { ipa_bits: 40, slots: 8, largest: PageSize::Size1G, read_only_ivac: ReadOnlyIvac::Abort, tags: false };

pub(crate) type TestVm<'h> = Vm<'h, FlatMachine, Stage2>;

pub(crate) fn host_with(frames: u64, features: Features) -> Host<FlatMachine> {
    host_beside_rom(frames, 0, features)
}

/// Of `frames` frames the last `rom` are not the pool's.
pub(crate) fn host_beside_rom(frames: u64, rom: u64, features: Features) -> Host<FlatMachine> {
    let first = Pfn::new(0x8_0000);
    let meta: Box<[FrameMeta]> = (0..frames).map(|_| FrameMeta::new()).collect();
    let pool = FramePool::new(first, meta, 4).unwrap();
    pool.add(PfnRange::new(first, frames - rom).unwrap()).unwrap();
    let machine = FlatMachine::new(first, frames, features);
    Host::new(machine, pool, Objects::with_capacity(8).unwrap()).unwrap()
}

pub(crate) fn coherent() -> Features {
    Features { forced_write_back: true, coherent_icache: true, physical_bits: 44, vmid_bits: 16, tags: false }
}

pub(crate) fn host(frames: u64) -> Host<FlatMachine> {
    host_with(frames, coherent())
}

pub(crate) fn vm<'h>(host: &'h Host<FlatMachine>) -> TestVm<'h> {
    Vm::new(host, CPU, Stage2 { fwb: host_fwb(host) }, OPTIONS).unwrap()
}

fn host_fwb(host: &Host<FlatMachine>) -> bool {
    use entresol_machine::Machine;
    host.machine.features().forced_write_back
}

pub(crate) fn memory(host: &Host<FlatMachine>, frames: u64, policy: Policy) -> ObjectHandle {
    host.objects.create(&host.supply(CPU), Spec::anonymous(frames, policy)).unwrap()
}

pub(crate) fn slot(id: u32, base: u64, frames: u64, object: ObjectHandle, flags: SlotFlags) -> SlotRequest {
    let object = ObjectId::new(object.raw());
    SlotRequest { id, base: Gpa::new(base), size: frames * PAGE_SIZE, object, offset: 0, flags: flags.bits() }
}

pub(crate) fn fault(gpa: u64, access: Access) -> Fault {
    Fault {
        gpa: Gpa::new(gpa),
        access,
        cause: Cause::Translation,
        stage1_walk: false,
        cache_maintenance: false,
        transfer: None,
        syndrome: 0,
    }
}

pub(crate) fn touch(vm: &TestVm<'_>, gpa: u64, access: Access) -> Outcome {
    vm.handle(&vm.host().epoch.pin(CPU), &Hint::new(), &fault(gpa, access))
}

#[test]
fn memory_is_zero_and_mapped_on_first_touch_only() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 1024, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, 1024, object, SlotFlags::empty())).unwrap();
    assert_eq!(vm.census().of(PageSize::Size4K), 0, "nothing before the first touch");
    for page in [0, 1, 700, 1023] {
        assert_eq!(touch(&vm, RAM + page * PAGE_SIZE + 8, Access::Write), Outcome::Resume);
    }
    assert_eq!(vm.census().of(PageSize::Size4K), 4);
    assert_eq!((vm.stats.fresh.get(), vm.stats.populated.get()), (4, 0));
    let mut bytes = [1; 64];
    vm.read(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(RAM + 700 * PAGE_SIZE), &mut bytes).unwrap();
    assert_eq!(bytes, [0; 64]);
}

#[test]
fn a_block_where_the_object_has_one() {
    let host = host(4096);
    let vm = vm(&host);
    let object = memory(&host, 1024 + 7, Policy::Blocks);
    vm.set_slot(CPU, &slot(0, RAM, 1024 + 7, object, SlotFlags::empty())).unwrap();
    for page in [5, 600, 1024, 1030] {
        assert_eq!(touch(&vm, RAM + page * PAGE_SIZE, Access::Read), Outcome::Resume);
    }
    let census = vm.census();
    assert_eq!((census.of(PageSize::Size2M), census.of(PageSize::Size4K)), (2, 2));
}

#[test]
fn what_a_zap_took_comes_back_with_its_content() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 512, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, 512, object, SlotFlags::empty())).unwrap();
    assert_eq!(touch(&vm, RAM, Access::Write), Outcome::Resume);
    vm.write(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(RAM + 4), b"still here").unwrap();
    vm.zap(CPU, GfnRange::new(Gfn::new(RAM >> 12), 512).unwrap()).unwrap();
    assert_eq!(vm.census().of(PageSize::Size4K), 0);
    assert_eq!(touch(&vm, RAM, Access::Read), Outcome::Resume);
    assert_eq!((vm.stats.fresh.get(), vm.stats.populated.get()), (1, 1));
    let mut bytes = [0; 10];
    vm.read(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(RAM + 4), &mut bytes).unwrap();
    assert_eq!(&bytes, b"still here");
}

#[test]
fn a_fault_inside_an_invalidation_retries_and_one_beside_it_does_not() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 512, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, 512, object, SlotFlags::empty())).unwrap();
    let range = GfnRange::new(Gfn::new((RAM >> 12) + 10), 10).unwrap();
    let invalidation = vm.invalidate_range_start(CPU, range).unwrap();
    assert_eq!(touch(&vm, RAM + 12 * PAGE_SIZE, Access::Read), Outcome::Retry);
    assert_eq!(touch(&vm, RAM + 20 * PAGE_SIZE, Access::Read), Outcome::Resume);
    vm.invalidate_range_end(invalidation);
    assert_eq!(touch(&vm, RAM + 12 * PAGE_SIZE, Access::Read), Outcome::Resume);
}

#[test]
fn outside_and_read_only() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 16, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, 16, object, SlotFlags::READ_ONLY)).unwrap();
    assert_eq!(touch(&vm, RAM + 16 * PAGE_SIZE, Access::Read), Outcome::Mmio);
    assert_eq!(touch(&vm, RAM + 16 * PAGE_SIZE, Access::Fetch), Outcome::Inject(Abort::External));
    assert_eq!(touch(&vm, 1 << 40, Access::Read), Outcome::Inject(Abort::External));
    assert_eq!(touch(&vm, 1 << 44, Access::Read), Outcome::Inject(Abort::AddressSize));
    assert_eq!(touch(&vm, RAM, Access::Read), Outcome::Resume);
    assert_eq!(touch(&vm, RAM, Access::Write), Outcome::Mmio);
    let refused = vm.write(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(RAM), b"x");
    assert_eq!(refused, Err(CopyError::ReadOnly { gpa: Gpa::new(RAM) }));
}

#[test]
fn deleting_a_slot_takes_its_entries_and_its_hold() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 16, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, 16, object, SlotFlags::empty())).unwrap();
    assert_eq!(touch(&vm, RAM, Access::Write), Outcome::Resume);
    assert!(host.objects.destroy(&host.supply(CPU), &host.epoch, object).is_err(), "the slot holds it");
    vm.set_slot(CPU, &slot(0, RAM, 0, object, SlotFlags::empty())).unwrap();
    assert_eq!(vm.census().of(PageSize::Size4K), 0);
    assert_eq!(touch(&vm, RAM, Access::Write), Outcome::Mmio);
    host.objects.destroy(&host.supply(CPU), &host.epoch, object).unwrap();
}

#[test]
fn a_device_is_never_executed() {
    let host = host(2048);
    let vm = vm(&host);
    let device = Spec::Device { first: Pfn::new(0x900), frames: 4 };
    let object = host.objects.create(&host.supply(CPU), device).unwrap();
    vm.set_slot(CPU, &slot(0, RAM, 4, object, SlotFlags::empty())).unwrap();
    assert_eq!(touch(&vm, RAM, Access::Fetch), Outcome::Inject(Abort::External));
    assert_eq!(touch(&vm, RAM, Access::Write), Outcome::Resume);
    let at = vm.table().walk(&host.machine, Gfn::new(RAM >> 12)).unwrap();
    assert!(matches!(at.entry, Entry::Leaf(leaf) if leaf.memory == entresol_table::Memory::Device));
}

/// INV-1 and INV-6 on a machine whose caches are not coherent: the order of what was asked of it.
#[test]
fn caches_are_clean_before_the_entry_is_seen() {
    let features = Features { forced_write_back: false, coherent_icache: false, ..coherent() };
    let host = host_with(2048, features);
    let vm = vm(&host);
    let object = memory(&host, 16, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, 16, object, SlotFlags::empty())).unwrap();
    assert_eq!(touch(&vm, RAM, Access::Read), Outcome::Resume);
    host.machine.events();
    assert_eq!(touch(&vm, RAM + PAGE_SIZE, Access::Fetch), Outcome::Resume);
    let at = vm.table().walk(&host.machine, Gfn::new((RAM >> 12) + 1)).unwrap();
    let Entry::Leaf(leaf) = at.entry else { panic!("{at:?}") };
    let page = PfnRange::single(leaf.pfn);
    let events = host.machine.events();
    let place =
        |wanted: Event| events.iter().position(|event| *event == wanted).unwrap_or_else(|| panic!("{wanted:?}"));
    let published = place(Event::Word(at.word, at.raw));
    assert!(place(Event::Zero(page)) < place(Event::Clean(page)));
    assert!(place(Event::Clean(page)) < published);
    assert!(place(Event::Icache(page)) < published);
    let completed = events[..published].iter().rposition(|event| *event == Event::Complete).unwrap();
    assert!(completed > place(Event::Icache(page)) && completed > place(Event::Clean(page)));
}

#[test]
fn execution_after_data_invalidates_and_relaxes() {
    let features = Features { coherent_icache: false, ..coherent() };
    let host = host_with(2048, features);
    let vm = vm(&host);
    let object = memory(&host, 16, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, 16, object, SlotFlags::empty())).unwrap();
    assert_eq!(touch(&vm, RAM, Access::Write), Outcome::Resume);
    host.machine.events();
    let fetch = Fault { cause: Cause::Permission { level: 3 }, ..fault(RAM, Access::Fetch) };
    assert_eq!(vm.handle(&host.epoch.pin(CPU), &Hint::new(), &fetch), Outcome::Resume);
    assert!(host.machine.events().iter().any(|event| matches!(event, Event::Icache(_))));
    let at = vm.table().walk(&host.machine, Gfn::new(RAM >> 12)).unwrap();
    assert!(matches!(at.entry, Entry::Leaf(leaf) if leaf.permissions.execute && leaf.permissions.write));
}

/// How an operation ended for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Done,
    Aborted,
}

/// The first door: a CPU makes the operation until it is done, with the fault that the table gives it. Returns how it ended
/// and after how many traps.
fn by_aborts(vm: &TestVm<'_>, gpa: u64, needs_write: bool) -> (Ended, usize) {
    for traps in 0.. {
        let entry = vm.table().walk(&vm.host().machine, Gpa::new(gpa).frame()).unwrap().entry;
        let cause = match entry {
            Entry::Leaf(leaf) if leaf.permissions.write || !needs_write => return (Ended::Done, traps),
            Entry::Leaf(_) => Cause::Permission { level: 3 },
            _ => Cause::Translation,
        };
        let fault = Fault { cause, cache_maintenance: true, ..fault(gpa, Access::Write) };
        match vm.handle(&vm.host().epoch.pin(CPU), &Hint::new(), &fault) {
            Outcome::Resume => {}
            Outcome::Skip => return (Ended::Done, traps + 1),
            Outcome::Inject(Abort::External) => return (Ended::Aborted, traps + 1),
            other => panic!("{other:?}"),
        }
    }
    unreachable!()
}

/// The second door.
fn by_trap(vm: &TestVm<'_>, gpa: u64, operation: Maintenance) -> Ended {
    match vm.maintain(&vm.host().epoch.pin(CPU), &Hint::new(), Gpa::new(gpa), operation) {
        Outcome::Skip => Ended::Done,
        Outcome::Inject(Abort::External) => Ended::Aborted,
        other => panic!("{other:?}"),
    }
}

/// Every cell of "cache-ops": operation, target, both doors, both policies. INV-13, INV-15.
#[test]
fn maintenance_ends_the_same_through_both_doors() {
    let page = |number: u64| RAM + number * PAGE_SIZE;
    let targets =
        [("nothing", 64), ("rw unmapped", 0), ("rw mapped", 1), ("ro unmapped", 16), ("ro mapped", 17), ("rom", 32)];
    for read_only_ivac in [ReadOnlyIvac::Abort, ReadOnlyIvac::Clean] {
        for operation in
            [Maintenance::Invalidate, Maintenance::Clean, Maintenance::CleanToUnification, Maintenance::Instructions]
        {
            let host =
                host_beside_rom(2048, 16, Features { forced_write_back: false, coherent_icache: false, ..coherent() });
            let vm = Vm::new(&host, CPU, Stage2 { fwb: false }, Options { read_only_ivac, ..OPTIONS }).unwrap();
            let (data, other) = (memory(&host, 16, Policy::Pages), memory(&host, 16, Policy::Pages));
            let rom = Spec::Rom { first: Pfn::new(0x8_07f0), frames: 16, owned: false };
            let rom = host.objects.create(&host.supply(CPU), rom).unwrap();
            vm.set_slot(CPU, &slot(0, page(0), 16, data, SlotFlags::empty())).unwrap();
            vm.set_slot(CPU, &slot(1, page(16), 16, other, SlotFlags::READ_ONLY)).unwrap();
            vm.set_slot(CPU, &slot(2, page(32), 16, rom, SlotFlags::empty())).unwrap();
            for number in [1, 17] {
                assert_eq!(touch(&vm, page(number), Access::Read), Outcome::Resume);
            }
            let needs_write = operation == Maintenance::Invalidate;
            for (target, number) in targets {
                let what = std::format!("{operation:?} on {target}, {read_only_ivac:?}");
                let read_only = number >= 16 && target != "nothing";
                let refused = needs_write && read_only && read_only_ivac == ReadOnlyIvac::Abort;
                let expected = if refused { Ended::Aborted } else { Ended::Done };
                let mapped = vm.census().of(PageSize::Size4K);
                assert_eq!(by_trap(&vm, page(number), operation), expected, "{what}");
                let maps = needs_write && target == "rw unmapped";
                assert_eq!(vm.census().of(PageSize::Size4K), mapped + u64::from(maps), "{what}: only a write maps");
                let (ended, traps) = by_aborts(&vm, page(number), needs_write);
                assert_eq!(ended, expected, "{what}");
                assert!(traps <= 2, "{what}: {traps} traps");
                if read_only {
                    let entry = vm.table().walk(&host.machine, Gpa::new(page(number)).frame()).unwrap().entry;
                    assert!(matches!(entry, Entry::Leaf(leaf) if !leaf.permissions.write), "{what}: {entry:?}");
                }
            }
        }
    }
}

#[test]
fn a_trapped_operation_reaches_the_caches_of_a_page_that_is_there() {
    let host = host_with(2048, Features { forced_write_back: false, coherent_icache: false, ..coherent() });
    let vm = vm(&host);
    let object = memory(&host, 16, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, 16, object, SlotFlags::empty())).unwrap();
    assert_eq!(touch(&vm, RAM, Access::Write), Outcome::Resume);
    let pin = host.epoch.pin(CPU);
    let page =
        PfnRange::single(host.objects.get(&pin, object).unwrap().present(&host.supply(pin.cpu()), 0).unwrap().frame(0));
    drop(pin);
    host.machine.events();
    assert_eq!(by_trap(&vm, RAM + 64, Maintenance::Clean), Ended::Done);
    assert_eq!(host.machine.events(), [Event::Clean(page), Event::Complete]);
    assert_eq!(by_trap(&vm, RAM + 64, Maintenance::Instructions), Ended::Done);
    assert_eq!(host.machine.events(), [Event::Icache(page), Event::Complete]);
    assert_eq!(by_trap(&vm, RAM + PAGE_SIZE, Maintenance::Clean), Ended::Done);
    assert_eq!(host.machine.events(), [], "a page that was never touched is in no cache");
}

/// INV-7: whichever allocation fails, the fault says so, nothing is lost, and it works when there is memory again.
#[test]
fn every_allocation_may_fail() {
    for spare in 0..8 {
        let host = host(64);
        let vm = vm(&host);
        let object = memory(&host, 1 << 20, Policy::Pages);
        vm.set_slot(CPU, &slot(0, RAM, 1 << 20, object, SlotFlags::empty())).unwrap();
        let mut hoard = Vec::new();
        while host.pool.free_frames() > spare {
            hoard.push(host.pool.take(CPU, entresol_backing::Order::PAGE).unwrap());
        }
        let first = touch(&vm, RAM, Access::Write);
        let expected = if spare < 5 { Outcome::Exit(Reason::OutOfMemory) } else { Outcome::Resume };
        assert_eq!(first, expected, "{spare} frames to spare");
        for frame in hoard {
            host.pool.give(CPU, frame, entresol_backing::Order::PAGE);
        }
        assert_eq!(touch(&vm, RAM, Access::Write), Outcome::Resume);
        vm.destroy(CPU);
        host.objects.destroy(&host.supply(CPU), &host.epoch, object).unwrap();
        host.pool.reap(&host.epoch, CPU, usize::MAX);
        assert_eq!(host.pool.free_frames(), 64);
    }
}

/// Parallel faults beside invalidations: every vCPU ends with an entry that shows what the object has.
#[test]
fn parallel_faults_beside_invalidations() {
    let host = host(4096);
    let vm = vm(&host);
    let object = memory(&host, 256, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, 256, object, SlotFlags::empty())).unwrap();
    std::thread::scope(|scope| {
        for cpu in 1..3 {
            let (vm, host) = (&vm, &host);
            scope.spawn(move || {
                let hint = Hint::new();
                for round in 0..200 {
                    for page in 0..256 {
                        let access = if (page + round) % 2 == 0 { Access::Read } else { Access::Write };
                        let fault = fault(RAM + page * PAGE_SIZE, access);
                        let outcome = vm.handle(&host.epoch.pin(cpu), &hint, &fault);
                        assert!(matches!(outcome, Outcome::Resume | Outcome::Retry), "{outcome:?}");
                    }
                }
            });
        }
        for round in 0..200 {
            let range = GfnRange::new(Gfn::new((RAM >> 12) + round % 200), 50).unwrap();
            vm.zap(CPU, range).unwrap();
        }
    });
    for page in 0..256 {
        assert_eq!(touch(&vm, RAM + page * PAGE_SIZE, Access::Read), Outcome::Resume);
    }
    assert_eq!(vm.census().of(PageSize::Size4K), 256);
    let pin = host.epoch.pin(CPU);
    let backing = host.objects.get(&pin, object).unwrap();
    for page in 0..256 {
        let at = vm.table().walk(&host.machine, Gfn::new((RAM >> 12) + page)).unwrap();
        let Entry::Leaf(leaf) = at.entry else { panic!("{at:?}") };
        assert_eq!(leaf.pfn, backing.present(&host.supply(pin.cpu()), page).unwrap().frame(page));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// Guest bytes behave as a flat array whatever is mapped, zapped or moved in between.
    #[test]
    fn bytes_are_where_they_were_put(
        steps in prop::collection::vec((0u8..4, 0u64..64 * PAGE_SIZE - 40, any::<u8>()), 1..80),
        blocks: bool,
    ) {
        let host = host(4096);
        let vm = vm(&host);
        let policy = if blocks { Policy::Blocks } else { Policy::Pages };
        let object = memory(&host, 1024, policy);
        let (mut base, hint) = (RAM, Hint::new());
        vm.set_slot(CPU, &slot(0, base, 1024, object, SlotFlags::empty())).unwrap();
        let mut model = std::vec![0u8; 64 * PAGE_SIZE as usize];
        for (what, at, byte) in steps {
            match what {
                0 => {
                    let bytes = [byte; 33];
                    vm.write(&host.epoch.pin(CPU), &hint, Gpa::new(base + at), &bytes).unwrap();
                    model[at as usize..at as usize + 33].copy_from_slice(&bytes);
                }
                1 => prop_assert_eq!(touch(&vm, base + at, Access::Write), Outcome::Resume),
                2 => vm.zap(CPU, GfnRange::new(Gpa::new(base + at).frame(), 3).unwrap()).unwrap(),
                _ => {
                    base = if base == RAM { RAM + (1 << 30) + (u64::from(byte) << 12) } else { RAM };
                    vm.set_slot(CPU, &slot(0, base, 1024, object, SlotFlags::empty())).unwrap();
                }
            }
        }
        let mut bytes = std::vec![0u8; model.len()];
        vm.read(&host.epoch.pin(CPU), &hint, Gpa::new(base), &mut bytes).unwrap();
        prop_assert!(bytes == model);
    }
}
