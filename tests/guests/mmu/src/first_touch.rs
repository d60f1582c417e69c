//! A page's first touch by each form of access that a second stage can see: with and without a syndrome, by maintenance,
//! across two pages, by the table walker, by a fetch.

use guest_rt::memory::{self, load64};
use guest_rt::report::{Differs, Report, same};
use guest_rt::sysreg_read;
use guest_rt::trap::{Fault, class, probe};

use crate::{Fresh, PAGE};

type Probe = fn(u64, u64) -> Result<u64, Fault>;

/// Loads: each gives zero.
const LOADS: [(&str, Probe); 8] = [
    ("ldrb", probe::load8),
    ("ldrh", probe::load16),
    ("ldr w", probe::load32),
    ("ldr x", probe::load64),
    ("ldrsw", probe::load_signed32),
    ("ldp", probe::load_pair),
    ("ldr post", probe::load_post),
    ("ldar", probe::load_acquire),
];

/// Stores, and what is then in the first 8 bytes.
const STORES: [(&str, Probe, u64); 7] = [
    ("strb", probe::store8, 0x88),
    ("strh", probe::store16, 0x7788),
    ("str w", probe::store32, 0x5566_7788),
    ("str x", probe::store64, VALUE),
    ("stp", probe::store_pair, VALUE),
    ("str post", probe::store_post, VALUE),
    ("stlr", probe::store_release, VALUE),
];

const VALUE: u64 = 0x1122_3344_5566_7788;

/// Maintenance of a page that is not there yet: it stays zero.
const MAINTENANCE: [(&str, Probe); 5] = [
    ("dc cvac", probe::clean),
    ("dc civac", probe::clean_invalidate),
    ("dc ivac", probe::invalidate),
    ("ic ivau", probe::invalidate_instructions),
    ("prfm", probe::prefetch),
];

/// What Device memory allows.
pub fn while_off(report: &mut Report, fresh: &mut Fresh) {
    for (name, load) in LOADS {
        report.check(name, touched(load, fresh, 0));
    }
    for (name, store, after) in STORES {
        report.check(name, stored(store, fresh, after));
    }
    report.check("fetch", fetch(fresh));
}

/// The same and what only Normal memory allows.
pub fn while_on(report: &mut Report, fresh: &mut Fresh) {
    while_off(report, fresh);
    for (name, maintain) in MAINTENANCE {
        report.check(name, maintained(maintain, fresh));
    }
    report.check("ldxr stxr", exclusive(fresh));
    // ID_AA64ISAR0_EL1.Atomic.
    if sysreg_read!("id_aa64isar0_el1") >> 20 & 0xf >= 2 {
        report.check("ldadd", stored(probe::add_atomic, fresh, VALUE));
    }
    if memory::zero_block() != 0 {
        report.check("dc zva", maintained(probe::zero_block, fresh));
    }
    report.check("str x across two pages", across(fresh));
}

/// A page whose neighbours nobody touched either: with 4 KiB entries each is a fault of its own.
fn page(fresh: &mut Fresh) -> u64 {
    fresh.take(4 * PAGE).start + PAGE
}

fn value(result: Result<u64, Fault>) -> u64 {
    result.unwrap_or_else(|fault| fault.esr | 1 << 63)
}

fn touched(access: Probe, fresh: &mut Fresh, expected: u64) -> Result<(), Differs<u64>> {
    let page = page(fresh);
    same(page, expected, value(access(page, 0)))
}

fn stored(access: Probe, fresh: &mut Fresh, after: u64) -> Result<(), Differs<u64>> {
    let page = page(fresh);
    if let Err(fault) = access(page, VALUE) {
        return same(page, after, fault.esr | 1 << 63);
    }
    same(page, after, load64(page))?;
    same(page + PAGE - 8, 0, load64(page + PAGE - 8))
}

fn maintained(access: Probe, fresh: &mut Fresh) -> Result<(), Differs<u64>> {
    let page = page(fresh);
    if let Err(fault) = access(page, 0) {
        return same(page, 0, fault.esr | 1 << 63);
    }
    same(page, 0, load64(page))
}

fn exclusive(fresh: &mut Fresh) -> Result<(), Differs<u64>> {
    let page = page(fresh);
    // An exclusive may fail without a reason, but not for ever (Arm DDI 0487 B2.12.5).
    let tries = (0..1000).find(|_| value(probe::store_exclusive(page, VALUE)) == 0);
    same(page, true, tries.is_some()).map_err(|_| Differs { at: page, expected: 0, found: 1 })?;
    same(page, VALUE, load64(page))
}

fn across(fresh: &mut Fresh) -> Result<(), Differs<u64>> {
    let page = page(fresh);
    let result = probe::store64(page + PAGE - 4, VALUE);
    same(page + PAGE - 4, false, result.is_err()).map_err(|_| Differs {
        at: page,
        expected: 0,
        found: value(result),
    })?;
    same(page + PAGE - 8, VALUE << 32, load64(page + PAGE - 8))?;
    same(page + PAGE, VALUE >> 32, load64(page + PAGE))
}

/// Zero is no instruction: the page is there, and executed.
fn fetch(fresh: &mut Fresh) -> Result<(), Differs<u64>> {
    let page = page(fresh);
    match probe::call(page) {
        Err(fault) if fault.class() == class::UNKNOWN => same(page, page, fault.elr),
        other => same(page, 0, value(other)),
    }
}
