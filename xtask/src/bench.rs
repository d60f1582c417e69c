//! `cargo xtask bench`: what operations cost, in executed instructions of the emulated machine.
//!
//! Protocol: every machine is deterministic (`-icount`, one CPU, fixed seeds and clock; [`machine`]), a plugin counts
//! between markers that a guest executes ([`plugin`]), and the guest is the same program for every hypervisor
//! ([`operations`]). Forks are counted with two vCPUs on two CPUs ([`fork`]). A boot is counted from the kernel's first instruction to the first of user space ([`boot`]), and
//! compared with the bare machine, which is given the device tree that the guest was given. `--peer kvm` runs the same
//! guests under Debian's own kernel ([`peer`]). The exit status says whether every target is met.

mod boot;
mod disk;
mod fork;
mod machine;
mod operations;
mod peer;
mod plugin;
mod table;
mod x86;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use crate::arch::Named;
use crate::fetch::{self, Guest, Qemu};
use crate::{image, workspace};
use table::{Row, Rows};

/// What is measured.
#[derive(Args, Debug)]
pub struct Options {
    /// Write the results to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure this hypervisor too, with the same guests, and print the ratio
    #[arg(long, value_enum)]
    peer: Option<Peer>,
    /// The machine
    #[arg(long, value_enum, default_value = "aarch64", conflicts_with_all = ["peer", "only"])]
    arch: Named,
    /// Only these; all if none is named
    #[arg(long, value_enum, num_args = 1..)]
    only: Vec<Part>,
}

/// Who else is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// Debian's kernel with its own KVM, and a small VMM of ours
    Kvm,
}

/// What can be measured alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Faults, calls and device accesses with 4 KiB entries
    Pages,
    /// Faults with 2 MiB entries
    Blocks,
    /// A dirty log with 4 KiB entries: faults, and fetching it
    Log,
    /// A dirty log with 2 MiB entries: faults that split them
    Split,
    /// Live forks of guests of several sizes
    Forks,
    /// Private memory: faults, the hypervisor's own accesses, and a disk
    Private,
    /// Memory that comes back from a swap device
    Swap,
    /// Memory tagging: faults and copies
    Tags,
    /// Memory with tags that comes back from a swap device
    TagsSwap,
    /// A Linux boot, bare and as a guest
    Boot,
}

/// What every measurement needs.
pub struct Bench {
    qemu: Qemu,
    guest: Guest,
    plugin: PathBuf,
    hypervisor: PathBuf,
    /// Logs, bundles and results.
    work: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// When something does not build, or a machine does not come to its end.
pub fn run(options: &Options) -> Result<ExitCode> {
    let rows = match options.arch {
        Named::Arm64 => arm64(options)?,
        Named::X86 => x86::measure()?,
    };
    print!("{}", rows.table());
    if let Some(path) = &options.json {
        image::write_new(&absolute(path)?, rows.json().as_bytes())?;
    }
    Ok(if rows.0.iter().all(Row::met) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The folder of logs, bundles and results.
fn work_folder() -> Result<PathBuf> {
    let work = workspace::output_dir()?.join("bench");
    std::fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    Ok(work)
}

fn arm64(options: &Options) -> Result<Rows> {
    let (qemu, guest) = fetch::everything()?;
    let work = work_folder()?;
    let plugin = plugin::build(&work)?;
    let bench = Bench { qemu, guest, plugin, hypervisor: image::build(&[])?.raw, work };
    let wanted = |part: Part| options.only.is_empty() || options.only.contains(&part);
    let mut rows = Rows::default();
    for part in [Part::Pages, Part::Blocks, Part::Log, Part::Split].into_iter().filter(|part| wanted(*part)) {
        let peer = options.peer.map(|Peer::Kvm| peer::operations(&bench, part)).transpose()?;
        rows.add(operations::measure(&bench, part)?, peer.as_ref());
    }
    if wanted(Part::Forks) {
        rows.0.extend(fork::measure(&bench)?);
    }
    if wanted(Part::Private) {
        rows.add(operations::measure(&bench, Part::Private)?, None);
        rows.0.extend(disk::measure(&bench)?);
    }
    for part in [Part::Swap, Part::Tags, Part::TagsSwap].into_iter().filter(|part| wanted(*part)) {
        rows.add(operations::measure(&bench, part)?, None);
    }
    if wanted(Part::Boot) {
        rows.0.extend(boot::measure(&bench, options.peer.is_some())?);
    }
    Ok(rows)
}

fn absolute(path: &std::path::Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("cannot resolve {}", path.display()))
}
