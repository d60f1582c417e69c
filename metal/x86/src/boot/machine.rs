//! What is in the machine: what the loader says, and what ACPI's tables say, put together.
//!
//! Sources: ACPI 6.5, 5.2.12 (MADT: CPUs, I/O APICs, ISA interrupts that are wired elsewhere).
//!
//! Known holes: COM1 is taken for granted.

use core::fmt;

use arrayvec::ArrayVec;
use entresol_metal_common::memory::{MAX_REGIONS, Region};

use super::info::StartInfo;

/// The most CPUs that are used; more are refused.
pub const MAX_CPUS: usize = entresol_sync::epoch::MAX_CPUS;
/// The most virtio-mmio slots.
pub const MAX_VIRTIO: usize = 32;
/// The most I/O APICs.
pub const MAX_IO_APICS: usize = 8;
/// Inputs of the I/O APICs that can be used, counted from 0.
pub const MAX_INPUTS: usize = 160;
/// A device's interrupt is its input and so much more; what is below is CPUs' own.
pub const FIRST_INPUT: u32 = 32;

/// COM1's ports, and its interrupt on the ISA bus.
const COM1: Region = Region { start: 0x3f8, end: 0x400 };
const COM1_IRQ: u8 = 4;
/// Interrupts of the ISA bus.
const ISA: usize = 16;

/// A device with one register block and one interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its registers, or its ports.
    pub registers: Region,
    /// Its interrupt, as [`crate::interrupts`] numbers it.
    pub intid: u32,
    /// Whether it is edge-triggered.
    pub edge: bool,
}

/// An I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApic {
    /// Its registers' page.
    pub registers: u64,
    /// The number of its first input.
    pub first_input: u32,
}

/// An entry of the MADT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The identifier of a CPU that may be used.
    Cpu(u32),
    /// An I/O APIC.
    IoApic(IoApic),
    /// An interrupt of the ISA bus that has another input than its number, or another sense.
    Isa {
        /// The interrupt.
        irq: u8,
        /// The input.
        input: u32,
        /// Whether it is asserted when low.
        active_low: bool,
    },
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootInfo {
    /// All RAM from 1 MiB on, by address, disjoint, in whole pages.
    pub ram: ArrayVec<Region, MAX_REGIONS>,
    /// The hypervisor's image with its data and the stacks of the CPUs that exist.
    pub image: Region,
    /// What the loader passed as first module: the bundle.
    pub bundle: Option<Region>,
    /// A page of RAM below 1 MiB in which CPUs start.
    pub start_page: Option<u64>,
    /// Identifiers of the CPUs' local APICs; the boot CPU is first.
    pub cpus: ArrayVec<u32, MAX_CPUS>,
    /// I/O APICs.
    pub io_apics: ArrayVec<IoApic, MAX_IO_APICS>,
    /// Inputs that are asserted when low.
    pub active_low: Inputs,
    /// 16550 of the console.
    pub uart: Device,
    /// virtio-mmio slots by address, empty or not.
    pub virtio_mmio: ArrayVec<Device, MAX_VIRTIO>,
}

/// A set of inputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inputs([u64; MAX_INPUTS.div_ceil(64)]);

impl Inputs {
    /// Whether it is in it.
    pub fn get(&self, input: usize) -> bool {
        self.0.get(input / 64).is_some_and(|word| word >> (input % 64) & 1 != 0)
    }

    fn insert(&mut self, input: usize) {
        if let Some(word) = self.0.get_mut(input / 64) {
            *word |= 1 << (input % 64);
        }
    }
}

/// Why a machine cannot carry the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineError {
    /// The CPU that booted is not among those that ACPI names.
    NoBootCpu(u32),
    /// More of something than we have room for.
    TooMany(&'static str, usize),
}

impl fmt::Display for MachineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoBootCpu(id) => write!(f, "ACPI's MADT does not have the CPU that booted, APIC {id:#x}"),
            Self::TooMany(what, most) => write!(f, "ACPI's MADT has more than {most} {what}"),
        }
    }
}

impl BootInfo {
    /// The machine, without the place of the image, which depends on the number of CPUs.
    ///
    /// # Errors
    ///
    /// [`MachineError`].
    pub fn new(start: StartInfo, madt: impl Iterator<Item = Entry>, boot_cpu: u32) -> Result<Self, MachineError> {
        let (mut cpus, mut io_apics) = (ArrayVec::<u32, MAX_CPUS>::new(), ArrayVec::new());
        let mut active_low = Inputs::default();
        let mut isa: [u32; ISA] = core::array::from_fn(|irq| irq as u32);
        let mut listed = false;
        cpus.push(boot_cpu);
        for entry in madt {
            match entry {
                Entry::Cpu(id) if id == boot_cpu => listed = true,
                // A CPU may have an entry of either kind.
                Entry::Cpu(id) if cpus.contains(&id) => {}
                Entry::Cpu(id) => cpus.try_push(id).map_err(|_| MachineError::TooMany("CPUs", MAX_CPUS))?,
                Entry::IoApic(io_apic) => {
                    io_apics.try_push(io_apic).map_err(|_| MachineError::TooMany("I/O APICs", MAX_IO_APICS))?;
                }
                Entry::Isa { irq, input, active_low: low } => {
                    if let Some(place) = isa.get_mut(usize::from(irq)) {
                        *place = input;
                    }
                    if low {
                        active_low.insert(input as usize);
                    }
                }
            }
        }
        if !listed {
            return Err(MachineError::NoBootCpu(boot_cpu));
        }
        let StartInfo { ram, start_page, bundle, rsdp: _, virtio_mmio } = start;
        // Its line stays up while it wants something, so it is told by its level: an edge that comes while it is held back is lost.
        let input = isa[usize::from(COM1_IRQ)];
        let uart = Device { registers: COM1, intid: FIRST_INPUT.saturating_add(input), edge: false };
        let image = Region::default();
        Ok(Self { ram, image, bundle, start_page, cpus, io_apics, active_low, uart, virtio_mmio })
    }

    /// Pages of registers that the hypervisor uses, without those of CPUs; one may be named more than once.
    pub fn device_pages(&self) -> impl Iterator<Item = u64> {
        const PAGE: u64 = 4096;
        let slots = self.virtio_mmio.iter().map(|device| device.registers);
        let all =
            slots.chain(self.io_apics.iter().map(|part| Region { start: part.registers, end: part.registers + 32 }));
        all.flat_map(|region| (region.start / PAGE..region.end.div_ceil(PAGE)).map(|page| page * PAGE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn start() -> StartInfo {
        let slot = |base| Device { registers: Region::sized(base, 512).unwrap(), intid: 40, edge: false };
        StartInfo {
            ram: ArrayVec::new(),
            start_page: Some(0x9_e000),
            bundle: None,
            rsdp: None,
            virtio_mmio: [slot(0xfeb0_0000), slot(0xfeb0_0200), slot(0xfeb0_0f80)].into_iter().collect(),
        }
    }

    #[test]
    fn the_boot_cpu_is_first_and_each_is_there_once() {
        let madt = [1, 0, 4, 1].map(Entry::Cpu);
        let info = BootInfo::new(start(), madt.into_iter(), 4).unwrap();
        assert_eq!(info.cpus[..], [4, 1, 0]);
        assert_eq!(BootInfo::new(start(), madt.into_iter(), 7).unwrap_err(), MachineError::NoBootCpu(7));
        let many = (0..=MAX_CPUS as u32).map(Entry::Cpu);
        assert_eq!(BootInfo::new(start(), many, 0).unwrap_err(), MachineError::TooMany("CPUs", MAX_CPUS));
    }

    #[test]
    fn the_console_is_where_its_interrupt_is_wired() {
        let isa = |irq, input, active_low| Entry::Isa { irq, input, active_low };
        let wired =
            |entries: &[Entry]| BootInfo::new(start(), entries.iter().copied().chain([Entry::Cpu(0)]), 0).unwrap();
        assert_eq!(wired(&[]).uart.intid, 36);
        let info = wired(&[isa(4, 20, true), isa(0, 2, false), isa(200, 9, true), isa(3, u32::MAX, true)]);
        assert_eq!(info.uart.intid, 52);
        assert_eq!((0..MAX_INPUTS).filter(|input| info.active_low.get(*input)).collect::<Vec<_>>(), [9, 20]);
        assert!(!info.active_low.get(usize::MAX));
        assert_eq!(wired(&[isa(4, u32::MAX, false)]).uart.intid, u32::MAX);
    }

    #[test]
    fn device_pages_cover_all_registers() {
        let io = Entry::IoApic(IoApic { registers: 0xfec0_0000, first_input: 0 });
        let info = BootInfo::new(start(), [Entry::Cpu(0), io].into_iter(), 0).unwrap();
        let pages: Vec<_> = info.device_pages().collect();
        assert_eq!(pages, [0xfeb0_0000, 0xfeb0_0000, 0xfeb0_0000, 0xfeb0_1000, 0xfec0_0000]);
        let many = (0..=MAX_IO_APICS as u32).map(|_| io);
        assert!(BootInfo::new(start(), many, 0).is_err());
    }
}
