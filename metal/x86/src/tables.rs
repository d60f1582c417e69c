//! ACPI's tables, as far as the hypervisor asks them: which CPUs and I/O APICs there are, and how the machine is turned off.
//!
//! Protocol: [`open`] and everything that reads from it on the start code's tables, which map the first 4 GiB where they are.
//!
//! Sources: ACPI 6.5, 5.2.12 (MADT), table 5.19 (flags of a CPU), table 5.26 (flags of an interrupt).

use core::ptr::NonNull;

use acpi::madt::{Madt, MadtEntry};
use acpi::{AcpiError, AcpiHandler, AcpiTables, PhysicalMapping};

use crate::boot::{Entry, IoApic};

/// ACPI's tables where they are.
#[derive(Clone, Copy)]
pub(crate) struct Identity;

impl AcpiHandler for Identity {
    unsafe fn map_physical_region<T>(&self, address: usize, size: usize) -> PhysicalMapping<Self, T> {
        let start = NonNull::new(address as *mut T).expect("no table is at 0");
        // SAFETY: the first 4 GiB are mapped where they are while tables are read, and nobody writes to them.
        unsafe { PhysicalMapping::new(address, start, size, size, *self) }
    }

    fn unmap_physical_region<T>(_region: &PhysicalMapping<Self, T>) {}
}

/// The tables.
///
/// # Errors
///
/// They are none.
///
/// # Safety
///
/// `rsdp` is where the loader says that ACPI's root pointer is, and the first 4 GiB are mapped where they are as long as they are read.
pub(crate) unsafe fn open(rsdp: u64) -> Result<AcpiTables<Identity>, AcpiError> {
    // SAFETY: as the caller promises.
    unsafe { AcpiTables::from_rsdp(Identity, rsdp as usize) }
}

/// CPUs that may be used, I/O APICs, and interrupts of the ISA bus.
pub(crate) fn entries(madt: &PhysicalMapping<Identity, Madt>) -> impl Iterator<Item = Entry> {
    madt.get().entries().filter_map(entry)
}

fn entry(entry: MadtEntry<'_>) -> Option<Entry> {
    const ENABLED: u32 = 1 << 0;
    const LOW: u16 = 0b11;
    match entry {
        MadtEntry::LocalApic(cpu) => (cpu.flags & ENABLED != 0).then_some(Entry::Cpu(cpu.apic_id.into())),
        MadtEntry::LocalX2Apic(cpu) => (cpu.flags & ENABLED != 0).then_some(Entry::Cpu(cpu.x2apic_id)),
        MadtEntry::IoApic(part) => Some(Entry::IoApic(IoApic {
            registers: part.io_apic_address.into(),
            first_input: part.global_system_interrupt_base,
        })),
        MadtEntry::InterruptSourceOverride(isa) => {
            Some(Entry::Isa { irq: isa.irq, input: isa.global_system_interrupt, active_low: isa.flags & LOW == LOW })
        }
        _ => None,
    }
}
