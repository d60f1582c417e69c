//! try
use entresol_model::explore::run::Setting;
use entresol_model::explore::*;
use entresol_model::litmus::Scenario;
use entresol_sync::zoo::Bug;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let s = Scenario::load(std::path::Path::new(&a[1])).unwrap();
    let bug = a.get(2).map(|b| match b.as_str() {
        "ZA1" => Bug::ZA1,
        "ZA2" => Bug::ZA2,
        "ZA3" => Bug::ZA3,
        "ZA4" => Bug::ZA4,
        "ZA5" => Bug::ZA5,
        "ZA6" => Bug::ZA6,
        "ZA7" => Bug::ZA7,
        "ZA8" => Bug::ZA8,
        "ZA9" => Bug::ZA9,
        "ZA11" => Bug::ZA11,
        "ZF1" => Bug::ZF1,
        "ZF2" => Bug::ZF2,
        "ZF5" => Bug::ZF5,
        "ZF6" => Bug::ZF6,
        _ => panic!(),
    });
    let bugs: Vec<Bug> = bug.into_iter().collect();
    let set = Setting { bugs: &bugs, ..Setting::default() };
    let p = Plan { limit: std::time::Duration::from_secs(20), ..Plan::default() };
    let r = explore(&s, set, &p, &|_| {});
    println!(
        "{:20} {:?} schedules {} searched {} exhausted {} {:.0}/s {:.2}s missing {:?} places {}",
        s.name,
        bugs,
        r.schedules,
        r.searched,
        r.exhausted,
        r.rate(),
        r.elapsed.as_secs_f64(),
        r.missing(&s),
        r.places.len()
    );
    if let Some(f) = r.failure {
        println!("  FOUND by {} after {}: {} [{}]", f.by, f.after, f.violation, f.trail);
        let f = shrink(&s, set, &f);
        println!("  shrunk: {} [{}]", f.violation, f.trail);
        if a.len() > 3 {
            let e = replay(&s, set, &f.trail);
            println!("{}", entresol_model::report::text::render(&e.trace.unwrap(), s.cpus.len()));
        }
    }
}
