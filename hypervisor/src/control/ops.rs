//! What each request does.
//!
//! Protocol: host's work, on the boot CPU. A request that is refused has changed nothing. `kill` and `shutdown` only end
//! virtual machines; they are done when the registry has taken them apart ([`Outcome::WhenSettled`]).
//!
//! Invariants: no share of a virtual machine outlives its request: the registry waits for the last one.

use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::arch::cpu;
use entresol_addr::{PAGE_SIZE, PageSize};
use entresol_backing::{Kind, ObjectHandle};
use entresol_mmu::CoalescedRing;
use entresol_slot::{Slot, SlotFlags};
use entresol_sync::atomic::Ordering;
use entresol_wire::Refusal;
use entresol_wire::config::{MAX_DOORBELLS, MAX_VMS, check_name};
use entresol_wire::control::{
    self, Answer, Code, Entries, Error, Faults, Hello, Hex, Op, POSTED_WRITES, Posted, PostedWrite, Rings,
    SLOTS_PER_ANSWER, SlotPage, SlotRow, Stats, Tlb, VmRow,
};

use super::later::Later;
use super::private;
use super::session::Attached;
use super::{ATTACHED, NOBODY, ROOM, describe, dirty};
use super::{poison, stored, tags};
use crate::registry::{self, ForkRefusal, Row};
use crate::vm::{Alias, ForkError, Pause, Status, Stop, Vm};
use crate::{console, host, merge, sched, swap};

/// How a request ends that is not refused.
pub enum Outcome {
    /// With an answer.
    Done(Answer<'static>),
    /// With [`Answer::Done`], when what has ended is taken apart.
    WhenSettled,
    /// With what a task says in the end.
    Later(Later),
}

impl From<Answer<'static>> for Outcome {
    fn from(answer: Answer<'static>) -> Self {
        Self::Done(answer)
    }
}

const NO_SWAP: &str = "the machine has no disk entresol-swap, or does not use it";
const SWAP_LEAVES: &str = "the disk entresol-swap is being removed";

/// Carries `op` out.
///
/// # Errors
///
/// What the client is told; nothing was changed.
pub fn carry_out(op: &Op<'_>, attached: &mut Option<Attached>) -> Result<Outcome, Error> {
    Ok(match op {
        Op::Hello => {
            detach(attached);
            Answer::Hello(Hello::this()).into()
        }
        Op::Ps => Answer::Ps(ps()?).into(),
        Op::Stats { vm } => Answer::Stats(Box::new(stats(&*alive(vm)?))).into(),
        Op::Slots { vm, from } => Answer::Slots(slots(&*alive(vm)?, *from)?).into(),
        Op::SetSlot { vm, slot } => set_slot(vm, slot)?.into(),
        Op::Posted { vm } => Answer::Posted(posted(&*alive(vm)?)?).into(),
        Op::Balloon { vm, size } => balloon(vm, *size)?.into(),
        Op::Audit => Answer::Audit(private::audit()).into(),
        Op::Probe { vm, address } => Answer::Probe(private::probe(&*alive(vm)?, *address)?).into(),
        Op::Poison { vm, gpa } => Answer::Poisoned(poison::find(&*alive(vm)?, *gpa)?).into(),
        Op::Reclaim { vm, size } => Outcome::Later(reclaim(vm, *size)?),
        Op::SwapOff => Outcome::Later(swap_off()?),
        Op::SwapOn => Answer::Count(swap::add().map_err(|what| Error::new(Code::StoreFailed, what))?).into(),
        Op::ReadTags { vm, gpa, size } => Outcome::Later(tags::read(alive(vm)?, *gpa, *size)?),
        Op::WriteTags { vm, gpa, tags: told } => Outcome::Later(tags::write(alive(vm)?, *gpa, &told.0)?),
        Op::Pause { vm } => pause(vm)?.into(),
        Op::Resume { vm } => resume(vm, attached)?.into(),
        Op::Kill { vm } => {
            alive(vm)?.stop(Stop::Killed);
            Outcome::WhenSettled
        }
        Op::Fork { vm, name, count } => fork(vm, name, *count)?.into(),
        Op::Dirty { vm, what } => dirty::carry_out(&alive(vm)?, vm, what, attached)?.into(),
        Op::Young { vm, base, size } => dirty::young(&*alive(vm)?, *base, *size)?.into(),
        Op::Merge { rounds } => merge(*rounds)?.into(),
        Op::Console { vm } => attach(vm, attached)?.into(),
        Op::Detach => {
            detach(attached);
            Answer::Done.into()
        }
        Op::Input { vm, data } => Answer::Accepted(input(vm, &data.0, attached)?).into(),
        Op::Files => Answer::Files(stored::files()?).into(),
        Op::Snapshot { vm, file, base } => Outcome::Later(stored::snapshot(vm, file, base.as_deref())?),
        Op::Restore { file, name } => Outcome::Later(stored::restore(file, name.as_deref())?),
        Op::RemoveFile { file } => Outcome::Later(stored::remove(file)?),
        Op::Shutdown => {
            every_row().filter_map(|row| row.vm).for_each(|vm| vm.stop(Stop::Killed));
            Outcome::WhenSettled
        }
    })
}

fn every_row() -> impl Iterator<Item = Row> {
    (0..).map_while(registry::row)
}

fn row(name: &str) -> Result<(usize, Row), Error> {
    let number = registry::number_of(name).ok_or_else(|| Error::no_such_vm(name))?;
    let row = registry::row(number).ok_or_else(|| Error::no_such_vm(name))?;
    Ok((number, row))
}

/// The virtual machine called `name`, which has not ended for good.
fn alive(name: &str) -> Result<Arc<Vm>, Error> {
    let (_, row) = row(name)?;
    match (row.vm, row.status) {
        (Some(vm), Status::Running | Status::Paused(_) | Status::Stopped(Stop::Reset)) => Ok(vm),
        (_, status) => Err(wrong_state(name, "must not have ended", status)),
    }
}

fn wrong_state(name: &str, rule: &str, status: Status) -> Error {
    let (state, _) = describe(status);
    Error::refused(Code::WrongState, Refusal::text("vm", name, alloc::format!("{rule}; it is {state}")))
}

pub fn no_memory() -> Error {
    Error::new(Code::OutOfMemory, "the hypervisor's heap has no room for the answer")
}

fn ps() -> Result<Vec<VmRow<'static>>, Error> {
    let mut rows = Vec::new();
    rows.try_reserve_exact(every_row().count()).map_err(|_| no_memory())?;
    rows.extend(every_row().map(|row| {
        let (state, reason) = describe(row.status);
        VmRow {
            name: Cow::Owned(row.config.name),
            state,
            reason: reason.map(|reason| Cow::Owned(reason.as_str().into())),
            vcpus: row.config.vcpus,
            memory: row.config.memory,
            resident: row.vm.map_or(0, |vm| vm.resident_frames() * PAGE_SIZE),
        }
    }));
    Ok(rows)
}

fn stats(vm: &Vm) -> Stats<'static> {
    let (host, counted, census) = (host::get(), &vm.memory.stats, vm.memory.census());
    Stats {
        faults: Faults {
            translation: counted.translation.get(),
            permission: counted.permission.get(),
            access_flag: counted.access_flag.get(),
            absent: counted.absent.get(),
            poisoned: counted.poisoned.get(),
            fresh: counted.fresh.get(),
            populated: counted.populated.get(),
            retry: counted.retry.get(),
            spurious: counted.spurious.get(),
            outside: counted.outside.get(),
            injected: counted.injected.get(),
        },
        entries: Entries {
            size_4k: census.of(PageSize::Size4K),
            size_2m: census.of(PageSize::Size2M),
            size_1g: census.of(PageSize::Size1G),
        },
        table_pages: census.tables,
        // Everything is invalidated when the VMIDs are used up, for all virtual machines at once.
        tlb: Tlb {
            ipa: counted.tlb_ipa.get(),
            range: counted.tlb_range.get(),
            vmid: counted.tlb_vmid.get(),
            all: host.vmids.rollovers(),
        },
        exits: vm.counters.iter().map(|(reason, count)| (Cow::Borrowed(reason), count)).collect(),
        resident_frames: vm.resident_frames(),
        stored_frames: vm.stored_frames(),
        free_frames: host.pool.free_frames(),
        poisoned_frames: host.pool.poisoned_frames(),
        unclaimed_mmio: vm.unclaimed.get(),
        balloon: vm.balloon(),
        merge: control::Merge {
            scanned: counted.merge_scanned.get(),
            offered: counted.merge_offered.get(),
            joined: counted.merge_joined.get(),
            vacated: counted.merge_vacated.get(),
            broken: counted.merge_broken.get(),
            differed: counted.merge_differed.get(),
            copied: counted.copied.get(),
        },
    }
}

fn slots(vm: &Vm, from: u32) -> Result<SlotPage<'static>, Error> {
    let slots = vm.memory.slots();
    let mut found: Vec<(Slot, &'static str)> = Vec::new();
    // Room for all before the grace period is pinned: there is nothing to wait for then.
    found.try_reserve_exact(slots.capacity() as usize).map_err(|_| no_memory())?;
    {
        let host = host::get();
        let pin = host.epoch.pin(cpu::index());
        let kind = |slot: &Slot| {
            let object = host.objects.get(&pin, ObjectHandle::from_raw(slot.object.get()));
            object.map_or("gone", |object| kind_name(object.kind()))
        };
        found.extend(slots.iter(&pin).filter(|slot| u32::from(slot.id) >= from).map(|slot| (*slot, kind(&slot))));
    }
    found.sort_unstable_by_key(|(slot, _)| slot.id);
    let next = found.get(SLOTS_PER_ANSWER).map(|(slot, _)| slot.id.into());
    let mut rows = Vec::new();
    rows.try_reserve_exact(found.len().min(SLOTS_PER_ANSWER)).map_err(|_| no_memory())?;
    rows.extend(found.iter().take(SLOTS_PER_ANSWER).map(|(slot, kind)| slot_row(slot, kind)));
    Ok(SlotPage { rows, next })
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Anonymous(_) => "anonymous",
        Kind::Device => "device",
        Kind::Rom { .. } => "rom",
    }
}

fn slot_row(slot: &Slot, kind: &'static str) -> SlotRow<'static> {
    let named = [(SlotFlags::READ_ONLY, "read-only"), (SlotFlags::LOG_DIRTY, "dirty-log")];
    let set = named.iter().filter(|(flag, _)| slot.flags.contains(*flag));
    SlotRow {
        id: slot.id.into(),
        base: slot.base.base().get(),
        size: slot.count * PAGE_SIZE,
        object: slot.object.get().into(),
        kind: Cow::Borrowed(kind),
        flags: set.map(|(_, name)| Cow::Borrowed(*name)).collect(),
    }
}

/// Answered when the update is complete: it waits for grace periods, and none is pinned here.
fn set_slot(name: &str, slot: &control::Alias) -> Result<Answer<'static>, Error> {
    let vm = alive(name)?;
    let flags = if slot.read_only { SlotFlags::READ_ONLY } else { SlotFlags::empty() };
    let alias =
        Alias { number: slot.number, flags: flags.bits(), base: slot.base, size: slot.size, offset: slot.offset };
    vm.set_alias(&alias).map_err(|error| Error::new(Code::SlotRefused, alloc::format!("{error}")))?;
    Ok(Answer::Done)
}

const _: () = assert!(POSTED_WRITES == CoalescedRing::ROOM, "one answer empties the ring");

/// Takes what was posted: room for it first, so that nothing that is taken is lost.
fn posted(vm: &Vm) -> Result<Posted, Error> {
    let (mut writes, mut doorbells) = (Vec::new(), Vec::new());
    writes.try_reserve_exact(POSTED_WRITES).map_err(|_| no_memory())?;
    doorbells.try_reserve_exact(MAX_DOORBELLS).map_err(|_| no_memory())?;
    let taken = core::iter::from_fn(|| vm.posted.take()).take(POSTED_WRITES);
    writes.extend(taken.map(|write| PostedWrite {
        address: write.gpa().get(),
        size: write.data().len() as u32,
        value: Hex(write.data().iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))),
    }));
    doorbells.extend(vm.posted.take_rings().map(|(address, rings)| Rings { address, rings }));
    Ok(Posted { writes, doorbells })
}

/// Answered when the guest is told; what it does about it, its statistics say.
fn balloon(name: &str, size: u64) -> Result<Answer<'static>, Error> {
    let set = alive(name)?.set_balloon(size);
    set.map(|()| Answer::Done).map_err(|refusal| Error::refused(Code::BadField, refusal))
}

/// Answered when no more leaves.
fn reclaim(name: &str, size: u64) -> Result<Later, Error> {
    let vm = alive(name)?;
    let (number, _) = row(name)?;
    swap::reclaim(number, &vm, size).map_err(|refusal| match refusal {
        swap::Refusal::NoDisk => Error::new(Code::StoreFailed, NO_SWAP),
        swap::Refusal::Removing => Error::new(Code::StoreFailed, SWAP_LEAVES),
        swap::Refusal::Size => {
            let size = alloc::format!("{size}");
            Error::refused(Code::BadField, Refusal::text("size", &size, "must be whole pages, and at least one"))
        }
    })
}

/// Answered when the disk is not used any more.
fn swap_off() -> Result<Later, Error> {
    swap::remove().map_err(|stays| match stays {
        swap::Stays::NoDisk => Error::new(Code::StoreFailed, NO_SWAP),
        swap::Stays::Removing => Error::new(Code::StoreFailed, SWAP_LEAVES),
        swap::Stays::Limit(refusal) => Error::refused(Code::WrongState, refusal),
    })
}

/// Answered when no vCPU runs any more.
fn pause(name: &str) -> Result<Answer<'static>, Error> {
    let vm = alive(name)?;
    if !vm.pause(Pause::Owner) {
        return Err(wrong_state(name, "must be running", vm.status()));
    }
    sched::wait_until_off(&vm);
    Ok(Answer::Done)
}

fn resume(name: &str, attached: &mut Option<Attached>) -> Result<Answer<'static>, Error> {
    let vm = alive(name)?;
    if !vm.resume() {
        return Err(wrong_state(name, "must be paused", vm.status()));
    }
    // It may pause for the same reason before anybody looks.
    if let Some(attached) = attached.as_mut().filter(|attached| attached.name == name) {
        attached.resumed = true;
    }
    Ok(Answer::Done)
}

/// Makes `name`, or with a count `name`-1 to `name`-count, copies of `parent`.
fn fork(parent: &str, name: &str, count: Option<u32>) -> Result<Answer<'static>, Error> {
    let number = registry::number_of(parent).ok_or_else(|| Error::no_such_vm(parent))?;
    let names = fork_names(name, count)?;
    registry::fork(number, &names).map_err(|refusal| fork_refused(parent, refusal))?;
    Ok(Answer::Done)
}

/// Why there is no machine of that name, or no copy of `parent`.
pub fn fork_refused(parent: &str, refusal: ForkRefusal) -> Error {
    match refusal {
        ForkRefusal::Status(status) => wrong_state(parent, "must not have ended", status),
        ForkRefusal::Taken(name) => {
            let rule = "must differ from every other VM's name, but for a fork that has ended and is not attached";
            Error::refused(Code::BadField, Refusal::text("name", &name, rule))
        }
        ForkRefusal::Full => {
            let rule =
                alloc::format!("must leave at most {MAX_VMS} virtual machines, forks that have ended not counted");
            Error::refused(Code::BadField, Refusal::text("name", parent, rule))
        }
        ForkRefusal::Failed(ForkError::Unshareable { field }) => {
            let rule = alloc::format!("must have no {field} in its configuration");
            Error::refused(Code::WrongState, Refusal::text("vm", parent, rule))
        }
        ForkRefusal::Failed(error) => Error::new(Code::OutOfMemory, alloc::format!("fork: {error}")),
    }
}

/// How far merging is; with `rounds`, so many more begin at once.
fn merge(rounds: Option<u32>) -> Result<Answer<'static>, Error> {
    if let Some(rounds) = rounds {
        if !(1..=merge::MOST_ROUNDS).contains(&rounds) {
            let rule = alloc::format!("must be from 1 to {}", merge::MOST_ROUNDS);
            return Err(Error::refused(Code::BadField, Refusal::new("rounds", rounds, rule)));
        }
        merge::request(rounds);
    }
    Ok(Answer::Merge(merge::status()))
}

fn fork_names(name: &str, count: Option<u32>) -> Result<Vec<String>, Error> {
    let bad = |refusal| Error::refused(Code::BadField, refusal);
    let mut names = Vec::new();
    let Some(count) = count else {
        check_name("name", name).map_err(bad)?;
        names.try_reserve_exact(1).map_err(|_| no_memory())?;
        names.push(name.into());
        return Ok(names);
    };
    if !(1..=MAX_VMS as u32).contains(&count) {
        return Err(bad(Refusal::new("count", count, alloc::format!("must be from 1 to {MAX_VMS}"))));
    }
    names.try_reserve_exact(count as usize).map_err(|_| no_memory())?;
    for number in 1..=count {
        let name = alloc::format!("{name}-{number}");
        check_name("name", &name).map_err(bad)?;
        names.push(name);
    }
    Ok(names)
}

fn attach(name: &str, attached: &mut Option<Attached>) -> Result<Answer<'static>, Error> {
    let number = registry::number_of(name).ok_or_else(|| Error::no_such_vm(name))?;
    let vm = alive(name)?;
    let terminal = console::terminal(number).ok_or_else(|| Error::no_such_vm(name))?;
    *attached = Some(Attached::new(number, name.into(), terminal, vm.status()));
    ATTACHED.store(number, Ordering::SeqCst);
    Ok(Answer::Done)
}

/// Detaches the console, if one is attached.
pub fn detach(attached: &mut Option<Attached>) {
    *attached = None;
    ATTACHED.store(NOBODY, Ordering::SeqCst);
}

/// Gives bytes to the attached console; returns how many it took.
fn input(name: &str, data: &[u8], attached: &mut Option<Attached>) -> Result<u32, Error> {
    let vm = alive(name)?;
    let Some(attached) = attached.as_mut().filter(|attached| attached.name == name) else {
        let refusal = Refusal::text("vm", name, "must be the virtual machine whose console is attached");
        return Err(Error::refused(Code::NotAttached, refusal));
    };
    // Forgotten before it is offered: room that comes after a refusal is not missed.
    ROOM.store(false, Ordering::SeqCst);
    let taken = vm.offer(data);
    attached.input_waits = taken < data.len();
    Ok(taken as u32)
}
