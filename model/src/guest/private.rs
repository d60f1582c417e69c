//! Leases of guest pages and page-frame caches, and what a CPU does with them.

use entresol_addr::{Gpa, Hpa};
use entresol_machine::Machine;
use entresol_mmu::Kept;

use super::owner::{put, refused};
use super::stage::{Actor, Stage};
use crate::check::{Check, inv07, inv10};
use crate::lab;
use crate::litmus::outcome::Value;
use crate::litmus::step::CacheVerb;

/// Bytes that a cache is for.
const WORD: u64 = 8;

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
    stage.host.machine.read(Hpa::new(lease.pfn().base().get() + offset), &mut bytes);
    Value::Word(u64::from_le_bytes(bytes))
}

/// Releases what was leased last.
pub fn release(stage: &Stage<'_>, actor: &mut Actor) {
    match actor.leases.pop() {
        Some((lease, _)) => stage.host.pool.release_lease(&stage.host.machine, lease),
        None => refused(true),
    }
}

/// What happens to the CPU's page-frame cache in `vm`: each CPU has one, of its own number.
pub fn cached(stage: &Stage<'_>, actor: &mut Actor, vm: usize, what: CacheVerb) -> Value {
    let (memory, cpu) = (stage.vm(vm), actor.cpu);
    let done = match what {
        CacheVerb::Activate { gpa } => {
            actor.cached = Some((vm, gpa));
            memory.activate(cpu, cpu, gpa, WORD).is_ok()
        }
        CacheVerb::Refresh => memory.refresh(cpu, cpu).is_ok(),
        CacheVerb::Deactivate => {
            uncache(stage, actor);
            true
        }
        CacheVerb::Tell { value } => tell(stage, actor, vm, value),
    };
    refused(!done);
    Value::Word(done.into())
}

fn tell(stage: &Stage<'_>, actor: &Actor, vm: usize, value: u64) -> bool {
    let memory = stage.vm(vm);
    let pin = stage.host.epoch.pin(actor.cpu);
    let piece = memory.check(&pin, actor.cpu, WORD);
    let (Some(piece), Some((_, gpa))) = (piece, actor.cached) else { return false };
    put(actor, vm, (gpa, value), || {
        memory.write_piece(&piece, &value.to_le_bytes());
        true
    });
    true
}

/// The CPU's cache is for nothing.
pub fn uncache(stage: &Stage<'_>, actor: &mut Actor) {
    if let Some((vm, _)) = actor.cached.take().filter(|(vm, _)| stage.is_there(*vm)) {
        stage.vm(vm).deactivate(actor.cpu).expect("each CPU has a cache");
    }
}

/// Keeps the frame behind the word at `gpa`, if it can be kept.
pub fn keep(stage: &Stage<'_>, actor: &mut Actor, vm: usize, gpa: Gpa) {
    let memory = stage.vm(vm);
    let pin = stage.host.epoch.pin(actor.cpu);
    let kept = memory.keep();
    let frame = memory.frame_to_keep(&pin, &actor.hint, gpa);
    refused(frame.is_none());
    actor.kept = frame.map(|frame| (vm, kept, Hpa::new(frame.base().get() + gpa.page_offset())));
}

/// Reads the word that is kept, if it still is.
pub fn recall(stage: &Stage<'_>, actor: &Actor) -> Value {
    let pin = stage.host.epoch.pin(actor.cpu);
    let still = |(vm, kept, _): &&(usize, Kept, Hpa)| stage.is_there(*vm) && stage.vm(*vm).is_kept(&pin, kept);
    let Some((_, _, at)) = actor.kept.as_ref().filter(still) else {
        refused(true);
        return Value::Refused;
    };
    let mut bytes = [0; 8];
    stage.host.machine.read(*at, &mut bytes);
    Value::Word(u64::from_le_bytes(bytes))
}

/// All scripts have ended.
pub fn settled(stage: &Stage<'_>) {
    let pin = stage.host.epoch.pin(0);
    let audit = entresol_backing::audit(&stage.host.supply(0), &stage.host.objects, &pin);
    lab::with(|lab| {
        let wrong = inv10::settled(&lab.world, &audit);
        lab.found(Check::Inv10, wrong);
        lab.found(Check::Inv7, inv07::leases(&audit));
    });
}
