//! The seam between the core and the hardware.
//!
//! Purpose: every effect that the core has on a machine goes through [`Machine`] and through nothing else: words that a
//! hardware walker or another CPU may read, whole pages, caches, and translation lookaside buffers. `metal/*`
//! implements it with instructions, `model` with an executable model of them, and [`flat::FlatMachine`] with plain
//! host memory for unit tests.
//!
//! Protocol, in the order in which an entry is published (Arm DDI 0487 D8.17, K11.5; INV-1, INV-2):
//!
//! 1. `zero`, `copy` or `write` fill a frame; `clean_invalidate_to_poc` makes it visible to observers without caches;
//!    `invalidate_icache` makes it executable.
//! 2. A live entry that must change is broken with `compare_exchange`, then `tlb(op)`, then `complete()`.
//! 3. `store` or `compare_exchange` publishes; `published()` orders it before the guest's next walk on this CPU.
//!
//! A TLB invalidation is data ([`TlbOp`]), so that a debt can carry it and the lab can record it. `tlb` only *starts*
//! one; nothing may rely on it before `complete()` has returned.
//!
//! The hypervisor's own mapping is part of the machine too: [`own`].
#![no_std]
#![allow(unsafe_code, reason = "the seam: an unsafe trait and its plainest implementation")]

#[cfg(any(test, feature = "flat"))]
extern crate alloc;

#[cfg(any(test, feature = "flat"))]
pub mod flat;
#[cfg(feature = "model")]
pub mod model;
pub mod own;
mod tags;
mod tlb;

use entresol_addr::{Hpa, Pfn, PfnRange};
use own::{RemoveError, Work};
pub use tags::{GRANULE, Tags};
pub use tlb::{TlbOp, Vmid};

/// A 64-bit word of a frame: a table entry or a node entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Word {
    frame: Pfn,
    index: u16,
}

impl Word {
    /// Words in one 4 KiB frame.
    pub const PER_FRAME: u16 = 512;

    /// Word `index` (modulo 512) of `frame`.
    #[inline]
    pub const fn new(frame: Pfn, index: u16) -> Self {
        Self { frame, index: index & (Self::PER_FRAME - 1) }
    }

    /// The frame it lies in.
    #[inline]
    pub const fn frame(self) -> Pfn {
        self.frame
    }

    /// Its index in the frame, below 512.
    #[inline]
    pub const fn index(self) -> u16 {
        self.index
    }

    /// Its physical address in bytes.
    #[inline]
    pub const fn address(self) -> Hpa {
        Hpa::new(self.frame.base().get() + self.index as u64 * 8)
    }
}

/// What the core must know of a machine. Constant from boot to power-off, equal on all CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Stage-2 forced write-back (FEAT_S2FWB): no clean to PoC is needed for cacheable guest memory.
    pub forced_write_back: bool,
    /// CTR_EL0.DIC: no I-cache invalidation is needed to execute what was written.
    pub coherent_icache: bool,
    /// Bits of a physical address, 32–52.
    pub physical_bits: u8,
    /// Bits of a VMID, 8 or 16.
    pub vmid_bits: u8,
    /// All memory that is set aside for guests can hold allocation tags (FEAT_MTE2).
    pub tags: bool,
}

/// The machine.
///
/// # Safety
///
/// The core is safe code and hands out guest memory on the strength of this trait. An implementor promises:
/// 1. No method writes memory that a Rust reference of the program may point to, or reads memory that one may change.
///    Frames outside the memory that was set aside for guests and their tables, or for guests to read, are refused with a
///    panic, never accessed.
/// 2. `load`, `store` and `compare_exchange` are single-copy atomic, with acquire and release ordering towards all
///    CPUs and, after `published`, towards the hardware's table walks.
/// 3. `complete` returns only when every `tlb`, clean and invalidate that this CPU started has finished on every CPU
///    that it names.
/// 4. `features` never changes.
pub unsafe trait Machine: Sync {
    /// The machine's constants.
    fn features(&self) -> Features;

    /// Loads a word, acquire.
    fn load(&self, word: Word) -> u64;

    /// Stores a word, release.
    fn store(&self, word: Word, value: u64);

    /// Stores `new` if the word holds `current`; acquire and release.
    ///
    /// # Errors
    ///
    /// The value found, if it was not `current`.
    fn compare_exchange(&self, word: Word, current: u64, new: u64) -> Result<u64, u64>;

    /// Sets `bits` in a word; returns what it held. Acquire and release. A machine may know a shorter way.
    #[inline]
    fn set_bits(&self, word: Word, bits: u64) -> u64 {
        let mut old = self.load(word);
        // Who fails was overtaken by a CPU that has changed other bits.
        while old & bits != bits {
            match self.compare_exchange(word, old, old | bits) {
                Ok(_) => break,
                Err(now) => old = now,
            }
        }
        old
    }

    /// Stores `value(index)` in the words `first .. first + count` of a frame that nobody else uses yet: what publishes the
    /// frame publishes them.
    #[inline]
    fn store_row(&self, frame: Pfn, first: u16, count: u16, mut value: impl FnMut(u16) -> u64) {
        for index in first..first + count {
            self.store(Word::new(frame, index), value(index));
        }
    }

    /// Orders earlier `store`s and `compare_exchange`s before later table walks of this CPU (DSB ISHST; ISB).
    fn published(&self);

    /// Fills frames with zero, through the cacheable mapping.
    fn zero(&self, frames: PfnRange);

    /// Copies `count` frames from `from` to `to`, through the cacheable mapping. The two must not overlap.
    fn copy(&self, from: Pfn, to: Pfn, count: u64);

    /// Clears the allocation tags of frames. Without [`Features::tags`], this and the four below do nothing, and tags read
    /// as zero.
    fn clear_tags(&self, frames: PfnRange);

    /// `zero` and `clear_tags`.
    fn zero_tagged(&self, frames: PfnRange) {
        self.zero(frames);
        self.clear_tags(frames);
    }

    /// Copies the tags of `count` frames, which do not overlap.
    fn copy_tags(&self, from: Pfn, to: Pfn, count: u64);

    /// The tags of a frame.
    fn load_tags(&self, frame: Pfn) -> Tags;

    /// Gives a frame these tags.
    fn store_tags(&self, frame: Pfn, tags: &Tags);

    /// Reads bytes at `from` into `to`.
    fn read(&self, from: Hpa, to: &mut [u8]);

    /// Writes the bytes of `from` at `to`.
    fn write(&self, to: Hpa, from: &[u8]);

    /// Starts clean and invalidate of the data caches to the point of coherency (DC CIVAC); ends with `complete`. The
    /// frames are named by their physical addresses: they need not be in the hypervisor's own mapping.
    fn clean_invalidate_to_poc(&self, frames: PfnRange);

    /// Cleans the data caches to the point of unification and invalidates the instruction caches of all CPUs for
    /// `frames` (DC CVAU, IC IVAU or IC IALLUIS); ends with `complete`. The frames need not be in the own mapping.
    fn invalidate_icache(&self, frames: PfnRange);

    /// Starts a TLB invalidation on all CPUs; ends with `complete`.
    fn tlb(&self, op: TlbOp);

    /// Whether frames can leave the hypervisor's own mapping at all. Constant.
    fn can_unmap_own(&self) -> bool;

    /// Takes the entries of `frames` out of the hypervisor's own mapping: one frame, or a naturally aligned block of
    /// [`own::OWN_BLOCK`]. A single one has left with its block before, and came back. They are absent when
    /// `tlb(TlbOp::Own(frames))` is complete; the caller uses them no more from now on.
    ///
    /// # Errors
    ///
    /// [`RemoveError`]; they are mapped still.
    fn unmap_own(&self, frames: PfnRange) -> Result<(), RemoveError>;

    /// Puts absent frames back into it: one, or all of a block, none of which is mapped. They can be used at once.
    fn map_own(&self, frames: PfnRange);

    /// Whether `frame` is in it, by its tables.
    fn is_mapped_own(&self, frame: Pfn) -> bool;

    /// How many of `frames` are in it, by its tables.
    fn count_mapped_own(&self, frames: PfnRange) -> u64 {
        let inside = |offset: &u64| self.is_mapped_own(frames.start().offset(*offset));
        (0..frames.count()).filter(inside).count() as u64
    }

    /// Does `work` to `frame` through a translation that this CPU alone has, and that is gone before this returns. Nobody
    /// gives the frame to somebody else meanwhile.
    fn through_window(&self, frame: Pfn, work: Work<'_>);

    /// Waits for everything that this CPU started with `tlb`, `clean_invalidate_to_poc` and `invalidate_icache`.
    fn complete(&self);
}
