//! Leases, holes, conversions and page-frame caches of one private page, each beside each other: every schedule of the two CPUs with at
//! most two preemptions, and nothing is found.

use std::time::Duration;

use entresol_model::explore::run::Setting;
use entresol_model::explore::{Plan, explore};
use entresol_model::litmus::Scenario;

/// What a CPU does, by name. None uses an address after its frame may have gone; each has a word of its own.
const SCRIPTS: [(&str, &[&str]); 7] = [
    ("lease and release", &["lease 0x1000", "release"]),
    ("a hole", &["start 0x1000 1", "punch ram 0 1", "end", "reap"]),
    ("the guest", &["store 0x1008 7", "load 0x1008"]),
    ("a device", &["write 0x1010 8"]),
    ("shared", &["convert 0x1000 1 open"]),
    ("taken back", &["convert 0x1000 1 private"]),
    ("a cache", &["cache 0x1000", "tell 6", "uncache"]),
];

fn listed(steps: &[&str]) -> String {
    steps.iter().map(|step| format!("{step:?}")).collect::<Vec<_>>().join(", ")
}

fn scenario(before: &[&str], first: &[&str], second: &[&str]) -> Scenario {
    // The second page keeps the frames around the first private.
    let setup = [before, &["write 0x2000 1"]].concat();
    let text = format!(
        r#"
        name = "pair"
        about = "two scripts beside each other"
        bound = 2
        setup = [{}]
        [machine]
        fwb = true
        frames = 1100
        [[object]]
        name = "ram"
        frames = 2
        private = true
        [[slot]]
        id = 0
        gpa = 0x1000
        frames = 2
        object = "ram"
        [[cpu]]
        steps = [{}]
        [[cpu]]
        steps = [{}]
        "#,
        listed(&setup),
        listed(first),
        listed(second),
    );
    Scenario::parse(&text).unwrap()
}

/// Exhausts every pair on a page that was made what it is by `before`.
fn exhaust(before: &[&str]) {
    let plan = Plan { pct: 0, sticky: 0, limit: Duration::from_secs(900), ..Plan::default() };
    let mut schedules = 0;
    for (index, (one, first)) in SCRIPTS.iter().enumerate() {
        for (other, second) in SCRIPTS.iter().skip(index) {
            let report = explore(&scenario(before, first, second), Setting::default(), &plan, &|_| {});
            let pair = format!("{one} beside {other}, {} schedules", report.schedules);
            let found = report.failure.map(|failure| format!("{} [{}]", failure.violation, failure.trail));
            assert_eq!(found, None, "{pair}");
            assert!(report.exhausted, "{pair} are not all");
            schedules += report.schedules;
        }
    }
    assert!(schedules > 50_000, "only {schedules} schedules were there");
}

#[test]
fn every_pair_passes_every_schedule_on_a_private_page() {
    exhaust(&["write 0x1000 5"]);
}

#[test]
fn every_pair_passes_every_schedule_on_an_open_page() {
    exhaust(&["write 0x1000 5", "convert 0x1000 1 open"]);
}

#[test]
fn every_pair_passes_every_schedule_on_a_vacant_page() {
    exhaust(&[]);
}
