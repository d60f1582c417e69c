//! `entresol`: the host tool. See the library for what it does and its exit status.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use entresol_cli::config::{self, ConfigError};
use entresol_cli::ctl::{self, Ctl};
use entresol_cli::lab::{self, Lab};
use entresol_cli::store::{self, Store};
use entresol_cli::{Exit, bundle};
use entresol_wire::config::format_size;
use indicatif::{ProgressBar, ProgressStyle};

/// The host's side of the Entresol hypervisor
///
/// Exit status: 0 done; 1 refused by the hypervisor, or the attached guest crashed; 2 wrong command line or configuration;
/// 3 no connection to a hypervisor.
#[derive(Parser)]
#[command(name = "entresol", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check a configuration and the files it names
    Check {
        /// The configuration, TOML
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Check a configuration and pack it with its files into a boot bundle
    Bundle {
        /// The configuration, TOML
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Where to write the bundle
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Make, read and change a store's image while no machine has it
    #[command(subcommand)]
    Store(Store),
    /// Speak with a running hypervisor
    Ctl(Ctl),
    /// Explore the core on a model of the machine
    Lab(Lab),
}

fn main() -> ExitCode {
    let exit = match Arguments::parse().command {
        Command::Ctl(ctl) => ctl::run(ctl),
        Command::Store(store) => store::run(&store),
        Command::Lab(lab) => lab::run(&lab),
        Command::Check { config } => report(check(&config)),
        Command::Bundle { config, output } => report(pack(&config, &output)),
    };
    exit.into()
}

fn report(result: Result<(), ConfigError>) -> Exit {
    match result {
        Ok(()) => Exit::Done,
        Err(error) => {
            eprintln!("entresol: {error}");
            Exit::Usage
        }
    }
}

fn check(path: &Path) -> Result<(), ConfigError> {
    let loaded = config::load(path)?;
    let total = bundle::pack(&loaded)?.total();
    let mut text = String::new();
    for vm in &loaded.config().vms {
        text += &format!("{}: vcpus {}, memory {}, kernel {}\n", vm.name, vm.vcpus, format_size(vm.memory), vm.kernel);
    }
    text += &format!("{}: right; its bundle has {total} bytes\n", path.display());
    entresol_cli::print(&text).map_err(|error| ConfigError::Write { path: "standard output".into(), error })
}

fn pack(path: &Path, output: &Path) -> Result<(), ConfigError> {
    // Drawn on standard error, and only if that is a terminal.
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("packing {bar:30} {bytes}/{total_bytes}");
    bar.set_style(style.expect("a template that indicatif knows"));
    let result = config::load(path).and_then(|loaded| {
        bundle::write(&loaded, output, &mut |written, total| {
            bar.set_length(total);
            bar.set_position(written);
        })
    });
    bar.finish_and_clear();
    result.map(drop)
}
