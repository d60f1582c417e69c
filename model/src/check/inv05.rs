//! INV-5: a block never leaves its slot.
//!
//! Watches each store of a leaf. That it does not leave its object's extent follows with INV-7 (every frame behind it is
//! given out) and INV-11 (every byte is the object's).

use entresol_addr::GfnRange;

use crate::machine::EntryWrite;
use crate::machine::descriptor::Descriptor;

/// An entry was stored; `slots` are the ranges of its virtual machine's slots, those being taken away included.
pub fn entry(mut slots: impl Iterator<Item = GfnRange>, write: &EntryWrite) -> Option<String> {
    let Descriptor::Leaf(leaf) = write.new else { return None };
    if slots.any(|slot| slot.covers(write.span)) {
        return None;
    }
    Some(format!("{:?} at gfn {:#x} of VM {} lies in no slot whole", leaf.size, write.span.start(), write.vm))
}
