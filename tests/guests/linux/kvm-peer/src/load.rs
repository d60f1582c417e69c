//! Kernel, initial file system and device tree, placed in the guest's memory.

use std::error::Error;
use std::fs;
use std::path::Path;

use dtoolkit::Node;
use dtoolkit::Property;
use dtoolkit::fdt::Fdt;
use vm_fdt::FdtWriter;

use crate::RAM;
use crate::memory::Memory;

/// Where a flat image starts, above [`RAM`].
const FLAT: u64 = 0x8_0000;
/// Where an `Image` of text offset zero starts: 2 MiB aligned (kernel documentation, "Booting AArch64 Linux").
const IMAGE: u64 = 2 << 20;
/// Where a flat image's device tree is: not at either end, so that most of memory is in one piece.
const FLAT_TREE: u64 = 128 << 20;

/// Where the vCPU starts.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    pub entry: u64,
    pub device_tree: u64,
}

/// Loads whatever `/guest` holds.
pub fn load(memory: &mut Memory, arguments: &str) -> Result<Start, Box<dyn Error>> {
    let kernel = fs::read("/guest/kernel")?;
    if !Path::new("/guest/dtb").exists() {
        let start = Start { entry: RAM + FLAT, device_tree: RAM + FLAT_TREE };
        memory.write(start.entry, &kernel)?;
        memory.write(start.device_tree, &flat_tree(memory.size(), arguments)?)?;
        return Ok(start);
    }
    let tree = fs::read("/guest/dtb")?;
    // The last 2 MiB: the tree may not cross a boundary of that size.
    let start = Start { entry: RAM + IMAGE, device_tree: RAM + memory.size() - (2 << 20) };
    memory.write(start.entry, &kernel)?;
    memory.write(start.device_tree, &tree)?;
    memory.write(initrd_of(&tree)?, &fs::read("/guest/initrd")?)?;
    Ok(start)
}

/// `/chosen/linux,initrd-start`.
fn initrd_of(tree: &[u8]) -> Result<u64, Box<dyn Error>> {
    let tree = Fdt::new(tree).map_err(|error| format!("the device tree: {error:?}"))?;
    let chosen = tree.find_node("/chosen").ok_or("the device tree has no /chosen")?;
    let start = chosen.property("linux,initrd-start").ok_or("the device tree names no initial file system")?;
    match *start.value() {
        [a, b, c, d] => Ok(u32::from_be_bytes([a, b, c, d]).into()),
        [a, b, c, d, e, f, g, h] => Ok(u64::from_be_bytes([a, b, c, d, e, f, g, h])),
        _ => Err("linux,initrd-start is no number".into()),
    }
}

/// What a flat guest reads: memory, command line, conduit, one CPU.
fn flat_tree(memory: u64, arguments: &str) -> Result<Vec<u8>, vm_fdt::Error> {
    let mut tree = FdtWriter::new()?;
    let root = tree.begin_node("")?;
    tree.property_u32("#address-cells", 2)?;
    tree.property_u32("#size-cells", 2)?;
    let chosen = tree.begin_node("chosen")?;
    tree.property_string("bootargs", arguments)?;
    tree.end_node(chosen)?;
    let ram = tree.begin_node("memory@40000000")?;
    tree.property_string("device_type", "memory")?;
    tree.property_array_u64("reg", &[RAM, memory])?;
    tree.end_node(ram)?;
    let psci = tree.begin_node("psci")?;
    tree.property_string("compatible", "arm,psci-1.0")?;
    tree.property_string("method", "hvc")?;
    tree.end_node(psci)?;
    let cpus = tree.begin_node("cpus")?;
    tree.property_u32("#address-cells", 1)?;
    tree.property_u32("#size-cells", 0)?;
    let cpu = tree.begin_node("cpu@0")?;
    tree.property_string("device_type", "cpu")?;
    tree.property_u32("reg", 0)?;
    tree.end_node(cpu)?;
    tree.end_node(cpus)?;
    tree.end_node(root)?;
    tree.finish()
}
