//! A swap device, and its keeper: what hypervisors do with pages that the core lets go.
//!
//! Protocol: as `entresol_backing` has it. Out: [`begin_out`], the device writes bytes and tags, `finish`, [`discard`]. In, by
//! whoever needs the page: a frame is taken, or found, filled with bytes and tags from the device, and put in. Several CPUs may fetch one page at a
//! time, each for itself. While translations are taken away no machine of the family is forked ([`Swap::change`]): that is the owner's to see to.
//!
//! The device holds what was written to a place until something else is: that a place which is read is still the page's own is the
//! core's promise, so a mistake shows as bytes (INV-11) and tags (INV-12) of another page.
//!
//! Removal: no page goes out any more, every page comes back, for each who shares it, and then nobody may refer to the store.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use entresol_addr::{GfnRange, Gpa};
use entresol_backing::{Fetch, Found, ObjectHandle, Out, Search, StoreId, StoreSlot};
use entresol_machine::Tags;
use entresol_machine::model::Modelled;
use entresol_mmu::{Absent, CopyError, Frames, Shown, begin_out, discard};
use entresol_sync::{Mutex, MutexGuard};

use super::format::LabFormat;
use super::owner::refused;
use super::stage::{Kind, LabHost, LabVm, Stage};
use crate::lab::{self, Hardware};
use crate::litmus::Scenario;
use crate::litmus::outcome::Value;
use crate::litmus::step::Step;
use crate::machine::content::Content;
use crate::machine::frame::{POISON, POISON_TAGS};

/// What a place holds.
#[derive(Clone, Debug)]
struct Held {
    content: Content,
    tags: Option<Tags>,
}

/// The device.
pub struct Swap {
    store: StoreId,
    /// Pages may go out.
    on: Cell<bool>,
    holds: RefCell<HashMap<u64, Held>>,
    change: Mutex<()>,
    /// For each virtual machine who its first ancestor is.
    families: Vec<usize>,
}

impl Swap {
    /// The device of a scenario that has one.
    ///
    /// # Panics
    ///
    /// If the host's heap is exhausted.
    pub fn of(host: &LabHost, scenario: &Scenario) -> Option<Self> {
        let places = Some(scenario.machine.swap).filter(|places| *places != 0)?;
        let mut families: Vec<usize> = (0..scenario.vms.len()).collect();
        for step in scenario.steps() {
            if let Step::Fork { vm, child, .. } = step {
                families[*child] = families[*vm];
            }
        }
        let store = host.pool.stores().open_counted(places).expect("the host has a heap");
        let (on, holds, change) = (Cell::new(true), RefCell::default(), Mutex::new(()));
        Some(Self { store, on, holds, change, families })
    }

    /// Nobody forks, nor takes translations of pages away that are to leave, until the guard is gone.
    #[track_caller]
    pub fn change(&self) -> MutexGuard<'_, ()> {
        self.change.lock()
    }

    /// References to its places that are left.
    pub fn references(&self, host: &LabHost) -> u64 {
        host.pool.stores().references(self.store).unwrap_or(0)
    }

    /// Bytes and tags go to the page's place; if it `fails`, what is there afterwards is anything.
    fn write(&self, host: &LabHost, cpu: usize, out: Out, fails: bool) {
        let held = Held { content: Hardware.save(out.pfn()), tags: out.tags(&host.machine) };
        let index = out.slot().index();
        lab::before_disk(index, true);
        let anything = || Held { content: Content::filled(POISON), tags: Some(POISON_TAGS) };
        self.holds.borrow_mut().insert(index, if fails { anything() } else { held });
        out.finish(&host.supply(cpu), !fails);
    }

    /// What the page's place holds goes into the frame.
    fn read(&self, host: &LabHost, cpu: usize, fetch: &mut Fetch) {
        let index = fetch.slot().index();
        lab::before_disk(index, false);
        let held = self.holds.borrow().get(&index).cloned();
        let held = held.expect("a place that is read was written");
        Hardware.fill(fetch.pfn(), &held.content);
        let tags = held.tags.filter(|_| fetch.is_tagged());
        fetch.filled(&host.supply(cpu), tags.as_ref());
    }
}

/// The object behind a virtual machine's memory, and its frames that `range` shows.
fn frames_of(vm: usize, range: GfnRange) -> Option<(usize, Frames)> {
    lab::with(|lab| {
        let slot = lab.records.of(vm).find(|slot| slot.range.intersect(range) == Some(range))?;
        let start = slot.offset + range.start().since(slot.range.start());
        Some((slot.object, Frames { start, count: range.count() }))
    })
}

/// Pages of `vm` go out: how many left memory.
pub fn out(stage: &Stage<'_>, cpu: usize, vm: usize, range: GfnRange, fails: bool) -> Value {
    lab::with(|lab| lab.log(None, || format!("owner: {} pages from {:#x} go out", range.count(), range.start())));
    let left = leave(stage, cpu, vm, range, fails);
    refused(left.is_none());
    left.map_or(Value::Refused, Value::Word)
}

fn leave(stage: &Stage<'_>, cpu: usize, vm: usize, range: GfnRange, fails: bool) -> Option<u64> {
    let swap = stage.swap.as_ref().filter(|swap| swap.on.get())?;
    let (_, frames) = frames_of(vm, range)?;
    let mut outs = Vec::new();
    let begun = {
        let _apart = swap.change();
        let family = family(stage, swap, vm);
        begin_out(cpu, &shown(&family), frames, swap.store, |_, out| outs.push(out))
    };
    let written = outs.len() as u64;
    for out in outs {
        swap.write(stage.host, cpu, out, fails);
    }
    refused(begun.is_err());
    let _apart = swap.change();
    let left = discard(cpu, &shown(&family(stage, swap, vm)), frames).ok()?;
    if left > written {
        lab::with(|lab| lab.mark("left unwritten"));
    }
    Some(left)
}

/// The relatives of `vm` that are there, itself first, with their memory.
fn family<'h>(stage: &Stage<'h>, swap: &Swap, vm: usize) -> Vec<(Rc<LabVm<'h>>, ObjectHandle)> {
    let others = (0..swap.families.len()).filter(|other| *other != vm && swap.families[*other] == swap.families[vm]);
    let all = [vm].into_iter().chain(others).filter(|vm| stage.is_there(*vm));
    let memory = |vm: usize| {
        let object = lab::with(|lab| {
            let mut of = lab.records.of(vm).map(|slot| slot.object);
            of.find(|object| stage.kinds[*object] == Kind::Ram)
        });
        stage.object(object?)
    };
    all.filter_map(|vm| Some((stage.vm(vm), memory(vm)?))).collect()
}

fn shown<'a, 'h>(family: &'a [(Rc<LabVm<'h>>, ObjectHandle)]) -> Vec<Shown<'a, 'h, Modelled<Hardware>, LabFormat>> {
    family.iter().map(|(vm, object)| Shown { vm, object: *object }).collect()
}

/// What came of bringing a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Brought {
    /// It is there, or was not out any more.
    There,
    /// It was out, and had come by another way when it was to be put in.
    InVain,
    /// There is no frame for it.
    OutOfMemory,
}

/// The page at `gpa` of `vm` comes back, if it is out.
pub fn bring(stage: &Stage<'_>, cpu: usize, vm: usize, gpa: Gpa) -> Brought {
    let absent = {
        let pin = stage.host.epoch.pin(cpu);
        stage.vm(vm).absent(&pin, gpa)
    };
    absent.map_or(Brought::There, |Absent { object, frame, slot }| fetch(stage, cpu, object, frame, slot))
}

/// What `slot` holds is put where `frame` of `object` waits for it.
fn fetch(stage: &Stage<'_>, cpu: usize, object: ObjectHandle, frame: u64, slot: StoreSlot) -> Brought {
    let (host, supply) = (stage.host, stage.host.supply(cpu));
    let Some(swap) = stage.swap.as_ref() else { unreachable!("a page is out, and there is no device") };
    let cached = {
        let _pin = host.epoch.pin(cpu);
        Fetch::cached(&supply, slot)
    };
    let fetch = match cached {
        Some(fetch) => fetch,
        None => match Fetch::new(&supply, slot) {
            Ok(Some(mut fetch)) => {
                swap.read(host, cpu, &mut fetch);
                fetch
            }
            Ok(None) => return Brought::InVain,
            Err(entresol_backing::OutOfMemory) => return Brought::OutOfMemory,
        },
    };
    let there = {
        let pin = host.epoch.pin(cpu);
        let object = host.objects.get(&pin, object);
        object.is_some_and(|object| object.restore(&supply, frame, &fetch))
    };
    fetch.give_back(&supply);
    if there {
        lab::with(|lab| lab.mark("swapped in"));
    }
    if there { Brought::There } else { Brought::InVain }
}

/// The owner's access, again as long as a page of it has to be brought first.
pub fn present(
    stage: &Stage<'_>,
    cpu: usize,
    vm: usize,
    mut access: impl FnMut() -> Result<(), CopyError>,
) -> Result<(), CopyError> {
    let mut in_vain = false;
    loop {
        let done = access();
        let Err(CopyError::Absent { gpa, .. }) = done else { return done };
        match bring(stage, cpu, vm, gpa) {
            Brought::There => in_vain = false,
            Brought::InVain if in_vain => entresol_sync::hint::spin_loop(),
            Brought::InVain => in_vain = true,
            Brought::OutOfMemory => return done,
        }
    }
}

/// The device is removed.
pub fn remove(stage: &Stage<'_>, cpu: usize) -> Value {
    let swap = stage.swap.as_ref().expect("checked when the scenario was read");
    lab::with(|lab| lab.log(None, || "owner: the swap device is removed".to_owned()));
    swap.on.set(false);
    let done = empty(stage, cpu, swap);
    refused(!done);
    if done { Value::Word(0) } else { Value::Refused }
}

/// Every page comes back; whether nobody refers to the device any more.
fn empty(stage: &Stage<'_>, cpu: usize, swap: &Swap) -> bool {
    let (host, stores) = (stage.host, stage.host.pool.stores());
    for (number, object) in (0..stage.kinds.len()).filter_map(|number| Some((number, stage.object(number)?))) {
        let frames = {
            let pin = host.epoch.pin(cpu);
            host.objects.get(&pin, object).map_or(0, |object| object.frames())
        };
        // Sharers that brought it each for itself have it in two frames that are not known any more to hold the same.
        (0..frames).for_each(|frame| lab::with(|lab| lab.written.changed(number, frame)));
    }
    let (mut search, mut is_last) = (Search::default(), true);
    loop {
        let found = {
            let pin = host.epoch.pin(cpu);
            search.next(&host.objects, &pin, &host.machine, swap.store, usize::MAX)
        };
        let Found::Page { object, frame, slot } = found else {
            if is_last {
                break;
            }
            (search, is_last) = (Search::default(), true);
            continue;
        };
        is_last = false;
        if fetch(stage, cpu, object, frame, slot) == Brought::OutOfMemory {
            return false;
        }
        // As soon as it may be.
        if stores.close(swap.store).is_ok() {
            return true;
        }
    }
    let mut next = Some(0);
    while let Some(from) = next {
        let _pin = host.epoch.pin(cpu);
        next = host.pool.stop_keeping_for(swap.store, from, u64::MAX);
    }
    stores.close(swap.store).is_ok()
}
