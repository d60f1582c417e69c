//! The same guests under Debian's own KVM: its kernel at EL2, and a small VMM of ours (`tests/guests/linux/kvm-peer`) as
//! PID 1.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use entresol_wire::config::Arch;

use super::boot::{self, Files};
use super::machine::{self, Run};
use super::operations::{self, GUEST};
use super::{Bench, Part};
use crate::cpio::Archive;
use crate::{guests, image};

/// The host kernel's command line; what follows is the VMM's.
const HOST: &str = "console=ttyAMA0 quiet nokaslr panic=-1";
/// Where the VMM takes a range for which it drops the second stage's entries; the guest's `service=`.
const SERVICE: u64 = 0x0b00_0000;

/// One part's operations under KVM.
///
/// # Errors
/// As for ours.
pub fn operations(bench: &Bench, part: Part) -> Result<operations::Results> {
    let name = if part == Part::Blocks { "kvm-blocks" } else { "kvm-pages" };
    let page = if part == Part::Blocks { "2m" } else { "4k" };
    let arguments = format!("{} service={SERVICE:#x}", operations::arguments(part));
    let initrd = pack(bench, name, &[("kernel", &guests::flat("bench")?)])?;
    let append = format!("{HOST} peer.page={page} peer.memory={} peer.args={}", GUEST.0, arguments.replace(' ', "+"));
    let outcome = run(bench, name, &initrd, &append, None, operations::DONE)?;
    operations::phases(part, &outcome.counts)
}

/// Instructions of a boot under KVM; `page` is `2m` or `4k`.
///
/// # Errors
/// As for ours.
pub fn boot(bench: &Bench, files: &Files, tree: &Path, page: &str) -> Result<u64> {
    let name = format!("kvm-boot-{page}");
    let parts = [("kernel", files.kernel.as_path()), ("initrd", &files.initrd), ("dtb", tree)];
    let initrd = pack(bench, &name, &parts)?;
    let append = format!("{HOST} peer.page={page} peer.memory={}", GUEST.0);
    boot::instructions(&run(bench, &name, &initrd, &append, Some(files.start), boot::DONE)?.counts)
}

fn run(
    bench: &Bench,
    name: &str,
    initrd: &Path,
    append: &str,
    start: Option<u32>,
    done: &str,
) -> Result<machine::Outcome> {
    let kernel = bench.guest.kernel()?;
    let run = Run { append, start, ..Run::new(name, &kernel, initrd, done) };
    run.to_end(bench)
}

fn pack(bench: &Bench, name: &str, parts: &[(&str, &Path)]) -> Result<PathBuf> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let mut archive = Archive::default();
    for directory in ["dev", "guest", "proc"] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("init", 0o755, &read(&guests::linux("kvm-peer", Arch::Arm64)?)?);
    for (part, path) in parts {
        archive.file(&format!("guest/{part}"), 0o644, &read(path)?);
    }
    let path = machine::file(bench, &format!("{name}.cpio"));
    image::write_new(&path, &archive.finish())?;
    Ok(path)
}
