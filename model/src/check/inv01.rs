//! INV-1: no valid entry is visible before its page is clean to the point of coherency, unless FWB, and its tags are valid.
//!
//! Watches each store of a leaf that maps other memory than the word did before: no line of it may hold stores of the
//! hypervisor that memory lacks, and on a machine with tags none of its frames may have those of a frame that is free.

use crate::machine::descriptor::Descriptor;
use crate::machine::frame::POISON_TAGS;
use crate::machine::{EntryWrite, World};

/// Checks a store to a table.
pub fn entry(world: &World, write: &EntryWrite) -> Option<String> {
    let Descriptor::Leaf(leaf) = write.new else { return None };
    if !leaf.normal || matches!(write.old, Descriptor::Leaf(old) if old.same_output(&leaf)) {
        return None;
    }
    let whose = |frame, what| {
        let (gfn, vm) = (write.span.start(), write.vm);
        format!("the entry for gfn {gfn:#x} of VM {vm} is visible, and frame {frame:#x} behind it {what}")
    };
    let mut frames = (0..leaf.size.frames()).map(|offset| leaf.pfn.offset(offset));
    frames.find_map(|pfn| {
        let frame = world.frame(pfn)?;
        if !world.config.fwb && frame.owes_clean() {
            return Some(whose(pfn, "is not clean to the point of coherency"));
        }
        let tagged = world.config.tags && !frame.rom;
        (tagged && frame.tags == POISON_TAGS).then(|| whose(pfn, "has tags that nobody gave it"))
    })
}
