//! Dirty log, dirty rings and difference name the same pages, whatever the workload and the schedule: those that were
//! written. The checker `written` compares at each answer and in the end; here are workloads at random.

use entresol_model::check::{Check, Checks};
use entresol_model::explore::run::Setting;
use entresol_model::explore::{Plan, Report, explore};
use entresol_model::litmus::Scenario;
use entresol_sync::zoo::Bug;
use fastrand::Rng;

/// Workloads that are tried, each from its seed.
const SEEDS: std::ops::Range<u64> = 0..16;
/// Pages of the machine: vCPUs store to the first four, the owner on each CPU to one of its own, because the data oracle does
/// not know which of two stores at a time is the last.
const PAGES: u64 = 6;

/// A step on CPU `cpu` of a child that logs and has rings, of its parent, or of their owner. `n` numbers results.
fn step(rng: &mut Rng, cpu: u64, n: usize) -> String {
    let (gpa, value) = (0x1000 * rng.u64(1..=4), rng.u8(1..));
    match rng.u8(0..16) {
        0..6 => format!("b: store {gpa:#x} {value}"),
        6..8 => format!("b: load {gpa:#x}"),
        8..10 => format!("b: write {:#x} {value}", 0x5000 + 0x1000 * cpu),
        10 => format!("store {gpa:#x} {value}"),
        11 => format!("b: log get 0 -> r{n}"),
        12 => format!("b: log read 0 -> r{n}"),
        13 => format!("b: harvest {} -> r{n}", rng.u8(0..2)),
        14 => format!("b: unshare {gpa:#x}"),
        _ => format!("differ copy ram -> r{n}"),
    }
}

fn workload(seed: u64) -> Scenario {
    let mut rng = Rng::with_seed(seed);
    let mut numbers = 0..;
    let mut script = |cpu| {
        let steps = (0..7).map(|_| format!("{:?}", step(&mut rng, cpu, numbers.next().expect("numbers do not end"))));
        format!("[[cpu]]\nsteps = [{}]\n", steps.collect::<Vec<_>>().join(", "))
    };
    let (first, second) = (script(0), script(1));
    let text = format!(
        "name = \"workload {seed}\"\nabout = \"\"\nvms = [\"a\", \"b\"]\n\
         setup = [\"store 0x1000 5\", \"store 0x2000 6\", \"fork b copy\", \"b: rings\", \"b: flags 0 log\"]\n\
         [machine]\nfwb = true\nframes = 64\n\
         [[object]]\nname = \"ram\"\nframes = {PAGES}\n[[object]]\nname = \"copy\"\nframes = {PAGES}\n\
         [[slot]]\nid = 0\ngpa = 0x1000\nframes = {PAGES}\nobject = \"ram\"\n{first}{second}"
    );
    Scenario::parse(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

fn run(scenario: &Scenario, bugs: &[Bug], checks: Checks) -> Report {
    let plan = Plan { exhaustive: 0, pct: 30, sticky: 30, ..Plan::default() };
    explore(scenario, Setting { bugs, checks, ..Setting::default() }, &plan, &|_| {})
}

#[test]
fn log_ring_and_difference_name_what_was_written() {
    for seed in SEEDS {
        let scenario = workload(seed);
        let found = run(&scenario, &[], Checks::all()).failure;
        let found = found.map(|failure| format!("{} [{}]", failure.violation, failure.trail));
        assert_eq!(found, None, "seed {seed}: {:?}", scenario.cpus);
    }
}

/// The workloads would show a page that one of the three misses.
#[test]
fn a_write_that_leaves_no_mark_is_missed() {
    let misses = |seed: &u64| run(&workload(*seed), &[Bug::ZA10], Checks::only(&[Check::Written])).failure.is_some();
    assert!(SEEDS.filter(misses).count() > 2);
}
