//! What the first vCPU has in its registers, and the tables that they point to.
//!
//! Two states: that of Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol": long mode, an
//! identity map, flat segments at selectors 10h and 18h, RSI at `boot_params`, interrupts off), and that of the x86/HVM direct
//! boot ABI (Xen, docs/misc/pvh.pandoc: 32-bit protected mode without paging, EBX at `hvm_start_info`).

use entresol_addr::{Gpa, PAGE_SIZE};

use super::map;

/// Bits of control registers (SDM volume 3, 2.5; APM volume 2, 3.1).
mod bits {
    pub const CR0_PE: u64 = 1 << 0;
    pub const CR0_ET: u64 = 1 << 4;
    pub const CR0_PG: u64 = 1 << 31;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const EFER_LME: u64 = 1 << 8;
    pub const EFER_LMA: u64 = 1 << 10;
    /// RFLAGS bit 1 is always one.
    pub const FLAGS: u64 = 1 << 1;
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its selector.
    pub selector: u16,
    /// Its base.
    pub base: u64,
    /// Its limit in bytes.
    pub limit: u32,
    /// Access rights as bits 40–47 and 52–55 of a descriptor: type, S, DPL and P in bits 0–7, AVL, L, D/B and G in bits 8–11
    /// (the form of a VMCB, APM volume 2, 15.5.1).
    pub attributes: u16,
}

/// A descriptor table register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its base.
    pub base: u64,
    /// Its limit in bytes.
    pub limit: u16,
}

/// Registers of the first vCPU. Those that are not named are zero; the rest of the state is that of a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// First instruction.
    pub rip: u64,
    /// RBX.
    pub rbx: u64,
    /// RSI.
    pub rsi: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// CS.
    pub code: Segment,
    /// DS, ES and SS.
    pub data: Segment,
    /// TR.
    pub task: Segment,
    /// GDTR.
    pub gdt: Table,
}

/// The descriptor table: nothing, nothing, code, data, task.
pub(super) const GDT_BYTES: usize = 5 * 8;
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
/// Present, code or data, execute and read, accessed; 64-bit; 4 KiB granularity.
const CODE_64: u16 = 0xa9b;
/// The same for 32 bits.
const CODE_32: u16 = 0xc9b;
/// Present, read and write, accessed; 32-bit; 4 KiB granularity.
const DATA_32: u16 = 0xc93;
/// Present, busy task state.
const TASK_BUSY: u16 = 0x08b;
const TASK_LIMIT: u32 = 0x67;

/// Pages of the identity map.
const TABLES: u64 = 6;
/// Bytes of the identity map: all below 4 GiB.
pub(super) const TABLES_BYTES: usize = (TABLES * PAGE_SIZE) as usize;
/// Present, writable.
const TABLE_ENTRY: u64 = 0b11;
/// The same, and a page of 2 MiB.
const BLOCK_ENTRY: u64 = 1 << 7 | TABLE_ENTRY;

/// 64-bit entry at `rip` with `boot_params`.
pub(super) fn long(rip: u64) -> Start {
    Start {
        rip,
        rbx: 0,
        rsi: map::START_INFO,
        rflags: bits::FLAGS,
        cr0: bits::CR0_PE | bits::CR0_ET | bits::CR0_PG,
        cr3: map::PAGE_TABLES,
        cr4: bits::CR4_PAE,
        efer: bits::EFER_LME | bits::EFER_LMA,
        code: flat(CODE, CODE_64),
        ..protected(0)
    }
}

/// 32-bit entry at `rip` with `hvm_start_info`.
pub(super) fn protected(rip: u64) -> Start {
    Start {
        rip,
        rbx: map::START_INFO,
        rsi: 0,
        rflags: bits::FLAGS,
        cr0: bits::CR0_PE | bits::CR0_ET,
        cr3: 0,
        cr4: 0,
        efer: 0,
        code: flat(CODE, CODE_32),
        data: flat(DATA, DATA_32),
        task: Segment { selector: TASK, base: 0, limit: TASK_LIMIT, attributes: TASK_BUSY },
        gdt: Table { base: map::GDT, limit: GDT_BYTES as u16 - 1 },
    }
}

const fn flat(selector: u16, attributes: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes }
}

/// The descriptor table that `start` was given.
pub(super) fn gdt(start: &Start) -> [u8; GDT_BYTES] {
    let mut table = [0; GDT_BYTES];
    for segment in [start.code, start.data, start.task] {
        let at = usize::from(segment.selector);
        table[at..at + 8].copy_from_slice(&descriptor(segment).to_le_bytes());
    }
    table
}

/// A segment as eight bytes of a descriptor table (SDM volume 3, 3.4.5). Bases are zero here.
fn descriptor(segment: Segment) -> u64 {
    let attributes = u64::from(segment.attributes);
    let granular = attributes & 0x800 != 0;
    let limit = u64::from(if granular { segment.limit >> 12 } else { segment.limit });
    limit & 0xffff | (attributes & 0xff) << 40 | (limit >> 16 & 0xf) << 48 | (attributes >> 8 & 0xf) << 52
}

/// One word of the identity map: `index` counts 8-byte entries from its start.
fn entry(index: u64) -> u64 {
    let page = |number: u64| map::PAGE_TABLES + number * PAGE_SIZE;
    match (index / 512, index % 512) {
        (0, 0) => page(1) | TABLE_ENTRY,
        (1, quarter @ 0..4) => page(2 + quarter) | TABLE_ENTRY,
        (0 | 1, _) => 0,
        (_, _) => (index - 2 * 512) << 21 | BLOCK_ENTRY,
    }
}

/// Fills `bytes` with the identity map.
pub(super) fn page_tables(bytes: &mut [u8; TABLES_BYTES]) {
    for (index, place) in bytes.chunks_exact_mut(8).enumerate() {
        place.copy_from_slice(&entry(index as u64).to_le_bytes());
    }
}

const _: () = assert!(map::GDT + GDT_BYTES as u64 <= map::START_INFO);
const _: () = assert!(map::START_INFO + PAGE_SIZE <= map::PAGE_TABLES);
const _: () = assert!(map::PAGE_TABLES + TABLES * PAGE_SIZE <= map::CMDLINE);
const _: () = assert!(map::CMDLINE + map::CMDLINE_ROOM <= map::CONVENTIONAL_END);

/// Where the tables go.
pub(super) const GDT_AT: Gpa = Gpa::new(map::GDT);
pub(super) const TABLES_AT: Gpa = Gpa::new(map::PAGE_TABLES);
