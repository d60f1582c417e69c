//! Where everything goes in a VM's memory.
//!
//! Purpose: one function decides the addresses of kernel, initial RAM disk and device tree, by the rules of Linux's boot
//! protocol (Documentation/arch/arm64/booting.rst) and with the habits of QEMU's `virt` machine, which programs know:
//!
//! ```text
//! base                 another copy of the tree, where firmware for `virt` looks for it (if it fits below the kernel)
//! base + text_offset   Image (2 MiB further if text_offset is below 4 KiB) · flat: base + 512 KiB · ELF: its own addresses
//! base + size/2        initial RAM disk, at most 128 MiB above the base, never inside the kernel
//! …                    device tree, at the next 2 MiB boundary, so always above the image
//! ```
//!
//! Firmware is not copied ([`firmware`]): only the tree is, to the start of memory.
//!
//! In small memories, where that does not fit, the RAM disk follows the kernel directly.
//!
//! Invariants: everything lies inside memory, and nothing overlaps.

use arrayvec::ArrayVec;
use entresol_addr::{Gpa, PageSize};

use crate::kernel::{Elf, Format, Image, Kernel, MAX_SEGMENTS, Segment};
use crate::{Invalid, Ram, Region, fdt};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const BLOCK: u64 = PageSize::Size2M.bytes();
/// Offset of flat binaries, as QEMU has it.
const FLAT_OFFSET: u64 = 512 * KIB;
/// QEMU keeps this much below an Image for its own boot code, and moves an Image up by 2 MiB that leaves less.
const LEAST_IMAGE_OFFSET: u64 = 4 * KIB;
/// QEMU puts the RAM disk at half of memory, but not above this.
const INITRD_OFFSET: u64 = 128 * MIB;

/// Guest physical addresses of what a VM starts with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// First instruction.
    pub entry: Gpa,
    /// From the kernel's first byte to its last, uninitialised data included.
    pub kernel: Region,
    /// The initial RAM disk, if there is one.
    pub initrd: Option<Region>,
    /// The device tree; its address is X0.
    pub dtb: Region,
    /// A second copy of the tree at the start of memory, if it fits there.
    pub dtb_at_base: Option<Region>,
    segments: ArrayVec<Segment, MAX_SEGMENTS>,
}

impl Layout {
    /// The kernel's parts, at their guest physical addresses.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }
}

/// Why a VM's memory cannot hold what it shall start with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A value that breaks a rule by itself.
    #[error(transparent)]
    Field(#[from] Invalid),
    /// The kernel does not fit into memory.
    #[error("the kernel needs {kernel}; it must lie inside the VM's memory, {memory}")]
    Kernel {
        /// What it needs.
        kernel: Region,
        /// What there is.
        memory: Region,
    },
    /// Kernel, RAM disk and device tree do not fit together.
    #[error(
        "the initrd ({initrd} bytes) and the device tree ({dtb} bytes) do not fit above the kernel, {kernel}; they must lie \
         inside the VM's memory, {memory}"
    )]
    Full {
        /// Bytes of the RAM disk.
        initrd: u64,
        /// Bytes of the tree.
        dtb: u64,
        /// The kernel.
        kernel: Region,
        /// The memory.
        memory: Region,
    },
}

/// Decides all addresses for a VM with memory `ram`.
///
/// `initrd_size` is 0 if there is none. `dtb_size` is that of the tree, which does not depend on the addresses in it.
///
/// # Errors
///
/// Memory that does not begin or end at a 2 MiB boundary; a tree that is empty or larger than [`fdt::MAX_SIZE`]; anything
/// that does not fit.
pub fn layout(ram: Ram, kernel: &Kernel, initrd_size: u64, dtb_size: u64) -> Result<Layout, LayoutError> {
    let memory = check(ram, dtb_size)?;
    let placement = match kernel.format() {
        Format::Image(image) => place_image(memory, image, kernel.size())?,
        Format::Elf(elf) => place_elf(memory, elf)?,
        Format::Flat => place_flat(memory, kernel.size())?,
    };
    let Placement { entry, kernel, segments } = placement;
    let (initrd, dtb) = above(memory, kernel, initrd_size, dtb_size).ok_or(LayoutError::Full {
        initrd: initrd_size,
        dtb: dtb_size,
        kernel,
        memory,
    })?;
    let low = Region { start: memory.start, size: dtb_size };
    let dtb_at_base = Some(low).filter(|low| !low.overlaps(kernel));
    Ok(Layout { entry: Gpa::new(entry), kernel, initrd, dtb, dtb_at_base, segments })
}

/// The same for a VM that starts at the first byte of `code`, which lies outside memory and stays there: the tree at the
/// start of memory is all there is.
///
/// # Errors
///
/// As [`layout`].
pub fn firmware(ram: Ram, code: Region, dtb_size: u64) -> Result<Layout, LayoutError> {
    let memory = check(ram, dtb_size)?;
    let dtb = Region { start: memory.start, size: dtb_size };
    Ok(Layout { entry: code.start, kernel: code, initrd: None, dtb, dtb_at_base: None, segments: ArrayVec::new() })
}

/// The rules that values obey by themselves.
fn check(ram: Ram, dtb_size: u64) -> Result<Region, Invalid> {
    let (base, size) = (ram.base.get(), ram.size);
    if !base.is_multiple_of(BLOCK) {
        return Err(Invalid { field: "start of memory", value: base, rule: "a multiple of 2 MiB" });
    }
    if size == 0 || !size.is_multiple_of(BLOCK) {
        return Err(Invalid { field: "memory", value: size, rule: "a multiple of 2 MiB, and not 0" });
    }
    if base.checked_add(size).is_none() {
        return Err(Invalid { field: "memory", value: size, rule: "such that its end fits in 64 bits" });
    }
    if dtb_size == 0 || dtb_size > fdt::MAX_SIZE {
        return Err(Invalid { field: "size of the device tree", value: dtb_size, rule: "between 1 byte and 2 MiB" });
    }
    Ok(Region { start: ram.base, size })
}

/// Where a kernel goes.
struct Placement {
    entry: u64,
    kernel: Region,
    segments: ArrayVec<Segment, MAX_SEGMENTS>,
}

impl Placement {
    /// Contents that are one piece, in a region that may be larger.
    fn whole(memory: Region, offset: u64, file_size: u64, size: u64) -> Result<Self, LayoutError> {
        let address = memory.start.get().wrapping_add(offset);
        let kernel = inside(memory, address, size)?;
        let mut segments = ArrayVec::new();
        segments.push(Segment { offset: 0, file_size, address, memory_size: file_size });
        Ok(Self { entry: address, kernel, segments })
    }
}

/// The image at `text_offset` from a 2 MiB boundary. Its BSS is the kernel's to clear, so it is reserved, but not written.
fn place_image(memory: Region, image: &Image, file_size: u64) -> Result<Placement, LayoutError> {
    let lift = if image.text_offset < LEAST_IMAGE_OFFSET { BLOCK } else { 0 };
    let offset = image.text_offset.checked_add(lift).filter(|offset| *offset < memory.size).ok_or(Invalid {
        field: "text_offset of the Image",
        value: image.text_offset,
        rule: "less than the size of memory, less 2 MiB",
    })?;
    Placement::whole(memory, offset, file_size, image.image_size.max(file_size))
}

fn place_flat(memory: Region, file_size: u64) -> Result<Placement, LayoutError> {
    Placement::whole(memory, FLAT_OFFSET, file_size, file_size)
}

/// The program at its own addresses; one that can move and was linked below memory slides up to 2 MiB above its start.
fn place_elf(memory: Region, elf: &Elf) -> Result<Placement, LayoutError> {
    let lowest = elf.segments.iter().map(|segment| segment.address).min().unwrap_or_default();
    let slides = elf.movable && lowest < memory.start.get();
    let slide = if slides { memory.start.get() + BLOCK - lowest / BLOCK * BLOCK } else { 0 };
    let moved = |segment: &Segment| Segment { address: segment.address.wrapping_add(slide), ..*segment };
    let segments: ArrayVec<Segment, MAX_SEGMENTS> = elf.segments.iter().map(moved).collect();
    let (mut start, mut end) = (u64::MAX, 0);
    for segment in &segments {
        let region = inside(memory, segment.address, segment.memory_size)?;
        start = start.min(region.start.get());
        end = end.max(region.end().get());
    }
    let kernel = Region { start: Gpa::new(start), size: end.saturating_sub(start) };
    Ok(Placement { entry: elf.entry.wrapping_add(slide), kernel, segments })
}

/// `size` bytes from `address`, if they lie inside memory.
fn inside(memory: Region, address: u64, size: u64) -> Result<Region, LayoutError> {
    let kernel = Region { start: Gpa::new(address), size };
    let offset = address.wrapping_sub(memory.start.get());
    if offset >= memory.size || size > memory.size - offset {
        return Err(LayoutError::Kernel { kernel, memory });
    }
    Ok(kernel)
}

/// RAM disk and tree, first where QEMU has them, then as low as can be.
fn above(memory: Region, kernel: Region, initrd_size: u64, dtb_size: u64) -> Option<(Option<Region>, Region)> {
    let habit = memory.start.get().wrapping_add((memory.size / 2).min(INITRD_OFFSET));
    [habit.max(kernel.end().get()), kernel.end().get()].into_iter().find_map(|lowest| {
        let start = lowest.checked_next_multiple_of(PageSize::Size4K.bytes())?;
        let dtb = start.checked_add(initrd_size)?.checked_next_multiple_of(BLOCK)?;
        if dtb.checked_add(dtb_size)? > memory.end().get() {
            return None;
        }
        let initrd = Region { start: Gpa::new(start), size: initrd_size };
        Some((Some(initrd).filter(|initrd| initrd.size != 0), Region { start: Gpa::new(dtb), size: dtb_size }))
    })
}

#[cfg(test)]
mod tests;
