//! Our own tables: the identity, without anything both writable and executable.
//!
//! Purpose: text is read and execute, constants are read-only, everything else of RAM is read and write; a page below each stack is
//! mapped to nothing, so that an overflow faults instead of spreading.
//!
//! Protocol: [`build`] runs once, on the start code's tables, which map the image and the arena; [`load`] changes to what it made,
//! and CPUs that start later begin on it. Afterwards only `own` changes entries: it takes pages of 2 MiB of RAM away, for private
//! guests, and puts them back (INV-10).
//!
//! Sources: APM 5.3 (long-mode tables), 5.6.1 (no-execute).
//!
//! Known holes: RAM beyond the first [`SPLIT_GIB`] GiB must be in pages of 1 GiB, or [`build`] refuses for want of tables.

use core::cell::UnsafeCell;

use arrayvec::ArrayVec;
use entresol_metal_common::memory::{MAX_FREE, Region, without};
use entresol_sync::atomic::{AtomicU64, Ordering};
use x86_64::structures::paging::mapper::{MapToError, Mapper, OffsetPageTable};
use x86_64::structures::paging::{
    FrameAllocator, PageSize, PageTable, PageTableFlags as Flags, PhysFrame, Size1GiB, Size2MiB, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use crate::boot::BootInfo;
use crate::{cpu, features};

unsafe extern "C" {
    static __image_start: u8;
    static __rodata_start: u8;
    static __data_start: u8;
    static __stacks_start: u8;
}

/// Tables in the arena: a root, one of level 3 for each 512 GiB, one of level 2 for each GiB that is not one page, one of level 1
/// for each 2 MiB that is not.
const TABLES: usize = 256;
/// GiB that are mapped with pages of 2 MiB.
pub(crate) const SPLIT_GIB: u64 = 128;

const TEXT: Flags = Flags::PRESENT;
const CONSTANTS: Flags = Flags::PRESENT.union(Flags::NO_EXECUTE);
pub(crate) const DATA: Flags = CONSTANTS.union(Flags::WRITABLE);
/// Registers: uncached (PCD and PWT, APM 7.8.2).
const DEVICE: Flags = DATA.union(Flags::NO_CACHE).union(Flags::WRITE_THROUGH);
/// Pages of devices.
const MOST_DEVICES: usize = 64;

struct Arena(UnsafeCell<[PageTable; TABLES]>);

// SAFETY: written by `build` only, on one CPU before any other runs; read by hardware after.
unsafe impl Sync for Arena {}

static ARENA: Arena = Arena(UnsafeCell::new([const { PageTable::new() }; TABLES]));

/// Hands out tables of the arena, the root first.
struct Tables {
    used: usize,
}

// SAFETY: each table is given once, and nobody else has it.
unsafe impl FrameAllocator<Size4KiB> for Tables {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let table = (self.used < TABLES).then(|| ARENA.0.get().cast::<PageTable>().wrapping_add(self.used))?;
        self.used += 1;
        PhysFrame::from_start_address(PhysAddr::new(table as u64)).ok()
    }
}

/// The root, for CPUs that start: it lies in the image, below 4 GiB.
#[unsafe(export_name = "entresol_root")]
static ROOT: AtomicU64 = AtomicU64::new(0);

/// Builds the tables of this machine, with the pages of devices and those of `registers`; returns the root.
///
/// # Panics
///
/// If RAM is too fragmented for the arena, or there are more devices than we have room for.
pub fn build(info: &BootInfo, registers: impl Iterator<Item = u64>) -> PhysFrame {
    let mut tables = Tables { used: 0 };
    let root = tables.allocate_frame().expect("the arena is not empty");
    // SAFETY: a table of the arena, all zero, that nobody else has; the arena is mapped where it is.
    let root_table = unsafe { &mut *(root.start_address().as_u64() as *mut PageTable) };
    // SAFETY: as above: physical memory below 4 GiB, where the arena is, is mapped where it is.
    let mut mapper = unsafe { OffsetPageTable::new(root_table, VirtAddr::zero()) };
    let [text, constants, data, stacks] =
        [&raw const __image_start, &raw const __rodata_start, &raw const __data_start, &raw const __stacks_start]
            .map(|symbol| symbol as u64);
    let mut map = |region, flags| map_region(&mut mapper, &mut tables, region, flags);
    map(Region { start: text, end: constants }, TEXT);
    map(Region { start: constants, end: data }, CONSTANTS);
    map(Region { start: data, end: stacks }, DATA);
    for index in 0..cpu::count() {
        let area = cpu::stacks_of(index);
        map(area.emergency, DATA);
        map(area.main, DATA);
    }
    let ram: ArrayVec<Region, MAX_FREE> = info.ram.iter().copied().collect();
    for region in without(&ram, info.image) {
        map(region, DATA);
    }
    let mut devices = ArrayVec::<u64, MOST_DEVICES>::new();
    for page in info.device_pages().chain(registers.map(|at| at & !(Size4KiB::SIZE - 1))) {
        if !devices.contains(&page) {
            devices
                .try_push(page)
                .unwrap_or_else(|_| panic!("devices have more than {MOST_DEVICES} pages of registers"));
            map(Region { start: page, end: page + Size4KiB::SIZE }, DEVICE);
        }
    }
    ROOT.store(root.start_address().as_u64(), Ordering::Relaxed);
    root
}

/// Maps a region of whole pages with the largest pages that fit.
fn map_region(mapper: &mut OffsetPageTable<'_>, tables: &mut Tables, region: Region, flags: Flags) {
    let mut at = region.start;
    while at < region.end {
        let fits = |size: u64| at.is_multiple_of(size) && region.end - at >= size;
        let giant = features::get().giant_pages && at >> 30 >= SPLIT_GIB;
        let (size, result) = if giant && fits(Size1GiB::SIZE) {
            (Size1GiB::SIZE, identity::<Size1GiB>(mapper, tables, at, flags))
        } else if fits(Size2MiB::SIZE) {
            (Size2MiB::SIZE, identity::<Size2MiB>(mapper, tables, at, flags))
        } else {
            (Size4KiB::SIZE, identity::<Size4KiB>(mapper, tables, at, flags))
        };
        result.unwrap_or_else(|why| panic!("cannot map {region:x?} for the hypervisor with {TABLES} tables: {why}"));
        at += size;
    }
}

/// Maps one page to itself.
fn identity<S: PageSize + core::fmt::Debug>(
    mapper: &mut OffsetPageTable<'_>,
    tables: &mut Tables,
    at: u64,
    flags: Flags,
) -> Result<(), &'static str>
where
    for<'a> OffsetPageTable<'a>: Mapper<S>,
{
    let frame = PhysFrame::<S>::containing_address(PhysAddr::new(at));
    // SAFETY: nothing runs on these tables yet, and what will runs on the same addresses.
    match unsafe { mapper.identity_map(frame, flags, tables) } {
        Ok(flush) => {
            flush.ignore();
            Ok(())
        }
        Err(MapToError::FrameAllocationFailed) => Err("there are too few"),
        Err(MapToError::ParentEntryHugePage | MapToError::PageAlreadyMapped(_)) => Err("it overlaps what is mapped"),
    }
}

/// Changes to these tables.
///
/// # Safety
///
/// They map the code that runs, its data and its stack where they are.
pub unsafe fn load(root: PhysFrame) {
    use x86_64::registers::control::{Cr3, Cr3Flags};
    // SAFETY: as the caller promises.
    unsafe { Cr3::write(root, Cr3Flags::empty()) };
}
