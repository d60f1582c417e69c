//! EL2's own stage 1: the identity, without anything both writable and executable.
//!
//! Purpose: text is read and execute, constants are read-only, everything else of RAM is read and write, devices are
//! Device-nGnRE; a page below each stack is mapped to nothing, so that an overflow faults instead of spreading.
//!
//! Protocol: [`build`] runs once, without MMU, and returns the register values. Afterwards only `own` changes entries: it
//! takes blocks of 2 MiB of RAM away, for private guests, and puts them back (INV-10). So that it can, RAM is mapped with no
//! larger blocks, but beyond the first [`SPLIT_GIB`] GiB. Tables come from a static arena.
//!
//! Sources: Arm DDI 0487 D8.3 (descriptors), D24.2 (SCTLR_EL2, TCR_EL2, MAIR_EL2) with HCR_EL2.E2H = 0.
//!
//! Known holes: one MiB of the table arena is the most that any fragmentation of RAM can use before [`build`] refuses.

use core::cell::UnsafeCell;
use core::mem::ManuallyDrop;
use core::ptr::NonNull;

use aarch64_paging::descriptor::{El23Attributes as Attributes, PhysicalAddress};
use aarch64_paging::mair::{Mair, MairAttribute, NormalMemory};
use aarch64_paging::paging::{Constraints, El2, MemoryRegion, PageTable, RootTable, Translation};
use arrayvec::ArrayVec;

use crate::boot::memory::{MAX_FREE, pages_around, without};
use crate::boot::{BootInfo, Region};
use crate::cpu;

unsafe extern "C" {
    static __image_start: u8;
    static __rodata_start: u8;
    static __data_start: u8;
    static __stacks_start: u8;
}

/// Tables in the arena: a root, one level-1 table for each 512 GiB, one level-2 for each GiB that is not a block, one
/// level-3 for each 2 MiB that is not.
const TABLES: usize = 256;

/// GiB of RAM that are mapped with blocks of 2 MiB: one table each. What comes after has blocks of 1 GiB.
pub(crate) const SPLIT_GIB: u64 = 192;
/// Bytes that are mapped at once, so that no block of 1 GiB is used.
const CHUNK: u64 = 512 << 20;

/// What turns the MMU on, in the order that `entresol_enable_mmu` loads.
#[repr(C)]
pub struct MmuRegisters {
    mair: u64,
    tcr: u64,
    ttbr0: u64,
    sctlr: u64,
}

const DEVICE: Attributes = Attributes::ATTRIBUTE_INDEX_0;
const NORMAL: Attributes = Attributes::ATTRIBUTE_INDEX_1.union(Attributes::INNER_SHAREABLE);
const PRESENT: Attributes = Attributes::VALID.union(Attributes::ACCESSED).union(Attributes::USER_RES1);
const TEXT: Attributes = PRESENT.union(NORMAL).union(Attributes::READ_ONLY);
const CONSTANTS: Attributes = TEXT.union(Attributes::XN);
const DATA: Attributes = PRESENT.union(NORMAL).union(Attributes::XN);
/// Page and block entries of RAM, without the address.
pub(crate) const PAGE_DATA: u64 = DATA.union(Attributes::TABLE_OR_PAGE).bits() as u64;
pub(crate) const BLOCK_DATA: u64 = DATA.bits() as u64;
const REGISTERS: Attributes = PRESENT.union(DEVICE).union(Attributes::XN);

const WRITE_BACK: NormalMemory = NormalMemory::WriteBackNonTransientReadWriteAllocate;
const MAIR: Mair = Mair::EMPTY
    .with_attribute(0, MairAttribute::DEVICE_NGNRE)
    .with_attribute(1, MairAttribute::normal(WRITE_BACK, WRITE_BACK));
/// The same memory with allocation tags (D24.2, MAIR_EL2: 0b1111_0000).
const MAIR_TAGGED: Mair = MAIR.with_attribute(1, MairAttribute(0xf0));

/// TCR_EL2: 48 bits of address (T0SZ 16), write-back inner-shareable walks, 4 KiB granule; bits 31 and 23 are RES1.
const TCR: u64 = 16 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 1 << 31;
const TCR_PS_SHIFT: u32 = 16;

/// SCTLR_EL2: RES1 bits 4, 5, 11, 16, 18, 22, 23, 28, 29; M 0, C 2, SA 3, I 12, WXN 19.
const SCTLR: u64 = 0x30c5_0830 | 1 << 0 | 1 << 2 | 1 << 3 | 1 << 12 | 1 << 19;
/// SCTLR_EL2.ATA: EL2 reaches allocation tags. TCF, 41:40, stays 0: its accesses are not checked.
const SCTLR_ATA: u64 = 1 << 43;

/// Memory that the boot CPU writes before there is a second CPU.
struct Once<T>(UnsafeCell<T>);

// SAFETY: written by `build` only, on one CPU before any other runs; read by hardware and start code after.
unsafe impl<T> Sync for Once<T> {}

static TABLE_ARENA: Once<[PageTable<Attributes>; TABLES]> = Once(UnsafeCell::new([PageTable::EMPTY; TABLES]));

#[unsafe(export_name = "entresol_mmu")]
static MMU: Once<MmuRegisters> = Once(UnsafeCell::new(MmuRegisters { mair: 0, tcr: 0, ttbr0: 0, sctlr: 0 }));

/// Hands out tables of the arena, identity mapped.
struct Arena {
    used: usize,
}

impl Translation<Attributes> for Arena {
    fn allocate_table(&mut self) -> (NonNull<PageTable<Attributes>>, PhysicalAddress) {
        assert!(self.used < TABLES, "the machine's RAM is too fragmented for {TABLES} tables");
        let table = TABLE_ARENA.0.get().cast::<PageTable<Attributes>>().wrapping_add(self.used);
        self.used += 1;
        (NonNull::new(table).expect("a static"), PhysicalAddress(table as usize))
    }

    unsafe fn deallocate_table(&mut self, _table: NonNull<PageTable<Attributes>>) {
        unreachable!("nothing is unmapped, and the root is never dropped");
    }

    fn physical_to_virtual(&self, address: PhysicalAddress) -> NonNull<PageTable<Attributes>> {
        NonNull::new(address.0 as *mut PageTable<Attributes>).expect("the arena is not at 0")
    }
}

/// Builds the tables of this machine.
pub fn build(info: &BootInfo) -> *const MmuRegisters {
    // Never dropped: the hardware walks it from now on.
    let mut root = ManuallyDrop::new(RootTable::new(Arena { used: 0 }, 0, El2));
    let mut map = |region: Region, attributes| {
        let range = MemoryRegion::new(region.start as usize, region.end as usize);
        let result = root.map_range(&range, PhysicalAddress(range.start().0), attributes, Constraints::empty());
        result.unwrap_or_else(|error| panic!("cannot map {region:x?} for EL2: {error}"));
    };
    let [text, constants, data, stacks] =
        [&raw const __image_start, &raw const __rodata_start, &raw const __data_start, &raw const __stacks_start]
            .map(|symbol| symbol as u64);
    map(Region { start: text, end: constants }, TEXT);
    map(Region { start: constants, end: data }, CONSTANTS);
    map(Region { start: data, end: stacks }, DATA);
    for index in 0..info.cpus.len() {
        let area = cpu::stacks_of(index);
        map(area.emergency, DATA);
        map(area.main, DATA);
    }
    let ram: ArrayVec<Region, MAX_FREE> = info.ram.iter().copied().collect();
    let mut left = SPLIT_GIB << 30;
    for region in without(&ram, info.image) {
        let mut rest = region;
        while left != 0 && rest.size() != 0 {
            let end = rest.end.min((rest.start & !(CHUNK - 1)) + CHUNK);
            map(Region { start: rest.start, end }, DATA);
            left = left.saturating_sub(end - rest.start);
            rest.start = end;
        }
        if rest.size() != 0 {
            map(rest, DATA);
        }
    }
    let devices = [info.uart.registers, info.gicd, info.gicr].into_iter();
    for region in devices.chain(info.rtc.map(|rtc| rtc.registers)) {
        map(pages_around(region), REGISTERS);
    }
    for region in virtio_pages(info) {
        map(region, REGISTERS);
    }
    store(root.to_physical().0 as u64)
}

/// virtio-mmio slots share pages: each page once.
fn virtio_pages(info: &BootInfo) -> impl Iterator<Item = Region> {
    let mut end = 0;
    info.virtio_mmio.iter().filter_map(move |slot| {
        let pages = pages_around(slot.registers);
        let rest = Region { start: pages.start.max(end), end: pages.end };
        end = end.max(pages.end);
        (rest.start < rest.end).then_some(rest)
    })
}

fn store(ttbr0: u64) -> *const MmuRegisters {
    // ID_AA64MMFR0_EL1.PARange; without LPA2's descriptors, 48 bits (0b0101) are the most.
    let physical = (mrs!("id_aa64mmfr0_el1") & 0xf).min(5);
    // ID_AA64PFR1_EL1.MTE: tag storage from 2 on.
    let tags = mrs!("id_aa64pfr1_el1") >> 8 & 0xf >= 2;
    let (mair, sctlr) = if tags { (MAIR_TAGGED.0, SCTLR | SCTLR_ATA) } else { (MAIR.0, SCTLR) };
    let registers = MmuRegisters { mair, tcr: TCR | physical << TCR_PS_SHIFT, ttbr0, sctlr };
    // SAFETY: one CPU, and nobody holds a reference.
    unsafe { MMU.0.get().write(registers) };
    MMU.0.get()
}
