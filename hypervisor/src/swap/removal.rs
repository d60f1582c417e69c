//! The disk is taken out of use: first everything on it comes back, for all who share it.
//!
//! Protocol, all of it host's work, some steps at a time: [`super::remove`] lets nothing more leave, and nobody wait for frames that others
//! give up; a search of all objects brings what it finds ([`Search`]), as often as it finds something; then frames are told that the disk does not hold the same
//! any more; when no reference to a place is left, the store is closed, and who asked is told how many bytes were read. Guests run
//! meanwhile, and what they touch is brought for them first.
//!
//! A page that cannot be read, or no frame for one, ends it: the disk is in use again as before, and what has come back is still on it too.
//!
//! Invariants: INV-7: the store is closed with its last reference, so no place is lost, nor any page.

use alloc::format;

use crate::arch::cpu;
use entresol_addr::{PAGE_SHIFT, PAGE_SIZE};
use entresol_backing::{Found, Search};
use entresol_wire::Refusal as Field;
use entresol_wire::config::MAX_VMS;
use entresol_wire::control::{Answer, Code, Error};

use super::device::Pending;
use super::pressure::ENOUGH;
use super::{RESERVED, STEPS, SWAP, Swap};
use crate::block::DEPTH;
use crate::control::Later;
use crate::host_work::{self, Work};
use crate::paging::{self, Wanted, Whose};
use crate::vm::Pause;
use crate::{host, registry};

/// Steps of the search, or frames that are told, together.
const LOOKS: usize = 512;

/// How far it is.
pub(super) struct Removal {
    at: At,
    /// This search, or the one before it, has found something: what it passed then may be out again.
    found: bool,
    /// Pages that were read.
    read: u64,
    /// A page could not be read.
    failed: bool,
    /// Requests that the disk has had since before: how they end says nothing about it now.
    older: [bool; DEPTH],
    answer: Later,
}

enum At {
    /// Objects are searched for pages that are out.
    Search(Search),
    /// Frames from there on are told.
    Frames(u64),
}

/// Why the disk stays as it is.
pub enum Refusal {
    /// There is none in use.
    NoDisk,
    /// It is being removed.
    Removing,
    /// A virtual machine may not have all of its memory in frames.
    Limit(Field),
}

/// The disk is not to be used any more. Answered when it is not, with the bytes that came back from it. Host's work.
///
/// # Errors
///
/// [`Refusal`]; nothing changed.
pub fn remove() -> Result<Later, Refusal> {
    let mut state = SWAP.lock();
    let swap = state.as_mut().ok_or(Refusal::NoDisk)?;
    if swap.removal.is_some() {
        return Err(Refusal::Removing);
    }
    if let Some(refusal) = above_limit() {
        return Err(Refusal::Limit(refusal));
    }
    swap.jobs.clear();
    swap.answer(|_| true);
    swap.round = None;
    paging::stop_reclaim();
    paging::memory_came(Some(Pause::OutOfMemory));
    for vm in (0..MAX_VMS).filter_map(registry::find) {
        paging::room_came(&vm, Some(Pause::OutOfMemory));
    }
    let answer = Later::default();
    let at = At::Search(Search::default());
    let older = swap.pending.each_ref().map(Option::is_some);
    swap.removal = Some(Removal { at, found: false, read: 0, failed: false, older, answer: answer.clone() });
    host_work::raise(Work::Swap);
    Ok(answer)
}

/// Who has more memory, here and there, than may be in frames.
fn above_limit() -> Option<Field> {
    (0..MAX_VMS).filter_map(registry::find).find_map(|vm| {
        let (max, has) = (vm.config.limits.max?, (vm.resident_frames() + vm.stored_frames()) * PAGE_SIZE);
        let rule = format!("must be at least {has}, what {} has, for all of it to come back", vm.config.name);
        (has > max).then(|| Field::new("memory.max", max, rule))
    })
}

impl Swap {
    /// The page whose request was at `place` was read, or could not be.
    pub(super) fn has_read(&mut self, place: usize, well: bool) {
        if let Some(removal) = &mut self.removal {
            let is_older = core::mem::take(&mut removal.older[place]);
            removal.read += u64::from(well);
            removal.failed |= !well && !is_older;
        }
    }

    /// Whether nothing more is to leave.
    pub(super) fn is_leaving_use(&self) -> bool {
        self.removal.is_some()
    }

    /// Some steps of the removal. Whether the disk is out of use.
    pub(super) fn empty(&mut self) -> bool {
        for _ in 0..STEPS {
            let is_reading = self.is_reading();
            let Some(removal) = &mut self.removal else { return false };
            if removal.failed {
                self.stay(Error::new(Code::StoreFailed, "the disk entresol-swap did not read a page"));
                return false;
            }
            match removal.at {
                // Completions go on with it.
                At::Search(_) if self.spare.len() <= RESERVED => return false,
                // What it would find first is on its way.
                At::Search(search) if search == Search::default() && is_reading => return false,
                At::Search(search) => self.search(search),
                At::Frames(from) => {
                    let pool = &host::get().pool;
                    let next = {
                        let _pin = host::get().epoch.pin(cpu::index());
                        pool.stop_keeping_for(self.store, from, LOOKS as u64)
                    };
                    if let Some(next) = next {
                        removal.at = At::Frames(next);
                    } else if pool.stores().close(self.store).is_ok() {
                        return true;
                    } else {
                        // Somebody reads a page, or what ended has yet to be taken apart.
                        removal.at = At::Search(Search::default());
                        break;
                    }
                }
            }
        }
        host_work::raise(Work::Swap);
        false
    }

    fn search(&mut self, mut search: Search) {
        let host = host::get();
        let found = {
            let pin = host.epoch.pin(cpu::index());
            search.next(&host.objects, &pin, &host.machine, self.store, LOOKS)
        };
        let lack = match found {
            Found::Page { .. } if host.pool.free_frames() < ENOUGH => true,
            Found::Page { object, frame, slot } => {
                paging::want_frame(object, frame, slot, Whose::Nobodys) == Wanted::OutOfMemory
            }
            Found::Nothing | Found::End => false,
        };
        if lack {
            return self.stay(Error::new(Code::OutOfMemory, "no frames for all that is on the disk entresol-swap"));
        }
        self.read();
        let Some(removal) = &mut self.removal else { return };
        removal.found |= matches!(found, Found::Page { .. });
        removal.at = match found {
            Found::End if removal.found => {
                removal.found = false;
                At::Search(Search::default())
            }
            Found::End => At::Frames(0),
            Found::Page { .. } | Found::Nothing => At::Search(search),
        };
    }

    fn is_reading(&self) -> bool {
        self.pending.iter().flatten().any(|pending| matches!(pending, Pending::In(_)))
    }

    /// The disk stays in use.
    fn stay(&mut self, why: Error) {
        let Some(removal) = self.removal.take() else { return };
        log::warn!("swap: {}", why.message);
        paging::reclaim_by(Work::Swap);
        removal.answer.say(Err(why));
    }

    /// The disk is out of use: nobody refers to a place.
    pub(super) fn finish(mut self) {
        paging::stop_keeping(self.store);
        self.spend_put_by();
        let Some(removal) = self.removal else { return };
        log::info!("swap: removed, {} pages were read", removal.read);
        removal.answer.say(Ok(Answer::Count(removal.read << PAGE_SHIFT)));
    }
}
