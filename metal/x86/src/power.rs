//! Power of the machine, through the registers that ACPI names (ACPI 6.5, 4.8.3.2 and 4.8.3.7).
//!
//! Protocol: [`init`] once, before anything can be refused; what it does not find makes [`off`] halt and say so. A register in memory
//! has to be mapped ([`register`]).

use acpi::AcpiTables;
use acpi::address::{AddressSpace, GenericAddress};
use acpi::fadt::Fadt;
use entresol_sync::Once;
use x86_64::instructions::port::Port;

use crate::tables::Identity;
use crate::{console, cpu, sleep};

/// PM1 control: SLP_TYP 12:10, SLP_EN 13.
const PM1_TYPE_SHIFT: u32 = 10;
const PM1_ENABLE: u16 = 1 << 13;
/// Sleep control of a machine without PM1: SLP_TYP 4:2, SLP_EN 5.
const CONTROL_TYPE_SHIFT: u32 = 2;
const CONTROL_ENABLE: u8 = 1 << 5;

/// What turns the machine off.
#[derive(Clone, Copy, Debug)]
enum Off {
    /// PM1 control.
    Pm1 { port: u16, value: u16 },
    /// Sleep control behind a port.
    Port { port: u16, value: u8 },
    /// Sleep control in memory.
    Memory { address: u64, value: u8 },
}

static OFF: Once<Off> = Once::new();

/// Learns how this machine is turned off.
pub(crate) fn init(tables: &AcpiTables<Identity>) {
    let Ok(fadt) = tables.find_table::<Fadt>() else { return };
    let Ok(dsdt) = tables.dsdt() else { return };
    // SAFETY: a table that ACPI names, of the size that its header states, mapped while `tables` are.
    let aml = unsafe { core::slice::from_raw_parts(dsdt.address as *const u8, dsdt.length as usize) };
    let Some(kind) = sleep::soft_off(aml) else { return };
    let fadt = fadt.get();
    let flags = fadt.flags;
    let found = if flags.system_is_hw_reduced_acpi() {
        fadt.sleep_control_register().ok().flatten().and_then(|register| sleep_control(register, kind))
    } else {
        fadt.pm1a_control_block().ok().and_then(|register| pm1(register, kind))
    };
    if let Some(off) = found {
        OFF.call_once(|| off);
    }
}

fn pm1(register: GenericAddress, kind: u8) -> Option<Off> {
    let port = u16::try_from(register.address).ok().filter(|port| *port != 0)?;
    let value = u16::from(kind) << PM1_TYPE_SHIFT | PM1_ENABLE;
    (register.address_space == AddressSpace::SystemIo).then_some(Off::Pm1 { port, value })
}

fn sleep_control(register: GenericAddress, kind: u8) -> Option<Off> {
    let (address, value) = (register.address, kind << CONTROL_TYPE_SHIFT | CONTROL_ENABLE);
    match register.address_space {
        AddressSpace::SystemMemory if address != 0 => Some(Off::Memory { address, value }),
        AddressSpace::SystemIo => Some(Off::Port { port: u16::try_from(address).ok()?, value }),
        _ => None,
    }
}

/// The register that [`off`] writes, if it is in memory.
pub(crate) fn register() -> Option<u64> {
    match OFF.get() {
        Some(Off::Memory { address, .. }) => Some(*address),
        _ => None,
    }
}

/// Turns the machine off.
pub fn off() -> ! {
    match OFF.get() {
        // SAFETY: PM1 control, which ACPI names; nothing runs after it.
        Some(Off::Pm1 { port, value }) => unsafe { Port::new(*port).write(*value) },
        // SAFETY: sleep control, which ACPI names; nothing runs after it.
        Some(Off::Port { port, value }) => unsafe { Port::new(*port).write(*value) },
        // SAFETY: as above; the start code's tables map it, and ours.
        Some(Off::Memory { address, value }) => unsafe { (*address as *mut u8).write_volatile(*value) },
        // Without the console's lock, since a panic may hold it.
        None => console::emergency(format_args!("ACPI does not say how this machine is turned off: halting\n")),
    }
    // It may take a moment.
    cpu::halt()
}
