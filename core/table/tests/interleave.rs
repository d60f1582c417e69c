//! Every pair of operations, the second one run whole in the middle of the first, at each place where the first has just
//! looked at a word and not yet acted on what it saw.
//!
//! The end must be that of some order of the two, or of one alone if the other refused; the greedy TLB must see no
//! violation; each frame mapped is there or was reported removed; no table page is lost.
//!
//! The table asks its format what a word says between loading and changing it, so the format is where the second
//! operation breaks in. Range operations wait for a claim, so they are not run inside an operation that holds one.

mod common;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use common::tlb::GreedyTlb;
use common::{FIRST, Plain, VMID, gfns, leaf};
use entresol_addr::{Gfn, PageSize, Pfn, PfnRange};
use entresol_machine::flat::FlatMachine;
use entresol_machine::{Machine, Word};
use entresol_table::{Entry, Format, Geometry, Leaf, PageWork, Permissions, Reserve, Retired, Straddle, Table};

const FRAMES: u64 = 12;
/// Guest frames that are compared: two blocks.
const PART: u64 = 1024;
const VERSION: u64 = 1 << 20;

/// How many looks are left, and what happens then.
type Intruder = (usize, Box<dyn FnOnce()>);

thread_local! {
    static INTRUDER: RefCell<Option<Intruder>> = const { RefCell::new(None) };
}

/// [`Plain`], which lets the intruder in.
#[derive(Clone, Copy)]
struct Watched;

/// Counts one look at a word down; at zero the intruder runs, and not again.
fn look() {
    let due = INTRUDER.with_borrow_mut(|slot| match slot {
        Some((0, _)) => slot.take(),
        Some((left, _)) => {
            *left -= 1;
            None
        }
        None => None,
    });
    if let Some((_, intruder)) = due {
        intruder();
    }
}

impl Format for Watched {
    const BROKEN: u64 = Plain::BROKEN;
    const FRAME_BITS: u32 = Plain::FRAME_BITS;

    fn geometry(&self, ipa_bits: u8) -> Option<Geometry> {
        Plain.geometry(ipa_bits)
    }

    fn decode(&self, raw: u64, level: u8) -> Entry {
        look();
        Plain.decode(raw, level)
    }

    fn leaf(&self, leaf: &Leaf) -> u64 {
        Plain.leaf(leaf)
    }

    fn table(&self, frame: Pfn) -> u64 {
        look();
        Plain.table(frame)
    }

    fn young(&self, raw: u64) -> u64 {
        Plain.young(raw)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Op {
    Map(u64, u64, PageSize),
    Unmap(u64, u64),
    Protect(u64, u64),
    Relax(u64),
    Split(u64),
    Merge,
    Age,
}

const OPS: [Op; 13] = [
    Op::Map(5, 0, PageSize::Size4K),
    Op::Map(5, 1, PageSize::Size4K),
    Op::Map(0, 0, PageSize::Size2M),
    Op::Map(0, 1, PageSize::Size2M),
    Op::Unmap(5, 1),
    Op::Unmap(0, 512),
    Op::Unmap(500, 20),
    Op::Protect(5, 1),
    Op::Protect(0, PART),
    Op::Relax(5),
    Op::Split(5),
    Op::Merge,
    Op::Age,
];

/// What a table holds at first.
const STARTS: [&[Op]; 5] = [
    &[],
    &[Op::Map(7, 0, PageSize::Size4K)],
    &[Op::Map(5, 0, PageSize::Size4K), Op::Map(512, 0, PageSize::Size4K)],
    &[Op::Map(0, 0, PageSize::Size2M)],
    &[Op::Map(0, 0, PageSize::Size2M), Op::Split(0)],
];

/// Frame, permissions and access flag of each guest frame.
type Translations = Vec<Option<(Pfn, Permissions, bool)>>;

struct World {
    machine: FlatMachine,
    table: Table<Watched>,
    tlb: RefCell<GreedyTlb>,
    free: RefCell<BTreeSet<Pfn>>,
    waiting: RefCell<Vec<Retired>>,
    mapped: Cell<u64>,
    removed: Cell<u64>,
}

struct Count<'w>(&'w World);

impl PageWork for Count<'_> {
    fn removed(&mut self, gfn: Gfn, leaf: Leaf) {
        assert_eq!(leaf.pfn.get() % VERSION, gfn.get());
        self.0.removed.set(self.0.removed.get() + leaf.size.frames());
    }
}

impl World {
    fn new(script: &[Op]) -> Self {
        let machine = FlatMachine::coherent(Pfn::new(FIRST), 16 + FRAMES);
        let geometry = Plain.geometry(35).unwrap();
        let root = PfnRange::new(Pfn::new(FIRST), geometry.root_frames()).unwrap();
        let table = Table::new(&machine, Watched, geometry, root).unwrap();
        let world = Self {
            machine,
            table,
            tlb: RefCell::new(GreedyTlb::new(geometry, root)),
            free: RefCell::new((0..FRAMES).map(|frame| Pfn::new(FIRST + 16 + frame)).collect()),
            waiting: RefCell::default(),
            mapped: Cell::new(0),
            removed: Cell::new(0),
        };
        for op in script {
            assert!(world.run(*op), "{op:?} prepares the start");
        }
        world.reap();
        world
    }

    fn reserve(&self, count: usize) -> Reserve {
        let mut reserve = Reserve::new();
        for _ in 0..count {
            let frame = self.free.borrow_mut().pop_first().unwrap();
            self.machine.zero(PfnRange::single(frame));
            reserve.push(frame).unwrap();
        }
        reserve
    }

    fn give_back(&self, mut reserve: Reserve) {
        while let Some(frame) = reserve.pop() {
            let raws = (0..Word::PER_FRAME).map(|index| self.machine.load(Word::new(frame, index)));
            assert!(raws.into_iter().all(|raw| raw == 0), "a frame in the reserve is zeroed");
            assert!(self.free.borrow_mut().insert(frame), "{frame:?} came back twice");
        }
    }

    /// Ends the grace period of what was retired: nobody is in the middle of an operation.
    fn reap(&self) {
        for retired in self.waiting.take() {
            let mut free = self.free.borrow_mut();
            retired.drain(&self.machine, Watched, |frame| assert!(free.insert(frame), "{frame:?} came back twice"));
        }
    }

    /// Whether the operation was done, and not refused.
    fn run(&self, op: Op) -> bool {
        let (table, machine, work) = (&self.table, &self.machine, &mut Count(self));
        match op {
            Op::Map(gfn, version, size) => {
                // As many as it may ever need: what the intruder does must not make it run short.
                let mut reserve = self.reserve(2);
                let new = leaf(version * VERSION + gfn, size, Permissions::READ_WRITE);
                let result = table.map(machine, VMID, Gfn::new(gfn), &new, &mut reserve, work);
                self.give_back(reserve);
                let done = result.is_ok();
                if let Ok(mapped) = result {
                    self.mapped.set(self.mapped.get() + size.frames());
                    self.waiting.borrow_mut().push(mapped.retired);
                }
                done
            }
            Op::Unmap(start, count) => {
                let settled = table.unmap(machine, VMID, gfns(start, count), work).settle(machine, VMID);
                self.waiting.borrow_mut().push(settled.retired);
                true
            }
            Op::Protect(start, count) => {
                table.protect(machine, VMID, gfns(start, count), Permissions::WRITE, Straddle::Whole);
                true
            }
            Op::Relax(gfn) => {
                table.relax(machine, VMID, Gfn::new(gfn), Pfn::new(gfn), Permissions::ALL, &mut ()).is_ok()
            }
            Op::Split(gfn) => {
                let mut reserve = self.reserve(1);
                let done = table.split(machine, VMID, Gfn::new(gfn), &mut reserve).is_ok();
                self.give_back(reserve);
                done
            }
            Op::Merge => match table.merge(machine, VMID, Gfn::new(5), PageSize::Size2M) {
                Ok(retired) => {
                    self.waiting.borrow_mut().push(retired);
                    true
                }
                Err(_) => false,
            },
            Op::Age => {
                table.age(machine, VMID, gfns(0, PART));
                true
            }
        }
    }

    /// How each guest frame is translated.
    fn translations(&self) -> Translations {
        let mut all = vec![None; PART as usize];
        self.table.visit(&self.machine, gfns(0, u64::MAX), |start, leaf| {
            for offset in 0..leaf.size.frames() {
                all[(start.get() + offset) as usize] = Some((leaf.pfn.offset(offset), leaf.permissions, leaf.young));
            }
        });
        all
    }

    fn audit(&self) {
        self.reap();
        let mut tlb = self.tlb.borrow_mut();
        tlb.replay(self.machine.events());
        tlb.assert_settled();
        let (mut leaves, mut present) = ([0; 3], 0);
        self.table.visit(&self.machine, gfns(0, u64::MAX), |_, leaf| {
            leaves[leaf.size as usize] += 1;
            present += leaf.size.frames();
        });
        let census = self.table.census();
        assert_eq!(census.leaves, leaves);
        assert_eq!(self.free.borrow().len() as u64 + census.tables, FRAMES, "no table page is lost");
        assert_eq!(self.mapped.get() - self.removed.get(), present, "each frame is there or was reported");
    }
}

/// Whether `second` may run now inside `first`: a range operation must not wait for a claim of its own caller.
fn may_intrude(world: &World, first: Op, second: Op) -> bool {
    let range = match second {
        Op::Unmap(start, count) | Op::Protect(start, count) => gfns(start, count),
        Op::Age => gfns(0, PART),
        _ => return true,
    };
    // An unmap makes no claims: what is broken inside one is only removed.
    let broken = |gfn: Gfn| world.table.walk(&world.machine, gfn).is_some_and(|walk| walk.entry == Entry::Broken);
    matches!(first, Op::Unmap(..)) || !(0..range.count()).any(|offset| broken(range.start().offset(offset)))
}

/// What became of the second operation.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Intrusion {
    /// The first had ended before.
    TooLate,
    /// It would have waited for the first.
    Kept,
    Done,
    Refused,
}

/// Runs `first` with `second` at its look number `after`; returns whether the first was done.
fn interleave(world: &Rc<World>, first: Op, second: Op, after: usize) -> (bool, Intrusion) {
    let outcome = Rc::new(Cell::new(Intrusion::TooLate));
    let (inside, answer) = (Rc::clone(world), Rc::clone(&outcome));
    let intruder = move || {
        answer.set(if !may_intrude(&inside, first, second) {
            Intrusion::Kept
        } else if inside.run(second) {
            Intrusion::Done
        } else {
            Intrusion::Refused
        });
    };
    INTRUDER.set(Some((after, Box::new(intruder))));
    let done = world.run(first);
    INTRUDER.set(None);
    (done, outcome.get())
}

fn alone(start: &[Op], ops: &[Op]) -> Translations {
    let world = World::new(start);
    for op in ops {
        world.run(*op);
    }
    world.audit();
    world.translations()
}

fn all_places(start: &'static [Op], first: Op, second: Op) -> usize {
    let [one, two] = [&[first, second], &[second, first]].map(|ops| alone(start, ops));
    let [only_first, only_second] = [first, second].map(|op| alone(start, &[op]));
    // A map that comes too late for its page may have split the block around it.
    let after_split = alone(start, &[Op::Split(5), second]);
    let mut met = 0;
    // In a loop over 512 words most places are alike: all early ones, then some.
    for after in (0..16).chain((16..1600).step_by(173)) {
        let world = Rc::new(World::new(start));
        let (done, intrusion) = interleave(&world, first, second, after);
        world.audit();
        if intrusion == Intrusion::TooLate {
            break;
        }
        let end = world.translations();
        let legal = match intrusion {
            Intrusion::TooLate | Intrusion::Kept => continue,
            Intrusion::Done => end == one || end == two || !done && (end == only_second || end == after_split),
            Intrusion::Refused => end == one || end == two || end == only_first,
        };
        assert!(legal, "{second:?} ({intrusion:?}) in {first:?} ({done}) after {after} looks, from {start:?}");
        met += 1;
    }
    met
}

fn with_start(start: &'static [Op]) {
    for first in OPS {
        let met: usize = OPS.into_iter().map(|second| all_places(start, first, second)).sum();
        assert!(met >= OPS.len(), "{first:?} was interrupted");
    }
}

#[test]
fn from_nothing() {
    with_start(STARTS[0]);
}

#[test]
fn from_a_neighbour() {
    with_start(STARTS[1]);
}

#[test]
fn from_a_page() {
    with_start(STARTS[2]);
}

#[test]
fn from_a_block() {
    with_start(STARTS[3]);
}

#[test]
fn from_512_pages() {
    with_start(STARTS[4]);
}
