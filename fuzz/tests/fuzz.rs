//! The search finds nothing in the core, and finds bugs that are planted there.

use entresol_fuzz::interrupts::{self, Belief};
use entresol_fuzz::search::{Search, run};
use entresol_fuzz::subject;
use entresol_sync::zoo::{Bug, plant};

const SEED: u64 = 2018;
/// Runs of the test; the program searches longer.
const RUNS: u64 = 2_000;
/// Runs within which a planted bug is found.
const BUDGET: u64 = 20_000;

#[test]
fn the_core_and_the_reference_agree() {
    let mut search = Search::new(subject::run, SEED);
    let found = search.within(RUNS);
    assert!(found.is_none(), "{found:?}");
    let (kept, reached) = search.reached();
    assert!(kept > 100 && reached > 600, "the search goes nowhere: {kept} inputs kept, {reached} transitions");
}

/// The canary: a search that finds nothing proves something only if it would find this.
#[test]
fn planted_bugs_are_found() {
    for (bug, what) in [(Bug::ZA3, "INV-3"), (Bug::ZA10, "INV-4")] {
        plant(&[bug]);
        let found = Search::new(subject::run, SEED).within(BUDGET);
        let again = found.as_ref().map(|found| run(subject::run, &found.input));
        plant(&[]);
        let found = found.unwrap_or_else(|| panic!("{bug:?} was not found in {BUDGET} runs"));
        assert!(found.what.contains(what), "{bug:?}: {found:?}");
        assert_eq!(again, Some(Err(found.what)), "{bug:?}: the shortened input shows it");
        assert_eq!(run(subject::run, &found.input), Ok(()), "{bug:?}: the same input without it");
    }
}

#[test]
fn interrupts_and_the_reference_agree() {
    let mut search = Search::new(interrupts::run, SEED);
    let found = search.within(RUNS);
    assert!(found.is_none(), "{found:?}");
    let (kept, reached) = search.reached();
    assert!(kept > 100 && reached > 400, "the search goes nowhere: {kept} inputs kept, {reached} transitions");
}

/// The canary, the other way round: the reference is wrong, and the search notices.
#[test]
fn wrong_beliefs_about_interrupts_are_found() {
    for (subject, what) in [(levels_once as fn(&[u8]) -> Result<(), String>, "could take"), (no_classes, "could take")]
    {
        let found = Search::new(subject, SEED).within(BUDGET).expect("the search notices");
        assert!(found.what.contains(what), "{found:?}");
        assert_eq!(run(interrupts::run, &found.input), Ok(()), "the same input with the manuals' belief");
    }
}

fn levels_once(input: &[u8]) -> Result<(), String> {
    interrupts::run_with(input, Belief::LevelsComeOnce)
}

fn no_classes(input: &[u8]) -> Result<(), String> {
    interrupts::run_with(input, Belief::EveryVectorIsAClass)
}
