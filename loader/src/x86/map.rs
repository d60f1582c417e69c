//! The map of an x86-64 guest: a machine in the manner of QEMU's `microvm`, described by ACPI alone.
//!
//! Purpose: the one place for these numbers on the side that describes the machine to a guest; the program that owns the VM
//! puts its devices there. A guest learns all of them from its memory map and its ACPI tables, but for COM1 and the ports that
//! every PC has.
//!
//! ```text
//! 0          memory; below 640 KiB this crate's own tables, which the kernel may take over
//! a0000      reserved, as on a PC; ACPI's tables from e0000
//! 100000     memory, up to 3 GiB
//! c0000000   devices: virtio transports, I/O APIC, local APICs
//! 100000000  the rest of memory
//! ```

/// Memory below 4 GiB ends here at the latest: devices lie behind.
pub const LOW_END: u64 = 0xc000_0000;
/// Where memory goes on that does not fit below [`LOW_END`].
pub const HIGH_BASE: u64 = 0x1_0000_0000;
/// Conventional memory ends here.
pub const CONVENTIONAL_END: u64 = 0xa_0000;
/// Where memory goes on behind what a PC has below 1 MiB.
pub const EXTENDED_BASE: u64 = 0x10_0000;

/// ACPI's tables: in the area that a kernel searches for the root pointer (ACPI 6.5, 5.2.5.1).
pub const ACPI_BASE: u64 = 0xe_0000;
/// Bytes for them.
pub const ACPI_SIZE: u64 = 0x1_0000;

/// The first virtio-mmio transport.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// Bytes of a transport, and from one to the next.
pub const VIRTIO_SIZE: u64 = 0x200;
/// I/O APIC input of the first transport, rising edge; one more for each.
pub const VIRTIO_GSI: u32 = 16;
/// Transports there can be.
pub const VIRTIO_SLOTS: u32 = 32;

/// The I/O APIC.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Bytes of it.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Its inputs.
pub const IOAPIC_INPUTS: u32 = VIRTIO_GSI + VIRTIO_SLOTS;
/// Its identity, which no local APIC has.
pub const IOAPIC_ID: u8 = 0xf0;
/// Every local APIC, for the vCPU that has it, while it is not in x2APIC mode.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Bytes of it.
pub const LAPIC_SIZE: u64 = 0x1000;

/// COM1, a 16550.
pub const COM1_PORT: u16 = 0x3f8;
/// Ports of COM1.
pub const COM1_PORTS: u16 = 8;
/// I/O APIC input of COM1, rising edge.
pub const COM1_GSI: u32 = 4;

/// The interval timer's counters 0–2 and its control word.
pub const PIT_PORT: u16 = 0x40;
/// Ports of the timer.
pub const PIT_PORTS: u16 = 4;
/// The gate of counter 2, and what comes out of it.
pub const PIT_GATE_PORT: u16 = 0x61;
/// I/O APIC input of counter 0, rising edge. Nothing describes it: a kernel that knows its clocks leaves the counter alone.
pub const PIT_GSI: u32 = 0;

/// Index and data of the real-time clock.
pub const RTC_PORT: u16 = 0x70;
/// Ports of the clock.
pub const RTC_PORTS: u16 = 2;

/// ACPI's sleep control register (ACPI 6.5, 4.8.4.1), sleep status register, and the reset register.
pub const POWER_PORT: u16 = 0x600;
/// Ports of these.
pub const POWER_PORTS: u16 = 3;
/// The reset register, behind the other two.
pub const RESET_PORT: u16 = POWER_PORT + 2;
/// What a store to the reset register must be.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of S5, soft off.
pub const SLEEP_OFF: u8 = 5;

// The tables for the first instruction, in conventional memory. The kernel takes it over when it has made its own.

/// The global descriptor table.
pub(super) const GDT: u64 = 0x1000;
/// `boot_params`, or `hvm_start_info` with its lists behind it.
pub(super) const START_INFO: u64 = 0x7000;
/// Identity page tables: one page for each of levels 4 and 3, four of level 2.
pub(super) const PAGE_TABLES: u64 = 0x9000;
/// The command line.
pub(super) const CMDLINE: u64 = 0x2_0000;
/// Most bytes of a command line, with the zero that ends it.
pub(super) const CMDLINE_ROOM: u64 = 0x1_0000;
