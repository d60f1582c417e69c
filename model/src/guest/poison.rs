//! Frames that are found to be bad.
//!
//! What the lab is told of a bad frame that is sealed is what it is told of one that is free: from then on no entry leads to it, no TLB
//! reaches it, and nobody uses it (INV-7). It never comes back, so at the end it is missing among the free ones.

use std::collections::BTreeSet;

use entresol_addr::{Gpa, Pfn};

use super::owner::refused;
use super::stage::{LabHost, Stage};
use crate::lab;
use crate::litmus::outcome::Value;

/// The frame behind the page at `gpa` is bad: as an owner does it, for every virtual machine that there is.
pub fn find(stage: &Stage<'_>, cpu: usize, vm: usize, gpa: Gpa) -> Value {
    lab::with(|lab| lab.log(None, || format!("owner: the frame behind {gpa:#x} of VM {vm} is bad")));
    let marked = stage.vm(vm).poison(cpu, gpa);
    refused(marked.is_err());
    let Ok(poisoned) = marked else { return Value::Word(0) };
    stage.poisoned.borrow_mut().push(poisoned.pfn());
    for vm in stage.vms() {
        vm.withdraw(cpu, &poisoned);
    }
    poisoned.finish(stage.host);
    lab::with(|lab| lab.mark("poisoned"));
    Value::Word(1)
}

/// Bad frames that are not private, and not among `reached`.
pub fn quarantined(stage: &Stage<'_>, reached: &BTreeSet<u64>) -> u64 {
    let poisoned = stage.poisoned.borrow();
    let lost = poisoned.iter().filter(|pfn| !stage.host.pool.is_private(**pfn) && !reached.contains(&pfn.get()));
    lost.count() as u64
}

/// Nobody has any frame: private ones that a bad one keeps, and bad ones that are not private.
pub fn left(host: &LabHost, poisoned: &[Pfn]) -> (u64, u64) {
    let private = poisoned.iter().filter(|pfn| host.pool.is_private(**pfn)).count();
    let kept = if private == 0 { 0 } else { host.pool.private_frames() };
    (kept, (poisoned.len() - private) as u64)
}
