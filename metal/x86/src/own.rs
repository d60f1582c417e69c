//! What leaves the own mapping, and comes back: [`entresol_metal_common::own`] in this architecture's entries and instructions.
//!
//! Protocol: [`init`] is given memory once, [`init_cpu`] runs on each CPU before a window is opened there, and before another CPU waits for
//! its translations. Entries that come need no invalidation: what was absent is nowhere cached (APM 5.5.2). Those that leave are forgotten
//! by [`crate::shootdown`].
//!
//! Lock order: a shootdown may run below the lock of the common part, whose other takers answer it while they wait.
//!
//! Sources: APM 5.3 (long-mode tables), 5.5 (translation caches; 5.5.3 upper-level entries), 5.6.1 (no-execute).
//!
//! Known holes: RAM that `paging` mapped with pages of 1 GiB, beyond its first [`crate::paging::SPLIT_GIB`] GiB, cannot leave.

use entresol_addr::PfnRange;
pub(crate) use entresol_metal_common::own::Window;
pub use entresol_metal_common::own::{Aside, Census, set_aside, span};
use entresol_metal_common::own::{Entry, Leaf, Own, Regime, Table};
use entresol_sync::atomic::{AtomicU64, Ordering};
use x86_64::registers::control::{Cr3, Cr3Flags};
use x86_64::structures::paging::{PageTableFlags as Flags, PhysFrame};
use x86_64::{PhysAddr, VirtAddr};

use crate::boot::MAX_CPUS;
use crate::shootdown::Shootdowns;
use crate::{cpu, interrupts, paging};

/// Physical address in an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// An entry that names a table: what is allowed is said by the leaf.
const TABLE: Flags = Flags::PRESENT.union(Flags::WRITABLE);
/// Of the last level, whose entries have no bit for their size.
const LAST_SHIFT: u32 = 12;

pub(crate) static OWN: Own<LongMode> = Own::new(LongMode);
/// Translations of the own mapping.
pub(crate) static SHOOTDOWNS: Shootdowns<MAX_CPUS> = Shootdowns::new();

/// Our own tables: four levels, address space identifier 0, no global entry.
pub(crate) struct LongMode;

impl Regime for LongMode {
    /// The last of the 512 GiB that the root translates, sign-extended.
    const WINDOWS: u64 = 511 << 39 | 0xffff << 48;

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
        Cr3::read_raw().0.start_address().as_u64()
    }

    #[inline]
    fn word(&self, table: Table, index: u64) -> &AtomicU64 {
        debug_assert!(index < 512, "{index}");
        // SAFETY: a word of one of our tables, aligned: in the image, or in the reserve, as the caller of `init` promised. All are RAM
        // that stays mapped, for ever tables, and accessed as atomics only since they are walked.
        unsafe { AtomicU64::from_ptr((table.address() + index * 8) as *mut u64) }
    }

    #[inline]
    fn table(&self, address: u64) -> u64 {
        address | TABLE.bits()
    }

    #[inline]
    fn leaf(&self, address: u64, size: Leaf) -> u64 {
        let size = match size {
            Leaf::Page => Flags::empty(),
            Leaf::Block => Flags::HUGE_PAGE,
        };
        address | paging::DATA.union(size).bits()
    }

    #[inline]
    fn entry(&self, raw: u64, shift: u32) -> Entry {
        let flags = Flags::from_bits_retain(raw);
        if !flags.contains(Flags::PRESENT) {
            Entry::Absent
        } else if flags.contains(Flags::HUGE_PAGE) || shift == LAST_SHIFT {
            Entry::Leaf
        } else {
            Entry::Table(raw & ADDRESS)
        }
    }

    /// Walks see stores in program order, as other CPUs do (APM 7.2); the compiler keeps it too.
    #[inline]
    fn publish(&self) {
        core::sync::atomic::compiler_fence(Ordering::SeqCst);
    }

    /// The entries of upper levels are cached apart from translations, and go with them (APM 5.5.3).
    fn forget_tables(&self) {
        SHOOTDOWNS.ask(cpu::index());
        forget();
        complete();
    }

    #[inline]
    fn forget_window(&self, address: u64) {
        x86_64::instructions::tlb::flush(VirtAddr::new_truncate(address));
    }

    fn switch(&self, root: Table) {
        let frame = PhysFrame::containing_address(PhysAddr::new_truncate(root.address()));
        // SAFETY: the new root translates everything that the old one does to the same, and lives for ever.
        unsafe { Cr3::write(frame, Cr3Flags::empty()) };
    }
}

/// This CPU forgets all that it translates for us.
fn forget() {
    x86_64::instructions::tlb::flush_all();
}

/// `TlbOp::Own`: `frames` have left. This CPU forgets them at once.
pub(crate) fn shoot_down(frames: PfnRange) {
    SHOOTDOWNS.ask(cpu::index());
    if frames.count() == 1 {
        // The mapping is the identity.
        x86_64::instructions::tlb::flush(VirtAddr::new_truncate(frames.start().base().get()));
    } else {
        forget();
    }
}

/// Waits until all CPUs have forgotten what this one asked for.
#[inline]
pub(crate) fn complete() {
    SHOOTDOWNS.complete(cpu::index(), interrupts::send_nmi, cpu::relax);
}

/// Another CPU's question, which came as a non-maskable interrupt.
pub(crate) fn answer() {
    SHOOTDOWNS.answer(cpu::index(), forget);
}

/// Lets frames leave the mapping, with the tables that [`set_aside`] found room for. The boot CPU, once, before other CPUs run.
///
/// # Safety
///
/// The reserve is RAM that nobody else uses, now or later, and that stays mapped.
pub unsafe fn init(aside: Aside) {
    OWN.init(aside);
}

/// Gives this CPU its own root. Nothing that it translates changes. From now on it answers others.
pub fn init_cpu() {
    OWN.init_cpu();
    SHOOTDOWNS.join(cpu::index(), forget);
}

/// How the blocks of 2 MiB are mapped whose frames can leave.
pub fn census() -> Census {
    OWN.census()
}
