//! Leases, holes, conversions and page-frame caches of one private page, each beside each other: every schedule of the two CPUs within
//! a bound of preemptions, and nothing is found. The bound is two for the short ones, one where a conversion or a cache stands beside
//! another: their schedules are hundreds of steps long.

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

/// So many of the scripts, from the first on, are short.
const SHORT: usize = 4;

/// What the page is before.
const BEFORE: [(&str, &[&str]); 3] =
    [("private", &["write 0x1000 5"]), ("open", &["write 0x1000 5", "convert 0x1000 1 open"]), ("vacant", &[])];

fn listed(steps: &[&str]) -> String {
    steps.iter().map(|step| format!("{step:?}")).collect::<Vec<_>>().join(", ")
}

fn scenario(bound: u32, before: &[&str], first: &[&str], second: &[&str]) -> Scenario {
    // The second page keeps the frames around the first private.
    let setup = [before, &["write 0x2000 1"]].concat();
    let text = format!(
        r#"
        name = "pair"
        about = "two scripts beside each other"
        bound = {bound}
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

#[test]
fn every_pair_of_uses_of_a_private_page_passes_every_schedule() {
    let plan = Plan { pct: 0, sticky: 0, limit: Duration::from_secs(300), ..Plan::default() };
    let mut schedules = 0;
    for (state, before) in BEFORE {
        for (index, (one, first)) in SCRIPTS.iter().enumerate() {
            for (beside, (other, second)) in SCRIPTS.iter().enumerate().skip(index) {
                let bound = if index < SHORT && beside < SHORT { 2 } else { 1 };
                let report = explore(&scenario(bound, before, first, second), Setting::default(), &plan, &|_| {});
                let found = report.failure.map(|failure| format!("{} [{}]", failure.violation, failure.trail));
                assert_eq!(found, None, "a page that is {state}: {one} beside {other}");
                assert!(report.exhausted, "a page that is {state}: {one} beside {other}: {}", report.schedules);
                schedules += report.schedules;
            }
        }
    }
    assert!(schedules > 10_000, "only {schedules} schedules were there");
}
