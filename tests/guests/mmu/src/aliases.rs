//! One page of memory through mappings of different kinds, with the maintenance that the architecture asks for between
//! them (Arm DDI 0487 B2.8, mismatched memory attributes).

use core::ops::Range;

use guest_rt::memory::{clean_invalidate, each_line, load64, store64};
use guest_rt::report::{Differs, Report, same};

use crate::{DEVICE, NON_CACHEABLE, WRITE_THROUGH, fill, verify};

const KINDS: [(&str, u64); 4] =
    [("Cacheable", 0), ("Non-cacheable", NON_CACHEABLE), ("Device", DEVICE), ("Write-through", WRITE_THROUGH)];

/// Writes by each kind, reads by every other.
pub fn run(report: &mut Report, memory: Range<u64>) {
    fill(&memory, 9);
    report.check("fresh memory, Cacheable", verify(&memory, 9));
    for (salt, (writer, to)) in KINDS.into_iter().enumerate() {
        for (reader, from) in KINDS {
            let result = carry(&memory, to, from, salt as u64);
            report.check("alias", result.map_err(|differs| Pair { writer, reader, differs }));
        }
    }
}

struct Pair {
    writer: &'static str,
    reader: &'static str,
    differs: Differs<u64>,
}

impl core::fmt::Display for Pair {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "written {}, read {}: {}", self.writer, self.reader, self.differs)
    }
}

fn carry(memory: &Range<u64>, to: u64, from: u64, salt: u64) -> Result<(), Differs<u64>> {
    let value = |address: u64| address.rotate_left(17) ^ salt ^ to ^ from << 1;
    each_line(memory.clone(), clean_invalidate);
    for address in memory.clone().step_by(64) {
        store64(to + address, value(address));
    }
    each_line(memory.clone(), clean_invalidate);
    memory.clone().step_by(64).try_for_each(|address| same(address, value(address), load64(from + address)))
}
