use super::*;
use dtoolkit::fdt::Fdt;
use dtoolkit::{Node, Property};
use entresol_addr::Gpa;
use proptest::prelude::*;
use std::string::ToString;
use std::vec::Vec;

fn machine(cmdline: &str) -> Machine<'_> {
    Machine {
        ram: Ram { base: Gpa::new(virt::RAM_BASE), size: 512 << 20 },
        vcpus: 2,
        cmdline,
        initrd: Some(Region { start: Gpa::new(0x4800_0000), size: 0x1234 }),
        virtio: 0b1000_0000_0000_0000_0000_0000_0000_0011,
        window: None,
        flash: Some(64 << 20),
        rng_seed: Some([7; 32]),
        kaslr_seed: Some(0x0102_0304_0506_0708),
    }
}

/// The property's value in the tree, as cells.
fn cells(blob: &[u8], path: &str, name: &str) -> Vec<u32> {
    let value = bytes(blob, path, name);
    assert_eq!(value.len() % 4, 0);
    value.chunks_exact(4).map(|cell| u32::from_be_bytes(cell.try_into().unwrap())).collect()
}

fn bytes(blob: &[u8], path: &str, name: &str) -> Vec<u8> {
    let fdt = Fdt::new(blob).unwrap();
    let node = fdt.find_node(path).unwrap_or_else(|| panic!("no node {path}"));
    let property = node.property(name).unwrap_or_else(|| panic!("no property {name} in {path}"));
    property.value().to_vec()
}

#[test]
fn addresses_and_interrupts_are_those_of_virt() {
    let blob = generate(&machine("console=ttyAMA0")).unwrap();
    for (path, name, want) in [
        ("/memory@40000000", "reg", &[0, 0x4000_0000, 0, 0x2000_0000][..]),
        ("/pl011@9000000", "reg", &[0, 0x0900_0000, 0, 0x1000]),
        ("/pl011@9000000", "interrupts", &[0, 1, 4]),
        ("/pl031@9010000", "reg", &[0, 0x0901_0000, 0, 0x1000]),
        ("/pl031@9010000", "interrupts", &[0, 2, 4]),
        ("/vmgenid@90d0000", "reg", &[0, 0x090d_0000, 0, 0x1000]),
        ("/vmgenid@90d0000", "interrupts", &[0, 10, 1]),
        ("/intc@8000000", "reg", &[0, 0x0800_0000, 0, 0x1_0000, 0, 0x080a_0000, 0, 0xf6_0000]),
        ("/intc@8000000", "#interrupt-cells", &[3]),
        ("/virtio_mmio@a000000", "interrupts", &[0, 16, 1]),
        ("/virtio_mmio@a000200", "reg", &[0, 0x0a00_0200, 0, 0x200]),
        ("/virtio_mmio@a003e00", "interrupts", &[0, 47, 1]),
        ("/flash@4000000", "reg", &[0, 0x0400_0000, 0, 0x0400_0000]),
        ("/flash@4000000", "bank-width", &[4]),
        ("/timer", "interrupts", &[1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4]),
        ("/apb-pclk", "clock-frequency", &[24_000_000]),
        ("/cpus/cpu@1", "reg", &[1]),
        ("/psci", "cpu_on", &[0xc400_0003]),
        ("/chosen", "linux,initrd-start", &[0, 0x4800_0000]),
        ("/chosen", "linux,initrd-end", &[0, 0x4800_1234]),
        ("/chosen", "kaslr-seed", &[0x0102_0304, 0x0506_0708]),
    ] {
        assert_eq!(cells(&blob, path, name), want, "{path} {name}");
    }
    assert_eq!(bytes(&blob, "/chosen", "bootargs"), b"console=ttyAMA0\0");
    assert_eq!(bytes(&blob, "/chosen", "stdout-path"), b"/pl011@9000000\0");
    assert_eq!(bytes(&blob, "/chosen", "rng-seed"), [7; 32]);
    assert_eq!(bytes(&blob, "/psci", "compatible"), b"arm,psci-1.0\0arm,psci-0.2\0arm,psci\0");
    assert_eq!(bytes(&blob, "/psci", "method"), b"hvc\0");
    assert_eq!(bytes(&blob, "/", "dma-coherent"), b"");
}

#[test]
fn references_lead_to_their_nodes() {
    let blob = generate(&machine("")).unwrap();
    let gic = cells(&blob, "/intc@8000000", "phandle");
    assert_eq!(cells(&blob, "/", "interrupt-parent"), gic);
    let clock = cells(&blob, "/apb-pclk", "phandle");
    assert_ne!(clock, gic);
    assert_eq!(cells(&blob, "/pl031@9010000", "clocks"), clock);
    assert_eq!(cells(&blob, "/pl011@9000000", "clocks"), [clock[0], clock[0]]);
}

#[test]
fn only_what_the_vm_has_is_there() {
    let none = Machine { initrd: None, virtio: 0, flash: None, rng_seed: None, kaslr_seed: None, ..machine("") };
    let blob = generate(&none).unwrap();
    let fdt = Fdt::new(&blob).unwrap();
    assert!(fdt.find_node("/virtio_mmio@a000000").is_none());
    assert!(fdt.find_node("/cpus/cpu@2").is_none());
    let chosen = fdt.find_node("/chosen").unwrap();
    for name in ["bootargs", "linux,initrd-start", "linux,initrd-end", "rng-seed", "kaslr-seed"] {
        assert!(chosen.property(name).is_none(), "{name}");
    }
}

#[test]
fn the_header_tells_the_blob() {
    let blob = generate(&machine("x")).unwrap();
    let word = |index: usize| u32::from_be_bytes(blob[index * 4..index * 4 + 4].try_into().unwrap()) as usize;
    assert_eq!(word(0), 0xd00d_feed);
    assert_eq!(word(1), blob.len());
    assert_eq!((word(5), word(6)), (17, 16));
    assert_eq!(word(2) + word(9), word(3));
    assert_eq!(word(3) + word(8), blob.len());
    assert!(blob.len() < 8192);
}

#[test]
fn bad_values_are_named() {
    let error = |machine: &Machine<'_>| generate(machine).unwrap_err().to_string();
    assert_eq!(error(&Machine { vcpus: 0, ..machine("") }), "vcpus is 0x0; it must be between 1 and 8");
    assert_eq!(error(&Machine { vcpus: 9, ..machine("") }), "vcpus is 0x9; it must be between 1 and 8");
    assert!(error(&machine("a\0b")).starts_with("offset of a zero byte in cmdline is 0x1"));
    assert!(error(&machine(&"x".repeat(2048))).starts_with("length of cmdline is 0x800"));
    assert!(generate(&machine(&"x".repeat(2047))).is_ok());
    let elsewhere = Ram { base: Gpa::new(0x8000_0000), size: 1 << 30 };
    assert!(error(&Machine { ram: elsewhere, ..machine("") }).starts_with("start of memory is 0x80000000"));
}

proptest! {
    #[test]
    fn every_machine_reads_back(
        vcpus in 1u8..=8, virtio: u32, cmdline in "[ -~]{0,300}", start: u32, size: u32, blocks in 1u64..1000, flash: Option<u64>,
    ) {
        let initrd = Some(Region { start: Gpa::new(start.into()), size: size.into() });
        let ram = Ram { base: Gpa::new(virt::RAM_BASE), size: blocks << 21 };
        let machine = Machine { ram, vcpus, cmdline: &cmdline, initrd, virtio, window: None, flash, rng_seed: None, kaslr_seed: None };
        let blob = generate(&machine).unwrap();
        let fdt = Fdt::new(&blob).unwrap();
        let root = fdt.find_node("/").unwrap();
        let count = |prefix: &str, of: &dyn Fn() -> Vec<std::string::String>| {
            of().iter().filter(|name| name.starts_with(prefix)).count()
        };
        let names = || root.children().map(|node| node.name().to_string()).collect();
        prop_assert_eq!(count("virtio_mmio@", &names), virtio.count_ones() as usize);
        prop_assert_eq!(count("flash@", &names), usize::from(flash.is_some()));
        let cpus = fdt.find_node("/cpus").unwrap();
        prop_assert_eq!(cpus.children().count(), usize::from(vcpus));
        // Addresses change no sizes.
        let moved = generate(&Machine { initrd: Some(Region { start: Gpa::new(0), size: 0 }), ..machine }).unwrap();
        prop_assert_eq!(moved.len(), blob.len());
    }
}

#[test]
fn where_devices_reach_a_window_the_bus_says_so() {
    let with = |size: u64| {
        let ram = Ram { base: Gpa::new(virt::RAM_BASE), size };
        generate(&Machine { ram, window: Some(Window::of(ram)), ..machine("") }).unwrap()
    };
    let small = with(512 << 20);
    assert_eq!(cells(&small, "/virtio-bus", "dma-ranges"), [0, 0x5e00_0000, 0, 0x5e00_0000, 0, 0x0200_0000]);
    let pool = "/reserved-memory/device-pool@5e000000";
    assert_eq!(bytes(&small, pool, "compatible"), b"restricted-dma-pool\0");
    assert_eq!(cells(&small, pool, "reg"), [0, 0x5e00_0000, 0, 0x0200_0000]);
    let device = "/virtio-bus/virtio_mmio@a000000";
    assert_eq!(cells(&small, device, "memory-region"), cells(&small, pool, "phandle"));
    assert_eq!(cells(&small, device, "interrupts"), [0, 16, 1]);

    let large = with(1280 << 20);
    assert_eq!(cells(&large, "/virtio-bus", "dma-ranges"), [0, 0x7800_0000, 0, 0x7800_0000, 0, 0x0800_0000]);
    let pool = "/reserved-memory/device-pool@7e000000";
    assert_eq!(bytes(&large, pool, "compatible"), b"shared-dma-pool\0");
    assert_eq!(bytes(&large, pool, "linux,cma-default"), b"");
    let blob = Fdt::new(&large).unwrap();
    assert!(blob.find_node(device).unwrap().property("memory-region").is_none());
    assert!(Fdt::new(&small).unwrap().find_node("/virtio_mmio@a000000").is_none());
}
