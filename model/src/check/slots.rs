//! Slot updates do what their kind says ("Slot updates" of the specification): one that changes flags alone unmaps
//! nothing.
//!
//! Watches each store to a table by a CPU that is in such an update.

use entresol_addr::GfnRange;

use crate::machine::EntryWrite;
use crate::machine::descriptor::Descriptor;

/// An entry was stored by a CPU that is changing the flags of a slot at `range`, and nothing else.
pub fn entry(range: GfnRange, write: &EntryWrite) -> Option<String> {
    let unmapped = write.old != Descriptor::Invalid && write.new == Descriptor::Invalid;
    (unmapped && range.overlaps(write.span))
        .then(|| format!("gfn {:#x} of VM {} was unmapped by an update of flags alone", write.span.start(), write.vm))
}
