//! Stage-1 translation of one's own: 4 KiB granule, 39-bit addresses, TTBR0 only (Arm DDI 0487 D8).
//!
//! Tables come from memory that the caller gives and start empty; a [`Space`] maps 4 KiB pages and 2 MiB blocks. Entries
//! are only ever added, so break-before-make never applies. Tables are cleaned before the walker may see them, because
//! they are also written with the MMU off.

use core::ops::Range;

use crate::memory::{self, barrier, load64, store64};
use crate::{sysreg_read, sysreg_write};

/// What memory is, and where it stands in MAIR_EL1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Kind {
    /// Normal, write-back cacheable.
    Cacheable = 0,
    /// Normal, Non-cacheable.
    NonCacheable = 1,
    /// Device-nGnRnE.
    Device = 2,
    /// Normal, write-through cacheable.
    WriteThrough = 3,
    /// Normal, write-back cacheable, with allocation tags (FEAT_MTE2).
    Tagged = 4,
}

/// MAIR_EL1: attributes in the order of [`Kind`].
pub const MAIR: u64 = 0xff | 0x44 << 8 | 0xbb << 24 | 0xf0 << 32;
/// TCR_EL1: T0SZ 25 (39 bits), walks inner-shareable write-back, TTBR1 off, 40-bit output (`virt` has no more).
pub const TCR: u64 = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32;
/// SCTLR_EL1: MMU, data cache, instruction cache.
const ENABLE: u64 = 1 | 1 << 2 | 1 << 12;

const VALID: u64 = 1;
const TABLE: u64 = 3;
const ACCESS_FLAG: u64 = 1 << 10;
const INNER_SHAREABLE: u64 = 3 << 8;
const READ_ONLY: u64 = 2 << 6;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// A set of tables.
pub struct Space {
    root: u64,
    free: Range<u64>,
}

impl Space {
    /// Tables in `memory`, which is page-aligned, mapped (if the MMU is on) at its own address, and nobody else's.
    pub fn new(memory: Range<u64>) -> Self {
        let mut space = Self { root: 0, free: memory };
        space.root = space.table();
        space
    }

    /// TTBR0_EL1 of these tables.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Maps `size` bytes at `from` to `to`: blocks where both are aligned, pages elsewhere.
    pub fn map(&mut self, from: u64, to: u64, size: u64, kind: Kind, writable: bool) {
        assert!(size.is_multiple_of(0x1000) && from.is_multiple_of(0x1000) && to.is_multiple_of(0x1000));
        let attributes =
            VALID | ACCESS_FLAG | INNER_SHAREABLE | (kind as u64) << 2 | if writable { 0 } else { READ_ONLY };
        let mut done = 0;
        while done < size {
            let (from, to) = (from + done, to + done);
            let block = (from | to).is_multiple_of(2 << 20) && size - done >= 2 << 20;
            let middle = self.next(self.root + 8 * (from >> 30 & 0x1ff));
            let entry = middle + 8 * (from >> 21 & 0x1ff);
            if block {
                self.put(entry, to | attributes);
                done += 2 << 20;
            } else {
                let last = self.next(entry);
                self.put(last + 8 * (from >> 12 & 0x1ff), to | attributes | 2);
                done += 0x1000;
            }
        }
        barrier();
    }

    /// Writes a raw descriptor into the root table: for guests that try bad ones.
    pub fn put_root(&mut self, index: u64, descriptor: u64) {
        store64(self.root + 8 * (index & 0x1ff), descriptor);
        memory::clean(self.root + 8 * (index & 0x1ff));
        barrier();
    }

    /// The table that the entry at `entry` refers to, made if it is empty.
    fn next(&mut self, entry: u64) -> u64 {
        let descriptor = load64(entry);
        if descriptor & TABLE == TABLE {
            return descriptor & ADDRESS;
        }
        assert_eq!(descriptor, 0, "a block is in the way");
        let table = self.table();
        self.put(entry, table | TABLE);
        table
    }

    fn put(&self, entry: u64, descriptor: u64) {
        store64(entry, descriptor);
        memory::clean(entry);
    }

    fn table(&mut self) -> u64 {
        let table = self.free.start;
        assert!(table + 0x1000 <= self.free.end, "no memory for another table");
        self.free.start += 0x1000;
        (0..512).for_each(|index| store64(table + 8 * index, 0));
        memory::each_line(table..table + 0x1000, memory::clean);
        table
    }
}

/// Turns the MMU and the caches on. The image, the stack and what `space` is used for are mapped at their own addresses.
pub fn enable(space: &Space) {
    // What was written with the MMU off is in memory; lines that were fetched before it must not hide it.
    memory::barrier();
    sysreg_write!("mair_el1", MAIR);
    sysreg_write!("tcr_el1", TCR);
    sysreg_write!("ttbr0_el1", space.root);
    invalidate_tlb();
    sysreg_write!("sctlr_el1", sysreg_read!("sctlr_el1") | ENABLE);
}

/// Lets loads and stores of tags reach memory (SCTLR_EL1.ATA, Arm DDI 0487 D24.2): without it LDG reads zero and STG does nothing.
/// Accesses are still not checked. The CPU has FEAT_MTE2.
pub fn enable_tags() {
    const ATA: u64 = 1 << 43;
    sysreg_write!("sctlr_el1", sysreg_read!("sctlr_el1") | ATA);
}

/// Turns the MMU and the caches off; the image's dirty lines are cleaned first, others are the caller's.
pub fn disable() {
    clean_image();
    sysreg_write!("sctlr_el1", sysreg_read!("sctlr_el1") & !ENABLE);
    clean_image();
    invalidate_tlb();
}

/// Whether the MMU is on.
pub fn is_on() -> bool {
    sysreg_read!("sctlr_el1") & 1 != 0
}

/// Invalidates this CPU's stage-1 translations, and waits.
pub fn invalidate_tlb() {
    // SAFETY: forgets translations only.
    unsafe { core::arch::asm!("dsb sy", "tlbi vmalle1", "dsb sy", "isb", options(nostack)) };
}

/// Cleans and invalidates the image's own lines, stack included.
fn clean_image() {
    let image = memory::image();
    let line = memory::data_line();
    let mut at = image.start & !(line - 1);
    while at < image.end {
        // SAFETY: cleaning loses nothing.
        unsafe { core::arch::asm!("dc civac, {}", in(reg) at, options(nostack)) };
        at += line;
    }
    barrier();
}
