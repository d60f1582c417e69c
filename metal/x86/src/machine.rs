//! [`Metal`]: the core's machine, on instructions.
//!
//! Purpose: words, pages and TLBs. Frames are reached through the identity map, those that may be absent from it ([`crate::own`]) through
//! this CPU's windows. Caches are coherent for data and instructions (APM
//! 7.3, 7.6.1), so there is nothing to clean and nothing to invalidate but translations, which is [`crate::flush`]'s.
//!
//! Protocol: [`Metal::set_pool`] names the frames that the core may ask for, before any other method is called and before other
//! CPUs use it; every method refuses others with a panic, so that no mistake of the core reaches the hypervisor's own memory.
//!
//! Page contents are moved by assembly only: a guest may write the same memory at the same time, which is no data race for
//! instructions, but would be for Rust.

use core::arch::asm;
use core::cell::UnsafeCell;

use entresol_addr::{Hpa, PAGE_SIZE, Pfn, PfnRange};
use entresol_machine::own::{RemoveError, Work};
use entresol_machine::{Features, Machine, Tags, TlbOp, Word};
use entresol_metal_common::own::Moves;
use entresol_metal_common::pool::{self, Fixed};
use entresol_sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use crate::flush::Flushes;
use crate::own::{self, OWN, Window};
use crate::{cpu, features, interrupts};

/// The frames that the core may ask for.
struct Pool(UnsafeCell<Fixed>);

// SAFETY: written once, by `set`, before anything reads it.
unsafe impl Sync for Pool {}

impl Pool {
    /// Names the frames.
    ///
    /// # Panics
    ///
    /// The second time.
    fn set(&self, frames: Fixed) {
        static NAMED: AtomicBool = AtomicBool::new(false);
        assert!(!NAMED.swap(true, Ordering::AcqRel), "the frames of the pool are named once");
        // SAFETY: one CPU runs, as `Metal::set_pool` demands, and no reference is kept by `get`'s callers.
        unsafe { *self.0.get() = frames };
    }

    #[inline(always)]
    fn get(&self) -> &Fixed {
        // SAFETY: nobody writes it any more, or this CPU is the only one and does not while it reads.
        unsafe { &*self.0.get() }
    }
}

static POOL: Pool = Pool(UnsafeCell::new(Fixed::NONE));
/// Files of the boot bundle.
static ROM: pool::Pool = pool::Pool::new();
/// Translations of guests.
pub(crate) static FLUSHES: Flushes = Flushes::new();

/// This machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Metal;

impl Metal {
    /// Ranges of frames that [`Self::set_pool`] takes at most.
    pub const POOL_RANGES: usize = pool::RANGES;

    /// Names the frames that the methods may touch, largest range first. Once, before other CPUs use any method.
    ///
    /// # Panics
    ///
    /// If there are more than [`Self::POOL_RANGES`].
    pub fn set_pool(ranges: &[PfnRange]) {
        POOL.set(Fixed::new(ranges));
    }

    /// Names frames outside the pool that the core may ask to be read: bytes that never change while the hypervisor runs, so that Rust
    /// references to them may exist. Once, before a method is asked for one of them.
    pub fn set_rom(frames: PfnRange) {
        ROM.set(&[frames]);
    }

    /// The address of `frames`, which lie in the pool or in read-only memory.
    #[inline]
    fn seen(frames: PfnRange) -> u64 {
        if !POOL.get().covers(frames) {
            ROM.check(frames);
        }
        frames.start().base().get()
    }

    /// The address of `frames`, which lie in the pool.
    #[inline]
    fn own(frames: PfnRange) -> u64 {
        POOL.get().check(frames);
        frames.start().base().get()
    }

    #[inline]
    fn word(word: Word) -> *mut u64 {
        Self::own(PfnRange::single(word.frame()));
        word.address().get() as *mut u64
    }

    /// [`Machine::load`] of a word of a guest's memory, which may be absent from the own mapping. Whoever asks is pinned, or otherwise sure
    /// that the frame is still what it takes it for. A guest may take a device's registers, or read-only memory, for a table: a frame that is
    /// not the pool's reads as ones, as where no memory is.
    #[inline]
    pub fn load_guest(word: Word) -> u64 {
        if !POOL.get().covers(PfnRange::single(word.frame())) {
            return u64::MAX;
        }
        // SAFETY: a word of the pool, aligned, into which no Rust reference points and that is accessed as an atomic.
        Self::with_guest(word, |at| unsafe { AtomicU64::from_ptr(at) }.load(Ordering::Acquire))
    }

    /// [`Machine::compare_exchange`] of such a word.
    ///
    /// # Errors
    ///
    /// The value found, if it was not `current`.
    #[inline]
    pub fn compare_exchange_guest(word: Word, current: u64, new: u64) -> Result<u64, u64> {
        Self::with_guest(word, |at| {
            // SAFETY: as for `load_guest`.
            unsafe { AtomicU64::from_ptr(at) }.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
        })
    }

    /// Calls `work` with where the word can be reached, for as long as that lasts.
    #[inline]
    fn with_guest<T>(word: Word, work: impl FnOnce(*mut u64) -> T) -> T {
        let (at, frame) = (Self::word(word), PfnRange::single(word.frame()));
        if OWN.may_be_absent(frame) {
            let offset = word.address().page_offset();
            return OWN.through(Window::Work, word.frame(), |window| work((window + offset) as *mut u64));
        }
        work(at)
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
        move_words(from, to, PAGE_SIZE);
    }

    #[inline]
    fn zero(&self, at: u64) {
        zero(at, PAGE_SIZE);
    }
}

// SAFETY: every method checks its frames against the pool, which no Rust reference points into (1); words are accessed as atomics,
// and walks of this architecture are coherent with stores (2); `complete` waits until no CPU is inside a guest with translations
// from before (3); features are constant (4).
unsafe impl Machine for Metal {
    fn features(&self) -> Features {
        Features {
            forced_write_back: true,
            coherent_icache: true,
            physical_bits: features::get().physical_bits,
            // Names of virtual machines, not the processor's: it has one identifier for all of them (`flush`).
            vmid_bits: 16,
            tags: false,
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

    /// Stores are seen by walks in program order (APM 7.2); the compiler keeps it too.
    #[inline]
    fn published(&self) {
        core::sync::atomic::compiler_fence(Ordering::SeqCst);
    }

    #[inline]
    fn zero(&self, frames: PfnRange) {
        zero(Self::own(frames), frames.count() * PAGE_SIZE);
    }

    #[inline]
    fn copy(&self, from: Pfn, to: Pfn, count: u64) {
        let range = |start| PfnRange::new(start, count).expect("frames of the machine do not wrap");
        assert!(!range(from).overlaps(range(to)), "copy of {count} frames from {from:?} to {to:?} overlaps");
        move_words(Self::seen(range(from)), Self::own(range(to)), count * PAGE_SIZE);
    }

    fn clear_tags(&self, _frames: PfnRange) {}

    fn copy_tags(&self, _from: Pfn, _to: Pfn, _count: u64) {}

    fn load_tags(&self, _frame: Pfn) -> Tags {
        Tags::ZERO
    }

    fn store_tags(&self, _frame: Pfn, _tags: &Tags) {}

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
        Self::seen(frames);
    }

    fn invalidate_icache(&self, frames: PfnRange) {
        Self::seen(frames);
    }

    #[inline]
    fn tlb(&self, op: TlbOp) {
        match op {
            TlbOp::Ipa { .. } | TlbOp::Range { .. } | TlbOp::Vmid(_) | TlbOp::All => FLUSHES.ask(),
            TlbOp::Own(frames) => own::shoot_down(frames),
        }
    }

    fn can_unmap_own(&self) -> bool {
        OWN.can_unmap()
    }

    fn unmap_own(&self, frames: PfnRange) -> Result<(), RemoveError> {
        POOL.get().check(frames);
        OWN.unmap(frames)
    }

    fn map_own(&self, frames: PfnRange) {
        POOL.get().check(frames);
        OWN.map(frames);
    }

    fn is_mapped_own(&self, frame: Pfn) -> bool {
        OWN.is_mapped(frame)
    }

    fn count_mapped_own(&self, frames: PfnRange) -> u64 {
        OWN.count_mapped(frames)
    }

    fn through_window(&self, frame: Pfn, work: Work<'_>) {
        POOL.get().check(PfnRange::single(frame));
        if let Work::Copy { from } = work {
            POOL.get().check(PfnRange::single(from));
        }
        OWN.work(&Instructions, frame, work);
    }

    #[inline]
    fn complete(&self) {
        fence(Ordering::SeqCst);
        if cpu::count() > 1 {
            FLUSHES.complete(cpu::other_flushes(), |cpu| interrupts::send_sgi(cpu, interrupts::KICK), cpu::relax);
        }
        own::complete();
    }
}

/// Zeroes whole frames, 16 bytes at a time. XMM0 is a guest's, and is put back.
#[inline]
fn zero(address: u64, bytes: u64) {
    let mut kept = [0u64; 2];
    // SAFETY: frames of the pool, into which no Rust reference points, aligned; SSE is on (`switch::fp`), and nothing interrupts us
    // while XMM0 is not the guest's.
    unsafe {
        asm!(
            "movups [{kept}], xmm0",
            "pxor xmm0, xmm0",
            "2:",
            ".set at, 0",
            ".rept 32",
            "movaps [{at} + at], xmm0",
            ".set at, at + 16",
            ".endr",
            "add {at}, 512",
            "cmp {at}, {end}",
            "jb 2b",
            "movups xmm0, [{kept}]",
            kept = in(reg) kept.as_mut_ptr(), at = inout(reg) address => _, end = in(reg) address + bytes,
            options(nostack)
        );
    }
}

/// Moves whole frames.
#[inline]
fn move_words(from: u64, to: u64, bytes: u64) {
    // SAFETY: frames of the pool that do not overlap, into which no Rust reference points.
    unsafe {
        asm!(
            "rep movsq",
            inout("rcx") bytes / 8 => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
}

/// Moves bytes between a buffer and frames of the pool.
#[inline]
fn move_bytes(from: u64, to: u64, bytes: u64) {
    // SAFETY: one side is a buffer of the caller's, whole and its own; the other lies in the pool, into which no Rust reference points.
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") bytes => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
}
