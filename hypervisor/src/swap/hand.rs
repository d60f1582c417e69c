//! Who leaves: a hand goes round a virtual machine's frames, [`WINDOW`] at a time.
//!
//! What was used since the hand came last is made old, and stays; the rest goes out. A page whose place on the disk is still right is discarded
//! at once; another is written, and discarded when it is written, unless it was used meanwhile. A block that is used is
//! passed over as a whole: one entry shows it.
//!
//! Known hole: blocks that forks share stay in memory until they are written.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::arch::{Format, Metal, cpu, map};
use arrayvec::ArrayVec;
use entresol_addr::PageSize;
use entresol_backing::{ObjectHandle, OutError, StoreError};
use entresol_mmu::{Frames, LeaveError, Shown, begin_out, discard};
use entresol_wire::config::MAX_VMS;

use super::device::{Leaving, Pending};
use super::{Job, Page, Swap, WINDOW};
use crate::registry;
use crate::vm::{OutOfHeap, Vm};

/// A virtual machine's memory as the core wants it named, and that of all who may share it.
fn family(number: usize, object: ObjectHandle) -> Option<Vec<Arc<Vm>>> {
    let vm = registry::find(number).filter(|vm| vm.shows(object))?;
    let shares = vm.is_forked();
    let mut all = Vec::new();
    all.try_reserve_exact(MAX_VMS).map_err(|_| OutOfHeap).ok()?;
    all.push(vm);
    if shares {
        let frames = all[0].memory_frames();
        let others = (0..MAX_VMS).filter(|other| *other != number).filter_map(registry::find);
        all.extend(others.filter(|other| other.is_forked() && other.memory_frames() == frames));
    }
    Some(all)
}

fn shown(family: &[Arc<Vm>]) -> ArrayVec<Shown<'_, 'static, Metal, Format>, MAX_VMS> {
    family.iter().map(|vm| Shown { vm: &vm.memory, object: vm.ram() }).collect()
}

/// Whether somebody has used one of the frames since they were made old.
fn used(family: &[Arc<Vm>], frames: Frames) -> bool {
    // What cannot be asked for is not to leave.
    map::shown(frames.start, frames.count)
        .any(|range| family.iter().any(|vm| vm.memory.test_young(cpu::index(), range).unwrap_or(true)))
}

/// Makes the frames old.
fn age(family: &[Arc<Vm>], frames: Frames) {
    for (range, vm) in map::shown(frames.start, frames.count).flat_map(|range| family.iter().map(move |vm| (range, vm)))
    {
        if let Err(error) = vm.memory.clear_young(cpu::index(), range) {
            log::error!("swap: vm {}: {error:?}", vm.config.name);
        }
    }
}

/// The frames of `window` that are in memory and that nobody used since the hand came last.
fn old(family: &[Arc<Vm>], window: Frames) -> ArrayVec<u64, { WINDOW as usize }> {
    let all = window.start..window.start + window.count;
    all.filter(|frame| family[0].backing(*frame).is_some() && !used(family, Frames { start: *frame, count: 1 }))
        .collect()
}

/// The block that backs `frame`, if one does.
fn block_at(vm: &Vm, frame: u64) -> Option<Frames> {
    let grant = vm.backing(frame).filter(|grant| grant.size != PageSize::Size4K)?;
    Some(Frames { start: grant.extent_start, count: grant.size.frames() })
}

impl Swap {
    /// One window of a job; the job, if there is more of it.
    pub(super) fn step(&mut self, mut job: Job) -> Option<Job> {
        let family = family(job.number, job.object)?;
        let total = family[0].memory_frames();
        if job.left == 0 || job.idle > 2 * total {
            self.hands[job.number] = job.hand;
            self.has_given(&job);
            return None;
        }
        job.hand %= total;
        if let Some(block) = block_at(&family[0], job.hand)
            && used(&family, block)
        {
            // One entry for all of it: it is used as a whole.
            age(&family, block);
            let end = block.start + block.count;
            job.idle += end - job.hand;
            job.hand = end;
            return Some(job);
        }
        let window = Frames { start: job.hand, count: WINDOW.min(total - job.hand).min(job.left) };
        let old = old(&family, window);
        if used(&family, window) {
            age(&family, window);
        }
        job.hand += window.count;
        job.idle += window.count;
        for run in old.chunk_by(|one, other| one + 1 == *other) {
            let frames = Frames { start: run[0], count: run.len() as u64 };
            match self.leave(&family, &job, frames) {
                Ok(0) => {}
                Ok(left) => {
                    job.left = job.left.saturating_sub(left);
                    job.idle = 0;
                }
                // Nothing of it leaves: it is looked at again when there is room.
                Err(LeaveError::Out(OutError::OutOfMemory)) if self.spend_put_by() => job.hand = frames.start,
                Err(LeaveError::Out(OutError::Store(StoreError::Full { .. }))) if self.free_places() => {
                    job.hand = frames.start;
                }
                Err(error) => {
                    log::warn!("swap: vm {}: {error:?}", family[0].config.name);
                    self.has_given(&job);
                    return None;
                }
            }
        }
        Some(job)
    }

    /// Pages begin to leave, or have left. Returns how many.
    fn leave(&mut self, family: &[Arc<Vm>], job: &Job, frames: Frames) -> Result<u64, LeaveError> {
        let shown = shown(family);
        let mut outs: ArrayVec<Leaving, { WINDOW as usize }> = ArrayVec::new();
        let begun = begin_out(cpu::index(), &shown, frames, self.store, |frame, out| {
            outs.push(Leaving { out, page: Page { number: job.number, object: job.object, frame } });
        });
        let mut count = outs.len() as u64;
        for leaving in outs {
            self.submit(Pending::Out(leaving));
        }
        begun?;
        if count < frames.count {
            let left = discard(cpu::index(), &shown, frames)?;
            self.have_left_unwritten(job.number, left);
            count += left;
        }
        Ok(count)
    }

    /// Pages that were written leave, but for those that were used since.
    pub(super) fn let_go(&mut self, first: Page, count: u64) {
        let Some(family) = family(first.number, first.object) else { return };
        let shown = shown(&family);
        for frame in first.frame..first.frame + count {
            let frames = Frames { start: frame, count: 1 };
            if !used(&family, frames) && discard(cpu::index(), &shown, frames) == Ok(1) {
                self.have_left(first.number, 1);
                continue;
            }
            // Another goes in its place.
            self.jobs.iter_mut().filter(|job| job.number == first.number).for_each(|job| job.left += 1);
        }
    }
}
