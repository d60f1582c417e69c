//! One thread's laboratory: the machine, the schedule and the checkers of the schedule at hand.
//!
//! Purpose: the core reaches the model through two doors, [`entresol_machine::Machine`] and the facade of
//! [`entresol_sync`]. Both open here. Before each operation the schedule decides whether this CPU goes on; after it the
//! checkers look.
//!
//! Protocol: a CPU is a coroutine. It suspends itself when the schedule sends another, through the yielder that its
//! body left in a scoped thread-local of its own ([`inhabit`]). A violation ends the schedule: its CPU suspends and is
//! never resumed, the coroutines are unwound, and [`abandoned`](entresol_sync::hint::abandoned) tells waiting loops in
//! destructors that nobody will come. The state lives in a thread-local that is borrowed for one operation at a time and
//! never across a suspension. What the core does to the machine is in [`hardware`].

mod hardware;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fmt;
use std::panic::Location;

use corosensei::Yielder;
use entresol_addr::{GfnRange, Pfn, PfnRange};
use entresol_machine::Word;
use entresol_sync::lab::{Access, Scheduler, Site};
pub use hardware::{Hardware, set_by_hardware};
use scoped_tls::scoped_thread_local;

use crate::check::coalesced::Posted;
use crate::check::inv04::Log;
use crate::check::inv11::Oracle;
use crate::check::written::Written;
use crate::check::{self, Check, Checks, Violation, inv03, inv04, inv05, inv07, inv10, inv15};
use crate::explore::access::WORD;
use crate::explore::schedule::{Go, Schedule};
use crate::guest::record::Records;
use crate::machine::config::{Config, MAX_CPUS};
use crate::machine::frame::Pick;
use crate::machine::linear::{Linear, SHADOWS};
use crate::machine::{EntryWrite, World};
use crate::report::{Event, Trace};

/// The state of one schedule.
pub struct Lab {
    /// Who goes when.
    pub schedule: Schedule,
    /// The machine.
    pub world: World,
    /// What watches.
    pub checks: Checks,
    /// What was found.
    pub violation: Option<Violation>,
    /// Slots.
    pub records: Records,
    /// Data.
    pub oracle: Oracle,
    /// Ranges that are being invalidated.
    pub protected: Vec<(usize, GfnRange)>,
    /// For each CPU the range of a slot whose flags it is changing.
    pub flags_update: [Option<GfnRange>; MAX_CPUS],
    /// For each CPU the frame that its exclusive load watches, and how many stores it had seen.
    pub monitors: [Option<(Pfn, u64)>; MAX_CPUS],
    /// Coalesced writes that wait.
    pub posted: Posted,
    /// Slots that log.
    pub logs: Vec<Log>,
    /// What was written, for whoever names it.
    pub written: Written,
    /// For each CPU whether it is resetting dirty rings.
    pub resetting: [bool; MAX_CPUS],
    /// What processors may keep of guests' own tables.
    pub linear: Linear,
    /// Events that happened.
    pub marks: BTreeSet<&'static str>,
    /// What happened in order, if somebody wants to read it.
    pub trace: Option<Trace>,
    /// Frames asked for since the CPUs started.
    pub requests: u64,
    /// The request that is refused.
    pub starve: Option<u64>,
}

thread_local! {
    static LAB: RefCell<Option<Lab>> = const { RefCell::new(None) };
    static ABANDONED: Cell<bool> = const { Cell::new(false) };
}

scoped_thread_local!(static OUT_0: Yielder<(), ()>);
scoped_thread_local!(static OUT_1: Yielder<(), ()>);
scoped_thread_local!(static OUT_2: Yielder<(), ()>);
scoped_thread_local!(static OUT_3: Yielder<(), ()>);

/// Keys of page contents and of translation caches, beside those of words, among the addresses of the schedule. No
/// host address has these bits.
const PAGE: usize = 1 << 62;
const TLB: usize = 1 << 61;
const OWN: usize = 1 << 60;
const DISK: usize = 1 << 59;

/// Puts a new machine on the table, with what the thread has learned about places of the source.
pub fn open(config: Config, rom: u64, checks: Checks, sites: crate::explore::access::Sites) {
    let mut schedule = Schedule::new();
    schedule.sites = sites;
    let lab = Lab {
        schedule,
        world: World::new(config, rom),
        checks,
        violation: None,
        records: Records::default(),
        oracle: Oracle::default(),
        protected: Vec::new(),
        flags_update: [None; MAX_CPUS],
        logs: Vec::new(),
        written: Written::default(),
        resetting: [false; MAX_CPUS],
        monitors: [None; MAX_CPUS],
        posted: Posted::default(),
        linear: Linear::default(),
        marks: BTreeSet::new(),
        trace: None,
        requests: 0,
        starve: None,
    };
    LAB.set(Some(lab));
    ABANDONED.set(false);
    entresol_sync::lab::enter(&Facade);
}

/// Takes everything off the table.
///
/// # Panics
///
/// If nothing is on it.
pub fn close() -> Lab {
    entresol_sync::lab::leave();
    LAB.take().expect("a laboratory is open")
}

/// The state, for one operation.
///
/// # Panics
///
/// If nothing is on the table, or inside another call.
pub fn with<R>(f: impl FnOnce(&mut Lab) -> R) -> R {
    LAB.with_borrow_mut(|lab| f(lab.as_mut().expect("a laboratory is open")))
}

/// Runs `body` as CPU `cpu`, whose way out is `yielder`.
pub fn inhabit(cpu: usize, yielder: &Yielder<(), ()>, body: impl FnOnce()) {
    match cpu {
        0 => OUT_0.set(yielder, body),
        1 => OUT_1.set(yielder, body),
        2 => OUT_2.set(yielder, body),
        _ => OUT_3.set(yielder, body),
    }
}

fn suspend(cpu: usize) {
    let out = |yielder: &Yielder<(), ()>| yielder.suspend(());
    match cpu {
        0 => OUT_0.with(out),
        1 => OUT_1.with(out),
        2 => OUT_2.with(out),
        _ => OUT_3.with(out),
    }
}

/// Nobody schedules any more: what still runs is being unwound.
pub fn abandon() {
    ABANDONED.set(true);
}

/// Whether a schedule is on this thread's table, so that a panic belongs to it.
pub fn is_open() -> bool {
    LAB.try_with(|lab| lab.try_borrow().map_or(true, |lab| lab.is_some())).unwrap_or(false)
}

/// An operation on `address` is about to happen.
fn step(address: usize, write: bool, site: Site) {
    if ABANDONED.get() {
        return;
    }
    let (me, go) = with(|lab| (lab.schedule.current(), lab.schedule.access(address, write, site)));
    if go == Go::Away {
        suspend(me);
        with(|lab| lab.schedule.access_now(address, write, site));
    }
}

/// A CPU waits; `ask` tells the schedule.
fn wait(ask: impl FnOnce(&mut Schedule) -> Go) {
    if ABANDONED.get() {
        return;
    }
    let (me, go) = with(|lab| {
        let me = lab.schedule.current();
        let go = ask(&mut lab.schedule);
        if go == Go::Stuck {
            let what = inv15::stuck(&lab.schedule.waits());
            lab.violation.get_or_insert(Violation { check: Check::Inv15, what });
        }
        (me, go)
    });
    match go {
        Go::On => {}
        Go::Away => suspend(me),
        Go::Stuck => give_up(),
    }
}

/// Ends the schedule if something was found.
pub fn settle() {
    if !ABANDONED.get() && with(|lab| lab.violation.is_some()) {
        give_up();
    }
}

fn give_up() {
    let (me, running) = with(|lab| (lab.schedule.current(), lab.schedule.running));
    abandon();
    if running {
        suspend(me);
    } else {
        panic!("the schedule ended outside its CPUs");
    }
}

impl Lab {
    /// Something does not hold, if its checker watches.
    pub fn found(&mut self, check: Check, what: Option<String>) {
        if let Some(what) = what.filter(|_| self.checks.has(check) && self.violation.is_none()) {
            self.violation = Some(Violation { check, what });
        }
    }

    /// The hypervisor is about to read or write `frames`.
    fn uses(&mut self, frames: PfnRange) {
        if self.checks.has(Check::Inv7) {
            let wrong = inv07::used(&self.world, frames);
            self.found(Check::Inv7, wrong);
        }
    }

    /// The same by their addresses.
    fn reaches(&mut self, frames: PfnRange, site: Site) {
        if self.world.own.is_used() {
            self.schedule.access_now(own_key(frames.start()), false, site);
            let absent = inv10::used(&self.world, frames);
            self.found(Check::Inv10, absent);
        }
        self.uses(frames);
    }

    /// Something happened that a scenario may want to have seen.
    pub fn mark(&mut self, mark: &'static str) {
        self.marks.insert(mark);
    }

    /// Writes down what happened, if somebody wants to read it.
    pub fn log(&mut self, site: Option<Site>, what: impl FnOnce() -> String) {
        if self.trace.is_none() {
            return;
        }
        let event = Event {
            step: self.schedule.steps,
            cpu: self.schedule.running.then(|| self.schedule.current()),
            what: what(),
            place: site.map(|site| format!("{}:{}", site.file(), site.line())),
            pages: Vec::new(),
        };
        if let Some(trace) = &mut self.trace {
            trace.add(event, &self.world);
        }
    }

    /// Does something to the machine, with its freedom.
    pub fn machine<R>(&mut self, f: impl FnOnce(&mut World, Pick<'_>) -> R) -> R {
        let Self { world, schedule, .. } = self;
        f(world, &mut |of| schedule.pick(of))
    }

    /// Entries were stored.
    fn entries(&mut self, writes: &[EntryWrite]) {
        let cpu = self.schedule.current();
        // What shadow tables say is judged when somebody uses it.
        for write in writes.iter().filter(|write| write.vm < SHADOWS) {
            if let Some(violation) = check::entry(self.checks, &self.world, write) {
                self.violation.get_or_insert(violation);
            }
            self.found(Check::Inv3, inv03::entry(&self.protected, write));
            let outside = inv05::entry(self.records.of(write.vm).map(|slot| slot.range), write);
            self.found(Check::Inv5, outside);
            self.found(Check::Inv4, inv04::entry(&self.world, &self.logs, write));
            if self.resetting[cpu] {
                self.found(Check::Slots, check::slots::reset(&self.logs, write));
            }
            if let Some(range) = self.flags_update[cpu] {
                self.found(Check::Slots, check::slots::entry(&self.world, range, write));
            }
            if let crate::machine::descriptor::Descriptor::Leaf(leaf) = write.new
                && leaf.execute
                && !self.world.config.dic
            {
                for pfn in (0..leaf.size.frames()).map(|offset| leaf.pfn.offset(offset)) {
                    if self.world.frame(pfn).is_some() {
                        self.world.frame_mut(pfn).executable = true;
                    }
                }
            }
        }
    }
}

/// The door of the facade.
struct Facade;

impl Scheduler for Facade {
    fn access(&self, access: Access) {
        step(access.address, access.write, access.site);
    }

    fn spin(&self, site: Site) {
        wait(|schedule| schedule.spin(site));
    }

    fn blocked(&self, address: usize, site: Site) {
        assert!(!ABANDONED.get(), "a destructor wants a lock that its own CPU or an abandoned one holds");
        wait(|schedule| schedule.blocked(address, site));
    }

    fn released(&self, address: usize) {
        if !ABANDONED.get() {
            with(|lab| lab.schedule.released(address));
        }
    }

    fn abandoned(&self) -> bool {
        ABANDONED.get()
    }

    fn taken(&self, first: u64, frames: u64) {
        with(|lab| lab.world.taken(range(first, frames)));
    }

    fn freed(&self, first: u64, frames: u64) {
        if ABANDONED.get() {
            return;
        }
        with(|lab| {
            let frames = range(first, frames);
            lab.log(None, || format!("frame {:#x} is free", frames.start()));
            if lab.checks.has(Check::Inv7) {
                let reached = inv07::freed(&lab.world, frames);
                lab.found(Check::Inv7, reached);
            }
            lab.world.freed(frames);
        });
        settle();
    }

    fn told(&self, what: fmt::Arguments<'_>) {
        if !ABANDONED.get() {
            with(|lab| lab.log(None, || what.to_string()));
        }
    }

    fn starved(&self) -> bool {
        with(|lab| {
            lab.requests += u64::from(lab.schedule.running);
            lab.schedule.running && lab.starve == Some(lab.requests)
        })
    }
}

fn range(first: u64, frames: u64) -> PfnRange {
    PfnRange::new(Pfn::new(first), frames).expect("frames of the pool")
}

fn word_key(word: Word) -> usize {
    WORD | word.address().get() as usize
}

/// The key of a page's content.
pub fn page_key(pfn: Pfn) -> usize {
    PAGE | pfn.get() as usize
}

/// The key of a frame's entry in the hypervisor's own mapping.
fn own_key(pfn: Pfn) -> usize {
    OWN | pfn.get() as usize
}

/// A place of the swap device is about to be read, or written.
#[track_caller]
pub fn before_disk(place: u64, write: bool) {
    step(DISK | place as usize, write, Location::caller());
}

/// A guest's access is about to happen: it looks at the translation caches.
#[track_caller]
pub fn before_guest() {
    step(TLB, false, Location::caller());
}

/// A guest's access touched a word that may be one of its tables', for the schedule.
#[track_caller]
pub fn touched_word(lab: &mut Lab, word: Word, write: bool) {
    lab.schedule.access_now(word_key(word), write, Location::caller());
}

/// Words and pages that a guest's access touched, for the schedule.
#[track_caller]
pub fn touched(lab: &mut Lab, words: &[Word], page: Option<(Pfn, bool)>) {
    let site = Location::caller();
    for word in words {
        lab.schedule.access_now(word_key(*word), false, site);
    }
    if let Some((pfn, write)) = page {
        lab.schedule.access_now(page_key(pfn), write, site);
    }
}
