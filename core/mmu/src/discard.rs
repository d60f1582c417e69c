//! Memory that a guest gives back: pages of a balloon, reports of free pages.
//!
//! # Protocol
//!
//! One batch is one change from elsewhere, as the notifier has it: the ranges, and every other place where this machine shows
//! the same frames, are announced at once, a grace period goes by, then piece by piece the entries go, are flushed, and the
//! object's frames are punched; then the announcement ends. Between the first and the last step a fault in the announced span
//! tries again; a later touch finds what was never touched: zero.
//!
//! The announced span is the hull of all pieces, so that a batch costs one grace period however scattered it is. The owner's
//! lock of the dirty logs keeps slots as they are meanwhile: a slot that appeared in between would not be in the hull.
//!
//! What is punched counts as written: it reads otherwise than before. The bits of every slot that shows the page and logs are
//! set; nobody clears them before the change is done, because the owner's lock is held.
//!
//! What relatives share stays theirs: punching a forked object gives back a reference and no more
//! ([`entresol_backing::Object::punch`]).
//!
//! # A guest may say what it likes
//!
//! Pages outside every slot, in a read-only slot, of a device or a ROM, or of an object that others hold too, are refused,
//! each by itself. Pages that stand in a block which no frame is free to split stay as they are. Work grows with the pages
//! named, not with what is behind them: the caller bounds a batch.
//!
//! Invariants: INV-3, INV-4, INV-7, INV-11. Lock order: dirty logs → notifier → object → pool; not called by a pinned CPU.
//!
//! Known hole: whether others hold an object is asked when its pages are punched; another machine's slot that is made later is
//! not seen (as in `share`).

use entresol_addr::{Gfn, GfnRange};
use entresol_backing::{Kind, Object, ObjectHandle, PunchError};
use entresol_machine::Machine;
use entresol_slot::{Hint, SlotRef};
use entresol_sync::Pin;
use entresol_table::Format;

use crate::TooMany;
use crate::vm::Vm;

/// What became of the pages of a batch. All others were taken, or backed nothing before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Discarded {
    /// Frames of content that the objects gave up.
    pub frames: u64,
    /// Pages that are not the guest's to give.
    pub refused: u64,
    /// Pages that stay, for want of a frame to split their block.
    pub kept: u64,
}

/// The memory is being forked, or too much is being invalidated: nothing was announced, or part of the batch is done. The same
/// batch may be tried again, unpinned in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy;

impl From<TooMany> for Busy {
    fn from(TooMany: TooMany) -> Self {
        Self
    }
}

/// Neighbouring pages in one slot.
pub(crate) struct Piece<'p> {
    pub slot: SlotRef,
    pub object: &'p Object,
    pub range: GfnRange,
}

impl Piece<'_> {
    /// The object's first frame.
    pub fn frame(&self) -> u64 {
        self.slot.object_frame(self.range.start())
    }
}

/// The smallest range that has both.
pub(crate) fn hull(one: GfnRange, other: GfnRange) -> GfnRange {
    let start = one.start().min(other.start());
    let end = one.end().max(other.end());
    GfnRange::new(start, end.since(start)).expect("between the ends of two ranges")
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// Gives the memory behind `ranges` back to the machine: it reads as zero from then on, and entries for it are gone. Not
    /// called by a pinned CPU; `cpu` is the one that the caller runs on.
    ///
    /// # Errors
    ///
    /// [`Busy`].
    pub fn discard(&self, cpu: usize, ranges: &[GfnRange]) -> Result<Discarded, Busy> {
        let (pool, epoch) = (&self.host.pool, &self.host.epoch);
        // Frames whose time is over may be what a split needs.
        pool.reap(epoch, cpu, usize::MAX);
        let _slots_stay = self.logs.owner();
        let mut outcome = Discarded::default();
        let Some(announced) = self.announced(cpu, ranges, &mut outcome) else { return Ok(outcome) };
        let invalidation = self.announce(announced)?;
        epoch.synchronize();
        let done = ranges.iter().try_for_each(|range| self.discard_range(cpu, *range, &mut outcome));
        self.notifier.end(invalidation);
        self.stats.invalidations.bump();
        pool.reap(epoch, cpu, usize::MAX);
        done.map(|()| outcome)
    }

    /// The hull of all places where this machine shows what `ranges` name; counts what is refused.
    fn announced(&self, cpu: usize, ranges: &[GfnRange], outcome: &mut Discarded) -> Option<GfnRange> {
        let pin = self.host.epoch.pin(cpu);
        let mut all: Option<GfnRange> = None;
        for range in ranges {
            let mut next = range.start();
            while next < range.end() {
                let Some(piece) = self.piece(&pin, next, range.end()) else {
                    outcome.refused += 1;
                    next = next.offset(1);
                    continue;
                };
                next = piece.range.end();
                let (frame, count) = (piece.frame(), piece.range.count());
                for shown in self.slots.mappings(&pin, piece.slot.object, frame, count) {
                    let shown = shown.guest_range(frame, count);
                    all = [all, shown].into_iter().flatten().reduce(hull);
                }
            }
        }
        all
    }

    /// The pages from `from` on, before `end`, that lie in one slot and may be taken; `None` if the first may not.
    pub(crate) fn piece<'p>(&'p self, pin: &'p Pin<'_>, from: Gfn, end: Gfn) -> Option<Piece<'p>> {
        let slot = self.slots.find(pin, from, &Hint::new()).filter(|slot| !slot.is_read_only())?;
        let handle = ObjectHandle::from_raw(slot.object.get());
        let object = self.host.objects.get(pin, handle)?;
        let Kind::Anonymous(_) = object.kind() else { return None };
        let shown = self.slots.mappings(pin, slot.object, 0, object.frames()).count();
        if self.host.objects.holds(handle) != u32::try_from(shown).ok() {
            return None;
        }
        let end = end.min(slot.range().end());
        Some(Piece { slot, object, range: GfnRange::new(from, end.since(from))? })
    }

    /// Takes what can be taken of `range`, which is announced.
    fn discard_range(&self, cpu: usize, range: GfnRange, outcome: &mut Discarded) -> Result<(), Busy> {
        let mut next = range.start();
        while next < range.end() {
            let pin = self.host.epoch.pin(cpu);
            match self.piece(&pin, next, range.end()) {
                Some(piece) => {
                    next = piece.range.end();
                    self.discard_piece(&pin, &piece, outcome)?;
                }
                None => next = next.offset(1),
            }
        }
        Ok(())
    }

    fn discard_piece(&self, pin: &Pin<'_>, piece: &Piece<'_>, outcome: &mut Discarded) -> Result<(), Busy> {
        let (frame, count) = (piece.frame(), piece.range.count());
        let mappings = || self.slots.mappings(pin, piece.slot.object, frame, count);
        for shown in mappings().filter_map(|slot| slot.guest_range(frame, count)) {
            self.unmap_pinned(shown);
        }
        // What was vacant reads as before.
        let machine = &self.host.machine;
        let holds =
            |frame| piece.object.is_resident(machine, frame) || piece.object.stored_at(machine, frame).is_some();
        for slot in mappings().filter(|slot| slot.logs_dirty()) {
            let Some(shown) = slot.guest_range(frame, count) else { continue };
            let pages = (0..shown.count()).map(|page| shown.start().offset(page));
            for gfn in pages.filter(|gfn| holds(slot.object_frame(*gfn))) {
                self.logs.mark(machine, pin.cpu(), &slot, gfn);
            }
        }
        match piece.object.punch(&self.host.supply(pin.cpu()), frame, count) {
            Ok(frames) => {
                outcome.frames += frames;
                self.stats.discarded.add(frames);
                Ok(())
            }
            Err(PunchError::OutOfMemory) => {
                outcome.kept += count;
                Ok(())
            }
            Err(PunchError::Forking) => Err(Busy),
            Err(PunchError::Kind { .. } | PunchError::Outside { .. }) => {
                unreachable!("a piece is anonymous memory, and a slot lies in its object")
            }
        }
    }
}
