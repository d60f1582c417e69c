//! The guest's map: addresses and interrupts of QEMU's `virt` machine with GICv3.
//!
//! Purpose: the one place for these numbers on the side that describes the machine to a guest. A guest learns them from its
//! device tree, or was compiled with them. Interrupt numbers are those of a device tree: SPI n is INTID 32 + n, PPI n is
//! INTID 16 + n.

/// Start of memory.
pub const RAM_BASE: u64 = 0x4000_0000;

/// Where firmware lies, and where a CPU without a kernel starts: the first flash bank.
pub const FIRMWARE_BASE: u64 = 0;
/// The flash that a guest may write: the second bank.
pub const FLASH_BASE: u64 = 0x0400_0000;
/// Bytes across both chips of the flash that one access reaches.
pub const FLASH_WIDTH: u32 = 4;

/// GICv3 distributor.
pub const GICD_BASE: u64 = 0x0800_0000;
/// Bytes of the distributor.
pub const GICD_SIZE: u64 = 0x1_0000;
/// GICv3 redistributors, 128 KiB for each vCPU.
pub const GICR_BASE: u64 = 0x080a_0000;
/// Bytes of the redistributor region, as QEMU describes it: room for 123.
pub const GICR_SIZE: u64 = 0xf6_0000;

/// PL011 UART.
pub const UART_BASE: u64 = 0x0900_0000;
/// Bytes of the UART.
pub const UART_SIZE: u64 = 0x1000;
/// SPI of the UART, level high.
pub const UART_SPI: u32 = 1;

/// PL031 real time clock.
pub const RTC_BASE: u64 = 0x0901_0000;
/// Bytes of the clock.
pub const RTC_SIZE: u64 = 0x1000;
/// SPI of the clock, level high.
pub const RTC_SPI: u32 = 2;

/// The records of stolen time: memory, where QEMU's `virt` has it for KVM.
pub const STOLEN_TIME_BASE: u64 = 0x090a_0000;
/// Bytes of the records.
pub const STOLEN_TIME_SIZE: u64 = 0x1000;

/// The generation of the virtual machine; free on QEMU's `virt`, which shows it to ACPI only.
pub const VMGENID_BASE: u64 = 0x090d_0000;
/// Bytes of it.
pub const VMGENID_SIZE: u64 = 0x1000;
/// SPI of the generation, rising edge; free on QEMU's `virt`.
pub const VMGENID_SPI: u32 = 10;

/// The first virtio-mmio transport.
pub const VIRTIO_BASE: u64 = 0x0a00_0000;
/// Bytes of a transport, and from one to the next.
pub const VIRTIO_SIZE: u64 = 0x200;
/// SPI of the first transport, rising edge; one more for each.
pub const VIRTIO_SPI: u32 = 16;
/// Transports there can be.
pub const VIRTIO_SLOTS: u32 = 32;

/// PPI of the secure EL1 physical timer.
pub const TIMER_SECURE_PPI: u32 = 13;
/// PPI of the EL1 physical timer.
pub const TIMER_PHYSICAL_PPI: u32 = 14;
/// PPI of the EL1 virtual timer.
pub const TIMER_VIRTUAL_PPI: u32 = 11;
/// PPI of the EL2 physical timer.
pub const TIMER_HYPERVISOR_PPI: u32 = 10;

/// Clock of the PrimeCell peripherals, in Hz.
pub const APB_CLOCK: u32 = 24_000_000;
