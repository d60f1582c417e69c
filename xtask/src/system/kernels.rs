//! Kernel files of every kind, and what is refused before anything starts.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use entresol_wire::config::{UnclaimedMmio, WrittenVm};

use super::Context;
use super::machine::{Builder, Machine};
use crate::bundle::{self, disk, linux, program};
use crate::guests;
use crate::initrd::{self, Initrd};

const SECTOR: u64 = 512;
/// Byte of the disk at which the initial file system begins; the kernel is at its start.
const INITRD_AT: u64 = 64 << 20;

/// A gzip'd `Image` boots like a plain one, which every other test starts.
pub fn gzipped_kernel_boots(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "gzipped_kernel_boots")?;
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(&fs::read(context.guest.kernel()?)?)?;
    let kernel = builder.file("Image.gz", &packed.finish()?)?;
    let mut machine = builder.boot(vec![linux("gzip", &kernel, &initrd)])?;
    machine.expect(initrd::READY)?;
    ensure!(machine.shell("uname -s")? == "Linux", "it is another system");
    machine.type_line("exit")?;
    machine.expect_power_off().map(drop)
}

/// U-Boot, as a flat binary and as an ELF file, reaches its prompt; it boots Linux from a virtio disk.
pub fn u_boot_as_guest_boots_linux(context: &Context) -> Result<()> {
    let flat = context.guest.u_boot();
    let mut machine =
        u_boot(context, "u_boot_elf", WrittenVm { kernel: text(&flat.with_file_name("uboot.elf")), ..guest() })?;
    machine.type_line("poweroff")?;
    machine.expect_power_off()?;

    let builder = Builder::new(context, "u_boot_disk")?;
    let initrd = Initrd::interactive().pack(&context.guest)?;
    let kernel = fs::read(context.guest.kernel()?)?;
    let mut image = kernel.clone();
    image.resize(INITRD_AT as usize, 0);
    image.extend_from_slice(&initrd);
    image.resize(image.len().next_multiple_of(SECTOR as usize), 0);
    let image = builder.file("disk.img", &image)?;
    let vm = WrittenVm { kernel: text(&flat), disks: vec![disk(&image)], ..guest() };
    let mut machine = u_boot(context, "u_boot_as_guest_boots_linux", vm)?;
    let sectors = |bytes: usize| (bytes as u64).div_ceil(SECTOR);
    for command in [
        "virtio scan".to_owned(),
        format!("virtio read 0x44000000 0 {:#x}", sectors(kernel.len())),
        format!("virtio read 0x50000000 {:#x} {:#x}", INITRD_AT / SECTOR, sectors(initrd.len())),
        "setenv bootargs console=ttyAMA0".to_owned(),
    ] {
        machine.type_line(&command)?;
        machine.expect("=> ")?;
    }
    machine.type_line(&format!("booti 0x44000000 0x50000000:{:x} ${{fdtcontroladdr}}", initrd.len()))?;
    machine.expect(initrd::READY)?;
    ensure!(machine.shell("uname -s")? == "Linux", "it is another system");
    machine.type_line("exit")?;
    machine.expect_power_off().map(drop)
}

fn text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A VM for U-Boot. It looks for its settings in a flash that is not there.
fn guest() -> WrittenVm {
    let mut vm = WrittenVm { name: "u-boot".to_owned(), memory: "512M".into(), ..WrittenVm::default() };
    vm.policies.unclaimed_mmio = UnclaimedMmio::ReadAsZero;
    vm
}

/// Starts U-Boot and stops it at its prompt.
fn u_boot(context: &Context, name: &str, vm: WrittenVm) -> Result<Machine> {
    let mut machine = Builder::new(context, name)?.boot(vec![vm])?;
    machine.expect("U-Boot 20")?;
    machine.type_line("")?;
    machine.expect("=> ")?;
    Ok(machine)
}

/// The hypervisor believes no bundle: cut off or altered, it is refused by name, and nothing starts.
pub fn damaged_bundles_start_nothing(context: &Context) -> Result<()> {
    let kernel = guests::flat("smp")?;
    let builder = Builder::new(context, "damaged_bundles_start_nothing")?;
    let path = builder.file("whole.img", &[])?;
    bundle::pack(&bundle::check(bundle::written("4G", 2, vec![program("vm", &kernel, "")]))?, &path)?;
    let whole = fs::read(&path)?;
    let mut altered = whole.clone();
    altered[whole.len() / 2] ^= 1;
    for (name, bytes) in [("cut_off", &whole[..whole.len() - 1]), ("headless", &whole[..40]), ("altered", &altered[..])]
    {
        Builder::new(context, name)?.boot_packed(bytes)?.expect_refusal("boot bundle: ")?;
    }
    Ok(())
}

/// More memory than there is: the hypervisor believes the machine, and not what the bundle says of it.
pub fn memory_of_another_machine_starts_nothing(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "memory_of_another_machine_starts_nothing")?.outer("512M", 2);
    let path = builder.file("whole.img", &[])?;
    let mut vm = program("vm", &guests::flat("smp")?, "");
    vm.memory = "1G".into();
    bundle::pack(&bundle::check(bundle::written("4G", 2, vec![vm]))?, &path)?;
    let machine = builder.boot_packed(&fs::read(&path)?)?;
    machine.expect_refusal("vm vm: memory = 1G: must be at most the machine's: ")
}

/// What `cargo xtask run` says to each mistake of an owner; the field, the value and the rule, and nothing is started.
pub fn bad_input_is_named(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "bad_input_is_named")?;
    builder.file("words.txt", b"not a kernel\n")?;
    builder.file("large.bin", &vec![0; 65 << 20])?;
    builder.file("good.bin", &fs::read(guests::flat("smp")?)?)?;
    let good = "name = \"vm\"\nmemory = \"64M\"\nkernel = \"good.bin\"\n";
    let vm = |from: &str, to: &str| format!("[[vms]]\n{}", good.replace(from, to));
    let kernel = |file: &str| vm("good.bin", file);
    let memory = |size: &str| vm("64M", size);
    let vcpus = |count: &str| vm("name", &format!("vcpus = {count}\nname"));
    let cases = [
        ("nowhere", kernel("nowhere"), "vms[0].kernel = \"nowhere\": must be a file that can be read"),
        ("words", kernel("words.txt"), "vms[0].kernel = \"words.txt\": not a kernel: a text file"),
        ("large", kernel("large.bin"), "vms[0].kernel = \"large.bin\": must fit into the VM's memory"),
        ("odd", memory("63M"), "vms[0].memory = 63M: must be a multiple of 2M"),
        ("much", memory("5G"), "vms[0].memory = 5G: must be at most the machine's: outer.memory = 4G"),
        ("none", vcpus("0"), "vms[0].vcpus = 0: must be from 1 to 8"),
        ("nine", vcpus("9"), "vms[0].vcpus = 9: must be from 1 to 8"),
        ("twice", vm("", "") + &vm("", ""), "vms[1].name = \"vm\": must differ from every other VM's name"),
        ("unknown", vm("name", "kernal = \"x\"\nname"), "unknown field `kernal`"),
    ];
    for (name, toml, message) in cases {
        let file = builder.file(&format!("{name}.toml"), toml.as_bytes())?;
        let socket = file.with_extension("sock");
        let program = std::env::current_exe().context("cannot tell which program this is")?;
        let mut run = Command::new(program);
        run.args(["run", "--config"]).arg(&file).env("ENTRESOL_SOCKET", &socket).stdin(Stdio::null());
        let output = run.output().context("cannot start this program again")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success(), "{name} is taken");
        ensure!(said.contains(message), "{name} should be refused with {message:?}, not {said:?}");
        ensure!(output.stdout.is_empty() && !said.contains("booting"), "{name} has started something: {said}");
    }
    Ok(())
}
