//! Linux boots: on the hypervisor, and on the bare machine to prove that what was fetched and packed is good.

use anyhow::{Result, ensure};
use entresol_wire::config::Arch;

use super::Context;
use super::machine::{Builder, Machine};
use crate::bundle::{self, linux};
use crate::initrd::{self, Initrd};

/// An unmodified Debian kernel on the hypervisor answers at its shell and powers off by PSCI.
pub fn linux_boots_to_shell(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "linux_boots_to_shell")?;
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    let mut vm = linux("debian", &context.guest.kernel()?, &initrd);
    vm.vcpus = Some(2);
    use_the_shell(builder.boot(vec![vm])?)
}

/// The same without the hypervisor.
pub fn bare_linux_boots_to_shell(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "bare_linux_boots_to_shell")?;
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    use_the_shell(builder.boot_bare(&context.guest.kernel()?, Some(&initrd), "console=ttyAMA0")?)
}

fn use_the_shell(mut machine: Machine) -> Result<()> {
    machine.expect(initrd::READY)?;
    let uname = machine.shell("uname -sm")?;
    ensure!(uname == "Linux aarch64", "uname says {uname:?}");
    let cpus = machine.shell("nproc")?;
    ensure!(cpus == "2", "nproc says {cpus:?}");
    machine.shell("free -m | grep -q '^Mem:'")?;
    machine.type_line("exit")?;
    let log = machine.expect_power_off()?;
    ensure!(log.contains("reboot: Power down"), "the kernel did not say that it powers down");
    Ok(())
}

/// Two guests, each with a disk of its own; each reads its own and nothing else.
pub fn two_guests_run_side_by_side(context: &Context) -> Result<()> {
    side_by_side(Builder::new(context, "two_guests_run_side_by_side")?)
}

/// The same on x86-64, each with two CPUs.
pub fn x86_two_guests_run_side_by_side(context: &Context) -> Result<()> {
    side_by_side(Builder::new(context, "x86_two_guests_run_side_by_side")?.on(Arch::X86))
}

fn side_by_side(builder: Builder<'_>) -> Result<()> {
    let mut vms = Vec::new();
    for name in ["one", "two"] {
        let script = "set -e\ncd /tmp\nhead -c 3 /dev/vda > name\necho \"disk of $(cat name)\"\n\
                      dd if=/dev/urandom of=random bs=1M count=16 2>/dev/null\n\
                      dd if=random of=/dev/vda bs=1M seek=1 2>/dev/null\nsync\necho 3 > /proc/sys/vm/drop_caches\n\
                      dd if=/dev/vda bs=1M skip=1 count=16 2>/dev/null | cmp - random && echo \"$(cat name) is intact\"\n";
        let initrd = builder.initrd(&format!("{name}.cpio"), &Initrd::scripted(script))?;
        let mut disk = name.as_bytes().to_vec();
        disk.resize(17 << 20, 0);
        let mut vm = builder.linux(name, &initrd)?;
        vm.vcpus = Some(2);
        vm.disks.push(bundle::disk(&builder.file(&format!("{name}.img"), &disk)?));
        vms.push(vm);
    }
    let mut machine = builder.boot(vms)?;
    machine.expect("one is intact")?;
    // Ctrl-] n: the hypervisor shows what the next guest has printed meanwhile.
    machine.send(b"\x1dn")?;
    machine.expect("two is intact")?;
    machine.expect_power_off().map(drop)
}

/// A script sees its drivers and a disk, its status is reported, and the machine ends by itself.
pub fn bare_linux_runs_a_script(context: &Context) -> Result<()> {
    let script = "set -e\ndd if=/dev/hwrng of=/dev/null bs=16 count=1 2>/dev/null\nhead -c 5 /dev/vda\nexit 7\n";
    let builder = Builder::new(context, "bare_linux_runs_a_script")?;
    let initrd = builder.initrd("initrd.cpio", &Initrd::scripted(script))?;
    let mut sector = b"disk!".to_vec();
    sector.resize(512, 0);
    let disk = builder.file("disk.img", &sector)?;
    let drive = format!("file={},format=raw,if=none,id=disk,readonly=on", disk.to_string_lossy().replace(',', ",,"));
    let builder =
        builder.qemu(&["-device", "virtio-rng-device", "-drive", &drive, "-device", "virtio-blk-device,drive=disk"]);
    let mut machine = builder.boot_bare(&context.guest.kernel()?, Some(&initrd), "console=ttyAMA0")?;
    machine.expect("disk!")?;
    machine.expect(&format!("{}7", initrd::SCRIPT_EXIT))?;
    machine.expect_power_off().map(drop)
}
