//! Which of its pages a virtual machine wrote, for its owner: a log with or without rings, a mark, and the pages that it uses.
//!
//! Protocol: [`Vm::start_log`] has every slot log that the guest can write memory through; so does a slot that is made later,
//! until [`Vm::stop_log`]. The log goes with the virtual machine: one that was reset, or a copy, has none until its owner starts
//! it. A slot's log goes with the slot, and follows it when it moves.
//!
//! Pages are told in pieces ([`Vm::dirty_pages`], [`Vm::pages_since`]): runs of pages from a [`Place`] on, and the place to go on
//! from. A piece is read first, then exactly what was read is cleared, unless the owner clears itself ([`Vm::clear_dirty`]): what
//! the guest writes in between stays for the next piece. Whoever asks copies the pages after the answer.
//!
//! With rings, a vCPU whose ring is full pauses the virtual machine ([`Pause::DirtyRingFull`]); [`Vm::harvest`] empties the rings
//! and lets it go on. Pages that found no room in a ring, or that no vCPU wrote, are in the log: whoever harvests asks the log,
//! too, before it copies for the last time.
//!
//! Everything here waits for grace periods, so nobody calls it with one pinned.
//!
//! Invariants: a request that fails has changed nothing. Heap is taken at the start, and for answers.
//! Lock order: tracking → everything that the core takes; status is taken without it.

use alloc::vec::Vec;
use core::fmt;

use crate::arch::cpu;
use entresol_addr::{GfnRange, Gpa, PAGE_SHIFT};
use entresol_backing::{Kind, ObjectHandle};
use entresol_mmu::{ForkError, LogError, Mark, RingsError};
use entresol_slot::{Slot, SlotError, SlotFlags, SlotRequest};
use entresol_sync::Mutex;

use super::{OutOfHeap, Pause, Status, Vm};
use crate::host;

/// Words of a log that one piece looks at: 1 GiB of memory.
const WORDS: usize = 4096;
/// Pages in a word.
const PAGES: u64 = u64::BITS as u64;

/// How a log is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Telling pages does not clear them.
    pub manual: bool,
    /// Blocks are split before the guest writes to them.
    pub ahead: bool,
    /// Each vCPU has a ring of so many entries.
    pub ring: Option<u32>,
}

/// A page of a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The slot's number.
    pub slot: u32,
    /// The page, from the slot's start.
    pub page: u64,
}

/// Pages of a slot that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub start: Place,
    /// How many.
    pub count: u64,
}

/// Some pages, and where the rest begins, if there may be more.
pub type Piece = (Vec<Run>, Option<Place>);

/// Why a request about dirty tracking is refused; nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyError {
    /// The log is on.
    On,
    /// It is not.
    Off,
    /// It was not started so that its owner clears it.
    NotManual,
    /// It was started without rings.
    NoRings,
    /// There is no mark.
    NoMark,
    /// Rings could not be had.
    Rings(RingsError),
    /// A slot, a page, or their number.
    Log(LogError),
    /// A slot's log could not be had.
    Slot(SlotError),
    /// The memory could not be marked.
    Mark(ForkError),
    /// The heap has no room.
    OutOfHeap,
}

impl fmt::Display for DirtyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::On => f.write_str("must not keep a dirty log already"),
            Self::Off => f.write_str("must keep a dirty log"),
            Self::NotManual => f.write_str("must keep a dirty log that was started as manual"),
            Self::NoRings => f.write_str("must keep a dirty log that was started with rings"),
            Self::NoMark => f.write_str("must have been marked"),
            Self::Rings(error) => error.fmt(f),
            Self::Log(error) => error.fmt(f),
            Self::Slot(error) => error.fmt(f),
            Self::Mark(error) => error.fmt(f),
            Self::OutOfHeap => f.write_str(&OutOfHeap::text()),
        }
    }
}

impl From<OutOfHeap> for DirtyError {
    fn from(_: OutOfHeap) -> Self {
        Self::OutOfHeap
    }
}

impl From<LogError> for DirtyError {
    fn from(error: LogError) -> Self {
        Self::Log(error)
    }
}

/// The log while it is on.
struct Log {
    manual: bool,
    rings: bool,
    words: Vec<u64>,
}

#[derive(Default)]
struct State {
    log: Option<Log>,
    mark: Option<Mark>,
}

/// The dirty tracking of one virtual machine.
#[derive(Default)]
pub struct Tracking(Mutex<State>);

impl Tracking {
    /// The flags of a slot that its owner wants with `flags`, and that is made by `make`: nobody starts or stops the log
    /// meanwhile.
    pub(super) fn with_flags<R>(&self, flags: u32, make: impl FnOnce(u32) -> R) -> R {
        let state = self.0.lock();
        let writes = !SlotFlags::from_bits_retain(flags).contains(SlotFlags::READ_ONLY);
        let logs = if writes && state.log.is_some() { SlotFlags::LOG_DIRTY.bits() } else { 0 };
        make(flags | logs)
    }

    /// Gives back what is kept: the virtual machine ends.
    pub(super) fn end(&self) {
        if let Some(mark) = self.0.lock().mark.take() {
            mark.give_back(host::get(), cpu::index());
        }
    }
}

/// Collects runs of pages, in rising order within a slot, as long as there is room.
struct Runs {
    runs: Vec<Run>,
    most: usize,
}

impl Runs {
    fn new(most: usize) -> Result<Self, OutOfHeap> {
        let mut runs = Vec::new();
        runs.try_reserve_exact(most).map_err(|_| OutOfHeap)?;
        Ok(Self { runs, most })
    }

    /// Whether so many runs more have room.
    fn has_room(&self, more: usize) -> bool {
        self.runs.len() + more <= self.most
    }

    /// Takes pages in; false if there is no room.
    fn add(&mut self, slot: u32, page: u64, count: u64) -> bool {
        if let Some(last) = self.runs.last_mut()
            && last.start.slot == slot
            && last.start.page.checked_add(last.count) == Some(page)
        {
            last.count += count;
            return true;
        }
        let room = self.has_room(1);
        if room {
            self.runs.push(Run { start: Place { slot, page }, count });
        }
        room
    }

    /// The same for the pages of a word, of which page `page` is the first.
    fn add_word(&mut self, slot: u32, page: u64, mut word: u64) {
        while word != 0 {
            let first = word.trailing_zeros();
            let count = (word >> first).trailing_ones();
            self.add(slot, page + u64::from(first), count.into());
            // Carries out of the run's last bit.
            word &= word.checked_add(1 << first).unwrap_or(0);
        }
    }
}

/// The most runs that the bits of a word can be.
const RUNS_IN_WORD: usize = 32;

impl Vm {
    /// The slots for which `wanted` is true of slot and object, by number.
    fn slots_where(&self, wanted: impl Fn(&Slot, Kind) -> bool) -> Result<Vec<Slot>, OutOfHeap> {
        let slots = self.memory.slots();
        let mut found: Vec<Slot> = Vec::new();
        // Room for all before the grace period is pinned: there is nothing to wait for then.
        found.try_reserve_exact(slots.capacity() as usize).map_err(|_| OutOfHeap)?;
        {
            let host = host::get();
            let pin = host.epoch.pin(cpu::index());
            let kind = |slot: &Slot| {
                let object = host.objects.get(&pin, ObjectHandle::from_raw(slot.object.get()));
                object.map(|object| object.kind())
            };
            let chosen = slots.iter(&pin).filter(|slot| kind(slot).is_some_and(|kind| wanted(slot, kind)));
            found.extend(chosen.map(|slot| *slot));
        }
        found.sort_unstable_by_key(|slot| slot.id);
        Ok(found)
    }

    fn set_logs(&self, slot: &Slot, logs: bool) -> Result<(), DirtyError> {
        let mut flags = slot.flags;
        flags.set(SlotFlags::LOG_DIRTY, logs);
        let request = SlotRequest {
            id: slot.id.into(),
            base: slot.base.base(),
            size: slot.count << PAGE_SHIFT,
            object: slot.object,
            offset: slot.offset << PAGE_SHIFT,
            flags: flags.bits(),
        };
        self.memory.set_slot(cpu::index(), &request).map_err(DirtyError::Slot)
    }

    /// Has every slot log that the guest writes memory through.
    ///
    /// # Errors
    ///
    /// [`DirtyError::On`], [`DirtyError::Rings`], [`DirtyError::Slot`], [`DirtyError::Log`], [`DirtyError::OutOfHeap`].
    pub fn start_log(&self, options: LogOptions) -> Result<(), DirtyError> {
        let mut state = self.tracking.0.lock();
        if state.log.is_some() {
            return Err(DirtyError::On);
        }
        let mut words = Vec::new();
        words.try_reserve_exact(WORDS).map_err(|_| OutOfHeap)?;
        words.resize(WORDS, 0);
        let slots = self.slots_where(|slot, kind| matches!(kind, Kind::Anonymous(_)) && !slot.is_read_only())?;
        if let Some(entries) = options.ring {
            self.memory.enable_dirty_rings(self.vcpus() as u32, entries).map_err(DirtyError::Rings)?;
        }
        let started = slots.iter().try_for_each(|slot| {
            self.set_logs(slot, true)?;
            if options.ahead {
                self.memory.split_ahead(cpu::index(), slot.id)?;
            }
            Ok(())
        });
        if let Err(error) = started {
            slots.iter().for_each(|slot| self.stop_slot(slot));
            self.memory.disable_dirty_rings();
            return Err(error);
        }
        state.log = Some(Log { manual: options.manual, rings: options.ring.is_some(), words });
        Ok(())
    }

    fn stop_slot(&self, slot: &Slot) {
        self.set_logs(slot, false).expect("a slot that is there needs nothing to stop logging");
    }

    /// Ends the log, with what it names; a virtual machine that waited for it goes on. Returns whether it did.
    ///
    /// # Errors
    ///
    /// [`DirtyError::Off`], [`DirtyError::OutOfHeap`].
    pub fn stop_log(self: &alloc::sync::Arc<Self>) -> Result<bool, DirtyError> {
        {
            let mut state = self.tracking.0.lock();
            if state.log.is_none() {
                return Err(DirtyError::Off);
            }
            let slots = self.slots_where(|slot, _| slot.logs_dirty())?;
            slots.iter().for_each(|slot| self.stop_slot(slot));
            self.memory.disable_dirty_rings();
            state.log = None;
        }
        Ok(self.go_on_after_harvest())
    }

    /// Dirty pages from `from` on, at most `most` runs of them. They are dirty no more, unless the log is manual.
    ///
    /// # Errors
    ///
    /// [`DirtyError::Off`], [`DirtyError::Log`], [`DirtyError::OutOfHeap`].
    pub fn dirty_pages(&self, from: Place, most: usize) -> Result<Piece, DirtyError> {
        let mut runs = Runs::new(most)?;
        let mut state = self.tracking.0.lock();
        let log = state.log.as_mut().ok_or(DirtyError::Off)?;
        let slots = self.slots_where(|slot, _| slot.logs_dirty() && u32::from(slot.id) >= from.slot)?;
        let Some(slot) = slots.first() else { return Ok((runs.runs, None)) };
        let id = u32::from(slot.id);
        let first = if id == from.slot { from.page } else { 0 };
        let read = self.memory.read_dirty_part(cpu::index(), slot.id, first, &mut log.words)?;
        let mut pages = read.count;
        for (word, page) in log.words.iter().zip((first..first + read.count).step_by(PAGES as usize)) {
            if !runs.has_room(RUNS_IN_WORD) {
                pages = page - first;
                break;
            }
            runs.add_word(id, page, *word);
        }
        if !log.manual && !runs.runs.is_empty() {
            self.memory.clear_dirty_log(cpu::index(), slot.id, first, pages, &log.words)?;
        }
        let here = Some(Place { slot: id, page: first + pages }).filter(|next| next.page < read.pages);
        Ok((runs.runs, here.or(slots.get(1).map(|slot| Place { slot: slot.id.into(), page: 0 }))))
    }

    /// Clears what `bits` names of the pages of slot `at.slot` from `at.page` on: bit 0 of byte 0 is that page. Returns how many
    /// were dirty.
    ///
    /// # Errors
    ///
    /// [`DirtyError::Off`], [`DirtyError::NotManual`], [`DirtyError::Log`].
    pub fn clear_dirty(&self, at: Place, bits: &[u8]) -> Result<u64, DirtyError> {
        let mut state = self.tracking.0.lock();
        let log = state.log.as_mut().ok_or(DirtyError::Off)?;
        if !log.manual {
            return Err(DirtyError::NotManual);
        }
        let id = u16::try_from(at.slot).map_err(|_| LogError::Absent { slot: u16::MAX })?;
        // The slot's extent, and that it logs.
        let slot = self.memory.read_dirty_part(cpu::index(), id, at.page, &mut [])?;
        let named = bits.len() as u64 * u64::from(u8::BITS);
        let count = named.min((slot.pages - at.page).next_multiple_of(PAGES));
        if named > count || bits.len() > WORDS * size_of::<u64>() {
            return Err(LogError::Outside { first: at.page, count: named, pages: slot.pages }.into());
        }
        for (word, bytes) in log.words.iter_mut().zip(bits.chunks(size_of::<u64>())) {
            *word = bytes.iter().rev().fold(0, |word, byte| word << u8::BITS | u64::from(*byte));
        }
        let count = count.min(slot.pages - at.page);
        Ok(self.memory.clear_dirty_log(cpu::index(), id, at.page, count, &log.words)?)
    }

    /// Takes pages out of the rings, at most `most` runs of them: they are dirty no more, and a virtual machine that waited for
    /// that goes on. Returns the pages, whether there are more, and whether it went on.
    ///
    /// # Errors
    ///
    /// [`DirtyError::Off`], [`DirtyError::NoRings`], [`DirtyError::OutOfHeap`].
    pub fn harvest(self: &alloc::sync::Arc<Self>, most: usize) -> Result<(Vec<Run>, bool, bool), DirtyError> {
        let mut runs = Runs::new(most)?;
        let mut more = false;
        {
            let state = self.tracking.0.lock();
            if !state.log.as_ref().ok_or(DirtyError::Off)?.rings {
                return Err(DirtyError::NoRings);
            }
            for ring in (0..self.vcpus() as u32).filter_map(|vcpu| self.memory.dirty_ring(vcpu)) {
                ring.harvest_while(|slot, page| {
                    let taken = runs.add(slot, page, 1);
                    more |= !taken;
                    taken
                });
            }
            self.memory.reset_dirty_rings(cpu::index());
        }
        let goes_on = self.go_on_after_harvest();
        Ok((runs.runs, more, goes_on))
    }

    /// Lets the virtual machine run if it is paused for a ring; if one is full yet, it pauses again.
    fn go_on_after_harvest(self: &alloc::sync::Arc<Self>) -> bool {
        self.status() == Status::Paused(Pause::DirtyRingFull) && self.resume()
    }

    /// Marks this moment, in place of the mark before.
    ///
    /// # Errors
    ///
    /// [`DirtyError::Mark`].
    pub fn mark(&self) -> Result<(), DirtyError> {
        let mut state = self.tracking.0.lock();
        let mark = self.memory.mark(cpu::index()).map_err(DirtyError::Mark)?;
        if let Some(before) = state.mark.replace(mark) {
            before.give_back(host::get(), cpu::index());
        }
        Ok(())
    }

    /// Forgets the mark, and gives back what was kept for it.
    ///
    /// # Errors
    ///
    /// [`DirtyError::NoMark`].
    pub fn unmark(&self) -> Result<(), DirtyError> {
        let mark = self.tracking.0.lock().mark.take().ok_or(DirtyError::NoMark)?;
        mark.give_back(host::get(), cpu::index());
        Ok(())
    }

    /// Pages from `from` on that were written since the mark, at most `most` runs of them.
    ///
    /// # Errors
    ///
    /// [`DirtyError::NoMark`], [`DirtyError::OutOfHeap`].
    pub fn pages_since(&self, from: Place, most: usize) -> Result<Piece, DirtyError> {
        let mut runs = Runs::new(most)?;
        let state = self.tracking.0.lock();
        let mark = state.mark.as_ref().ok_or(DirtyError::NoMark)?;
        let slots = self.slots_where(|slot, kind| {
            matches!(kind, Kind::Anonymous(_)) && !slot.is_read_only() && u32::from(slot.id) >= from.slot
        })?;
        let Some(slot) = slots.first() else { return Ok((runs.runs, None)) };
        let id = u32::from(slot.id);
        let first = if id == from.slot { from.page } else { 0 };
        let mut here = None;
        let pin = host::get().epoch.pin(cpu::index());
        let start = slot.offset.saturating_add(first);
        for (frame, count) in self.memory.written_since(&pin, mark, slot, start).into_iter().flatten() {
            // From the object's frames to the slot's pages.
            let (page, end) = (frame - slot.offset, (frame + count - slot.offset).min(slot.count));
            if page >= slot.count {
                break;
            }
            if !runs.add(id, page, end - page) {
                here = Some(Place { slot: id, page });
                break;
            }
        }
        Ok((runs.runs, here.or(slots.get(1).map(|slot| Place { slot: slot.id.into(), page: 0 }))))
    }

    /// How many entries of the second stage were used in the `size` bytes from `base` on since this was asked last. `None` if
    /// these are no pages of its address space.
    pub fn take_young(&self, base: u64, size: u64) -> Option<u64> {
        let mask = (1 << PAGE_SHIFT) - 1;
        let range = GfnRange::new(Gpa::new(base).frame(), size >> PAGE_SHIFT).filter(|_| (base | size) & mask == 0)?;
        self.memory.clear_young(cpu::index(), range).ok()
    }

    /// Fetches and clears the log of slot `slot` at once, if it has at most 1 GiB, and says how many pages it named: for
    /// measurements.
    ///
    /// # Errors
    ///
    /// [`DirtyError::Off`], [`DirtyError::Log`].
    pub fn take_dirty_log(&self, slot: u16) -> Result<u64, DirtyError> {
        let mut state = self.tracking.0.lock();
        let log = state.log.as_mut().ok_or(DirtyError::Off)?;
        Ok(self.memory.get_dirty_log(cpu::index(), slot, &mut log.words)?)
    }
}
