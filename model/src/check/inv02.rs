//! INV-2: no valid entry changes output address, size or memory type without an invalid step and a completed TLB
//! invalidation: the automaton of an entry (Arm DDI 0487 D8.16.1).
//!
//! Watches each store to a table. The new value may stand beside an older one only if they say the same but for
//! permissions; "beside" means in the word a moment ago, or still in some CPU's cache, in this word or in one that
//! translates a part of the same range. The data oracle cannot see this: hardware that holds both may do anything, and
//! the model takes one of them.

use crate::machine::descriptor::{Descriptor, Leaf};
use crate::machine::tables::Seen;
use crate::machine::{EntryWrite, World};

/// Checks a store to a table.
pub fn entry(world: &World, write: &EntryWrite) -> Option<String> {
    if write.new.is_invalid() {
        return None;
    }
    if let Some(old) = changed_in_place(write) {
        return Some(format!("{}: {old:?} became {:?} without a break", place(write), write.new));
    }
    if let Some(frame) = other_table(world, write) {
        return Some(format!("{}: a walk cache may still hold the table at frame {frame:#x}", place(write)));
    }
    let mut beside = None;
    world.tables.each_seen(&world.tlb, Some(write.vm), Some(write.span), |seen| {
        if seen.stale && !agrees(write, &seen) {
            beside = Some(seen);
        }
    });
    beside.map(|seen: Seen| {
        format!(
            "{}: {:?} is visible, and a TLB may still hold {:?} for gfn {:#x}",
            place(write),
            write.new,
            seen.leaf,
            seen.span.start()
        )
    })
}

fn place(write: &EntryWrite) -> String {
    format!("level {} entry for gfn {:#x} of VM {}", write.level, write.span.start(), write.vm)
}

fn changed_in_place(write: &EntryWrite) -> Option<Descriptor> {
    let same = match (write.old, write.new) {
        (Descriptor::Invalid | Descriptor::Refused, _) => true,
        (Descriptor::Leaf(old), Descriptor::Leaf(new)) => old.same_output(&new),
        (old, new) => old == new,
    };
    (!same).then_some(write.old)
}

/// A table that walk caches may still follow from this word, and that is not the new value.
fn other_table(world: &World, write: &EntryWrite) -> Option<entresol_addr::Pfn> {
    let table = world.tables.get(write.table);
    let history = table.history(write.index);
    history.iter().enumerate().rev().skip(1).find_map(|(place, past)| match past.descriptor {
        Descriptor::Table(frame) if past.descriptor != write.new => {
            world.tlb.may_hold(None, None, &table.standing(write.index, history, place)).then_some(frame)
        }
        _ => None,
    })
}

fn agrees(write: &EntryWrite, seen: &Seen) -> bool {
    let same = |new: &Leaf| new.same_output(&seen.leaf) && write.span == seen.span;
    match &write.new {
        Descriptor::Leaf(new) => same(new),
        // What stands below was stored, and watched, when it became reachable.
        Descriptor::Table(_) => !(seen.table == write.table && seen.index == write.index),
        Descriptor::Invalid | Descriptor::Refused => true,
    }
}
