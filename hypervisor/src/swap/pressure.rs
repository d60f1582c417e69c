//! When memory is short: whose is reclaimed unasked, until when, and what is put by so that it can be.
//!
//! Fewer than [`LOW`] frames are free, or somebody waits for one: a round begins. Memory is taken from who has most, [`BATCH`] pages at a time, until
//! [`HIGH`] frames are free. A round that finds nothing more to take ends, and who still has no frame is paused.
//!
//! Some frames are put by for the nodes of blocks that are taken apart while there is no other.

use entresol_backing::{ObjectHandle, Order};
use entresol_metal_arm64::cpu;
use entresol_wire::config::MAX_VMS;

use super::device::Pending;
use super::{Job, Swap};
use crate::host_work::Work;
use crate::{host, host_work, paging, registry};

/// Free frames below which memory is reclaimed unasked, and from which on it is enough.
const LOW: u64 = 4096;
const HIGH: u64 = 2 * LOW;
/// Free frames with which who waits for one goes on.
pub(super) const ENOUGH: u64 = 256;
/// Pages that are taken from one virtual machine before another is looked for.
const BATCH: u64 = 2048;
/// Frames that are looked at together for places to free.
const LOOKS: u64 = 1024;

/// Raises the work if memory is short.
pub fn look_at_pressure() {
    if paging::has_reclaim() && host::get().pool.free_frames() < LOW {
        host_work::raise(Work::Swap);
    }
}

/// Memory is short.
pub(super) struct Round {
    /// Who has nothing more to give, by number.
    tried: [bool; MAX_VMS],
}

/// Who has most in memory that may leave, of those that were not tried.
fn largest(tried: &[bool; MAX_VMS]) -> Option<(usize, ObjectHandle)> {
    let all = (0..MAX_VMS).filter(|number| !tried[*number]);
    let all = all.filter_map(|number| registry::find(number).map(|vm| (number, vm)));
    let (number, vm) = all.filter(|(_, vm)| !vm.config.private).max_by_key(|(_, vm)| vm.resident_frames())?;
    Some((number, vm.ram()))
}

impl Swap {
    /// Begins, goes on with or ends a round.
    pub(super) fn relieve(&mut self) {
        let pool = &host::get().pool;
        let free = pool.free_frames();
        if free >= ENOUGH {
            self.put_frames_by();
            paging::memory_came(false);
        }
        if free >= HIGH {
            self.round = None;
            return;
        }
        let wanted = paging::is_memory_wanted();
        self.hopeless &= free < LOW && !wanted;
        if self.round.is_none() && (free < LOW || wanted) && !self.hopeless {
            self.round = Some(Round { tried: [false; MAX_VMS] });
        }
        let Some(round) = &self.round else { return };
        // What is on its way out may be enough.
        let leaving = self.pending.iter().flatten().any(|pending| matches!(pending, Pending::Out(_)));
        if leaving || self.jobs.iter().any(|job| job.unasked) {
            return;
        }
        match largest(&round.tried) {
            Some((number, object)) => {
                let hand = self.hands[number];
                self.jobs.push(Job { number, object, left: BATCH, hand, idle: 0, unasked: true });
            }
            None => {
                (self.round, self.hopeless) = (None, true);
                paging::memory_came(true);
            }
        }
    }

    /// A job is over: if it has not found what it was to, there is no more where it looked.
    pub(super) fn has_given(&mut self, job: &Job) {
        if let Some(round) = self.round.as_mut().filter(|_| job.unasked && job.left != 0) {
            round.tried[job.number] = true;
        }
    }

    /// A page of virtual machine `number` could not be written.
    pub(super) fn give_up(&mut self, number: usize) {
        self.jobs.retain(|job| job.number != number);
        self.wishes.iter_mut().filter(|wish| wish.number == number).for_each(|wish| wish.failed = true);
        if let Some(round) = &mut self.round {
            round.tried[number] = true;
        }
    }

    /// Frees places of pages that are in memory too: to leave again they must be written. Whether there were any.
    pub(super) fn free_places(&mut self) -> bool {
        let pool = &host::get().pool;
        let before = pool.stores().taken(self.store);
        let mut looked = 0;
        while looked < pool.total_frames() && pool.stores().taken(self.store) == before {
            let _pin = host::get().epoch.pin(cpu::index());
            let next = pool.stop_keeping_for(self.store, self.looked_at, LOOKS);
            looked += LOOKS;
            self.looked_at = next.unwrap_or(0);
        }
        pool.stores().taken(self.store) != before
    }

    pub(super) fn put_frames_by(&mut self) {
        while !self.put_by.is_full()
            && let Ok(frame) = host::get().pool.take(cpu::index(), Order::PAGE)
        {
            self.put_by.push(frame);
        }
    }

    /// Gives back what was put by. Whether there was something.
    pub(super) fn spend_put_by(&mut self) -> bool {
        let had = !self.put_by.is_empty();
        for frame in self.put_by.drain(..) {
            host::get().pool.give(cpu::index(), frame, Order::PAGE);
        }
        had
    }
}
