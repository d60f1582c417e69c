//! Cache maintenance by address: on memory it loses nothing, on devices and on nothing it does nothing; its faults are those of
//! the guest's own tables. `cmo=trap` says that faults are reported, which an emulator that has no caches may not do.

use guest_rt::memory::{load64, store64};
use guest_rt::mmu::{self, Kind, Space};
use guest_rt::report::{Report, same};
use guest_rt::trap::{class, status};

use crate::bench;
use crate::cases::{Wrong, registers};
use crate::code;
use crate::run::{Code, run};

/// Where pages are mapped for this.
const AT: u64 = 0x2a_0000_0000;
const PAGE: u64 = 0x1000;
/// Nothing is there.
const HOLE: u64 = 0x0c10_0000;
/// ESR_EL1: cache maintenance, and the write that it is reported as.
const MAINTENANCE: u64 = 1 << 8 | 1 << 6;
const PATTERN: u64 = 0x5a5a_1234_8765_a5a5;

const OPERATIONS: &[(&str, Code)] = &[
    ("dc ivac", code!("dc ivac, x9")),
    ("dc cvac", code!("dc cvac, x9")),
    ("dc cvau", code!("dc cvau, x9")),
    ("dc cvap", code!(".arch armv8.2-a", "dc cvap, x9")),
    ("dc civac", code!("dc civac, x9")),
    ("ic ivau", code!("ic ivau, x9")),
    ("ic iallu", code!("ic iallu")),
    ("ic ialluis", code!("ic ialluis")),
];

/// All of it, in `space`, which is active, with `pages` (of nobody, never touched, one for each operation and two more).
pub fn all(report: &mut Report, space: &mut Space, pages: u64, faults: bool) {
    let (read_only, unmapped) = (AT + PAGE, AT + 2 * PAGE);
    let used = pages + OPERATIONS.len() as u64 * PAGE;
    space.map(AT, HOLE, PAGE, Kind::NonCacheable, true);
    space.map(read_only, used, PAGE, Kind::Cacheable, false);
    mmu::invalidate_tlb();
    store64(used, PATTERN);
    for (page, (name, code)) in (pages..).step_by(PAGE as usize).zip(OPERATIONS) {
        report.check(name, done(*code, page + 64));
        report.check(name, same(page, 0, load64(page)));
        store64(page, PATTERN);
        report.check(name, done(*code, page));
        report.check(name, same(page, PATTERN, load64(page)));
        report.check(name, done(*code, AT + 8));
        bench::set(&bench::BEFORE);
        report.check(name, done(*code, bench::ROUTERS + crate::ALIAS));
        report.check(name, if bench::get() == bench::BEFORE { Ok(()) } else { Err("a device changed") });
        let invalidates = *name == "dc ivac";
        if !faults || !name.contains("va") {
            continue;
        }
        report.check(name, fault(*code, unmapped, status::TRANSLATION_3));
        if invalidates {
            report.check(name, fault(*code, read_only, status::PERMISSION_3));
        } else {
            report.check(name, done(*code, read_only));
        }
        report.check(name, same(used, PATTERN, load64(used)));
    }
}

/// The operation at `address` takes no exception.
fn done(code: Code, address: u64) -> Result<(), Wrong> {
    let after = run(code, &registers(address, 0), false);
    if after.taken == 0 { Ok(()) } else { Err(Wrong::taken(&after)) }
}

/// The operation at `address` takes this abort, as maintenance.
fn fault(code: Code, address: u64, expected: u64) -> Result<(), Wrong> {
    let after = run(code, &registers(address, 0), false);
    let abort = after.taken == 5 && after.esr >> 26 == class::DATA_ABORT && after.esr & 0x3f == expected;
    let right = abort && after.esr & MAINTENANCE == MAINTENANCE && after.far == address;
    if right { Ok(()) } else { Err(Wrong::taken(&after)) }
}
