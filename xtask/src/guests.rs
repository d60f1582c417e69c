//! The programs under `tests/guests`: flat images for a bare machine, static programs for a Linux inside one.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use entresol_wire::config::Arch;

use crate::fetch::toolchain::{self, METAL_TARGET, METAL_X86_TARGET};
use crate::image;
use crate::progress::Step;
use crate::workspace;

/// Static programs need no library of any machine.
pub const LINUX_TARGET: &str = "aarch64-unknown-linux-musl";

/// The same for guests of x86-64.
const LINUX_X86_TARGET: &str = "x86_64-unknown-linux-musl";

/// The flat image of the guest `name`, built; its file ends in `.bin`, which a configuration takes for a flat kernel.
///
/// # Errors
/// When it does not build or cannot be laid out.
pub fn flat(name: &str) -> Result<PathBuf> {
    let elf = elf(name)?;
    let bytes = fs::read(&elf).with_context(|| format!("cannot read {}", elf.display()))?;
    let image = image::flatten(&bytes).with_context(|| format!("cannot make an image of {}", elf.display()))?;
    let path = workspace::output_dir()?.join(format!("{name}.bin"));
    image::write_new(&path, &image)?;
    Ok(path)
}

/// The guest `name` as an ELF file that can be loaded anywhere, built.
///
/// # Errors
/// When it does not build.
pub fn elf(name: &str) -> Result<PathBuf> {
    build("tests/guests", METAL_TARGET, name)
}

/// The guest `name` of x86-64, built: an ELF file with a PVH entry.
///
/// # Errors
/// When it does not build.
pub fn x86(name: &str) -> Result<PathBuf> {
    build("tests/guests/x86", METAL_X86_TARGET, name)
}

/// The program `name` for Linux on `arch`, built.
///
/// # Errors
/// When it does not build.
pub fn linux(name: &str, arch: Arch) -> Result<PathBuf> {
    let target = match arch {
        Arch::Arm64 => LINUX_TARGET,
        Arch::X86 => LINUX_X86_TARGET,
    };
    build("tests/guests/linux", target, name)
}

/// Builds a package of a workspace of its own, whose folder holds its flags.
fn build(folder: &str, target: &str, name: &str) -> Result<PathBuf> {
    toolchain::ensure_targets(&[target])?;
    let _step = Step::start(&format!("building {name}"));
    let mut cargo: Command = workspace::cargo();
    cargo.current_dir(workspace::root().join(folder));
    cargo.args(["build", "--release", "--quiet", "--package", name, "--target", target]);
    // Flags of ours would replace the folder's.
    cargo.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("CARGO_BUILD_TARGET");
    cargo.env("CARGO_TARGET_DIR", workspace::target_dir());
    workspace::output(&mut cargo)?;
    Ok(workspace::target_dir().join(target).join("release").join(name))
}
