//! INV-10: a frame is in the hypervisor's own mapping exactly if it is not private, is leased, or is inside a locked access.
//!
//! Watches each use of a frame by its address (it must be in the mapping: who uses one that is not takes a fault at EL2), and at
//! the end of a schedule, when nothing is in progress, every frame: the core's own audit against the model's mapping, and that
//! no CPU may still translate to what is absent.

use entresol_addr::PfnRange;
use entresol_backing::Audit;

use crate::machine::World;

/// The hypervisor is about to use `frames` by their addresses.
pub fn used(world: &World, frames: PfnRange) -> Option<String> {
    let mut all = (0..frames.count()).map(|offset| frames.start().offset(offset));
    let absent = all.find(|pfn| !world.own.is_mapped(*pfn))?;
    Some(format!("the hypervisor uses frame {absent:#x} by its address, and it is absent from its mapping"))
}

/// Nothing is in progress.
pub fn settled(world: &World, audit: &Audit) -> Option<String> {
    if let Some(pfn) = audit.example {
        return Some(format!("frame {pfn:#x} is mapped and should not be, or the reverse: {audit:?}"));
    }
    let lingering = world.own.lingering()?;
    Some(format!("frame {lingering:#x} counts as absent, and a CPU may still translate to it"))
}
