//! One round over a machine's memory, in steps.

use entresol_addr::Hpa;
use entresol_backing::{Object, ObjectHandle, Span, Standing};
use entresol_machine::Machine;
use entresol_slot::ObjectId;
use entresol_table::Format;

use super::apply::Action;
use super::index::Location;
use super::{BREAK_AT, MergeError, SPAN, Scan, State};
use crate::vm::Vm;

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// The memory that the machine shows now takes part in merging, but for what cannot: devices, ROM, and what somebody else
    /// shows or holds too. Untouched memory
    /// reads as the zero page from then on. Until the machine ends. Not called by a pinned CPU; `cpu` is the one that the
    /// caller runs on.
    ///
    /// # Errors
    ///
    /// [`MergeError`].
    pub fn enable_merging(&self, cpu: usize) -> Result<(), MergeError> {
        let mut from = 0;
        while let Some((id, handle, frames)) = self.mergeable_slot(cpu, from) {
            self.host.merging.join(&self.host.pool, handle, frames)?;
            from = id + 1;
        }
        // A fault that found memory untouched before it took part has finished, and what it mapped goes.
        self.zap(cpu, self.everything())?;
        Ok(())
    }

    /// The first slot from number `from` on whose object can be merged; it takes part.
    fn mergeable_slot(&self, cpu: usize, from: u32) -> Option<(u32, ObjectHandle, u64)> {
        let pin = self.host.epoch.pin(cpu);
        let slots = self.slots.iter(&pin).filter(|slot| u32::from(slot.id) >= from);
        let found = slots.filter_map(|slot| {
            let handle = ObjectHandle::from_raw(slot.object.get());
            let object = self.host.objects.get(&pin, handle).filter(|object| object.can_merge())?;
            // Who else holds it may write it without looking at what is mapped here.
            let shown = self.slots.iter(&pin).filter(|other| other.object == slot.object).count();
            (self.host.objects.holds(handle) == Some(shown as u32)).then_some(())?;
            Some((u32::from(slot.id), handle, object))
        });
        let (id, handle, object) = found.min_by_key(|(id, _, _)| *id)?;
        object.take_part();
        Some((id, handle, object.frames()))
    }

    /// Scans on where the last call stopped, for about `budget` pages: the last span is finished. Not called by a pinned
    /// CPU; `cpu` is the one that the caller runs on.
    pub fn merge_scan(&self, cpu: usize, budget: u64) -> Scan {
        let mut state = self.host.merging.state.lock();
        let mut scan = Scan::default();
        for place in 0..state.areas.len() {
            if !self.shows(cpu, state.areas[place].object()) {
                continue;
            }
            while let Some(span) = self.next_span(cpu, &mut state, place) {
                if scan.cost() >= budget {
                    return self.scanned(scan);
                }
                self.scan_span(cpu, &mut state, place, span, &mut scan);
            }
        }
        state.areas.iter_mut().filter(|area| self.shows(cpu, area.object())).for_each(|area| area.next = 0);
        scan.round_over = true;
        self.scanned(scan)
    }

    fn scanned(&self, scan: Scan) -> Scan {
        self.stats.merge_scanned.add(scan.pages);
        scan
    }

    fn shows(&self, cpu: usize, object: ObjectHandle) -> bool {
        let pin = self.host.epoch.pin(cpu);
        let id = ObjectId::new(object.raw());
        self.slots.iter(&pin).any(|slot| slot.object == id)
    }

    /// The first frame of the next span that has something to merge, and whether it is a block.
    fn next_span(&self, cpu: usize, state: &mut State, place: usize) -> Option<(u64, bool)> {
        let area = &mut state.areas[place];
        let pin = self.host.epoch.pin(cpu);
        let object = self.host.objects.get(&pin, area.object())?;
        let limit = object.frames().min(Location::LIMIT);
        while area.next < limit {
            let start = area.next;
            match object.span(&self.host.machine, start) {
                Span::Nothing { next } => area.next = next,
                Span::Block => return Some((start, true)),
                Span::Pages => return Some((start, false)),
            }
        }
        None
    }

    /// Reads a span's pages, plans, and carries the plan out if it is worth it.
    fn scan_span(&self, cpu: usize, state: &mut State, place: usize, span: (u64, bool), scan: &mut Scan) {
        let (start, block) = span;
        let object = state.areas[place].object();
        state.areas[place].make_room(&self.host.supply(cpu), start);
        state.areas[place].next = start + SPAN;
        let mut planned = 0;
        for frame in start..start + SPAN {
            let action = self.plan_page(cpu, state, place, frame, scan);
            planned += usize::from(action.is_some());
            state.plan[(frame - start) as usize] = action;
        }
        if block && planned < BREAK_AT {
            self.drop_plan(cpu, state, place, start);
            return;
        }
        // Refused: what another machine shows too, or an invalidation stood in the way. The next round tries again.
        if planned != 0
            && let Ok(done) = self.apply(cpu, object, start, &mut state.plan)
        {
            scan.offered += done.offered;
            scan.joined += done.joined;
            scan.vacated += done.vacated;
            scan.broken += done.broken;
        }
    }

    /// The block stays whole. Who would have joined its pages looks for others.
    fn drop_plan(&self, cpu: usize, state: &mut State, place: usize, start: u64) {
        for (frame, action) in (start..).zip(&mut state.plan) {
            match core::mem::replace(action, Action::Leave) {
                Action::Leave | Action::Vacate => {}
                Action::Join(offered) => offered.give_back(&self.host.supply(cpu)),
                Action::Offer => {
                    let sum = state.areas[place].sum(&self.host.machine, frame);
                    state.index.forget(&self.host.machine, sum);
                }
            }
        }
    }

    /// What shall happen to one page; its sum goes where others find it.
    fn plan_page(&self, cpu: usize, state: &mut State, place: usize, frame: u64, scan: &mut Scan) -> Action {
        let machine = &self.host.machine;
        let pin = self.host.epoch.pin(cpu);
        let here = Location { object: state.areas[place].object(), frame };
        let Some(object) = self.host.objects.get(&pin, here.object) else { return Action::Leave };
        let standing = object.standing(&self.host.supply(cpu), frame);
        scan.looked += 1;
        let last = state.areas[place].sum(machine, frame);
        let sum = match standing {
            Standing::Other => return Action::Leave,
            // It cannot have changed since it was offered.
            Standing::Offered(_) if last != 0 => last,
            Standing::Own(pfn) | Standing::Offered(pfn) => {
                machine.read(Hpa::new(pfn.base().get()), &mut state.page);
                scan.pages += 1;
                let sum = state.sum(object.is_tagged().then(|| machine.load_tags(pfn)));
                state.areas[place].remember(machine, frame, sum);
                sum
            }
        };
        let stable = sum == last;
        let own = matches!(standing, Standing::Own(_));
        if state.zeros.contains(&sum) && own {
            return if stable { Action::Vacate } else { Action::Leave };
        }
        let Some(found) = state.index.find(machine, sum) else {
            state.index.insert(&self.host.supply(cpu), sum, here);
            return Action::Leave;
        };
        if found.location == here {
            state.index.confirm(machine, &found, sum);
            return if found.wanted && stable && own { Action::Offer } else { Action::Leave };
        }
        if !own {
            return Action::Leave;
        }
        let partner = self.host.objects.get(&pin, found.location.object);
        match partner.map(|partner| self.partner(cpu, partner, found.location.frame)) {
            Some(Partner::Offered(offered)) => {
                state.index.confirm(machine, &found, sum);
                if stable {
                    return Action::Join(offered);
                }
                offered.give_back(&self.host.supply(cpu));
            }
            Some(Partner::Own) => state.index.want(machine, &found, true),
            // It is gone, or as many pages have joined it as may: this one is found from now on.
            Some(Partner::None) | None => state.index.replace(machine, found, sum, here),
        }
        Action::Leave
    }

    fn partner(&self, cpu: usize, object: &Object, frame: u64) -> Partner {
        let supply = self.host.supply(cpu);
        match object.standing(&supply, frame) {
            Standing::Own(_) => Partner::Own,
            Standing::Offered(_) => object.hold_offered(&supply, frame).map_or(Partner::None, Partner::Offered),
            Standing::Other => Partner::None,
        }
    }
}

/// The page that the index names for a sum.
enum Partner {
    /// It can be joined.
    Offered(entresol_backing::Offered),
    /// It may still be written.
    Own,
    /// It cannot be joined.
    None,
}
