//! Threads do everything to one small part of a table at once. Afterwards each installed frame is either still mapped or
//! was reported as removed, exactly once; every table page is in the tree or free; and at no moment does a guest frame
//! translate to memory that was never given to it.

mod common;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{FIRST, Plain, VMID, gfns, leaf};
use entresol_addr::{Gfn, PageSize, Pfn, PfnRange};
use entresol_machine::Machine;
use entresol_machine::flat::FlatMachine;
use entresol_sync::Epoch;
use entresol_sync::epoch::Moment;
use entresol_table::{
    Entry, Format, Leaf, MapError, MergeError, PageWork, Permissions, RelaxError, Reserve, Retired, SplitError,
    Straddle, Table,
};

const THREADS: usize = 4;
const STEPS: usize = 1_500;
/// Blocks of 2 MiB that the threads fight for.
const BLOCKS: u64 = 2;
/// Frames between two versions of the same guest frame's memory; a multiple of every size.
const VERSION: u64 = 1 << 20;

struct World {
    machine: FlatMachine,
    table: Table<Plain>,
    epoch: Epoch,
    free: Mutex<Vec<Pfn>>,
    waiting: Mutex<Vec<(Moment, Retired)>>,
    mapped: AtomicU64,
    removed: AtomicU64,
    done: AtomicBool,
}

/// A sequence of numbers that a seed decides (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % bound
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 0
    }
}

/// Counts what is removed; sometimes has work to do before an entry is visible.
struct Count<'w> {
    world: &'w World,
    prepares: bool,
    flushes: bool,
}

impl PageWork for Count<'_> {
    fn must_prepare(&self) -> bool {
        self.prepares
    }

    fn prepare(&mut self) {
        std::thread::yield_now();
    }

    fn flush_before_removed(&self) -> bool {
        self.flushes
    }

    fn removed(&mut self, gfn: Gfn, leaf: Leaf) {
        assert_eq!(leaf.pfn.get() % VERSION, gfn.get(), "the leaf belongs here");
        self.world.removed.fetch_add(leaf.size.frames(), Ordering::Relaxed);
    }
}

impl World {
    fn new(frames: u64) -> Self {
        let machine = FlatMachine::coherent(Pfn::new(FIRST), 16 + frames);
        let geometry = Plain.geometry(39).unwrap();
        let root = PfnRange::new(Pfn::new(FIRST), geometry.root_frames()).unwrap();
        let table = Table::new(&machine, Plain, geometry, root).unwrap();
        Self {
            machine,
            table,
            epoch: Epoch::new(),
            free: Mutex::new((0..frames).map(|frame| Pfn::new(FIRST + 16 + frame)).collect()),
            waiting: Mutex::default(),
            mapped: AtomicU64::new(0),
            removed: AtomicU64::new(0),
            done: AtomicBool::new(false),
        }
    }

    /// Up to `count` zeroed pages: fewer if the pool is short, which the table must survive.
    fn reserve(&self, count: usize) -> Reserve {
        let mut reserve = Reserve::new();
        let mut free = self.free.lock().unwrap();
        for frame in (0..count).map_while(|_| free.pop()) {
            self.machine.zero(PfnRange::single(frame));
            reserve.push(frame).unwrap();
        }
        reserve
    }

    fn give_back(&self, mut reserve: Reserve) {
        let mut free = self.free.lock().unwrap();
        while let Some(frame) = reserve.pop() {
            free.push(frame);
        }
    }

    fn retire(&self, retired: Retired) {
        if !retired.is_empty() {
            self.waiting.lock().unwrap().push((self.epoch.advance(), retired));
        }
    }

    /// Frees pages whose grace period is over. They are poisoned first: a late walker would see it.
    fn reap(&self) {
        let mut waiting = self.waiting.lock().unwrap();
        for (_, retired) in waiting.extract_if(.., |(moment, _)| self.epoch.is_over(*moment)) {
            let mut free = self.free.lock().unwrap();
            retired.drain(&self.machine, Plain, |frame| {
                let poison = Plain.leaf(&leaf(0xbad, PageSize::Size4K, Permissions::ALL));
                for index in 0..512 {
                    self.machine.store(entresol_machine::Word::new(frame, index), poison);
                }
                free.push(frame);
            });
        }
    }

    fn map(&self, gfn: u64, version: u64, size: PageSize, work: &mut Count) {
        let gfn = Gfn::new(gfn).align_down(size);
        let new = leaf(version * VERSION + gfn.get(), size, Permissions::READ);
        let mut reserve = self.reserve(self.table.needed(&self.machine, gfn, size));
        match self.table.map(&self.machine, VMID, gfn, &new, &mut reserve, work) {
            Ok(mapped) => {
                self.mapped.fetch_add(size.frames(), Ordering::Relaxed);
                self.retire(mapped.retired);
            }
            Err(MapError::Busy | MapError::Present(_) | MapError::NoTable { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
        self.give_back(reserve);
    }

    fn step(&self, rng: &mut Random) {
        let (table, machine) = (&self.table, &self.machine);
        let gfn = rng.below(BLOCKS * 512);
        let range = match rng.below(3) {
            0 => gfns(gfn, 1),
            1 => gfns(gfn & !511, 512),
            _ => gfns(gfn, 1 + rng.below(1023)),
        };
        let mut work = Count { world: self, prepares: rng.coin(), flushes: rng.coin() };
        match rng.below(16) {
            0..6 => self.map(gfn, rng.below(2), PageSize::Size4K, &mut work),
            6..9 => self.map(gfn, rng.below(2), PageSize::Size2M, &mut work),
            9 => {
                let settled = table.unmap(machine, VMID, range, &mut work).settle(machine, VMID);
                self.retire(settled.retired);
            }
            10 => _ = table.protect(machine, VMID, range, Permissions::WRITE, Straddle::Whole),
            11 => _ = table.age(machine, VMID, range),
            12 => {
                let mut reserve = self.reserve(1);
                match table.split(machine, VMID, Gfn::new(gfn), &mut reserve) {
                    Ok(()) | Err(SplitError::Busy | SplitError::NotBlock | SplitError::NoTable) => {}
                    Err(other) => panic!("{other:?}"),
                }
                self.give_back(reserve);
            }
            13 => match table.merge(machine, VMID, Gfn::new(gfn), PageSize::Size2M) {
                Ok(retired) => self.retire(retired),
                Err(MergeError::Busy | MergeError::NotUniform) => {}
                Err(other) => panic!("{other:?}"),
            },
            14 => match table.make_young(machine, Gfn::new(gfn)) {
                Ok(leaf) => assert!(leaf.young),
                Err(RelaxError::Busy | RelaxError::Gone) => {}
                Err(other) => panic!("{other:?}"),
            },
            _ => {
                if let Some(Entry::Leaf(leaf)) = table.walk(machine, Gfn::new(gfn)).map(|walk| walk.entry) {
                    let frame = leaf.frame_of(Gfn::new(gfn));
                    match table.relax(machine, VMID, Gfn::new(gfn), frame, Permissions::WRITE, &mut work) {
                        Ok(leaf) => assert_eq!(leaf.frame_of(Gfn::new(gfn)), frame),
                        Err(RelaxError::Busy | RelaxError::Gone) => {}
                        Err(other) => panic!("{other:?}"),
                    }
                }
            }
        }
    }

    /// A CPU that only translates.
    fn watch(&self, cpu: usize) -> u64 {
        let mut hits = 0;
        while !self.done.load(Ordering::Relaxed) {
            for gfn in (0..BLOCKS * 512).step_by(37).map(Gfn::new) {
                let _pin = self.epoch.pin(cpu);
                if let Some(Entry::Leaf(leaf)) = self.table.walk(&self.machine, gfn).map(|walk| walk.entry) {
                    assert_eq!(leaf.frame_of(gfn).get() % VERSION, gfn.get(), "{gfn:?} → {leaf:x?}");
                    hits += 1;
                }
            }
        }
        hits
    }
}

fn race(frames: u64) {
    let world = World::new(frames);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| world.watch(THREADS));
        let workers: Vec<_> = (0..THREADS)
            .map(|cpu| {
                let world = &world;
                scope.spawn(move || {
                    let mut rng = Random(cpu as u64);
                    for step in 0..STEPS {
                        let pin = world.epoch.pin(cpu);
                        world.step(&mut rng);
                        drop(pin);
                        if step % 16 == cpu {
                            world.reap();
                            world.machine.events();
                        }
                    }
                })
            })
            .collect();
        let results: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        world.done.store(true, Ordering::Relaxed);
        let hits = watcher.join().expect("the watcher saw only what was mapped");
        assert!(results.into_iter().all(|result| result.is_ok()));
        assert!(hits > 0, "the watcher saw translations");
    });
    world.reap();
    assert!(world.waiting.lock().unwrap().is_empty(), "nobody is pinned any more");

    let (mut present, mut leaves) = (0, [0; 3]);
    world.table.visit(&world.machine, gfns(0, u64::MAX), |gfn, leaf| {
        assert_eq!(leaf.pfn.get() % VERSION, gfn.get());
        present += leaf.size.frames();
        leaves[leaf.size as usize] += 1;
    });
    let (mapped, removed) = (world.mapped.into_inner(), world.removed.into_inner());
    assert!(mapped > 1_000, "something happened: {mapped}");
    assert_eq!(mapped - removed, present, "each frame mapped is there or was reported");
    let census = world.table.census();
    assert_eq!(census.leaves, leaves);
    assert_eq!(world.free.into_inner().unwrap().len() as u64 + census.tables, frames, "no table page is lost");
}

#[test]
fn nothing_is_lost_with_tables_to_spare() {
    race(64);
}

#[test]
fn nothing_is_lost_when_tables_run_out() {
    race(4);
}
