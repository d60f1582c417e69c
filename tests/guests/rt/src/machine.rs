//! Where things are on QEMU's `virt` machine, and what the device tree adds: memory, command line, conduit.

use crate::fdt::Fdt;
use crate::memory;
use crate::smccc::Conduit;

/// PL011 (Arm DDI 0183).
pub const UART: u64 = 0x0900_0000;
/// PL031 (Arm DDI 0224).
pub const RTC: u64 = 0x0901_0000;
/// First of the virtio-mmio transports, and how many there are, and how far apart.
pub const VIRTIO: (u64, u64, u64) = (0x0a00_0000, 32, 0x200);
/// GICv3's distributor.
pub const GICD: u64 = 0x0800_0000;
/// GICv3's first redistributor; each CPU's is 0x2_0000 above the one before.
pub const GICR: u64 = 0x080a_0000;
/// Where memory starts.
pub const RAM: u64 = 0x4000_0000;

/// Longest command line that is kept, in bytes.
const ARGUMENTS: usize = 512;
/// Assumed where the device tree says nothing.
const SMALLEST: u64 = 64 << 20;

/// The machine as this program was told of it.
pub struct Machine {
    /// Bytes of memory from [`RAM`].
    pub memory: u64,
    /// How firmware is called.
    pub conduit: Conduit,
    /// The device tree's own bytes.
    pub device_tree: core::ops::Range<u64>,
    /// CPU nodes of the device tree.
    pub cpus: usize,
    arguments: [u8; ARGUMENTS],
    length: usize,
}

impl Machine {
    pub(crate) fn read(device_tree: u64) -> Self {
        let mut machine = Self {
            memory: SMALLEST,
            conduit: Conduit::Hvc,
            device_tree: 0..0,
            cpus: 1,
            arguments: [0; ARGUMENTS],
            length: 0,
        };
        let Some(fdt) = Fdt::at(device_tree) else { return machine };
        machine.device_tree = device_tree..device_tree + fdt.size();
        fdt.properties(|node, property, value| {
            match (node, property) {
                (b"chosen", b"bootargs") => {
                    let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
                    machine.length = text.len().min(ARGUMENTS);
                    machine.arguments[..machine.length].copy_from_slice(&text[..machine.length]);
                }
                (b"psci", b"method") if value == b"smc\0" => machine.conduit = Conduit::Smc,
                (b"memory@40000000", b"reg") if value.len() == 16 => {
                    machine.memory = value[8..].iter().fold(0, |size, byte| size << 8 | u64::from(*byte));
                }
                _ => {}
            };
        });
        let mut cpus = 0;
        fdt.properties(|node, property, _| {
            if node.starts_with(b"cpu@") && property == b"reg" {
                cpus += 1;
            }
        });
        machine.cpus = cpus.max(1);
        machine
    }

    /// The value of `name=value` on the command line; a word of no value is empty.
    pub fn argument(&self, name: &str) -> Option<&str> {
        let line = core::str::from_utf8(&self.arguments[..self.length]).unwrap_or_default();
        line.split_ascii_whitespace().find_map(|word| match word.split_once('=') {
            Some((key, value)) if key == name => Some(value),
            None if word == name => Some(""),
            _ => None,
        })
    }

    /// A number on the command line, decimal or after `0x`.
    pub fn number(&self, name: &str) -> Option<u64> {
        let value = self.argument(name)?;
        match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => value.parse().ok(),
        }
    }

    /// Where memory ends.
    pub fn end(&self) -> u64 {
        RAM + self.memory
    }

    /// All memory behind the image, from the next 2 MiB on; the device tree is in it, and was read.
    pub fn behind_image(&self) -> core::ops::Range<u64> {
        memory::image().end.next_multiple_of(2 << 20)..self.end()
    }

    /// Memory that neither the image nor the device tree is in, from the first 2 MiB behind the image; it ends at the
    /// device tree if that follows, else where memory does.
    pub fn free(&self) -> core::ops::Range<u64> {
        let tree = &self.device_tree;
        let image = memory::image().end.next_multiple_of(2 << 20);
        let end = if tree.start >= image && !tree.is_empty() { tree.start & !0xfff } else { self.end() };
        let behind = tree.end.next_multiple_of(2 << 20);
        // The larger of the two parts that the device tree leaves.
        if self.end() - behind.min(self.end()) > end - image { behind..self.end() } else { image..end }
    }
}
