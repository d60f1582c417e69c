//! The guest's own faults stay the guest's, and its table walker reaches tables that the hypervisor has not mapped yet.

use guest_rt::memory::{load64, store64};
use guest_rt::mmu::{Kind, Space};
use guest_rt::report::{Differs, Report, same};
use guest_rt::trap::{Fault, class, probe, status};

use crate::{Fresh, PAGE};

/// Addresses of entries 448 and on of the root table, which nothing else uses.
const SPARE: u64 = 448 << 30;

/// Runs the tests that need tables of their own.
pub fn run(report: &mut Report, space: &mut Space, fresh: &mut Fresh) {
    let page = fresh.take(PAGE).start;
    store64(page, 5);
    space.map(SPARE, page, PAGE, Kind::Cacheable, false);
    report.check("read-only page: load", same(page, 5, load64(SPARE)));
    report.check(
        "read-only page: store",
        is_fault(probe::store64(SPARE, 6), SPARE, status::PERMISSION_3).and_then(|()| same(page, 5, load64(page))),
    );
    // The table exists (the page before made it), its entry does not.
    report.check("unmapped page", is_fault(probe::load64(SPARE + PAGE, 0), SPARE + PAGE, status::TRANSLATION_3));
    let far = SPARE + (8 << 30);
    report.check("unmapped gigabyte", is_fault(probe::load64(far, 0), far, status::TRANSLATION_3 - 2));

    report.check("walk to a table that was never touched", walk(space, fresh));
    report.check("walk to a table outside memory", outside(space));
}

/// A fresh page is zero, so no translation; filled, it translates.
fn walk(space: &mut Space, fresh: &mut Fresh) -> Result<(), Differs<u64>> {
    let table = fresh.take(PAGE).start;
    let address = SPARE + (1 << 30);
    space.put_root(449, table | 3);
    is_fault(probe::load64(address, 0), address, status::TRANSLATION_3 - 1)?;
    // A block of the first 2 MiB of memory's free part, as the identity map has it.
    let block = table & !0x1f_ffff;
    store64(table, block | 1 | 1 << 10 | 3 << 8);
    guest_rt::memory::clean(table);
    guest_rt::memory::barrier();
    store64(table + 8, 0);
    let offset = table - block;
    match probe::load64(address + offset, 0) {
        Ok(found) => same(address, load64(table), found),
        Err(fault) => same(address, load64(table), fault.esr | 1 << 63),
    }
}

/// The walk itself is an external abort, with the level of the table that is not there (DFSC 0b0101LL).
fn outside(space: &mut Space) -> Result<(), Differs<u64>> {
    const WALK_LEVEL_2: u64 = 0x16;
    let address = SPARE + (2 << 30);
    space.put_root(450, 0x30_0000_0000 | 3);
    match probe::load64(address, 0) {
        Err(fault) if fault.class() == class::DATA_ABORT && fault.status() == WALK_LEVEL_2 => {
            same(address, address, fault.far)
        }
        other => same(address, WALK_LEVEL_2, other.unwrap_or_else(|fault| fault.esr)),
    }
}

fn is_fault(result: Result<u64, Fault>, far: u64, status: u64) -> Result<(), Differs<u64>> {
    match result {
        Err(fault) if fault.class() == class::DATA_ABORT && fault.status() == status => same(far, far, fault.far),
        Err(fault) => same(far, status, fault.esr),
        Ok(value) => same(far, status, value | 1 << 63),
    }
}
