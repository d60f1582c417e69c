//! When memory is short: whose is reclaimed unasked, until when, and what is put by so that it can be.
//!
//! Fewer than [`LOW`] frames are free, or somebody waits for one: a round begins. Memory is taken from who yields first ([`Limits::yields`]), [`BATCH`]
//! pages at a time, until [`HIGH`] frames are free. A round that finds nothing more to take ends, and who still has no frame is paused.
//!
//! A virtual machine that has all it may have (`memory.max`) gives up pages of its own when it wants another: that is a job beside the round, and whoever waits for
//! it goes on when there is some room, or is paused when there can be none.
//!
//! Some frames are put by for the nodes of blocks that are taken apart while there is no other.

use crate::arch::cpu;
use entresol_addr::PAGE_SIZE;
use entresol_backing::{ObjectHandle, Order};
#[cfg(doc)]
use entresol_wire::config::Limits;
use entresol_wire::config::MAX_VMS;

use super::{Job, Swap, Why};
use crate::host_work::Work;
use crate::vm::Pause;
use crate::{host, host_work, paging, registry};

/// Free frames below which memory is reclaimed unasked, and from which on it is enough.
const LOW: u64 = 4096;
const HIGH: u64 = 2 * LOW;
/// Free frames with which who waits for one goes on.
pub(super) const ENOUGH: u64 = 256;
/// Pages that are taken from one virtual machine before another is looked for.
const BATCH: u64 = 2048;
/// Frames of room below its limit with which who waits for one goes on.
const ROOM: u64 = 64;
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
    /// A page could not be written.
    failed: bool,
}

/// Whose memory is taken next, of those that were not tried, and how many pages of it.
fn next(tried: &[bool; MAX_VMS]) -> Option<(usize, ObjectHandle, u64)> {
    let all = (0..MAX_VMS).filter(|number| !tried[*number]);
    let all = all.filter_map(|number| registry::find(number).map(|vm| (number, vm)));
    let all = all.filter(|(_, vm)| !vm.config.private);
    let all =
        all.filter_map(|(number, vm)| Some((vm.config.limits.yields(vm.resident_frames() * PAGE_SIZE)?, number, vm)));
    let (yields, number, vm) = all.max_by_key(|(yields, ..)| *yields)?;
    Some((number, vm.ram(), yields.bytes / PAGE_SIZE))
}

impl Swap {
    /// Begins, goes on with or ends a round.
    pub(super) fn relieve(&mut self) {
        let pool = &host::get().pool;
        let free = pool.free_frames();
        if free >= ENOUGH {
            self.put_frames_by();
            paging::memory_came(None);
        }
        if free >= HIGH {
            self.round = None;
            return;
        }
        let wanted = paging::is_memory_wanted();
        self.hopeless &= free < LOW && !wanted;
        if self.round.is_none() && (free < LOW || wanted) && !self.hopeless {
            self.round = Some(Round { tried: [false; MAX_VMS], failed: false });
        }
        let Some(round) = &self.round else { return };
        // What is on its way out may be enough.
        let leaving = (0..MAX_VMS).any(|number| self.is_leaving(number));
        if leaving || self.jobs.iter().any(|job| job.why == Why::Short) {
            return;
        }
        match next(&round.tried) {
            Some((number, object, pages)) => self.begin(number, object, pages.min(BATCH), Why::Short),
            None => {
                let lack = if round.failed { Pause::Storage } else { Pause::OutOfMemory };
                (self.round, self.hopeless) = (None, true);
                paging::memory_came(Some(lack));
            }
        }
    }

    /// Whoever may have no more frames, and wants one, gives others up.
    pub(super) fn make_room(&mut self) {
        for number in 0..MAX_VMS {
            let Some(vm) = registry::find(number).filter(|vm| paging::is_room_wanted(vm)) else { continue };
            let room = vm.room().unwrap_or(u64::MAX);
            let busy = self.is_leaving(number) || self.jobs.iter().any(|job| job.number == number);
            if room >= ROOM || room > 0 && !busy {
                self.spent[number] = None;
                paging::room_came(&vm, None);
            } else if !busy {
                if let Some(lack) = self.spent[number].take() {
                    paging::room_came(&vm, Some(lack));
                } else {
                    let most = vm.config.limits.max.unwrap_or(u64::MAX) / PAGE_SIZE;
                    let above = vm.resident_frames().saturating_sub(most);
                    self.begin(number, vm.ram(), above + 4 * ROOM, Why::Limit);
                }
            }
        }
    }

    fn begin(&mut self, number: usize, object: ObjectHandle, left: u64, why: Why) {
        self.jobs.push(Job { number, object, left, hand: self.hands[number], idle: 0, why });
    }

    /// A job is over: if it has not found what it was to, there is no more where it looked.
    pub(super) fn has_given(&mut self, job: &Job) {
        if job.left == 0 {
            return;
        }
        match (job.why, &mut self.round) {
            (Why::Short, Some(round)) => round.tried[job.number] = true,
            (Why::Limit, _) => self.spent[job.number] = Some(Pause::OutOfMemory),
            (Why::Short | Why::Asked, _) => {}
        }
    }

    /// A page of virtual machine `number` could not be written.
    pub(super) fn give_up(&mut self, number: usize) {
        self.jobs.retain(|job| job.number != number);
        self.wishes.iter_mut().filter(|wish| wish.number == number).for_each(|wish| wish.failed = true);
        self.spent[number] = Some(Pause::Storage);
        if let Some(round) = &mut self.round {
            (round.tried[number], round.failed) = (true, true);
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
