use super::*;
use crate::kernel::samples::{elf, image, load};
use crate::kernel::{Hint, recognise};
use proptest::prelude::*;
use std::format;
use std::string::ToString;
use std::vec;
use std::vec::Vec;

const BASE: u64 = 0x4000_0000;

fn ram(mib: u64) -> Ram {
    Ram { base: Gpa::new(BASE), size: mib * MIB }
}

fn kernel(file: &[u8]) -> Kernel {
    recognise(file, Hint::Flat).unwrap()
}

fn start(region: Region) -> u64 {
    region.start.get() - BASE
}

#[test]
fn an_image_goes_where_qemu_puts_it() {
    let layout = layout(ram(512), &kernel(&image(0, 40 * MIB, 4096)), 5 * MIB + 1, 9000).unwrap();
    assert_eq!((start(layout.kernel), layout.kernel.size), (2 * MIB, 40 * MIB));
    assert_eq!(layout.entry, layout.kernel.start);
    assert_eq!(start(layout.initrd.unwrap()), 128 * MIB);
    assert_eq!(start(layout.dtb), 134 * MIB);
    assert_eq!(layout.dtb_at_base, Some(Region { start: Gpa::new(BASE), size: 9000 }));
    assert_eq!(layout.segments().len(), 1);
    assert_eq!(layout.segments()[0].file_size, 4096);
}

#[test]
fn firmware_finds_only_the_tree_in_memory() {
    let code = Region { start: Gpa::new(0), size: 2 * MIB };
    let layout = firmware(ram(2), code, 9000).unwrap();
    assert_eq!((layout.entry, layout.kernel, layout.initrd), (Gpa::new(0), code, None));
    assert_eq!((layout.dtb, layout.dtb_at_base), (Region { start: Gpa::new(BASE), size: 9000 }, None));
    assert!(layout.segments().is_empty());
    let refused = |ram, size| firmware(ram, code, size).unwrap_err().to_string();
    assert_eq!(refused(ram(2), 0), "size of the device tree is 0x0; it must be between 1 byte and 2 MiB");
    let odd = Ram { base: Gpa::new(BASE), size: 3 * MIB };
    assert_eq!(refused(odd, 9000), "memory is 0x300000; it must be a multiple of 2 MiB, and not 0");
}

#[test]
fn an_old_image_keeps_its_text_offset() {
    let layout = layout(ram(64), &kernel(&image(0, 0, 8192)), 0, 9000).unwrap();
    assert_eq!(start(layout.kernel), 0x8_0000);
    assert_eq!(layout.initrd, None);
    assert_eq!(start(layout.dtb), 32 * MIB);
    // 512 KiB are below it.
    assert!(layout.dtb_at_base.is_some());
}

#[test]
fn a_flat_binary_has_the_tree_above_and_at_the_base() {
    let layout = layout(ram(128), &kernel(&[0x1f, 0x20, 0x03, 0xd5, 0, 0, 0, 0xff]), 0, 9000).unwrap();
    assert_eq!(start(layout.kernel), 0x8_0000);
    assert!(layout.dtb.start > layout.kernel.start);
    assert!(layout.dtb_at_base.is_some());
}

#[test]
fn an_elf_stands_at_its_addresses_or_slides_into_memory() {
    let fixed = elf(2, BASE + 0x20_0000, &[load(4096, BASE + 0x20_0000, BASE + 0x20_0000, 100, 8192)]);
    let placed = layout(ram(64), &kernel(&fixed), 0, 9000).unwrap();
    assert_eq!((start(placed.kernel), placed.kernel.size, placed.entry.get()), (2 * MIB, 8192, BASE + 0x20_0000));

    let movable = elf(3, 0x1_0010, &[load(4096, 0x1_0000, 0x1_0000, 100, 8192)]);
    let placed = layout(ram(64), &kernel(&movable), 0, 9000).unwrap();
    assert_eq!((start(placed.kernel), placed.entry.get()), (2 * MIB + 0x1_0000, BASE + 2 * MIB + 0x1_0010));

    let outside = elf(2, 0, &[load(4096, 0, 0, 100, 8192)]);
    let error = layout(ram(64), &kernel(&outside), 0, 9000).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the kernel needs 0x0..0x2000; it must lie inside the VM's memory, 0x40000000..0x44000000"
    );
}

#[test]
fn a_small_memory_is_packed() {
    let layout = layout(ram(16), &kernel(&image(0, 9 * MIB, 4096)), 2 * MIB, 9000).unwrap();
    assert_eq!(start(layout.initrd.unwrap()), 11 * MIB);
    assert_eq!(start(layout.dtb), 14 * MIB);
}

#[test]
fn what_does_not_fit_is_named() {
    let error = |ram, file: &[u8], initrd, dtb| layout(ram, &kernel(file), initrd, dtb).unwrap_err();
    let big = image(0, 70 * MIB, 4096);
    assert!(matches!(error(ram(64), &big, 0, 9000), LayoutError::Kernel { .. }));
    let small = image(0, 4 * MIB, 4096);
    assert!(matches!(error(ram(64), &small, 60 * MIB, 9000), LayoutError::Full { initrd, .. } if initrd == 60 * MIB));
    assert!(matches!(error(ram(64), &small, u64::MAX, 9000), LayoutError::Full { .. }));
    for (ram, dtb, field) in [
        (Ram { base: Gpa::new(BASE), size: 3 * MIB }, 9000, "memory"),
        (Ram { base: Gpa::new(BASE), size: 0 }, 9000, "memory"),
        (Ram { base: Gpa::new(BASE + 4096), size: 4 * MIB }, 9000, "start of memory"),
        (Ram { base: Gpa::new(BASE), size: !(BLOCK - 1) }, 9000, "memory"),
        (ram(64), 0, "size of the device tree"),
        (ram(64), 2 * MIB + 1, "size of the device tree"),
    ] {
        let LayoutError::Field(invalid) = error(ram, &small, 0, dtb) else { panic!("{field}") };
        assert_eq!(invalid.field, field);
    }
    let far = image(u64::MAX - 4096, 4 * MIB, 4096);
    let LayoutError::Field(invalid) = error(ram(64), &far, 0, 9000) else { panic!() };
    assert_eq!(invalid.field, "text_offset of the Image");
}

proptest! {
    #[test]
    fn nothing_overlaps_and_everything_is_inside(
        blocks in 1u64..600, text_offset in 0u64..8 * MIB, image_size in 0u64..64 * MIB, initrd in 0u64..256 * MIB,
        dtb in 1u64..2 * MIB,
    ) {
        let memory = Ram { base: Gpa::new(BASE), size: blocks * BLOCK };
        let Ok(layout) = layout(memory, &kernel(&image(text_offset, image_size, 4096)), initrd, dtb) else { return Ok(()) };
        let mut regions: Vec<Region> = vec![layout.kernel, layout.dtb];
        regions.extend(layout.initrd);
        regions.extend(layout.dtb_at_base);
        for (i, region) in regions.iter().enumerate() {
            prop_assert!(region.start.get() >= BASE && region.end().get() <= BASE + memory.size, "{}", region);
            for other in &regions[i + 1..] {
                prop_assert!(!region.overlaps(*other), "{} {}", region, other);
            }
        }
        prop_assert!(layout.dtb.start > layout.kernel.start);
        prop_assert_eq!(layout.dtb.start.get() % BLOCK, 0);
        let used = if image_size == 0 { 0x8_0000 } else { text_offset };
        prop_assert_eq!((layout.kernel.start.get() - used) % BLOCK, 0);
        prop_assert_eq!(format!("{}", layout.dtb).contains("0x"), true);
    }
}
