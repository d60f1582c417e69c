//! The parser, against device trees made by another crate.

use super::*;
use std::boxed::Box;
use std::vec::Vec;
use vm_fdt::{Error, FdtReserveEntry, FdtWriter};

/// What a test changes of a machine that is otherwise right.
struct Tree {
    method: &'static str,
    cpus: Vec<u64>,
    ram: Vec<(u64, u64)>,
    initrd: Option<(u64, u64)>,
    gic: &'static str,
    uart_interrupt: [u32; 3],
    /// Its `status`.
    rtc: Option<&'static str>,
}

impl Default for Tree {
    fn default() -> Self {
        Self {
            method: "smc",
            cpus: std::vec![0, 1, 0x100],
            ram: std::vec![(0x4000_0000, 0x8000_0000)],
            initrd: Some((0x4800_0000, 0x4812_3456)),
            gic: "arm,gic-v3",
            uart_interrupt: [0, 1, 4],
            rtc: None,
        }
    }
}

impl Tree {
    fn build(&self) -> Result<Vec<u8>, Error> {
        let reserved = [FdtReserveEntry::new(0x5000_0000, 0x1000)?];
        let mut fdt = FdtWriter::new_with_mem_reserv(&reserved)?;
        let root = fdt.begin_node("")?;
        fdt.property_u32("#address-cells", 2)?;
        fdt.property_u32("#size-cells", 2)?;
        let chosen = fdt.begin_node("chosen")?;
        fdt.property_string("bootargs", "log=debug")?;
        if let Some((start, end)) = self.initrd {
            fdt.property_u32("linux,initrd-start", start as u32)?;
            fdt.property_u64("linux,initrd-end", end)?;
        }
        fdt.end_node(chosen)?;
        let psci = fdt.begin_node("psci")?;
        fdt.property_string("method", self.method)?;
        fdt.end_node(psci)?;
        let memory = fdt.begin_node("memory@40000000")?;
        fdt.property_string("device_type", "memory")?;
        let reg: Vec<u64> = self.ram.iter().flat_map(|(start, size)| [*start, *size]).collect();
        fdt.property_array_u64("reg", &reg)?;
        fdt.end_node(memory)?;
        let cpus = fdt.begin_node("cpus")?;
        fdt.property_u32("#address-cells", 1)?;
        fdt.property_u32("#size-cells", 0)?;
        for mpidr in &self.cpus {
            let cpu = fdt.begin_node(&std::format!("cpu@{mpidr:x}"))?;
            fdt.property_u32("reg", *mpidr as u32)?;
            fdt.end_node(cpu)?;
        }
        fdt.end_node(cpus)?;
        let gic = fdt.begin_node("intc@8000000")?;
        fdt.property_string("compatible", self.gic)?;
        fdt.property_array_u64("reg", &[0x800_0000, 0x1_0000, 0x80a_0000, 0xf6_0000])?;
        fdt.end_node(gic)?;
        Self::device(&mut fdt, "pl011@9000000", "arm,pl011", 0x900_0000, self.uart_interrupt, "okay")?;
        if let Some(status) = self.rtc {
            Self::device(&mut fdt, "pl031@9010000", "arm,pl031", 0x901_0000, [0, 2, 4], status)?;
        }
        Self::device(&mut fdt, "virtio_mmio@a000200", "virtio,mmio", 0xa00_0200, [0, 17, 1], "okay")?;
        Self::device(&mut fdt, "virtio_mmio@a000000", "virtio,mmio", 0xa00_0000, [0, 16, 1], "okay")?;
        fdt.end_node(root)?;
        fdt.finish()
    }

    fn device(
        fdt: &mut FdtWriter,
        name: &str,
        kind: &str,
        base: u64,
        interrupt: [u32; 3],
        status: &str,
    ) -> Result<(), Error> {
        let node = fdt.begin_node(name)?;
        fdt.property_string("status", status)?;
        fdt.property_string_list("compatible", std::vec![kind.into(), "arm,primecell".into()])?;
        fdt.property_array_u64("reg", &[base, 0x200])?;
        fdt.property_array_u32("interrupts", &interrupt)?;
        fdt.end_node(node)
    }

    fn blob(&self) -> &'static [u8] {
        Box::leak(self.build().unwrap().into_boxed_slice())
    }

    fn parse(&self, boot_cpu: u64) -> Result<BootInfo, InfoError> {
        parse(self.blob(), 0x4900_0000, Region { start: 0x4020_0000, end: 0x4040_0000 }, boot_cpu)
    }
}

#[test]
fn a_whole_machine_is_read() {
    let info = Tree::default().parse(0x8000_0001).unwrap();
    assert_eq!(info.ram.as_slice(), [Region { start: 0x4000_0000, end: 0xc000_0000 }]);
    assert_eq!(info.reserved.as_slice(), [Region { start: 0x5000_0000, end: 0x5000_1000 }]);
    assert_eq!(info.bundle, Some(Region { start: 0x4800_0000, end: 0x4812_3456 }));
    assert_eq!(info.cpus.as_slice(), [1, 0, 0x100], "the boot CPU comes first, without MPIDR's flags");
    assert_eq!(info.uart.intid, 33);
    assert!(!info.uart.edge);
    assert_eq!(info.rtc, None);
    assert_eq!((info.gicd.start, info.gicr.start, info.gicr.size()), (0x800_0000, 0x80a_0000, 0xf6_0000));
    let slots: Vec<_> = info.virtio_mmio.iter().map(|slot| (slot.registers.start, slot.intid, slot.edge)).collect();
    assert_eq!(slots, [(0xa00_0000, 48, true), (0xa00_0200, 49, true)], "by address");
    assert_eq!(info.bootargs, "log=debug");
    assert_eq!(info.dtb.start, 0x4900_0000);
}

#[test]
fn memory_is_divided_around_what_is_used() {
    let info = Tree::default().parse(0).unwrap();
    let memory = crate::boot::memory::split(&info, 5 << 20).unwrap();
    assert_eq!(memory.heap, Region { start: 0x4812_4000, end: 0x4812_4000 + (6 << 20) }, "the smallest that fits");
    let free: u64 = memory.frames.iter().map(|range| range.count()).sum();
    let used = 0x200 + 1 + 0x124 + 1 + (6 << 20 >> 12);
    assert_eq!(free, (0x8000_0000 >> 12) - used, "image, device tree, bundle, reserved page, heap");
    assert!(memory.frames.windows(2).all(|pair| pair[0].count() >= pair[1].count()), "largest first");
    let refusal = crate::boot::memory::split(&info, 1 << 40).unwrap_err();
    assert_eq!(refusal.wanted, 1 << 40);
    assert!(crate::boot::memory::split(&info, u64::MAX).is_err());
}

#[test]
fn a_machine_that_cannot_carry_us_is_refused_by_name() {
    let refused = |tree: Tree, boot_cpu| std::format!("{}", tree.parse(boot_cpu).unwrap_err());
    for (tree, boot_cpu, words) in [
        (Tree { method: "hvc", ..Tree::default() }, 0, "psci method is not smc"),
        (Tree { gic: "arm,cortex-a15-gic", ..Tree::default() }, 0, "no arm,gic-v3"),
        (Tree::default(), 7, "no cpu node of the CPU that booted"),
        (Tree { cpus: (0..65).collect(), ..Tree::default() }, 0, "more than 64 CPUs"),
        (Tree { ram: std::vec![(0, 0)], ..Tree::default() }, 0, "no memory"),
        (Tree { ram: std::vec![(0, 0x2000), (0x1000, 0x2000)], ..Tree::default() }, 0, "ranges of RAM overlap"),
        (Tree { ram: std::vec![(u64::MAX, 2)], ..Tree::default() }, 0, "a reg range wraps"),
        (Tree { initrd: Some((0x2000, 0x1000)), ..Tree::default() }, 0, "linux,initrd-start is not below"),
        (Tree { uart_interrupt: [1, 1, 4], ..Tree::default() }, 0, "not an SPI"),
    ] {
        let message = refused(tree, boot_cpu);
        assert!(message.contains(words), "{message:?} does not say {words:?}");
    }
    assert!(matches!(parse(b"no tree", 0, Region::default(), 0), Err(InfoError::Blob(_))));
}

#[test]
fn without_a_bundle_there_is_none() {
    assert_eq!(Tree { initrd: None, ..Tree::default() }.parse(0).unwrap().bundle, None);
}

#[test]
fn the_console_is_found_first() {
    let blob = Tree::default().blob();
    assert_eq!(console_of(blob), Some(0x900_0000));
    assert_eq!(console_of(b""), None);
}

#[test]
fn firmware_that_has_ended_leaves_its_clock() {
    for (status, seen) in [("okay", true), ("disabled", false)] {
        let tree = Tree { rtc: Some(status), ..Tree::default() };
        assert_eq!(tree.parse(0).unwrap().rtc.is_some(), seen, "{status}");
        assert_eq!(rtc_even_if_disabled(tree.blob()).unwrap().map(|rtc| rtc.registers.start), Some(0x901_0000));
    }
    assert_eq!(rtc_even_if_disabled(Tree::default().blob()).unwrap(), None);
}

#[test]
fn firmware_has_the_last_word_on_memory_and_bundle() {
    let tree = Tree { rtc: Some("disabled"), ..Tree::default() };
    let mut info = tree.parse(0).unwrap();
    let free = Region { start: 0x4100_0000, end: 0x4200_0000 };
    let handover = crate::boot::efi::Handover { bundle: None, ram: [free].into_iter().collect() };
    handover.apply(&mut info, tree.blob()).unwrap();
    assert_eq!(info.ram.as_slice(), [free]);
    assert_eq!(info.bundle, None, "what the tree names may be gone");
    assert_eq!(info.rtc.map(|rtc| rtc.intid), Some(34));
}
