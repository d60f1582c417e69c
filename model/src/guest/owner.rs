//! What the owner of a virtual machine asks of the core, and what the lab knows about it before and after.

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SIZE, PageSize};
use entresol_machine::model::Modelled;
use entresol_mmu::{Outcome, VmVmid};
use entresol_slot::{ObjectId, SlotFlags, SlotRequest, Update};
use entresol_table::{Permissions, Reserve, Retired, Straddle};

use super::dirty;
use super::record::SlotRecord;
use super::stage::{Actor, Kind, Stage};
use super::{memory, poison, private, relatives, swap};
use crate::check::inv11::Place;
use crate::check::{Check, inv03};
use crate::lab::{self, Hardware};
use crate::litmus::outcome::Value;
use crate::litmus::step::{RangeVerb, SlotVerb, Step};
use crate::machine::descriptor::Descriptor;

/// Runs a step of the owner on the CPU of `actor`.
pub fn run(stage: &Stage<'_>, actor: &mut Actor, step: &Step) {
    let cpu = actor.cpu;
    match step {
        Step::Write { vm, gpa, value } => write(stage, actor, *vm, *gpa, *value),
        Step::Read { vm, gpa, to } => {
            let value = read(stage, actor, *vm, *gpa);
            stage.result(to, value);
        }
        Step::Range { vm, range, what } => ranged(stage, actor, *vm, *range, *what),
        Step::End => end(stage, actor),
        Step::Unshare { vm, gpa } => unshare(stage, cpu, *vm, *gpa),
        Step::Fork { vm, child, object, to } => {
            let value = relatives::fork(stage, cpu, *vm, *child, *object);
            stage.result(to, value);
        }
        Step::Kill { vm, to } => {
            let value = relatives::kill(stage, actor, *vm);
            stage.result(to, value);
        }
        Step::Differ { object, base, to } => {
            let value = relatives::differ(stage, cpu, *object, *base);
            stage.result(to, value);
        }
        Step::Reclaim => relatives::reclaim(stage, cpu),
        Step::Notifier { vm } => stage.vm(*vm).switches.force_notifier(true),
        Step::Merging { vm } => {
            stage.vm(*vm).enable_merging(cpu).expect("a scenario's memory is small, and nothing is invalidated");
        }
        Step::Join { vm, gpa, other, other_gpa } => join(stage, cpu, (*vm, *gpa), (*other, *other_gpa)),
        Step::Object { object, frame, count, punch } => content(stage, cpu, *object, *frame, *count, *punch),
        Step::Slot { vm, id, what } => slot(stage, cpu, *vm, *id, *what),
        Step::Log { vm, id, what, to } => stage.result(to, dirty::log(stage, cpu, *vm, *id, *what)),
        Step::Ring { vm, what, to } => stage.result(to, dirty::ring(stage, cpu, *vm, *what)),
        Step::CleanAll { vm } => stage.vm(*vm).clean_all(cpu),
        Step::Lease { vm, gpa } => private::lease(stage, actor, *vm, *gpa),
        Step::Use { to } => stage.result(to, private::use_leased(stage, actor)),
        Step::Release => private::release(stage, actor),
        Step::Poison { vm, gpa, to } => {
            let value = poison::find(stage, cpu, *vm, *gpa);
            stage.result(to, value);
        }
        Step::Cache { vm, what, to } => {
            let value = private::cached(stage, actor, *vm, *what);
            stage.result(to, value);
        }
        Step::Keep { vm, gpa } => private::keep(stage, actor, *vm, *gpa),
        Step::Recall { to } => stage.result(to, private::recall(stage, actor)),
        Step::Out { vm, range, fails, to } => {
            let value = swap::out(stage, cpu, *vm, *range, *fails);
            stage.result(to, value);
        }
        Step::SwapOff { to } => {
            let value = swap::remove(stage, cpu);
            stage.result(to, value);
        }
        Step::Reap => {
            stage.host.pool.reap(&stage.host.epoch, cpu, usize::MAX);
            if stage.has_private() {
                stage.host.supply(cpu).scrub(usize::MAX);
            }
        }
        Step::Generation { vm, count } => stage.vm(*vm).slots().renumber(&stage.host.epoch, *count, || {}),
        Step::Vmids { count } => {
            let worn: Vec<VmVmid> = (0..*count).map(|_| VmVmid::new()).collect();
            for vm in &worn {
                stage.host.vmids.load(&stage.host.machine, cpu, vm);
                stage.host.vmids.put(cpu);
            }
        }
        Step::Guest { .. }
        | Step::Invlpg { .. }
        | Step::Cr3 { .. }
        | Step::Mmu { .. }
        | Step::Tlbi
        | Step::Post { .. }
        | Step::Drain { .. }
        | Step::Leave => {
            unreachable!("a vCPU's step")
        }
    }
    lab::settle();
}

pub(super) fn refused(refused: bool) {
    if refused {
        lab::with(|lab| lab.mark("refused"));
    }
}

fn place(vm: usize, gpa: Gpa) -> Option<Place> {
    lab::with(|lab| memory::place(lab, vm, gpa))
}

fn write(stage: &Stage<'_>, actor: &Actor, vm: usize, gpa: Gpa, value: u64) {
    put(actor, vm, (gpa, value), || {
        let write = || stage.vm(vm).write(&stage.host.epoch.pin(actor.cpu), &actor.hint, gpa, &value.to_le_bytes());
        swap::present(stage, actor.cpu, vm, write).is_ok()
    });
}

/// Has the owner store a word by `store`, which says whether it did, and tells the oracles.
pub(super) fn put(actor: &Actor, vm: usize, (gpa, value): (Gpa, u64), store: impl FnOnce() -> bool) {
    let page = lab::with(|lab| memory::page(lab, vm, gpa));
    let since = lab::with(|lab| lab.written.begin(actor.cpu, page));
    let begun = place(vm, gpa).map(|place| {
        lab::with(|lab| {
            let mapped = matches!(lab.world.tables.current(vm, gpa.frame()), (Descriptor::Leaf(_), _));
            lab.log(None, || format!("owner writes {value:#x} at {gpa:#x}"));
            lab.oracle.begin(place, value, mapped && !lab.world.config.fwb)
        })
    });
    let done = store();
    refused(!done);
    lab::with(|lab| {
        if let (Some(begun), true) = (begun, done) {
            lab.oracle.end(begun);
        }
        if done {
            let now = lab.world.moment();
            lab.linear.wrote(vm, gpa, value, now);
            lab.written.wrote(&page, Some(since));
        }
        lab.written.end(actor.cpu);
    });
}

fn read(stage: &Stage<'_>, actor: &Actor, vm: usize, gpa: Gpa) -> Value {
    let mut bytes = [0; 8];
    let read = || stage.vm(vm).read(&stage.host.epoch.pin(actor.cpu), &actor.hint, gpa, &mut bytes);
    let result = swap::present(stage, actor.cpu, vm, read);
    refused(result.is_err());
    if result.is_err() {
        return Value::Refused;
    }
    let value = u64::from_le_bytes(bytes);
    if let Some(place) = place(vm, gpa) {
        lab::with(|lab| {
            let wrong = lab.oracle.judge(place, value, false);
            lab.log(None, || format!("owner reads {value:#x} at {gpa:#x}"));
            lab.found(Check::Inv11, wrong);
        });
    }
    Value::Word(value)
}

/// The frames of objects that slots of `vm` show in `range` were unmapped, and cleaned on the way.
fn unmapped(vm: usize, range: GfnRange) {
    lab::with(|lab| {
        let shown: Vec<_> =
            lab.records.of(vm).filter_map(|slot| Some((slot.clone(), slot.range.intersect(range)?))).collect();
        for (slot, part) in shown {
            lab.oracle.cleaned(slot.object, slot.offset + part.start().since(slot.range.start()), part.count());
        }
    });
}

/// After a call that promises it: nothing reaches `range`.
fn expect_unreachable(vm: usize, range: GfnRange) {
    lab::with(|lab| {
        if lab.checks.has(Check::Inv3) {
            let wrong = inv03::unreachable(&lab.world, vm, range);
            lab.found(Check::Inv3, wrong);
        }
    });
}

fn ranged(stage: &Stage<'_>, actor: &mut Actor, vm: usize, range: GfnRange, what: RangeVerb) {
    let (cpu, machine) = (actor.cpu, &stage.host.machine);
    let (memory, vmid) = (stage.vm(vm), stage.vmid(vm));
    let table = memory.table();
    lab::with(|lab| lab.log(None, || format!("owner: {what:?} {:#x}, {} pages", range.start(), range.count())));
    match what {
        RangeVerb::Zap => {
            refused(stage.vm(vm).zap(cpu, range).is_err());
            unmapped(vm, range);
        }
        RangeVerb::Convert { open } => {
            refused(memory.convert(cpu, range, open).is_err());
            unmapped(vm, range);
        }
        RangeVerb::Start => match stage.vm(vm).invalidate_range_start(cpu, range) {
            Ok(invalidation) => {
                expect_unreachable(vm, range);
                unmapped(vm, range);
                lab::with(|lab| lab.protected.push((vm, range)));
                actor.invalidations.push((vm, invalidation));
            }
            Err(_) => refused(true),
        },
        RangeVerb::Split => {
            let _pin = stage.host.epoch.pin(cpu);
            let mut reserve = Reserve::new();
            match stage.host.pool.take(cpu, entresol_backing::Order::PAGE) {
                Ok(frame) => {
                    entresol_machine::Machine::zero(machine, entresol_addr::PfnRange::single(frame));
                    reserve.push(frame).expect("an empty reserve has room");
                    refused(table.split(machine, vmid, range.start(), &mut reserve).is_err());
                }
                Err(_) => refused(true),
            }
            while let Some(frame) = reserve.pop() {
                stage.host.pool.give(cpu, frame, entresol_backing::Order::PAGE);
            }
        }
        RangeVerb::Merge => {
            let _pin = stage.host.epoch.pin(cpu);
            match table.merge(machine, vmid, range.start(), PageSize::Size2M) {
                Ok(retired) => retire(stage, vm, retired),
                Err(_) => refused(true),
            }
        }
        RangeVerb::Age => {
            let _pin = stage.host.epoch.pin(cpu);
            table.age(machine, vmid, range);
        }
        RangeVerb::Protect => {
            let _pin = stage.host.epoch.pin(cpu);
            table.protect(machine, vmid, range, Permissions::WRITE, Straddle::Whole);
        }
    }
}

fn retire(stage: &Stage<'_>, vm: usize, retired: Retired) {
    let machine: &Modelled<Hardware> = &stage.host.machine;
    let defer = |frame| stage.host.pool.defer(frame, entresol_backing::Order::PAGE);
    retired.drain(machine, stage.vm(vm).table().format(), defer);
}

fn unshare(stage: &Stage<'_>, cpu: usize, vm: usize, gpa: Gpa) {
    lab::with(|lab| lab.log(None, || format!("owner breaks the sharing of {gpa:#x}")));
    lab::with(|lab| {
        let page = memory::page(lab, vm, gpa);
        lab.written.begin(cpu, page);
    });
    let outcome = stage.vm(vm).unshare(cpu, gpa);
    lab::with(|lab| lab.written.end(cpu));
    refused(outcome != Outcome::Retry);
    unmapped(vm, GfnRange::single(gpa.frame()));
}

fn join(stage: &Stage<'_>, cpu: usize, page: (usize, Gpa), other: (usize, Gpa)) {
    lab::with(|lab| lab.log(None, || format!("owner merges {:#x} of VM {} with {:#x}", page.1, page.0, other.1)));
    let merged = stage.vm(page.0).merge_pages(cpu, page.1, &stage.vm(other.0), other.1);
    refused(merged.is_err());
    if merged.is_ok() {
        lab::with(|lab| lab.mark("merged"));
    }
}

fn end(stage: &Stage<'_>, actor: &mut Actor) {
    let Some((vm, invalidation)) = actor.invalidations.pop() else {
        refused(true);
        return;
    };
    let range = invalidation.range();
    lab::with(|lab| {
        let place = lab.protected.iter().position(|one| *one == (vm, range));
        if let Some(place) = place {
            lab.protected.remove(place);
        }
        lab.log(None, || format!("owner: the invalidation of {:#x} ends", range.start()));
    });
    stage.vm(vm).invalidate_range_end(invalidation);
}

fn content(stage: &Stage<'_>, cpu: usize, object: usize, frame: u64, count: u64, punch: bool) {
    let pin = stage.host.epoch.pin(cpu);
    let Some(found) = stage.object(object).and_then(|handle| stage.host.objects.get(&pin, handle)) else {
        refused(true);
        return;
    };
    let supply = stage.host.supply(cpu);
    let frames = frame..frame.saturating_add(count).min(found.frames());
    lab::with(|lab| {
        for frame in frames {
            if punch { lab.written.punched(object, frame) } else { lab.written.changed(object, frame) }
        }
    });
    if !punch {
        refused(found.populate(&supply, frame, count).is_err());
        return;
    }
    let begun = lab::with(|lab| {
        lab.log(None, || format!("owner punches {count} frames of object {object} from {frame}"));
        lab.oracle.begin_zero(object, frame, count)
    });
    let result = found.punch(&supply, frame, count);
    refused(result.is_err());
    if result.is_ok() {
        lab::with(|lab| begun.into_iter().for_each(|begun| lab.oracle.end(begun)));
    }
}

fn slot(stage: &Stage<'_>, cpu: usize, vm: usize, id: u32, what: SlotVerb) {
    let old = lab::with(|lab| {
        lab.log(None, || format!("owner: slot {id} of VM {vm}: {what:?}"));
        lab.records.get(vm, id).cloned()
    });
    match (what, old) {
        (SlotVerb::Create { range, object, offset, read_only }, None) => {
            let record = SlotRecord {
                vm,
                id,
                range,
                object,
                offset,
                read_only,
                rom: stage.kinds[object] == Kind::Rom,
                device: stage.kinds[object] == Kind::Device,
                changing: true,
                since: 0,
            };
            lab::with(|lab| lab.records.begin_create(record.clone()));
            let created = set(stage, cpu, &record, range.start(), false, true);
            let at = created.then_some(range.start());
            lab::with(|lab| lab.records.end(vm, id, at, lab.world.now()));
        }
        (SlotVerb::Delete, Some(old)) => {
            lab::with(|lab| {
                lab.written.forget_slot(vm, id);
                lab.records.begin_change(vm, id);
            });
            let deleted = set(stage, cpu, &old, old.range.start(), false, false);
            if deleted {
                expect_unreachable(vm, old.range);
                unmapped(vm, old.range);
            }
            let at = (!deleted).then_some(old.range.start());
            lab::with(|lab| lab.records.end(vm, id, at, lab.world.now()));
        }
        (SlotVerb::Move { base }, Some(old)) => relocate(stage, cpu, &old, base),
        (SlotVerb::Flags { log }, Some(old)) => {
            lab::with(|lab| lab.flags_update[cpu] = Some(old.range));
            dirty::before_flags(vm, id, old.range);
            let logs = set(stage, cpu, &old, old.range.start(), log, true) && log;
            dirty::after_flags(stage, cpu, vm, id, old.range, logs);
            lab::with(|lab| lab.flags_update[cpu] = None);
        }
        (SlotVerb::Revert, Some(old)) => {
            lab::with(|lab| lab.records.begin_change(vm, id));
            revert(stage, &old);
            lab::with(|lab| lab.records.end(vm, id, Some(old.range.start()), lab.world.now()));
        }
        (SlotVerb::Create { .. }, Some(_)) | (_, None) => refused(true),
    }
}

fn relocate(stage: &Stage<'_>, cpu: usize, old: &SlotRecord, base: Gfn) {
    let (vm, id) = (old.vm, old.id);
    let range = GfnRange::new(base, old.range.count());
    let Some(range) = range else { return refused(true) };
    lab::with(|lab| {
        lab.written.forget_slot(vm, id);
        lab.records.begin_change(vm, id);
        lab.records.begin_create(SlotRecord { range, ..old.clone() });
    });
    let moved = set(stage, cpu, old, base, false, true);
    if moved && !range.overlaps(old.range) {
        expect_unreachable(vm, old.range);
    }
    let at = if moved { base } else { old.range.start() };
    lab::with(|lab| lab.records.end(vm, id, Some(at), lab.world.now()));
}

fn request(stage: &Stage<'_>, record: &SlotRecord, base: Gfn, log: bool, keep: bool) -> SlotRequest {
    let mut flags = SlotFlags::empty();
    flags.set(SlotFlags::READ_ONLY, record.read_only);
    flags.set(SlotFlags::LOG_DIRTY, log);
    SlotRequest {
        id: record.id,
        base: base.base(),
        size: if keep { record.range.count() * PAGE_SIZE } else { 0 },
        object: ObjectId::new(stage.object(record.object).expect("a slot's object is there").raw()),
        offset: record.offset * PAGE_SIZE,
        flags: flags.bits(),
    }
}

/// `set_slot`; returns whether it was accepted.
fn set(stage: &Stage<'_>, cpu: usize, record: &SlotRecord, base: Gfn, log: bool, keep: bool) -> bool {
    let result = stage.vm(record.vm).set_slot(cpu, &request(stage, record, base, log, keep));
    refused(result.is_err());
    result.is_ok()
}

/// Begins to delete the slot, and gives up after it was withdrawn: what a failed preparation does.
fn revert(stage: &Stage<'_>, record: &SlotRecord) {
    let request = request(stage, record, record.range.start(), false, false);
    match stage.vm(record.vm).slots().update(&stage.host.epoch, &request, None) {
        Ok(Update::Withdraw(withdraw)) => withdraw.invalidate().revert(),
        Ok(Update::Unchanged | Update::Publish(_)) | Err(_) => refused(true),
    }
}
