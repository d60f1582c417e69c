//! The outer machine of x86-64: QEMU's `q35` with a processor that has SVM, emulated.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::fetch::Qemu;

/// A processor of 40 physical bits, as far as TCG has it: it would warn of each feature that it has not.
pub const EPYC: &str = "EPYC,fxsr-opt=off,misalignsse=off,osvw=off,topoext=off,nrip-save=off,xsavec=off";

/// The outer machine's serial line is QEMU's standard input and output.
#[derive(Clone, Debug)]
pub struct OuterX86 {
    /// QEMU's name of the processor, with its properties.
    pub cpu: String,
    /// Bytes of memory.
    pub memory: u64,
    /// An ELF file with a PVH entry.
    pub kernel: PathBuf,
    /// The boot bundle.
    pub initrd: PathBuf,
    /// A disk to start from in their place ([`crate::boot_disk`]).
    pub disk: Option<PathBuf>,
    /// Arguments of one command only.
    pub extra: Vec<String>,
}

impl OuterX86 {
    /// A machine of 1 GiB.
    pub fn new(kernel: &Path, initrd: &Path) -> Self {
        let (kernel, initrd) = (kernel.to_owned(), initrd.to_owned());
        Self { cpu: EPYC.to_owned(), memory: 1 << 30, kernel, initrd, disk: None, extra: Vec::new() }
    }

    /// The command, with piped standard input and output; it is killed by whoever waits for it.
    pub fn command(&self, qemu: &Qemu) -> Command {
        let mut command = qemu.command();
        command.args(["-M", "q35", "-cpu", &self.cpu, "-smp", "1", "-m", &format!("{}M", self.memory >> 20)]);
        command.args(["-display", "none", "-nodefaults", "-no-reboot", "-monitor", "none"]);
        command.args(["-chardev", "stdio,id=serial,mux=off,signal=off", "-serial", "chardev:serial"]);
        match &self.disk {
            None => command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initrd),
            Some(disk) => command.arg("-drive").arg(format!("file={},format=raw", disk.display())),
        };
        command.args(&self.extra);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command
    }
}
