//! Pages that a guest shares with the hypervisor, and takes back: the attribute of private memory.
//!
//! Purpose: each page of a private machine is private or *open*. The object has the attribute, and nothing else does
//! ([`entresol_backing::Object::convert`]); guest frames have it through their slots. Whoever reaches a page with the other kind of
//! access is told so exactly: [`MemoryFault`].
//!
//! # Protocol
//!
//! One change is one change from elsewhere, as the notifier has it: the range, and every other place where this machine shows the
//! same pages, is announced, a grace period goes by, entries go and are flushed, page-frame caches give their leases back, the
//! object changes attributes, and the announcement ends. What pages hold stays, both ways: who makes a page private must not trust
//! what it finds there.
//!
//! An access that says its kind ([`Vm::touch_as`], [`Vm::read_as`], [`Vm::write_as`]) compares it with the attribute: a touch between
//! a sample of the notifier and the publication, a copy under the frame's lock. So no entry and no copy of the wrong kind is made
//! after the change.
//!
//! A guest of arm64 has one kind of access only, which is the one that the attribute says; kinds are the hypervisor's devices' and those
//! of architectures whose addresses tell them apart.
//!
//! # A guest may ask for what it likes
//!
//! A range that does not lie in one slot of private memory of its own is refused whole. Work grows with the pages named, not with
//! what is behind them: the caller bounds a call.
//!
//! Invariants: INV-3, INV-7, INV-10. Lock order: dirty logs → notifier → caches → object → pool; not called by a pinned CPU.

use entresol_addr::{GfnRange, Gpa, PageSize};
use entresol_backing::{ConvertError as ObjectError, ObjectHandle};
use entresol_fault::Fault;
use entresol_machine::Machine;
use entresol_slot::Hint;
use entresol_sync::Pin;
use entresol_table::Format;

use crate::discard::hull;
use crate::outcome::{Outcome, Reason};
use crate::vm::Vm;
use crate::{TooMany, access};

/// A page was reached with another kind of access than its attribute says. One word, so that an outcome stays in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryFault(u64);

/// Bit 0 of the word: the access was to private memory.
const PRIVATE: u64 = 1;

impl MemoryFault {
    /// One of the page around `gpa`.
    pub const fn new(gpa: Gpa, private: bool) -> Self {
        Self(gpa.frame().base().get() | if private { PRIVATE } else { 0 })
    }

    /// First byte of the page.
    pub const fn gpa(self) -> Gpa {
        Gpa::new(self.0 & !PRIVATE)
    }

    /// How much has the attribute at least: attributes are given page by page.
    pub const fn size(self) -> PageSize {
        PageSize::Size4K
    }

    /// Whether the access was to private memory: then the page is shared with the hypervisor.
    pub const fn private(self) -> bool {
        self.0 & PRIVATE != 0
    }
}

/// Why no page was converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConvertError {
    /// The range does not lie in one writable slot of private memory that is this machine's alone.
    NotPrivate,
    /// No frame for a node, or for the copy of a page that relatives share.
    OutOfMemory,
    /// The memory is being forked, or too much is being invalidated: try again, unpinned in between.
    Busy,
}

impl From<TooMany> for ConvertError {
    fn from(TooMany: TooMany) -> Self {
        Self::Busy
    }
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// Makes the pages of `range` open, or private. Returns how many changed. Not called by a pinned CPU; `cpu` is the one that the
    /// caller runs on.
    ///
    /// # Errors
    ///
    /// [`ConvertError`]; no page changed.
    pub fn convert(&self, cpu: usize, range: GfnRange, open: bool) -> Result<u64, ConvertError> {
        let (pool, epoch) = (&self.host.pool, &self.host.epoch);
        pool.reap(epoch, cpu, usize::MAX);
        let _slots_stay = self.logs.owner();
        let announced = self.shown_with(cpu, range)?;
        let invalidation = self.announce(announced)?;
        epoch.synchronize();
        self.caches.give_leases_back(announced, |lease| self.release_lease(lease));
        let changed = self.convert_announced(&epoch.pin(cpu), range, open);
        self.notifier.end(invalidation);
        self.stats.invalidations.bump();
        pool.reap(epoch, cpu, usize::MAX);
        changed
    }

    /// Whether `range` may be converted: whoever asks is told for all of it before a part of it changes.
    pub fn is_convertible(&self, cpu: usize, range: GfnRange) -> bool {
        !range.is_empty() && self.shown_with(cpu, range).is_ok()
    }

    /// The hull of all places where this machine shows the pages of `range`, which must be its own private memory.
    fn shown_with(&self, cpu: usize, range: GfnRange) -> Result<GfnRange, ConvertError> {
        let pin = self.host.epoch.pin(cpu);
        let piece = self.piece(&pin, range.start(), range.end());
        let piece = piece.filter(|piece| piece.range == range && piece.object.is_private());
        let piece = piece.ok_or(ConvertError::NotPrivate)?;
        let (frame, count) = (piece.frame(), range.count());
        let shown = self.slots.mappings(&pin, piece.slot.object, frame, count);
        Ok(shown.filter_map(|slot| slot.guest_range(frame, count)).fold(range, hull))
    }

    fn convert_announced(&self, pin: &Pin<'_>, range: GfnRange, open: bool) -> Result<u64, ConvertError> {
        let piece = self.piece(pin, range.start(), range.end()).expect("slots stay, and hold what they show");
        let (frame, count) = (piece.frame(), range.count());
        let shown = self.slots.mappings(pin, piece.slot.object, frame, count);
        for shown in shown.filter_map(|slot| slot.guest_range(frame, count)) {
            self.unmap_pinned(shown);
        }
        piece.object.convert(&self.host.supply(pin.cpu()), frame, count, open).map_err(|error| match error {
            ObjectError::OutOfMemory => ConvertError::OutOfMemory,
            ObjectError::Forking => ConvertError::Busy,
            ObjectError::NotPrivate | ObjectError::Outside { .. } => {
                unreachable!("a piece was looked at, and a slot lies in its object")
            }
        })
    }

    /// Whether the page at `gpa` is memory that the hypervisor may see: open, or not private memory at all. `None`: no memory is there.
    pub fn is_open(&self, pin: &Pin<'_>, hint: &Hint, gpa: Gpa) -> Option<bool> {
        let slot = self.slots.find(pin, gpa.frame(), hint)?;
        let object = self.host.objects.get(pin, ObjectHandle::from_raw(slot.object.get()))?;
        Some(object.is_open(&self.host.machine, slot.object_frame(gpa.frame())))
    }

    /// As [`Vm::touch`], for an access that is of a kind: to private memory, or not. One that is not what the page is exits with
    /// [`Reason::MemoryFault`], and maps nothing.
    pub fn touch_as(&self, pin: &Pin<'_>, hint: &Hint, fault: &Fault, private: bool) -> Outcome {
        if let Some(outcome) = access::before_lookup(fault, self.machine_limit(), self.limit()) {
            return self.refused(outcome);
        }
        let sample = self.notifier.sample();
        let moved = || self.notifier.moved(sample, GfnRange::single(fault.gfn()));
        if self.is_open(pin, hint, fault.gpa) == Some(private) {
            let disagrees = Outcome::Exit(Reason::MemoryFault(MemoryFault::new(fault.gpa, private)));
            return if moved() { self.retry() } else { self.refused(disagrees) };
        }
        let decided = self.decide(pin, hint, fault);
        // A change that begins after this waits for this CPU to unpin.
        if moved() {
            return self.retry();
        }
        self.publish_touched(pin, fault, decided)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_fault_is_what_it_was_made_of() {
        for (gpa, private) in [(0, false), (0x4000_0fff, true), ((1 << 48) - 1, false)] {
            let fault = MemoryFault::new(Gpa::new(gpa), private);
            assert_eq!((fault.gpa().get(), fault.private()), (gpa & !0xfff, private));
            assert_eq!(fault.size(), PageSize::Size4K);
        }
    }
}
