//! [`Metal`]: the core's machine, on instructions.
//!
//! Purpose: words, pages, caches and TLBs. Frames are reached through EL2's identity map, cacheable; frames that may be absent
//! from it ([`crate::own`]) through this CPU's windows.
//!
//! Protocol: [`Metal::set_pool`] names the frames that the core may ask for, before any other method is called and
//! before other CPUs use it, [`Metal::set_rom`] those that it may only look at; every method refuses others with a panic, so that no mistake of the core reaches the
//! hypervisor's own memory.
//!
//! TLB invalidation names a VMID by loading it: VTTBR_EL2 is changed for the moment of the instruction if another one is
//! loaded. EL2 does not translate by it, and is not interrupted.
//!
//! Page contents are moved by assembly only: a guest may write the same memory at the same time, which is no data race
//! for instructions, but would be for Rust.
//!
//! Sources: Arm DDI 0487 D8.16 and D8.17 (TLB maintenance), D7.5 (caches), C6.2 (CPYFP, SETP), B2.3 (order).

use core::arch::asm;

use entresol_addr::{Hpa, PAGE_SIZE, Pfn, PfnRange};
use entresol_machine::own::{RemoveError, Work};
use entresol_machine::{Features, Machine, Tags, TlbOp, Vmid, Word};
use entresol_metal_common::own::Moves;
use entresol_metal_common::pool::{self, Pool};
use entresol_sync::atomic::{AtomicU64, Ordering};

use crate::features::{self, Feature};
use crate::operand::{self, Step};
use crate::own::{OWN, Window};
use crate::tags;

/// Frames above which all instruction caches are invalidated instead of lines.
const MOST_ICACHE_FRAMES: u64 = 64;

/// VTTBR_EL2.VMID.
const VMID_SHIFT: u32 = 48;

static POOL: Pool = Pool::new();

/// Frames that are read, and cleaned from caches, but never written.
static ROM: Pool = Pool::new();

/// Bytes of a DC ZVA block; 0: not used.
static ZVA_BLOCK: AtomicU64 = AtomicU64::new(0);
/// Bytes of the smallest data and instruction cache lines.
static DATA_LINE: AtomicU64 = AtomicU64::new(64);
static INSTRUCTION_LINE: AtomicU64 = AtomicU64::new(64);

/// This machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Metal;

/// Reads what the methods need of the cache type registers. The boot CPU, once.
pub(crate) fn init() {
    let (ctr, dczid) = (mrs!("ctr_el0"), mrs!("dczid_el0"));
    DATA_LINE.store(4 << (ctr >> 16 & 0xf), Ordering::Relaxed);
    INSTRUCTION_LINE.store(4 << (ctr & 0xf), Ordering::Relaxed);
    let block = if features::has(Feature::DC_ZVA) { 4 << (dczid & 0xf) } else { 0 };
    ZVA_BLOCK.store(block, Ordering::Relaxed);
    tags::init();
}

impl Metal {
    /// Ranges of frames that [`Self::set_pool`] takes at most.
    pub const POOL_RANGES: usize = pool::RANGES;

    /// Names the frames that the methods may touch, largest range first. Once, before other CPUs use any method.
    ///
    /// # Panics
    ///
    /// If there are more than [`Self::POOL_RANGES`].
    pub fn set_pool(ranges: &[PfnRange]) {
        POOL.set(ranges);
    }

    /// The aligned word of 32 bits at or below `at`; `None` if it is not in a frame of the pool or of
    /// read-only memory. Whoever asks is pinned, or otherwise sure that the frame is still what it takes it for.
    #[inline]
    pub fn load_word(at: Hpa) -> Option<u32> {
        let frame = PfnRange::single(at.frame());
        if !POOL.covers(frame) && !ROM.covers(frame) {
            return None;
        }
        if OWN.may_be_absent(frame) {
            let mut word = [0; 4];
            OWN.through(Window::Work, at.frame(), |window| {
                move_bytes(window + (at.page_offset() & !3), word.as_mut_ptr() as u64, 4);
            });
            return Some(u32::from_le_bytes(word));
        }
        let word: u32;
        // SAFETY: an aligned word of the pool, into which no Rust reference points and which a guest may write meanwhile, or of
        // memory that nobody writes.
        unsafe {
            asm!("ldr {:w}, [{}]", out(reg) word, in(reg) at.get() & !3, options(nostack, readonly, preserves_flags));
        }
        Some(word)
    }

    /// Names frames outside the pool that the core may ask to be read and to be cleaned: bytes that never change while
    /// the hypervisor runs, so that Rust references to them may exist. Once, before a method is asked for one of them.
    pub fn set_rom(frames: PfnRange) {
        ROM.set(&[frames]);
    }

    /// The address of `frames`, which lie in the pool or in read-only memory.
    #[inline]
    fn seen(frames: PfnRange) -> u64 {
        if !POOL.covers(frames) {
            ROM.check(frames);
        }
        frames.start().base().get()
    }

    /// The address of `frames`, which lie in the pool.
    #[inline]
    fn own(frames: PfnRange) -> u64 {
        POOL.check(frames);
        frames.start().base().get()
    }

    #[inline]
    fn word(word: Word) -> *mut u64 {
        Self::own(PfnRange::single(word.frame()));
        word.address().get() as *mut u64
    }

    /// The frames of `bytes` bytes at `address`.
    #[inline]
    fn around(address: Hpa, bytes: usize) -> PfnRange {
        let frames = (address.page_offset() + bytes as u64).div_ceil(PAGE_SIZE);
        PfnRange::new(address.frame(), frames).expect("bytes of the machine do not wrap")
    }
}

/// What moves bytes.
struct Instructions;

impl Moves for Instructions {
    #[inline]
    fn bytes(&self, from: u64, to: u64, count: u64) {
        move_bytes(from, to, count);
    }

    #[inline]
    fn page(&self, from: u64, to: u64) {
        move_bytes(from, to, PAGE_SIZE);
    }

    #[inline]
    fn zero(&self, at: u64) {
        zero(at, PAGE_SIZE);
    }
}

// SAFETY: every method checks its frames against the pool, which no Rust reference points into, or, if it only reads, against
// memory that nobody writes (1); words are accessed as atomics and `published` is a barrier for walks (2); `complete` is a DSB
// of the inner-shareable domain, which waits for maintenance of this CPU on all CPUs (3); features are read from registers
// that are constant (4).
unsafe impl Machine for Metal {
    fn features(&self) -> Features {
        Features {
            forced_write_back: features::has(Feature::FORCED_WRITE_BACK),
            coherent_icache: features::has(Feature::COHERENT_INSTRUCTION),
            physical_bits: features::physical_bits(),
            vmid_bits: if features::has(Feature::VMID_16) { 16 } else { 8 },
            tags: features::has(Feature::MTE),
        }
    }

    #[inline]
    fn load(&self, word: Word) -> u64 {
        // SAFETY: a word of the pool, aligned, and only ever accessed as an atomic.
        unsafe { AtomicU64::from_ptr(Self::word(word)) }.load(Ordering::Acquire)
    }

    #[inline]
    fn store(&self, word: Word, value: u64) {
        // SAFETY: as for `load`.
        unsafe { AtomicU64::from_ptr(Self::word(word)) }.store(value, Ordering::Release);
    }

    #[inline(always)]
    fn compare_exchange(&self, word: Word, current: u64, new: u64) -> Result<u64, u64> {
        // SAFETY: as for `load`.
        let cell = unsafe { AtomicU64::from_ptr(Self::word(word)) };
        cell.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
    }

    #[inline]
    fn store_row(&self, frame: Pfn, first: u16, count: u16, mut value: impl FnMut(u16) -> u64) {
        let row = Self::word(Word::new(frame, first));
        assert!(first + count <= Word::PER_FRAME, "a row ends with its frame");
        for index in 0..count {
            // SAFETY: words of one frame of the pool, aligned, and only ever accessed as atomics.
            unsafe { AtomicU64::from_ptr(row.add(index.into())) }.store(value(first + index), Ordering::Relaxed);
        }
    }

    #[inline(always)]
    fn set_bits(&self, word: Word, bits: u64) -> u64 {
        // SAFETY: as for `load`.
        unsafe { AtomicU64::from_ptr(Self::word(word)) }.fetch_or(bits, Ordering::AcqRel)
    }

    #[inline]
    fn published(&self) {
        // SAFETY: barriers.
        unsafe { asm!("dsb ishst", "isb", options(nostack, preserves_flags)) };
    }

    #[inline]
    fn zero(&self, frames: PfnRange) {
        zero(Self::own(frames), frames.count() * PAGE_SIZE);
    }

    #[inline]
    fn copy(&self, from: Pfn, to: Pfn, count: u64) {
        let range = |start| PfnRange::new(start, count).expect("frames of the machine do not wrap");
        assert!(!range(from).overlaps(range(to)), "copy of {count} frames from {from:?} to {to:?} overlaps");
        move_bytes(Self::own(range(from)), Self::own(range(to)), count * PAGE_SIZE);
    }

    fn clear_tags(&self, frames: PfnRange) {
        if features::has(Feature::MTE) {
            let start = Self::seen(frames);
            tags::clear(start, frames.count() * PAGE_SIZE, ZVA_BLOCK.load(Ordering::Relaxed), false);
        }
    }

    fn zero_tagged(&self, frames: PfnRange) {
        let (start, bytes) = (Self::own(frames), frames.count() * PAGE_SIZE);
        let block = ZVA_BLOCK.load(Ordering::Relaxed);
        if features::has(Feature::MTE) && block != 0 {
            return tags::clear(start, bytes, block, true);
        }
        zero(start, bytes);
        self.clear_tags(frames);
    }

    fn copy_tags(&self, from: Pfn, to: Pfn, count: u64) {
        if features::has(Feature::MTE) {
            let range = |start| PfnRange::new(start, count).expect("frames of the machine do not wrap");
            tags::copy(Self::own(range(from)), Self::own(range(to)), count * PAGE_SIZE);
        }
    }

    fn load_tags(&self, frame: Pfn) -> Tags {
        if features::has(Feature::MTE) { tags::load(Self::own(PfnRange::single(frame))) } else { Tags::ZERO }
    }

    fn store_tags(&self, frame: Pfn, tags: &Tags) {
        if features::has(Feature::MTE) {
            tags::store(Self::own(PfnRange::single(frame)), tags);
        }
    }

    #[inline]
    fn read(&self, from: Hpa, to: &mut [u8]) {
        if !to.is_empty() {
            Self::seen(Self::around(from, to.len()));
            move_bytes(from.get(), to.as_mut_ptr() as u64, to.len() as u64);
        }
    }

    #[inline]
    fn write(&self, to: Hpa, from: &[u8]) {
        if !from.is_empty() {
            Self::own(Self::around(to, from.len()));
            move_bytes(from.as_ptr() as u64, to.get(), from.len() as u64);
        }
    }

    fn clean_invalidate_to_poc(&self, frames: PfnRange) {
        let start = Self::seen(frames);
        if OWN.may_be_absent(frames) {
            for frame in each(frames) {
                OWN.through(Window::Caches, frame, |window| clean(window, PAGE_SIZE));
            }
            return;
        }
        clean(start, frames.count() * PAGE_SIZE);
    }

    fn invalidate_icache(&self, frames: PfnRange) {
        let start = Self::seen(frames);
        // Guests see the frames at other virtual addresses: only a physically indexed cache is found by ours.
        let by_line = features::has(Feature::PHYSICAL_INSTRUCTION_CACHE) && frames.count() <= MOST_ICACHE_FRAMES;
        if OWN.may_be_absent(frames) {
            for frame in each(frames) {
                OWN.through(Window::Caches, frame, |window| invalidate_icache(window, PAGE_SIZE, by_line));
            }
            return;
        }
        invalidate_icache(start, frames.count() * PAGE_SIZE, by_line);
    }

    #[inline(always)]
    fn tlb(&self, op: TlbOp) {
        // SAFETY: a barrier: entries that were broken are broken for every walk before the invalidation begins.
        unsafe { instruction!("dsb ishst") };
        match op {
            TlbOp::Ipa { vmid, gfn, leaf_only, .. } => as_vmid(vmid, || invalidate_ipa(gfn, leaf_only)),
            TlbOp::Range { vmid, range } => as_vmid(vmid, || invalidate_range(range)),
            // SAFETY: an invalidation loses nothing that a walk does not find again.
            TlbOp::Vmid(vmid) => as_vmid(vmid, || unsafe { instruction!("tlbi vmalls12e1is") }),
            // SAFETY: as above.
            TlbOp::All => unsafe { asm!("tlbi alle1is", "ic ialluis", options(nostack, preserves_flags)) },
            // EL2's mapping is the identity: the frame's number is the operand.
            // SAFETY: as above.
            TlbOp::Own(frames) if frames.count() == 1 => unsafe {
                instruction_on!("tlbi vae2is", frames.start().get())
            },
            // SAFETY: as above.
            TlbOp::Own(_) => unsafe { instruction!("tlbi alle2is") },
        }
    }

    fn can_unmap_own(&self) -> bool {
        OWN.can_unmap()
    }

    fn unmap_own(&self, frames: PfnRange) -> Result<(), RemoveError> {
        POOL.check(frames);
        OWN.unmap(frames)
    }

    fn map_own(&self, frames: PfnRange) {
        POOL.check(frames);
        OWN.map(frames);
    }

    fn is_mapped_own(&self, frame: Pfn) -> bool {
        OWN.is_mapped(frame)
    }

    fn count_mapped_own(&self, frames: PfnRange) -> u64 {
        OWN.count_mapped(frames)
    }

    fn through_window(&self, frame: Pfn, work: Work<'_>) {
        POOL.check(PfnRange::single(frame));
        if let Work::Copy { from } = work {
            POOL.check(PfnRange::single(from));
        }
        OWN.work(&Instructions, frame, work);
    }

    #[inline]
    fn complete(&self) {
        // SAFETY: barriers.
        unsafe { asm!("dsb ish", "isb", options(nostack, preserves_flags)) };
    }
}

/// Runs `invalidate` with `vmid` in VTTBR_EL2. The table's address is zero meanwhile, so that nothing can be walked.
#[inline]
fn as_vmid(vmid: Vmid, invalidate: impl FnOnce()) {
    let (loaded, wanted) = (mrs!("vttbr_el2"), u64::from(vmid.get()));
    if loaded >> VMID_SHIFT == wanted {
        return invalidate();
    }
    // SAFETY: EL2 does not translate by VTTBR_EL2, no guest runs on this CPU, and the value is put back.
    unsafe {
        msr!("vttbr_el2", wanted << VMID_SHIFT);
        instruction!("isb");
        invalidate();
        instruction!("dsb ish");
        msr!("vttbr_el2", loaded);
        instruction!("isb");
    }
}

/// Stage 2 first, then what stage 1 combined from it; the barrier in between keeps a walk that still saw the old stage 2
/// from combining it again after (D8.17.5).
#[inline]
fn invalidate_ipa(gfn: entresol_addr::Gfn, leaf_only: bool) {
    let operand = operand::single(gfn);
    // SAFETY: an invalidation loses nothing that a walk does not find again.
    unsafe {
        if leaf_only {
            instruction_on!("tlbi ipas2le1is", operand);
        } else {
            instruction_on!("tlbi ipas2e1is", operand);
        }
        asm!("dsb ish", "tlbi vmalle1is", options(nostack, preserves_flags));
    }
}

#[inline(never)]
fn invalidate_range(range: entresol_addr::GfnRange) {
    let Some(steps) = operand::steps(range, features::has(Feature::TLB_RANGE)) else {
        // SAFETY: an invalidation loses nothing that a walk does not find again.
        return unsafe { instruction!("tlbi vmalls12e1is") };
    };
    for step in steps {
        // SAFETY: as above; RIPAS2E1IS (SYS #4, C8, C0, #2) exists with FEAT_TLBIRANGE.
        unsafe {
            match step {
                Step::Single(operand) => instruction_on!("tlbi ipas2e1is", operand),
                Step::Range(operand) => instruction_on!("sys #4, c8, c0, #2", operand),
            }
        }
    }
    // SAFETY: as above.
    unsafe { asm!("dsb ish", "tlbi vmalle1is", options(nostack, preserves_flags)) };
}

fn each(frames: PfnRange) -> impl Iterator<Item = Pfn> {
    (0..frames.count()).map(move |offset| frames.start().offset(offset))
}

/// Cleans and invalidates data caches for whole mapped pages.
fn clean(start: u64, bytes: u64) {
    let tags = features::has(Feature::MTE);
    for line in lines(start, bytes, &DATA_LINE) {
        // SAFETY: cleaning and invalidating changes neither data nor tags. DC CIGDVAC is SYS #3, C7, C14, #5.
        unsafe {
            if tags {
                instruction_on!("sys #3, c7, c14, #5", line);
            } else {
                instruction_on!("dc civac", line);
            }
        }
    }
}

/// Makes what was written to whole mapped pages fetchable.
fn invalidate_icache(start: u64, bytes: u64, by_line: bool) {
    if !features::has(Feature::COHERENT_DATA) {
        for line in lines(start, bytes, &DATA_LINE) {
            // SAFETY: cleaning changes no data.
            unsafe { instruction_on!("dc cvau", line) };
        }
    }
    if features::has(Feature::COHERENT_INSTRUCTION) {
        return;
    }
    // SAFETY: a barrier: what was cleaned or written is visible before it can be fetched again.
    unsafe { instruction!("dsb ish") };
    if by_line {
        for line in lines(start, bytes, &INSTRUCTION_LINE) {
            // SAFETY: invalidating an instruction cache changes no data.
            unsafe { instruction_on!("ic ivau", line) };
        }
    } else {
        // SAFETY: as above.
        unsafe { instruction!("ic ialluis") };
    }
}

/// Line addresses of whole pages.
fn lines(start: u64, bytes: u64, line: &AtomicU64) -> impl Iterator<Item = u64> {
    (start..start + bytes).step_by(line.load(Ordering::Relaxed) as usize)
}

/// Fills whole pages of the pool with zero.
#[inline]
fn zero(start: u64, bytes: u64) {
    let (block, end) = (ZVA_BLOCK.load(Ordering::Relaxed), start + bytes);
    if start == end {
        return;
    }
    if features::has(Feature::MOPS) {
        // SAFETY: the caller checked the pages; FEAT_MOPS was found. EL2 needs no enable for it.
        unsafe {
            asm!(
                ".arch_extension mops",
                "setp [{at}]!, {bytes}!, xzr",
                "setm [{at}]!, {bytes}!, xzr",
                "sete [{at}]!, {bytes}!, xzr",
                ".arch_extension nomops",
                at = inout(reg) start => _, bytes = inout(reg) bytes => _, options(nostack),
            );
        }
        return;
    }
    if block == 0 {
        // SAFETY: the caller checked the pages; four stores of 16 bytes a turn fill whole pages exactly.
        unsafe {
            asm!(
                "2: stp xzr, xzr, [{at}]",
                "stp xzr, xzr, [{at}, #16]",
                "stp xzr, xzr, [{at}, #32]",
                "stp xzr, xzr, [{at}, #48]",
                "add {at}, {at}, #64",
                "cmp {at}, {end}",
                "b.lo 2b",
                at = inout(reg) start => _, end = in(reg) end, options(nostack),
            );
        }
        return;
    }
    // SAFETY: the caller checked the pages; the block divides a page, so the last one ends with it.
    unsafe {
        asm!(
            "2: dc zva, {at}",
            "add {at}, {at}, {block}",
            "cmp {at}, {end}",
            "b.lo 2b",
            at = inout(reg) start => _, end = in(reg) end, block = in(reg) block, options(nostack),
        );
    }
}

/// Copies bytes between ranges that do not overlap, each valid: the pool's by the caller's check, others as slices.
#[inline]
fn move_bytes(from: u64, to: u64, bytes: u64) {
    if features::has(Feature::MOPS) {
        // SAFETY: the ranges are valid and apart; FEAT_MOPS was found. EL2 needs no enable for it.
        unsafe {
            asm!(
                ".arch_extension mops",
                "cpyfp [{to}]!, [{from}]!, {bytes}!",
                "cpyfm [{to}]!, [{from}]!, {bytes}!",
                "cpyfe [{to}]!, [{from}]!, {bytes}!",
                ".arch_extension nomops",
                to = inout(reg) to => _, from = inout(reg) from => _, bytes = inout(reg) bytes => _, options(nostack),
            );
        }
        return;
    }
    let (words, rest) = (bytes & !31, bytes & 31);
    // SAFETY: as above; Normal memory takes accesses of any alignment.
    unsafe {
        asm!(
            "cbz {words}, 3f",
            "2: ldp {a}, {b}, [{from}], #32",
            "ldp {c}, {d}, [{from}, #-16]",
            "stp {a}, {b}, [{to}], #32",
            "stp {c}, {d}, [{to}, #-16]",
            "subs {words}, {words}, #32",
            "b.ne 2b",
            "3: cbz {rest}, 5f",
            "4: ldrb {a:w}, [{from}], #1",
            "strb {a:w}, [{to}], #1",
            "subs {rest}, {rest}, #1",
            "b.ne 4b",
            "5:",
            to = inout(reg) to => _, from = inout(reg) from => _,
            words = inout(reg) words => _, rest = inout(reg) rest => _,
            a = out(reg) _, b = out(reg) _, c = out(reg) _, d = out(reg) _, options(nostack),
        );
    }
}
