//! Machines that are forked and ended, before and while others run, and what relatives do not share.
//!
//! A virtual machine and an object that a fork makes are not there before; steps of such a machine are refused until then,
//! and after it was ended.

use std::rc::Rc;

use entresol_addr::GfnRange;
use entresol_backing::{ForkError, Object, ObjectHandle};

use super::owner::refused;
use super::record::SlotRecord;
use super::stage::{Actor, Kind, LabVm, Stage};
use crate::check::Check;
use crate::check::written::Pages;
use crate::lab;
use crate::litmus::outcome::Value;

fn answer(done: bool) -> Value {
    refused(!done);
    if done { Value::Word(0) } else { Value::Refused }
}

/// The object behind the parent's memory: what a fork copies.
fn memory_of(stage: &Stage<'_>, vm: usize) -> Option<usize> {
    lab::with(|lab| {
        let mut objects: Vec<usize> = lab.records.of(vm).map(|slot| slot.object).collect();
        objects.retain(|object| stage.kinds[*object] == Kind::Ram);
        objects.dedup();
        assert!(objects.len() < 2, "a machine that is forked shows one object of memory");
        objects.pop()
    })
}

/// `child`, which is not there, becomes a fork of `vm`, and `object` its memory.
pub fn fork(stage: &Stage<'_>, cpu: usize, vm: usize, child: usize, object: usize) -> Value {
    let Some(from) = memory_of(stage, vm).filter(|_| !stage.is_there(child)) else {
        return answer(false);
    };
    lab::with(|lab| {
        lab.log(None, || format!("owner: VM {vm} is forked"));
        lab.oracle.begin_fork(from, object);
        lab.written.begin_fork(from, object, !stage.blocks[from]);
    });
    // Until the child is among those whose translations are taken away.
    let _apart = stage.swap.as_ref().map(|swap| swap.change());
    let forked = stage.vm(vm).fork(cpu);
    lab::with(|lab| {
        lab.oracle.end_fork(object);
        lab.written.end_fork(object, forked.is_ok());
        lab.log(None, || format!("owner: VM {child} is there: {}", forked.is_ok()));
    });
    lab::settle();
    let Ok(forked) = forked else { return answer(false) };
    adopt(stage, cpu, forked, child, Copied { from, object });
    answer(true)
}

/// What a fork copied, and to what, by the scenario's numbers.
struct Copied {
    from: usize,
    object: usize,
}

/// The lab hears of a new machine and of what it shows.
fn adopt<'h>(stage: &Stage<'h>, cpu: usize, forked: LabVm<'h>, child: usize, copied: Copied) {
    let slots: Vec<_> = {
        let pin = stage.host.epoch.pin(cpu);
        forked.slots().iter(&pin).map(|slot| *slot).collect()
    };
    lab::with(|lab| lab.world.add_root(child, forked.table().geometry().root_level(), forked.table().root()));
    for slot in slots {
        let handle = ObjectHandle::from_raw(slot.object.get());
        let known = (0..stage.kinds.len()).find(|number| stage.object(*number) == Some(handle));
        let object = known.unwrap_or(copied.object);
        if known.is_none() {
            stage.set_object(copied.object, Some(handle));
        }
        let range = GfnRange::new(slot.base, slot.count).expect("the core's slots do not wrap");
        let kind = stage.kinds[if known.is_none() { copied.from } else { object }];
        let record = SlotRecord {
            vm: child,
            id: slot.id.into(),
            range,
            object,
            offset: slot.offset,
            read_only: slot.flags.contains(entresol_slot::SlotFlags::READ_ONLY),
            rom: kind == Kind::Rom,
            device: kind == Kind::Device,
            changing: true,
            since: 0,
        };
        lab::with(|lab| {
            lab.records.begin_create(record);
            lab.records.end(child, slot.id.into(), Some(slot.base), lab.world.now());
        });
    }
    stage.set_vm(child, Some(Rc::new(forked)));
}

/// Ends `vm`, which nobody runs or asks for anything any more, and its memory.
pub fn kill(stage: &Stage<'_>, actor: &mut Actor, vm: usize) -> Value {
    if actor.runs.is_some_and(|(running, _)| running == vm) {
        stage.leave(actor);
    }
    let memory = memory_of(stage, vm);
    let Some(ending) = stage.take_vm(vm) else {
        return answer(false);
    };
    lab::with(|lab| {
        lab.log(None, || format!("owner: VM {vm} is ended"));
        let slots: Vec<u32> = lab.records.of(vm).map(|slot| slot.id).collect();
        for id in slots {
            lab.records.begin_change(vm, id);
            lab.records.end(vm, id, None, lab.world.now());
        }
        lab.logs.retain(|log| log.vm != vm);
        lab.written.forget_vm(vm);
        lab.world.tables.uproot(vm);
    });
    ending.destroy(actor.cpu);
    lab::settle();
    let host = stage.host;
    let gone = memory.filter(|object| {
        let handle = stage.object(*object);
        handle.is_some_and(|handle| host.objects.destroy(&host.supply(actor.cpu), &host.epoch, handle).is_ok())
    });
    if let Some(object) = gone {
        stage.set_object(object, None);
        lab::with(|lab| {
            lab.oracle.forget(object);
            lab.written.forget_object(object);
        });
    }
    answer(true)
}

/// Tables that forks detached are taken apart, and tree nodes that nobody refers to any more give their references back.
pub fn reclaim(stage: &Stage<'_>, cpu: usize) {
    for vm in stage.vms() {
        vm.reclaim(cpu, u64::MAX);
    }
    stage.host.supply(cpu).reclaim(usize::MAX);
}

/// The frames in which `object` differs from `base`, by the core, compared with what was written. The result is how many.
pub fn differ(stage: &Stage<'_>, cpu: usize, object: usize, base: usize) -> Value {
    let owed = lab::with(|lab| lab.written.owed_difference(object, base));
    let unlike = lab::with(|lab| lab.oracle.unlike(object, base));
    let Ok(named) = differences(stage, cpu, object, base) else {
        return answer(false);
    };
    lab::with(|lab| {
        lab.log(None, || format!("owner: objects {object} and {base} differ in {named:?}"));
        // What was punched or written meanwhile may be in either.
        let surely: Pages = lab.oracle.unlike(object, base).intersection(&unlike).copied().collect();
        let wrong = lab.written.differ(object, base, &named, &owed, &surely);
        lab.found(Check::Written, wrong);
    });
    Value::Word(named.len() as u64)
}

fn differences(stage: &Stage<'_>, cpu: usize, object: usize, base: usize) -> Result<Pages, Option<ForkError>> {
    let supply = stage.host.supply(cpu);
    let pin = stage.host.epoch.pin(cpu);
    let get = |number| -> Option<&Object> { stage.host.objects.get(&pin, stage.object(number)?) };
    let (object, base) = get(object).zip(get(base)).ok_or(None)?;
    let parts = object.differences(&supply, base, 0)?;
    Ok(parts.flat_map(|(start, count)| start..start + count).collect())
}

/// All scripts have ended: every two relatives are compared.
pub fn settled(stage: &Stage<'_>) {
    for (object, base) in lab::with(|lab| lab.written.pairs()) {
        differ(stage, 0, object, base);
    }
}
