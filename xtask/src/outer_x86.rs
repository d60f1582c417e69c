//! The outer machine of x86-64: QEMU's `microvm` with a processor that has SVM, emulated; or its `q35`, where a disk is started from.
//!
//! `microvm` has ACPI's tables, I/O APIC, real-time clock and interval timer as a PC has, and virtio-mmio slots, which nothing
//! describes but the command line and a part of the DSDT that only an interpreter reads: all of them are named on the command line.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::fetch::Qemu;
use crate::outer::{control, disk};

/// A processor of 40 physical bits, as far as TCG has it: it would warn of each feature that it has not.
pub const EPYC: &str = "EPYC,fxsr-opt=off,misalignsse=off,osvw=off,topoext=off,nrip-save=off,xsavec=off,xsaves=off,perfctr-core=off,\
                        clzero=off,ibpb=off";

/// With qboot, which leaves the end of memory to the boot bundle: the other firmware writes ACPI's tables there.
const MICROVM: [&str; 4] =
    ["-M", "microvm,acpi=on,isa-serial=on,rtc=on,pit=on,pic=off,pcie=off,ioapic2=off", "-bios", "qboot.rom"];
/// Its virtio-mmio slots (QEMU, hw/i386/microvm.c): how many, where, how large, and the I/O APIC's input of the first.
const SLOTS: u64 = 8;
const SLOTS_BASE: u64 = 0xfeb0_0000;
const SLOT: u64 = 512;
const SLOTS_INPUT: u64 = 16;

/// The outer machine's serial line is QEMU's standard input and output.
#[derive(Clone, Debug)]
pub struct OuterX86 {
    /// QEMU's name of the processor, with its properties.
    pub cpu: String,
    /// CPUs.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// An ELF file with a PVH entry.
    pub kernel: PathBuf,
    /// The boot bundle.
    pub initrd: PathBuf,
    /// A disk to start a PC from in their place ([`crate::boot_disk`]); such a machine has no virtio-mmio slots.
    pub disk: Option<PathBuf>,
    /// Unix socket of the control channel.
    pub control: Option<PathBuf>,
    /// A disk image that is the hypervisor's store.
    pub store: Option<PathBuf>,
    /// Arguments of one command only.
    pub extra: Vec<String>,
}

impl OuterX86 {
    /// A machine of the usual size: 2 CPUs, 1 GiB.
    pub fn new(kernel: &Path, initrd: &Path) -> Self {
        Self {
            cpu: EPYC.to_owned(),
            cpus: 2,
            memory: 1 << 30,
            kernel: kernel.to_owned(),
            initrd: initrd.to_owned(),
            disk: None,
            control: None,
            store: None,
            extra: Vec::new(),
        }
    }

    /// The command, with piped standard input and output; it is killed by whoever waits for it.
    pub fn command(&self, qemu: &Qemu) -> Command {
        let mut command = qemu.command();
        let (cpus, memory) = (self.cpus.to_string(), format!("{}M", self.memory >> 20));
        command.args(["-cpu", &self.cpu, "-smp", &cpus, "-m", &memory]);
        command.args(["-display", "none", "-nodefaults", "-no-reboot", "-monitor", "none"]);
        command.args(["-chardev", "stdio,id=serial,mux=off,signal=off", "-serial", "chardev:serial"]);
        match &self.disk {
            None => self.microvm(&mut command),
            Some(disk) => {
                command.args(["-M", "q35", "-drive"]).arg(format!("file={},format=raw", disk.display()));
            }
        }
        command.args(&self.extra);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command
    }

    fn microvm(&self, command: &mut Command) {
        command.args(MICROVM).args(["-global", "virtio-mmio.force-legacy=false"]);
        command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initrd).args(["-append", &slots()]);
        if let Some(socket) = &self.control {
            command.args(control(socket));
        }
        if let Some(store) = &self.store {
            command.args(disk(store, "entresol-store"));
        }
    }
}

/// The virtio-mmio slots, as Linux lets a command line name them.
fn slots() -> String {
    let slot =
        |index: u64| format!("virtio_mmio.device={SLOT}@{:#x}:{}", SLOTS_BASE + index * SLOT, SLOTS_INPUT + index);
    (0..SLOTS).map(slot).collect::<Vec<_>>().join(" ")
}
