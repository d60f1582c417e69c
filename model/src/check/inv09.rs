//! INV-9: a page inside a valid slot is never emulated as MMIO after the update's grace period.
//!
//! Watches each access that the core gives to the owner: if one slot held the address from before the fault until after
//! it, and permits the access, the answer is wrong.

use super::super::guest::record::SlotRecord;

/// An access was given to the owner. `slot` held its address all the time.
pub fn emulated(slot: Option<&SlotRecord>, gpa: u64, write: bool) -> Option<String> {
    let slot = slot.filter(|slot| !(write && slot.refuses_stores()))?;
    Some(format!("{gpa:#x} lies in slot {} of VM {} all the time, and was given to the owner", slot.id, slot.vm))
}
