//! Shadow tables against the processor's own walk: whatever a guest does to its tables, once it has flushed, an access through the
//! shadow ends as the same access through its own tables does, accessed and dirty flags included.

mod directed;

use std::boxed::Box;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::vec::Vec;

use entresol_addr::{Gfn, GfnRange, Gpa, Pfn};
use entresol_machine::flat::FlatMachine;
use entresol_machine::{Machine, Vmid, Word};
use entresol_shadow::{Answer, Backing, GuestMemory, Shadow as Tree};
use entresol_sync::zoo::plant;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::paging::{
    Controls, Kind, Mode, PageFault, Regime, Request, Tables, WalkError, Width, pointer_is_valid, walk,
};
use crate::shadow::{Guest, Shadow};

const FIRST: Pfn = Pfn::new(0x1000);
const VMID: Vmid = Vmid::new(3);
const BITS: u8 = 40;
/// Guest frames: tables are in 1–9, memory up to 19; then nothing.
const MEMORY: u64 = 20;
const FRAMES: u64 = 24;
const TABLES: u64 = 9;
const MODES: [Mode; 5] = [Mode::Off, Mode::Bits32, Mode::Pae, Mode::Level4, Mode::Level5];

/// The guest's memory, and which frames are the machine's for it.
#[derive(Clone, PartialEq, Debug)]
struct Memory {
    words: Vec<u64>,
    /// How often the backing of each frame was replaced.
    moved: Vec<u64>,
    absent: BTreeSet<u64>,
    read_only: BTreeSet<u64>,
    generation: u64,
}

impl Memory {
    fn at(&mut self, at: Gpa) -> Result<&mut u64, ()> {
        if at.frame().get() >= MEMORY { Err(()) } else { Ok(&mut self.words[at.get() as usize / 8]) }
    }
}

impl Tables for Memory {
    type Error = ();

    fn load(&mut self, at: Gpa, width: Width) -> Result<u64, ()> {
        let word = *self.at(at)?;
        Ok(if width == Width::Long { word } else { word >> (at.get() % 8 * 8) & 0xffff_ffff })
    }

    fn compare_exchange(&mut self, at: Gpa, width: Width, current: u64, new: u64) -> Result<bool, ()> {
        let same = self.load(at, width)? == current;
        if same {
            let word = self.at(at)?;
            let (shift, mask) = if width == Width::Long { (0, u64::MAX) } else { (at.get() % 8 * 8, 0xffff_ffff) };
            *word = *word & !(mask << shift) | (new << shift);
        }
        Ok(same)
    }
}

impl GuestMemory for Memory {
    type Error = ();

    fn backing(&mut self, gfn: Gfn, _: bool) -> Result<Backing, ()> {
        let number = gfn.get();
        if number >= FRAMES || self.absent.contains(&number) {
            return Ok(Backing::Nothing);
        }
        let pfn = Pfn::new(0x10_0000 + number + self.moved[number as usize] * 0x100);
        Ok(Backing::Frame { pfn, writable: !self.read_only.contains(&number) })
    }

    fn generation(&self) -> Option<u64> {
        Some(self.generation)
    }
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

/// What the processor loads when it enters a guest that is not in long mode.
fn pointers(machine: &FlatMachine, root: Pfn) -> [u64; 4] {
    [0, 1, 2, 3].map(|index| machine.load(Word::new(root, index)))
}

/// How an access ended.
#[derive(Clone, Copy, PartialEq, Debug)]
enum End {
    Done(Pfn),
    Mmio(Gpa),
    Fault(PageFault),
    NonCanonical,
    /// Its tables are where no memory is.
    Lost,
}

impl<E> From<WalkError<E>> for End {
    fn from(error: WalkError<E>) -> Self {
        match error {
            WalkError::Fault(code) => Self::Fault(code),
            WalkError::NonCanonical => Self::NonCanonical,
            WalkError::Tables(_) => Self::Lost,
            WalkError::Contended => panic!("nobody else writes"),
        }
    }
}

/// The first `count` frames of the machine.
fn pfns(count: u64) -> Box<[Pfn]> {
    (0..count).map(|offset| FIRST.offset(offset)).collect()
}

struct Machinery {
    machine: FlatMachine,
    tree: Tree<Shadow>,
    memory: Memory,
    vcpus: [Regime; 2],
    /// The guest has changed a table since this vCPU flushed.
    stale: [bool; 2],
    /// By mode: accesses compared that led nowhere, and somewhere.
    ends: [[u64; 2]; MODES.len()],
}

/// Addresses whose indices are few: first, second and last of each level.
fn addresses(mode: Mode) -> Vec<u64> {
    let (bits, levels, top) = match mode {
        Mode::Off => return (0..FRAMES + 2).map(|frame| frame << 12 | 8).collect(),
        Mode::Bits32 => (10, 2, 32),
        Mode::Pae => (9, 3, 32),
        Mode::Level4 => (9, 4, 48),
        Mode::Level5 => (9, 5, 57),
    };
    let mut all = Vec::from([0u64]);
    for level in 0..levels {
        let width = if level == 2 && mode == Mode::Pae { 2 } else { bits };
        let values = [0, 1, (1u64 << width) - 1, 1 << (width - 1)];
        // So few that a history comes back to them.
        let pick = match (level, levels) {
            (0, _) | (1, 2) => &values[..],
            (1, _) => &values[..2],
            (level, levels) if level + 1 == levels => &values[..2],
            _ => &values[..1],
        };
        all = all.iter().flat_map(|base| pick.iter().map(move |value| base | value << (12 + bits * level))).collect();
    }
    let extend = |address: u64| if top == 32 { address } else { ((address << (64 - top)) as i64 >> (64 - top)) as u64 };
    all.into_iter().map(extend).collect()
}

fn regime(mode: Mode, controls: Controls, pkru: u32) -> Regime {
    // What shadow paging cannot show without CR0.WP is left out: see the holes of the module.
    let unseen = Controls::NO_SUPERVISOR_ACCESS | Controls::PROTECTION_KEYS;
    let controls = if controls.contains(Controls::WRITE_PROTECT) { controls } else { controls - unseen };
    let pointers = [0x2001, 0x3001, 0, 0x4001];
    // CR4.PSE says something in 32-bit paging only.
    let controls = if mode == Mode::Bits32 { controls } else { controls | Controls::LARGE_PAGES };
    Regime { mode, root: 0x1000, pointers, controls, pkru, physical_bits: BITS }
}

impl Machinery {
    fn new(frames: u64, words: Vec<u64>, vcpus: [Regime; 2]) -> Self {
        let machine = FlatMachine::coherent(FIRST, frames);
        let tree = Tree::new(Shadow::new(46, None), pfns(frames), 2).ok().unwrap();
        let moved = std::vec![0; FRAMES as usize];
        let (absent, read_only) = (BTreeSet::from([18]), BTreeSet::from([17]));
        let memory = Memory { words, moved, absent, read_only, generation: 1 };
        let mut this = Self { machine, tree, memory, vcpus, stale: [true; 2], ends: Default::default() };
        (0..2).for_each(|vcpu| this.load(vcpu));
        this
    }

    fn load(&mut self, vcpu: usize) {
        let mut guest = Guest { tables: &mut self.memory, regime: self.vcpus[vcpu] };
        self.tree.load(&self.machine, VMID, vcpu, &mut guest);
        self.stale[vcpu] = false;
    }

    /// INVLPG of every page of the pool.
    fn flush_pages(&mut self, vcpu: usize) {
        for linear in addresses(self.vcpus[vcpu].mode) {
            let mut guest = Guest { tables: &mut self.memory, regime: self.vcpus[vcpu] };
            self.tree.invalidate_page(&self.machine, VMID, vcpu, &mut guest, linear);
        }
        self.stale[vcpu] = false;
    }

    /// What the processor is told to walk.
    fn hardware(&self, vcpu: usize) -> Regime {
        let guest = self.vcpus[vcpu];
        let mode = match guest.mode {
            Mode::Off | Mode::Bits32 | Mode::Pae => Mode::Pae,
            long => long,
        };
        let root = self.tree.root(vcpu).expect("loaded");
        let pointers = pointers(&self.machine, root);
        assert!(mode != Mode::Pae || pointers.iter().all(|pointer| pointer_is_valid(*pointer, 46)), "{pointers:x?}");
        let mut own = guest.controls & (Controls::NO_SUPERVISOR_FETCH | Controls::NO_SUPERVISOR_ACCESS);
        if matches!(guest.mode, Mode::Level4 | Mode::Level5) {
            own |= guest.controls & Controls::PROTECTION_KEYS;
        }
        if guest.mode == Mode::Off {
            own = Controls::empty();
        }
        Regime {
            mode,
            root: root.base().get(),
            pointers,
            controls: own | Controls::WRITE_PROTECT | Controls::NO_EXECUTE,
            pkru: guest.pkru,
            physical_bits: 46,
        }
    }

    /// The access through the shadow.
    fn access(&mut self, vcpu: usize, linear: u64, request: Request) -> End {
        for _ in 0..6 {
            let found = walk(&mut Hardware(&self.machine), &self.hardware(vcpu), linear, request);
            let code = match found {
                Ok(translation) => return End::Done(Pfn::new(translation.gpa.frame().get())),
                Err(WalkError::Fault(code)) => code,
                Err(error) => return error.into(),
            };
            let mut reading = self.memory.clone();
            let mut guest = Guest { tables: &mut self.memory, regime: self.vcpus[vcpu] };
            let (machine, tree) = (&self.machine, &mut self.tree);
            let answer = if code.contains(PageFault::RESERVED) {
                tree.refused(machine, VMID, vcpu, &mut guest, &mut reading, linear, request, &mut None)
            } else {
                tree.fault(machine, VMID, vcpu, &mut guest, &mut reading, linear, request, &mut None)
            };
            match answer {
                Answer::Resume => {}
                Answer::Mmio(gpa) => return End::Mmio(gpa),
                Answer::Guest(error) => return error.into(),
                Answer::Memory(()) | Answer::Unloaded => panic!("{answer:?}"),
            }
        }
        panic!("{linear:#x} makes no progress, {request:?}");
    }

    /// The same through the guest's own tables; its memory as it is then.
    fn reference(&self, vcpu: usize, linear: u64, request: Request) -> (End, Memory) {
        let mut memory = self.memory.clone();
        let end = match walk(&mut memory, &self.vcpus[vcpu], linear, request) {
            Ok(found) => match memory.backing(found.gpa.frame(), false).unwrap() {
                Backing::Frame { writable: false, .. } if request.kind == Kind::Write => End::Mmio(found.gpa),
                Backing::Frame { pfn, .. } => End::Done(pfn),
                Backing::Nothing => End::Mmio(found.gpa),
            },
            Err(error) => error.into(),
        };
        (end, memory)
    }

    /// Both, and whether they agree.
    fn compare(&mut self, vcpu: usize, linear: u64, request: Request) -> bool {
        let (end, memory) = self.reference(vcpu, linear, request);
        let seen = self.access(vcpu, linear, request);
        let regime = self.vcpus[vcpu];
        if seen != end {
            std::eprintln!("{linear:#x} {request:?} {regime:?}: {seen:?}, and the processor says {end:?}");
        } else if self.memory != memory {
            std::eprintln!("{linear:#x} {request:?} {regime:?}: flags differ after {seen:?}");
            for (at, (ours, theirs)) in self.memory.words.iter().zip(&memory.words).enumerate() {
                if ours != theirs {
                    std::eprintln!(
                        "table {} word {}: {ours:#x}, and the processor leaves {theirs:#x}",
                        at / 512,
                        at % 512
                    );
                }
            }
        }
        let number = MODES.iter().position(|mode| *mode == regime.mode).expect("one of them");
        self.ends[number][usize::from(matches!(end, End::Done(_) | End::Mmio(_)))] += 1;
        seen == end && self.memory == memory
    }

    /// A store of the guest to one of its tables, from wherever: it faults if the table is synced.
    fn edit(&mut self, table: u64, word: usize, value: u64) {
        let gfn = Gfn::new(table);
        if self.tree.is_synced(gfn) {
            self.tree.unsync(gfn);
        }
        self.memory.words[table as usize * 512 + word] = value;
        self.stale = [true; 2];
    }
}

/// An entry: mostly present, mostly open, to a table or a frame. Two of four bytes are one word.
fn entries(wide: u32, narrow: u32) -> impl Strategy<Value = u64> {
    let frame = prop_oneof![40 => 1u64..=TABLES, 10 => 10..FRAMES + 2, 1 => Just(0)];
    let bit = |often: f64, bits: u64| prop::bool::weighted(often).prop_map(move |set| if set { bits } else { 0 });
    let flags = (bit(0.99, 1), bit(0.93, 2), bit(0.96, 4), bit(0.7, 1 << 5), bit(0.6, 1 << 6), bit(0.06, 1 << 7));
    let one = (frame, flags).prop_map(|(frame, (a, b, c, d, e, f))| {
        let large = f != 0;
        // The frames of large pages are few, and some have bits that must be zero.
        (if large { ((frame / 12) << 21) | u64::from(frame % 8 == 5) << 13 } else { frame << 12 })
            | a
            | b
            | c
            | d
            | e
            | f
    });
    let key = prop_oneof![6 => Just(0u64), 1 => 1u64..4];
    let high = (bit(0.03, 1 << 63), key, bit(0.004, 1 << 45));
    prop_oneof![
        wide => (one.clone(), high).prop_map(|(low, (nx, key, reserved))| low | nx | key << 59 | reserved),
        narrow => (one.clone(), one.clone()).prop_map(|(low, high)| low & 0xffff_ffff | high << 32),
        1 => Just(0),
    ]
}

/// The words of a table that addresses come by, in every mode.
const WORDS: [usize; 4] = [0, 1, 256, 511];

/// One of them.
fn words() -> impl Strategy<Value = usize> {
    prop::sample::select(&WORDS[..])
}

fn controls() -> impl Strategy<Value = Controls> {
    // NX is on more often than not: without it the bit is a reserved one.
    (0u16..256, prop::bool::weighted(0.8)).prop_map(|(bits, no_execute)| {
        let mut controls = Controls::from_bits_truncate(bits);
        controls.set(Controls::NO_EXECUTE, no_execute);
        controls
    })
}

fn regimes() -> impl Strategy<Value = Regime> {
    (prop::sample::select(&MODES[..]), controls(), 0u32..256)
        .prop_map(|(mode, controls, pkru)| regime(mode, controls, pkru))
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Edit {
        table: u64,
        word: usize,
        value: u64,
    },
    /// One bit of an entry.
    Flip {
        table: u64,
        word: usize,
        bit: u32,
    },
    /// An access that may come by what is stale.
    Touch {
        vcpu: usize,
        at: prop::sample::Index,
        request: Request,
    },
    Load {
        vcpu: usize,
    },
    Switch {
        vcpu: usize,
        to: Regime,
    },
    Move {
        frame: u64,
    },
    Toggle {
        frame: u64,
    },
    ReadOnly {
        frame: u64,
    },
    /// Flushes, whole or page by page, and compares.
    Check {
        vcpu: usize,
        whole: bool,
        at: [prop::sample::Index; 6],
        request: Request,
    },
}

fn requests() -> impl Strategy<Value = Request> {
    let kind = prop::sample::select(std::vec![Kind::Read, Kind::Write, Kind::Fetch]);
    (kind, any::<bool>(), any::<bool>()).prop_map(|(kind, user, by_leave)| Request { kind, user, by_leave })
}

fn acts() -> impl Strategy<Value = Act> {
    let (vcpu, at) = (0usize..2, any::<prop::sample::Index>());
    let frame = 10u64..FRAMES;
    // P, R/W, U/S, A, D, NX, and an address bit.
    let flags = prop::sample::select(std::vec![0u32, 1, 2, 5, 6, 63, 12, 33]);
    let many = prop::array::uniform6(any::<prop::sample::Index>());
    prop_oneof![
        4 => (1u64..=TABLES, words(), entries(12, 3)).prop_map(|(table, word, value)| Act::Edit { table, word, value }),
        8 => (1u64..=TABLES, words(), flags).prop_map(|(table, word, bit)| Act::Flip { table, word, bit }),
        3 => (vcpu.clone(), at, requests()).prop_map(|(vcpu, at, request)| Act::Touch { vcpu, at, request }),
        1 => vcpu.clone().prop_map(|vcpu| Act::Load { vcpu }),
        1 => (vcpu.clone(), regimes()).prop_map(|(vcpu, to)| Act::Switch { vcpu, to }),
        1 => frame.clone().prop_map(|frame| Act::Move { frame }),
        1 => frame.clone().prop_map(|frame| Act::Toggle { frame }),
        1 => frame.prop_map(|frame| Act::ReadOnly { frame }),
        6 => (vcpu, any::<bool>(), many, requests())
            .prop_map(|(vcpu, whole, at, request)| Act::Check { vcpu, whole, at, request }),
    ]
}

/// Whether every check agreed, and how they ended.
fn agrees(frames: u64, tables: &[u64], vcpus: [Regime; 2], acts: &[Act]) -> (bool, [[u64; 2]; MODES.len()]) {
    let mut all = std::vec![0u64; (MEMORY * 512) as usize];
    for (place, value) in tables.iter().enumerate() {
        let word = WORDS[place % WORDS.len()];
        all[(1 + place / WORDS.len()) * 512 + word] = *value;
    }
    let mut this = Machinery::new(frames, all, vcpus);
    let mut agreed = true;
    for act in acts {
        match *act {
            Act::Edit { table, word, value } => this.edit(table, word, value),
            Act::Flip { table, word, bit } => {
                let old = this.memory.words[table as usize * 512 + word];
                this.edit(table, word, old ^ 1 << bit);
            }
            Act::Touch { vcpu, at, request } => {
                let linear = *at.get(&addresses(this.vcpus[vcpu].mode));
                // Flags that this walk sets are changes like others.
                this.access(vcpu, linear, request);
            }
            Act::Load { vcpu } => this.load(vcpu),
            Act::Switch { vcpu, to } => {
                this.vcpus[vcpu] = to;
                this.load(vcpu);
            }
            Act::Move { frame } => {
                this.memory.moved[frame as usize] += 1;
                this.tree.invalidate(&this.machine, VMID, GfnRange::single(Gfn::new(frame)));
            }
            Act::Toggle { frame } => {
                if !this.memory.absent.remove(&frame) {
                    this.memory.absent.insert(frame);
                }
                this.memory.generation += 1;
                this.tree.invalidate(&this.machine, VMID, GfnRange::single(Gfn::new(frame)));
            }
            Act::ReadOnly { frame } => {
                if !this.memory.read_only.remove(&frame) {
                    this.memory.read_only.insert(frame);
                }
                this.tree.invalidate(&this.machine, VMID, GfnRange::single(Gfn::new(frame)));
            }
            Act::Check { vcpu, whole, at, request } => {
                if this.stale[vcpu] {
                    if whole { this.load(vcpu) } else { this.flush_pages(vcpu) }
                }
                let pool = addresses(this.vcpus[vcpu].mode);
                agreed &= at.iter().all(|at| this.compare(vcpu, *at.get(&pool), request));
            }
        }
        this.tree.audit(&this.machine).unwrap_or_else(|wrong| panic!("{wrong} after {act:?}"));
    }
    (agreed, this.ends)
}

fn histories() -> impl Strategy<Value = (u64, Vec<u64>, [Regime; 2], Vec<Act>)> {
    let vcpus = (regimes(), regimes()).prop_map(|(first, second)| [first, second]);
    vcpus.prop_flat_map(|vcpus| {
        let frames = prop_oneof![1 => 7u64..10, 2 => 24u64..64];
        let (wide, narrow) = if vcpus[0].mode == Mode::Bits32 { (1, 30) } else { (30, 1) };
        let tables = prop::collection::vec(entries(wide, narrow), TABLES as usize * WORDS.len());
        (frames, tables, Just(vcpus), prop::collection::vec(acts(), 1..60))
    })
}

#[test]
fn an_access_ends_as_through_the_guests_own_tables() {
    plant(&[]);
    let mut runner =
        TestRunner::new(ProptestConfig { cases: 800, failure_persistence: None, ..ProptestConfig::default() });
    let all = RefCell::new([[0; 2]; MODES.len()]);
    let ran = runner.run(&histories(), |(frames, tables, vcpus, acts)| {
        let (agreed, ends) = agrees(frames, &tables, vcpus, &acts);
        prop_assert!(agreed);
        for (sum, ends) in all.borrow_mut().iter_mut().zip(ends) {
            *sum = [sum[0] + ends[0], sum[1] + ends[1]];
        }
        Ok(())
    });
    ran.unwrap_or_else(|error| panic!("{error}"));
    for (mode, [nowhere, somewhere]) in MODES.iter().zip(all.into_inner()) {
        std::eprintln!("{mode:?}: {somewhere} accesses led somewhere, {nowhere} did not");
        assert!(somewhere > 200, "{mode:?}: {somewhere} accesses led somewhere, {nowhere} did not");
    }
}
