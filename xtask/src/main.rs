//! `cargo xtask`: everything that a person or CI does with Entresol, in one command each.
//!
//! | room | question |
//! |---|---|
//! | [`run`] | how does a clean clone become a guest's shell? |
//! | [`test`], [`system`], [`check`] | does everything still hold? |
//! | [`coverage`] | how much of the core does the lab run? |
//! | [`bench`] | what does it cost? |
//! | [`fetch`] | where do QEMU and a guest come from? |
//! | [`image`], [`bundle`], [`initrd`], [`cpio`], [`guests`] | what is the machine given at boot? |
//! | [`outer`] | what is the machine? |

mod arch;
mod bench;
mod boot_disk;
mod bundle;
mod check;
mod coverage;
mod cpio;
mod fetch;
mod guests;
mod image;
mod initrd;
mod outer;
mod outer_bochs;
mod outer_x86;
mod progress;
mod run;
mod system;
mod test;
mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use arch::Named;

/// Builds, runs and checks Entresol.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Boot a guest on the hypervisor, in QEMU; its console is this terminal (Ctrl-] x stops the machine)
    Run(Box<run::Options>),
    /// Check, run the host's tests, then boot machines and test those
    Test(test::Options),
    /// Count what operations cost, in instructions, deterministically; with `--peer kvm` against KVM
    Bench(bench::Options),
    /// Count the lines of the core that the lab reaches
    Coverage(coverage::Options),
    /// Format, clippy, dependency arrows and the house's own rules
    Check,
    /// Fetch QEMU and a guest's files now, to be without network later
    Fetch,
    /// Build the hypervisor's image and say where it is
    Build {
        /// The architecture of the machine that it is for
        #[arg(long, value_enum, default_value = "aarch64")]
        arch: Named,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse_from(arguments(std::env::args_os())).command {
        Task::Run(options) => run::run(&options),
        Task::Test(options) => test::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Coverage(options) => coverage::run(&options),
        Task::Check => check::run().map(|()| ExitCode::SUCCESS),
        Task::Fetch => fetch_now(),
        Task::Build { arch } => build(arch),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// `cargo xtask run -- --vcpus 4` is what cargo's own commands have taught people to type: a `--` behind the command says
/// nothing here.
fn arguments(given: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = given.collect();
    if arguments.get(2).is_some_and(|argument| argument == "--") {
        arguments.remove(2);
    }
    arguments
}

fn fetch_now() -> Result<ExitCode> {
    let (qemu, guest) = fetch::everything()?;
    let (major, minor) = qemu.version();
    println!("QEMU {major}.{minor}: {}", workspace::shown(&qemu.command()));
    println!("QEMU for x86-64: {}", workspace::shown(&fetch::qemu_x86()?.command()));
    println!("guest kernel: {}", guest.kernel()?.display());
    println!("Bochs: {}", workspace::shown(&fetch::bochs()?.command()));
    println!("guest kernel for x86-64: {}", fetch::guest_x86()?.kernel()?.display());
    println!("U-Boot: {}", guest.u_boot().display());
    println!("EDK2: {}", guest.edk2().display());
    Ok(ExitCode::SUCCESS)
}

fn build(arch: Named) -> Result<ExitCode> {
    match arch {
        Named::Arm64 => {
            let image = image::build(&[])?;
            println!("image: {}\nsymbols: {}", image.raw.display(), image.elf.display());
        }
        Named::X86 => println!("image, with symbols: {}", image::build_x86()?.display()),
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(arguments(words.split(' ').map(OsString::from)))
    }

    #[test]
    fn options_may_stand_behind_two_dashes() {
        for words in
            ["xtask run --vcpus 4 --memory 1G", "xtask run -- --vcpus 4 --memory 1G", "xtask run --", "xtask check"]
        {
            parse(words).unwrap();
        }
        assert!(parse("xtask run -- -- --vcpus 4").is_err());
        assert!(parse("xtask -- run").is_err());
    }

    #[test]
    fn a_configuration_says_its_architecture_itself() {
        for words in
            ["--arch x86_64", "--arch aarch64 --vcpus 4", "--config vms.toml", "--config vms.toml --store s.img"]
        {
            parse(&format!("xtask run {words}")).unwrap();
        }
        let refused = |words: &str| parse(&format!("xtask run {words}")).err().unwrap().to_string();
        assert!(refused("--arch x86_64 --config vms.toml").contains("cannot be used with"));
        assert!(refused("--arch sparc64").contains("aarch64, x86_64"));
    }
}
