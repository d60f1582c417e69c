//! Firmware as a guest: code that runs in place from read-only memory, and keeps its settings in flash.

use std::io::{Cursor, Write};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use entresol_wire::config::{KernelFormat, ReadOnlyStore, UnclaimedMmio, WrittenRom, WrittenVm};

use super::Context;
use super::machine::{Builder, Machine};
use super::owner::Owner;
use crate::bundle::disk;
use crate::initrd::{self, Initrd};

/// A variable of nobody's in EDK2, and what it is set to: UTF-16, as its shell dumps it.
const VARIABLE: &str = "setvar Entresol -guid 6b657074-0000-4000-8000-656e7472736c";
const KEPT: &str = "6B 00 65 00 70 00 74 00";
/// Where the file lies that two guests share: behind U-Boot, in the first bank.
const ROM_AT: u64 = 0x0100_0000;

/// A VM that starts `firmware` in place, with empty flash of `flash`.
fn guest(name: &str, firmware: &Path, flash: &Path) -> WrittenVm {
    WrittenVm {
        name: name.to_owned(),
        memory: "512M".into(),
        kernel: text(firmware),
        kernel_format: Some(KernelFormat::Firmware),
        flash: Some(text(flash)),
        ..WrittenVm::default()
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A FAT file system with these files, and room for little more.
fn fat(files: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    let bytes: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    let mut image = Cursor::new(vec![0; (bytes + (4 << 20)).next_multiple_of(1 << 20)]);
    fatfs::format_volume(&mut image, fatfs::FormatVolumeOptions::new())?;
    let system = fatfs::FileSystem::new(&mut image, fatfs::FsOptions::new())?;
    for (name, bytes) in files {
        system.root_dir().create_file(name)?.write_all(bytes).with_context(|| format!("cannot write {name}"))?;
    }
    system.unmount()?;
    Ok(image.into_inner())
}

/// EDK2 runs from ROM, whose stores it expects to be ignored, and formats its flash; a variable survives a reset; Linux, an EFI
/// application on a virtio disk, boots from its shell and uses its runtime services.
pub fn edk2_as_guest_keeps_variables_and_boots_linux(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "edk2_as_guest")?;
    let initrd = Initrd::interactive().pack(&context.guest)?;
    let kernel = std::fs::read(context.guest.kernel()?)?;
    let image = builder.file("disk.img", &fat(&[("linux.efi", &kernel), ("initrd.cpio", &initrd)])?)?;
    let flash = builder.file("flash.img", &vec![0; 1 << 20])?;
    let vm = WrittenVm { disks: vec![disk(&image)], ..guest("edk2", &context.guest.edk2(), &flash) };
    let mut machine = builder.boot(vec![vm])?;
    let shell = |machine: &mut Machine| {
        machine.expect("UEFI firmware")?;
        machine.expect("to skip")?;
        machine.send(b"\x1b")?;
        machine.expect("Shell> ")
    };
    shell(&mut machine)?;
    type_keys(&mut machine, &format!("{VARIABLE} -bs -rt -nv =L\"kept\""))?;
    machine.expect("Shell> ")?;
    type_keys(&mut machine, "reset")?;
    shell(&mut machine)?;
    type_keys(&mut machine, VARIABLE)?;
    let shown = machine.expect("Shell> ")?;
    ensure!(shown.contains(KEPT), "the variable is not what it was set to: {shown:?}");
    type_keys(&mut machine, "fs0:linux.efi initrd=\\initrd.cpio console=ttyAMA0")?;
    machine.expect(initrd::READY)?;
    ensure!(machine.shell("uname -s")? == "Linux", "it is another system");
    machine.shell("dmesg | grep 'Remapping and enabling EFI services'")?;
    machine.type_line("exit")?;
    machine.expect_power_off().map(drop)
}

/// Types a line as a terminal does: the shell's own end of line is a carriage return.
fn type_keys(machine: &mut Machine, line: &str) -> Result<()> {
    machine.send(format!("{line}\r").as_bytes())
}

/// Two U-Boots run from one copy of their code and read one copy of a file; a store to it is what each one's policy says; what
/// one writes to its flash survives its reset, and is not the other's.
pub fn firmware_shares_rom_and_keeps_its_flash(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "firmware_shares_rom_and_keeps_its_flash")?;
    let rom = builder.file("rom.img", b"one copy for all, and nothing behind it")?;
    let flash = builder.file("flash.img", &vec![0xff; 512 << 10])?;
    let vms = ["first", "second"].map(|name| {
        let rom = WrittenRom { file: text(&rom), at: ROM_AT as i64 };
        let mut vm = WrittenVm { roms: vec![rom], ..guest(name, &context.guest.u_boot(), &flash) };
        vm.policies.unclaimed_mmio = UnclaimedMmio::ReadAsZero;
        vm
    });
    let [mut first, mut second] = vms;
    first.policies.read_only_store = ReadOnlyStore::Ignore;
    second.policies.read_only_store = ReadOnlyStore::Abort;
    second.autostart = Some(false);
    let mut machine = builder.boot(vec![first, second])?;
    prompt(&mut machine)?;
    let read = format!("md.b {ROM_AT:#x} 30");
    ensure!(command(&mut machine, &read)?.contains("one copy for all"), "the file is not there");
    command(&mut machine, &format!("mw.l {ROM_AT:#x} 0"))?;
    let after = command(&mut machine, &read)?;
    ensure!(after.contains("one copy for all"), "a store changed the file: {after}");
    command(&mut machine, "setenv settings kept")?;
    let saved = command(&mut machine, "saveenv")?;
    ensure!(saved.contains("OK"), "the settings are not saved: {saved}");
    machine.type_line("reset")?;
    prompt(&mut machine)?;
    ensure!(command(&mut machine, "printenv settings")?.contains("settings=kept"), "the settings did not survive");

    let mut owner = Owner::of(&mut machine)?;
    a_copy_has_its_own(&mut machine, &mut owner)?;
    let objects = |owner: &mut Owner, vm: &str, base: u64| -> Result<(u64, String)> {
        let slot = owner.slots(vm)?.into_iter().find(|slot| slot.base == base);
        let slot = slot.with_context(|| format!("{vm} has no slot at {base:#x}"))?;
        ensure!(slot.flags == ["read-only"], "{vm}: the slot at {base:#x} is {:?}", slot.flags);
        Ok((slot.object, slot.kind.into_owned()))
    };
    for (base, kind, shared) in [(0, "rom", true), (ROM_AT, "rom", true), (0x0400_0000, "anonymous", false)] {
        let (one, other) = (objects(&mut owner, "first", base)?, objects(&mut owner, "second", base)?);
        ensure!(one.1 == kind && other.1 == kind, "objects at {base:#x}: {one:?} and {other:?}, not {kind}");
        ensure!((one.0 == other.0) == shared, "objects at {base:#x}: {one:?} and {other:?}");
    }
    // Ctrl-] n: the second's turn on the console.
    machine.send(b"\x1dn")?;
    owner.resume("second")?;
    drop(owner);
    prompt(&mut machine)?;
    let other = command(&mut machine, "printenv settings")?;
    ensure!(other.contains("not defined"), "the second guest sees the first one's settings: {other}");
    machine.type_line(&format!("mw.l {ROM_AT:#x} 0"))?;
    machine.expect("\"Synchronous Abort\" handler")?;
    prompt(&mut machine)?;
    machine.type_line("poweroff")?;
    machine.send(b"\x1d1")?;
    machine.type_line("poweroff")?;
    machine.expect_power_off().map(drop)
}

/// A copy of the first guest, on the third console, has its settings, and keeps others over a reset from then on.
fn a_copy_has_its_own(machine: &mut Machine, owner: &mut Owner) -> Result<()> {
    owner.fork("first", "copy")?;
    for (console, words) in [(&b"\x1d3"[..], "the-copy"), (b"\x1d1", "kept")] {
        machine.send(console)?;
        // What was said before is shown again.
        machine.type_line(&format!("echo turned to {words}"))?;
        machine.expect(&format!("\nturned to {words}"))?;
        machine.expect("=> ")?;
        if words != "kept" {
            ensure!(command(machine, "printenv settings")?.contains("settings=kept"), "the copy lost its settings");
            command(machine, &format!("setenv settings {words}"))?;
            ensure!(command(machine, "saveenv")?.contains("OK"), "the copy's settings are not saved");
        }
        machine.type_line("reset")?;
        prompt(machine)?;
        let found = command(machine, "printenv settings")?;
        ensure!(found.contains(&format!("settings={words}")), "{found:?}, not {words}");
    }
    owner.kill("copy")
}

/// U-Boot's prompt, from its start.
fn prompt(machine: &mut Machine) -> Result<()> {
    machine.expect("U-Boot 20")?;
    machine.type_line("")?;
    machine.expect("=> ").map(drop)
}

/// What U-Boot says to a command.
fn command(machine: &mut Machine, line: &str) -> Result<String> {
    machine.type_line(line)?;
    machine.expect("=> ")
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_disk_holds_its_files() {
        let large: Vec<u8> = (0..3 << 20).map(|at: u32| (at / 251) as u8).collect();
        let image = fat(&[("linux.efi", &large), ("initrd.cpio", b"small")]).unwrap();
        assert!(image.len().is_multiple_of(512));
        let system = fatfs::FileSystem::new(Cursor::new(image), fatfs::FsOptions::new()).unwrap();
        let mut read = Vec::new();
        system.root_dir().open_file("linux.efi").unwrap().read_to_end(&mut read).unwrap();
        assert!(read == large);
    }
}
