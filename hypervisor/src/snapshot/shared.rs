//! The pages that a private machine shares with the hypervisor, between objects and files.
//!
//! Protocol: the list is read off the image, which nobody changes, and given to new memory before anything is in it. It has guest
//! frames: memory's, and the page with the records of stolen time, which is a fresh one in a new machine.

use entresol_addr::Gfn;
use entresol_backing::{ConvertError, ObjectHandle};
use entresol_wire::snapshot::Shared;

use super::Refused;
use crate::arch::{cpu, map};
use crate::host;
use crate::store::{self, Failure};

/// Parts of memory that are looked at, or converted, before guests have their turn.
const AT_ONCE: usize = 512;

/// What the machine whose image has the memory `ram` shares; `records`: its page with the records, too. `None` if its memory is not
/// private.
///
/// # Errors
///
/// [`Failure::OutOfMemory`].
pub async fn list(ram: ObjectHandle, records: bool) -> Result<Option<Shared>, Failure> {
    if !is_private(ram) {
        return Ok(None);
    }
    let mut shared = Shared::default();
    let mut push = |first, count| shared.push(first, count).map_err(|_| Failure::OutOfMemory);
    if let Some(page) = map::extra_page() {
        push(page, records.into())?;
    }
    let mut from = Some(0);
    while let Some(start) = from {
        from = list_some(ram, start, &mut push)?;
        store::task::pause().await;
    }
    Ok(Some(shared))
}

fn is_private(ram: ObjectHandle) -> bool {
    let host = host::get();
    let pin = host.epoch.pin(cpu::index());
    host.objects.get(&pin, ram).is_some_and(entresol_backing::Object::is_private)
}

/// The first parts from frame `start` on; where the next begin.
fn list_some(
    ram: ObjectHandle,
    start: u64,
    push: &mut impl FnMut(u64, u64) -> Result<(), Failure>,
) -> Result<Option<u64>, Failure> {
    let host = host::get();
    let pin = host.epoch.pin(cpu::index());
    let Some(object) = host.objects.get(&pin, ram) else { return Ok(None) };
    let mut start = start;
    for _ in 0..AT_ONCE {
        let Some((open, end)) = object.open_part(&host.machine, start) else { return Ok(None) };
        if open {
            for range in map::shown(start, end - start) {
                push(range.start().get(), range.count())?;
            }
        }
        start = end;
    }
    Ok(Some(start))
}

/// Whether the page with the records is in the list.
pub fn has_records(shared: &Shared) -> bool {
    map::extra_page().is_some_and(|page| shared.runs().any(|run| run.contains(&page)))
}

/// Memory that nobody has seen, `ram`, shares what `shared` says, which was checked.
///
/// # Errors
///
/// [`Refused`]: no frames for its nodes.
pub async fn apply(ram: ObjectHandle, shared: &Shared) -> Result<(), Refused> {
    let memory =
        shared.runs().filter_map(|run| Some((map::frame_of(Gfn::new(run.start).base())?, run.end - run.start)));
    for (index, (first, count)) in memory.enumerate() {
        open(ram, first, count)?;
        if index % AT_ONCE == 0 {
            store::task::pause().await;
        }
    }
    Ok(())
}

fn open(ram: ObjectHandle, first: u64, count: u64) -> Result<(), Refused> {
    let host = host::get();
    let pin = host.epoch.pin(cpu::index());
    let object = host.objects.get(&pin, ram).ok_or_else(|| Refused::because("an object is gone"))?;
    let opened = object.convert(&host.supply(cpu::index()), first, count, true);
    opened.map(drop).map_err(|error| match error {
        ConvertError::OutOfMemory => Refused::out_of_memory(error),
        error => Refused::because(alloc::format!("shared pages: {error}")),
    })
}
