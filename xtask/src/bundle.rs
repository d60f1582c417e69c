//! From what a command asks for to the boot bundle, by the host tool's own functions: xtask has no second opinion of what
//! is a good configuration.

use std::path::Path;

use anyhow::{Context, Result};
use entresol_cli::config::{self, Loaded};
use entresol_wire::config::{Arch, Written, WrittenDisk, WrittenOuter, WrittenVm};

use crate::progress::Step;

/// The command line that brings Linux's console to the serial port of a guest's machine.
pub const fn console(arch: Arch) -> &'static str {
    match arch {
        Arch::Arm64 => "console=ttyAMA0",
        // It powers off by what ACPI's tables name only if it is told to.
        Arch::X86 => "console=ttyS0 reboot=acpi",
    }
}

/// A VM with one vCPU, 512 MiB and Linux's console on the PL011.
pub fn linux(name: &str, kernel: &Path, initrd: &Path) -> WrittenVm {
    WrittenVm {
        name: name.to_owned(),
        memory: "512M".into(),
        kernel: text(kernel),
        initrd: Some(text(initrd)),
        cmdline: console(Arch::Arm64).to_owned(),
        ..WrittenVm::default()
    }
}

/// A VM with one vCPU and 64 MiB that starts a program of `tests/guests`.
pub fn program(name: &str, kernel: &Path, cmdline: &str) -> WrittenVm {
    WrittenVm {
        name: name.to_owned(),
        memory: "64M".into(),
        kernel: text(kernel),
        cmdline: cmdline.to_owned(),
        ..WrittenVm::default()
    }
}

/// A disk that the guest may write.
pub fn disk(file: &Path) -> WrittenDisk {
    WrittenDisk { file: text(file), read_only: false }
}

/// A configuration of these virtual machines on an outer machine of this size.
pub fn written(outer_memory: &str, outer_cpus: u32, vms: Vec<WrittenVm>) -> Written {
    Written {
        outer: WrittenOuter {
            memory: Some(outer_memory.to_owned()),
            cpus: Some(outer_cpus.into()),
            ..WrittenOuter::default()
        },
        vms,
    }
}

/// Makes the outer machine one of x86-64 under QEMU: its guests have as many CPUs as before, and never the first.
///
/// What TCG knows of SVM's state is in a word of each CPU, of which every CPU that loads x87 state writes the first's again, without a
/// lock (QEMU 10.0, target/i386/tcg/system/fpu_helper.c, `cpu_clear_ignne`). An entry or an exit of the first at that moment is half
/// undone: it ends in a triple fault, of the guest or of the machine.
pub fn on_x86(written: &mut Written) {
    written.outer.arch = Some(Arch::X86);
    if let Some(cpus) = written.outer.cpus.filter(|cpus| *cpus > 1) {
        (written.outer.cpus, written.outer.housekeeping_cpus) = (Some(cpus + 1), Some(1));
    }
}

/// Checks a configuration that a command put together; paths in it are absolute.
///
/// # Errors
/// The first rule that is broken.
pub fn check(written: Written) -> Result<Loaded> {
    // Errors name this in place of a file; paths are relative to its folder, the current one.
    Ok(config::check(Path::new("command line"), written)?)
}

/// Reads and checks a configuration file.
///
/// # Errors
/// The first rule that is broken.
pub fn load(path: &Path) -> Result<Loaded> {
    Ok(config::load(path)?)
}

/// Packs a configuration with its files.
///
/// # Errors
/// When the bundle does not fit into the machine or cannot be written.
pub fn pack(loaded: &Loaded, output: &Path) -> Result<()> {
    let _step = Step::start("packing the boot bundle");
    entresol_cli::bundle::write(loaded, output, &mut |_, _| ()).context("cannot pack the boot bundle").map(drop)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_configuration_is_refused_before_anything_starts() {
        let refused = |written| format!("{:#}", check(written).unwrap_err());
        assert!(refused(written("4G", 2, Vec::new())).contains("vms"));
        let missing = linux("a", Path::new("no/such/kernel"), Path::new("no/such/initrd"));
        assert!(refused(written("4G", 2, vec![missing])).contains("no/such/kernel"));
    }
}
