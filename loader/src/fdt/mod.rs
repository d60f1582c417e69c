//! The device tree that describes a VM to its guest.
//!
//! Purpose: [`generate`] writes what QEMU's `virt` machine (GICv3, PSCI by HVC) would, less what a VM does not have: the
//! bank of flash that holds firmware, PCI, GPIO, fw_cfg, ITS, performance monitors; and more by one: the generation of a VM that
//! can be copied, and where devices reach a window of memory only, the bus that says so. Addresses and interrupts are
//! [`crate::virt`]'s. Linux, U-Boot's `qemu_arm64` and
//! EDK2's ArmVirtQemu find their devices in it.
//!
//! Protocol: pure. The size depends on which properties there are, not on their values: a caller who does not know yet where
//! the RAM disk will be generates with any address, asks [`crate::layout::layout`], and generates again.
//!
//! Sources: Devicetree Specification 0.4; Linux, Documentation/devicetree/bindings (arm,gic-v3, arm,arch_timer, arm,psci,
//! arm,pl011, arm,pl031, virtio,mmio, cfi-flash, microsoft,vmgenid, shared-dma-pool).

mod blob;

use alloc::vec::Vec;
use core::fmt::Write;

use arrayvec::ArrayString;
use entresol_addr::PAGE_SIZE;

use crate::window::{Shape, Window};
use crate::{Invalid, Ram, Region, virt};
use blob::Blob;

/// Bytes that a tree may have (Linux boot protocol: it must fit in one 2 MiB block).
pub const MAX_SIZE: u64 = 2 << 20;
/// Bytes of a command line: Linux's COMMAND_LINE_SIZE on arm64, less its zero.
pub const MAX_CMDLINE: usize = 2047;
/// vCPUs of a VM.
pub const MAX_VCPUS: u8 = 8;

/// Phandles: the tree refers to these nodes.
mod phandle {
    pub const CLOCK: u32 = 0x8000;
    pub const GIC: u32 = 0x8001;
    pub const POOL: u32 = 0x8002;
}

/// Interrupt specifiers (arm,gic-v3): type, number, flags.
mod interrupt {
    pub const SPI: u32 = 0;
    pub const PPI: u32 = 1;
    pub const EDGE_RISING: u32 = 1;
    pub const LEVEL_HIGH: u32 = 4;
}

/// What a VM consists of.
#[derive(Clone, Debug)]
pub struct Machine<'a> {
    /// Memory.
    pub ram: Ram,
    /// vCPUs, 1–8; their MPIDR is their number.
    pub vcpus: u8,
    /// Kernel command line.
    pub cmdline: &'a str,
    /// Where the initial RAM disk is.
    pub initrd: Option<Region>,
    /// Bit n: there is a virtio-mmio transport n. Like QEMU's, a transport may have no device.
    pub virtio: u32,
    /// What of the memory devices reach, if not all.
    pub window: Option<Window>,
    /// Bytes of flash, if there is one.
    pub flash: Option<u64>,
    /// Randomness for the guest's early entropy pool, if the owner wants a guest that differs each time.
    pub rng_seed: Option<[u8; 32]>,
    /// Randomness for the place of the guest's kernel in its virtual memory.
    pub kaslr_seed: Option<u64>,
}

/// Why there is no tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FdtError {
    /// A value that breaks a rule.
    #[error(transparent)]
    Field(#[from] Invalid),
    /// More than [`MAX_SIZE`].
    #[error("the device tree is larger than 2 MiB")]
    TooLarge,
    /// No memory for it.
    #[error("no memory for the device tree")]
    OutOfMemory,
}

/// The blob for `machine`.
///
/// # Errors
///
/// 0 or more than 8 vCPUs; a command line that is too long or contains a zero byte; no heap memory.
pub fn generate(machine: &Machine<'_>) -> Result<Vec<u8>, FdtError> {
    check(machine)?;
    let mut blob = Blob::new();
    blob.node("", |root| {
        root.strings("compatible", &["linux,dummy-virt"])?;
        root.strings("model", &["linux,dummy-virt"])?;
        root.cells("#address-cells", &[2])?;
        root.cells("#size-cells", &[2])?;
        root.cells("interrupt-parent", &[phandle::GIC])?;
        root.empty("dma-coherent")?;
        chosen(root, machine)?;
        root.node("aliases", |aliases| aliases.strings("serial0", &["/pl011@9000000"]))?;
        root.node("memory@40000000", |memory| {
            memory.strings("device_type", &["memory"])?;
            memory.numbers("reg", &[machine.ram.base.get(), machine.ram.size])
        })?;
        cpus(root, machine.vcpus)?;
        psci(root)?;
        timer(root)?;
        gic(root)?;
        clock(root)?;
        primecells(root)?;
        machine.flash.map_or(Ok(()), |size| flash(root, size))?;
        generation(root)?;
        let slots = (0..virt::VIRTIO_SLOTS).filter(|slot| machine.virtio >> slot & 1 != 0);
        match machine.window {
            None => slots.into_iter().try_for_each(|slot| virtio(root, slot, None)),
            Some(window) => {
                reserved(root, window)?;
                restricted_bus(root, window, slots)
            }
        }
    })?;
    blob.finish()
}

fn check(machine: &Machine<'_>) -> Result<(), Invalid> {
    let vcpus = machine.vcpus;
    if vcpus == 0 || vcpus > MAX_VCPUS {
        return Err(Invalid { field: "vcpus", value: vcpus.into(), rule: "between 1 and 8" });
    }
    let size = machine.cmdline.len();
    if size > MAX_CMDLINE {
        return Err(Invalid { field: "length of cmdline", value: size as u64, rule: "at most 2047 bytes" });
    }
    if let Some(at) = machine.cmdline.find('\0') {
        return Err(Invalid { field: "offset of a zero byte in cmdline", value: at as u64, rule: "absent" });
    }
    let base = machine.ram.base.get();
    if base != virt::RAM_BASE {
        return Err(Invalid { field: "start of memory", value: base, rule: "0x40000000, as on QEMU's virt" });
    }
    if machine.ram.size == 0 || !machine.ram.size.is_multiple_of(PAGE_SIZE) {
        return Err(Invalid { field: "memory", value: machine.ram.size, rule: "a multiple of 4 KiB, and not 0" });
    }
    Ok(())
}

fn chosen(root: &mut Blob, machine: &Machine<'_>) -> Result<(), FdtError> {
    root.node("chosen", |chosen| {
        chosen.strings("stdout-path", &["/pl011@9000000"])?;
        if !machine.cmdline.is_empty() {
            chosen.strings("bootargs", &[machine.cmdline])?;
        }
        if let Some(initrd) = machine.initrd {
            chosen.numbers("linux,initrd-start", &[initrd.start.get()])?;
            chosen.numbers("linux,initrd-end", &[initrd.end().get()])?;
        }
        if let Some(seed) = machine.kaslr_seed {
            chosen.numbers("kaslr-seed", &[seed])?;
        }
        if let Some(seed) = &machine.rng_seed {
            chosen.bytes("rng-seed", seed)?;
        }
        Ok(())
    })
}

fn cpus(root: &mut Blob, count: u8) -> Result<(), FdtError> {
    const NAMES: [&str; MAX_VCPUS as usize] = ["cpu@0", "cpu@1", "cpu@2", "cpu@3", "cpu@4", "cpu@5", "cpu@6", "cpu@7"];
    root.node("cpus", |cpus| {
        cpus.cells("#address-cells", &[1])?;
        cpus.cells("#size-cells", &[0])?;
        (0..u32::from(count)).zip(NAMES).try_for_each(|(index, name)| {
            cpus.node(name, |cpu| {
                cpu.strings("device_type", &["cpu"])?;
                cpu.strings("compatible", &["arm,armv8"])?;
                cpu.cells("reg", &[index])?;
                cpu.strings("enable-method", &["psci"])
            })
        })
    })
}

fn psci(root: &mut Blob) -> Result<(), FdtError> {
    root.node("psci", |psci| {
        psci.strings("compatible", &["arm,psci-1.0", "arm,psci-0.2", "arm,psci"])?;
        psci.strings("method", &["hvc"])?;
        psci.cells("cpu_suspend", &[0xc400_0001])?;
        psci.cells("cpu_off", &[0x8400_0002])?;
        psci.cells("cpu_on", &[0xc400_0003])
    })
}

fn timer(root: &mut Blob) -> Result<(), FdtError> {
    use interrupt::{LEVEL_HIGH, PPI};
    root.node("timer", |timer| {
        timer.strings("compatible", &["arm,armv8-timer", "arm,armv7-timer"])?;
        timer.empty("always-on")?;
        #[rustfmt::skip]
        let interrupts = [
            PPI, virt::TIMER_SECURE_PPI, LEVEL_HIGH,
            PPI, virt::TIMER_PHYSICAL_PPI, LEVEL_HIGH,
            PPI, virt::TIMER_VIRTUAL_PPI, LEVEL_HIGH,
            PPI, virt::TIMER_HYPERVISOR_PPI, LEVEL_HIGH,
        ];
        timer.cells("interrupts", &interrupts)
    })
}

fn gic(root: &mut Blob) -> Result<(), FdtError> {
    root.node("intc@8000000", |gic| {
        gic.strings("compatible", &["arm,gic-v3"])?;
        gic.cells("#interrupt-cells", &[3])?;
        gic.empty("interrupt-controller")?;
        gic.numbers("reg", &[virt::GICD_BASE, virt::GICD_SIZE, virt::GICR_BASE, virt::GICR_SIZE])?;
        gic.cells("#redistributor-regions", &[1])?;
        gic.cells("#address-cells", &[2])?;
        gic.cells("#size-cells", &[2])?;
        gic.empty("ranges")?;
        gic.cells("phandle", &[phandle::GIC])
    })
}

fn clock(root: &mut Blob) -> Result<(), FdtError> {
    root.node("apb-pclk", |clock| {
        clock.strings("compatible", &["fixed-clock"])?;
        clock.cells("#clock-cells", &[0])?;
        clock.cells("clock-frequency", &[virt::APB_CLOCK])?;
        clock.strings("clock-output-names", &["clk24mhz"])?;
        clock.cells("phandle", &[phandle::CLOCK])
    })
}

fn primecells(root: &mut Blob) -> Result<(), FdtError> {
    use interrupt::{LEVEL_HIGH, SPI};
    root.node("pl011@9000000", |uart| {
        uart.strings("compatible", &["arm,pl011", "arm,primecell"])?;
        uart.numbers("reg", &[virt::UART_BASE, virt::UART_SIZE])?;
        uart.cells("interrupts", &[SPI, virt::UART_SPI, LEVEL_HIGH])?;
        uart.cells("clocks", &[phandle::CLOCK, phandle::CLOCK])?;
        uart.strings("clock-names", &["uartclk", "apb_pclk"])
    })?;
    root.node("pl031@9010000", |rtc| {
        rtc.strings("compatible", &["arm,pl031", "arm,primecell"])?;
        rtc.numbers("reg", &[virt::RTC_BASE, virt::RTC_SIZE])?;
        rtc.cells("interrupts", &[SPI, virt::RTC_SPI, LEVEL_HIGH])?;
        rtc.cells("clocks", &[phandle::CLOCK])?;
        rtc.strings("clock-names", &["apb_pclk"])
    })
}

fn flash(root: &mut Blob, size: u64) -> Result<(), FdtError> {
    root.node("flash@4000000", |flash| {
        flash.strings("compatible", &["cfi-flash"])?;
        flash.numbers("reg", &[virt::FLASH_BASE, size])?;
        flash.cells("bank-width", &[virt::FLASH_WIDTH])
    })
}

fn generation(root: &mut Blob) -> Result<(), FdtError> {
    use interrupt::{EDGE_RISING, SPI};
    root.node("vmgenid@90d0000", |vmgenid| {
        vmgenid.strings("compatible", &["microsoft,vmgenid"])?;
        vmgenid.numbers("reg", &[virt::VMGENID_BASE, virt::VMGENID_SIZE])?;
        vmgenid.cells("interrupts", &[SPI, virt::VMGENID_SPI, EDGE_RISING])
    })
}

/// Memory that is for devices (Linux, Documentation/devicetree/bindings/reserved-memory/shared-dma-pool.yaml).
fn reserved(root: &mut Blob, window: Window) -> Result<(), FdtError> {
    let mut name = ArrayString::<32>::new();
    let pool = window.pool();
    write!(name, "device-pool@{:x}", pool.start).map_err(|_| FdtError::TooLarge)?;
    root.node("reserved-memory", |reserved| {
        reserved.cells("#address-cells", &[2])?;
        reserved.cells("#size-cells", &[2])?;
        reserved.empty("ranges")?;
        reserved.node(&name, |node| {
            node.numbers("reg", &[pool.start.get(), pool.size])?;
            node.cells("phandle", &[phandle::POOL])?;
            match window.shape {
                Shape::Restricted => node.strings("compatible", &["restricted-dma-pool"]),
                Shape::Zone => {
                    node.strings("compatible", &["shared-dma-pool"])?;
                    node.empty("reusable")?;
                    node.empty("linux,cma-default")
                }
            }
        })
    })
}

/// The transports on a bus that reaches the window and nothing else.
fn restricted_bus(root: &mut Blob, window: Window, mut slots: impl Iterator<Item = u32>) -> Result<(), FdtError> {
    let (start, size) = (window.region.start.get(), window.region.size);
    root.node("virtio-bus", |bus| {
        bus.strings("compatible", &["simple-bus"])?;
        bus.cells("#address-cells", &[2])?;
        bus.cells("#size-cells", &[2])?;
        bus.empty("ranges")?;
        bus.numbers("dma-ranges", &[start, start, size])?;
        bus.empty("dma-coherent")?;
        slots.try_for_each(|slot| virtio(bus, slot, Some(window)))
    })
}

fn virtio(root: &mut Blob, slot: u32, window: Option<Window>) -> Result<(), FdtError> {
    use interrupt::{EDGE_RISING, SPI};
    let base = virt::VIRTIO_BASE + u64::from(slot) * virt::VIRTIO_SIZE;
    let mut name = ArrayString::<32>::new();
    write!(name, "virtio_mmio@{base:x}").map_err(|_| FdtError::TooLarge)?;
    root.node(&name, |virtio| {
        virtio.strings("compatible", &["virtio,mmio"])?;
        virtio.numbers("reg", &[base, virt::VIRTIO_SIZE])?;
        virtio.cells("interrupts", &[SPI, virt::VIRTIO_SPI + slot, EDGE_RISING])?;
        if window.is_some_and(|window| window.shape == Shape::Restricted) {
            virtio.cells("memory-region", &[phandle::POOL])?;
        }
        virtio.empty("dma-coherent")
    })
}

#[cfg(test)]
mod tests;
