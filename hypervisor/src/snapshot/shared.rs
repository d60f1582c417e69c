//! The pages that a private machine shares with the hypervisor, between objects and files.
//!
//! Protocol: the list is read off the image, which nobody changes, and given to new memory before anything is in it. It has guest
//! frames: memory's, and the page with the records of stolen time, which is a fresh one in a new machine.

use core::ops::Range;

use entresol_addr::PAGE_SIZE;
use entresol_backing::{ConvertError, ObjectHandle};
use entresol_loader::virt;
use entresol_metal_arm64::cpu;
use entresol_wire::bundle::FileIndex;
use entresol_wire::config;
use entresol_wire::snapshot::Shared;

use super::Refused;
use crate::host;
use crate::store::{self, Failure};

/// Parts of memory that are looked at, or converted, before guests have their turn.
const AT_ONCE: usize = 512;
/// The first guest frame of memory.
const RAM: u64 = virt::RAM_BASE / PAGE_SIZE;
/// The page with the records.
const RECORDS: u64 = virt::STOLEN_TIME_BASE / PAGE_SIZE;

const _: () = assert!(virt::STOLEN_TIME_SIZE == PAGE_SIZE && RECORDS < RAM, "the list rises");

/// Where a machine like `config` has private memory, in guest frames.
pub fn private_frames(config: &config::Vm<FileIndex>) -> [Range<u64>; 2] {
    [RECORDS..RECORDS + 1, RAM..RAM + config.memory / PAGE_SIZE]
}

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
    push(RECORDS, records.into())?;
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
            push(RAM + start, end - start)?;
        }
        start = end;
    }
    Ok(Some(start))
}

/// Whether the page with the records is in the list.
pub fn has_records(shared: &Shared) -> bool {
    shared.runs().any(|run| run.contains(&RECORDS))
}

/// Memory that nobody has seen, `ram`, shares what `shared` says, which was checked.
///
/// # Errors
///
/// [`Refused`]: no frames for its nodes.
pub async fn apply(ram: ObjectHandle, shared: &Shared) -> Result<(), Refused> {
    for (index, run) in shared.runs().filter(|run| run.start >= RAM).enumerate() {
        open(ram, run)?;
        if index % AT_ONCE == 0 {
            store::task::pause().await;
        }
    }
    Ok(())
}

fn open(ram: ObjectHandle, run: Range<u64>) -> Result<(), Refused> {
    let host = host::get();
    let pin = host.epoch.pin(cpu::index());
    let object = host.objects.get(&pin, ram).ok_or_else(|| Refused::because("an object is gone"))?;
    let opened = object.convert(&host.supply(cpu::index()), run.start - RAM, run.end - run.start, true);
    opened.map(drop).map_err(|error| match error {
        ConvertError::OutOfMemory => Refused::out_of_memory(error),
        error => Refused::because(alloc::format!("shared pages: {error}")),
    })
}
