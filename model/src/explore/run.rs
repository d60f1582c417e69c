//! One schedule, from power-on to the verdict.
//!
//! Protocol: the CPUs are coroutines on stacks that are used again, one inside the scope of the other, because each
//! borrows the stage. The loop here resumes whichever the schedule names until all are done or something was found.
//! Leaving the scopes unwinds what is still suspended.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use corosensei::stack::DefaultStack;
use corosensei::{CoroutineResult, ScopedCoroutine, ScopedCoroutineRef, Yielder};
use entresol_sync::zoo::{self, Bug};

use super::access::Sites;
use super::schedule::Go;
use super::strategy::Strategy;
use super::trail::Trail;
use crate::check::{Check, Checks, Violation, inv15};
use crate::guest::stage::{self, Stage};
use crate::lab;
use crate::litmus::Scenario;
use crate::litmus::outcome::Registers;
use crate::machine::config::MAX_CPUS;
use crate::report::Trace;

/// How a schedule is run, besides its decisions.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    /// What watches.
    pub checks: Checks,
    /// What is planted.
    pub bugs: &'a [Bug],
    /// The request for a frame, counted from 1, that is refused.
    pub starve: Option<u64>,
    /// Events are written down.
    pub record: bool,
    /// Everything is destroyed in the end, rather than only counted.
    pub destroy: bool,
}

impl Default for Setting<'_> {
    fn default() -> Self {
        Self { checks: Checks::all(), bugs: &[], starve: None, record: false, destroy: false }
    }
}

/// A schedule that has ended.
#[derive(Debug)]
pub struct Ended {
    /// What was found.
    pub violation: Option<Violation>,
    /// Results.
    pub registers: Registers,
    /// Events that happened.
    pub marks: BTreeSet<&'static str>,
    /// Decisions that were not the default.
    pub trail: Trail,
    /// Decisions that mattered.
    pub points: u64,
    /// Requests for frames.
    pub requests: u64,
    /// Events in order.
    pub trace: Option<Trace>,
    /// Who decided.
    pub strategy: Strategy,
}

/// Where one thread runs schedules.
pub struct Bench {
    stacks: Vec<DefaultStack>,
    /// Places of the source that matter.
    pub sites: Sites,
}

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Panics of the core under exploration are findings, not messages on a terminal.
fn catch_messages() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !lab::is_open() {
                return usual(info);
            }
            // What runs from here on only unwinds.
            lab::abandon();
            PANIC.set(Some(info.to_string().replace('\n', " ")));
        }));
    });
}

impl Bench {
    /// A place to run schedules, with nothing learned yet.
    pub fn new() -> Self {
        catch_messages();
        let stacks = (0..MAX_CPUS).map(|_| DefaultStack::default()).collect();
        Self { stacks, sites: Sites::default() }
    }

    /// Runs one schedule.
    pub fn run(&mut self, scenario: &Scenario, setting: &Setting<'_>, strategy: Strategy) -> Ended {
        lab::open(scenario.machine, scenario.rom_frames(), setting.checks, std::mem::take(&mut self.sites));
        lab::with(|lab| {
            lab.schedule.begin(scenario.cpus.len(), strategy);
            lab.trace = setting.record.then(|| Trace::new(scenario.pages()));
            lab.starve = setting.starve;
        });
        let outcome = catch_unwind(AssertUnwindSafe(|| perform(scenario, setting, &mut self.stacks)));
        zoo::plant(&[]);
        let mut lab = lab::close();
        let strategy = lab.schedule.end();
        if outcome.is_err() && lab.violation.is_none() {
            lab.violation = Some(panicked());
        }
        let (trail, points) = (std::mem::take(&mut lab.schedule.trail), lab.schedule.points);
        self.sites = std::mem::take(&mut lab.schedule.sites);
        Ended {
            violation: lab.violation.filter(|found| lab.checks.has(found.check)),
            registers: outcome.unwrap_or_default(),
            marks: lab.marks,
            trail,
            points,
            requests: lab.requests,
            trace: lab.trace,
            strategy,
        }
    }
}

impl Default for Bench {
    fn default() -> Self {
        Self::new()
    }
}

fn panicked() -> Violation {
    let what = PANIC.take().unwrap_or_else(|| "a panic without a message".to_owned());
    Violation { check: Check::Panic, what }
}

/// The stage is put up, the CPUs run, everything is counted.
fn perform(scenario: &Scenario, setting: &Setting<'_>, stacks: &mut [DefaultStack]) -> Registers {
    let host = stage::host(scenario);
    let stage = Stage::new(&host, scenario);
    // What a scenario begins with was made by a right core.
    zoo::plant(setting.bugs);
    cpus(&stage, scenario, 0, stacks, &Nobody, &mut |cpus| drive(cpus));
    let registers = stage.registers.take();
    if lab::with(|lab| lab.violation.is_some()) {
        return registers;
    }
    lab::with(|lab| {
        lab.schedule.running = false;
        let forbidden = scenario.forbidden.iter().find(|condition| condition.holds(&registers));
        lab.found(
            Check::Forbidden,
            forbidden.map(|condition| format!("the outcome is one that is forbidden: {condition}")),
        );
    });
    stage.balance();
    if setting.destroy {
        stage.destroy();
    }
    registers
}

/// CPUs that can be resumed by number.
trait Cpus {
    /// Whether the script has ended.
    fn resume(&self, cpu: usize) -> bool;
}

struct Nobody;

impl Cpus for Nobody {
    fn resume(&self, cpu: usize) -> bool {
        unreachable!("CPU {cpu} has no script")
    }
}

type Way<'a, 'r> = ScopedCoroutineRef<'a, (), (), (), &'r mut DefaultStack>;

struct One<'a, 'r, 's> {
    cpu: usize,
    coroutine: RefCell<Way<'a, 'r>>,
    rest: &'s dyn Cpus,
}

impl Cpus for One<'_, '_, '_> {
    fn resume(&self, cpu: usize) -> bool {
        if cpu != self.cpu {
            return self.rest.resume(cpu);
        }
        matches!(self.coroutine.borrow_mut().resume(()), CoroutineResult::Return(()))
    }
}

/// Starts CPU `cpu` and those after it, and drives them all.
fn cpus(
    stage: &Stage<'_>,
    scenario: &Scenario,
    cpu: usize,
    stacks: &mut [DefaultStack],
    rest: &dyn Cpus,
    drive: &mut dyn FnMut(&dyn Cpus),
) {
    let (Some(script), Some((stack, stacks))) = (scenario.cpus.get(cpu), stacks.split_first_mut()) else {
        return drive(rest);
    };
    let body = move |yielder: &Yielder<(), ()>, ()| lab::inhabit(cpu, yielder, || stage.script(cpu, script));
    ScopedCoroutine::with_stack(stack, body).scope(|coroutine| {
        let one = One { cpu, coroutine: RefCell::new(coroutine), rest };
        cpus(stage, scenario, cpu + 1, stacks, &one, drive);
    });
}

/// Resumes who is to go until all are done or something was found.
fn drive(cpus: &dyn Cpus) {
    let mut cpu = lab::with(|lab| lab.schedule.start());
    loop {
        let ended = match catch_unwind(AssertUnwindSafe(|| cpus.resume(cpu))) {
            Ok(ended) => ended,
            Err(_) => {
                let found = panicked();
                return lab::with(|lab| {
                    lab.violation.get_or_insert(found);
                });
            }
        };
        let over = lab::with(|lab| {
            if ended && lab.violation.is_none() && lab.schedule.finished() == Go::Stuck {
                let what = inv15::stuck(&lab.schedule.waits());
                lab.violation = Some(Violation { check: Check::Inv15, what });
            }
            cpu = lab.schedule.current();
            lab.violation.is_some() || lab.schedule.all_done()
        });
        if over {
            return finish();
        }
    }
}

fn finish() {
    if lab::with(|lab| lab.violation.is_some()) {
        lab::abandon();
    }
}
