//! All shadow tables of a virtual machine, and the changes of single words.

use alloc::boxed::Box;
use alloc::vec::Vec;

use entresol_addr::{Gfn, GfnRange, Gpa, Pfn, PfnRange};
use entresol_machine::{Machine, TlbOp, Vmid, Word};
use entresol_sync::planted;

use crate::page::{Page, Record, WORDS};
use crate::rmap::{EntryId, Rmap};
use crate::{Key, MOST_LEVELS, Rights, ShadowFormat, Source};

/// The most vCPUs of a virtual machine.
pub const MOST_VCPUS: usize = 64;

/// Why no shadow tables were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateError {
    /// There must be frames for a root of every vCPU and a way besides: so many. And not more than entries can be numbered.
    Frames {
        /// What was offered.
        offered: usize,
        /// The fewest.
        fewest: usize,
    },
    /// More vCPUs than [`MOST_VCPUS`], or none.
    Vcpus {
        /// What was asked for.
        value: usize,
    },
    /// The heap has no room.
    OutOfHeap,
}

/// What a vCPU has of its own.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Vcpu {
    /// The number of its root.
    pub root: Option<u32>,
    /// The page that it found to be no memory last: linear page number, frame, rights, generation.
    pub mmio: Option<(u64, Gfn, Rights, u64)>,
    pub counts: Counts,
}

/// How a vCPU's accesses to what is no memory were answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// By the page that it knew.
    pub cached: u64,
    /// By an MMIO entry.
    pub walked: u64,
    /// By a walk of the guest's tables, because the entry was no longer true.
    pub refreshed: u64,
    /// Entries made.
    pub made: u64,
}

/// Under which frame a table is found among [`Shadow::places`].
fn place(key: &Key) -> Gfn {
    match key.source {
        Source::Table { at, .. } => at.frame(),
        Source::Page { gfn } => gfn,
        Source::Registers { root, .. } => Gpa::new(root).frame(),
    }
}

/// Room for `count` numbers; `None` if the heap has none.
fn numbers(count: usize) -> Option<Vec<u32>> {
    let mut all = Vec::new();
    all.try_reserve_exact(count).ok()?;
    Some(all)
}

/// The shadow tables of one virtual machine.
pub struct Shadow<F> {
    pub(crate) format: F,
    frames: Box<[Pfn]>,
    pub(crate) pages: Box<[Page]>,
    pub(crate) rmap: Rmap,
    /// Tables by what they show: see [`place`].
    pub(crate) places: Rmap,
    /// Tables that nobody uses.
    free: Vec<u32>,
    /// Tables that the guest may write to, in no order.
    pub(crate) unsynced: Vec<u32>,
    pub(crate) vcpus: Box<[Vcpu]>,
    /// Something was dropped or narrowed that TLBs may hold.
    pub(crate) owes_flush: bool,
    /// Counts whatever may make another way of an address, or another last entry: flushes by the guest, tables that it may write to,
    /// tables that were made or linked.
    pub(crate) changes: u64,
}

/// What is on the heap.
struct Room {
    pages: Box<[Page]>,
    rmap: Rmap,
    places: Rmap,
    free: Vec<u32>,
    unsynced: Vec<u32>,
    vcpus: Box<[Vcpu]>,
}

impl<F: ShadowFormat> Shadow<F> {
    /// No tables, for `vcpus` vCPUs; at most one table in each of `frames`, which come back by [`Shadow::destroy`].
    ///
    /// # Errors
    ///
    /// [`CreateError`], and the frames; nothing was touched.
    pub fn new(format: F, frames: Box<[Pfn]>, vcpus: usize) -> Result<Self, (CreateError, Box<[Pfn]>)> {
        match Self::room(frames.len(), vcpus) {
            Ok(Room { pages, rmap, places, free, unsynced, vcpus }) => {
                let (owes_flush, changes) = (false, 0);
                Ok(Self { format, frames, pages, rmap, places, free, unsynced, vcpus, owes_flush, changes })
            }
            Err(error) => Err((error, frames)),
        }
    }

    fn room(count: usize, vcpus: usize) -> Result<Room, CreateError> {
        if vcpus == 0 || vcpus > MOST_VCPUS {
            return Err(CreateError::Vcpus { value: vcpus });
        }
        let fewest = vcpus + MOST_LEVELS;
        if count < fewest || count > u32::MAX as usize / WORDS {
            return Err(CreateError::Frames { offered: count, fewest });
        }
        let mut pages = Vec::new();
        pages.try_reserve_exact(count).map_err(|_| CreateError::OutOfHeap)?;
        for _ in 0..count {
            pages.push(Page::new().ok_or(CreateError::OutOfHeap)?);
        }
        let mut own = Vec::new();
        own.try_reserve_exact(vcpus).map_err(|_| CreateError::OutOfHeap)?;
        own.resize(vcpus, Vcpu::default());
        let mut free = numbers(count).ok_or(CreateError::OutOfHeap)?;
        free.extend((0..count as u32).rev());
        Ok(Room {
            pages: pages.into_boxed_slice(),
            rmap: Rmap::new(count * WORDS).ok_or(CreateError::OutOfHeap)?,
            places: Rmap::new(count).ok_or(CreateError::OutOfHeap)?,
            free,
            unsynced: numbers(count).ok_or(CreateError::OutOfHeap)?,
            vcpus: own.into_boxed_slice(),
        })
    }

    /// Ends the tables, which no vCPU runs on any more: the frames.
    pub fn destroy(self) -> Box<[Pfn]> {
        self.frames
    }

    /// The frame of the table with number `page`.
    pub(crate) fn frame(&self, page: u32) -> Pfn {
        self.frames[page as usize]
    }

    /// The root that `vcpu` is to run on, if it has loaded one.
    pub fn root(&self, vcpu: usize) -> Option<Pfn> {
        self.vcpus.get(vcpu)?.root.map(|page| self.frame(page))
    }

    /// How accesses of `vcpu` to what is no memory were answered.
    pub fn counts(&self, vcpu: usize) -> Option<Counts> {
        self.vcpus.get(vcpu).map(|vcpu| vcpu.counts)
    }

    /// Tables in use.
    pub fn tables(&self) -> usize {
        self.pages.iter().filter(|page| page.key.is_some()).count()
    }

    /// Word `index` of table `page` says `record` from now on, and `raw` to the hardware.
    fn put<M: Machine>(&mut self, machine: &M, page: u32, index: usize, record: Record, raw: u64) {
        let entry = EntryId(page * WORDS as u32 + index as u32);
        let old = core::mem::replace(&mut self.pages[page as usize].records[index], record);
        if let Record::Leaf { gfn, .. } = old {
            self.rmap.remove(gfn, entry);
        }
        if let Record::Leaf { gfn, .. } = record {
            self.rmap.insert(gfn, entry);
        }
        machine.store(Word::new(self.frame(page), index as u16), raw);
        // Hardware caches nothing of a word that it refuses, nor of a vacant one.
        self.owes_flush |= matches!(old, Record::Leaf { .. } | Record::Link(_))
            && old != record
            && !(planted!(ZC3) && matches!(record, Record::Mmio { .. }));
    }

    /// Drops what a word says.
    pub(crate) fn drop_entry<M: Machine>(&mut self, machine: &M, page: u32, index: usize) {
        if self.pages[page as usize].records[index] != Record::Vacant {
            self.put(machine, page, index, Record::Vacant, 0);
        }
    }

    /// A word leads to the table `child`.
    pub(crate) fn link<M: Machine>(&mut self, machine: &M, page: u32, index: usize, child: u32) {
        let Some(above) = self.pages[page as usize].key else { return };
        let raw = self.format.table(self.frame(child), &above);
        self.put(machine, page, index, Record::Link(child), raw);
    }

    /// A word maps a page.
    pub(crate) fn map<M: Machine>(&mut self, machine: &M, page: u32, index: usize, gfn: Gfn, pfn: Pfn, rights: Rights) {
        let raw = self.format.leaf(pfn, rights);
        self.put(machine, page, index, Record::Leaf { gfn, rights, pfn }, raw);
    }

    /// A word says that there is no memory, if the format has a word for it; else nothing. Whether it has.
    pub(crate) fn mark_mmio<M: Machine>(
        &mut self,
        machine: &M,
        page: u32,
        index: usize,
        gfn: Gfn,
        rights: Rights,
        generation: u64,
    ) -> bool {
        let raw = self.format.mmio(gfn, rights, generation);
        match raw {
            Some(raw) => self.put(machine, page, index, Record::Mmio { gfn, rights, generation }, raw),
            None => self.drop_entry(machine, page, index),
        }
        raw.is_some()
    }

    /// Whether one of the tables at `gfn` is as `which` says.
    pub(crate) fn any_at(&self, gfn: Gfn, which: impl Fn(&Page) -> bool) -> bool {
        self.first_at(gfn, which).is_some()
    }

    fn first_at(&self, gfn: Gfn, which: impl Fn(&Page) -> bool) -> Option<u32> {
        let mut at = self.places.next(gfn, None);
        while let Some(EntryId(number)) = at {
            if which(&self.pages[number as usize]) {
                return Some(number);
            }
            at = self.places.next(gfn, Some(EntryId(number)));
        }
        None
    }

    /// The number of the table with this key.
    pub(crate) fn find(&self, key: &Key) -> Option<u32> {
        self.first_at(place(key), |page| page.key == Some(*key))
    }

    /// Makes a free table that one, empty; `None` if none is free.
    pub(crate) fn make<M: Machine>(&mut self, machine: &M, key: &Key) -> Option<u32> {
        let number = self.free.pop()?;
        machine.zero(PfnRange::single(self.frame(number)));
        let writable = key.table().is_some_and(|gfn| self.any_at(gfn, |page| page.unsynced && page.shows(gfn)));
        let page = &mut self.pages[number as usize];
        (page.key, page.unsynced) = (Some(*key), writable);
        self.places.insert(place(key), EntryId(number));
        if writable {
            self.unsynced.push(number);
        } else if let Some(gfn) = key.table() {
            self.protect(machine, gfn);
        }
        Some(number)
    }

    /// Calls `f` with every entry that maps `gfn`.
    pub(crate) fn each_mapping(&mut self, gfn: Gfn, mut f: impl FnMut(&mut Self, u32, usize)) {
        let mut at = self.rmap.next(gfn, None);
        while let Some(entry) = at {
            // `f` may take this entry out of its chain.
            at = self.rmap.next(gfn, Some(entry));
            let (page, index) = (entry.0 / WORDS as u32, entry.0 as usize % WORDS);
            if matches!(self.pages[page as usize].records[index], Record::Leaf { gfn: mapped, .. } if mapped == gfn) {
                f(self, page, index);
            }
        }
    }

    /// No entry permits stores to `gfn` any more.
    pub(crate) fn protect<M: Machine>(&mut self, machine: &M, gfn: Gfn) {
        self.each_mapping(gfn, |this, page, index| {
            if let Record::Leaf { rights, pfn, .. } = this.pages[page as usize].records[index]
                && rights.write
            {
                // In place: the entry keeps its place in the chain, which the walk over it relies on.
                let rights = Rights { write: false, ..rights };
                this.pages[page as usize].records[index] = Record::Leaf { gfn, rights, pfn };
                machine.store(Word::new(this.frame(page), index as u16), this.format.leaf(pfn, rights));
                this.owes_flush = true;
            }
        });
    }

    /// What a way that was found before this leads to is to be found anew.
    #[inline]
    pub(crate) fn count_change(&mut self) {
        self.changes = self.changes.wrapping_add(1);
    }

    /// Drops every entry that leads to memory, and believes no table. `vmid` as in [`Shadow::load`].
    pub fn invalidate_all<M: Machine>(&mut self, machine: &M, vmid: Vmid) {
        self.count_change();
        self.drop_where(machine, |record| matches!(record, Record::Leaf { .. }));
        self.unsync_where(|_| true);
        self.settle(machine, vmid);
    }

    /// What stands behind `range` changes: no entry maps it any more when this returns, and guest tables there may say something
    /// else. `vmid` as in [`Shadow::load`].
    pub fn invalidate<M: Machine>(&mut self, machine: &M, vmid: Vmid, range: GfnRange) {
        self.count_change();
        if range.count() <= WORDS as u64 {
            for offset in 0..range.count() {
                let gfn = range.start().offset(offset);
                self.each_mapping(gfn, |this, page, index| this.drop_entry(machine, page, index));
                self.unsync(gfn);
            }
        } else {
            self.drop_where(machine, |record| matches!(record, Record::Leaf { gfn, .. } if range.contains(*gfn)));
            self.unsync_where(|gfn| range.contains(gfn));
        }
        self.settle(machine, vmid);
    }

    fn unsync_where(&mut self, which: impl Fn(Gfn) -> bool) {
        for number in 0..self.pages.len() {
            if let Some(gfn) = self.pages[number].key.and_then(|key| key.table()).filter(|gfn| which(*gfn)) {
                self.unsync(gfn);
            }
        }
    }

    fn drop_where<M: Machine>(&mut self, machine: &M, which: impl Fn(&Record) -> bool) {
        for page in 0..self.pages.len() as u32 {
            if self.pages[page as usize].key.is_none() {
                continue;
            }
            for index in 0..WORDS {
                if which(&self.pages[page as usize].records[index]) {
                    self.drop_entry(machine, page, index);
                }
            }
        }
    }

    /// Drops every table but the roots of vCPUs, which are empty then.
    pub(crate) fn clear<M: Machine>(&mut self, machine: &M, vmid: Vmid) {
        self.drop_where(machine, |_| true);
        // Before a frame is used again.
        if !planted!(ZC6) {
            self.settle(machine, vmid);
        }
        for number in 0..self.pages.len() as u32 {
            if self.vcpus.iter().any(|vcpu| vcpu.root == Some(number)) {
                continue;
            }
            let page = &mut self.pages[number as usize];
            page.unsynced = false;
            if let Some(key) = page.key.take() {
                self.places.remove(place(&key), EntryId(number));
                self.free.push(number);
            }
        }
        let pages = &self.pages;
        self.unsynced.retain(|number| pages[*number as usize].unsynced);
    }

    /// Calls `f` with every entry that leads to a page: its frame, where that is, and whether it permits stores. For audits.
    ///
    /// # Errors
    ///
    /// The first of `f`'s.
    pub fn each_leaf<E>(&self, mut f: impl FnMut(Gfn, Pfn, bool) -> Result<(), E>) -> Result<(), E> {
        for record in self.pages.iter().flat_map(|page| page.records.iter()) {
            if let Record::Leaf { gfn, rights, pfn } = *record {
                f(gfn, pfn, rights.write)?;
            }
        }
        Ok(())
    }

    /// Pays the flush that is owed.
    pub(crate) fn settle<M: Machine>(&mut self, machine: &M, vmid: Vmid) {
        machine.published();
        if core::mem::take(&mut self.owes_flush) {
            machine.tlb(TlbOp::Vmid(vmid));
            machine.complete();
        }
    }

    /// Whether the invariants hold; what does not.
    ///
    /// # Errors
    ///
    /// A sentence.
    pub fn audit<M: Machine>(&mut self, machine: &M) -> Result<(), &'static str> {
        if self.owes_flush {
            return Err("a flush is owed");
        }
        for number in 0..self.pages.len() as u32 {
            let page = &self.pages[number as usize];
            if page.unsynced != (self.unsynced.iter().filter(|listed| **listed == number).count() == 1) {
                return Err("an unsynced table is not listed once, or another is");
            }
            if page.key.is_some_and(|key| self.find(&key) != Some(number)) {
                return Err("a table is not found by what it shows");
            }
            for index in 0..WORDS {
                let record = self.pages[number as usize].records[index];
                let raw = machine.load(Word::new(self.frame(number), index as u16));
                let expected = match record {
                    Record::Vacant => Some(0),
                    Record::Link(child) => {
                        self.pages[number as usize].key.map(|above| self.format.table(self.frame(child), &above))
                    }
                    Record::Leaf { rights, pfn, .. } => Some(self.format.leaf(pfn, rights)),
                    Record::Mmio { gfn, rights, generation } => self.format.mmio(gfn, rights, generation),
                };
                if self.pages[number as usize].key.is_some() && expected != Some(raw) {
                    return Err("a word says something else than its record");
                }
                let Record::Leaf { gfn, rights, .. } = record else { continue };
                if rights.write && self.pages.iter().any(|page| !page.unsynced && page.shows(gfn)) {
                    return Err("a table that is taken for synced can be written");
                }
                let mut seen = 0;
                self.each_mapping(gfn, |_, page, at| seen += usize::from((page, at) == (number, index)));
                if seen != 1 {
                    return Err("an entry is not in the reverse map once");
                }
            }
        }
        Ok(())
    }
}
