//! What leaves EL2's own mapping, and comes back; and the windows of each CPU (design D9, INV-10).
//!
//! Purpose: frames of private guests are not in the identity map, so no speculation of EL2 reaches them. `paging` built the
//! map with blocks of 2 MiB; here such a block goes away as one entry, gets a table when the first of its frames comes back
//! alone, and becomes a block again when all are given back: [`census`] counts them.
//!
//! Protocol: [`init`] is given memory once, [`init_cpu`] runs on each CPU before a window is opened there. A block of 2 MiB
//! leaves when all of its frames are the caller's and nobody uses any of them, so no entry changes under an access of
//! another CPU (D8.17.1: break-before-make, without anybody to wait for in between). What a frame's entry says from then on
//! is the business of whoever has the frame's lock.
//!
//! Each 2 MiB of the pool has its own table set aside in the memory that [`init`] was given, so nothing here allocates,
//! and nothing can fail for want of memory: 1/512 of the pool.
//!
//! # Windows
//!
//! A translation that only one CPU can have needs a root of its own: in a table that others walk too, they might cache the
//! entry by speculation, and only a broadcast would take it from them. So each CPU has four pages: a root, equal to the
//! boot CPU's but for its last entry, and a table of each level for the windows behind that entry. TTBR0_EL2.CnP is 0.
//!
//! Invariants: EL2's root and level-1 entries never change after boot. A reserved table that no entry names is all zero. A
//! window is closed, and its translation invalidated, before the function that opened it returns.
//! Lock order: `CHANGING` is a leaf.
//!
//! Sources: Arm DDI 0487 D8.3 (descriptors), D8.17 (TLB maintenance), K11.5 (ordering of table updates).
//!
//! Known holes: RAM that `paging` mapped with 1 GiB blocks, beyond its first [`crate::paging::SPLIT_GIB`] GiB, cannot leave.

use entresol_addr::{PAGE_SIZE, Pfn, PfnRange};
use entresol_machine::own::{OWN_BLOCK, RemoveError, is_own_unit};
use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::cpu;
use crate::paging::{BLOCK_DATA, PAGE_DATA};

const VALID: u64 = 1;
/// Of a valid entry above level 3: it names a table.
const TABLE: u64 = 1 << 1;
/// Output address of an entry (48 bits, 4 KiB granule).
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// Tables of one CPU: root, and levels 1 to 3 of its windows.
const CPU_TABLES: u64 = 4;
/// The root's entry behind which the windows are: addresses that no memory has, since `paging` maps the identity.
const WINDOW_ROOT_INDEX: u64 = 511;
/// Address of the first window.
const WINDOWS: u64 = WINDOW_ROOT_INDEX << 39;

/// A window of this CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Window {
    /// The frame that is worked on.
    Work = 0,
    /// The frame that is copied from.
    Source = 1,
    /// The frame whose caches are maintained.
    Caches = 2,
}

/// First byte of the memory that [`init`] was given; 0 before.
static RESERVE: AtomicU64 = AtomicU64::new(0);
/// First frame, and number of 2 MiB blocks, that have a table set aside.
static FIRST: AtomicU64 = AtomicU64::new(0);
static BLOCKS: AtomicU64 = AtomicU64::new(0);
/// Whether a frame ever left.
static USED: AtomicBool = AtomicBool::new(false);
/// Held while an entry of level 2 or 3 changes.
static CHANGING: Mutex<()> = Mutex::new(());

/// Frames that [`init`] needs for frames of `span`, on a machine of `cpus` CPUs.
pub fn reserve_for(span: PfnRange, cpus: usize) -> u64 {
    CPU_TABLES * cpus as u64 + blocks(span)
}

/// Blocks of 2 MiB that touch `span`.
fn blocks(span: PfnRange) -> u64 {
    span.end().get().div_ceil(OWN_BLOCK) - span.start().get() / OWN_BLOCK
}

/// Lets frames of `span` leave the mapping, with tables in `reserve`. The boot CPU, once, before other CPUs run.
///
/// # Panics
///
/// If the reserve is smaller than [`reserve_for`] says.
///
/// # Safety
///
/// The reserve is RAM that nobody else uses, now or later, and that stays mapped.
pub unsafe fn init(reserve: PfnRange, span: PfnRange) {
    assert!(reserve.count() >= reserve_for(span, cpu::count()), "{} frames are too few tables", reserve.count());
    for word in 0..reserve.count() * PAGE_SIZE / 8 {
        at(reserve.start().base().get() + word * 8).store(0, Ordering::Relaxed);
    }
    FIRST.store(span.start().get() & !(OWN_BLOCK - 1), Ordering::Relaxed);
    BLOCKS.store(blocks(span), Ordering::Relaxed);
    RESERVE.store(reserve.start().base().get(), Ordering::Release);
}

/// Gives this CPU its own root. Nothing that it translates changes.
pub fn init_cpu() {
    let reserve = RESERVE.load(Ordering::Acquire);
    if reserve == 0 {
        return;
    }
    let table = |number| reserve + (cpu::index() as u64 * CPU_TABLES + number) * PAGE_SIZE;
    let (shared, root) = (root(), table(0));
    for index in 0..512 {
        entry(root, index).store(entry(shared, index).load(Ordering::Acquire), Ordering::Relaxed);
    }
    assert_eq!(entry(root, WINDOW_ROOT_INDEX).load(Ordering::Relaxed), 0, "nothing of this machine is at the windows");
    entry(root, WINDOW_ROOT_INDEX).store(table(1) | TABLE | VALID, Ordering::Relaxed);
    entry(table(1), 0).store(table(2) | TABLE | VALID, Ordering::Relaxed);
    entry(table(2), 0).store(table(3) | TABLE | VALID, Ordering::Release);
    // SAFETY: the new root translates everything that the old one does to the same, and lives for ever.
    unsafe {
        instruction!("dsb ishst");
        msr!("ttbr0_el2", root);
        instruction!("isb");
        instruction!("tlbi alle2");
        instruction!("dsb nsh");
        instruction!("isb");
    }
}

/// Whether frames can leave.
pub(crate) fn can_unmap() -> bool {
    RESERVE.load(Ordering::Acquire) != 0
}

/// `Machine::unmap_own`.
pub(crate) fn unmap(frames: PfnRange) -> Result<(), RemoveError> {
    assert!(is_own_unit(frames), "{frames:x?} are no unit of EL2's mapping");
    let unsplittable = RemoveError::Unsplittable { pfn: frames.start() };
    let reserved = reserved_table(frames.start()).ok_or(unsplittable)?;
    let _changing = CHANGING.lock();
    let word = block_word(frames.start()).ok_or(unsplittable)?;
    let raw = word.load(Ordering::Acquire);
    if frames.count() == OWN_BLOCK {
        assert!(raw & VALID != 0 && raw & ADDRESS != reserved, "{frames:x?} are absent already, or some of them");
        USED.store(true, Ordering::Release);
        word.store(0, Ordering::Release);
        return Ok(());
    }
    if raw & (VALID | TABLE) != VALID | TABLE || raw & ADDRESS != reserved {
        return Err(unsplittable);
    }
    let was = entry(reserved, frames.start().get() % OWN_BLOCK).swap(0, Ordering::AcqRel);
    assert!(was & VALID != 0, "frame {:#x} is absent already", frames.start());
    Ok(())
}

/// `Machine::map_own`.
pub(crate) fn map(frames: PfnRange) {
    assert!(is_own_unit(frames), "{frames:x?} are no unit of EL2's mapping");
    let first = frames.start();
    let reserved = reserved_table(first).expect("what left has a table set aside");
    let _changing = CHANGING.lock();
    let word = block_word(first).expect("what left was no part of a larger block");
    let raw = word.load(Ordering::Acquire);
    assert!(raw == 0 || raw & ADDRESS == reserved, "frame {first:#x} never left");
    if frames.count() == OWN_BLOCK {
        if raw != 0 {
            let left = (0..OWN_BLOCK).find(|index| entry(reserved, *index).load(Ordering::Relaxed) != 0);
            assert_eq!(left, None, "a frame of the block at {first:#x} is mapped");
            word.store(0, Ordering::Release);
            // Walks may have cached the table (break before make).
            // SAFETY: barriers, and an invalidation, which loses nothing that a walk does not find again.
            unsafe {
                instruction!("dsb ishst");
                instruction!("tlbi alle2is");
                instruction!("dsb ish");
            }
        }
        word.store(first.base().get() | BLOCK_DATA, Ordering::Release);
    } else {
        let was = entry(reserved, first.get() % OWN_BLOCK).swap(first.base().get() | PAGE_DATA, Ordering::AcqRel);
        assert_eq!(was, 0, "frame {first:#x} is mapped already");
        if raw == 0 {
            // SAFETY: a barrier: who walks through the new table finds what is in it.
            unsafe { instruction!("dsb ishst") };
            word.store(reserved | TABLE | VALID, Ordering::Release);
        }
    }
    publish();
}

/// `Machine::is_mapped_own`.
pub(crate) fn is_mapped(frame: Pfn) -> bool {
    let (mut table, address) = (root(), frame.base().get());
    for shift in [39, 30, 21, 12] {
        let raw = entry(table, address >> shift).load(Ordering::Acquire);
        if raw & VALID == 0 {
            return false;
        }
        if raw & TABLE == 0 {
            return true;
        }
        table = raw & ADDRESS;
    }
    true
}

/// `Machine::count_mapped_own`: an entry of level 2 tells about all of its frames.
pub(crate) fn count_mapped(frames: PfnRange) -> u64 {
    let (mut frame, mut count) = (frames.start(), 0);
    while frame != frames.end() {
        let left = frames.end().since(frame).min(OWN_BLOCK - frame.get() % OWN_BLOCK);
        let raw = block_word(frame).map_or(VALID, |word| word.load(Ordering::Acquire));
        count += match raw & (VALID | TABLE) {
            VALID => left,
            0 => 0,
            _ => (0..left).filter(|offset| is_mapped(frame.offset(*offset))).count() as u64,
        };
        frame = frame.offset(left);
    }
    count
}

/// How the blocks of 2 MiB are mapped whose frames can leave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// As one entry.
    pub blocks: u64,
    /// By a table of pages.
    pub tables: u64,
    /// Not at all.
    pub absent: u64,
}

/// How they are mapped now. Each is as it was at some moment of the call.
pub fn census() -> Census {
    let mut census = Census::default();
    let first = Pfn::new(FIRST.load(Ordering::Relaxed));
    for number in 0..BLOCKS.load(Ordering::Relaxed) {
        let word = block_word(first.offset(number * OWN_BLOCK));
        match word.map_or(VALID, |word| word.load(Ordering::Acquire)) & (VALID | TABLE) {
            VALID => census.blocks += 1,
            0 | TABLE => census.absent += 1,
            _ => census.tables += 1,
        }
    }
    census
}

/// Whether one of `frames` may be absent now or soon: the caller, who keeps them from being given away, uses windows. Else
/// the identity map has them as long as the caller keeps them.
pub(crate) fn may_be_absent(frames: PfnRange) -> bool {
    USED.load(Ordering::Acquire)
        && (frames.start().get() / OWN_BLOCK..frames.end().get().div_ceil(OWN_BLOCK)).any(|block| {
            let first = Pfn::new(block * OWN_BLOCK);
            let raw = block_word(first).map_or(VALID, |word| word.load(Ordering::Acquire));
            raw == 0 || raw & TABLE != 0 && Some(raw & ADDRESS) == reserved_table(first)
        })
}

/// Opens `window` of this CPU on `frame`, calls `work` with its address, and closes it.
pub(crate) fn through<R>(window: Window, frame: Pfn, work: impl FnOnce(u64) -> R) -> R {
    let tables = RESERVE.load(Ordering::Acquire) + cpu::index() as u64 * CPU_TABLES * PAGE_SIZE;
    let word = entry(tables + 3 * PAGE_SIZE, window as u64);
    assert_eq!(word.load(Ordering::Relaxed), 0, "{window:?} is open already");
    word.store(frame.base().get() | PAGE_DATA, Ordering::Release);
    publish();
    let address = WINDOWS + window as u64 * PAGE_SIZE;
    let result = work(address);
    word.store(0, Ordering::Release);
    // SAFETY: the entry is this CPU's alone, so is what it may have cached of it: no broadcast.
    unsafe {
        instruction!("dsb nshst");
        instruction_on!("tlbi vae2", address >> 12);
        instruction!("dsb nsh");
        instruction!("isb");
    }
    result
}

/// New entries are there for walks of all CPUs.
fn publish() {
    // SAFETY: barriers.
    unsafe {
        instruction!("dsb ishst");
        instruction!("isb");
    }
}

fn root() -> u64 {
    mrs!("ttbr0_el2") & ADDRESS
}

/// The word of `table` for `index`, modulo 512.
fn entry(table: u64, index: u64) -> &'static AtomicU64 {
    at(table + index % 512 * 8)
}

fn at(address: u64) -> &'static AtomicU64 {
    // SAFETY: callers name aligned words of EL2's tables: in the image, or in the reserve; all are RAM that stays mapped, for
    // ever tables, and accessed as atomics only once the MMU is on.
    unsafe { AtomicU64::from_ptr(address as *mut u64) }
}

/// The level-2 entry of EL2's map for `frame`; `None` if it is mapped by something larger.
fn block_word(frame: Pfn) -> Option<&'static AtomicU64> {
    let (mut table, address) = (root(), frame.base().get());
    for shift in [39, 30] {
        let raw = entry(table, address >> shift).load(Ordering::Acquire);
        if raw & (VALID | TABLE) != VALID | TABLE {
            return None;
        }
        table = raw & ADDRESS;
    }
    Some(entry(table, address >> 21))
}

/// Where the table lies that is set aside for the block around `frame`.
fn reserved_table(frame: Pfn) -> Option<u64> {
    let reserve = RESERVE.load(Ordering::Acquire);
    let number = frame.since(Pfn::new(FIRST.load(Ordering::Relaxed))) / OWN_BLOCK;
    let inside = reserve != 0 && number < BLOCKS.load(Ordering::Relaxed);
    inside.then(|| reserve + (cpu::count() as u64 * CPU_TABLES + number) * PAGE_SIZE)
}
