//! The outer machine of x86-64: QEMU's `microvm` with a processor that has SVM, emulated; or its `q35`, where a disk is started from.
//!
//! `microvm` has ACPI's tables, I/O APIC, real-time clock and interval timer as a PC has, and virtio-mmio slots, which nothing
//! describes but the command line and a part of the DSDT that only an interpreter reads: all of them are named on the command line.

/// A processor of 40 physical bits, as far as TCG has it: it would warn of each feature that it has not.
pub const EPYC: &str = "EPYC,fxsr-opt=off,misalignsse=off,osvw=off,topoext=off,nrip-save=off,xsavec=off,xsaves=off,perfctr-core=off,\
                        clzero=off,ibpb=off";

/// With qboot, which leaves the end of memory to the boot bundle: the other firmware writes ACPI's tables there.
pub const MICROVM: [&str; 4] =
    ["-M", "microvm,acpi=on,isa-serial=on,rtc=on,pit=on,pic=off,pcie=off,ioapic2=off", "-bios", "qboot.rom"];
/// Its virtio-mmio slots (QEMU, hw/i386/microvm.c): how many, where, how large, and the I/O APIC's input of the first.
const SLOTS: u64 = 8;
const SLOTS_BASE: u64 = 0xfeb0_0000;
const SLOT: u64 = 512;
const SLOTS_INPUT: u64 = 16;

/// The virtio-mmio slots, as Linux lets a command line name them.
pub fn slots() -> String {
    let slot =
        |index: u64| format!("virtio_mmio.device={SLOT}@{:#x}:{}", SLOTS_BASE + index * SLOT, SLOTS_INPUT + index);
    (0..SLOTS).map(slot).collect::<Vec<_>>().join(" ")
}
