//! A guest's access that the second stage permits reaches memory, and the data oracle hears of it.
//!
//! Protocol: the translation is judged first (INV-3, INV-7), then the access happens whole, then its value is judged
//! (INV-11, INV-13). Maintenance tells the oracle that both kinds of access agree on a line from now on, as far as the
//! operation promises that: a clean makes memory as new as the cache, and only with an invalidation is the cache as new as
//! memory.

use entresol_addr::Gpa;
use entresol_machine::{GRANULE, Word};

use super::operation::{Line, Operation, STAGE1_AF};
use super::vcpu::Attempt;
use crate::check::Check;
use crate::check::inv11::{Cleaned, Place, TAGS};
use crate::check::written::Page;
use crate::lab::Lab;
use crate::litmus::outcome::Value;
use crate::machine::walk::Translated;

/// The access reaches memory.
pub fn reach(lab: &mut Lab, attempt: &Attempt, found: &Translated) -> Value {
    let Attempt { walker, gpa, what, mmu_off } = *attempt;
    let by = |text: &str| format!("VM {} reached {gpa:#x} {text}, by frame {:#x}", walker.vm, found.pfn);
    if lab.records.any_at(walker.vm, gpa.frame()).is_none() {
        lab.found(Check::Inv3, Some(by("outside every slot")));
    }
    if lab.protected.iter().any(|(vm, range)| *vm == walker.vm && range.contains(gpa.frame())) {
        lab.found(Check::Inv3, Some(by("while it is being invalidated")));
    }
    match lab.world.frame(found.pfn).map(|frame| frame.taken) {
        // A device: it answers, and no cache is between.
        None => return if what.line().is_some() { Value::Done } else { Value::Word(0) },
        Some(false) => lab.found(Check::Inv7, Some(by("through a translation to a free frame"))),
        Some(true) => {}
    }
    let slot = lab.records.stable_at(walker.vm, gpa.frame(), lab.world.now());
    let read_only = slot.is_some_and(|slot| slot.refuses_stores());
    if what.stores() && read_only {
        lab.found(Check::Inv13, Some(by("with a store to a read-only slot")));
    }
    if let Operation::Maintain(line) = what {
        let begun = (!found.stale).then(|| begin_clean(lab, walker.vm, gpa, line)).flatten();
        maintain(lab, found, line);
        end_clean(lab, begun);
        return Value::Done;
    }
    let place = place(lab, walker.vm, gpa);
    let uncached = mmu_off && !lab.world.config.fwb;
    let page = page(lab, walker.vm, gpa);
    let access = Reaching { cpu: walker.cpu, found, word: word(found, gpa), place, page, read_only, mmu_off, uncached };
    access.perform(lab, what)
}

fn word(found: &Translated, gpa: Gpa) -> u16 {
    Word::new(found.pfn, (gpa.page_offset() / 8) as u16).index()
}

/// The word of an object behind a guest address, if one slot holds it and nobody is changing that.
pub fn place(lab: &Lab, vm: usize, gpa: Gpa) -> Option<Place> {
    let slot = lab.records.stable_at(vm, gpa.frame(), lab.world.now())?;
    let frame = slot.offset + gpa.frame().since(slot.range.start());
    Some(Place { object: slot.object, frame, word: (gpa.page_offset() / 8) as u16 })
}

/// The page at a guest address, for what is said of pages that are written.
pub fn page(lab: &Lab, vm: usize, gpa: Gpa) -> Page {
    let shown = place(lab, vm, gpa).map(|place| (place.object, place.frame));
    Page { vm, gfn: gpa.frame(), shown }
}

/// Maintenance of the line at `gpa` begins.
pub fn begin_clean(lab: &Lab, vm: usize, gpa: Gpa, line: Line) -> Option<Cleaned> {
    let place = place(lab, vm, gpa)?;
    match line {
        Line::Ivac | Line::Civac => Some(lab.oracle.begin_clean(place, true)),
        Line::Cvac => Some(lab.oracle.begin_clean(place, false)),
        // Promise nothing at the point of coherency.
        Line::Cvau | Line::Ivau => None,
    }
}

/// It is done.
pub fn end_clean(lab: &mut Lab, begun: Option<Cleaned>) {
    if let Some(begun) = begun {
        lab.oracle.end_clean(&begun);
    }
}

/// The hardware's part of maintenance that did not trap: whole at once, its barrier included.
fn maintain(lab: &mut Lab, found: &Translated, line: Line) {
    let now = lab.world.now();
    let frame = lab.world.frame_mut(found.pfn);
    match line {
        Line::Ivac | Line::Civac => {
            let cleaning = frame.begin_clean();
            frame.end_clean(cleaning);
        }
        Line::Cvac => frame.clean(),
        // Instruction fetches of this model read through the data cache: there is nothing between it and unification.
        Line::Cvau => {}
        Line::Ivau => frame.end_icache(now),
    }
}

/// An access to memory that is no maintenance.
struct Reaching<'a> {
    cpu: usize,
    found: &'a Translated,
    word: u16,
    place: Option<Place>,
    page: Page,
    /// What is stored is no content of the object.
    read_only: bool,
    mmu_off: bool,
    uncached: bool,
}

impl Reaching<'_> {
    fn perform(&self, lab: &mut Lab, what: Operation) -> Value {
        match what {
            Operation::Load | Operation::Walk(_) | Operation::Fetch => {
                Value::Word(self.read(lab, what == Operation::Fetch))
            }
            Operation::Store(value) => {
                self.write(lab, value);
                Value::Word(value)
            }
            Operation::Update(_) => {
                let descriptor = self.read(lab, false) | STAGE1_AF;
                self.write(lab, descriptor);
                Value::Word(descriptor)
            }
            Operation::LoadExclusive => {
                let value = self.read(lab, false);
                lab.monitors[self.cpu] = Some((self.found.pfn, lab.world.frame_mut(self.found.pfn).stores()));
                Value::Word(value)
            }
            Operation::StoreExclusive(value) => {
                let now = (self.found.pfn, lab.world.frame_mut(self.found.pfn).stores());
                let watched = lab.monitors[self.cpu].take() == Some(now);
                if watched {
                    self.write(lab, value);
                }
                Value::Word(u64::from(!watched))
            }
            Operation::LoadTag => Value::Word(self.load_tag(lab).into()),
            Operation::StoreTag(tag) => {
                self.store_tag(lab, tag);
                Value::Word(tag.into())
            }
            Operation::Maintain(_) => unreachable!("done before"),
        }
    }

    /// Where the granule's tag is content, if the access has a tag at all (Arm DDI 0487 D10.2: memory that is not tagged reads
    /// as 0, and stores to it do nothing).
    fn tag(&self, lab: &Lab) -> Option<(usize, Option<Place>)> {
        let granule = self.word * 8 / GRANULE as u16;
        let tagged = lab.world.config.tags && !self.mmu_off;
        tagged.then(|| (granule.into(), self.place.map(|place| Place { word: TAGS + granule, ..place })))
    }

    fn load_tag(&self, lab: &mut Lab) -> u8 {
        let Some((granule, place)) = self.tag(lab) else { return 0 };
        let tag = lab.world.frame_mut(self.found.pfn).tags.get(granule);
        let wrong = place.and_then(|place| lab.oracle.judge(place, tag.into(), false));
        lab.found(Check::Inv12, wrong);
        tag
    }

    fn store_tag(&self, lab: &mut Lab, tag: u8) {
        let Some((granule, place)) = self.tag(lab) else { return };
        lab.world.frame_mut(self.found.pfn).tags.set(granule, tag);
        if let Some(place) = place.filter(|_| !self.read_only) {
            lab.oracle.store(place, (tag & 0xf).into(), false, true);
            lab.written.wrote(&self.page, None);
        }
    }

    fn read(&self, lab: &mut Lab, fetch: bool) -> u64 {
        let (pfn, word, uncached) = (self.found.pfn, self.word, self.uncached);
        let value = lab.machine(|world, pick| {
            let frame = world.frame_mut(pfn);
            match (fetch, uncached) {
                (true, _) => frame.fetch(word, pick),
                (false, true) => frame.read_uncached(word, pick),
                (false, false) => frame.read(word, pick),
            }
        });
        if let Some(place) = self.place {
            let wrong = lab.oracle.judge(place, value, uncached);
            lab.found(Check::Inv11, wrong);
        }
        value
    }

    fn write(&self, lab: &mut Lab, value: u64) {
        let (pfn, word, uncached) = (self.found.pfn, self.word, self.uncached);
        let (fwb, now) = (lab.world.config.fwb, lab.world.now());
        lab.machine(|world, pick| {
            let frame = world.frame_mut(pfn);
            if uncached { frame.write_uncached(word, value, pick) } else { frame.write(word, value, false, now, pick) }
        });
        if let Some(place) = self.place.filter(|_| !self.read_only) {
            lab.oracle.store(place, value, uncached, fwb);
            lab.written.wrote(&self.page, None);
        }
    }
}
