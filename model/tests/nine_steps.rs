//! The nine steps of a copy on write through the notifier (the specification's page on second-stage faults), in their order, in
//! the trace of a scenario; and beside them the one trap that it takes without.

use entresol_model::explore::replay;
use entresol_model::explore::run::Setting;
use entresol_model::explore::trail::Trail;
use entresol_model::litmus::Scenario;
use entresol_model::litmus::step::Step;

const FAULT: &str = "guest store 0x1000: fault at level 3, the entry is there";
const ENTRY: &str = "level 3 entry for gfn 0x1: ";
const DSB: &str = "DSB: everything begun has completed";

fn scenario() -> Scenario {
    Scenario::parse(include_str!("../../lab/nine-steps.toml")).unwrap()
}

/// What happened on CPU 0, whose guest stores and loads, with no decision but the defaults: nobody comes between.
fn events(scenario: &Scenario) -> Vec<String> {
    let ended = replay(scenario, Setting::default(), &Trail::default());
    assert_eq!(ended.violation, None);
    let events = ended.trace.expect("a replay writes its events down").events;
    events.into_iter().filter(|event| event.cpu == Some(0)).map(|event| event.what).collect()
}

/// What stands behind `start` in the first event that begins so.
fn after<'a>(events: &'a [String], start: &str) -> &'a str {
    events.iter().find_map(|event| event.strip_prefix(start)).unwrap_or_else(|| panic!("no {start:?} in {events:#?}"))
}

#[test]
fn the_trace_shows_the_nine_steps_in_their_order() {
    let events = events(&scenario());
    let copy = after(&events, "copy to ");
    let sequence: u64 = after(&events, "the sequence is sampled: ").parse().unwrap();
    let steps = [
        (1, FAULT.to_owned()),
        (2, format!("the sequence is sampled: {sequence}")),
        (3, "the core answers Unshare for 0x1000".to_owned()),
        (3, format!("copy to {copy}")),
        (4, "invalidate_range_start: 1 pages from gfn 0x1 are in progress".to_owned()),
        (4, format!("{ENTRY}invalid")),
        (4, "TLBI Ipa".to_owned()),
        (4, DSB.to_owned()),
        (5, format!("DC CIVAC {copy}")),
        (5, DSB.to_owned()),
        (5, format!("{ENTRY}r-x {copy}")),
        (6, format!("invalidate_range_end: gfn 0x1, the sequence is {}", sequence + 1)),
        (7, "the core answers Retry for 0x1000".to_owned()),
        (8, FAULT.to_owned()),
        (8, format!("the sequence is sampled: {}", sequence + 1)),
        (9, format!("{ENTRY}rwx {copy}")),
        (9, "the core answers Resume for 0x1000".to_owned()),
        (9, format!("guest store 0x1000: 0x7 at {copy}")),
    ];
    let mut rest = events.iter();
    for (number, step) in &steps {
        assert!(
            rest.any(|event| event.starts_with(step)),
            "step {number}, {step:?}, is not where it belongs: {events:#?}"
        );
    }
    let count = |start: &str| events.iter().filter(|event| event.starts_with(start)).count();
    assert_eq!(count(FAULT), 2, "two traps");
    assert_eq!(count(&format!("{ENTRY}rw")), 1, "writable once, in the last step");
    assert_eq!((count("invalidate_range_start"), count("invalidate_range_end"), count("copy to ")), (1, 1, 1));
}

#[test]
fn without_the_notifier_it_is_one_trap() {
    let mut scenario = scenario();
    scenario.setup.retain(|step| !matches!(step, Step::Notifier { .. }));
    let events = events(&scenario);
    let copy = after(&events, "copy to ");
    let count = |start: &str| events.iter().filter(|event| event.starts_with(start)).count();
    assert_eq!(count("guest store 0x1000: "), 2, "a fault, and then it is done: {events:#?}");
    assert_eq!(count(FAULT), 1);
    assert_eq!(count(&format!("guest store 0x1000: 0x7 at {copy}")), 1);
    assert_eq!(count("invalidate_range_start"), 0);
}
