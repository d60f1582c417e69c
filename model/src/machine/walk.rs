//! A guest's access on its way through the second stage.
//!
//! Purpose: at each level the hardware may use what stands in the word now or any value that its caches may still hold
//! (`tlb`). Each such choice is the explorer's, stalest first. A CPU that was given a VMID that another virtual machine
//! used, with no flush between, may even start at that machine's root.

use arrayvec::ArrayVec;
use entresol_addr::{Gfn, Pfn};
use entresol_machine::{Vmid, Word};
use entresol_table::index;

use super::World;
use super::descriptor::{Descriptor, Leaf};
use super::frame::Pick;
use super::linear::SHADOWS;

/// Words that a walk went through: at most four, twice.
pub type Path = ArrayVec<Word, 8>;

/// Who is walking.
#[derive(Clone, Copy, Debug)]
pub struct Walker {
    /// On which CPU.
    pub cpu: usize,
    /// For which virtual machine.
    pub vm: usize,
    /// Under which VMID.
    pub vmid: Vmid,
}

/// The entry that a walk ended at without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Its level.
    pub level: u8,
    /// It is one that the hardware refuses, and says so.
    pub refused: bool,
}

/// Where a walk ended.
#[derive(Clone, Copy, Debug)]
pub struct Translated {
    /// The leaf.
    pub leaf: Leaf,
    /// The frame behind the address.
    pub pfn: Pfn,
    /// Level of the entry.
    pub level: u8,
    /// Some value on the way was not in memory any more.
    pub stale: bool,
}

impl World {
    /// Translates `gfn`. Adds the words on the way to `path`.
    ///
    /// # Errors
    ///
    /// [`Missing`]: a fault there.
    pub fn walk(&mut self, walker: Walker, gfn: Gfn, path: &mut Path, pick: Pick<'_>) -> Result<Translated, Missing> {
        let strangers = self.strangers(walker);
        if !strangers.is_empty() {
            let chosen = pick(strangers.len() + 1);
            if let Some(vm) = strangers.get(chosen)
                && let Ok(found) = self.descend(Walker { vm: *vm, ..walker }, gfn, true, path, pick)
            {
                return Ok(found);
            }
        }
        self.descend(walker, gfn, false, path, pick)
    }

    /// Other virtual machines whose translations this CPU may hold under the same VMID.
    fn strangers(&self, walker: Walker) -> Vec<usize> {
        let floor = self.tlb.floor_of_all(walker.vmid);
        let mut vms = Vec::new();
        for one in self.tlb.residences() {
            let shared = one.cpu == walker.cpu && one.vmid == walker.vmid && one.until > floor;
            // A machine and its shadow tables have one VMID, and who loads another root flushes.
            let shared = shared && one.vm % SHADOWS != walker.vm % SHADOWS;
            if shared && !vms.contains(&one.vm) {
                vms.push(one.vm);
            }
        }
        vms
    }

    fn descend(
        &mut self,
        walker: Walker,
        gfn: Gfn,
        cached_only: bool,
        path: &mut Path,
        pick: Pick<'_>,
    ) -> Result<Translated, Missing> {
        let missing = |level, refused| Err(Missing { level, refused });
        let Some(mut number) = self.tables.root(walker.vm, gfn) else { return missing(0, false) };
        let mut stale = cached_only;
        loop {
            let table = self.tables.get(number);
            let (level, index) = (table.level, index(gfn, table.level));
            path.push(Word::new(table.frame, index));
            let places = self.places(walker, number, index, cached_only);
            let history = self.tables.get(number).history(index);
            let chosen = match places.len() {
                0 => return missing(level, false),
                1 => places[0],
                n => places[pick(n)],
            };
            let (past, last) = (history[chosen], chosen + 1 == history.len());
            stale |= !last;
            if last && !cached_only {
                let now = self.now();
                self.tlb.uses(walker.cpu, number, index, now);
            }
            match past.descriptor {
                Descriptor::Invalid => return missing(level, false),
                Descriptor::Refused => return missing(level, true),
                Descriptor::Table(_) => number = past.child.ok_or(Missing { level, refused: false })?,
                Descriptor::Leaf(leaf) => {
                    let offset = gfn.since(gfn.align_down(leaf.size));
                    return Ok(Translated { leaf, pfn: leaf.pfn.offset(offset), level, stale });
                }
            }
        }
    }

    /// Every leaf that the walker may use for `gfn`, whatever it used before, each with the frame behind `gfn`.
    pub fn possible(&self, walker: Walker, gfn: Gfn) -> Vec<(Leaf, Pfn)> {
        let mut numbers: Vec<usize> = self.tables.root(walker.vm, gfn).into_iter().collect();
        let mut leaves = Vec::new();
        while let Some(number) = numbers.pop() {
            let table = self.tables.get(number);
            let index = index(gfn, table.level);
            let history = table.history(index);
            for (place, past) in history.iter().enumerate() {
                let standing = table.standing(index, history, place);
                let last = place + 1 == history.len();
                if !last && !self.tlb.may_hold(Some(walker.cpu), Some(walker.vmid), &standing) {
                    continue;
                }
                match past.descriptor {
                    Descriptor::Invalid | Descriptor::Refused => {}
                    Descriptor::Table(_) => numbers.extend(past.child),
                    Descriptor::Leaf(leaf) => {
                        leaves.push((leaf, leaf.pfn.offset(gfn.since(gfn.align_down(leaf.size)))));
                    }
                }
            }
        }
        leaves
    }

    /// The values of a word that the walker may use, by their place in its history, oldest first.
    fn places(&self, walker: Walker, number: usize, index: u16, cached_only: bool) -> Vec<usize> {
        let table = self.tables.get(number);
        let history = table.history(index);
        let last_use = self.tlb.last_use(walker.cpu, number, index);
        let mut places: Vec<usize> = Vec::new();
        for (place, past) in history.iter().enumerate() {
            let last = place + 1 == history.len();
            let usable = if last && !cached_only {
                true
            } else {
                let standing = table.standing(index, history, place);
                past.descriptor.is_cacheable()
                    && (last || standing.until > last_use)
                    && self.tlb.may_hold(Some(walker.cpu), Some(walker.vmid), &standing)
            };
            // Equal values are one possibility.
            if usable {
                places.retain(|earlier| history[*earlier].descriptor != past.descriptor);
                places.push(place);
            }
        }
        places
    }
}
