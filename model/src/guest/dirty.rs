//! What an owner asks of dirty logs and rings, and what the lab knows about them.

use entresol_addr::GfnRange;

use super::owner::refused;
use super::stage::Stage;
use crate::check::inv04::Log;
use crate::lab;
use crate::litmus::outcome::Value;
use crate::litmus::step::{LogVerb, RingVerb};
use crate::machine::config::MAX_CPUS;

/// Entries of a ring: the fewest that there can be.
const ENTRIES: u32 = 128;

fn answer<E>(result: Result<u64, E>) -> Value {
    refused(result.is_err());
    result.map_or(Value::Refused, Value::Word)
}

/// A step about the log of a slot.
pub fn log(stage: &Stage<'_>, cpu: usize, vm: usize, id: u16, what: LogVerb) -> Value {
    lab::with(|lab| lab.log(None, || format!("owner: log of slot {id} of VM {vm}: {what:?}")));
    let memory = &stage.vms[vm];
    // As many words as the largest object has.
    let mut words = [0; 64];
    answer(match what {
        LogVerb::Get => memory.get_dirty_log(cpu, id, &mut words),
        LogVerb::Read => memory.read_dirty_log(cpu, id, &mut words),
        LogVerb::Clear { mask } => {
            let pages = memory.slots().get(&stage.host.epoch.pin(cpu), id).map_or(64, |slot| slot.count.min(64));
            memory.clear_dirty_log(cpu, id, 0, pages, &[mask])
        }
    })
}

/// A step about rings.
pub fn ring(stage: &Stage<'_>, cpu: usize, vm: usize, what: RingVerb) -> Value {
    lab::with(|lab| lab.log(None, || format!("owner: rings of VM {vm}: {what:?}")));
    let memory = &stage.vms[vm];
    let ring = |vcpu| memory.dirty_ring(vcpu).ok_or(());
    match what {
        RingVerb::Make => answer(memory.enable_dirty_rings(MAX_CPUS as u32, ENTRIES).map(|()| 0)),
        RingVerb::Harvest { vcpu } => answer(ring(vcpu).map(|ring| u64::from(ring.harvest(|_, _| {})))),
        RingVerb::Forge { vcpu, slot, offset } => answer(ring(vcpu).map(|ring| {
            ring.entries()[0].overwrite(slot, offset);
            0
        })),
        RingVerb::Reset => {
            lab::with(|lab| lab.resetting[cpu] = true);
            let freed = memory.reset_dirty_rings(cpu);
            lab::with(|lab| lab.resetting[cpu] = false);
            Value::Word(freed)
        }
    }
}

/// The flags of a slot at `range` are about to change: its log promises nothing any more.
pub fn before_flags(vm: usize, range: GfnRange) {
    lab::with(|lab| lab.logs.retain(|log| (log.vm, log.range) != (vm, range)));
}

/// They have changed; the slot logs now if `logs`.
pub fn after_flags(stage: &Stage<'_>, cpu: usize, vm: usize, id: u32, range: GfnRange, logs: bool) {
    let root = stage.vms[vm].log_root(&stage.host.epoch.pin(cpu), id as u16).filter(|_| logs);
    if let Some(frame) = root {
        lab::with(|lab| lab.logs.push(Log { vm, range, frame }));
    }
}
