//! MMIO entries on a flat machine, with both formats that have them.

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SIZE, PageSize};
use entresol_arch_x86::ept::Extended;
use entresol_arch_x86::npt::Nested;
use entresol_backing::{ObjectHandle, Policy};
use entresol_fault::{Access, Cause, Fault};
use entresol_machine::Machine;
use entresol_machine::flat::FlatMachine;
use entresol_slot::{Hint, SlotFlags};
use entresol_table::{End, Entry, Format, MmioEntry};
use proptest::prelude::*;

use crate::tests::{CPU, OPTIONS, RAM, fault, host, memory, slot};
use crate::{Host, MmioCache, MmioCounts, Outcome, Reason, Vm};

const NESTED: Nested = Nested::new(44, None);
const EXTENDED: Extended = Extended::new(44, None);
/// Where no slot is.
const DEVICE: u64 = 0xfee0_0000;

/// A vCPU, and the hardware that tells its faults apart.
struct Vcpu<'v, 'h, F> {
    vm: &'v Vm<'h, FlatMachine, F>,
    hint: Hint,
    cache: MmioCache,
}

impl<'v, 'h, F: Format> Vcpu<'v, 'h, F> {
    fn new(vm: &'v Vm<'h, FlatMachine, F>) -> Self {
        Self { vm, hint: Hint::new(), cache: MmioCache::new() }
    }

    /// One access until it is answered otherwise than by another try.
    fn access(&mut self, gpa: u64, access: Access) -> Outcome {
        for _ in 0..4 {
            let pin = self.vm.host().epoch.pin(CPU);
            let way = self.vm.way(&pin, Gpa::new(gpa).frame()).expect("inside the address space");
            let translation = fault(gpa, access);
            let outcome = match way.end {
                End::Mmio(_) | End::Malformed => {
                    self.vm.handle_refused(&pin, &self.hint, &mut self.cache, &translation)
                }
                End::Entry(Entry::Leaf(leaf)) if access != Access::Write || leaf.permissions.write => {
                    return Outcome::Resume;
                }
                End::Entry(Entry::Leaf(_)) => {
                    let refused = Fault { cause: Cause::Permission { level: 3 }, ..translation };
                    self.vm.handle_noting(&pin, &self.hint, &mut self.cache, &refused)
                }
                End::Entry(_) => self.vm.handle_noting(&pin, &self.hint, &mut self.cache, &translation),
            };
            if !matches!(outcome, Outcome::Retry | Outcome::Resume) {
                return outcome;
            }
        }
        panic!("{gpa:#x} is tried again for ever");
    }

    fn counts(&self) -> [u64; 4] {
        let MmioCounts { cached, walked, refreshed, made } = self.cache.counts();
        [cached, walked, refreshed, made]
    }
}

fn vm<F: Format>(host: &Host<FlatMachine>, format: F) -> Vm<'_, FlatMachine, F> {
    Vm::new(host, CPU, format, OPTIONS).unwrap()
}

fn ram<F: Format>(host: &Host<FlatMachine>, vm: &Vm<'_, FlatMachine, F>, frames: u64) -> ObjectHandle {
    let object = memory(host, frames, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, frames, object, SlotFlags::empty())).unwrap();
    object
}

fn the_second_access_needs_no_slots<F: Format>(format: F) {
    let host = host(2048);
    let vm = vm(&host, format);
    ram(&host, &vm, 8);
    let mut first = Vcpu::new(&vm);
    assert_eq!(first.access(DEVICE + 8, Access::Read), Outcome::Mmio);
    assert_eq!(first.counts(), [0, 0, 0, 1], "an entry was made");
    assert_eq!(first.access(DEVICE + 16, Access::Write), Outcome::Mmio);
    assert_eq!(first.counts(), [1, 0, 0, 1], "the vCPU that made it knows it");
    let mut second = Vcpu::new(&vm);
    assert_eq!(second.access(DEVICE, Access::Read), Outcome::Mmio);
    assert_eq!(second.access(DEVICE, Access::Read), Outcome::Mmio);
    assert_eq!(second.counts(), [1, 1, 0, 0], "another finds it by a walk");
    assert_eq!(vm.census().frames(), 0, "an MMIO entry is no memory");
}

#[test]
fn the_second_access_needs_no_slots_with_either_format() {
    the_second_access_needs_no_slots(NESTED);
    the_second_access_needs_no_slots(EXTENDED);
}

fn an_entry_is_true_until_slots_change<F: Format>(format: F) {
    let host = host(2048);
    let vm = vm(&host, format);
    let object = ram(&host, &vm, 8);
    let mut vcpu = Vcpu::new(&vm);
    assert_eq!(vcpu.access(DEVICE, Access::Write), Outcome::Mmio);
    let far = slot(1, RAM << 2, 4, object, SlotFlags::empty());
    vm.set_slot(CPU, &far).unwrap();
    assert_eq!(vcpu.access(DEVICE, Access::Write), Outcome::Mmio);
    assert_eq!(vcpu.counts(), [0, 0, 1, 2], "looked for again, and remembered anew");
    vm.set_slot(CPU, &slot(2, DEVICE, 4, object, SlotFlags::empty())).unwrap();
    assert_eq!(vcpu.access(DEVICE, Access::Write), Outcome::Resume, "memory is there now");
    assert_eq!(vm.census().of(PageSize::Size4K), 1);
    vm.set_slot(CPU, &slot(2, DEVICE, 0, object, SlotFlags::empty())).unwrap();
    assert_eq!(vcpu.access(DEVICE, Access::Read), Outcome::Mmio);
    assert_eq!((vcpu.counts()[3], vm.census().of(PageSize::Size4K)), (3, 0));
}

#[test]
fn an_entry_is_true_until_slots_change_with_either_format() {
    an_entry_is_true_until_slots_change(NESTED);
    an_entry_is_true_until_slots_change(EXTENDED);
}

#[test]
fn a_store_to_read_only_memory_leaves_no_entry() {
    let host = host(2048);
    let vm = vm(&host, NESTED);
    let object = memory(&host, 8, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, 8, object, SlotFlags::READ_ONLY)).unwrap();
    let mut vcpu = Vcpu::new(&vm);
    for _ in 0..2 {
        assert_eq!(vcpu.access(RAM, Access::Write), Outcome::Mmio);
    }
    assert_eq!(vcpu.counts(), [0; 4]);
    assert_eq!(vcpu.access(RAM, Access::Read), Outcome::Resume);
    assert_eq!(vcpu.access(RAM, Access::Write), Outcome::Mmio);
    assert_eq!(vm.census().of(PageSize::Size4K), 1, "reads stay direct");
}

#[test]
fn without_a_bit_to_reserve_every_access_is_looked_up() {
    let host = host(2048);
    let vm = vm(&host, Nested::new(52, None));
    ram(&host, &vm, 8);
    let mut vcpu = Vcpu::new(&vm);
    for _ in 0..3 {
        assert_eq!(vcpu.access(DEVICE, Access::Read), Outcome::Mmio);
    }
    assert_eq!((vcpu.counts(), vm.census().tables), ([0; 4], 0));
    assert_eq!(vcpu.access(RAM, Access::Read), Outcome::Resume);
}

#[test]
fn no_entry_survives_the_crossing_to_a_new_round() {
    let host = host(2048);
    let vm = vm(&host, EXTENDED);
    let object = ram(&host, &vm, 8);
    let mut vcpu = Vcpu::new(&vm);
    assert_eq!(vcpu.access(DEVICE, Access::Read), Outcome::Mmio);
    let stored = vm.slots().generation().count();
    let round = 1 << EXTENDED.generation_bits();
    vm.slots().renumber(&host.epoch, round - 2, || {});
    let raise = |id| vm.set_slot(CPU, &slot(id, RAM << id, 4, object, SlotFlags::empty())).unwrap();
    raise(1);
    while vm.slots().generation().count() < round + stored {
        raise((vm.slots().generation().count() - round) as u32 + 3);
    }
    assert_eq!(vm.slots().generation().count(), round + stored, "what entries keep of it has come again");
    let end = vm.way(&host.epoch.pin(CPU), Gpa::new(DEVICE).frame()).unwrap().end;
    assert_eq!(end, End::Entry(Entry::Vacant));
}

#[test]
fn what_was_taken_away_is_tried_again_and_what_is_broken_is_told() {
    let host = host(2048);
    let vm = vm(&host, NESTED);
    ram(&host, &vm, 8);
    let mut vcpu = Vcpu::new(&vm);
    assert_eq!(vcpu.access(DEVICE, Access::Read), Outcome::Mmio);
    // The hardware reports the entry; then another CPU is faster.
    vm.zap(CPU, GfnRange::new(Gfn::new(0), 1 << 28).unwrap()).unwrap();
    vcpu.cache.forget();
    let refused = fault(DEVICE, Access::Read);
    let handled = |vcpu: &mut Vcpu<'_, '_, Nested>| {
        vm.handle_refused(&host.epoch.pin(CPU), &vcpu.hint, &mut vcpu.cache, &refused)
    };
    assert_eq!(handled(&mut vcpu), Outcome::Retry);
    assert_eq!(vcpu.access(RAM, Access::Write), Outcome::Resume);
    let frame = Gpa::new(RAM).frame();
    let at = vm.table().walk(&host.machine, frame).unwrap();
    host.machine.store(at.word, at.raw | 1 << 45);
    assert_eq!(vcpu.access(RAM, Access::Write), Outcome::Exit(Reason::Malformed));
    let way = vm.way(&host.epoch.pin(CPU), frame).unwrap();
    assert_eq!((way.last, way.words[3], way.end), (3, at.raw | 1 << 45, End::Malformed));
    host.machine.store(at.word, at.raw);
}

#[test]
fn an_entry_about_another_frame_is_not_believed() {
    let host = host(2048);
    let vm = vm(&host, NESTED);
    ram(&host, &vm, 8);
    let mut vcpu = Vcpu::new(&vm);
    assert_eq!(vcpu.access(DEVICE, Access::Read), Outcome::Mmio);
    let at = vm.table().walk(&host.machine, Gpa::new(DEVICE).frame()).unwrap();
    let generation = vm.slots().generation().count();
    let other = MmioEntry { gfn: Gfn::new(1), generation };
    host.machine.store(at.word, NESTED.mmio(&other).unwrap());
    vcpu.cache.forget();
    assert_eq!(vcpu.access(DEVICE, Access::Read), Outcome::Mmio);
    assert_eq!(vcpu.counts(), [0, 0, 1, 2]);
}

#[test]
fn fetches_and_table_walks_are_no_devices_business() {
    let host = host(2048);
    let vm = vm(&host, NESTED);
    ram(&host, &vm, 8);
    let mut vcpu = Vcpu::new(&vm);
    assert_eq!(vcpu.access(DEVICE, Access::Read), Outcome::Mmio);
    assert!(matches!(vcpu.access(DEVICE, Access::Fetch), Outcome::Inject(_)));
    let walk = Fault { stage1_walk: true, ..fault(DEVICE, Access::Read) };
    let pin = host.epoch.pin(CPU);
    assert!(matches!(vm.handle_refused(&pin, &vcpu.hint, &mut vcpu.cache, &walk), Outcome::Inject(_)));
}

#[test]
fn a_guest_gets_few_table_pages_for_nothing() {
    let host = host(2048);
    let vm = vm(&host, NESTED);
    ram(&host, &vm, 8);
    let mut vcpu = Vcpu::new(&vm);
    let free = host.pool.free_frames();
    for page in 0..4096 {
        assert_eq!(vcpu.access((1 << 38) + (page << 22), Access::Read), Outcome::Mmio);
    }
    assert!(free - host.pool.free_frames() <= 64, "{} pages", free - host.pool.free_frames());
    assert!((32..64).contains(&vcpu.counts()[3]), "{:?}", vcpu.counts());
}

#[test]
fn without_a_frame_an_access_is_still_answered() {
    let host = host(16);
    let vm = vm(&host, EXTENDED);
    ram(&host, &vm, 4);
    let mut vcpu = Vcpu::new(&vm);
    let taken: std::vec::Vec<_> =
        core::iter::from_fn(|| host.pool.take(CPU, entresol_backing::Order::PAGE).ok()).collect();
    assert_eq!(vcpu.access(DEVICE, Access::Read), Outcome::Mmio);
    assert_eq!(vcpu.counts(), [0; 4]);
    taken.into_iter().for_each(|frame| host.pool.give(CPU, frame, entresol_backing::Order::PAGE));
    assert_eq!(vcpu.access(DEVICE, Access::Read), Outcome::Mmio);
    assert_eq!(vcpu.counts(), [0, 0, 0, 1]);
}

/// What an owner and a guest do.
#[derive(Clone, Copy, Debug)]
enum Act {
    Access { vcpu: usize, page: u64, write: bool },
    Create { id: u32, page: u64, read_only: bool },
    Delete { id: u32 },
    Move { id: u32, page: u64 },
    Zap { page: u64 },
    Age { rounds: u64 },
}

fn acts() -> impl Strategy<Value = Act> {
    let page = 0u64..12;
    prop_oneof![
        6 => (0usize..2, page.clone(), any::<bool>()).prop_map(|(vcpu, page, write)| Act::Access { vcpu, page, write }),
        2 => (0u32..3, page.clone(), any::<bool>()).prop_map(|(id, page, read_only)| Act::Create { id, page, read_only }),
        1 => (0u32..3).prop_map(|id| Act::Delete { id }),
        1 => (0u32..3, page.clone()).prop_map(|(id, page)| Act::Move { id, page }),
        1 => page.prop_map(|page| Act::Zap { page }),
        1 => (0u64..3).prop_map(|rounds| Act::Age { rounds }),
    ]
}

/// The owner answers exactly where no slot is, or where a store meets read-only memory; whatever was remembered before.
fn answers_follow_the_slots<F: Format>(format: F, acts: &[Act]) {
    let host = host(1024);
    let vm = vm(&host, format);
    let object = memory(&host, 16, Policy::Pages);
    let mut vcpus = [Vcpu::new(&vm), Vcpu::new(&vm)];
    let mut slots = std::collections::BTreeMap::new();
    let at = |page: u64| RAM + page * PAGE_SIZE;
    for act in acts {
        match *act {
            Act::Access { vcpu, page, write } => {
                let access = if write { Access::Write } else { Access::Read };
                let holder = slots.values().find(|(base, _)| (*base..*base + 2).contains(&page));
                let expected = match holder {
                    Some((_, read_only)) if !(write && *read_only) => Outcome::Resume,
                    _ => Outcome::Mmio,
                };
                assert_eq!(vcpus[vcpu].access(at(page), access), expected, "{page} {access:?} {slots:?}");
            }
            Act::Create { id, page, read_only } if !slots.contains_key(&id) => {
                let flags = if read_only { SlotFlags::READ_ONLY } else { SlotFlags::empty() };
                if vm.set_slot(CPU, &slot(id, at(page), 2, object, flags)).is_ok() {
                    slots.insert(id, (page, read_only));
                }
            }
            Act::Move { id, page } => {
                if let Some((base, read_only)) = slots.get_mut(&id) {
                    let flags = if *read_only { SlotFlags::READ_ONLY } else { SlotFlags::empty() };
                    if vm.set_slot(CPU, &slot(id, at(page), 2, object, flags)).is_ok() {
                        *base = page;
                    }
                }
            }
            Act::Delete { id } if slots.remove(&id).is_some() => {
                vm.set_slot(CPU, &slot(id, at(0), 0, object, SlotFlags::empty())).unwrap();
            }
            Act::Zap { page } => vm.zap(CPU, GfnRange::single(Gpa::new(at(page)).frame())).unwrap(),
            Act::Age { rounds } => {
                let count = vm.slots().generation().count();
                let round = ((count >> format.generation_bits()) + 1) << format.generation_bits();
                vm.slots().renumber(&host.epoch, round - 3 + rounds, || {});
            }
            Act::Create { .. } | Act::Delete { .. } => {}
        }
    }
}

proptest! {
    #[test]
    fn answers_follow_the_slots_with_nested_tables(acts in prop::collection::vec(acts(), 1..60)) {
        answers_follow_the_slots(NESTED, &acts);
    }

    #[test]
    fn answers_follow_the_slots_with_extended_tables(acts in prop::collection::vec(acts(), 1..60)) {
        answers_follow_the_slots(EXTENDED, &acts);
    }
}
