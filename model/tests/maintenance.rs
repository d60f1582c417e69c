//! Cache maintenance and table walks: every cell of the specification's tables, through both doors, with both policies,
//! beside every kind of slot update, in every schedule with at most two preemptions ("cache-ops", required outcomes); where
//! the policy has no say, the second one is tried with one preemption only.
//!
//! The checkers watch as always: traps are bounded (INV-15), read-only bytes stay (INV-13), nothing is emulated (INV-9).
//! This table says what the guest must have got in the end; it knows nothing of the core.

use entresol_model::explore::run::Setting;
use entresol_model::explore::{Plan, explore};
use entresol_model::litmus::Scenario;

/// What lies at the address: its object, the slot's words, and steps that map it.
struct Place {
    name: &'static str,
    object: Option<&'static str>,
    mapped: bool,
}

const PLACES: [Place; 6] = [
    Place { name: "writable, unmapped", object: Some("ram"), mapped: false },
    Place { name: "writable, mapped", object: Some("ram"), mapped: true },
    Place { name: "read-only, unmapped", object: Some("rom"), mapped: false },
    Place { name: "read-only, mapped", object: Some("rom"), mapped: true },
    Place { name: "device", object: Some("dev"), mapped: false },
    Place { name: "nothing", object: None, mapped: false },
];

/// What the owner does meanwhile, if there is a slot; and whether the address is without one in between or at the end.
const UPDATES: [(&str, bool); 5] =
    [("delete 0", true), ("move 0 0x5000", true), ("flags 0 log", false), ("revert 0", true), ("reap", false)];

/// What the owner does meanwhile if there is none.
const CREATIONS: [(&str, &str); 3] =
    [("slot 0 0x1000 1 ram 0", "ram"), ("slot 0 0x1000 1 ram 0 ro", "rom"), ("slot 0 0x1000 1 dev 0", "dev")];

/// The last column of the table: what the guest gets.
fn maintained(object: Option<&str>, operation: &str, trapped: bool, clean: bool) -> &'static str {
    match (object, operation) {
        (None, _) => "skipped",
        (Some("rom"), "dc ivac") => {
            if clean {
                "skipped"
            } else {
                "abort"
            }
        }
        _ if trapped => "skipped",
        _ => "done",
    }
}

/// The same for the hardware's own accesses to stage-1 tables. `value` is what the memory reads as.
fn walked(object: Option<&str>, update: bool, value: u64) -> String {
    match (object, update) {
        (None, _) | (Some("rom"), true) => "abort".to_owned(),
        (Some("dev"), _) => "0".to_owned(),
        (_, false) => format!("{value:#x}"),
        (_, true) => format!("{:#x}", value | 0x400),
    }
}

struct Cell<'a> {
    place: &'a Place,
    step: &'a str,
    trapped: bool,
    clean: bool,
    update: &'a str,
    /// The first must be seen; no other may be.
    answers: Vec<String>,
}

impl Cell<'_> {
    fn litmus(&self) -> String {
        let slot = self.place.object.map_or(String::new(), |object| {
            format!("[[slot]]\nid = 0\ngpa = 0x1000\nframes = 2\nobject = \"{object}\"\n")
        });
        // The next page has the tables made, so that what is explored is the page's own business.
        let setup = match (self.place.object, self.place.mapped) {
            (None, _) => "",
            (Some(_), false) => "\"load 0x2000\"",
            (Some(_), true) => "\"load 0x2000\", \"load 0x1000\"",
        };
        let bound = if self.clean && self.step != "dc ivac 0x1000" { 1 } else { 2 };
        let wrong: Vec<String> = self.answers.iter().map(|answer| format!("r0 != {answer}")).collect();
        format!(
            "name = \"cell\"\nabout = \"\"\nbound = {bound}\nsetup = [{setup}]\nrequired = [\"r0 == {}\"]\nforbidden = [\"{}\"]\n\
             [policy]\ntrap_maintenance = {}\nread_only_ivac = \"{}\"\n\
             [[object]]\nname = \"ram\"\nframes = 2\n[[object]]\nname = \"rom\"\nframes = 2\nrom = 0x77\n\
             [[object]]\nname = \"dev\"\nframes = 2\ndevice = true\n{slot}\
             [[cpu]]\nsteps = [\"{} -> r0\"]\n[[cpu]]\nsteps = [\"{}\"]\n",
            self.answers[0],
            wrong.join(" and "),
            self.trapped,
            if self.clean { "clean" } else { "abort" },
            self.step,
            self.update,
        )
    }

    /// Explores the cell; returns how many schedules it has.
    fn explore(&self) -> u64 {
        let text = self.litmus();
        let who = format!("{} on {} beside {}\n{text}", self.step, self.place.name, self.update);
        let scenario = Scenario::parse(&text).unwrap_or_else(|error| panic!("{who}: {error}"));
        let plan = Plan { exhaustive: 200_000, pct: 0, sticky: 0, threads: 2, ..Plan::default() };
        let report = explore(&scenario, Setting::default(), &plan, &|_| {});
        let found = report.failure.as_ref().map(|failure| format!("{} [{}]", failure.violation, failure.trail));
        assert_eq!(found, None, "{who}");
        assert!(report.exhausted, "{who}: {} schedules were not all", report.schedules);
        let missing = report.missing(&scenario);
        assert!(missing.is_empty(), "{who}: never seen: {missing:?}");
        report.searched
    }
}

/// Explores `step` at every place beside every update. `answer` tells what it comes to on an object.
fn everywhere(step: &str, trapped: bool, clean: bool, answer: &dyn Fn(Option<&str>) -> String) -> (u64, u64) {
    let (mut cells, mut schedules) = (0, 0);
    for place in &PLACES {
        let base = answer(place.object);
        let changes: Vec<(&str, Vec<String>)> = match place.object {
            Some(_) => UPDATES
                .iter()
                .map(|(update, absent)| {
                    let mut answers = vec![base.clone()];
                    answers.extend(absent.then(|| answer(None)));
                    (*update, answers)
                })
                .collect(),
            None => CREATIONS
                .iter()
                .map(|(update, object)| {
                    // Read-only RAM answers as read-only memory does; only its bytes are zero.
                    let made = answer(Some(object)).replace("0x77", "0x0");
                    (*update, vec![base.clone(), made])
                })
                .collect(),
        };
        for (update, answers) in changes {
            schedules += Cell { place, step, trapped, clean, update, answers }.explore();
            cells += 1;
        }
    }
    (cells, schedules)
}

#[test]
fn every_cell_of_the_maintenance_table() {
    let (mut cells, mut schedules) = (0, 0);
    for operation in ["dc ivac", "dc cvac", "dc civac", "dc cvau", "ic ivau"] {
        for (trapped, clean) in [(false, false), (false, true), (true, false), (true, true)] {
            let answer = |object: Option<&str>| maintained(object, operation, trapped, clean).to_owned();
            let (more, searched) = everywhere(&format!("{operation} 0x1000"), trapped, clean, &answer);
            (cells, schedules) = (cells + more, schedules + searched);
        }
    }
    println!("{cells} cells, {schedules} schedules");
    assert_eq!(cells, 5 * 4 * (5 * 5 + 3));
}

#[test]
fn every_cell_of_the_walk_table() {
    for (step, update) in [("walk data", false), ("walk fetch", false), ("update data", true), ("update fetch", true)] {
        let answer = |object: Option<&str>| {
            let value = if object == Some("rom") { 0x77 } else { 0 };
            walked(object, update, value)
        };
        let (cells, _) = everywhere(&format!("{step} 0x1000"), false, false, &answer);
        assert_eq!(cells, 5 * 5 + 3);
    }
}
