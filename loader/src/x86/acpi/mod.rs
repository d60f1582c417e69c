//! ACPI's tables for a machine with reduced hardware (ACPI 6.5, 5.2).
//!
//! Purpose: what a kernel must be told that it cannot probe: its CPUs and the I/O APIC (MADT), that there is no fixed hardware
//! and where the machine is switched off and reset (FADT), COM1 and the virtio transports (DSDT).
//!
//! Why ACPI, and not an MP table and `virtio_mmio.device=` on the command line as small hypervisors like it: Debian's amd64
//! kernels, the cloud ones too, are built without CONFIG_X86_MPPARSE and without CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES. They find
//! neither a second CPU nor a virtio device without ACPI, and they switch off and reset cleanly with it.
//!
//! Invariants: every table's checksum is right; all lie in [`map::ACPI_BASE`]..+[`map::ACPI_SIZE`], the root pointer first.

mod aml;

use alloc::vec::Vec;

use super::map;
use aml::Bytes;
pub(super) use aml::Full;

/// Bytes that are set aside: with all transports there are some 2,500.
const ROOM: usize = 4096;
const _: () = assert!(ROOM as u64 <= map::ACPI_SIZE);

/// Bytes of the header that all tables but the root pointer begin with.
const HEADER: usize = 36;
const RSDP: usize = 36;
/// The FADT of version 6.5 has 276 bytes.
const FADT: usize = 276;

/// FADT flags (5.2.9, table 5.10).
mod flags {
    pub const WBINVD: u32 = 1 << 0;
    /// Neither button is fixed hardware.
    pub const PWR_BUTTON: u32 = 1 << 4;
    pub const SLP_BUTTON: u32 = 1 << 5;
    pub const RESET_REG_SUP: u32 = 1 << 10;
    pub const HW_REDUCED_ACPI: u32 = 1 << 20;
}

/// IA-PC boot architecture flags (table 5.11): no keyboard controller, no VGA, no message-signalled interrupts.
const VGA_NOT_PRESENT: u16 = 1 << 2;
const MSI_NOT_SUPPORTED: u16 = 1 << 3;

/// The tables of a machine with `vcpus` CPUs, and the transports whose bits are set in `virtio`, for [`map::ACPI_BASE`].
pub(super) fn tables(vcpus: u8, virtio: u32) -> Result<Vec<u8>, Full> {
    let mut bytes = Bytes::new(ROOM)?;
    bytes.put(&[0; RSDP]);
    let dsdt = table(&mut bytes, b"DSDT", 2, |bytes| dsdt(bytes, virtio));
    let fadt = table(&mut bytes, b"FACP", 6, |bytes| fadt(bytes, dsdt));
    let madt = table(&mut bytes, b"APIC", 5, |bytes| madt(bytes, vcpus));
    let xsdt = table(&mut bytes, b"XSDT", 1, |bytes| {
        bytes.put(&fadt.to_le_bytes());
        bytes.put(&madt.to_le_bytes());
    });
    root(&mut bytes, xsdt);
    bytes.finish()
}

/// Appends a table; its address.
fn table(bytes: &mut Bytes, signature: &[u8; 4], revision: u8, body: impl FnOnce(&mut Bytes)) -> u64 {
    // Tables begin at multiples of 8.
    bytes.put(&[0; 8][..bytes.len().next_multiple_of(8) - bytes.len()]);
    let start = bytes.len();
    bytes.put(signature);
    bytes.put(&[0; 4]);
    bytes.put(&[revision, 0]);
    bytes.put(b"ENTRSLENTRESOL");
    bytes.put(&1u32.to_le_bytes());
    bytes.put(b"ENTR");
    bytes.put(&1u32.to_le_bytes());
    debug_assert_eq!(bytes.len() - start, HEADER);
    body(bytes);
    let length = (bytes.len() - start) as u32;
    bytes.set(start + 4, &length.to_le_bytes());
    let sum = sum(bytes.as_slice().get(start..).unwrap_or_default());
    bytes.set(start + 9, &[sum.wrapping_neg()]);
    map::ACPI_BASE + start as u64
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The root pointer (5.2.5.3), with a checksum over its first part and one over all.
fn root(bytes: &mut Bytes, xsdt: u64) {
    let mut root = [0; RSDP];
    root[..8].copy_from_slice(b"RSD PTR ");
    root[9..15].copy_from_slice(b"ENTRSL");
    root[15] = 2;
    root[20..24].copy_from_slice(&(RSDP as u32).to_le_bytes());
    root[24..32].copy_from_slice(&xsdt.to_le_bytes());
    root[8] = sum(&root[..20]).wrapping_neg();
    root[32] = sum(&root).wrapping_neg();
    bytes.set(0, &root);
}

/// A register in port space, one byte wide (5.2.3.2).
fn port(port: u16) -> [u8; 12] {
    let mut register = [0; 12];
    register[..4].copy_from_slice(&[1, 8, 0, 1]);
    register[4..6].copy_from_slice(&port.to_le_bytes());
    register
}

/// The fixed description table (5.2.9). Offsets are the manual's.
fn fadt(bytes: &mut Bytes, dsdt: u64) {
    let mut fadt = [0; FADT];
    let mut put = |at: usize, bytes: &[u8]| fadt[at..at + bytes.len()].copy_from_slice(bytes);
    let flags = flags::WBINVD | flags::PWR_BUTTON | flags::SLP_BUTTON | flags::RESET_REG_SUP | flags::HW_REDUCED_ACPI;
    put(109, &(VGA_NOT_PRESENT | MSI_NOT_SUPPORTED).to_le_bytes());
    put(112, &flags.to_le_bytes());
    put(116, &port(map::RESET_PORT));
    put(128, &[map::RESET_VALUE]);
    // Minor version 5.
    put(131, &[5]);
    put(140, &dsdt.to_le_bytes());
    put(244, &port(map::POWER_PORT));
    put(256, &port(map::POWER_PORT + 1));
    put(268, b"ENTRESOL");
    bytes.put(&fadt[HEADER..]);
}

/// The interrupt controllers (5.2.12): local APICs and x2APICs are one for identities below 255. No 8259s.
fn madt(bytes: &mut Bytes, vcpus: u8) {
    bytes.put(&(map::LAPIC_BASE as u32).to_le_bytes());
    bytes.put(&0u32.to_le_bytes());
    for vcpu in 0..vcpus {
        bytes.put(&[0, 8, vcpu, vcpu, 1, 0, 0, 0]);
    }
    bytes.put(&[1, 12, map::IOAPIC_ID, 0]);
    bytes.put(&(map::IOAPIC_BASE as u32).to_le_bytes());
    bytes.put(&0u32.to_le_bytes());
}

/// The devices, and that S5 switches the machine off.
fn dsdt(bytes: &mut Bytes, virtio: u32) {
    bytes.system_bus(|bytes| {
        bytes.device(*b"COM1", |bytes| {
            bytes.name(b"_HID").dword(aml::eisa(b"PNP0501"));
            bytes.name(b"_UID").dword(0);
            let ports = aml::io(map::COM1_PORT, map::COM1_PORTS as u8);
            bytes.name(b"_CRS").resources(&[&ports, &aml::interrupt(map::COM1_GSI)]);
        });
        for slot in (0..map::VIRTIO_SLOTS).filter(|slot| virtio >> slot & 1 != 0) {
            let digit = |value: u32| b"0123456789ABCDEF"[value as usize & 0xf];
            bytes.device([b'V', b'R', digit(slot >> 4), digit(slot)], |bytes| {
                bytes.name(b"_HID").string(b"LNRO0005");
                bytes.name(b"_UID").dword(slot);
                let base = map::VIRTIO_BASE + u64::from(slot) * map::VIRTIO_SIZE;
                let registers = aml::memory(base as u32, map::VIRTIO_SIZE as u32);
                bytes.name(b"_CRS").resources(&[&registers, &aml::interrupt(map::VIRTIO_GSI + slot)]);
            });
        }
    });
    bytes.name(b"_S5_").integers(&[map::SLEEP_OFF, map::SLEEP_OFF, 0, 0]);
}
