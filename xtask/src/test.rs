//! `cargo xtask test`: what CI runs. Checks, the host's unit and property tests, doc tests, weak orderings, then real
//! boots.
//!
//! Every phase runs, whatever failed before it, so that one run tells everything. The last line counts phases and
//! system tests: `N passed, N failed`.

use std::process::{Command, ExitCode};

use anyhow::Result;
use clap::Args;

use crate::fetch::toolchain;
use crate::system;
use crate::{check, workspace};

/// Which part of the tests.
#[derive(Args, Debug)]
pub struct Options {
    /// Only these system tests, by name or a part of it
    #[arg(long, value_name = "NAME", num_args = 1..)]
    system: Vec<String>,
    /// Only what needs no machine
    #[arg(long, conflicts_with = "system")]
    host_only: bool,
    /// Only the lock-free pieces under weak orderings (loom)
    #[arg(long, conflicts_with_all = ["system", "host_only"])]
    weak: bool,
    /// Print the names of the system tests
    #[arg(long)]
    list: bool,
}

/// Runs the command.
///
/// # Errors
/// When a phase cannot even start. A test that failed is an exit code.
pub fn run(options: &Options) -> Result<ExitCode> {
    if options.list {
        system::TESTS.iter().for_each(|test| println!("{}: {}", test.name, test.about));
        return Ok(ExitCode::SUCCESS);
    }
    let mut tally = Tally::default();
    if options.weak {
        tally.phase("weak orderings", workspace::run(&mut weak_orderings()));
        return Ok(tally.report());
    }
    if options.system.is_empty() {
        tally.phase("check", check::run());
        tally.phase("host tests", workspace::run(&mut host_tests()));
        let mut documentation = workspace::cargo();
        tally.phase("doc tests", workspace::run(documentation.args(["test", "--doc", "--quiet"])));
        tally.phase("weak orderings", workspace::run(&mut weak_orderings()));
    }
    if !options.host_only {
        match system::run(&options.system) {
            Ok((passed, failed)) => tally.add(passed, failed),
            Err(error) => tally.phase("system tests", Err(error)),
        }
    }
    Ok(tally.report())
}

/// nextest where it is installed; building it only to run our tests would take longer than they do.
fn host_tests() -> Command {
    let mut cargo = workspace::cargo();
    if toolchain::has_subcommand("nextest") {
        cargo.args(["nextest", "run", "--profile", "whole", "--no-fail-fast", "--status-level", "fail"]);
    } else {
        cargo.args(["test", "--quiet", "--lib", "--bins", "--tests", "--no-fail-fast"]);
    }
    cargo
}

/// Crates with a `tests/loom.rs`.
const WEAKLY_ORDERED: [&str; 5] =
    ["entresol-sync", "entresol-slot", "entresol-backing", "entresol-mmu", "entresol-metal-x86"];

/// loom takes the place of atomics and locks in the whole build, so it has an output folder of its own.
fn weak_orderings() -> Command {
    let mut flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    flags.push_str(" --cfg loom");
    let mut cargo = workspace::cargo();
    cargo.args(["test", "--quiet", "--test", "loom"]);
    cargo.args(WEAKLY_ORDERED.iter().flat_map(|name| ["--package", name]));
    cargo.env("RUSTFLAGS", flags).env("CARGO_TARGET_DIR", workspace::target_dir().join("loom"));
    cargo
}

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
}

impl Tally {
    fn phase(&mut self, name: &str, result: Result<()>) {
        match result {
            Ok(()) => self.add(1, 0),
            Err(error) => {
                eprintln!("{name}: FAILED: {error:#}");
                self.add(0, 1);
            }
        }
    }

    /// Says what became of it all, on the last line.
    fn report(&self) -> ExitCode {
        println!("\n{} passed, {} failed", self.passed, self.failed);
        if self.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    fn add(&mut self, passed: usize, failed: usize) {
        self.passed += passed;
        self.failed += failed;
    }
}
