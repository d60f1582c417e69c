//! Power of the machine, through ACPI's fixed hardware (ACPI 6.5, 4.8.3.2).
//!
//! Protocol: [`init`] once, before anything can be refused; what it does not find makes [`off`] halt and say so.

use core::ptr::NonNull;

use acpi::fadt::Fadt;
use acpi::{AcpiHandler, AcpiTables, PhysicalMapping};
use entresol_sync::atomic::{AtomicU32, Ordering};
use x86_64::instructions::port::Port;

use crate::console::Emergency;
use crate::{cpu, sleep};

/// PM1 control: SLP_TYP 12:10, SLP_EN 13.
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_ENABLE: u16 = 1 << 13;

/// What to write (31:16) and where (15:0); 0: unknown.
static OFF: AtomicU32 = AtomicU32::new(0);

/// ACPI's tables where they are.
#[derive(Clone, Copy)]
struct Identity;

impl AcpiHandler for Identity {
    unsafe fn map_physical_region<T>(&self, address: usize, size: usize) -> PhysicalMapping<Self, T> {
        let start = NonNull::new(address as *mut T).expect("no table is at 0");
        // SAFETY: the first 4 GiB are mapped where they are while tables are read, and nobody writes to them.
        unsafe { PhysicalMapping::new(address, start, size, size, *self) }
    }

    fn unmap_physical_region<T>(_region: &PhysicalMapping<Self, T>) {}
}

/// Learns how this machine is turned off.
///
/// # Safety
///
/// `rsdp` is where the loader says that ACPI's root pointer is, and the first 4 GiB are mapped where they are.
pub(crate) unsafe fn init(rsdp: u64) {
    // SAFETY: as the caller promises.
    let tables = unsafe { AcpiTables::from_rsdp(Identity, rsdp as usize) };
    let Ok(tables) = tables else { return };
    let Ok(fadt) = tables.find_table::<Fadt>() else { return };
    let (Ok(control), Ok(dsdt)) = (fadt.pm1a_control_block(), tables.dsdt()) else { return };
    // SAFETY: a table that ACPI names, of the size that its header states.
    let aml = unsafe { core::slice::from_raw_parts(dsdt.address as *const u8, dsdt.length as usize) };
    let io = control.address_space == acpi::address::AddressSpace::SystemIo;
    if let (true, Some(kind), Ok(port)) = (io, sleep::soft_off(aml), u16::try_from(control.address)) {
        let value = u16::from(kind) << SLEEP_TYPE_SHIFT | SLEEP_ENABLE;
        OFF.store(u32::from(value) << 16 | u32::from(port), Ordering::Relaxed);
    }
}

/// Turns the machine off.
pub fn off() -> ! {
    let off = OFF.load(Ordering::Relaxed);
    if off != 0 {
        // SAFETY: PM1 control, which ACPI names; nothing runs after it.
        unsafe { Port::new(off as u16).write((off >> 16) as u16) };
        // It may take a moment.
        cpu::halt()
    }
    // Without the console's lock, since a panic may hold it.
    Emergency::print(format_args!("ACPI does not say how this machine is turned off: halting\n"));
    cpu::halt()
}
