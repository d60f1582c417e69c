//! INV-7: every frame reference and every lease is released exactly once, on every path; and nobody reaches a frame that is free.
//!
//! Watches the pool giving a frame back, and a table's frame that is zeroed for another (no translation, in a table or in a cache, may lead to it), each store of an
//! entry (what it points to is given out), each access of the hypervisor (not to what is free), and the end of a schedule (every frame is accounted for). That a frame is
//! not given back twice the pool itself asserts.

use entresol_addr::{GfnRange, Pfn, PfnRange};
use entresol_backing::Audit;

use crate::machine::descriptor::Descriptor;
use crate::machine::{EntryWrite, World};

/// Frames are about to be free.
pub fn freed(world: &World, frames: PfnRange) -> Option<String> {
    let mut reaching = None;
    world.tables.each_seen(&world.tlb, None, None, |seen| {
        let block = PfnRange::block(seen.leaf.pfn, seen.leaf.size);
        if block.overlaps(frames) {
            reaching = Some((seen.stale, seen.span));
        }
    });
    if let Some((stale, span)) = reaching {
        let how: (&str, GfnRange) = (if stale { "a TLB may still reach it" } else { "an entry still maps it" }, span);
        return Some(format!("frame {:#x} is freed, and {} by gfn {:#x}", frames.start(), how.0, how.1.start()));
    }
    let mut level = None;
    world.tables.each_pointer(&world.tlb, frames.start(), |at| level = Some(at));
    level.map(|level| {
        format!("table page {:#x} is freed, and a walk may still follow a level {level} entry to it", frames.start())
    })
}

/// A frame is about to begin anew, and whoever has it keeps it: as another table, if it was one.
pub fn renewed(world: &World, pfn: Pfn) -> Option<String> {
    if world.frame(pfn)?.tables.is_empty() {
        return None;
    }
    let mut level = None;
    world.tables.each_pointer(&world.tlb, pfn, |at| level = Some(at));
    level.map(|level| {
        format!("table page {pfn:#x} is used again, and a walk may still follow a level {level} entry to it")
    })
}

/// Checks a store to a table.
pub fn entry(world: &World, write: &EntryWrite) -> Option<String> {
    let frames = match write.new {
        Descriptor::Invalid | Descriptor::Refused => return None,
        Descriptor::Table(frame) => PfnRange::single(frame),
        Descriptor::Leaf(leaf) if !leaf.normal => return None,
        Descriptor::Leaf(leaf) => PfnRange::block(leaf.pfn, leaf.size),
    };
    let mut all = (0..frames.count()).map(|offset| frames.start().offset(offset));
    let free = all.find(|pfn| !world.frame(*pfn).is_some_and(|frame| frame.taken))?;
    Some(format!(
        "the entry for gfn {:#x} of VM {} leads to frame {free:#x}, which is free",
        write.span.start(),
        write.vm
    ))
}

/// The hypervisor is about to read or write `frames`.
pub fn used(world: &World, frames: PfnRange) -> Option<String> {
    let mut all = (0..frames.count()).map(|offset| frames.start().offset(offset));
    let free = all.find(|pfn| world.frame(*pfn).is_some_and(|frame| !frame.taken))?;
    Some(format!("the hypervisor uses frame {free:#x}, which is free"))
}

/// What the frames of a schedule that has ended are used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Frames of the pool.
    pub total: u64,
    /// Those free.
    pub free: u64,
    /// Private ones that no object has.
    pub private: u64,
    /// Bad ones that nobody has, and that are not private.
    pub quarantined: u64,
    /// Those in second-stage tables, roots included.
    pub tables: u64,
    /// Those behind objects and in their trees, what relatives share once.
    pub objects: u64,
    /// Those of dirty logs.
    pub logs: u64,
}

/// The schedule has ended, and whoever had a lease has released it.
pub fn leases(audit: &Audit) -> Option<String> {
    (audit.leased != 0).then(|| format!("{} frames are leased, and nobody has the leases: {audit:?}", audit.leased))
}

/// The schedule has ended, nothing waits for a grace period.
pub fn balance(account: &Account) -> Option<String> {
    let used = account.private + account.quarantined + account.tables + account.objects + account.logs;
    let missing = account.total as i64 - account.free as i64 - used as i64;
    (missing != 0).then(|| format!("{missing} frames are neither free nor used: {account:?}"))
}

/// Every object is gone: so are the references to places of the swap device.
pub fn places(references: u64) -> Option<String> {
    (references != 0).then(|| format!("{references} references to places of the swap device were never given back"))
}
