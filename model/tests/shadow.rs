//! Two vCPUs on shadow tables: every schedule of each scenario with at most its file's preemptions.

use std::path::Path;
use std::time::Duration;

use entresol_model::explore::run::Setting;
use entresol_model::explore::{Plan, explore};
use entresol_model::litmus::Scenario;

#[test]
fn the_races_of_two_vcpus_on_shadow_tables_are_exhausted() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lab");
    let mut files: Vec<_> = folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("shadow-")));
    files.sort();
    assert!(!files.is_empty(), "the lab's files are there");
    for path in files {
        let scenario = Scenario::load(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let plan = Plan { pct: 0, sticky: 0, limit: Duration::from_secs(600), ..Plan::default() };
        let report = explore(&scenario, Setting::default(), &plan, &|_| {});
        let found = report.failure.as_ref().map(|failure| format!("{} [{}]", failure.violation, failure.trail));
        assert_eq!((found, report.exhausted), (None, true), "{}: {} schedules", path.display(), report.searched);
        let missing = report.missing(&scenario);
        assert!(missing.is_empty(), "{}: never seen: {missing:?}", path.display());
    }
}
