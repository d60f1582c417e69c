//! A Linux boot: as a guest with 2 MiB entries, with 4 KiB entries only, and on the bare machine; and as a guest with memory tagging,
//! against the same without.
//!
//! The interval begins with the kernel's own first instruction, whoever runs it: the plugin knows its encoding, and the
//! last execution at a page's start counts, so a host kernel before the guest's does no harm. It ends with the first
//! instruction of `bootinit`. The bare machine is given the device tree that the guest was given: `bootinit` prints it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use entresol_wire::config::{Arch, LargestEntry, WrittenPolicies, WrittenVm};

use super::machine::{self, Run};
use super::operations::GUEST;
use super::plugin::Counts;
use super::table::Row;
use super::{Bench, peer};
use crate::cpio::Archive;
use crate::{bundle, guests, image};

/// The phase that the plugin gives to intervals begun by an encoding.
const PHASE: u8 = 254;
/// What `bootinit` prints last.
pub const DONE: &str = "BOOT DONE";
/// The kernel's command line.
pub const CMDLINE: &str = "console=ttyAMA0 quiet nokaslr panic=-1";

/// What a boot needs.
pub struct Files {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// Encoding of the kernel's first instruction.
    pub start: u32,
}

/// Measures every boot; KVM's too if `with_peer`.
///
/// # Errors
/// When a machine does not come to its end.
pub fn measure(bench: &Bench, with_peer: bool) -> Result<Vec<Row>> {
    let files = Files::prepare(bench)?;
    let (blocks, console) = guest(bench, &files, "boot-2m", LargestEntry::Block2M, false)?;
    let (pages, _) = guest(bench, &files, "boot-4k", LargestEntry::Page4K, false)?;
    let (tagged, _) = guest(bench, &files, "boot-mte", LargestEntry::Block2M, true)?;
    let tree = machine::file(bench, "guest.dtb");
    image::write_new(&tree, &printed_tree(&console)?)?;
    let bare = bare(bench, &files, &tree)?;
    let row = |key, page, instructions, target| -> Result<Row> {
        let peer = with_peer.then(|| peer::boot(bench, &files, &tree, page)).transpose()?;
        Ok(Row::Boot { key, instructions, bare, target, peer })
    };
    // Against the same guest without memory tagging.
    let mte = Row::Boot { key: "boot_mte", instructions: tagged, bare: blocks, target: 1.05, peer: None };
    Ok(vec![row("boot_2m", "2m", blocks, 1.02)?, row("boot_4k", "4k", pages, 1.05)?, mte])
}

impl Files {
    fn prepare(bench: &Bench) -> Result<Self> {
        let kernel = bench.guest.kernel()?;
        let image = fs::read(&kernel).with_context(|| format!("cannot read {}", kernel.display()))?;
        ensure!(image.get(56..60) == Some(b"ARM\x64"), "{} is not a plain arm64 Image", kernel.display());
        let start = u32::from_le_bytes([image[0], image[1], image[2], image[3]]);
        let init = guests::linux("bootinit", Arch::Arm64)?;
        let mut archive = Archive::default();
        archive.directory("dev");
        archive.character_device("dev/console", 5, 1);
        archive.directory("proc");
        archive.directory("sys");
        archive.file("init", 0o755, &fs::read(&init).with_context(|| format!("cannot read {}", init.display()))?);
        let initrd = machine::file(bench, "bootinit.cpio");
        image::write_new(&initrd, &archive.finish())?;
        Ok(Self { kernel, initrd, start })
    }
}

/// Instructions of a boot.
///
/// # Errors
/// When the machine ended without one.
pub fn instructions(counts: &Counts) -> Result<u64> {
    let boots = counts.phases.get(&PHASE).context("no boot was counted")?;
    ensure!(boots.count == 1, "{} boots were counted in one run", boots.count);
    Ok(boots.max)
}

fn guest(bench: &Bench, files: &Files, name: &str, page_size: LargestEntry, mte: bool) -> Result<(u64, String)> {
    let vm = WrittenVm {
        memory: GUEST.1.into(),
        cmdline: CMDLINE.to_owned(),
        mte,
        policies: WrittenPolicies { page_size, ..WrittenPolicies::default() },
        ..bundle::linux("boot", &files.kernel, &files.initrd)
    };
    let packed = machine::pack(bench, name, vm)?;
    let run = Run { start: Some(files.start), ..Run::new(name, &bench.hypervisor, &packed, DONE) };
    let outcome = run.to_end(bench)?;
    Ok((instructions(&outcome.counts)?, outcome.console))
}

fn bare(bench: &Bench, files: &Files, tree: &Path) -> Result<u64> {
    let run = Run {
        append: CMDLINE,
        el2: false,
        device_tree: Some(tree),
        memory: GUEST.0,
        start: Some(files.start),
        ..Run::new("boot-bare", &files.kernel, &files.initrd, DONE)
    };
    instructions(&run.to_end(bench)?.counts)
}

/// The tree in `bootinit`'s `FDT` lines.
fn printed_tree(console: &str) -> Result<Vec<u8>> {
    let mut tree = Vec::new();
    for hex in console.lines().filter_map(|line| line.trim().strip_prefix("FDT ")) {
        ensure!(hex.len().is_multiple_of(2), "a line of the device tree was cut off");
        for at in (0..hex.len()).step_by(2) {
            let byte = hex.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
            tree.push(byte.context("a line of the device tree is not hexadecimal")?);
        }
    }
    let size = tree.get(4..8).map(|size| u32::from_be_bytes([size[0], size[1], size[2], size[3]]));
    ensure!(size == Some(tree.len() as u32), "the guest printed {} bytes of a device tree of {size:?}", tree.len());
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_read_from_the_console_only_if_it_is_whole() {
        let whole = "booting\r\nFDT d00dfeed0000000a\r\nFDT 0102\r\nBOOT DONE\r\n";
        assert_eq!(printed_tree(whole).unwrap(), [0xd0, 0x0d, 0xfe, 0xed, 0, 0, 0, 10, 1, 2]);
        assert!(printed_tree(&whole.replace("FDT 0102", "")).is_err());
        assert!(printed_tree(&whole.replace("0102", "010")).is_err());
        assert!(printed_tree(&whole.replace("0102", "01zz")).is_err());
        assert!(printed_tree("").is_err());
    }
}
