//! The search finds nothing in the core, and finds bugs that are planted there.

use entresol_fuzz::search::{Search, run};
use entresol_sync::zoo::{Bug, plant};

const SEED: u64 = 2018;
/// Runs of the test; the program searches longer.
const RUNS: u64 = 2_000;
/// Runs within which a planted bug is found.
const BUDGET: u64 = 20_000;

#[test]
fn the_core_and_the_reference_agree() {
    let mut search = Search::new(SEED);
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
        let found = Search::new(SEED).within(BUDGET);
        let again = found.as_ref().map(|found| run(&found.input));
        plant(&[]);
        let found = found.unwrap_or_else(|| panic!("{bug:?} was not found in {BUDGET} runs"));
        assert!(found.what.contains(what), "{bug:?}: {found:?}");
        assert_eq!(again, Some(Err(found.what)), "{bug:?}: the shortened input shows it");
        assert_eq!(run(&found.input), Ok(()), "{bug:?}: the same input without it");
    }
}
