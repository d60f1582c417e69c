//! Slots that change under accesses: CPU 0 makes, deletes, moves and zaps windows of a region of memory, all others use them.
//!
//! Protocol: each window has a word ([`Place`]) that is odd while an update of it is in progress and else says what the last
//! one left: nothing, or which page of the region its first page is, where, and whether stores go through. An access is
//! *judged* when the word was even and the same before and after it: then it must have come to exactly what the word says,
//! so memory is never emulated (INV-9) and what is gone is never reached (INV-3). One that met an update may have come to
//! either side of it, but to nothing else.
//!
//! Windows of even number stay with their pages, and are stored to. A store's word belongs to one CPU ([`own`]), which
//! knows what it must read there, or what it may: after a store that met an update it looks through the memory's own slot.
//! Windows of odd number move, over places and pages; they are only loaded from and executed.
//!
//! All of the time all CPUs also use memory that nobody changes, where nothing may ever fault.

use core::sync::atomic::{AtomicU64, Ordering};

use guest_rt::entry::MAX_CPUS;
use guest_rt::machine::{Machine, RAM};
use guest_rt::memory::{barrier, load64, publish_code, store32, store64};
use guest_rt::report::Report;
use guest_rt::rng::Rng;
use guest_rt::trap::{Fault, class, probe, status};
use guest_rt::{println, smp, timer};

use crate::windows::{FIRST_ALIAS, PAGE, Window, zap};

/// Windows, and the pages of each.
const WINDOWS: usize = 8;
const LENGTH: u64 = 32;
/// Pages of the region that they show: few enough for a page's number to be in one instruction.
const REGION: u64 = 512;
/// Places that each window may be at: its own, and one more for those that move.
const BASE: u64 = 0x10_0000_0000;
const APART: u64 = 64 << 20;
/// Not a multiple of a block, so that pages and blocks take turns in the tables.
const SHIFT: u64 = (2 << 20) + 7 * PAGE;

/// Words of a page: its number, code that returns it, then one word for each CPU.
const NUMBER: u64 = 0;
const CODE: u64 = 64;
const OWN: u64 = 1024;

static REGION_AT: AtomicU64 = AtomicU64::new(0);
static STABLE_AT: AtomicU64 = AtomicU64::new(0);
static SEED: AtomicU64 = AtomicU64::new(0);
static STATES: [AtomicU64; WINDOWS] = [const { AtomicU64::new(0) }; WINDOWS];
static STOP: AtomicU64 = AtomicU64::new(0);
static RUNNING: AtomicU64 = AtomicU64::new(0);
static FAILED: AtomicU64 = AtomicU64::new(0);
static JUDGED: [AtomicU64; KINDS] = [const { AtomicU64::new(0) }; KINDS];

/// What is counted: [`JUDGED`].
#[derive(Clone, Copy)]
enum Kind {
    Present,
    Absent,
    Met,
    Stable,
}
const KINDS: usize = 4;

/// What a window's word says: bit 0 an update is in progress, bit 1 it is there, bit 2 stores do not go through, bit 3 it is at its
/// second place, bits 31:16 the region's page behind its first, the rest counts.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place(u64);

impl Place {
    fn of(index: usize) -> Self {
        Self(STATES[index].load(Ordering::Acquire))
    }
    fn in_progress(self) -> bool {
        self.0 & 1 != 0
    }
    fn is_there(self) -> bool {
        self.0 & 2 != 0
    }
    fn read_only(self) -> bool {
        self.0 & 4 != 0
    }
    fn second(self) -> bool {
        self.0 & 8 != 0
    }
    fn first(self) -> u64 {
        self.0 >> 16 & 0xffff
    }
    fn after(self, there: bool, read_only: bool, second: bool, first: u64) -> Self {
        let bits = u64::from(there) << 1 | u64::from(read_only) << 2 | u64::from(second) << 3 | first << 16;
        Self(((self.0 >> 32) + 1) << 32 | bits)
    }
}

/// Where window `index` is.
fn base(index: usize, second: bool) -> u64 {
    BASE + index as u64 * APART + if second { SHIFT } else { 0 }
}

/// The first page that a window which stays shows.
const fn home(index: usize) -> u64 {
    index as u64 * LENGTH
}

fn own(page: u64, cpu: usize) -> u64 {
    page + OWN + cpu as u64 * 64
}

/// What CPU `cpu` stores: its own number, and one that counts.
fn value(cpu: usize, count: u64) -> u64 {
    (cpu as u64) << 56 | count
}

/// The soak, of so many seconds.
pub fn all(report: &mut Report, machine: &Machine, seconds: u64) {
    let free = machine.free();
    let region = free.start + (2 << 20);
    let stable = region + REGION * PAGE;
    assert!(stable + REGION * PAGE <= free.end, "this machine has too little memory");
    for page in 0..REGION {
        for at in [region, stable].map(|start| start + page * PAGE) {
            store64(at + NUMBER, page);
            // movz x0, #page; ret
            store32(at + CODE, 0xd280_0000 | (page as u32) << 5);
            store32(at + CODE + 4, 0xd65f_03c0);
            publish_code(at + CODE..at + CODE + 8);
            (0..MAX_CPUS).for_each(|cpu| store64(own(at, cpu), value(cpu, 0)));
        }
    }
    REGION_AT.store(region, Ordering::Release);
    STABLE_AT.store(stable, Ordering::Release);
    SEED.store(machine.number("seed").unwrap_or(1), Ordering::Release);
    let others = machine.cpus.min(MAX_CPUS) - 1;
    RUNNING.store(others as u64, Ordering::Release);
    for cpu in 1..=others {
        smp::on(cpu, worker).expect("the CPU is off");
    }
    let updates = churn(seconds);
    STOP.store(1, Ordering::Release);
    while RUNNING.load(Ordering::Acquire) != 0 {
        core::hint::spin_loop();
    }
    let [present, absent, met, stable] = [0, 1, 2, 3].map(|kind| JUDGED[kind].load(Ordering::Acquire));
    println!(
        "SOAK {updates} updates; {present} accesses to windows, {absent} to where none was, {met} met an update, {stable} to stable memory"
    );
    let failed = FAILED.load(Ordering::Acquire);
    report.check("every access came to what it should", if failed == 0 { Ok(()) } else { Err("see above") });
    let enough = updates > 100 && present > 1000 && absent > 1000 && stable > 1000;
    report.check("there was enough of each", if enough { Ok(()) } else { Err("the machine is too slow") });
}

/// Updates windows until the time is over; how often.
fn churn(seconds: u64) -> u64 {
    let mut rng = Rng::new(SEED.load(Ordering::Acquire));
    let (end, second) = (timer::now() + seconds * timer::frequency(), timer::frequency());
    let (mut updates, mut told) = (0, timer::now());
    let region = (REGION_AT.load(Ordering::Acquire) - RAM) / PAGE;
    while timer::now() < end {
        let index = rng.below(WINDOWS as u64) as usize;
        if rng.below(4) == 0 {
            let stable = STABLE_AT.load(Ordering::Acquire);
            let pages = 1 + rng.below(64);
            zap(stable + rng.below(REGION - pages) * PAGE, pages * PAGE);
        }
        update(&mut rng, index, region);
        updates += 1;
        if timer::now() - told > 10 * second {
            told = timer::now();
            println!("SOAK goes on: {updates} updates");
        }
    }
    updates
}

/// One update of one window.
fn update(rng: &mut Rng, index: usize, region: u64) {
    let now = Place::of(index);
    let moves = index % 2 == 1;
    let window = |place: Place| Window {
        number: FIRST_ALIAS + index as u64,
        base: base(index, place.second()),
        pages: LENGTH,
        first: region + place.first(),
        read_only: place.read_only(),
    };
    let first = if moves { rng.below(REGION - LENGTH) } else { home(index) };
    let next = match (now.is_there(), moves && rng.below(2) == 0) {
        (false, _) => now.after(true, rng.below(4) == 0, moves && rng.below(2) == 0, first),
        // A move keeps the pages behind it.
        (true, true) => now.after(true, now.read_only(), !now.second(), now.first()),
        (true, false) => now.after(false, false, false, 0),
    };
    STATES[index].store(now.0 | 1, Ordering::Release);
    barrier();
    let done = if next.is_there() { window(next).set() } else { window(now).delete() };
    barrier();
    assert!(done, "an update was refused");
    STATES[index].store(next.0, Ordering::Release);
}

/// What a CPU knows.
struct Worker {
    cpu: usize,
    rng: Rng,
    /// Count of its last store.
    count: u64,
    counts: [u64; KINDS],
}

fn worker(cpu: usize) {
    let rng = Rng::new(SEED.load(Ordering::Acquire) ^ (cpu as u64) << 32);
    let mut worker = Worker { cpu, rng, count: 0, counts: [0; KINDS] };
    while STOP.load(Ordering::Acquire) == 0 {
        if worker.rng.below(4) == 0 {
            worker.stable();
        } else {
            worker.window();
        }
    }
    for (total, count) in JUDGED.iter().zip(worker.counts) {
        total.fetch_add(count, Ordering::AcqRel);
    }
    RUNNING.fetch_sub(1, Ordering::AcqRel);
}

fn is_absent(result: Result<u64, Fault>, address: u64) -> bool {
    result.is_err_and(|fault| {
        let abort = [class::DATA_ABORT, class::INSTRUCTION_ABORT].contains(&fault.class());
        abort && fault.status() == status::EXTERNAL && fault.far == address && fault.serror == 0
    })
}

impl Worker {
    fn fail(&self, what: &str, address: u64, place: Place, expected: u64, found: Result<u64, Fault>) {
        if FAILED.fetch_add(1, Ordering::AcqRel) < 20 {
            let cpu = self.cpu;
            match found {
                Ok(found) => println!(
                    "FAIL cpu {cpu}: {what} at {address:#x}, window {:#x}: expected {expected:#x}, found {found:#x}",
                    place.0
                ),
                Err(fault) => println!("FAIL cpu {cpu}: {what} at {address:#x}, window {:#x}: {fault}", place.0),
            }
        }
    }

    /// Any load of 64 bits.
    fn load(&mut self, address: u64) -> Result<u64, Fault> {
        match self.rng.below(4) {
            0 => probe::load64(address, 0),
            1 => probe::load_post(address, 0),
            2 => probe::load_acquire(address, 0),
            _ => probe::load_exclusive(address, 0),
        }
    }

    /// Memory of the machine's own slot: nothing may fault, everything is as it was stored.
    fn stable(&mut self) {
        let page = self.rng.below(REGION);
        let address = STABLE_AT.load(Ordering::Acquire) + page * PAGE;
        let place = Place(0);
        let number = self.load(address + NUMBER);
        if number != Ok(page) {
            self.fail("stable load", address, place, page, number);
        }
        let called = probe::call(address + CODE);
        if called != Ok(page) {
            self.fail("stable fetch", address, place, page, called);
        }
        self.count += 1;
        let (mine, stored) = (own(address, self.cpu), value(self.cpu, self.count));
        let store = probe::store64(mine, stored);
        let found = store.and_then(|_| self.load(mine));
        if found != Ok(stored) {
            self.fail("stable store", mine, place, stored, found);
        }
        if self.rng.below(8) == 0
            && let Err(fault) = probe::clean_invalidate(mine, 0)
        {
            self.fail("stable maintenance", mine, place, 0, Err(fault));
        }
        self.counts[Kind::Stable as usize] += 1;
    }

    /// One access to one window, wherever it may be.
    fn window(&mut self) {
        let index = self.rng.below(WINDOWS as u64) as usize;
        let page = self.rng.below(LENGTH);
        let before = Place::of(index);
        let second = index % 2 == 1 && self.rng.below(2) == 0;
        let address = base(index, second) + page * PAGE;
        barrier();
        let (what, expected, at, result) = match self.rng.below(if index.is_multiple_of(2) { 4 } else { 3 }) {
            0 => ("load", before.first() + page, address + NUMBER, self.load(address + NUMBER)),
            1 => ("fetch", before.first() + page, address + CODE, probe::call(address + CODE)),
            2 => ("maintenance", 0, address, probe::clean_invalidate(address, 0).map(|_| 0)),
            _ => return self.store(index, page, address),
        };
        barrier();
        let judged = before == Place::of(index) && !before.in_progress();
        let there = before.is_there() && before.second() == second;
        let right = match (judged, there) {
            (true, true) => result == Ok(expected),
            // Maintenance of nothing is nothing.
            (true, false) => is_absent(result, at) || what == "maintenance" && result.is_ok(),
            (false, _) => is_absent(result, at) || result.is_ok_and(|found| found < REGION),
        };
        if !right {
            self.fail(what, at, before, expected, result);
        }
        self.note(judged, there);
    }

    fn note(&mut self, judged: bool, there: bool) {
        let kind = match (judged, there) {
            (true, true) => Kind::Present,
            (true, false) => Kind::Absent,
            (false, _) => Kind::Met,
        };
        self.counts[kind as usize] += 1;
    }

    /// A store to this CPU's own word through a window that stays with its pages.
    fn store(&mut self, index: usize, page: u64, address: u64) {
        let memory = own(REGION_AT.load(Ordering::Acquire) + (home(index) + page) * PAGE, self.cpu);
        let at = own(address, self.cpu);
        let old = load64(memory);
        self.count += 1;
        let stored = value(self.cpu, self.count);
        let before = Place::of(index);
        barrier();
        let result = if self.rng.below(2) == 0 { probe::store64(at, stored) } else { probe::store_post(at, stored) };
        barrier();
        let judged = before == Place::of(index) && !before.in_progress();
        let found = load64(memory);
        let arrives = before.is_there() && !before.read_only();
        let right = match (judged, arrives) {
            (true, true) => result.is_ok() && found == stored,
            (true, false) => is_absent(result, at) && found == old,
            (false, _) if result.is_ok() => found == stored,
            (false, _) => is_absent(result, at) && found == old,
        };
        if !right {
            self.fail("store", at, before, stored, result.map(|_| found));
        }
        self.note(judged, before.is_there());
    }
}

const _: () = assert!(REGION <= 1 << 16 && home(WINDOWS - 1) + LENGTH <= REGION);
