//! Frames that are found to be bad: the change from elsewhere that takes one away from everybody at once.
//!
//! # Protocol
//!
//! By the owner, unpinned:
//! 1. [`Vm::poison`] of the machine in whose memory the page is: the frame behind it is marked, for all objects that have it
//!    ([`entresol_backing::Object::poison`]); a grace period, so that who was granted the frame before has published what it made of that;
//! 2. [`Vm::withdraw`] of every machine there is: entries that reach the frame go and are flushed, page-frame caches know nothing
//!    of it any more. Their leases die with the frame: nobody releases them;
//! 3. [`Poisoned::finish`]: a grace period, so that who uses the frame by what a cache, an entry or an object said before has stopped;
//!    then the frame is sealed ([`entresol_backing::FramePool::seal`]).
//!
//! There is no way from a frame to who shows it: relatives and strangers that merging made one do not know each other. So step 2 looks
//! at all entries, machine after machine, a GiB at a time. It needs no notifier, because the mark outlasts it: no entry for the frame comes
//! after step 1, on machines that are made meanwhile neither. It moves the notifier for who keeps frames ([`crate::Kept`]).
//!
//! # What it looks like afterwards
//!
//! A guest's touch of such a page is a synchronous external abort; a copy for a device, a cache or the owner ends with
//! [`CopyError::Poisoned`](crate::CopyError::Poisoned), also one that would write all of the page. Machines that share the frame see the same, each where it has it.
//! A page that is given back ([`Vm::discard`]) is fresh and zero when it is touched again; the frame is in quarantine for good. Forks share
//! the bad page, merging skips it, swap leaves it, a conversion changes its attribute only. Logs do not name it: who reads it for
//! another machine is told.
//!
//! Invariants: INV-3, INV-7, INV-10. Lock order: fork → as [`crate::discard`].

use core::fmt;

use entresol_addr::{Gfn, GfnRange, Gpa, PageSize, Pfn};
use entresol_backing::{ObjectHandle, PoisonError as ObjectError};
use entresol_machine::Machine;
use entresol_slot::Hint;
use entresol_sync::planted;
use entresol_table::Format;

use crate::Host;
use crate::vm::Vm;

/// Entries that are taken away between two looks.
const AT_ONCE: usize = 32;
/// Guest frames that are looked at in one pin.
const IN_ONE_PIN: u64 = PageSize::Size1G.frames();

/// Why no frame became bad. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoisonError {
    /// No slot there, or its object is gone.
    Outside,
    /// What is there has no frame that could be given up.
    Object(ObjectError),
}

impl fmt::Display for PoisonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outside => f.write_str("must be memory"),
            Self::Object(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for PoisonError {}

/// A frame that is marked as bad, and that entries may reach still.
#[must_use = "a frame that is marked and not finished may still be used"]
#[derive(Debug, PartialEq, Eq)]
pub struct Poisoned {
    pfn: Pfn,
}

impl Poisoned {
    /// The frame.
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// Every machine has withdrawn it: nobody uses it when this returns. Not called by a pinned CPU.
    pub fn finish<M: Machine>(self, host: &Host<M>) -> Pfn {
        host.epoch.synchronize();
        host.pool.seal(&host.machine, self.pfn);
        self.pfn
    }
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// The frame behind the page at `gpa` is bad from now on. Not called by a pinned CPU; `cpu` is the one that the caller runs on.
    ///
    /// # Errors
    ///
    /// [`PoisonError`].
    pub fn poison(&self, cpu: usize, gpa: Gpa) -> Result<Poisoned, PoisonError> {
        let pfn = {
            let pin = self.host.epoch.pin(cpu);
            let slot = self.slots.find(&pin, gpa.frame(), &Hint::new()).ok_or(PoisonError::Outside)?;
            let object = self.host.objects.get(&pin, ObjectHandle::from_raw(slot.object.get()));
            let object = object.ok_or(PoisonError::Outside)?;
            let marked = object.poison(&self.host.supply(cpu), slot.object_frame(gpa.frame()));
            marked.map_err(PoisonError::Object)?
        };
        if !planted!(ZD10) {
            self.host.epoch.synchronize();
        }
        Ok(Poisoned { pfn })
    }

    /// No entry of this machine reaches the frame when this returns, and no cache of it knows it. Not called by a pinned CPU; `cpu`
    /// is the one that the caller runs on.
    pub fn withdraw(&self, cpu: usize, poisoned: &Poisoned) {
        // A fork moves entries away before it has flushed them; who unmaps is pinned until the flush, and the last step waits for that.
        let _not_forking = self.forking.lock();
        let _slots_stay = self.logs.owner();
        let mut next = Gfn::new(0);
        while let Some(part) = self.shown_from(cpu, next) {
            while self.withdraw_some(cpu, part, poisoned.pfn) {}
            next = part.end();
            self.notifier.told(part);
        }
        self.caches.forget_frame(poisoned.pfn);
    }

    /// The part of a slot that comes first from `from` on. Slots stay.
    fn shown_from(&self, cpu: usize, from: Gfn) -> Option<GfnRange> {
        let pin = self.host.epoch.pin(cpu);
        let slot = self.slots.iter(&pin).find(|slot| slot.range().end() > from)?;
        let start = from.max(slot.range().start());
        GfnRange::new(start, slot.range().end().since(start).min(IN_ONE_PIN))
    }

    /// Takes entries of `range` away that reach `pfn`. Whether there may be more.
    fn withdraw_some(&self, cpu: usize, range: GfnRange, pfn: Pfn) -> bool {
        let pin = self.host.epoch.pin(cpu);
        let (mut found, mut count) = ([range.start(); AT_ONCE], 0);
        self.table.visit(&self.host.machine, range, |gfn, leaf| {
            let offset = pfn.since(leaf.pfn);
            if offset < leaf.size.frames() {
                if let Some(place) = found.get_mut(count) {
                    *place = gfn.offset(offset);
                }
                count += 1;
            }
        });
        for gfn in found.iter().take(count) {
            self.unmap_pinned(GfnRange::single(*gfn));
        }
        drop(pin);
        count > found.len()
    }
}
