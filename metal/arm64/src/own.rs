//! What leaves EL2's own mapping, and comes back: [`entresol_metal_common::own`] in this architecture's entries and instructions.
//!
//! Protocol: [`init`] is given memory once, [`init_cpu`] runs on each CPU before a window is opened there. TTBR0_EL2.CnP is 0, so
//! each CPU may have a root of its own.
//!
//! Sources: Arm DDI 0487 D8.3 (descriptors), D8.17 (TLB maintenance), K11.5 (ordering of table updates).
//!
//! Known holes: RAM that `paging` mapped with 1 GiB blocks, beyond its first [`crate::paging::SPLIT_GIB`] GiB, cannot leave.

pub(crate) use entresol_metal_common::own::Window;
pub use entresol_metal_common::own::{Aside, Census, set_aside, span};
use entresol_metal_common::own::{Entry, Leaf, Own, Regime, Table};
use entresol_sync::atomic::AtomicU64;

use crate::cpu;
use crate::paging::{BLOCK_DATA, PAGE_DATA};

const VALID: u64 = 1;
/// Of a valid entry above level 3: it names a table.
const TABLE: u64 = 1 << 1;
/// Output address of an entry (48 bits, 4 KiB granule).
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
const LAST_SHIFT: u32 = 12;

pub(crate) static OWN: Own<El2> = Own::new(El2);

/// EL2's own stage 1.
pub(crate) struct El2;

impl Regime for El2 {
    const WINDOWS: u64 = 511 << 39;

    #[inline]
    fn cpu(&self) -> usize {
        cpu::index()
    }

    #[inline]
    fn cpus(&self) -> usize {
        cpu::count()
    }

    #[inline]
    fn root(&self) -> u64 {
        mrs!("ttbr0_el2") & ADDRESS
    }

    #[inline]
    fn word(&self, table: Table, index: u64) -> &AtomicU64 {
        debug_assert!(index < 512, "{index}");
        // SAFETY: a word of one of EL2's tables, aligned: in the image, or in the reserve, as the caller of `init` promised. All are
        // RAM that stays mapped, for ever tables, and accessed as atomics only once the MMU is on.
        unsafe { AtomicU64::from_ptr((table.address() + index * 8) as *mut u64) }
    }

    #[inline]
    fn table(&self, address: u64) -> u64 {
        address | TABLE | VALID
    }

    #[inline]
    fn leaf(&self, address: u64, size: Leaf) -> u64 {
        address
            | match size {
                Leaf::Page => PAGE_DATA,
                Leaf::Block => BLOCK_DATA,
            }
    }

    #[inline]
    fn entry(&self, raw: u64, shift: u32) -> Entry {
        if raw & VALID == 0 {
            Entry::Absent
        } else if raw & TABLE == 0 || shift == LAST_SHIFT {
            Entry::Leaf
        } else {
            Entry::Table(raw & ADDRESS)
        }
    }

    #[inline]
    fn publish(&self) {
        // SAFETY: barriers.
        unsafe {
            instruction!("dsb ishst");
            instruction!("isb");
        }
    }

    fn forget_tables(&self) {
        // SAFETY: barriers, and an invalidation, which loses nothing that a walk does not find again.
        unsafe {
            instruction!("dsb ishst");
            instruction!("tlbi alle2is");
            instruction!("dsb ish");
        }
    }

    #[inline]
    fn forget_window(&self, address: u64) {
        // SAFETY: the entry is this CPU's alone, so is what it may have cached of it: no broadcast.
        unsafe {
            instruction!("dsb nshst");
            instruction_on!("tlbi vae2", address >> 12);
            instruction!("dsb nsh");
            instruction!("isb");
        }
    }

    fn switch(&self, root: Table) {
        // SAFETY: the new root translates everything that the old one does to the same, and lives for ever.
        unsafe {
            instruction!("dsb ishst");
            msr!("ttbr0_el2", root.address());
            instruction!("isb");
            instruction!("tlbi alle2");
            instruction!("dsb nsh");
            instruction!("isb");
        }
    }
}

/// Lets frames leave the mapping, with the tables that [`set_aside`] found room for. The boot CPU, once, before other CPUs run.
///
/// # Safety
///
/// The reserve is RAM that nobody else uses, now or later, and that stays mapped.
pub unsafe fn init(aside: Aside) {
    OWN.init(aside);
}

/// Gives this CPU its own root. Nothing that it translates changes.
pub fn init_cpu() {
    OWN.init_cpu();
}

/// How the blocks of 2 MiB are mapped whose frames can leave.
pub fn census() -> Census {
    OWN.census()
}
