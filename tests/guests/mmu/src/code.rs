//! Code that changes: written, cleaned, invalidated, run, and written again.

use core::ops::Range;

use guest_rt::memory::{clean_invalidate, each_line, publish_code, store32};
use guest_rt::report::{Differs, same};
use guest_rt::trap::probe;

/// `movz w0, #imm`.
fn movz(value: u16) -> u32 {
    0x5280_0000 | u32::from(value) << 5
}

const RET: u32 = 0xd65f_03c0;

/// Rewrites one function 256 times through the mapping at `alias`, and calls it at its own address each time.
pub fn changes(page: Range<u64>, alias: u64) -> Result<(), Differs<u64>> {
    for round in 0..256u16 {
        // Different lines of the page, so that a line that was kept too long shows.
        let at = page.start + u64::from(round % 8) * 256;
        each_line(at..at + 8, clean_invalidate);
        store32(alias + at, movz(round));
        store32(alias + at + 4, RET);
        publish_code(at..at + 8);
        let found = probe::call(at).unwrap_or_else(|fault| fault.esr | 1 << 63);
        same(at, round.into(), found)?;
    }
    Ok(())
}
