//! Carrying out what a scan has planned, or what an owner asks for two pages that it knows.
//!
//! Protocol, for at most 512 frames of one object of the machine:
//! 1. forks and slot updates are offered out; the object is shown by this machine alone, at a few places;
//! 2. `invalidate_range_start` for each place: no translation is left, no fault makes one, and whoever was writing for the
//!    guest has finished;
//! 3. page by page: bytes and tags are compared, and the object's word is exchanged ([`Object::join`], [`Object::vacate`]), or
//!    marked ([`Object::keep`]);
//! 4. `invalidate_range_end`. The next access brings an entry, clean, read-only where the page is shared.
//!
//! The frames that became free are deferred in step 3, after the flush of step 2, so no translation reaches them.

use entresol_addr::{GfnRange, Gpa};
use entresol_backing::{Merged, Object, ObjectHandle, Offered, Span};
use entresol_machine::Machine;
use entresol_slot::{Hint, ObjectId};
use entresol_sync::planted;
use entresol_table::Format;

use super::{SPAN, Scan};
use crate::vm::Vm;
use crate::{InvalidateError, Invalidation};

/// Places at which a machine may show memory that is merged.
const PLACES: usize = 4;

/// What shall happen to one page.
pub(super) enum Action {
    /// Nothing.
    Leave,
    /// It is never written again, and others may join it.
    Offer,
    /// It joins that one, if it has its bytes.
    Join(Offered),
    /// It becomes vacant, if it is all zeros.
    Vacate,
}

impl Action {
    pub(super) fn is_some(&self) -> bool {
        !matches!(self, Self::Leave)
    }
}

/// Why two pages were not merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeRefusal {
    /// No page of memory that can be merged is there.
    NoPage {
        /// Where.
        gpa: Gpa,
    },
    /// They have other bytes or tags, or one of them is not what it was any more.
    Differs,
    /// Another machine shows the memory too, or this one at too many places; or an invalidation stands in the way.
    Shown,
}

impl From<InvalidateError> for MergeRefusal {
    fn from(_: InvalidateError) -> Self {
        Self::Shown
    }
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// Makes the page at `gpa` one with that of `other` at `other_gpa`, if both have the same bytes and tags: for an owner
    /// who knows of them. Both take part in merging. Not called by a pinned CPU; `cpu` is the one that the caller runs on.
    ///
    /// # Errors
    ///
    /// [`MergeRefusal`]; what the guests read did not change.
    pub fn merge_pages(&self, cpu: usize, gpa: Gpa, other: &Self, other_gpa: Gpa) -> Result<(), MergeRefusal> {
        let (source, source_frame) = other.page_behind(cpu, other_gpa)?;
        let (object, frame) = self.page_behind(cpu, gpa)?;
        // It may have been offered before: then there is nothing to do.
        other.apply(cpu, source, source_frame, &mut [Action::Offer])?;
        let offered = {
            let pin = self.host.epoch.pin(cpu);
            let found = self.host.objects.get(&pin, source);
            found.and_then(|source| source.hold_offered(&self.host.supply(cpu), source_frame))
        };
        let offered = offered.ok_or(MergeRefusal::NoPage { gpa: other_gpa })?;
        let done = self.apply(cpu, object, frame, &mut [Action::Join(offered)])?;
        if done.joined == 1 { Ok(()) } else { Err(MergeRefusal::Differs) }
    }

    fn page_behind(&self, cpu: usize, gpa: Gpa) -> Result<(ObjectHandle, u64), MergeRefusal> {
        let pin = self.host.epoch.pin(cpu);
        let slot = self.slots.find(&pin, gpa.frame(), &Hint::new()).ok_or(MergeRefusal::NoPage { gpa })?;
        Ok((ObjectHandle::from_raw(slot.object.get()), slot.object_frame(gpa.frame())))
    }

    /// Carries out `actions` for the frames of `object` from `start` on. What is not done is given back.
    pub(super) fn apply(
        &self,
        cpu: usize,
        object: ObjectHandle,
        start: u64,
        actions: &mut [Action],
    ) -> Result<Scan, MergeRefusal> {
        if planted!(ZG3) {
            self.compare_early(cpu, object, start, actions);
        }
        let _forking = self.forking.lock();
        let _slots = self.logs.owner();
        let withheld = self.withhold(cpu, object, start, actions.len() as u64);
        let mut done = Scan::default();
        if withheld.is_ok() && self.prepare_block(cpu, object, start, actions, &mut done) {
            for (frame, action) in (start..).zip(&mut *actions) {
                self.carry_out(cpu, object, frame, core::mem::replace(action, Action::Leave), &mut done);
            }
        }
        let supply = self.host.supply(cpu);
        for action in actions {
            if let Action::Join(offered) = core::mem::replace(action, Action::Leave) {
                offered.give_back(&supply);
            }
        }
        withheld?.into_iter().flatten().for_each(|invalidation| self.invalidate_range_end(invalidation));
        self.stats.merge_offered.add(done.offered);
        self.stats.merge_joined.add(done.joined);
        self.stats.merge_vacated.add(done.vacated);
        self.stats.merge_broken.add(done.broken);
        Ok(done)
    }

    /// Steps 1 and 2.
    fn withhold(
        &self,
        cpu: usize,
        object: ObjectHandle,
        start: u64,
        count: u64,
    ) -> Result<[Option<Invalidation>; PLACES], MergeRefusal> {
        let ranges = self.shown_at(cpu, object, start, count).ok_or(MergeRefusal::Shown)?;
        let mut withheld = [const { None }; PLACES];
        for (place, range) in withheld.iter_mut().zip(ranges.into_iter().flatten()) {
            match self.invalidate_range_start(cpu, range) {
                Ok(invalidation) => *place = Some(invalidation),
                Err(error) => {
                    withheld.into_iter().flatten().for_each(|invalidation| self.invalidate_range_end(invalidation));
                    return Err(error.into());
                }
            }
        }
        Ok(withheld)
    }

    /// Where this machine shows these frames; `None` if it is not alone, or at too many places. Slot updates are offered out.
    fn shown_at(&self, cpu: usize, object: ObjectHandle, start: u64, count: u64) -> Option<[Option<GfnRange>; PLACES]> {
        let pin = self.host.epoch.pin(cpu);
        let id = ObjectId::new(object.raw());
        let slots = self.slots.iter(&pin).filter(|slot| slot.object == id).count();
        if self.host.objects.holds(object) != Some(slots as u32) {
            return None;
        }
        let mut ranges = [None; PLACES];
        let mut used = 0;
        for slot in self.slots.mappings(&pin, id, start, count) {
            let Some(range) = slot.guest_range(start, count) else { continue };
            *ranges.get_mut(used)? = Some(range);
            used += 1;
        }
        Some(ranges)
    }

    fn with_object<T>(&self, cpu: usize, object: ObjectHandle, act: impl FnOnce(&Object) -> T) -> Option<T> {
        let pin = self.host.epoch.pin(cpu);
        self.host.objects.get(&pin, object).map(act)
    }

    /// A block among the frames becomes pages, or vacant as a whole. `false` if no frame is there for that.
    fn prepare_block(
        &self,
        cpu: usize,
        object: ObjectHandle,
        start: u64,
        actions: &mut [Action],
        done: &mut Scan,
    ) -> bool {
        let supply = self.host.supply(cpu);
        let whole = start.is_multiple_of(SPAN) && actions.len() as u64 == SPAN;
        let zeros = whole && actions.iter().all(|action| matches!(action, Action::Vacate));
        if zeros && self.with_object(cpu, object, |object| object.vacate_block(&supply, start)) == Some(Merged::Done) {
            actions.fill_with(|| Action::Leave);
            done.vacated += SPAN;
            return true;
        }
        let is_block = |object: &Object| object.span(supply.machine, start & !(SPAN - 1)) == Span::Block;
        if self.with_object(cpu, object, is_block) != Some(true) {
            return true;
        }
        let broken = self.with_object(cpu, object, |object| object.break_block(&supply, start));
        done.broken += u64::from(broken == Some(Ok(true)));
        matches!(broken, Some(Ok(_)))
    }

    /// Step 3 for one page, pinned for no longer than that.
    fn carry_out(&self, cpu: usize, object: ObjectHandle, frame: u64, action: Action, done: &mut Scan) {
        let supply = self.host.supply(cpu);
        let pin = self.host.epoch.pin(cpu);
        let Some(object) = self.host.objects.get(&pin, object) else {
            if let Action::Join(offered) = action {
                offered.give_back(&supply);
            }
            return;
        };
        let counted = |outcome: Merged| {
            if outcome == Merged::Differs {
                self.stats.merge_differed.bump();
            }
            u64::from(outcome == Merged::Done)
        };
        match action {
            Action::Leave => {}
            Action::Offer => done.offered += u64::from(object.offer(&supply, frame)),
            Action::Join(offered) => done.joined += counted(object.join(&supply, frame, offered)),
            Action::Vacate => done.vacated += counted(object.vacate(&supply, frame)),
        }
    }

    /// Z-G3: the comparison, where it is too early.
    #[cold]
    fn compare_early(&self, cpu: usize, object: ObjectHandle, start: u64, actions: &mut [Action]) {
        let supply = self.host.supply(cpu);
        for (frame, action) in (start..).zip(actions) {
            let Action::Join(offered) = action else { continue };
            let equal = self.with_object(cpu, object, |object| object.reads_as(&supply, frame, offered));
            if equal != Some(true)
                && let Action::Join(offered) = core::mem::replace(action, Action::Leave)
            {
                offered.give_back(&supply);
            }
        }
    }
}
