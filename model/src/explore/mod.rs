//! Schedules: which there are, which are tried, and what became of them.
//!
//! Purpose: a bug that needs two CPUs shows itself in few of the orders in which their operations can happen. A
//! portfolio looks for it: every order with at most so many preemptions ([`strategy::Search`]), random priorities
//! ([`strategy::Pct`]), and random walks that like to stay where they are. No single one of them finds everything soon.
//!
//! Protocol: [`explore`] runs schedules on all cores until the plan is done, the time is over, or something was found.
//! What was found is a [`trail::Trail`], which [`shrink`] makes short and [`replay`] turns into a trace.

pub mod access;
pub mod run;
pub mod schedule;
pub mod strategy;
pub mod trail;

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::check::Violation;
use crate::litmus::Scenario;
use access::Sites;
use run::{Bench, Ended, Setting};
use strategy::{Pct, Replay, Search, Strategy};
use trail::Trail;

/// Ordering constraints that PCT is prepared for: the deepest bug of the prototype needed five.
const DEPTH: u32 = 5;
/// Schedules that teach which places of the source matter before a search begins.
const LESSONS: u64 = 64;
/// Decisions at the beginning of a search that say whose part of it a schedule is.
const SHARED_OUT: usize = 6;
/// Schedules between two looks at the clock.
const BETWEEN_LOOKS: u64 = 64;
/// How much more a schedule of a long scenario takes than another.
const LONG: u64 = 20;
/// Schedules that end with everything destroyed: one in so many.
const DESTROYED: u64 = 32;

/// How much is tried.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Every schedule within the scenario's preemption bound, at most so many; 0 is none.
    pub exhaustive: u64,
    /// PCT schedules.
    pub pct: u64,
    /// Sticky random schedules.
    pub sticky: u64,
    /// The first seed.
    pub seed: u64,
    /// Time.
    pub limit: Duration,
    /// Threads.
    pub threads: usize,
}

impl Default for Plan {
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        Self { exhaustive: 2_000_000, pct: 5_000, sticky: 5_000, seed: 1, limit: Duration::from_secs(60), threads }
    }
}

impl Plan {
    /// What can be spent on a scenario: less of one whose schedules are long.
    pub fn fitting(self, scenario: &Scenario) -> Self {
        if !scenario.long {
            return self;
        }
        let Self { exhaustive, pct, sticky, .. } = self;
        Self { exhaustive: exhaustive / LONG, pct: pct / LONG, sticky: sticky / LONG, ..self }
    }
}

/// Something that does not hold, and how to see it again.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What.
    pub violation: Violation,
    /// The decisions.
    pub trail: Trail,
    /// Who found it.
    pub by: &'static str,
    /// In the how manieth schedule.
    pub after: u64,
    /// The request for a frame that was refused in it, counted from 1.
    pub refused: Option<u64>,
}

/// What an exploration did.
#[derive(Debug, Default)]
pub struct Report {
    /// Schedules run.
    pub schedules: u64,
    /// Of these, in the exhaustive search that was completed or was running last.
    pub searched: u64,
    /// Every schedule within the bound was run.
    pub exhausted: bool,
    /// What was found.
    pub failure: Option<Failure>,
    /// Events that happened in some schedule.
    pub marks: BTreeSet<&'static str>,
    /// For each required outcome whether some schedule showed it.
    pub required: Vec<bool>,
    /// Places of the source at which schedules were decided.
    pub places: Vec<String>,
    /// Time.
    pub elapsed: Duration,
}

impl Report {
    /// Schedules a second.
    pub fn rate(&self) -> f64 {
        self.schedules as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// Required outcomes and marks that nothing showed: the scenario does not test what it says.
    pub fn missing(&self, scenario: &Scenario) -> Vec<String> {
        let outcomes = scenario.required.iter().zip(&self.required).filter(|(_, seen)| !**seen);
        let marks = scenario.marks.iter().filter(|mark| !self.marks.contains(mark.as_str()));
        outcomes.map(|(condition, _)| condition.to_string()).chain(marks.map(|mark| format!("mark {mark:?}"))).collect()
    }
}

/// What the threads of one exploration share.
struct Common<'a> {
    scenario: &'a Scenario,
    setting: Setting<'a>,
    began: Instant,
    limit: Duration,
    stop: AtomicBool,
    schedules: AtomicU64,
    report: Mutex<Report>,
    progress: &'a (dyn Fn(u64) + Sync),
}

impl Common<'_> {
    /// Runs one schedule and writes down what became of it.
    fn run(&self, bench: &mut Bench, strategy: Strategy, by: &'static str) -> Ended {
        let number = self.schedules.fetch_add(1, Ordering::Relaxed) + 1;
        let destroy = number.is_multiple_of(DESTROYED);
        let mut ended = bench.run(self.scenario, &Setting { destroy, ..self.setting }, strategy);
        if number.is_multiple_of(BETWEEN_LOOKS) {
            (self.progress)(number);
            if self.began.elapsed() > self.limit {
                self.stop.store(true, Ordering::Relaxed);
            }
        }
        let mut report = self.report.lock().expect("no thread of ours panics with the lock");
        report.marks.append(&mut ended.marks);
        for (place, condition) in self.scenario.required.iter().enumerate() {
            report.required[place] |= condition.holds(&ended.registers);
        }
        if let Some(violation) = ended.violation.take() {
            self.stop.store(true, Ordering::Relaxed);
            let (trail, refused) = (ended.trail.clone(), self.setting.starve);
            let failure = Failure { violation, trail, by, after: number, refused };
            report.failure.get_or_insert(failure);
        }
        ended
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Explores a scenario. `progress` hears now and then how many schedules were run.
///
/// # Panics
///
/// If a thread cannot be started.
pub fn explore(scenario: &Scenario, setting: Setting<'_>, plan: &Plan, progress: &(dyn Fn(u64) + Sync)) -> Report {
    let required = vec![false; scenario.required.len()];
    let common = Common {
        scenario,
        setting,
        began: Instant::now(),
        limit: plan.limit,
        stop: AtomicBool::new(false),
        schedules: AtomicU64::new(0),
        report: Mutex::new(Report { required, ..Report::default() }),
        progress,
    };
    let mut benches: Vec<Bench> = (0..plan.threads.max(1)).map(|_| Bench::new()).collect();
    let points = learn(&common, &mut benches[0], plan);
    let mut exhausted = false;
    if plan.exhaustive != 0 {
        exhausted = search(&common, &mut benches, plan);
    }
    let random: [(u64, &'static str); 2] = [(plan.pct, "PCT"), (plan.sticky, "sticky")];
    for (count, by) in random {
        sample(&common, &mut benches, plan, count, by, points);
    }
    let mut places = benches.iter().flat_map(|bench| bench.sites.shared_names()).collect::<Vec<_>>();
    places.sort();
    places.dedup();
    let schedules = common.schedules.load(Ordering::Relaxed);
    let elapsed = common.began.elapsed();
    let report = common.report.into_inner().expect("no thread of ours panics with the lock");
    Report { schedules, exhausted: exhausted && report.failure.is_none(), places, elapsed, ..report }
}

/// Random schedules that teach which places matter. Returns how many decisions a schedule has.
fn learn(common: &Common<'_>, bench: &mut Bench, plan: &Plan) -> u64 {
    let mut points = 1;
    for seed in 0..LESSONS {
        if common.stopped() {
            break;
        }
        let strategy = Strategy::Sticky(Rng::with_seed(plan.seed.wrapping_add(seed) ^ 0x5eed));
        points = points.max(common.run(bench, strategy, "sticky").points);
    }
    points
}

/// Runs every schedule within the bound, in rounds: each begins with all that is known of places that matter, and ends
/// when a new one is found. Returns whether the last round was complete.
fn search(common: &Common<'_>, benches: &mut [Bench], plan: &Plan) -> bool {
    loop {
        let known = share(benches);
        let threads = benches.len();
        let searched = AtomicU64::new(0);
        let complete = thread::scope(|scope| {
            let workers: Vec<_> = benches
                .iter_mut()
                .enumerate()
                .map(|(worker, bench)| {
                    let part = Part { worker, threads, known, most: plan.exhaustive };
                    let searched = &searched;
                    scope.spawn(move || part.search(common, bench, searched))
                })
                .collect();
            workers
                .into_iter()
                .map(|worker| worker.join().expect("a worker does not panic"))
                .fold(true, |all, one| all & one)
        });
        common.report.lock().expect("no thread of ours panics with the lock").searched = searched.into_inner();
        if complete || common.stopped() {
            return complete;
        }
        if share(benches) == known {
            return false;
        }
    }
}

/// Every bench knows what any of them learned. Returns how many places matter.
fn share(benches: &mut [Bench]) -> usize {
    let mut all = Sites::default();
    benches.iter().for_each(|bench| all.learn(&bench.sites));
    benches.iter_mut().for_each(|bench| bench.sites.learn(&all));
    all.shared()
}

/// One thread's part of an exhaustive search.
struct Part {
    worker: usize,
    threads: usize,
    known: usize,
    most: u64,
}

impl Part {
    fn search(&self, common: &Common<'_>, bench: &mut Bench, searched: &AtomicU64) -> bool {
        let mut search = Search::new(common.scenario.bound);
        loop {
            let ended = common.run(bench, Strategy::Exhaustive(search), "exhaustive");
            let Strategy::Exhaustive(done) = ended.strategy else { unreachable!("it was handed in") };
            search = done;
            if common.stopped() || bench.sites.shared() != self.known {
                return false;
            }
            if self.is_mine(&search) {
                if searched.fetch_add(1, Ordering::Relaxed) >= self.most {
                    return false;
                }
            } else {
                // The whole part behind these decisions is another's.
                search.branches.truncate(SHARED_OUT);
            }
            if !search.advance(0) {
                return true;
            }
        }
    }

    fn is_mine(&self, search: &Search) -> bool {
        let first = search.branches.iter().take(SHARED_OUT);
        let number = first.fold(0usize, |sum, branch| sum.wrapping_mul(31).wrapping_add(usize::from(branch.taken)));
        number % self.threads == self.worker
    }
}

/// `count` random schedules.
fn sample(common: &Common<'_>, benches: &mut [Bench], plan: &Plan, count: u64, by: &'static str, points: u64) {
    let next = AtomicU64::new(0);
    thread::scope(|scope| {
        for bench in benches {
            let next = &next;
            scope.spawn(move || {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count || common.stopped() {
                        return;
                    }
                    let seed = plan.seed.wrapping_mul(0x9e37_79b9).wrapping_add(number);
                    let strategy = match by {
                        "PCT" => Strategy::Pct(Pct::new(seed, common.scenario.cpus.len(), DEPTH, points)),
                        _ => Strategy::Sticky(Rng::with_seed(seed)),
                    };
                    common.run(bench, strategy, by);
                }
            });
        }
    });
}

/// Repeats a schedule, with its events written down.
pub fn replay(scenario: &Scenario, setting: Setting<'_>, trail: &Trail) -> Ended {
    let setting = Setting { record: true, ..setting };
    Bench::new().run(scenario, &setting, Strategy::Replay(Replay::new(trail)))
}

/// The same violation with fewer decisions: one after the other is left out as long as it still shows.
pub fn shrink(scenario: &Scenario, setting: Setting<'_>, failure: &Failure) -> Failure {
    let mut bench = Bench::new();
    let mut best = failure.clone();
    let mut at = best.trail.turns.len();
    while at > 0 {
        at -= 1;
        let mut fewer = best.trail.clone();
        fewer.turns.remove(at);
        let ended = bench.run(scenario, &setting, Strategy::Replay(Replay::new(&fewer)));
        let same = ended.violation.filter(|violation| violation.check == best.violation.check);
        if let Some(violation) = same
            && ended.trail.turns.len() < best.trail.turns.len()
        {
            best = Failure { violation, trail: ended.trail, ..best };
            at = best.trail.turns.len();
        }
    }
    best
}

/// Refuses the first, the second, every request for a frame in turn, each under the default schedule and `seeds` random
/// ones. Returns how many schedules were run, and what was found.
pub fn starve(scenario: &Scenario, setting: Setting<'_>, seeds: u64) -> (u64, Option<Failure>) {
    let mut bench = Bench::new();
    let mut schedules = 0;
    for seed in 0..=seeds {
        let strategy = || match seed {
            0 => Strategy::Replay(Replay::default()),
            seed => Strategy::Sticky(Rng::with_seed(seed)),
        };
        let mut request = 1;
        loop {
            let setting = Setting { starve: Some(request), destroy: true, ..setting };
            let ended = bench.run(scenario, &setting, strategy());
            schedules += 1;
            if let Some(violation) = ended.violation {
                let (trail, refused) = (ended.trail, Some(request));
                return (schedules, Some(Failure { violation, trail, by: "starved", after: schedules, refused }));
            }
            if ended.requests < request {
                break;
            }
            request += 1;
        }
    }
    (schedules, None)
}
