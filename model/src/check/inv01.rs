//! INV-1: no valid entry is visible before its page is clean to the point of coherency, unless FWB.
//!
//! Watches each store of a leaf that maps other memory than the word did before: no line of it may hold stores of the
//! hypervisor that memory lacks.

use crate::machine::descriptor::Descriptor;
use crate::machine::{EntryWrite, World};

/// Checks a store to a table.
pub fn entry(world: &World, write: &EntryWrite) -> Option<String> {
    let Descriptor::Leaf(leaf) = write.new else { return None };
    if world.config.fwb || !leaf.normal || matches!(write.old, Descriptor::Leaf(old) if old.same_output(&leaf)) {
        return None;
    }
    let mut frames = (0..leaf.size.frames()).map(|offset| leaf.pfn.offset(offset));
    let owing = frames.find(|pfn| world.frame(*pfn).is_some_and(|frame| frame.owes_clean()))?;
    Some(format!(
        "the entry for gfn {:#x} of VM {} is visible, and frame {owing:#x} behind it is not clean to the point of coherency",
        write.span.start(),
        write.vm
    ))
}
