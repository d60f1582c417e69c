//! Whole machines whose guests run on shadow tables: whatever a guest does to its tables and its owner to its memory, once the guest has
//! flushed an access ends as the same access through its own tables and the slots does.

mod directed;

use std::boxed::Box;
use std::collections::BTreeMap;
use std::vec::Vec;

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SIZE, Pfn};
use entresol_arch_x86::npt::Nested;
use entresol_arch_x86::paging::{Controls, Kind, Mode, PageFault, Regime, Request, Tables, WalkError, Width, walk};
use entresol_arch_x86::shadow::{Exception, Shadow as Words};
use entresol_backing::{ObjectHandle, Policy};
use entresol_machine::flat::FlatMachine;
use entresol_machine::{Machine, Word};
use entresol_slot::{Hint, SlotFlags, SlotRequest};
use entresol_sync::zoo::plant;
use proptest::prelude::*;

use crate::tests::{CPU, OPTIONS, coherent, host, host_with, memory, slot};
use crate::{Host, Outcome, ShadeError, ShadowOutcome, Vm};

type Shaded<'h> = Vm<'h, FlatMachine, Nested>;

/// Guest frames: tables are in 1–9; the second slot, which comes and goes, is 12–15, or 16–19.
const TABLES: u64 = 9;
const SECOND: u64 = 12;
const MODES: [Mode; 5] = [Mode::Off, Mode::Bits32, Mode::Pae, Mode::Level4, Mode::Level5];
const VCPUS: usize = 2;
/// The CPU from which the tests look.
const OTHER: usize = 1;
/// The words of a table that addresses come by.
const PLACES: [u64; 4] = [0, 1, 256, 511];

/// Through slots and objects, as the guest's processor would with nothing cached. What it would store is kept apart.
struct Reference<'v, 'h> {
    vm: &'v Shaded<'h>,
    stored: BTreeMap<u64, u64>,
}

impl Tables for Reference<'_, '_> {
    type Error = ();

    fn load(&mut self, at: Gpa, width: Width) -> Result<u64, ()> {
        let place = at.get() & !7;
        let word = match self.stored.get(&place) {
            Some(word) => *word,
            None => word(self.vm, place).ok_or(())?,
        };
        Ok(if width == Width::Long { word } else { word >> (at.get() % 8 * 8) & 0xffff_ffff })
    }

    fn compare_exchange(&mut self, at: Gpa, width: Width, current: u64, new: u64) -> Result<bool, ()> {
        let (place, whole) = (at.get() & !7, self.load(Gpa::new(at.get() & !7), Width::Long)?);
        let (shift, mask) = if width == Width::Long { (0, u64::MAX) } else { (at.get() % 8 * 8, 0xffff_ffff) };
        if whole >> shift & mask != current {
            return Ok(false);
        }
        if is_read_only(self.vm, Gpa::new(place).frame()) {
            return Err(());
        }
        self.stored.insert(place, whole & !(mask << shift) | new << shift);
        Ok(true)
    }
}

/// The guest's memory at `at`, through its slots.
fn word(vm: &Shaded<'_>, at: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    vm.read(&vm.host().epoch.pin(OTHER), &Hint::new(), Gpa::new(at), &mut bytes).ok()?;
    Some(u64::from_le_bytes(bytes))
}

fn is_read_only(vm: &Shaded<'_>, gfn: Gfn) -> bool {
    let pin = vm.host().epoch.pin(OTHER);
    vm.slots().find(&pin, gfn, &Hint::new()).is_some_and(|slot| slot.is_read_only())
}

/// The shadow tables as the processor's walk finds them.
struct Hardware<'m>(&'m FlatMachine);

impl Tables for Hardware<'_> {
    type Error = core::convert::Infallible;

    fn load(&mut self, at: Gpa, _: Width) -> Result<u64, Self::Error> {
        Ok(self.0.load(Word::new(Pfn::new(at.frame().get()), (at.page_offset() / 8) as u16)))
    }

    fn compare_exchange(&mut self, _: Gpa, _: Width, _: u64, _: u64) -> Result<bool, Self::Error> {
        panic!("accessed and dirty flags of shadow entries are set ahead")
    }
}

/// How an access ended.
#[derive(Clone, Copy, PartialEq, Debug)]
enum End {
    /// With these bytes.
    Read(u64),
    /// It may be made, in the frame that backs this address.
    Written(Pfn),
    Mmio(Gpa),
    Fault(PageFault),
    NonCanonical,
    /// Its tables are where no memory is, or its code.
    Lost,
}

fn regime(mode: Mode, controls: Controls) -> Regime {
    let unseen = Controls::NO_SUPERVISOR_ACCESS | Controls::PROTECTION_KEYS;
    let controls = if controls.contains(Controls::WRITE_PROTECT) { controls } else { controls - unseen };
    let controls = controls - Controls::PROTECTION_KEYS;
    // CR4.PSE says something in 32-bit paging only.
    let controls = if mode == Mode::Bits32 { controls } else { controls | Controls::LARGE_PAGES };
    Regime { mode, root: 0x1000, pointers: [0x2001, 0x3001, 0, 0x4001], controls, pkru: 0, physical_bits: 40 }
}

/// Addresses whose indices are few.
fn addresses(mode: Mode) -> Vec<u64> {
    let (bits, levels, top) = match mode {
        Mode::Off => return (0..22).map(|frame| frame << 12 | 8).collect(),
        Mode::Bits32 => (10, 2, 32),
        Mode::Pae => (9, 3, 32),
        Mode::Level4 => (9, 4, 48),
        Mode::Level5 => (9, 5, 57),
    };
    let mut all = Vec::from([0u64]);
    for level in 0..levels {
        let pick: &[u64] = match (level, mode) {
            (0, _) | (1, Mode::Bits32) => &[0, 1, 256, 511],
            (2, Mode::Pae) => &[0, 1],
            (1 | 3, _) => &[0, 1],
            _ => &[0],
        };
        all = all.iter().flat_map(|base| pick.iter().map(move |value| base | value << (12 + bits * level))).collect();
    }
    let extend = |address: u64| if top == 32 { address } else { ((address << (64 - top)) as i64 >> (64 - top)) as u64 };
    all.into_iter().map(extend).collect()
}

struct Machinery<'h> {
    vm: Shaded<'h>,
    object: ObjectHandle,
    second: Option<SlotRequest>,
    regimes: [Regime; VCPUS],
    roots: [Pfn; VCPUS],
    /// The guest has changed a table since this vCPU flushed.
    stale: [bool; VCPUS],
    /// Forks, and what each is to read.
    children: Vec<(Shaded<'h>, Vec<u64>)>,
    /// Accesses that led nowhere, and somewhere.
    ends: [u64; 2],
}

/// The words of tables and memory that a history changes.
fn all_words(vm: &Shaded<'_>) -> Vec<u64> {
    let all = (1..SECOND).flat_map(|frame| PLACES.map(|place| (frame << 12) + place * 8));
    all.map(|at| word(vm, at).unwrap()).collect()
}

impl<'h> Machinery<'h> {
    fn new(host: &'h Host<FlatMachine>, tables: usize, words: &[u64], regimes: [Regime; VCPUS]) -> Self {
        let mut vm = Vm::new(host, CPU, Nested::new(46, None), OPTIONS).unwrap();
        let object = memory(host, 20, Policy::Pages);
        vm.set_slot(CPU, &slot(0, 0, SECOND, object, SlotFlags::empty())).unwrap();
        vm.shade(CPU, Box::new(Words::new(46, None)), tables, VCPUS).unwrap();
        let mut this = Self {
            vm,
            object,
            second: None,
            regimes,
            roots: [Pfn::new(0); VCPUS],
            stale: [true; VCPUS],
            children: Vec::new(),
            ends: [0; 2],
        };
        for (place, value) in words.iter().enumerate() {
            let (table, word) = (1 + place / PLACES.len(), PLACES[place % PLACES.len()]);
            this.edit(((table as u64) << 12) + word * 8, *value);
        }
        this.vm.load(CPU);
        (0..VCPUS).for_each(|vcpu| this.load(vcpu));
        this
    }

    fn load(&mut self, vcpu: usize) {
        self.roots[vcpu] = self.vm.shadow_load(&self.vm.host().epoch.pin(CPU), vcpu, &self.regimes[vcpu]);
        self.stale[vcpu] = false;
    }

    fn flush_pages(&mut self, vcpu: usize) {
        for linear in addresses(self.regimes[vcpu].mode) {
            let pin = self.vm.host().epoch.pin(CPU);
            self.vm.shadow_invalidate_page(&pin, vcpu, &self.regimes[vcpu], linear);
        }
        self.stale[vcpu] = false;
    }

    /// A change of the guest's tables by the hypervisor, as for an emulated store.
    fn edit(&mut self, at: u64, value: u64) {
        let pin = self.vm.host().epoch.pin(CPU);
        self.vm.write(&pin, &Hint::new(), Gpa::new(at), &value.to_le_bytes()).unwrap();
        self.stale = [true; VCPUS];
    }

    /// What the processor is told to walk.
    fn hardware(&self, vcpu: usize) -> Regime {
        let guest = self.regimes[vcpu];
        let mode = match guest.mode {
            Mode::Off | Mode::Bits32 | Mode::Pae => Mode::Pae,
            long => long,
        };
        // What the processor loads when it enters a guest that is not in long mode.
        let pointers = [0, 1, 2, 3].map(|at| self.vm.host().machine.load(Word::new(self.roots[vcpu], at)));
        let own = guest.controls & (Controls::NO_SUPERVISOR_FETCH | Controls::NO_SUPERVISOR_ACCESS);
        let own = if guest.mode == Mode::Off { Controls::empty() } else { own };
        let controls = own | Controls::WRITE_PROTECT | Controls::NO_EXECUTE;
        Regime { mode, root: self.roots[vcpu].base().get(), pointers, controls, physical_bits: 46, ..guest }
    }

    /// The access through the shadow.
    fn access(&mut self, vcpu: usize, linear: u64, request: Request) -> End {
        let vm = &self.vm;
        for _ in 0..8 {
            let code = match walk(&mut Hardware(&vm.host().machine), &self.hardware(vcpu), linear, request) {
                Ok(found) => {
                    let pfn = Pfn::new(found.gpa.frame().get());
                    let word = Word::new(pfn, (found.gpa.page_offset() / 8) as u16);
                    let written = request.kind == Kind::Write;
                    return if written { End::Written(pfn) } else { End::Read(vm.host().machine.load(word)) };
                }
                Err(WalkError::Fault(code)) => code,
                Err(WalkError::NonCanonical) => return End::NonCanonical,
                Err(error) => panic!("{error:?}"),
            };
            let refused = code.contains(PageFault::RESERVED);
            let outcome = {
                let pin = vm.host().epoch.pin(CPU);
                vm.shadow_fault(&pin, &Hint::new(), vcpu, &self.regimes[vcpu], linear, request, refused)
            };
            match outcome {
                ShadowOutcome::Memory(Outcome::Resume | Outcome::Retry, _) => {}
                ShadowOutcome::Memory(Outcome::Mmio, fault) => return End::Mmio(fault.gpa),
                ShadowOutcome::Memory(Outcome::Inject(_), _) => return End::Lost,
                ShadowOutcome::Guest(Exception::Page(code)) => return End::Fault(code),
                ShadowOutcome::Guest(Exception::NonCanonical) => return End::NonCanonical,
                other => panic!("{other:?}"),
            }
        }
        panic!("{linear:#x} makes no progress, {request:?}");
    }

    /// How it has to end, and what it leaves in the guest's tables.
    fn reference(&self, vcpu: usize, linear: u64, request: Request) -> (Result<Gpa, End>, BTreeMap<u64, u64>) {
        let mut tables = Reference { vm: &self.vm, stored: BTreeMap::new() };
        let end = match walk(&mut tables, &self.regimes[vcpu], linear, request) {
            Ok(found) => Ok(found.gpa),
            Err(WalkError::Fault(code)) => Err(End::Fault(code)),
            Err(WalkError::NonCanonical) => Err(End::NonCanonical),
            Err(WalkError::Tables(())) => Err(End::Lost),
            Err(WalkError::Contended) => panic!("nobody else writes"),
        };
        (end, tables.stored)
    }

    /// Both, and whether they agree.
    fn compare(&mut self, vcpu: usize, linear: u64, request: Request) -> Result<(), TestCaseError> {
        let (end, stored) = self.reference(vcpu, linear, request);
        let seen = self.access(vcpu, linear, request);
        let (pin, hint) = (self.vm.host().epoch.pin(CPU), Hint::new());
        let expected = match end {
            Err(end) => end,
            Ok(gpa) => match (self.vm.slots().find(&pin, gpa.frame(), &hint), request.kind) {
                (None, Kind::Fetch) => End::Lost,
                (None, _) => End::Mmio(gpa),
                (Some(slot), Kind::Write) if slot.is_read_only() => End::Mmio(gpa),
                (Some(slot), Kind::Write) => {
                    if slot.logs_dirty() {
                        prop_assert_eq!(self.vm.is_dirty(&pin, gpa.frame()), Some(true), "INV-4");
                    }
                    End::Written(self.vm.frame_behind(&pin, &hint, gpa).expect("it is there to be written"))
                }
                (Some(_), _) => End::Read(word(&self.vm, gpa.get() & !7).expect("there is a slot")),
            },
        };
        self.ends[usize::from(matches!(expected, End::Read(_) | End::Written(_) | End::Mmio(_)))] += 1;
        prop_assert_eq!(seen, expected, "{:#x} {:?} {:?}", linear, request, self.regimes[vcpu]);
        if !matches!(expected, End::Lost) {
            for (at, value) in stored {
                prop_assert_eq!(word(&self.vm, at), Some(value), "the flags at {:#x}", at);
            }
        }
        Ok(())
    }

    /// A store by the guest itself, wherever it leads: to a table, perhaps.
    fn store(&mut self, vcpu: usize, linear: u64, value: u64) {
        let request = Request { kind: Kind::Write, user: false, by_leave: true };
        if let End::Written(pfn) = self.access(vcpu, linear, request) {
            self.vm.host().machine.store(Word::new(pfn, (linear % PAGE_SIZE / 8) as u16), value);
            self.stale = [true; VCPUS];
        }
    }

    /// The owner's doing.
    fn own(&mut self, deed: Deed) {
        let everything = GfnRange::new(Gfn::new(0), 20).unwrap();
        match deed {
            Deed::Zap(frame) => self.vm.zap(CPU, GfnRange::single(Gfn::new(frame))).unwrap(),
            Deed::ZapAll => self.vm.zap(CPU, everything).unwrap(),
            Deed::Age => drop(self.vm.clear_young(CPU, everything).unwrap()),
            Deed::Log(on) => {
                let flags = if on { SlotFlags::LOG_DIRTY } else { SlotFlags::empty() };
                self.vm.set_slot(CPU, &slot(0, 0, SECOND, self.object, flags)).unwrap();
            }
            Deed::Fetch => {
                // There may be no log.
                let _ = self.vm.get_dirty_log(CPU, 0, &mut [0]);
            }
            Deed::Second(flags, base) => self.second(flags, base),
            Deed::Fork if self.children.len() < 2 => {
                let child = self.vm.fork(CPU).unwrap();
                let words = all_words(&child);
                self.children.push((child, words));
                let pin = self.vm.host().epoch.pin(CPU);
                let slot = self.vm.slots().find(&pin, Gfn::new(0), &Hint::new()).unwrap();
                assert_eq!(slot.object.get(), self.object.raw(), "the parent keeps its object");
            }
            Deed::Fork => self.end_child(),
        }
    }

    fn second(&mut self, flags: SlotFlags, base: u64) {
        if let Some(old) = self.second.take() {
            self.vm.set_slot(CPU, &SlotRequest { size: 0, ..old }).unwrap();
            return;
        }
        let offset = SECOND * PAGE_SIZE;
        let request = SlotRequest { offset, ..slot(1, base * PAGE_SIZE, 4, self.object, flags) };
        self.vm.set_slot(CPU, &request).unwrap();
        self.second = Some(request);
    }

    /// A child reads what its parent's memory was when it was forked, whatever the parent has written since.
    fn end_child(&mut self) {
        let Some((child, words)) = self.children.pop() else { return };
        assert_eq!(all_words(&child), words);
        let object = {
            let pin = child.host().epoch.pin(CPU);
            ObjectHandle::from_raw(child.slots().iter(&pin).next().unwrap().object.get())
        };
        let host = child.host();
        child.destroy(CPU);
        host.objects.destroy(&host.supply(CPU), &host.epoch, object).unwrap();
    }

    fn end(mut self) -> [u64; 2] {
        while !self.children.is_empty() {
            self.end_child();
        }
        self.vm.put(CPU);
        self.vm.destroy(CPU);
        self.ends
    }
}

#[derive(Clone, Copy, Debug)]
enum Deed {
    Zap(u64),
    ZapAll,
    Age,
    Log(bool),
    Fetch,
    Second(SlotFlags, u64),
    Fork,
}

#[derive(Clone, Debug)]
enum Act {
    Edit { table: u64, place: usize, value: u64 },
    Flip { table: u64, place: usize, bit: u32 },
    Store { vcpu: usize, at: prop::sample::Index, value: u64 },
    Touch { vcpu: usize, at: prop::sample::Index, request: Request },
    Switch { vcpu: usize, to: Regime },
    Own(Deed),
    Check { vcpu: usize, whole: bool, at: [prop::sample::Index; 5], request: Request },
}

fn entries(mode: Mode) -> impl Strategy<Value = u64> {
    let frame = prop_oneof![40 => 1u64..=TABLES, 12 => 10u64..22, 1 => Just(0)];
    let bit = |often: f64, bits: u64| prop::bool::weighted(often).prop_map(move |set| if set { bits } else { 0 });
    let flags = (bit(0.99, 1), bit(0.93, 2), bit(0.96, 4), bit(0.7, 1 << 5), bit(0.6, 1 << 6), bit(0.02, 1 << 63));
    let one = (frame, flags).prop_map(|(frame, (a, b, c, d, e, f))| frame << 12 | a | b | c | d | e | f);
    (one.clone(), one).prop_map(move |(one, other)| match mode {
        Mode::Bits32 => one & 0xffff_ffff | other << 32,
        _ => one,
    })
}

fn regimes() -> impl Strategy<Value = Regime> {
    (prop::sample::select(&MODES[..]), 0u16..256)
        .prop_map(|(mode, bits)| regime(mode, Controls::from_bits_truncate(bits) | Controls::NO_EXECUTE))
}

fn requests() -> impl Strategy<Value = Request> {
    let kind = prop::sample::select(std::vec![Kind::Read, Kind::Write, Kind::Fetch]);
    (kind, any::<bool>(), any::<bool>()).prop_map(|(kind, user, by_leave)| Request { kind, user, by_leave })
}

fn deeds() -> impl Strategy<Value = Deed> {
    let flags = prop::sample::select(std::vec![SlotFlags::empty(), SlotFlags::READ_ONLY, SlotFlags::LOG_DIRTY]);
    prop_oneof![
        4 => (0u64..20).prop_map(Deed::Zap),
        1 => Just(Deed::ZapAll),
        1 => Just(Deed::Age),
        2 => any::<bool>().prop_map(Deed::Log),
        3 => Just(Deed::Fetch),
        3 => (flags, prop::sample::select(std::vec![SECOND, 16])).prop_map(|(flags, base)| Deed::Second(flags, base)),
        2 => Just(Deed::Fork),
    ]
}

fn acts(mode: Mode) -> impl Strategy<Value = Act> {
    let (vcpu, at, table, place) = (0..VCPUS, any::<prop::sample::Index>(), 1..=TABLES, 0..PLACES.len());
    let bits = prop::sample::select(std::vec![0u32, 1, 2, 5, 6, 12]);
    let many = prop::array::uniform5(any::<prop::sample::Index>());
    prop_oneof![
        3 => (table.clone(), place.clone(), entries(mode))
            .prop_map(|(table, place, value)| Act::Edit { table, place, value }),
        5 => (table, place, bits).prop_map(|(table, place, bit)| Act::Flip { table, place, bit }),
        4 => (vcpu.clone(), at.clone(), entries(mode)).prop_map(|(vcpu, at, value)| Act::Store { vcpu, at, value }),
        3 => (vcpu.clone(), at, requests()).prop_map(|(vcpu, at, request)| Act::Touch { vcpu, at, request }),
        1 => (vcpu.clone(), regimes()).prop_map(|(vcpu, to)| Act::Switch { vcpu, to }),
        6 => deeds().prop_map(Act::Own),
        6 => (vcpu, any::<bool>(), many, requests())
            .prop_map(|(vcpu, whole, at, request)| Act::Check { vcpu, whole, at, request }),
    ]
}

fn run(tables: usize, words: &[u64], regimes: [Regime; VCPUS], acts: &[Act]) -> Result<[u64; 2], TestCaseError> {
    plant(&[]);
    let host = host(256);
    let mut this = Machinery::new(&host, tables, words, regimes);
    for act in acts {
        match act {
            Act::Edit { table, place, value } => this.edit((table << 12) + PLACES[*place] * 8, *value),
            Act::Flip { table, place, bit } => {
                let at = (table << 12) + PLACES[*place] * 8;
                let old = word(&this.vm, at).unwrap();
                this.edit(at, old ^ 1 << bit);
            }
            Act::Store { vcpu, at, value } => {
                let linear = *at.get(&addresses(this.regimes[*vcpu].mode));
                this.store(*vcpu, linear & !7, *value);
            }
            Act::Touch { vcpu, at, request } => {
                let linear = *at.get(&addresses(this.regimes[*vcpu].mode));
                this.access(*vcpu, linear, *request);
            }
            Act::Switch { vcpu, to } => {
                this.regimes[*vcpu] = *to;
                this.load(*vcpu);
            }
            Act::Own(deed) => this.own(*deed),
            Act::Check { vcpu, whole, at, request } => {
                if this.stale[*vcpu] {
                    if *whole { this.load(*vcpu) } else { this.flush_pages(*vcpu) }
                }
                let pool = addresses(this.regimes[*vcpu].mode);
                for at in at {
                    this.compare(*vcpu, *at.get(&pool), *request)?;
                }
            }
        }
        prop_assert_eq!(this.vm.audit_shadow(), Ok(()), "after {:?}", act);
    }
    Ok(this.end())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_shaded_machine_is_as_one_with_a_second_stage(
        (tables, words, regimes, acts) in (regimes(), regimes()).prop_flat_map(|(first, second)| (
            prop_oneof![1 => 7usize..10, 2 => 24usize..64],
            prop::collection::vec(entries(first.mode), TABLES as usize * PLACES.len()),
            Just([first, second]),
            prop::collection::vec(acts(first.mode), 1..50),
        ))
    ) {
        run(tables, &words, regimes, &acts)?;
    }
}
