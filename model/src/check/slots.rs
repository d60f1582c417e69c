//! Slot updates do what their kind says ("Slot updates" of the specification): one that changes flags alone unmaps
//! nothing. A table may give way to a block, and its pages with it. And dirty rings concern slots that log alone,
//! whatever their entries say.
//!
//! Watches each store to a table by a CPU that is in such an update, or in a reset of rings.

use entresol_addr::GfnRange;

use super::inv04::Log;
use crate::machine::descriptor::Descriptor;
use crate::machine::{EntryWrite, World};

/// An entry was stored by a CPU that is changing the flags of a slot at `range`, and nothing else.
pub fn entry(world: &World, range: GfnRange, write: &EntryWrite) -> Option<String> {
    // Below a word that is invalid already nothing is unmapped.
    let (_, level) = world.tables.current(write.vm, write.span.start());
    let unmapped = matches!(write.old, Descriptor::Leaf(_)) && write.new.is_invalid() && level >= write.level;
    (unmapped && range.overlaps(write.span))
        .then(|| format!("gfn {:#x} of VM {} was unmapped by an update of flags alone", write.span.start(), write.vm))
}

/// An entry was stored by a CPU that is resetting dirty rings.
pub fn reset(logs: &[Log], write: &EntryWrite) -> Option<String> {
    if logs.iter().any(|log| log.vm == write.vm && log.range.overlaps(write.span)) {
        return None;
    }
    Some(format!(
        "gfn {:#x} of VM {}, which does not log, was changed by a reset of rings",
        write.span.start(),
        write.vm
    ))
}
