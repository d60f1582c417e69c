//! `entresol lab`: scenarios on the model of the machine.
//!
//! `run` explores a litmus file, `zoo` shows that every planted bug is found, `replay` repeats one schedule. What was
//! found is printed with the decisions that lead to it and a trace; `--html` writes the trace as a page.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use entresol_model::check::{Check, Checks};
use entresol_model::explore::run::{Ended, Setting};
use entresol_model::explore::trail::Trail;
use entresol_model::explore::{Failure, Plan, Report, explore, replay, shrink, starve};
use entresol_model::litmus::Scenario;
use entresol_model::report::{html, text};
use entresol_model::zoo::{Bug, Exhibit, ZOO, budget};
use indicatif::{ProgressBar, ProgressStyle};

use crate::Exit;

/// Explore the core on a model of the machine
///
/// Exit status: 0 nothing was found; 1 something was, or the scenario never showed what it is about; 2 wrong command line or
/// litmus file.
#[derive(Args)]
pub struct Lab {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Explore a litmus file
    Run {
        #[command(flatten)]
        what: What,
        /// Only the exhaustive search, with no limit on its schedules
        #[arg(long, conflicts_with = "seeds")]
        exhaustive: bool,
        /// Only random schedules, so many each of PCT and sticky
        #[arg(long, value_name = "N")]
        seeds: Option<u64>,
        /// The first seed
        #[arg(long, value_name = "N", default_value_t = 1)]
        seed: u64,
        /// Refuse every request for a frame in turn
        #[arg(long, conflicts_with = "refuse")]
        starve: bool,
        /// Stop after so many seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        limit: u64,
        /// Name the places of the source at which schedules were decided
        #[arg(long)]
        places: bool,
    },
    /// Plant every bug, one by one, and find it; then find nothing without it
    Zoo {
        /// Only this one, by its name in the specification
        name: Option<String>,
        /// Leave the runs without a bug out
        #[arg(long)]
        no_control: bool,
    },
    /// Repeat one schedule and show its trace
    Replay {
        #[command(flatten)]
        what: What,
        /// The decisions, as a run printed them
        trail: Trail,
    },
}

/// A scenario, its machine and what is planted.
#[derive(Args)]
struct What {
    /// The litmus file
    file: PathBuf,
    /// Another machine than the file's
    #[arg(long, value_name = "FEATURE")]
    machine: Vec<Feature>,
    /// Plant a bug of the zoo, by its name in the specification
    #[arg(long, value_name = "NAME")]
    plant: Option<String>,
    /// Let only this checker watch; may be given again
    #[arg(long, value_name = "CHECK")]
    only: Vec<String>,
    /// Refuse this request for a frame, counted from 1
    #[arg(long, value_name = "N")]
    refuse: Option<u64>,
    /// Write the trace as a page of HTML
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// A feature of a machine.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Feature {
    /// Forced write-back
    Fwb,
    /// No forced write-back
    NoFwb,
    /// Coherent instruction caches
    Dic,
    /// Instruction caches that must be invalidated
    NoDic,
}

/// Runs the command.
pub fn run(lab: &Lab) -> Exit {
    let result = match &lab.command {
        Command::Run { what, exhaustive, seeds, seed, starve, limit, places } => {
            let limit = Duration::from_secs(*limit);
            let plan = match (exhaustive, seeds) {
                (true, _) => Plan { exhaustive: u64::MAX, pct: 0, sticky: 0, seed: *seed, limit, ..Plan::default() },
                (false, Some(seeds)) => {
                    Plan { exhaustive: 0, pct: *seeds, sticky: *seeds, seed: *seed, limit, ..Plan::default() }
                }
                (false, None) => Plan { seed: *seed, limit, ..Plan::default() },
            };
            explored(what, &plan, *starve, *places)
        }
        Command::Zoo { name, no_control } => zoo(name.as_deref(), !no_control),
        Command::Replay { what, trail } => again(what, trail),
    };
    result.unwrap_or_else(|error| {
        eprintln!("entresol: {error}");
        Exit::Usage
    })
}

/// A message for the terminal.
type Refused = String;

struct Loaded {
    scenario: Scenario,
    bugs: Vec<Bug>,
    checks: Checks,
    refuse: Option<u64>,
}

impl Loaded {
    fn setting(&self) -> Setting<'_> {
        Setting { bugs: &self.bugs, checks: self.checks, starve: self.refuse, ..Setting::default() }
    }
}

fn load(what: &What) -> Result<Loaded, Refused> {
    let mut scenario = Scenario::load(&what.file).map_err(|error| error.to_string())?;
    for feature in &what.machine {
        match feature {
            Feature::Fwb => scenario.machine.fwb = true,
            Feature::NoFwb => scenario.machine.fwb = false,
            Feature::Dic => scenario.machine.dic = true,
            Feature::NoDic => scenario.machine.dic = false,
        }
    }
    let bugs = what.plant.iter().map(|name| exhibit(name).map(|exhibit| exhibit.bug)).collect::<Result<_, _>>()?;
    let only = what.only.iter().map(|name| checker(name)).collect::<Result<Vec<_>, _>>()?;
    let checks = if only.is_empty() { Checks::all() } else { Checks::only(&only) };
    Ok(Loaded { scenario, bugs, checks, refuse: what.refuse })
}

fn exhibit(name: &str) -> Result<Exhibit, Refused> {
    let names = || ZOO.iter().map(|exhibit| exhibit.name).collect::<Vec<_>>().join(", ");
    Exhibit::named(name).ok_or_else(|| format!("bug {name:?}: must be one of {}", names()))
}

fn checker(name: &str) -> Result<Check, Refused> {
    let names = || Check::ALL.map(Check::name).join(", ");
    Check::named(name).ok_or_else(|| format!("checker {name:?}: must be one of {}", names()))
}

fn print(text: &str) -> Result<(), Refused> {
    crate::print(text).map_err(|error| format!("standard output: {error}"))
}

/// Drawn on standard error, and only if that is a terminal.
fn bar() -> ProgressBar {
    let style =
        ProgressStyle::with_template("{spinner} {pos} schedules, {per_sec}").expect("a template that indicatif knows");
    ProgressBar::new_spinner().with_style(style)
}

fn explored(what: &What, plan: &Plan, starved: bool, places: bool) -> Result<Exit, Refused> {
    let loaded = load(what)?;
    let (scenario, setting) = (&loaded.scenario, loaded.setting());
    let bar = bar();
    let report = explore(scenario, setting, plan, &|schedules| bar.set_position(schedules));
    bar.finish_and_clear();
    let mut lines = summary(scenario, &report);
    if places {
        report.places.iter().for_each(|place| lines += &format!("  decided at {place}\n"));
    }
    print(&lines)?;
    if let Some(failure) = &report.failure {
        return shown(what, scenario, setting, failure);
    }
    if starved {
        let (schedules, failure) = starve(scenario, setting, 20);
        print(&format!("every request for a frame refused in turn: {schedules} schedules\n"))?;
        if let Some(failure) = failure {
            return shown(what, scenario, setting, &failure);
        }
    }
    // A scenario that does not show what it is about proves nothing, unless the search was cut short.
    Ok(if report.missing(scenario).is_empty() { Exit::Done } else { Exit::Refused })
}

fn summary(scenario: &Scenario, report: &Report) -> String {
    let search = match (report.exhausted, scenario.bound) {
        (true, Some(bound)) => format!("; all {} with at most {bound} preemptions", report.searched),
        (true, None) => format!("; all {} there are", report.searched),
        (false, _) if report.searched != 0 => format!("; a search of {} was cut short", report.searched),
        (false, _) => String::new(),
    };
    let mut text = format!(
        "{}: {} schedules in {:.2} s, {:.0} a second{search}; decided at {} places\n",
        scenario.name,
        report.schedules,
        report.elapsed.as_secs_f64(),
        report.rate(),
        report.places.len(),
    );
    if report.failure.is_none() {
        report.missing(scenario).iter().for_each(|missing| text += &format!("never seen: {missing}\n"));
    }
    text
}

/// Shows what was found, as short as it gets.
fn shown(what: &What, scenario: &Scenario, setting: Setting<'_>, failure: &Failure) -> Result<Exit, Refused> {
    let setting = Setting { starve: failure.refused, ..setting };
    let short = shrink(scenario, setting, failure);
    print(&format!("found by {} after {} schedules: {}\n", failure.by, failure.after, short.violation))?;
    let ended = replay(scenario, setting, &short.trail);
    trace(what, scenario, &ended, &command(what, failure.refused, &short.trail))?;
    Ok(Exit::Refused)
}

fn trace(what: &What, scenario: &Scenario, ended: &Ended, command: &str) -> Result<(), Refused> {
    let Some(trace) = &ended.trace else { return Ok(()) };
    print(&format!("again: {command}\n\n{}", text::render(trace, scenario.cpus.len())))?;
    if let Some(path) = &what.html {
        let found = ended.violation.as_ref().map(ToString::to_string);
        let head = html::Head {
            title: scenario.name.clone(),
            about: scenario.about.clone(),
            found,
            replay: command.to_owned(),
        };
        let page = html::render(&head, trace, scenario.cpus.len());
        std::fs::write(path, page).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

/// The command that repeats a schedule.
fn command(what: &What, refused: Option<u64>, trail: &Trail) -> String {
    let mut command = format!("entresol lab replay {}", what.file.display());
    for feature in &what.machine {
        let name = feature.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned());
        command += &format!(" --machine {name}");
    }
    if let Some(name) = &what.plant {
        command += &format!(" --plant {name}");
    }
    for name in &what.only {
        command += &format!(" --only {name}");
    }
    if let Some(request) = refused {
        command += &format!(" --refuse {request}");
    }
    format!("{command} '{trail}'")
}

fn again(what: &What, trail: &Trail) -> Result<Exit, Refused> {
    let loaded = load(what)?;
    let ended = replay(&loaded.scenario, loaded.setting(), trail);
    trace(what, &loaded.scenario, &ended, &command(what, what.refuse, trail))?;
    for (register, value) in &ended.registers {
        print(&format!("{register} = {value}\n"))?;
    }
    match &ended.violation {
        Some(violation) => print(&format!("found: {violation}\n")).map(|()| Exit::Refused),
        None => print("nothing was found\n").map(|()| Exit::Done),
    }
}

fn zoo(name: Option<&str>, control: bool) -> Result<Exit, Refused> {
    let exhibits = match name {
        Some(name) => vec![exhibit(name)?],
        None => ZOO.to_vec(),
    };
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header([
        "bug",
        "what is done wrong",
        "scenario",
        "found by",
        "checker",
        "schedules",
        "seconds",
        "without it",
    ]);
    let (bar, mut all) = (bar(), true);
    for exhibit in exhibits {
        bar.set_message(exhibit.name);
        let report = exhibit.hunt(Checks::all(), &budget());
        let clean = if control { exhibit.control(&budget()) } else { Report::default() };
        bar.tick();
        let (by, checker) = match &report.failure {
            Some(failure) => (failure.by, failure.violation.check.name()),
            None => ("NOT FOUND", "–"),
        };
        let after = report.failure.as_ref().map_or(report.schedules, |failure| failure.after);
        let without = match (&clean.failure, control) {
            (_, false) => "–".to_owned(),
            (None, true) => format!("{} pass", clean.schedules),
            (Some(failure), true) => format!("FOUND {}", failure.violation.check.name()),
        };
        all &= report.failure.is_some() && clean.failure.is_none();
        let seconds = format!("{:.2}", report.elapsed.as_secs_f64());
        table.add_row([exhibit.name, exhibit.about, exhibit.file, by, checker, &after.to_string(), &seconds, &without]);
    }
    bar.finish_and_clear();
    print(&format!("{table}\n"))?;
    Ok(if all { Exit::Done } else { Exit::Refused })
}
