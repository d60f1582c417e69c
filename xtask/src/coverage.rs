//! `cargo xtask coverage`: how much of the core the lab runs.
//!
//! The lab's own tests (every litmus file on every machine, refused frames, the zoo) and the fuzz target's are built with
//! the compiler's source-based coverage and run; the core's unit tests are not. What is counted are lines of `core/*`:
//! the crates are built as dependencies, so that their `#[cfg(test)]` modules do not exist.
//!
//! The facade's own lab and the loom backend are instruments, not what is examined: they are left out.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Deserialize;

use crate::fetch::toolchain;
use crate::progress::Step;
use crate::workspace;

/// Test programs of the lab: package, test.
const PROGRAMS: [(&str, &str); 3] =
    [("entresol-model", "litmus"), ("entresol-model", "zoo"), ("entresol-fuzz", "fuzz")];

/// Instruments of the lab that stand in the core's folder.
const INSTRUMENTS: [&str; 5] = [
    "core/sync/src/lab/",
    "core/sync/src/weak/",
    "core/sync/src/scheduled.rs",
    "core/sync/src/zoo.rs",
    "core/sync/src/trace.rs",
];

/// What is measured, and what must be reached.
#[derive(Args, Debug)]
pub struct Options {
    /// Fail below so many per cent of lines
    #[arg(long, value_name = "PERCENT", default_value_t = 90.0)]
    min: f64,
    /// Name the lines that were not reached
    #[arg(long)]
    lines: bool,
}

/// Lines that can be reached, and that were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Lines {
    all: u64,
    reached: u64,
}

impl Lines {
    fn percent(self) -> f64 {
        if self.all == 0 { 100.0 } else { self.reached as f64 * 100.0 / self.all as f64 }
    }

    fn add(&mut self, other: Self) {
        self.all += other.all;
        self.reached += other.reached;
    }
}

/// Runs the command.
///
/// # Errors
/// When something does not build or run. Too little coverage is an exit code.
pub fn run(options: &Options) -> Result<ExitCode> {
    let tools = toolchain::llvm_tools()?;
    let target = workspace::target_dir().join("coverage");
    let profiles = target.join("profiles");
    if profiles.is_dir() {
        fs::remove_dir_all(&profiles).with_context(|| format!("cannot remove {}", profiles.display()))?;
    }
    fs::create_dir_all(&profiles).with_context(|| format!("cannot make {}", profiles.display()))?;
    let programs = build(&target)?;
    for program in &programs {
        let _step = Step::start(&format!("running {}", program.file_stem().unwrap_or_default().to_string_lossy()));
        let mut test = Command::new(program);
        // Where cargo starts tests: the package's folder.
        test.current_dir(workspace::root().join("model")).env("LLVM_PROFILE_FILE", profiles.join("%p-%m.profraw"));
        workspace::output(test.arg("--quiet"))?;
    }
    let merged = target.join("lab.profdata");
    let mut merge = Command::new(tools.join("llvm-profdata"));
    merge.args(["merge", "--sparse", "--output"]).arg(&merged);
    for entry in fs::read_dir(&profiles).with_context(|| format!("cannot read {}", profiles.display()))? {
        merge.arg(entry?.path());
    }
    workspace::output(&mut merge)?;
    let mut export = Command::new(tools.join("llvm-cov"));
    export.args(["export", "--format=lcov", "--instr-profile"]).arg(&merged);
    programs.iter().enumerate().for_each(|(index, program)| {
        if index != 0 {
            export.arg("--object");
        }
        export.arg(program);
    });
    let files = parse(&workspace::output(&mut export)?, &workspace::root())?;
    ensure!(!files.is_empty(), "no line of the core was measured");
    Ok(report(&files, options))
}

/// Builds the test programs with coverage; where they are.
fn build(target: &Path) -> Result<Vec<PathBuf>> {
    let mut flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    flags.push_str(" -C instrument-coverage");
    let _step = Step::start("building the lab with coverage");
    let mut programs = Vec::new();
    for (package, test) in PROGRAMS {
        let mut cargo = workspace::cargo();
        cargo.args(["test", "--quiet", "--no-run", "--message-format", "json", "--package", package, "--test", test]);
        cargo.env("RUSTFLAGS", &flags).env("CARGO_TARGET_DIR", target);
        // Build scripts and macros are built so, too, and write what nobody reads.
        cargo.env("LLVM_PROFILE_FILE", target.join("build-%p.profraw"));
        let messages = workspace::output(&mut cargo)?;
        programs.push(executable(&messages, test).with_context(|| format!("cargo built no test {test}"))?);
    }
    Ok(programs)
}

#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    let built = messages.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok());
    let named = built.filter(|message| message.target.as_ref().is_some_and(|target| target.name == name));
    named.filter_map(|message| message.executable).next_back()
}

/// What lcov says of a file: lines, and whether each was reached.
type Files = BTreeMap<String, BTreeMap<u32, bool>>;

/// The core's files out of lcov's tracefile (geninfo(1), "FILES": `SF:path`, `DA:line,count`).
fn parse(text: &str, root: &Path) -> Result<Files> {
    let mut files = Files::new();
    let mut current = None;
    for line in text.lines() {
        if let Some(path) = line.strip_prefix("SF:") {
            let path = Path::new(path).strip_prefix(root).ok().map(|path| path.to_string_lossy().into_owned());
            current = path.filter(|path| is_examined(path));
        } else if let (Some(path), Some(data)) = (&current, line.strip_prefix("DA:")) {
            let mut numbers = data.split(',').map(str::parse::<u64>);
            let (Some(Ok(line)), Some(Ok(count))) = (numbers.next(), numbers.next()) else {
                anyhow::bail!("llvm-cov printed something else than lcov's format: {line}")
            };
            // A generic function has one record for each of its instances.
            *files.entry(path.clone()).or_default().entry(line as u32).or_default() |= count != 0;
        }
    }
    Ok(files)
}

fn is_examined(path: &str) -> bool {
    path.starts_with("core/") && path.contains("/src/") && !INSTRUMENTS.iter().any(|tool| path.starts_with(tool))
}

fn report(files: &Files, options: &Options) -> ExitCode {
    let mut crates: BTreeMap<&str, Lines> = BTreeMap::new();
    let mut total = Lines::default();
    for (path, lines) in files {
        let counted =
            Lines { all: lines.len() as u64, reached: lines.values().filter(|reached| **reached).count() as u64 };
        crates.entry(path.split("/src/").next().unwrap_or(path)).or_default().add(counted);
        total.add(counted);
        if options.lines && counted.reached != counted.all {
            println!("{path} {:.1} %: {}", counted.percent(), ranges(lines));
        }
    }
    println!("{:<14} {:>6} {:>8} {:>8}", "crate", "lines", "reached", "");
    for (name, lines) in crates.iter().chain([(&"total", &total)]) {
        println!("{name:<14} {:>6} {:>8} {:>6.1} %", lines.all, lines.reached, lines.percent());
    }
    if total.percent() < options.min {
        eprintln!("the lab reaches {:.1} % of the core's lines, {} % are wanted", total.percent(), options.min);
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Lines that were not reached, neighbours joined.
fn ranges(lines: &BTreeMap<u32, bool>) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    let mut joins = false;
    for (line, reached) in lines {
        match parts.last_mut().filter(|_| joins && !reached) {
            Some(last) => last.1 = *line,
            None if !reached => parts.push((*line, *line)),
            None => {}
        }
        joins = !reached;
    }
    let shown =
        |(first, last): &(u32, u32)| if first == last { format!("{first}") } else { format!("{first}–{last}") };
    parts.iter().map(shown).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LCOV: &str = "SF:/w/core/slot/src/set.rs\nFN:1,f\nDA:1,0\nDA:2,4\nDA:3,0\nDA:4,0\nend_of_record\n\
                        SF:/w/core/slot/src/set.rs\nDA:1,1\nend_of_record\nSF:/w/model/src/lib.rs\nDA:1,1\n\
                        end_of_record\nSF:/w/core/sync/src/lab/mod.rs\nDA:1,0\nend_of_record\n";

    #[test]
    fn instances_of_a_line_are_one_line_and_only_the_core_counts() {
        let files = parse(LCOV, Path::new("/w")).unwrap();
        assert_eq!(files.len(), 1);
        let lines = &files["core/slot/src/set.rs"];
        assert_eq!(lines.values().filter(|reached| **reached).count(), 2);
        assert_eq!(ranges(lines), "3–4");
        assert!(parse("SF:/w/core/slot/src/set.rs\nDA:x\n", Path::new("/w")).is_err());
    }

    #[test]
    fn too_little_fails() {
        let files = parse(LCOV, Path::new("/w")).unwrap();
        let exit = |min| format!("{:?}", report(&files, &Options { min, lines: true }));
        assert_eq!(exit(50.0), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(exit(50.1), format!("{:?}", ExitCode::FAILURE));
    }
}
