//! Every litmus file: nothing is found, and each shows what it says it shows.

use std::path::{Path, PathBuf};
use std::time::Duration;

use entresol_model::explore::run::Setting;
use entresol_model::explore::{Plan, explore, starve};
use entresol_model::litmus::Scenario;
use entresol_model::machine::config::Config;

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lab");
    let mut files: Vec<_> = folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    assert!(files.len() >= 10, "the lab's files are there");
    files
}

fn quick() -> Plan {
    Plan { exhaustive: 12_000, pct: 1_000, sticky: 1_000, ..Plan::default() }
}

#[test]
fn the_core_passes_and_every_scenario_shows_what_it_is_about() {
    for path in files() {
        let scenario = Scenario::load(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let report = explore(&scenario, Setting::default(), &quick().fitting(&scenario), &|_| {});
        let found = report.failure.as_ref().map(|failure| format!("{} [{}]", failure.violation, failure.trail));
        assert_eq!(found, None, "{}", path.display());
        let missing = report.missing(&scenario);
        assert!(missing.is_empty(), "{}: never seen: {missing:?}", path.display());
    }
}

#[test]
fn the_core_passes_on_other_machines_too() {
    for path in files() {
        let scenario = Scenario::load(&path).unwrap();
        if scenario.machine.format.is_x86() {
            continue;
        }
        for (fwb, dic) in [(false, false), (false, true), (true, false)] {
            let machine = Config { fwb, dic, ..scenario.machine };
            let scenario = Scenario { machine, ..scenario.clone() };
            let plan = Plan { exhaustive: 300, pct: 150, sticky: 150, ..Plan::default() };
            let report = explore(&scenario, Setting::default(), &plan.fitting(&scenario), &|_| {});
            let found = report.failure.map(|failure| format!("{} [{}]", failure.violation, failure.trail));
            assert_eq!(found, None, "{}, fwb {fwb}, dic {dic}", path.display());
        }
    }
}

#[test]
fn every_request_for_a_frame_may_be_refused() {
    let mut most = 0;
    for path in files() {
        let scenario = Scenario::load(&path).unwrap();
        let (schedules, failure) = starve(&scenario, Setting::default(), if scenario.long { 1 } else { 20 });
        let found = failure.map(|failure| format!("{} [{}]", failure.violation, failure.trail));
        assert_eq!(found, None, "{}", path.display());
        most = most.max(schedules);
    }
    assert!(most > 100, "some scenario asks for frames: {most}");
}

/// The 2018 bug's shape is impossible with forced write-back, and possible without: shown for every schedule.
#[test]
fn forced_write_back_makes_the_stale_read_impossible() {
    let scenario = Scenario::parse(include_str!("../../lab/mmu-off.toml")).unwrap();
    let bugs = [entresol_sync::zoo::Bug::ZA1];
    let checks = entresol_model::check::Checks::only(&[
        entresol_model::check::Check::Inv11,
        entresol_model::check::Check::Forbidden,
    ]);
    let setting = Setting { bugs: &bugs, checks, ..Setting::default() };
    let without = explore(&scenario, setting, &quick(), &|_| {});
    assert!(without.failure.is_some(), "stale bytes are read");
    let machine = Config { fwb: true, ..scenario.machine };
    assert_eq!(scenario.bound, None, "every schedule, however often it switches");
    let scenario = Scenario { machine, ..scenario };
    let plan = Plan { exhaustive: u64::MAX, pct: 0, sticky: 0, ..Plan::default() };
    let with = explore(&scenario, setting, &plan, &|_| {});
    assert!(with.failure.is_none() && with.exhausted, "{} schedules, exhausted {}", with.schedules, with.exhausted);
}

/// Two CPUs, and every way in which leases, releases, a hole and removals that fail can follow each other with so many preemptions.
#[test]
fn leases_of_two_cpus_are_exhausted() {
    for (file, bound) in [("lease.toml", 4), ("lease-fails.toml", 2), ("lease-hole.toml", 2)] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lab");
        let scenario = Scenario { bound: Some(bound), ..Scenario::load(&folder.join(file)).unwrap() };
        let plan = Plan { pct: 0, sticky: 0, limit: Duration::from_secs(600), ..Plan::default() };
        let report = explore(&scenario, Setting::default(), &plan, &|_| {});
        let found = report.failure.map(|failure| format!("{} [{}]", failure.violation, failure.trail));
        assert_eq!((found, report.exhausted), (None, true), "{file}: {} schedules", report.searched);
    }
}
