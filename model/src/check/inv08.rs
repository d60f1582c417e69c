//! INV-8: an MMIO entry hit ⇒ its generation is current and no slot update is in progress.
//!
//! Watches each access that the core gives to the owner on the word of an MMIO entry or of a vCPU's cache, without a look at the
//! slots. The slots' generation is read before the core is asked and after it: if both say that the same update is in
//! progress, it was so all the time; a hit then is wrong whatever the slots hold.

use entresol_slot::Generation;

/// The core answered without a look at the slots. `before` and `after`: the generation when it was asked and when it had answered.
pub fn hit(before: Generation, after: Generation, gpa: u64) -> Option<String> {
    let updating = before == after && before.in_progress();
    updating.then(|| format!("{gpa:#x} was given to the owner by an MMIO entry while slots were being updated"))
}
