//! Kernel files of every kind, and what is refused before anything starts.

use std::fs;
use std::io::Write;

use anyhow::{Result, ensure};
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
    let mut vm = WrittenVm { name: "u-boot".to_owned(), memory: "512M".to_owned(), ..WrittenVm::default() };
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

/// The host tool refuses what the owner got wrong, each with the field, the value and the rule.
pub fn bad_input_is_named(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "bad_input_is_named")?;
    let kernel = guests::flat("smp")?;
    let words = builder.file("words.txt", b"not a kernel\n")?;
    let large = builder.file("large.bin", &vec![0; 65 << 20])?;
    let vm = |change: &dyn Fn(&mut WrittenVm)| {
        let mut vm = program("vm", &kernel, "");
        change(&mut vm);
        vec![vm]
    };
    let twice = [vm(&|_| {}), vm(&|_| {})].concat();
    let cases = [
        (
            "a missing file",
            vm(&|vm| vm.kernel = text(&words.with_file_name("nowhere"))),
            "must be a file that can be read",
        ),
        ("no kernel", vm(&|vm| vm.kernel = text(&words)), "not a kernel: a text file"),
        ("a large kernel", vm(&|vm| vm.kernel = text(&large)), "must fit into the VM's memory"),
        ("odd memory", vm(&|vm| vm.memory = "63M".into()), "must be a multiple of 2M"),
        ("much memory", vm(&|vm| vm.memory = "5G".into()), "must be at most the machine's"),
        ("no vCPU", vm(&|vm| vm.vcpus = Some(0)), "must be from 1 to 8"),
        ("nine vCPUs", vm(&|vm| vm.vcpus = Some(9)), "must be from 1 to 8"),
        ("a name twice", twice, "must differ from every other VM's name"),
    ];
    for (what, vms, rule) in cases {
        let refused = bundle::check(bundle::written("4G", 2, vms)).and_then(|loaded| {
            let path = builder.file("never.img", &[])?;
            bundle::pack(&loaded, &path)
        });
        let message = refused.err().map(|error| format!("{error:#}"));
        let named = message.as_deref().is_some_and(|message| message.contains(rule));
        ensure!(named, "{what} should be refused with {rule:?}, not {message:?}");
    }
    let file =
        builder.file("unknown.toml", b"[[vms]]\nname = \"a\"\nmemory = \"64M\"\nkernel = \"x\"\nkernal = \"y\"\n")?;
    let message = bundle::load(&file).err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(message.contains("unknown field `kernal`"), "an unknown key should be named, not {message:?}");
    Ok(())
}
