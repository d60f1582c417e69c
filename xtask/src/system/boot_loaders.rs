//! The hypervisor's image, started by each kind of boot loader: a flat `Image` by U-Boot, an EFI application by EDK2. By
//! QEMU's own loader it is started in every other test.
//!
//! All of them get image and bundle where QEMU offers them to firmware, as `-kernel` and `-initrd` (fw_cfg).

use anyhow::{Result, ensure};

use super::Context;
use super::machine::{Builder, Machine};
use crate::bundle::linux;
use crate::initrd::{self, Initrd};

/// Addresses in the outer machine's RAM where U-Boot has nothing, and where QEMU itself would not put them.
const IMAGE_AT: u64 = 0x5a20_0000;
const BUNDLE_AT: u64 = 0x6000_0000;

/// U-Boot loads both where it is told to, and starts the image by the boot protocol of Linux.
pub fn u_boot_starts_the_hypervisor(context: &Context) -> Result<()> {
    let firmware = context.guest.u_boot().to_string_lossy().into_owned();
    let builder = Builder::new(context, "u_boot_starts_the_hypervisor")?.qemu(&["-bios", &firmware]);
    let mut machine = boot(context, builder)?;
    // Its serial line is set up when this is printed: what is typed now is there when it asks for a key.
    machine.expect("U-Boot 20")?;
    machine.type_line("")?;
    machine.expect("=> ")?;
    machine.type_line(&format!("qfw load {IMAGE_AT:#x} {BUNDLE_AT:#x}"))?;
    machine.expect(" initrd ")?;
    machine.expect(" size ")?;
    let size = machine.expect("\n")?;
    machine.expect("=> ")?;
    machine.type_line(&format!("booti {IMAGE_AT:#x} {BUNDLE_AT:#x}:{} ${{fdtcontroladdr}}", size.trim()))?;
    machine.expect("Starting kernel ...")?;
    use_the_guest(machine)
}

/// EDK2 starts the image as an EFI application, hands the bundle over by LoadFile2, and is gone afterwards.
pub fn edk2_starts_the_hypervisor(context: &Context) -> Result<()> {
    let firmware = context.guest.edk2().to_string_lossy().into_owned();
    let builder = Builder::new(context, "edk2_starts_the_hypervisor")?;
    // With ACPI, EDK2 keeps the device tree to itself.
    use_the_guest(boot(context, builder.qemu(&["-machine", "acpi=off", "-bios", &firmware]))?)
}

/// EDK2 at EL1, or without a device tree, is told why, and goes on.
pub fn edk2_that_cannot_carry_it_is_refused(context: &Context) -> Result<()> {
    let firmware = context.guest.edk2().to_string_lossy().into_owned();
    for (name, machine, reason) in [
        ("edk2_at_el1", "acpi=off,virtualization=off", "PANIC: entered at EL1"),
        ("edk2_with_acpi", "acpi=on", "PANIC: the firmware has no device tree"),
    ] {
        let builder = Builder::new(context, name)?;
        let mut machine = boot(context, builder.qemu(&["-machine", machine, "-bios", &firmware]))?;
        let before = machine.expect(reason)?;
        ensure!(!before.contains("entresol 0"), "the hypervisor had started before it was refused");
        machine.expect("END OF PANIC")?;
        machine.expect("BdsDxe: failed to")?;
    }
    Ok(())
}

fn boot(context: &Context, builder: Builder<'_>) -> Result<Machine> {
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    builder.boot(vec![linux("debian", &context.guest.kernel()?, &initrd)])
}

/// The guest has its memory, the time of the outer machine's clock, and an end.
fn use_the_guest(mut machine: Machine) -> Result<()> {
    machine.expect(initrd::READY)?;
    let uname = machine.shell("uname -sm")?;
    ensure!(uname == "Linux aarch64", "uname says {uname:?}");
    let year: u32 = machine.shell("date +%Y")?.parse()?;
    ensure!(year >= 2024, "it is the year {year}: the clock was not found");
    machine.type_line("exit")?;
    machine.expect_power_off().map(drop)
}
