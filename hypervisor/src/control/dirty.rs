//! Requests about dirty tracking: what they mean to [`Vm`], and what their refusals are called.

use alloc::sync::Arc;
use alloc::vec::Vec;

use entresol_mmu::RingsError;
use entresol_wire::Refusal;
use entresol_wire::control::{Answer, Code, Dirty, Error, PagePlace, PageRun, Pages, RUNS_PER_ANSWER};

use super::session::Attached;
use crate::vm::{DirtyError, LogOptions, Place, Run, Vm};

const fn to_place(at: PagePlace) -> Place {
    Place { slot: at.slot, page: at.page }
}

fn pages((runs, next): (Vec<Run>, Option<Place>)) -> Result<Answer<'static>, Error> {
    let mut told = Vec::new();
    told.try_reserve_exact(runs.len()).map_err(|_| super::ops::no_memory())?;
    told.extend(runs.iter().map(|run| PageRun(run.start.slot, run.start.page, run.count)));
    Ok(Answer::Pages(Pages { runs: told, next: next.map(|at| PagePlace { slot: at.slot, page: at.page }) }))
}

/// Carries out what is asked about `vm`, called `name`.
pub fn carry_out(
    vm: &Arc<Vm>,
    name: &str,
    what: &Dirty<'_>,
    attached: &mut Option<Attached>,
) -> Result<Answer<'static>, Error> {
    let refuse = |error| refused(name, error);
    let mut told_of = |goes_on: bool| {
        if let Some(attached) = attached.as_mut().filter(|attached| goes_on && attached.name == name) {
            attached.resumed = true;
        }
    };
    match what {
        Dirty::Start { manual, ahead, ring } => {
            let options = LogOptions { manual: *manual, ahead: *ahead, ring: *ring };
            vm.start_log(options).map_err(|error| match error {
                DirtyError::Rings(error @ (RingsError::Entries { .. } | RingsError::Made { .. })) => {
                    ring_refused(ring.unwrap_or(0), error)
                }
                other => refuse(other),
            })?;
        }
        Dirty::Stop => told_of(vm.stop_log().map_err(refuse)?),
        Dirty::Get(from) => return pages(vm.dirty_pages(to_place(*from), RUNS_PER_ANSWER).map_err(refuse)?),
        Dirty::Clear { at, bits } => return Ok(Answer::Count(vm.clear_dirty(to_place(*at), &bits.0).map_err(refuse)?)),
        Dirty::Harvest => {
            let (runs, more, goes_on) = vm.harvest(RUNS_PER_ANSWER).map_err(refuse)?;
            told_of(goes_on);
            return pages((runs, more.then(Place::default)));
        }
        Dirty::Mark => vm.mark().map_err(refuse)?,
        Dirty::Unmark => vm.unmark().map_err(refuse)?,
        Dirty::Since(from) => return pages(vm.pages_since(to_place(*from), RUNS_PER_ANSWER).map_err(refuse)?),
    }
    Ok(Answer::Done)
}

/// How many entries were young.
pub fn young(vm: &Vm, base: u64, size: u64) -> Result<Answer<'static>, Error> {
    vm.take_young(base, size).map(Answer::Count).ok_or_else(|| {
        let rule = alloc::format!("with {size:#x} bytes it must be whole pages of the guest's address space");
        Error::refused(Code::BadField, Refusal::new("base", format_args!("{base:#x}"), rule))
    })
}

/// A number of entries that a ring cannot have.
fn ring_refused(value: u32, error: RingsError) -> Error {
    let rule = match error {
        RingsError::Made { entries, .. } => alloc::format!("must be at most {entries}, as the rings were made first"),
        _ => "must be a power of two from 128 to 65536".into(),
    };
    Error::refused(Code::BadField, Refusal::new("ring", value, rule))
}

fn refused(name: &str, error: DirtyError) -> Error {
    match error {
        DirtyError::On | DirtyError::Off | DirtyError::NotManual | DirtyError::NoRings | DirtyError::NoMark => {
            Error::refused(Code::WrongState, Refusal::text("vm", name, alloc::format!("{error}")))
        }
        DirtyError::Log(_) => Error::new(Code::BadField, alloc::format!("{error}")),
        DirtyError::Slot(_) => Error::new(Code::SlotRefused, alloc::format!("{error}")),
        DirtyError::Rings(_) | DirtyError::Mark(_) | DirtyError::OutOfHeap => {
            Error::new(Code::OutOfMemory, alloc::format!("{error}"))
        }
    }
}
