//! What is in the machine: its device tree, read once.
//!
//! Sources: Devicetree Specification 0.4; the bindings named beside each compatible string.
//!
//! Protocol: [`parse`] runs before the MMU is on, so it allocates nothing, takes no lock, and returns values only.

use arrayvec::ArrayVec;
use core::fmt;
use dtoolkit::error::{FdtParseError, PropertyError, StandardError};
use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::{Node, Property};
pub use entresol_metal_common::memory::{MAX_REGIONS, Region};

/// The most CPUs that are used; what a device tree lists beyond is refused.
pub const MAX_CPUS: usize = entresol_sync::epoch::MAX_CPUS;
/// The most virtio-mmio slots.
pub const MAX_VIRTIO: usize = 32;

/// MPIDR_EL1's affinity fields: Aff3 39:32, Aff2–Aff0 23:0 (Arm DDI 0487 D24.2.118).
pub const AFFINITY: u64 = 0xff_00ff_ffff;

/// A device with one register block and one interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its registers.
    pub registers: Region,
    /// Its interrupt as the GIC numbers it (an SPI's INTID, from 32).
    pub intid: u32,
    /// Whether it is edge-triggered.
    pub edge: bool,
}

/// The machine.
#[derive(Clone, Debug)]
pub struct BootInfo {
    /// All RAM, by address, disjoint.
    pub ram: ArrayVec<Region, MAX_REGIONS>,
    /// Memory that is not ours: `/memreserve/` and `/reserved-memory`.
    pub reserved: ArrayVec<Region, MAX_REGIONS>,
    /// The hypervisor's image with its data and the stacks of the CPUs that exist.
    pub image: Region,
    /// What the loader passed as initial RAM disk: the bundle.
    pub bundle: Option<Region>,
    /// The device tree itself.
    pub dtb: Region,
    /// Affinities (MPIDR_EL1 without its flags); the boot CPU is first.
    pub cpus: ArrayVec<u64, MAX_CPUS>,
    /// PL011 of the console.
    pub uart: Device,
    /// PL031, if there is one.
    pub rtc: Option<Device>,
    /// GICv3 distributor.
    pub gicd: Region,
    /// GICv3 redistributors, one contiguous range.
    pub gicr: Region,
    /// virtio-mmio slots by address, empty or not.
    pub virtio_mmio: ArrayVec<Device, MAX_VIRTIO>,
    /// Kernel command line given by the loader.
    pub bootargs: &'static str,
}

/// Why a device tree cannot carry the hypervisor.
#[derive(Debug)]
pub enum InfoError {
    /// Not a device tree.
    Blob(FdtParseError),
    /// A standard node or property is malformed.
    Standard(StandardError),
    /// A property is malformed.
    Property(PropertyError),
    /// A node that we need is not there.
    Missing(&'static str),
    /// A property has a value that we do not understand.
    Unsupported(&'static str),
    /// More of something than we have room for.
    TooMany(&'static str, usize),
}

impl From<StandardError> for InfoError {
    fn from(error: StandardError) -> Self {
        Self::Standard(error)
    }
}

impl From<PropertyError> for InfoError {
    fn from(error: PropertyError) -> Self {
        Self::Property(error)
    }
}

impl fmt::Display for InfoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blob(error) => write!(f, "x0 points to no device tree: {error}"),
            Self::Standard(error) => write!(f, "device tree: {error}"),
            Self::Property(error) => write!(f, "device tree: {error}"),
            Self::Missing(what) => write!(f, "device tree has no {what}"),
            Self::Unsupported(what) => write!(f, "device tree: {what}"),
            Self::TooMany(what, most) => write!(f, "device tree has more than {most} {what}"),
        }
    }
}

/// Reads the device tree `blob`, which lies at `address`; `image` and `boot_cpu` are what the start code knows itself.
///
/// # Errors
///
/// [`InfoError`]: something that the hypervisor needs is missing or malformed.
pub fn parse(blob: &'static [u8], address: u64, image: Region, boot_cpu: u64) -> Result<BootInfo, InfoError> {
    let fdt = Fdt::new(blob).map_err(InfoError::Blob)?;
    let root = fdt.root();
    let dtb = Region::sized(address, blob.len() as u64).ok_or(InfoError::Unsupported("its address wraps"))?;
    let gic = compatible(root, "arm,gic-v3").next().ok_or(InfoError::Missing("arm,gic-v3"))?;
    let (gicd, gicr) = gic_registers(gic)?;
    conduit(root)?;
    Ok(BootInfo {
        ram: ram(root)?,
        reserved: reserved(fdt)?,
        image,
        bundle: bundle(fdt)?,
        dtb,
        cpus: cpus(fdt, boot_cpu & AFFINITY)?,
        uart: compatible(root, "arm,pl011").next().map(device).ok_or(InfoError::Missing("arm,pl011"))??,
        rtc: compatible(root, "arm,pl031").next().map(device).transpose()?,
        gicd,
        gicr,
        virtio_mmio: virtio(root)?,
        bootargs: fdt.chosen().map(|chosen| chosen.bootargs_static()).transpose()?.unwrap_or(""),
    })
}

/// Only where the console is, for a refusal before everything else: reads as little as possible.
pub fn console_of(blob: &'static [u8]) -> Option<u64> {
    let fdt = Fdt::new(blob).ok()?;
    let uart = device(compatible(fdt.root(), "arm,pl011").next()?).ok()?;
    Some(uart.registers.start)
}

/// The PL031, for who owns the machine whatever its device tree's `status` says.
///
/// # Errors
///
/// [`InfoError`]: its node is malformed.
pub fn rtc_even_if_disabled(blob: &'static [u8]) -> Result<Option<Device>, InfoError> {
    let root = Fdt::new(blob).map_err(InfoError::Blob)?.root();
    nodes(root).find(|node| is_compatible(node, "arm,pl031")).map(device).transpose()
}

/// Whether PSCI is reached by HVC, as on a machine whose EL2 is its firmware's or absent.
pub fn psci_is_hvc(blob: &'static [u8]) -> bool {
    let method = Fdt::new(blob).ok().and_then(|fdt| fdt.find_node("/psci")).and_then(|psci| psci.property("method"));
    method.is_some_and(|method| method.value() == b"hvc\0")
}

trait ChosenExt {
    fn bootargs_static(&self) -> Result<&'static str, PropertyError>;
}

impl ChosenExt for dtoolkit::standard::Chosen<FdtNode<'static>> {
    fn bootargs_static(&self) -> Result<&'static str, PropertyError> {
        let node: FdtNode<'static> = **self;
        node.property("bootargs").map_or(Ok(""), |property| property.value_as::<&'static str>())
    }
}

/// Nodes at the root or on one bus below it, such as `simple-bus`.
fn nodes<'a>(root: FdtNode<'a>) -> impl Iterator<Item = FdtNode<'a>> {
    root.children().chain(root.children().flat_map(|bus| bus.children()))
}

fn is_compatible(node: &FdtNode<'_>, name: &'static str) -> bool {
    node.compatible().is_some_and(|mut names| names.any(|have| have == name))
}

fn is_enabled(node: &FdtNode<'_>) -> bool {
    node.property("status").is_none_or(|status| matches!(status.value(), b"okay\0" | b"ok\0"))
}

fn compatible<'a>(root: FdtNode<'a>, name: &'static str) -> impl Iterator<Item = FdtNode<'a>> {
    nodes(root).filter(move |node| is_enabled(node) && is_compatible(node, name))
}

fn regions<'a>(node: FdtNode<'a>) -> Result<impl Iterator<Item = Result<Region, InfoError>>, InfoError> {
    let reg = node.reg()?.ok_or(InfoError::Missing("reg property of a device or memory"))?;
    Ok(reg.map(|reg| {
        let (start, size) = (reg.address::<u64>()?, reg.size::<u64>()?);
        Region::sized(start, size).ok_or(InfoError::Unsupported("a reg range wraps"))
    }))
}

fn first_region(node: FdtNode<'_>) -> Result<Region, InfoError> {
    regions(node)?.next().ok_or(InfoError::Missing("reg range of a device"))?
}

/// Interrupts of a GIC: (type, number, flags), where type 0 is an SPI and type 1 a PPI; flags 1 and 2 mean edge
/// (Linux, Documentation/devicetree/bindings/interrupt-controller/arm,gic-v3.yaml).
fn device(node: FdtNode<'_>) -> Result<Device, InfoError> {
    let interrupts = node.property("interrupts").ok_or(InfoError::Missing("interrupts of a device"))?;
    let mut cells =
        interrupts.value().chunks_exact(4).map(|cell| u32::from_be_bytes([cell[0], cell[1], cell[2], cell[3]]));
    match (cells.next(), cells.next(), cells.next()) {
        (Some(0), Some(number @ 0..=987), Some(flags)) => {
            Ok(Device { registers: first_region(node)?, intid: 32 + number, edge: flags & 3 != 0 })
        }
        _ => Err(InfoError::Unsupported("a device's interrupt is not an SPI")),
    }
}

fn gic_registers(gic: FdtNode<'_>) -> Result<(Region, Region), InfoError> {
    if gic.property("#redistributor-regions").is_some_and(|count| count.value() != [0, 0, 0, 1]) {
        return Err(InfoError::Unsupported("more than one range of redistributors"));
    }
    let mut ranges = regions(gic)?;
    let gicd = ranges.next().ok_or(InfoError::Missing("GIC distributor"))??;
    let gicr = ranges.next().ok_or(InfoError::Missing("GIC redistributors"))??;
    Ok((gicd, gicr))
}

/// PSCI must be reached by SMC: an HVC from EL2 would come back to EL2.
fn conduit(root: FdtNode<'_>) -> Result<(), InfoError> {
    let psci = root.child("psci").ok_or(InfoError::Missing("psci node"))?;
    let method = psci.property("method").ok_or(InfoError::Missing("psci method"))?;
    match method.value() {
        b"smc\0" => Ok(()),
        _ => Err(InfoError::Unsupported("psci method is not smc; is the machine's EL2 enabled?")),
    }
}

fn ram(root: FdtNode<'_>) -> Result<ArrayVec<Region, MAX_REGIONS>, InfoError> {
    let mut found = ArrayVec::<Region, MAX_REGIONS>::new();
    let memory = |node: &FdtNode<'_>| node.property("device_type").is_some_and(|kind| kind.value() == b"memory\0");
    for node in root.children().filter(memory) {
        for region in regions(node)? {
            let region = region?;
            if region.size() != 0 {
                found.try_push(region).map_err(|_| InfoError::TooMany("ranges of RAM", MAX_REGIONS))?;
            }
        }
    }
    found.sort_unstable_by_key(|region| region.start);
    if found.windows(2).any(|pair| pair[0].end > pair[1].start) {
        return Err(InfoError::Unsupported("ranges of RAM overlap"));
    }
    if found.is_empty() { Err(InfoError::Missing("memory")) } else { Ok(found) }
}

fn reserved(fdt: Fdt<'_>) -> Result<ArrayVec<Region, MAX_REGIONS>, InfoError> {
    let mut found = ArrayVec::new();
    let mut push = |region| found.try_push(region).map_err(|_| InfoError::TooMany("reserved ranges", MAX_REGIONS));
    for entry in fdt.memory_reservations() {
        let region = Region::sized(entry.address(), entry.size());
        push(region.ok_or(InfoError::Unsupported("a reserved range wraps"))?)?;
    }
    let Some(node) = fdt.find_node("/reserved-memory") else { return Ok(found) };
    for child in node.children().filter(|child| child.property("reg").is_some()) {
        for region in regions(child)? {
            push(region?)?;
        }
    }
    Ok(found)
}

/// `linux,initrd-start` and `-end` are one or two cells wide, whatever the loader likes.
fn bundle(fdt: Fdt<'_>) -> Result<Option<Region>, InfoError> {
    let Some(chosen) = fdt.find_node("/chosen") else { return Ok(None) };
    let cell = |name| {
        chosen.property(name).map(|property| match *property.value() {
            [a, b, c, d] => Ok(u64::from(u32::from_be_bytes([a, b, c, d]))),
            [a, b, c, d, e, f, g, h] => Ok(u64::from_be_bytes([a, b, c, d, e, f, g, h])),
            _ => Err(InfoError::Unsupported("linux,initrd-* is neither one nor two cells")),
        })
    };
    match (cell("linux,initrd-start").transpose()?, cell("linux,initrd-end").transpose()?) {
        (Some(start), Some(end)) if start < end => Ok(Some(Region { start, end })),
        (None, None) => Ok(None),
        _ => Err(InfoError::Unsupported("linux,initrd-start is not below linux,initrd-end")),
    }
}

fn cpus(fdt: Fdt<'_>, boot_cpu: u64) -> Result<ArrayVec<u64, MAX_CPUS>, InfoError> {
    let mut found = ArrayVec::new();
    found.push(boot_cpu);
    let mut listed = false;
    for cpu in fdt.cpus()?.cpus() {
        let id = cpu.reg()?.and_then(|mut reg| reg.next()).ok_or(InfoError::Missing("reg of a cpu"))?;
        let affinity = id.address::<u64>()? & AFFINITY;
        if affinity == boot_cpu {
            listed = true;
        } else {
            found.try_push(affinity).map_err(|_| InfoError::TooMany("CPUs", MAX_CPUS))?;
        }
    }
    if listed { Ok(found) } else { Err(InfoError::Missing("cpu node of the CPU that booted")) }
}

fn virtio(root: FdtNode<'_>) -> Result<ArrayVec<Device, MAX_VIRTIO>, InfoError> {
    let mut found = ArrayVec::<Device, MAX_VIRTIO>::new();
    for node in compatible(root, "virtio,mmio") {
        found.try_push(device(node)?).map_err(|_| InfoError::TooMany("virtio-mmio slots", MAX_VIRTIO))?;
    }
    found.sort_unstable_by_key(|slot| slot.registers.start);
    Ok(found)
}

#[cfg(test)]
#[path = "info_tests.rs"]
mod tests;
