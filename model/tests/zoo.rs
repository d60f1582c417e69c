//! Every planted bug is found; nothing is found without it; nothing is found by accident.

use std::time::Duration;

use entresol_model::check::{Check, Checks};
use entresol_model::explore::run::Setting;
use entresol_model::explore::{Plan, explore, replay, shrink};
use entresol_model::zoo::{Exhibit, ZOO, budget};

/// The gate's schedules, in as much time as they take: a machine that does something else as well is slow, and no reason to find less.
fn patient() -> Plan {
    Plan { limit: Duration::from_secs(900), ..budget() }
}

/// What a test may spend: less than the gate's budget.
fn quick() -> Plan {
    Plan { exhaustive: 20_000, pct: 500, sticky: 500, ..budget() }
}

#[test]
fn every_bug_is_found_by_a_checker_that_is_meant_for_it() {
    for exhibit in ZOO {
        let report = exhibit.hunt(Checks::all(), &patient());
        let failure =
            report.failure.unwrap_or_else(|| panic!("{} was not found in {}", exhibit.name, report.schedules));
        let check = failure.violation.check;
        assert!(exhibit.found_by.contains(&check), "{}: {}", exhibit.name, failure.violation);
    }
}

#[test]
fn the_checker_meant_for_a_bug_finds_it_alone() {
    for exhibit in ZOO {
        let report = exhibit.hunt(Checks::only(&exhibit.found_by[..1]), &patient());
        assert!(report.failure.is_some(), "{} was not found by {:?} alone", exhibit.name, exhibit.found_by[0]);
    }
}

#[test]
fn a_bug_is_not_found_with_its_checkers_off() {
    for exhibit in ZOO {
        let plan = Plan { exhaustive: 8_000, pct: 200, sticky: 200, ..budget() };
        let report = exhibit.hunt(Checks::all().without(exhibit.found_by), &plan);
        let found = report.failure.map(|failure| failure.violation.to_string());
        assert_eq!(found, None, "{} is found by something else", exhibit.name);
    }
}

#[test]
fn a_failure_repeats_from_its_text_and_becomes_shorter() {
    for name in ["Z-A4", "Z-A5", "Z-F1", "Z-A9"] {
        let exhibit = Exhibit::named(name).unwrap();
        let (scenario, bugs) = (exhibit.scenario(), [exhibit.bug]);
        let setting = Setting { bugs: &bugs, ..Setting::default() };
        let found = explore(&scenario, setting, &patient(), &|_| {}).failure.unwrap();
        let short = shrink(&scenario, setting, &found);
        assert!(short.trail.turns.len() <= found.trail.turns.len());
        let written = short.trail.to_string().parse().unwrap();
        let again = replay(&scenario, setting, &written);
        assert_eq!(again.violation.as_ref(), Some(&short.violation), "{name}");
        assert!(!again.trace.unwrap().events.is_empty());
        let without = replay(&scenario, Setting::default(), &written);
        assert_eq!(without.violation, None, "{name}: the same decisions, and no bug");
    }
}

/// A checker that finds nothing proves nothing: each is shown to find a bug with all others off. No planted bug panics; see
/// below.
#[test]
fn every_checker_finds_some_bug_alone() {
    for check in Check::ALL.into_iter().filter(|check| *check != Check::Panic) {
        let mut meant = ZOO.iter().filter(|exhibit| exhibit.found_by.contains(&check));
        let found = meant.find(|exhibit| exhibit.hunt(Checks::only(&[check]), &quick()).failure.is_some());
        assert!(found.is_some(), "{} has found nothing alone", check.name());
    }
}

/// A machine without memory for the root of the tables makes the stage panic, as the core would.
#[test]
fn a_panic_is_a_finding() {
    let mut scenario = Exhibit::named("Z-A8").unwrap().scenario();
    scenario.machine.frames = 0;
    let found = explore(&scenario, Setting::default(), &quick(), &|_| {}).failure.unwrap();
    assert_eq!(found.violation.check, Check::Panic);
    assert!(found.violation.what.contains("model/src/guest/stage.rs"), "{}", found.violation);
}

/// The automaton of an entry and the data oracle see different things.
#[test]
fn automaton_and_oracle_each_find_what_the_other_cannot() {
    let hunt = |name: &str, check| {
        let exhibit = Exhibit::named(name).unwrap();
        exhibit.hunt(Checks::only(&[check]), &budget()).failure.is_some()
    };
    assert!(hunt("Z-A6", Check::Inv2) && !hunt("Z-A6", Check::Inv11), "a missing break");
    assert!(!hunt("Z-A9", Check::Inv2) && hunt("Z-A9", Check::Inv11), "old code");
}
