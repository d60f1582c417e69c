//! INV-6: executable ⇒ the instruction cache was invalidated for that content, or DIC.
//!
//! Watches each store of a leaf that is executable and was not.

use crate::machine::descriptor::Descriptor;
use crate::machine::{EntryWrite, World};

/// Checks a store to a table.
pub fn entry(world: &World, write: &EntryWrite) -> Option<String> {
    let Descriptor::Leaf(leaf) = write.new else { return None };
    let was = matches!(write.old, Descriptor::Leaf(old) if old.execute && old.same_output(&leaf));
    if world.config.dic || !leaf.execute || was {
        return None;
    }
    let mut frames = (0..leaf.size.frames()).map(|offset| leaf.pfn.offset(offset));
    let stale = frames.find(|pfn| {
        world.frame(*pfn).is_some_and(|frame| frame.has_stale_code() || frame.host_written > frame.icache_clean)
    })?;
    Some(format!(
        "gfn {:#x} of VM {} is executable, and instruction caches may hold older content of frame {stale:#x}",
        write.span.start(),
        write.vm
    ))
}
