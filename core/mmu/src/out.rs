//! Pages that leave memory: the change from elsewhere that swap makes, with every translation to the pages gone.
//!
//! Protocol, by the owner, unpinned: [`begin_out`] takes the translations away and makes pages clean that have to be written;
//! what it hands out is written to the store, at any time; [`entresol_backing::Out::finish`]; [`discard`] takes the translations away again, and lets
//! the words name the store. A page that was touched in between is mapped, read-only, or was written and stays: the owner
//! sees that by its access flag, and by what `discard` says. In each step: `start` for everything that shows the pages; unmap and
//! flush; the words change; `end`. After the first step a grace period passes: who was granted a page for writing before, and
//! copies into it, is done when it is read for the store.
//!
//! Pages that forks share are shown by several machines, and there is no way from a page to them. So the owner names all that may
//! show them ([`Shown`]), and lets none be forked, and none get another slot of these objects, until the call is over.
//!
//! Invariants: INV-3, INV-7: no translation reaches a page whose frame goes. Lock order: as [`crate::invalidate`].

use entresol_addr::GfnRange;
use entresol_backing::{ObjectHandle, Out, OutError, StoreId};
use entresol_machine::Machine;
use entresol_slot::ObjectId;
use entresol_table::Format;

use crate::vm::Vm;
use crate::{Host, InvalidateError, Invalidation};

/// Invalidations of one call.
const MOST: usize = 64;

/// A machine that shows the pages, and by which object.
pub struct Shown<'a, 'h, M, F> {
    /// The machine.
    pub vm: &'a Vm<'h, M, F>,
    /// Its object; those of relatives have the same frames.
    pub object: ObjectHandle,
}

/// Frames of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frames {
    /// The first.
    pub start: u64,
    /// How many.
    pub count: u64,
}

/// Invalidations that are in progress, each of the machine of that number.
struct Gone {
    list: [Option<(usize, Invalidation)>; MOST],
    count: usize,
}

impl Gone {
    fn end<M: Machine, F: Format>(self, shown: &[Shown<'_, '_, M, F>]) {
        for (number, invalidation) in self.list.into_iter().flatten() {
            shown[number].vm.invalidate_range_end(invalidation);
        }
    }
}

/// Takes away every translation of `shown` to `frames`, until `end`.
fn take_away<M: Machine, F: Format>(
    host: &Host<M>,
    cpu: usize,
    shown: &[Shown<'_, '_, M, F>],
    frames: Frames,
) -> Result<Gone, InvalidateError> {
    let mut ranges: [Option<(usize, GfnRange)>; MOST] = [None; MOST];
    let mut count = 0;
    {
        let pin = host.epoch.pin(cpu);
        for (number, one) in shown.iter().enumerate() {
            let object = ObjectId::new(one.object.raw());
            for slot in one.vm.slots.mappings(&pin, object, frames.start, frames.count) {
                let Some(range) = slot.guest_range(frames.start, frames.count) else { continue };
                *ranges.get_mut(count).ok_or(InvalidateError::TooMany)? = Some((number, range));
                count += 1;
            }
        }
    }
    let mut gone = Gone { list: [const { None }; MOST], count: 0 };
    for (number, range) in ranges.into_iter().flatten() {
        match shown[number].vm.invalidate_range_start(cpu, range) {
            Ok(invalidation) => {
                gone.list[gone.count] = Some((number, invalidation));
                gone.count += 1;
            }
            Err(error) => {
                gone.end(shown);
                return Err(error);
            }
        }
    }
    Ok(gone)
}

/// Why pages do not leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaveError {
    /// Their translations could not be taken away.
    Invalidate(InvalidateError),
    /// The store, or memory for a node. What was begun before goes on.
    Out(OutError),
}

impl From<InvalidateError> for LeaveError {
    fn from(error: InvalidateError) -> Self {
        Self::Invalidate(error)
    }
}

/// The pages at `frames` of the first of `shown` are to leave for `store`: `write` gets each that is in no store yet, to be written once this
/// has returned. Not called by a pinned CPU; `cpu` is the caller's.
///
/// # Errors
///
/// [`LeaveError`]; what `write` got before is to be written, or finished as not written, all the same.
pub fn begin_out<M: Machine, F: Format>(
    cpu: usize,
    shown: &[Shown<'_, '_, M, F>],
    frames: Frames,
    store: StoreId,
    mut write: impl FnMut(u64, Out),
) -> Result<(), LeaveError> {
    let Some(Shown { vm, object }) = shown.first() else { return Ok(()) };
    let host = vm.host;
    let gone = take_away(host, cpu, shown, frames)?;
    let mut result = Ok(());
    {
        let pin = host.epoch.pin(cpu);
        let object = host.objects.get(&pin, *object);
        for frame in (frames.start..).take(frames.count as usize) {
            let Some(object) = object else { break };
            match object.begin_out(&host.supply(cpu), frame, store) {
                Ok(Some(out)) => write(frame, out),
                Ok(None) => {}
                Err(error) => {
                    result = Err(LeaveError::Out(error));
                    break;
                }
            }
        }
    }
    gone.end(shown);
    // Who was granted a page for writing before it became clean has written it.
    host.epoch.synchronize();
    result
}

/// The pages at `frames` of the first of `shown` leave memory, as far as a store has them. Returns how many left. Not called by a pinned
/// CPU; `cpu` is the caller's.
///
/// # Errors
///
/// [`InvalidateError`]; nothing changed.
pub fn discard<M: Machine, F: Format>(
    cpu: usize,
    shown: &[Shown<'_, '_, M, F>],
    frames: Frames,
) -> Result<u64, InvalidateError> {
    let Some(Shown { vm, object }) = shown.first() else { return Ok(0) };
    let host = vm.host;
    let gone = take_away(host, cpu, shown, frames)?;
    let left = {
        let pin = host.epoch.pin(cpu);
        let object = host.objects.get(&pin, *object);
        let all = (frames.start..).take(frames.count as usize);
        object.map_or(0, |object| all.filter(|frame| object.discard(&host.supply(cpu), *frame)).count())
    };
    gone.end(shown);
    vm.stats.stored.add(left as u64);
    Ok(left as u64)
}
