//! The outer machine with Intel's VMX: a PC of Bochs, which starts from a disk.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Result;

use crate::boot_disk;
use crate::fetch::Bochs;
use crate::image;

/// Processors of Bochs with VMX and EPT.
pub const HASWELL: &str = "corei7_haswell_4770";

/// Instructions in a second of the machine: its clocks count instructions, so that it is the same machine on every host.
const SPEED: u32 = 50_000_000;

/// The outer machine's serial line is Bochs's standard output.
#[derive(Clone, Copy, Debug)]
pub struct OuterBochs<'a> {
    /// Bochs's name of the processor.
    pub cpu: &'a str,
    /// Bytes of memory.
    pub memory: u64,
    /// An ELF file with a multiboot2 header.
    pub hypervisor: &'a Path,
    /// The boot bundle.
    pub bundle: &'a Path,
}

impl OuterBochs<'_> {
    /// The command, with piped standard input and output; its files are in `folder`.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn command(&self, bochs: &Bochs, folder: &Path) -> Result<Command> {
        let disk = boot_disk::write(bochs, self.hypervisor, self.bundle, folder)?;
        let (configuration, commands) = (folder.join("bochsrc"), folder.join("bochs.commands"));
        image::write_new(&configuration, self.configuration(bochs, &disk, &folder.join("bochs.log")).as_bytes())?;
        // Debian's is built with a debugger, which waits to be told to go on.
        image::write_new(&commands, b"c\n")?;
        let mut command = bochs.command();
        command.arg("-q").arg("-f").arg(&configuration).arg("-rc").arg(&commands);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        Ok(command)
    }

    fn configuration(&self, bochs: &Bochs, disk: &Path, log: &Path) -> String {
        let [bios, vga_bios] = bochs.firmware();
        let (cpu, mib, disk, log) = (self.cpu, self.memory >> 20, disk.display(), log.display());
        let lines = [
            "config_interface: textconfig".to_owned(),
            "display_library: sdl2".to_owned(),
            format!("romimage: file=\"{}\"", bios.display()),
            format!("vgaromimage: file=\"{}\"", vga_bios.display()),
            "plugin_ctrl: unmapped=true, biosdev=true, speaker=false, parallel=false, serial=true, gameport=false"
                .to_owned(),
            format!("cpu: model={cpu}, count=1, ips={SPEED}, reset_on_triple_fault=0, ignore_bad_msrs=0"),
            format!("memory: guest={mib}, host={mib}"),
            "clock: sync=none, time0=utc".to_owned(),
            "pci: enabled=1, chipset=i440fx".to_owned(),
            "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14".to_owned(),
            format!("ata0-master: type=disk, path=\"{disk}\", mode=flat, cylinders=0"),
            "boot: disk".to_owned(),
            "com1: enabled=1, mode=file, dev=/dev/stdout".to_owned(),
            format!("log: \"{log}\""),
            "panic: action=fatal".to_owned(),
            "error: action=report".to_owned(),
            "info: action=ignore".to_owned(),
            "debug: action=ignore".to_owned(),
        ];
        lines.join("\n") + "\n"
    }
}
