//! INV-9: a page inside a valid slot is never emulated as MMIO after the update's grace period.
//!
//! Watches each access that the core gives to the owner: if one slot held the address from before the fault until after
//! it, and permits the access, the answer is wrong. Maintenance and walks of stage-1 tables are no device's business
//! wherever they go ("cache-ops"), so they are never given away.

use crate::guest::operation::Operation;
use crate::guest::record::SlotRecord;

/// An access was given to the owner. `slot` held its address all the time.
pub fn emulated(slot: Option<&SlotRecord>, gpa: u64, what: Operation) -> Option<String> {
    if what.line().is_some() || what.is_walk() {
        return Some(format!("{} at {gpa:#x} was given to the owner, who has no answer", what.name()));
    }
    let slot = slot.filter(|slot| !(what.stores() && slot.refuses_stores()))?;
    Some(format!("{gpa:#x} lies in slot {} of VM {} all the time, and was given to the owner", slot.id, slot.vm))
}
