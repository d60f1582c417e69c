//! Cache maintenance by set and way (Arm DDI 0487 D7.5): no data is lost, whatever a hypervisor makes of it.
//!
//! A guest that cleans before it invalidates loses nothing on real hardware either; with a second stage, `DC ISW` must
//! clean too (HCR_EL2.SWIO), so data written after the clean survives it.

use core::arch::asm;
use core::ops::Range;

use guest_rt::memory::{barrier, load64, store64};
use guest_rt::report::{Differs, same};
use guest_rt::{sysreg_read, sysreg_write};

/// Sets that are visited of each way: every one traps.
const SETS: u64 = 64;
/// Ways that are visited of each set.
const WAYS: u64 = 4;

/// Every data and unified level that CLIDR_EL1 names.
pub fn run(memory: &Range<u64>) -> Result<(), Differs<u64>> {
    crate::fill(memory, 21);
    each(clean);
    crate::verify(memory, 21)?;
    each(clean_invalidate);
    crate::verify(memory, 21)?;
    store64(memory.start, 77);
    barrier();
    each(clean_invalidate);
    each(invalidate);
    same(memory.start, 77, load64(memory.start))?;
    store64(memory.start, guest_restores(memory.start));
    crate::verify(memory, 21)
}

/// What `fill` wrote to the first word.
fn guest_restores(address: u64) -> u64 {
    crate::pattern(address, 21)
}

fn each(maintain: fn(u64)) {
    let levels = sysreg_read!("clidr_el1");
    // FEAT_CCIDX: wider fields in CCSIDR_EL1.
    let wide = sysreg_read!("id_aa64mmfr2_el1") >> 20 & 0xf != 0;
    for level in
        (0..7).take_while(|level| levels >> (3 * level) & 7 != 0).filter(|level| levels >> (3 * level) & 7 >= 2)
    {
        sysreg_write!("csselr_el1", level << 1);
        let size = sysreg_read!("ccsidr_el1");
        let line = (size & 7) + 4;
        let (ways, sets) = if wide {
            (size >> 3 & 0x1f_ffff, size >> 32 & 0xff_ffff)
        } else {
            (size >> 3 & 0x3ff, size >> 13 & 0x7fff)
        };
        // The way's number stands in the highest bits of 32 (A = log2(ways), rounded up).
        let shift = if ways == 0 { 0 } else { (ways as u32).leading_zeros() };
        for way in 0..(ways + 1).min(WAYS) {
            (0..(sets + 1).min(SETS)).for_each(|set| maintain(way << shift | set << line | level << 1));
        }
    }
    barrier();
}

macro_rules! by_set_and_way {
    ($($name:ident: $instruction:literal),*) => {$(
        fn $name(which: u64) {
            // SAFETY: cleaning loses nothing; `isw` comes only after a clean, with nothing but `run`'s test word and
            // this stack written since, and cleans as well under a second stage.
            unsafe { asm!(concat!($instruction, ", {}"), in(reg) which, options(nostack)) };
        }
    )*};
}

by_set_and_way!(clean: "dc csw", clean_invalidate: "dc cisw", invalidate: "dc isw");
