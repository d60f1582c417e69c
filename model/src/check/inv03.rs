//! INV-3: after `invalidate_range_start` returned, no translation reaches the range until its end and a fresh lookup.
//! The same holds after a slot was deleted or moved, for what it showed.
//!
//! Watches the moment the call returns, each store to a table while the range is protected, and each access.

use entresol_addr::GfnRange;

use crate::machine::descriptor::Descriptor;
use crate::machine::{EntryWrite, World};

/// A range of `vm` must not be reachable now.
pub fn unreachable(world: &World, vm: usize, range: GfnRange) -> Option<String> {
    let mut found = None;
    world.tables.each_seen(&world.tlb, Some(vm), Some(range), |seen| found = Some(seen));
    found.map(|seen| {
        let how = if seen.stale { "a TLB may still hold" } else { "the table still holds" };
        format!("gfn {:#x} of VM {vm} was invalidated, and {how} {:?} for it", seen.span.start(), seen.leaf)
    })
}

/// An entry was stored while `protected` ranges are being invalidated.
pub fn entry(protected: &[(usize, GfnRange)], write: &EntryWrite) -> Option<String> {
    let Descriptor::Leaf(leaf) = write.new else { return None };
    let (_, range) = protected.iter().find(|(vm, range)| *vm == write.vm && range.overlaps(write.span))?;
    Some(format!(
        "gfn {:#x} of VM {} is mapped to frame {:#x} while {range:?} is being invalidated",
        write.span.start(),
        write.vm,
        leaf.pfn
    ))
}
