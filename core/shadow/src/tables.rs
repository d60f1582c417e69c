//! All shadow tables of a virtual machine, and the changes of single words.

use alloc::boxed::Box;
use alloc::vec::Vec;

use entresol_addr::{Gfn, GfnRange, Pfn, PfnRange};
use entresol_machine::{Machine, TlbOp, Vmid, Word};

use crate::page::{Page, Record, WORDS};
use crate::rmap::{EntryId, Rmap};
use crate::{Key, MOST_LEVELS, Rights, ShadowFormat};

/// The most vCPUs of a virtual machine.
pub const MOST_VCPUS: usize = 64;

/// Why no shadow tables were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateError {
    /// There must be frames for a root of every vCPU and a way besides: so many. And not more than entries can be numbered.
    Frames {
        /// What was offered.
        offered: u64,
        /// The fewest.
        fewest: u64,
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
}

/// The shadow tables of one virtual machine.
pub struct Shadow<F> {
    pub(crate) format: F,
    pub(crate) frames: PfnRange,
    pub(crate) pages: Box<[Page]>,
    pub(crate) rmap: Rmap,
    pub(crate) vcpus: Box<[Vcpu]>,
    /// Something was dropped or narrowed that TLBs may hold.
    pub(crate) owes_flush: bool,
}

impl<F: ShadowFormat> Shadow<F> {
    /// No tables, for `vcpus` vCPUs; at most one table in each of `frames`, which are the caller's and come back by
    /// [`Shadow::destroy`].
    ///
    /// # Errors
    ///
    /// [`CreateError`]; nothing was touched.
    pub fn new(format: F, frames: PfnRange, vcpus: usize) -> Result<Self, CreateError> {
        if vcpus == 0 || vcpus > MOST_VCPUS {
            return Err(CreateError::Vcpus { value: vcpus });
        }
        let fewest = (vcpus + MOST_LEVELS) as u64;
        if frames.count() < fewest || frames.count() > u64::from(u32::MAX) / WORDS as u64 {
            return Err(CreateError::Frames { offered: frames.count(), fewest });
        }
        let count = frames.count() as usize;
        let mut pages = Vec::new();
        pages.try_reserve_exact(count).map_err(|_| CreateError::OutOfHeap)?;
        for _ in 0..count {
            pages.push(Page::new().ok_or(CreateError::OutOfHeap)?);
        }
        let mut own = Vec::new();
        own.try_reserve_exact(vcpus).map_err(|_| CreateError::OutOfHeap)?;
        own.resize(vcpus, Vcpu::default());
        let rmap = Rmap::new(count * WORDS).ok_or(CreateError::OutOfHeap)?;
        Ok(Self {
            format,
            frames,
            pages: pages.into_boxed_slice(),
            rmap,
            vcpus: own.into_boxed_slice(),
            owes_flush: false,
        })
    }

    /// Ends the tables, which no vCPU runs on any more: the frames.
    pub fn destroy(self) -> PfnRange {
        self.frames
    }

    /// The frame of the table with number `page`.
    pub(crate) fn frame(&self, page: u32) -> Pfn {
        self.frames.start().offset(page.into())
    }

    /// The root that `vcpu` is to run on, if it has loaded one.
    pub fn root(&self, vcpu: usize) -> Option<Pfn> {
        self.vcpus.get(vcpu)?.root.map(|page| self.frame(page))
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
        self.owes_flush |= matches!(old, Record::Leaf { .. } | Record::Link(_)) && old != record;
    }

    /// Drops what a word says.
    pub(crate) fn drop_entry<M: Machine>(&mut self, machine: &M, page: u32, index: usize) {
        if self.pages[page as usize].records[index] != Record::Vacant {
            self.put(machine, page, index, Record::Vacant, 0);
        }
    }

    /// A word leads to the table `child`.
    pub(crate) fn link<M: Machine>(&mut self, machine: &M, page: u32, index: usize, child: u32) {
        let raw = self.format.table(self.frame(child));
        self.put(machine, page, index, Record::Link(child), raw);
    }

    /// A word maps a page.
    pub(crate) fn map<M: Machine>(&mut self, machine: &M, page: u32, index: usize, gfn: Gfn, pfn: Pfn, rights: Rights) {
        let raw = self.format.leaf(pfn, rights);
        self.put(machine, page, index, Record::Leaf { gfn, rights, pfn }, raw);
    }

    /// A word says that there is no memory, if the format has a word for it; else nothing.
    pub(crate) fn mark_mmio<M: Machine>(
        &mut self,
        machine: &M,
        page: u32,
        index: usize,
        gfn: Gfn,
        rights: Rights,
        generation: u64,
    ) {
        match self.format.mmio(gfn, rights, generation) {
            Some(raw) => self.put(machine, page, index, Record::Mmio { gfn, rights, generation }, raw),
            None => self.drop_entry(machine, page, index),
        }
    }

    /// The number of the table with this key.
    pub(crate) fn find(&self, key: &Key) -> Option<u32> {
        self.pages.iter().position(|page| page.key == Some(*key)).map(|page| page as u32)
    }

    /// Makes a free table that one, empty; `None` if none is free.
    pub(crate) fn make<M: Machine>(&mut self, machine: &M, key: &Key) -> Option<u32> {
        let number = self.pages.iter().position(|page| page.key.is_none())? as u32;
        machine.zero(PfnRange::single(self.frame(number)));
        let writable = key.table().is_some_and(|gfn| self.pages.iter().any(|page| page.unsynced && page.shows(gfn)));
        let page = &mut self.pages[number as usize];
        (page.key, page.unsynced) = (Some(*key), writable);
        if let Some(gfn) = key.table().filter(|_| !writable) {
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

    /// What stands behind `range` changes: no entry maps it any more when this returns. `vmid` as in [`Shadow::load`].
    pub fn invalidate<M: Machine>(&mut self, machine: &M, vmid: Vmid, range: GfnRange) {
        if range.count() <= WORDS as u64 {
            for offset in 0..range.count() {
                let gfn = range.start().offset(offset);
                self.each_mapping(gfn, |this, page, index| this.drop_entry(machine, page, index));
            }
        } else {
            self.drop_where(machine, |record| matches!(record, Record::Leaf { gfn, .. } if range.contains(*gfn)));
        }
        self.settle(machine, vmid);
    }

    fn drop_where<M: Machine>(&mut self, machine: &M, which: impl Fn(&Record) -> bool) {
        for page in 0..self.pages.len() as u32 {
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
        self.settle(machine, vmid);
        for number in 0..self.pages.len() as u32 {
            if !self.vcpus.iter().any(|vcpu| vcpu.root == Some(number)) {
                let page = &mut self.pages[number as usize];
                (page.key, page.unsynced) = (None, false);
            }
        }
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
            for index in 0..WORDS {
                let record = self.pages[number as usize].records[index];
                let raw = machine.load(Word::new(self.frame(number), index as u16));
                let expected = match record {
                    Record::Vacant => Some(0),
                    Record::Link(child) => Some(self.format.table(self.frame(child))),
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
