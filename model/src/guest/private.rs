//! Leases of guest pages, and what a CPU does with them.

use entresol_addr::Gpa;
use entresol_machine::Machine;

use super::owner::refused;
use super::stage::{Actor, Stage};
use crate::check::{Check, inv10};
use crate::lab;
use crate::litmus::outcome::Value;

/// Leases the page at `gpa`.
pub fn lease(stage: &Stage<'_>, actor: &mut Actor, vm: usize, gpa: Gpa) {
    let lease = stage.vm(vm).lease(&stage.host.epoch.pin(actor.cpu), &actor.hint, gpa);
    refused(lease.is_err());
    actor.leases.extend(lease.ok().map(|lease| (lease, gpa.page_offset())));
}

/// Reads the word that was leased last, by its address.
pub fn use_leased(stage: &Stage<'_>, actor: &Actor) -> Value {
    let Some((lease, offset)) = actor.leases.last() else {
        refused(true);
        return Value::Refused;
    };
    let mut bytes = [0; 8];
    stage.host.machine.read(entresol_addr::Hpa::new(lease.pfn().base().get() + offset), &mut bytes);
    Value::Word(u64::from_le_bytes(bytes))
}

/// Releases what was leased last.
pub fn release(stage: &Stage<'_>, actor: &mut Actor) {
    match actor.leases.pop() {
        Some((lease, _)) => stage.host.pool.release_lease(&stage.host.machine, lease),
        None => refused(true),
    }
}

/// All scripts have ended.
pub fn settled(stage: &Stage<'_>) {
    let pin = stage.host.epoch.pin(0);
    let audit = entresol_backing::audit(&stage.host.supply(0), &stage.host.objects, &pin);
    lab::with(|lab| {
        let wrong = inv10::settled(&lab.world, &audit);
        lab.found(Check::Inv10, wrong);
    });
}
