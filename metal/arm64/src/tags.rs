//! Allocation tags of frames (FEAT_MTE2).
//!
//! Purpose: clear, copy, load and store the tags of whole frames through EL2's mapping, which is Tagged Normal memory on
//! machines that have tags (`paging`); SCTLR_EL2.ATA lets EL2 reach them, and EL2's own accesses are checked by nobody
//! (SCTLR_EL2.TCF is 0).
//!
//! Protocol: the caller has checked the frames, and asks only on a machine with [`Feature::MTE`]. LDGM and STGM move the tags of
//! one block of GMID_EL1.BS, each in the bits that its granule's address names, so a word of sixteen tags is what the blocks of 256
//! bytes join to, whatever the block.
//!
//! Sources: Arm DDI 0487 D10 (memory tagging), C6.2 (LDGM, STGM), C5.4 (DC GVA, DC GZVA), D24.2 (GMID_EL1).

use core::arch::asm;

use entresol_addr::PAGE_SIZE;
use entresol_machine::{GRANULE, Tags};
use entresol_sync::atomic::{AtomicU64, Ordering};

use crate::features::{self, Feature};

/// Bytes whose tags LDGM and STGM move.
static BLOCK: AtomicU64 = AtomicU64::new(GRANULE);
/// Bytes whose tags one word holds.
const WORD: u64 = 16 * GRANULE;

/// Reads the block's size. The boot CPU, once.
pub(crate) fn init() {
    if features::has(Feature::MTE) {
        // Log2 of words of four bytes, 2 to 6.
        let block = 4u64 << (mrs!("s3_1_c0_c0_4") & 0xf);
        assert!((GRANULE..=WORD).contains(&block), "GMID_EL1.BS names blocks of {block} bytes");
        BLOCK.store(block, Ordering::Relaxed);
    }
}

/// Clears the tags of whole frames; with `zero`, their bytes too. `zva` is the block of DC GVA in bytes, 0 if there is none.
pub(crate) fn clear(start: u64, bytes: u64, zva: u64, zero: bool) {
    let end = start + bytes;
    match (zva, zero) {
        (0, _) => {
            let block = BLOCK.load(Ordering::Relaxed);
            for at in (start..end).step_by(block as usize) {
                // SAFETY: the caller checked the frames; tags are no bytes of any Rust object.
                unsafe { store_block(at, 0) };
            }
        }
        (block, true) => {
            for at in (start..end).step_by(block as usize) {
                // SAFETY: the caller checked the frames, into which no Rust reference points; the block divides a frame. DC GZVA is
                // SYS #3, C7, C4, #4.
                unsafe { instruction_on!("sys #3, c7, c4, #4", at) };
            }
        }
        (block, false) => {
            for at in (start..end).step_by(block as usize) {
                // SAFETY: as for STGM. DC GVA is SYS #3, C7, C4, #3.
                unsafe { instruction_on!("sys #3, c7, c4, #3", at) };
            }
        }
    }
}

/// Copies the tags of whole frames.
pub(crate) fn copy(from: u64, to: u64, bytes: u64) {
    let block = BLOCK.load(Ordering::Relaxed);
    for offset in (0..bytes).step_by(block as usize) {
        // SAFETY: the caller checked the frames.
        unsafe { store_block(to + offset, load_block(from + offset)) };
    }
}

/// The tags of a frame.
pub(crate) fn load(start: u64) -> Tags {
    let mut tags = Tags::ZERO;
    for at in blocks(start) {
        // SAFETY: the caller checked the frame.
        tags.0[((at - start) / WORD) as usize] |= unsafe { load_block(at) };
    }
    tags
}

/// Gives a frame these tags.
pub(crate) fn store(start: u64, tags: &Tags) {
    for at in blocks(start) {
        // SAFETY: the caller checked the frame.
        unsafe { store_block(at, tags.0[((at - start) / WORD) as usize]) };
    }
}

fn blocks(start: u64) -> impl Iterator<Item = u64> {
    (start..start + PAGE_SIZE).step_by(BLOCK.load(Ordering::Relaxed) as usize)
}

/// # Safety
///
/// `at` is a block of mapped memory with tags; the machine has FEAT_MTE2.
#[inline]
unsafe fn load_block(at: u64) -> u64 {
    let tags: u64;
    // SAFETY: a load of tags, as the caller promises.
    unsafe {
        asm!(
            ".arch_extension memtag",
            "ldgm {tags}, [{at}]",
            ".arch_extension nomemtag",
            tags = out(reg) tags, at = in(reg) at, options(nostack, readonly, preserves_flags),
        );
    }
    tags
}

/// # Safety
///
/// As for `load_block`.
#[inline]
unsafe fn store_block(at: u64, tags: u64) {
    // SAFETY: a store of tags, as the caller promises; no bytes change.
    unsafe {
        asm!(
            ".arch_extension memtag",
            "stgm {tags}, [{at}]",
            ".arch_extension nomemtag",
            tags = in(reg) tags, at = in(reg) at, options(nostack, preserves_flags),
        );
    }
}
