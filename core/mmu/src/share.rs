//! Faults on memory that relatives share: read-only entries, and copies on write.
//!
//! # Protocol
//!
//! What is shared never changes, so an entry that shows it is never wrong about bytes; it can only be out of date, when
//! this machine's object has a copy by now. Two rules keep such entries from lasting, without a lock and without waiting:
//!
//! - *Who reads* installs only where nothing is, and after publishing looks at the object again; if it has something
//!   else by now, the entry goes again.
//! - *Who writes* gets its own page from the object ([`entresol_backing::Object::own`]), and only then, behind a full
//!   barrier, puts it into every place where this machine shows that part of the object, over whatever is there, break
//!   before make. What cannot be put is taken away.
//!
//! Either the writer finds the reader's entry, or the reader finds the writer's page. And since a reader never replaces
//! anything, no entry of the old page appears after the writer's store has been made.
//!
//! The old page is let go of by `own`, but it is freed only after a grace period, and the writer is pinned until the flush
//! of its entry is complete (INV-7). The new page is cleaned before it is shown, as every page is (INV-1): one trap (D4).
//!
//! Around a fault on what is shared other pages that are present are mapped too (D3): after a fork the tables are empty,
//! and a trap for each page would cost more than the fork saved. They are read-only where they are shared.
//!
//! Changes from elsewhere (merging, swapping, another machine) use the notifier: [`Vm::invalidate_range_start`], the change,
//! [`Vm::change`] if the new page is to be there at once, [`Vm::invalidate_range_end`]. [`Vm::unshare`] does the same for a
//! guest's own write, on demand.
//!
//! Invariants: INV-1, INV-2, INV-3, INV-7, INV-11, INV-15 (whoever retries lost to a copy or to an invalidation).
//!
//! Known hole: an object that is forked and shown by several machines is copied for the one that writes; the others' entries
//! are not known here. [`Vm::fork`] refuses such objects, but a slot of another machine may be made afterwards.

use entresol_addr::{Gfn, GfnRange, Gpa, PageSize};
use entresol_backing::{Grant, GrantError, Object, ObjectHandle};
use entresol_fault::{Access, Cause, Fault};
use entresol_machine::Machine;
use entresol_slot::{Hint, ObjectId, SlotRef};
use entresol_sync::Pin;
use entresol_sync::atomic::{Ordering, fence};
use entresol_table::{Format, MapError, Reserve};

use crate::mapping::{Mapping, choose};
use crate::notifier::Sample;
use crate::outcome::Outcome;
use crate::vm::Vm;
use crate::{CopyError, Invalidation};

/// The fault of an access that is made for the guest.
pub(crate) fn made(gfn: Gfn, access: Access) -> Fault {
    Fault {
        gpa: gfn.base(),
        access,
        cause: Cause::Translation,
        stage1_walk: false,
        cache_maintenance: false,
        transfer: None,
        syndrome: 0,
    }
}

/// What one entry was made for: where, and what the object had.
struct Published {
    gfn: Gfn,
    frame: u64,
    grant: Grant,
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// The slot at `gfn` and its object.
    fn behind<'p>(&'p self, pin: &'p Pin<'_>, gfn: Gfn) -> Option<(SlotRef, &'p Object)> {
        let slot = self.slots.find(pin, gfn, &Hint::new())?;
        let object = self.host.objects.get(pin, ObjectHandle::from_raw(slot.object.get()))?;
        Some((slot, object))
    }

    /// A write to what relatives share.
    #[cold]
    #[inline(never)]
    pub(crate) fn copy_on_write(&self, pin: &Pin<'_>, fault: &Fault) -> Outcome {
        if self.switches.forces_notifier() {
            return Outcome::Unshare;
        }
        let sample = self.notifier.sample();
        let Some((slot, object)) = self.behind(pin, fault.gfn()) else {
            return self.retry();
        };
        let frame = slot.object_frame(fault.gfn());
        let grant = match object.own(&self.host.supply(pin.cpu()), frame) {
            Ok(grant) => grant,
            Err(error) => return self.no_grant(pin, fault, error),
        };
        self.stats.copied.bump();
        self.show_own(pin, sample, slot.object, frame, &grant, Some(fault))
    }

    /// Puts what the object has of its own by now wherever this machine shows its frame `frame`. The fault, if there is one,
    /// says what its own entry is for.
    fn show_own(
        &self,
        pin: &Pin<'_>,
        sample: Sample,
        object: ObjectId,
        frame: u64,
        grant: &Grant,
        fault: Option<&Fault>,
    ) -> Outcome {
        // The page is the object's before the tables are looked at: who reads does it the other way round.
        fence(Ordering::SeqCst);
        let mut outcome = Outcome::Resume;
        for slot in self.slots.mappings(pin, object, frame, 1) {
            let Some(shown) = slot.guest_range(frame, 1) else { continue };
            let gfn = shown.start();
            let fault = fault.filter(|fault| fault.gfn() == gfn).copied().unwrap_or(made(gfn, Access::Read));
            outcome = self.put_own(pin, sample, &fault, grant);
            if outcome != Outcome::Resume {
                break;
            }
        }
        let gone = if outcome == Outcome::Resume { grant.size.frames() > 1 } else { true };
        if gone {
            self.take_away(pin, object, grant);
        }
        outcome
    }

    /// Puts what the object has of its own at one place.
    fn put_own(&self, pin: &Pin<'_>, sample: Sample, fault: &Fault, grant: &Grant) -> Outcome {
        // A slot that is being withdrawn is still among the mappings, but not among those that are found.
        let Some(slot) = self.slots.find(pin, fault.gfn(), &Hint::new()) else {
            return self.retry();
        };
        let features = self.host.features();
        let mapping = choose(&slot, grant, fault, self.options.largest, features);
        if self.notifier.moved(sample, mapping.range()) || !self.slots.is_current(&slot, pin) {
            return self.retry();
        }
        if slot.logs_dirty() {
            return self.publish_logged(pin, &slot, fault, &mapping);
        }
        self.map_surely(pin.cpu(), &mapping, features, true)
    }

    /// Takes away every entry of this machine that shows another page than `grant` where the object has it now.
    fn take_away(&self, pin: &Pin<'_>, object: ObjectId, grant: &Grant) {
        let count = grant.size.frames();
        for slot in self.slots.mappings(pin, object, grant.extent_start, count) {
            let Some(range) = slot.guest_range(grant.extent_start, count) else { continue };
            let machine = &self.host.machine;
            let stale = |gfn: Gfn, leaf: entresol_table::Leaf| {
                let gfn = if gfn < range.start() { range.start() } else { gfn };
                leaf.frame_of(gfn) != grant.frame(slot.object_frame(gfn))
            };
            let mut found = false;
            self.table.visit(machine, range, |gfn, leaf| found |= stale(gfn, leaf));
            if found {
                self.unmap_pinned(range);
            }
        }
    }

    /// An entry for what may only be read.
    #[cold]
    #[inline(never)]
    pub(crate) fn map_read_only(&self, pin: &Pin<'_>, fault: &Fault) -> Outcome {
        self.stats.translation.bump();
        let sample = self.notifier.sample();
        let Some((slot, object)) = self.behind(pin, fault.gfn()) else {
            return self.retry();
        };
        let frame = slot.object_frame(fault.gfn());
        let grant = match object.grant(&self.host.supply(pin.cpu()), frame, false) {
            Ok(grant) if grant.writable => return self.retry(),
            Ok(grant) => grant,
            Err(error) => return self.no_grant(pin, fault, error),
        };
        let features = self.host.features();
        let largest = if slot.logs_dirty() { PageSize::Size4K } else { self.options.largest };
        let mut mapping = choose(&slot, &grant, fault, largest, features);
        if self.notifier.moved(sample, mapping.range()) || !self.slots.is_current(&slot, pin) {
            return self.retry();
        }
        let mut outcome = self.map_surely(pin.cpu(), &mapping, features, false);
        if outcome == Outcome::Retry && mapping.leaf.size != PageSize::Size4K {
            // Where a table is in the block's place, which may be there for ever, the page alone.
            mapping = choose(&slot, &grant, fault, PageSize::Size4K, features);
            outcome = self.map_surely(pin.cpu(), &mapping, features, false);
        }
        if outcome == Outcome::Resume && !self.holds(pin, object, &Published { gfn: fault.gfn(), frame, grant }) {
            return self.retry();
        }
        if outcome == Outcome::Resume {
            self.map_around(pin, fault.gfn(), &slot, object, sample);
        }
        outcome
    }

    /// Whether what was published is still what the object has; if not, it is taken away.
    fn holds(&self, pin: &Pin<'_>, object: &Object, published: &Published) -> bool {
        fence(Ordering::SeqCst);
        let Published { gfn, frame, grant } = published;
        let holds = object.is_still(&self.host.supply(pin.cpu()), *frame, grant);
        if !holds {
            self.unmap_pinned(GfnRange::block(*gfn, PageSize::Size4K));
        }
        holds
    }

    /// Maps what is present around `gfn`, as long as that needs no table. What fails is left to its own fault.
    pub(crate) fn map_around(&self, pin: &Pin<'_>, gfn: Gfn, slot: &SlotRef, object: &Object, sample: Sample) {
        let span = self.switches.around();
        let first = gfn.get() & !(span - 1);
        let window = GfnRange::new(Gfn::new(first), span).and_then(|span| span.intersect(slot.range()));
        let Some(window) = window.filter(|window| window.count() > 1 && !self.notifier.moved(sample, *window)) else {
            return;
        };
        let features = self.host.features();
        for near in (0..window.count()).map(|offset| window.start().offset(offset)).filter(|near| *near != gfn) {
            let frame = slot.object_frame(near);
            let Some(grant) = object.present(&self.host.supply(pin.cpu()), frame) else { continue };
            let mapping = choose(slot, &grant, &made(near, Access::Read), PageSize::Size4K, features);
            // Where writes are logged nothing becomes writable but by a write (INV-4).
            let mapping = if slot.logs_dirty() { mapping.read_only() } else { mapping };
            match self.try_map(&mapping, features, &mut Reserve::new(), false) {
                Ok(mapped) => {
                    let _ = self.installed(mapped);
                    self.stats.around.bump();
                    if !grant.writable {
                        self.holds(pin, object, &Published { gfn: near, frame, grant });
                    }
                }
                Err(MapError::NoTable { .. }) => return,
                Err(_) => {}
            }
        }
    }

    /// Before the hypervisor writes a page for the guest: makes it the object's own, and shown as that.
    pub(crate) fn own_for_write(
        &self,
        pin: &Pin<'_>,
        slot: &SlotRef,
        object: &Object,
        gpa: Gpa,
    ) -> Result<(), CopyError> {
        let frame = slot.object_frame(gpa.frame());
        loop {
            let sample = self.notifier.sample();
            let grant = match object.own(&self.host.supply(pin.cpu()), frame) {
                Ok(grant) => grant,
                Err(GrantError::Busy) => {
                    entresol_sync::hint::spin_loop();
                    continue;
                }
                Err(GrantError::OutOfMemory) => return Err(CopyError::OutOfMemory),
                Err(GrantError::ReadOnly) => return Err(CopyError::ReadOnly { gpa }),
                Err(GrantError::Outside { .. }) => return Err(CopyError::Outside { gpa }),
                Err(GrantError::Stored { slot }) => return Err(CopyError::Absent { gpa, slot }),
                Err(GrantError::Poisoned) => return Err(CopyError::Poisoned { gpa }),
                Err(GrantError::Forking | GrantError::Shared) => return Err(CopyError::Busy),
            };
            return match self.show_own(pin, sample, slot.object, frame, &grant, None) {
                Outcome::Resume => Ok(()),
                Outcome::Exit(_) => Err(CopyError::OutOfMemory),
                _ => Err(CopyError::Busy),
            };
        }
    }

    /// In an invalidation, after the backing has changed: installs what the object has now at `gfn`, read-only, cleaned
    /// first, in the largest size that lies in the invalidated range. Whether it did; if not, the next access brings the
    /// entry.
    pub fn change(&self, pin: &Pin<'_>, invalidation: &Invalidation, gfn: Gfn) -> bool {
        let Some((slot, object)) = self.behind(pin, gfn).filter(|_| invalidation.range().contains(gfn)) else {
            return false;
        };
        let Some(grant) = object.present(&self.host.supply(pin.cpu()), slot.object_frame(gfn)) else {
            return false;
        };
        let grant = Grant { writable: false, ..grant };
        let features = self.host.features();
        let fits = |mapping: &Mapping| invalidation.range().covers(mapping.range());
        let largest = if slot.logs_dirty() { PageSize::Size4K } else { self.options.largest };
        let sizes = [largest, PageSize::Size2M, PageSize::Size4K].into_iter().filter(|size| *size <= largest);
        let mapping = sizes.map(|size| choose(&slot, &grant, &made(gfn, Access::Read), size, features)).find(fits);
        let Some(mapping) = mapping else { return false };
        if !self.notifier.is_alone(invalidation, mapping.range()) || !self.slots.is_current(&slot, pin) {
            return false;
        }
        let installed = self.map_surely(pin.cpu(), &mapping, features, false) == Outcome::Resume;
        if installed {
            self.stats.changed.bump();
        }
        installed
    }

    /// Breaks the sharing of the page at `gpa` as a change from elsewhere would: the copy is filled, the range is
    /// invalidated, the object changes, the new page is installed read-only, the invalidation ends. The guest then tries
    /// again. Not called by a pinned CPU; `cpu` is the one that the caller runs on.
    pub fn unshare(&self, cpu: usize, gpa: Gpa) -> Outcome {
        let gfn = gpa.frame();
        let supply = self.host.supply(cpu);
        let ahead = {
            let pin = self.host.epoch.pin(cpu);
            let Some((slot, object)) = self.behind(&pin, gfn) else {
                return self.retry();
            };
            match object.copy_ahead(&supply, slot.object_frame(gfn)) {
                Ok(ahead) => ahead,
                Err(error) => return self.no_grant(&pin, &made(gfn, Access::Write), error),
            }
        };
        let started = self.invalidate_range_start(cpu, GfnRange::block(gfn, PageSize::Size4K));
        let pin = self.host.epoch.pin(cpu);
        let behind = self.behind(&pin, gfn).filter(|_| started.is_ok());
        let owned = match behind {
            Some((slot, object)) => {
                object.own_with(&supply, slot.object_frame(gfn), ahead).map(|own| (slot.object, own))
            }
            None => {
                ahead.give_back(&supply);
                Err(GrantError::Busy)
            }
        };
        let Ok(invalidation) = started else {
            return self.retry();
        };
        if let Ok((object, grant)) = &owned {
            self.stats.copied.bump();
            fence(Ordering::SeqCst);
            self.change(&pin, &invalidation, gfn);
            // Of other places, and of the rest of a block, what shows the old pages goes.
            self.take_away(&pin, *object, grant);
        }
        self.invalidate_range_end(invalidation);
        match owned {
            Ok(_) => self.retry(),
            Err(error) => self.no_grant(&pin, &made(gfn, Access::Write), error),
        }
    }
}
