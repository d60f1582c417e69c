//! What an owner asks of dirty logs and rings, and what the lab knows about them.

use entresol_addr::GfnRange;
use entresol_mmu::Ring;

use super::owner::refused;
use super::stage::Stage;
use crate::check::Check;
use crate::check::inv04::Log;
use crate::check::written::Pages;
use crate::lab;
use crate::litmus::outcome::Value;
use crate::litmus::step::{LogVerb, RingVerb};
use crate::machine::config::MAX_CPUS;

/// Entries of a ring: the fewest that there can be.
const ENTRIES: u32 = 128;

/// The most words of a log: as many as the largest object has.
const WORDS: usize = 64;

fn answer<E>(result: Result<u64, E>) -> Value {
    refused(result.is_err());
    result.map_or(Value::Refused, Value::Word)
}

/// Pages whose bits are set.
fn pages(words: &[u64]) -> Pages {
    let bits = words
        .iter()
        .zip((0..).step_by(64))
        .flat_map(|(word, first)| (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| first + bit));
    bits.collect()
}

/// A step about the log of a slot.
pub fn log(stage: &Stage<'_>, cpu: usize, vm: usize, id: u16, what: LogVerb) -> Value {
    let asked = lab::with(|lab| {
        lab.log(None, || format!("owner: log of slot {id} of VM {vm}: {what:?}"));
        lab.written.ask()
    });
    let memory = stage.vm(vm);
    let mut words = [0; WORDS];
    let result = match what {
        LogVerb::Get => memory.get_dirty_log(cpu, id, &mut words),
        LogVerb::Read => memory.read_dirty_log(cpu, id, &mut words),
        LogVerb::Clear { mask } => {
            words[0] = mask;
            let pages = memory.slots().get(&stage.host.epoch.pin(cpu), id).map_or(64, |slot| slot.count.min(64));
            memory.clear_dirty_log(cpu, id, 0, pages, &[mask])
        }
    };
    if result.is_ok() {
        let named = pages(&words);
        lab::with(|lab| {
            let wrong = match what {
                LogVerb::Clear { .. } => {
                    lab.written.cleared(vm, id.into(), &named);
                    None
                }
                _ => lab.written.logged(vm, id.into(), asked, &named, what == LogVerb::Get),
            };
            lab.found(Check::Written, wrong);
        });
    }
    answer(result)
}

/// A step about rings.
pub fn ring(stage: &Stage<'_>, cpu: usize, vm: usize, what: RingVerb) -> Value {
    lab::with(|lab| lab.log(None, || format!("owner: rings of VM {vm}: {what:?}")));
    let memory = stage.vm(vm);
    let ring = |vcpu| memory.dirty_ring(vcpu).ok_or(());
    match what {
        RingVerb::Make => {
            let made = memory.enable_dirty_rings(MAX_CPUS as u32, ENTRIES);
            if made.is_ok() {
                lab::with(|lab| lab.written.ringed(vm));
            }
            answer(made.map(|()| 0))
        }
        RingVerb::Harvest { vcpu } => answer(ring(vcpu).map(|ring| harvest(vm, ring))),
        RingVerb::Forge { vcpu, slot, offset } => answer(ring(vcpu).map(|ring| {
            lab::with(|lab| lab.written.spoiled(vm));
            ring.entries()[0].overwrite(slot, offset);
            0
        })),
        RingVerb::Reset => {
            lab::with(|lab| lab.resetting[cpu] = true);
            let freed = memory.reset_dirty_rings(cpu);
            lab::with(|lab| {
                lab.resetting[cpu] = false;
                lab.written.reset(vm);
            });
            Value::Word(freed)
        }
    }
}

/// Harvests a ring of `vm`. Returns how many entries it had.
fn harvest(vm: usize, ring: &Ring) -> u64 {
    let named = |slot, offset| {
        lab::with(|lab| {
            let wrong = lab.written.harvested(vm, slot, offset);
            lab.found(Check::Written, wrong);
        });
    };
    u64::from(ring.harvest(named))
}

/// The flags of slot `id` at `range` are about to change: its log promises nothing any more.
pub fn before_flags(vm: usize, id: u32, range: GfnRange) {
    lab::with(|lab| {
        lab.logs.retain(|log| (log.vm, log.range) != (vm, range));
        lab.written.before_log(vm, id, range);
    });
}

/// They have changed; the slot logs now if `logs`.
pub fn after_flags(stage: &Stage<'_>, cpu: usize, vm: usize, id: u32, range: GfnRange, logs: bool) {
    let root = stage.vm(vm).log_root(&stage.host.epoch.pin(cpu), id as u16).filter(|_| logs);
    lab::with(|lab| {
        lab.written.after_log(vm, id, root.is_some());
        if let Some(frame) = root {
            lab.logs.push(Log { vm, range, frame });
        }
    });
}

/// All scripts have ended: what is left in logs and rings is compared with what was written.
pub fn settled(stage: &Stage<'_>) {
    for (vm, id) in lab::with(|lab| lab.written.slots()) {
        let memory = stage.vm(vm);
        for ring in (0..MAX_CPUS as u32).filter_map(|vcpu| memory.dirty_ring(vcpu)) {
            harvest(vm, ring);
        }
        let mut words = [0; WORDS];
        // The lab forgets a log when its slot changes, and a machine's when that ends.
        memory.read_dirty_log(0, id as u16, &mut words).expect("the log of a slot that logs");
        lab::with(|lab| {
            let wrong = lab.written.settled(vm, id, &pages(&words));
            lab.found(Check::Written, wrong);
        });
    }
}
