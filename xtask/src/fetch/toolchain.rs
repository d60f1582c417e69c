//! The Rust targets and tools that a build needs, added by rustup when they are missing.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::progress::Step;
use crate::workspace;

/// The hypervisor's own target: no FP or SIMD register is touched.
pub const METAL_TARGET: &str = "aarch64-unknown-none-softfloat";

/// The same for x86-64: no x87, MMX or SSE register is touched.
pub const METAL_X86_TARGET: &str = "x86_64-unknown-none";

/// Adds the targets that are missing.
///
/// # Errors
/// When one is missing and rustup cannot add it: the error says what to type.
pub fn ensure_targets(targets: &[&str]) -> Result<()> {
    let sysroot = workspace::output(Command::new("rustc").args(["--print", "sysroot"]).current_dir(workspace::root()))?;
    let libraries = Path::new(sysroot.trim()).join("lib/rustlib");
    let missing: Vec<&str> =
        targets.iter().copied().filter(|target| !libraries.join(target).join("lib").is_dir()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let _step = Step::start(&format!("adding Rust targets {}", missing.join(", ")));
    let mut rustup = Command::new("rustup");
    rustup.args(["target", "add"]).args(&missing).current_dir(workspace::root());
    let hint = format!("install these Rust targets by hand: rustup target add {}", missing.join(" "));
    workspace::output(&mut rustup).context(hint).map(drop)
}

/// Adds a rustup component whose cargo sub-command does not answer.
///
/// # Errors
/// As [`ensure_targets`].
pub fn ensure_component(subcommand: &str, component: &str) -> Result<()> {
    if has_subcommand(subcommand) {
        return Ok(());
    }
    let _step = Step::start(&format!("adding {component}"));
    let mut rustup = Command::new("rustup");
    rustup.args(["component", "add", component]).current_dir(workspace::root());
    workspace::output(&mut rustup)
        .with_context(|| format!("install it by hand: rustup component add {component}"))
        .map(drop)
}

/// Whether `cargo SUBCOMMAND` answers.
pub fn has_subcommand(subcommand: &str) -> bool {
    workspace::output(workspace::cargo().args([subcommand, "--version"])).is_ok()
}

/// The folder of the compiler's own LLVM tools; rustup adds them when they are missing.
///
/// # Errors
/// As [`ensure_targets`].
pub fn llvm_tools() -> Result<PathBuf> {
    let ask = |what: &[&str]| workspace::output(Command::new("rustc").args(what).current_dir(workspace::root()));
    let version = ask(&["--version", "--verbose"])?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc does not name its host")?;
    let folder = Path::new(ask(&["--print", "sysroot"])?.trim()).join("lib/rustlib").join(host).join("bin");
    if !folder.join("llvm-cov").is_file() {
        let _step = Step::start("adding llvm-tools");
        let mut rustup = Command::new("rustup");
        rustup.args(["component", "add", "llvm-tools"]).current_dir(workspace::root());
        workspace::output(&mut rustup).context("install it by hand: rustup component add llvm-tools")?;
    }
    Ok(folder)
}
