//! What dirty logs, dirty rings and differences of relatives name is what was written: nothing is missed, and nothing else
//! is named ("Dirty tracking" of the specification; D2).
//!
//! Purpose: the lab knows of each page whether a write to it has begun and whether one is done. Whatever names pages is held
//! between the two: it names at least those that were written before it was asked and have not been named since, and at
//! most those that somebody has begun to write. When all scripts have ended the two are one, and every way of asking names
//! the same pages.
//!
//! Watches each answer, and the end of a schedule. A write that is done before an answer returns is covered by that answer,
//! because the owner copies a page after it is named. A ring's entry covers what is written until it is reset.

use std::collections::{BTreeMap, BTreeSet};

use entresol_addr::{Gfn, GfnRange};

use crate::machine::config::MAX_CPUS;

/// A moment, in writes and answers.
pub type Tick = u64;

/// Pages, by number in their object or slot.
pub type Pages = BTreeSet<u64>;

/// A page that is written, by both of its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Whose write.
    pub vm: usize,
    /// Where it sees the page.
    pub gfn: Gfn,
    /// Which object and frame it is, if one slot shows it and nobody is changing that.
    pub shown: Option<(usize, u64)>,
}

/// Two objects that were one.
#[derive(Clone, Debug)]
struct Relation {
    object: usize,
    base: usize,
    /// The one that was forked, and when that was over.
    source: usize,
    since: Option<Tick>,
    /// Copies are as large as what was written.
    exact: bool,
    written: Pages,
    begun: Pages,
}

/// A slot that logs.
#[derive(Clone, Debug)]
struct Tracked {
    vm: usize,
    id: u32,
    range: GfnRange,
    /// When logging had begun.
    since: Option<Tick>,
    /// Written since it was last named: when first.
    owed: BTreeMap<u64, Tick>,
    /// Written since logging began; those by the owner, which are in the log and maybe in no ring.
    written: Pages,
    by_owner: Pages,
    begun: Pages,
    /// Named so far, by the log and by rings.
    logged: Pages,
    harvested: Pages,
    /// In entries that wait for their reset.
    waiting: Pages,
    rings: Rings,
    /// Entries of rings were reset: their pages left the log unseen.
    reset: bool,
}

/// Whether a slot's pages are in rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rings {
    None,
    /// Since logging began.
    All,
    /// Some are, or somebody has overwritten an entry.
    Some,
}

/// What was written, and what is being written.
#[derive(Clone, Debug, Default)]
pub struct Written {
    now: Tick,
    relations: Vec<Relation>,
    tracked: Vec<Tracked>,
    /// For each CPU the write that it has begun.
    writing: [Option<Page>; MAX_CPUS],
    /// Virtual machines that have rings.
    ringed: Vec<usize>,
}

impl Relation {
    fn concerns(&self, object: usize) -> bool {
        self.object == object || self.base == object
    }

    /// Whether what is written to `object` may be in either.
    fn may_concern(&self, object: usize) -> bool {
        self.concerns(object) || self.source == object && self.since.is_none()
    }
}

impl Tracked {
    fn page(&self, vm: usize, gfn: Gfn) -> Option<u64> {
        (self.vm == vm && self.range.contains(gfn)).then(|| gfn.since(self.range.start()))
    }

    fn shows(&self, page: &Page) -> Option<u64> {
        self.page(page.vm, page.gfn)
    }
}

/// Pages that `named` lacks of `wanted`, or has too many against `most`.
fn compare(named: &Pages, wanted: impl IntoIterator<Item = u64>, most: Option<&Pages>) -> Option<String> {
    if let Some(missed) = wanted.into_iter().find(|page| !named.contains(page)) {
        return Some(format!("misses page {missed}, which was written"));
    }
    let extra = named.iter().find(|page| most.is_some_and(|most| !most.contains(page)))?;
    Some(format!("names page {extra}, which nobody has begun to write"))
}

impl Written {
    fn tick(&mut self) -> Tick {
        self.now += 1;
        self.now
    }

    /// `cpu` begins to write `page`, as a vCPU or for its owner. The answer is what [`Self::wrote`] wants.
    pub fn begin(&mut self, cpu: usize, page: Page) -> Tick {
        self.writing[cpu] = Some(page);
        self.touched(&page);
        self.tick()
    }

    fn touched(&mut self, page: &Page) {
        if let Some((object, frame)) = page.shown {
            self.changed(object, frame);
        }
        for one in &mut self.tracked {
            one.begun.extend(one.shows(page));
        }
    }

    /// `frame` of `object` becomes another, whether anybody writes it or not.
    pub fn changed(&mut self, object: usize, frame: u64) {
        for relation in self.relations.iter_mut().filter(|relation| relation.may_concern(object)) {
            relation.begun.insert(frame);
        }
    }

    /// What reads as zero again may be as it was before it was written.
    pub fn punched(&mut self, object: usize, frame: u64) {
        for relation in self.relations.iter_mut().filter(|relation| relation.may_concern(object)) {
            relation.begun.insert(frame);
            relation.written.remove(&frame);
        }
    }

    /// `page` was written: by a vCPU now, or by its owner since `begun`.
    pub fn wrote(&mut self, page: &Page, begun: Option<Tick>) {
        self.touched(page);
        let now = self.tick();
        let from = begun.unwrap_or(now);
        if let Some((object, frame)) = page.shown {
            for relation in self.relations.iter_mut().filter(|relation| relation.concerns(object)) {
                // While its object is forked, a write is in both or in one.
                if relation.source != object || relation.since.is_some_and(|since| since < from) {
                    relation.written.insert(frame);
                }
            }
        }
        for one in &mut self.tracked {
            if let Some(number) = one.shows(page).filter(|_| one.since.is_some_and(|since| since < from)) {
                one.owed.entry(number).or_insert(now);
                one.written.insert(number);
                if begun.is_some() {
                    one.by_owner.insert(number);
                }
            }
        }
    }

    /// What `cpu` began is over, done or not.
    pub fn end(&mut self, cpu: usize) {
        self.writing[cpu] = None;
    }

    /// `from` begins to be forked to `to`. `exact`: pages are copied one by one.
    pub fn begin_fork(&mut self, from: usize, to: usize, exact: bool) {
        let mut related: Vec<Relation> = Vec::new();
        for relation in self.relations.iter().filter(|relation| relation.concerns(from)) {
            let other = if relation.object == from { relation.base } else { relation.object };
            related.push(Relation { object: to, base: other, source: from, since: None, ..relation.clone() });
        }
        let (written, begun) = (Pages::new(), Pages::new());
        related.push(Relation { object: to, base: from, source: from, since: None, exact, written, begun });
        self.relations.append(&mut related);
        for page in self.writing.iter().flatten().copied().collect::<Vec<_>>() {
            self.touched(&page);
        }
    }

    /// It is done, or came to nothing.
    pub fn end_fork(&mut self, to: usize, done: bool) {
        let now = self.tick();
        if !done {
            return self.forget_object(to);
        }
        for relation in self.relations.iter_mut().filter(|relation| relation.object == to) {
            relation.since = relation.since.or(Some(now));
        }
    }

    /// An object is gone.
    pub fn forget_object(&mut self, object: usize) {
        self.relations.retain(|relation| !relation.concerns(object));
    }

    /// The difference of `object` and `base` is about to be asked for.
    pub fn owed_difference(&self, object: usize, base: usize) -> Pages {
        self.related(object, base).map_or_else(Pages::new, |relation| relation.written.clone())
    }

    fn related(&self, object: usize, base: usize) -> Option<&Relation> {
        self.relations.iter().find(|one| one.concerns(object) && one.concerns(base) && object != base)
    }

    /// Pairs of objects that were one, for the end of a schedule.
    pub fn pairs(&self) -> Vec<(usize, usize)> {
        self.relations.iter().map(|relation| (relation.object, relation.base)).collect()
    }

    /// The difference of `object` and `base` is `named`; before it was asked for, `owed` was owed, and by the data `unlike`
    /// are pages that surely read otherwise.
    pub fn differ(&self, object: usize, base: usize, named: &Pages, owed: &Pages, unlike: &Pages) -> Option<String> {
        let relation = self.related(object, base)?;
        let wanted = owed.intersection(&relation.written).chain(unlike).copied();
        let most = Some(&relation.begun).filter(|_| relation.exact);
        compare(named, wanted, most).map(|what| format!("the difference of objects {object} and {base} {what}"))
    }

    /// The slot at `range` is about to log, or not to.
    pub fn before_log(&mut self, vm: usize, id: u32, range: GfnRange) {
        self.forget_slot(vm, id);
        let rings = if self.ringed.contains(&vm) { Rings::All } else { Rings::None };
        let (written, by_owner, begun) = (Pages::new(), Pages::new(), Pages::new());
        let (logged, harvested, waiting) = (Pages::new(), Pages::new(), Pages::new());
        self.tracked.push(Tracked {
            vm,
            id,
            range,
            since: None,
            owed: BTreeMap::new(),
            written,
            by_owner,
            begun,
            logged,
            harvested,
            waiting,
            rings,
            reset: false,
        });
        for page in self.writing.iter().flatten().copied().collect::<Vec<_>>() {
            self.touched(&page);
        }
    }

    /// It logs now, or it does not.
    pub fn after_log(&mut self, vm: usize, id: u32, logs: bool) {
        let now = self.tick();
        if !logs {
            return self.forget_slot(vm, id);
        }
        self.slot(vm, id).into_iter().for_each(|one| one.since = Some(now));
    }

    /// A slot does not log any more, or lies elsewhere.
    pub fn forget_slot(&mut self, vm: usize, id: u32) {
        self.tracked.retain(|one| (one.vm, one.id) != (vm, id));
    }

    /// A virtual machine is gone.
    pub fn forget_vm(&mut self, vm: usize) {
        self.tracked.retain(|one| one.vm != vm);
    }

    fn slot(&mut self, vm: usize, id: u32) -> Option<&mut Tracked> {
        self.tracked.iter_mut().find(|one| (one.vm, one.id) == (vm, id))
    }

    /// A log is about to be asked.
    pub fn ask(&mut self) -> Tick {
        self.tick()
    }

    /// The log of a slot, asked at `asked`, named `named`, and forgot them if it was `taken`.
    pub fn logged(&mut self, vm: usize, id: u32, asked: Tick, named: &Pages, taken: bool) -> Option<String> {
        let one = self.slot(vm, id)?;
        let owed: Vec<u64> = one.owed.iter().filter(|(_, first)| **first < asked).map(|(page, _)| *page).collect();
        // A reset may have taken it from the log.
        let strict = one.rings == Rings::None;
        let wrong = compare(named, owed.into_iter().filter(|_| strict), Some(&one.begun));
        one.logged.extend(named);
        if taken {
            one.owed.retain(|page, _| !named.contains(page));
        }
        wrong.map(|what| format!("the log of slot {id} of VM {vm} {what}"))
    }

    /// The owner clears these pages from a slot's log: it knows them.
    pub fn cleared(&mut self, vm: usize, id: u32, named: &Pages) {
        if let Some(one) = self.slot(vm, id) {
            one.logged.extend(named.intersection(&one.begun).copied().collect::<Vec<_>>());
            one.owed.retain(|page, _| !named.contains(page));
        }
    }

    /// `vm` has rings now.
    pub fn ringed(&mut self, vm: usize) {
        self.ringed.push(vm);
        self.spoiled(vm);
    }

    /// Not every page is in a ring, or an entry says something else.
    pub fn spoiled(&mut self, vm: usize) {
        self.tracked.iter_mut().filter(|one| one.vm == vm).for_each(|one| one.rings = Rings::Some);
    }

    /// A ring named page `offset` of slot `id`.
    pub fn harvested(&mut self, vm: usize, id: u32, offset: u64) -> Option<String> {
        let one = self.slot(vm, id).filter(|one| one.rings == Rings::All)?;
        one.harvested.insert(offset);
        one.waiting.insert(offset);
        let extra = !one.begun.contains(&offset);
        extra.then(|| format!("a ring of VM {vm} names page {offset} of slot {id}, which nobody has begun to write"))
    }

    /// What was harvested is reset: it is written no more without being named again.
    pub fn reset(&mut self, vm: usize) {
        for one in self.tracked.iter_mut().filter(|one| one.vm == vm) {
            let gone = std::mem::take(&mut one.waiting);
            one.owed.retain(|page, _| !gone.contains(page));
            one.reset = true;
        }
    }

    /// Slots that log, by virtual machine and number.
    pub fn slots(&self) -> Vec<(usize, u32)> {
        self.tracked.iter().map(|one| (one.vm, one.id)).collect()
    }

    /// All scripts have ended. `log` is what is left in the log of a slot; what was left in rings has been harvested.
    pub fn settled(&mut self, vm: usize, id: u32, log: &Pages) -> Option<String> {
        let one = self.slot(vm, id)?;
        let left: Pages = log.union(&one.waiting).copied().collect();
        let by_ring = one.rings == Rings::All;
        let lenient = one.rings == Rings::Some;
        let owed = one.owed.keys().copied().filter(|_| !lenient);
        if let Some(what) = compare(&left, owed, Some(&one.begun)) {
            return Some(format!("what is left in the log of slot {id} of VM {vm} {what}"));
        }
        one.logged.extend(log);
        let complete = !lenient && !one.reset;
        if let Some(what) = compare(&one.logged, one.written.iter().copied().filter(|_| complete), Some(&one.begun)) {
            return Some(format!("the log of slot {id} of VM {vm}, over all, {what}"));
        }
        let by_vcpus = one.written.difference(&one.by_owner).copied().filter(|_| by_ring);
        let what = compare(&one.harvested, by_vcpus, None)?;
        Some(format!("the rings, over all, for slot {id} of VM {vm}: {what}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u64) -> Page {
        Page { vm: 0, gfn: Gfn::new(8 + number), shown: Some((0, number)) }
    }

    fn write(written: &mut Written, number: u64) {
        written.begin(0, page(number));
        written.wrote(&page(number), None);
        written.end(0);
    }

    fn pages<const N: usize>(of: [u64; N]) -> Pages {
        of.into_iter().collect()
    }

    fn logging() -> Written {
        let mut written = Written::default();
        written.before_log(0, 1, GfnRange::new(Gfn::new(8), 4).unwrap());
        written.after_log(0, 1, true);
        written
    }

    #[test]
    fn a_log_names_what_was_written_before_and_nothing_else() {
        let mut written = logging();
        write(&mut written, 2);
        let asked = written.ask();
        write(&mut written, 3);
        assert!(written.clone().logged(0, 1, asked, &pages([]), true).unwrap().contains("misses page 2"));
        assert!(written.clone().logged(0, 1, asked, &pages([1, 2]), true).unwrap().contains("names page 1"));
        assert_eq!(written.logged(0, 1, asked, &pages([2]), true), None, "3 came while it was asked");
        assert!(written.clone().settled(0, 1, &pages([])).unwrap().contains("misses page 3"));
        assert_eq!(written.settled(0, 1, &pages([3])), None);
    }

    #[test]
    fn a_ring_names_what_vcpus_write_and_covers_it_until_its_reset() {
        let mut written = Written::default();
        written.ringed(0);
        written.before_log(0, 1, GfnRange::new(Gfn::new(8), 4).unwrap());
        written.after_log(0, 1, true);
        write(&mut written, 2);
        assert!(written.clone().settled(0, 1, &pages([2])).unwrap().contains("rings"));
        assert!(written.harvested(0, 1, 3).unwrap().contains("names page 3"));
        assert_eq!(written.harvested(0, 1, 2), None);
        write(&mut written, 2);
        written.reset(0);
        assert_eq!(written.clone().settled(0, 1, &pages([])), None);
        write(&mut written, 2);
        assert!(written.settled(0, 1, &pages([])).is_some(), "written after the reset, and in neither");
    }

    #[test]
    fn a_difference_names_what_either_wrote_since_the_fork() {
        let mut written = Written::default();
        write(&mut written, 0);
        written.begin_fork(0, 1, true);
        write(&mut written, 1);
        written.end_fork(1, true);
        write(&mut written, 2);
        let owed = written.owed_difference(1, 0);
        assert_eq!(owed, pages([2]), "1 was written while it was forked");
        assert_eq!(written.differ(1, 0, &pages([2]), &owed, &pages([])), None);
        assert_eq!(written.differ(0, 1, &pages([1, 2]), &owed, &pages([])), None);
        assert!(written.differ(1, 0, &pages([0, 2]), &owed, &pages([])).unwrap().contains("names page 0"));
        assert!(written.differ(1, 0, &pages([1]), &owed, &pages([])).unwrap().contains("misses page 2"));
        assert!(written.differ(1, 0, &pages([2]), &owed, &pages([1])).unwrap().contains("misses page 1"));
        written.punched(0, 2);
        assert_eq!(written.differ(1, 0, &pages([]), &owed, &pages([])), None);
        written.begin_fork(1, 2, true);
        written.end_fork(2, true);
        assert_eq!(written.pairs(), [(1, 0), (2, 0), (2, 1)]);
        written.forget_object(1);
        assert_eq!(written.pairs(), [(2, 0)]);
    }

    #[test]
    fn a_write_that_began_before_the_fork_was_over_may_be_in_both() {
        let mut written = Written::default();
        let begun = written.begin(0, page(1));
        written.begin_fork(0, 1, true);
        written.end_fork(1, true);
        written.wrote(&page(1), Some(begun));
        assert_eq!(written.owed_difference(0, 1), pages([]));
        assert_eq!(written.differ(0, 1, &pages([1]), &pages([]), &pages([])), None);
    }
}
