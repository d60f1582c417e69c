//! INV-13: read-only backing bytes never change from a guest's action.
//!
//! Watches each store of a leaf: none that permits writing leads to read-only memory. What a guest's store through a
//! read-only slot would change the interpreter reports itself.

use crate::machine::descriptor::Descriptor;
use crate::machine::{EntryWrite, World};

/// Checks a store to a table.
pub fn entry(world: &World, write: &EntryWrite) -> Option<String> {
    let Descriptor::Leaf(leaf) = write.new else { return None };
    let mut frames = (0..leaf.size.frames()).map(|offset| leaf.pfn.offset(offset));
    let rom = frames.find(|pfn| world.frame(*pfn).is_some_and(|frame| frame.rom)).filter(|_| leaf.write)?;
    Some(format!("gfn {:#x} of VM {} is writable, and frame {rom:#x} is read-only", write.span.start(), write.vm))
}
