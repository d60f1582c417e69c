//! Stores that nobody answers: a zone of coalesced MMIO and a doorbell, where the owner's test has put them.
//!
//! Protocol with that test: rings and known writes first; then numbered writes, far more than the ring holds, so that the
//! machine stops several times until its owner has taken some. What arrives is the owner's to check.

use guest_rt::memory::store64;
use guest_rt::report::Report;

use crate::cases::{Wrong, registers};
use crate::code;
use crate::run::{Code, run};

/// One page.
pub const ZONE: u64 = 0x0c00_0000;
/// Four bytes at the start of a page, where an access that faults may have begun in the page before.
pub const DOORBELL: u64 = 0x0c00_1000;
/// Numbered writes.
const NUMBERED: u64 = 400;

/// All of it; `aborts`: what nobody takes ends in an abort.
pub fn all(report: &mut Report, aborts: bool) {
    let store = |report: &mut Report, name: &str, code: Code, at: u64, x0: u64, moved: i64| {
        let before = crate::run::Registers { x: [x0, x0, 0, 0], ..registers(at, 0) };
        let after = run(code, &before, false);
        let right = after.taken == 0 && after.base == at.wrapping_add_signed(moved);
        report.check(name, if right { Ok(()) } else { Err(Wrong::taken(&after)) });
    };
    store(report, "doorbell: str w0", code!("str w0, [x9]"), DOORBELL, 1, 0);
    store(report, "doorbell: str w0 post", code!("str w0, [x9], #4"), DOORBELL, 2, 4);
    store(report, "doorbell: str w0 pre", code!("str w0, [x9, #-4]!"), DOORBELL + 4, 3, -4);
    store(report, "zone: strb w0", code!("strb w0, [x9]"), ZONE + 3, 0x11, 0);
    store(report, "zone: strh w0", code!("strh w0, [x9]"), ZONE + 6, 0x2222, 0);
    store(report, "zone: str w0 at its start", code!("str w0, [x9]"), ZONE, 0x3333_3333, 0);
    store(report, "zone: str x0 at its end", code!("str x0, [x9]"), ZONE + 0xff8, 0x4444_4444_4444_4444, 0);
    store(report, "zone: str x0 post", code!("str x0, [x9], #8"), ZONE + 0x10, 0x5555, 8);
    let big = run(
        code!("str w0, [x9]"),
        &crate::run::Registers { x: [0x6677_8899, 0, 0, 0], ..registers(ZONE + 8, 0) },
        true,
    );
    report.check("zone: str w0, big-endian", if big.taken == 0 { Ok(()) } else { Err(Wrong::taken(&big)) });
    if aborts {
        for (name, code, at) in [
            ("doorbell: another size", code!("strh w0, [x9]"), DOORBELL),
            ("doorbell: a load", code!("ldr w0, [x9]"), DOORBELL),
            ("behind the doorbell", code!("str w0, [x9]"), DOORBELL + 4),
            ("zone: a load", code!("ldr x0, [x9]"), ZONE),
            ("zone: a pair", code!("stp x0, x1, [x9], #16"), ZONE),
            ("behind the zone", code!("str x0, [x9]"), ZONE + 0x1008),
        ] {
            report.check(name, crate::external(run(code, &registers(at, 0), false), at, at));
        }
    }
    for number in 0..NUMBERED {
        store64(ZONE + number % 512 * 8, number);
    }
}
