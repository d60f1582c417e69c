//! The model of a machine: memory, caches, translation caches, and the frames' owners.
//!
//! Purpose: everything that the core can do to a machine through [`entresol_machine::Machine`], and everything
//! that a guest's hardware may then observe. Rules and the manual's sections stand with each part: [`frame`] for
//! caches, [`tlb`] for translation caches, [`linear`] for those of a guest's own tables, [`tables`] and [`walk`] for table walks, [`descriptor`] for entries of arm64, [`x86`] for those of x86.
//!
//! Protocol: each operation happens whole, in the order in which the explorer lets CPUs go. Where the hardware is free
//! to do one thing or another, a [`frame::Pick`] decides, when an access comes that can tell the difference.
//!
//! Known holes: memory orderings weaker than sequential consistency; set/way maintenance; tags; stage-1 tables.

pub mod config;
pub mod content;
pub mod descriptor;
pub mod frame;
pub mod linear;
pub mod own;
pub mod tables;
pub mod tlb;
pub mod walk;
pub mod x86;

use entresol_addr::{Gfn, GfnRange, Pfn, PfnRange};
use entresol_machine::{TlbOp, Vmid, Word};

use config::{Config, MAX_CPUS};
use content::Content;
use descriptor::Descriptor;
use frame::{Cleaning, Frame, Pick};
use linear::SHADOWS;
use own::Own;
use tables::{Past, Tables};
use tlb::{Stamp, Tlb};

/// First frame of the pool. Above 2 MiB alignment, so that blocks are found.
pub const FIRST: u64 = 0x400;

/// A word of a reachable table was stored.
#[derive(Clone, Copy, Debug)]
pub struct EntryWrite {
    /// Whose table.
    pub vm: usize,
    /// Its number.
    pub table: usize,
    /// The word.
    pub index: u16,
    /// Its level.
    pub level: u8,
    /// Guest frames behind it.
    pub span: GfnRange,
    /// What it said.
    pub old: Descriptor,
    /// What it says.
    pub new: Descriptor,
}

/// What one CPU began and has not completed.
#[derive(Debug, Default)]
struct Pending {
    cleans: Vec<(u64, Cleaning)>,
    icache: Vec<(PfnRange, Stamp)>,
}

/// The machine's whole state.
#[derive(Debug)]
pub struct World {
    /// What kind of machine.
    pub config: Config,
    frames: Vec<Frame>,
    now: Stamp,
    /// Second-stage tables.
    pub tables: Tables,
    /// Translation caches.
    pub tlb: Tlb,
    /// The hypervisor's own mapping.
    pub own: Own,
    pending: [Pending; MAX_CPUS],
}

impl World {
    /// A machine that was just switched on, with `rom` frames of read-only memory behind the pool's.
    pub fn new(config: Config, rom: u64) -> Self {
        let mut frames: Vec<Frame> = (0..config.frames + rom).map(|_| Frame::new()).collect();
        frames[config.frames as usize..].iter_mut().for_each(|frame| (frame.rom, frame.taken) = (true, true));
        Self {
            config,
            frames,
            now: 0,
            tables: Tables::default(),
            tlb: Tlb::default(),
            own: Own::default(),
            pending: Default::default(),
        }
    }

    /// The moment of the last change.
    pub fn now(&self) -> Stamp {
        self.now
    }

    fn tick(&mut self) -> Stamp {
        self.now += 1;
        self.now
    }

    /// A frame, if there is memory.
    pub fn frame(&self, pfn: Pfn) -> Option<&Frame> {
        self.frames.get(pfn.get().checked_sub(FIRST)? as usize)
    }

    /// A frame that there is.
    ///
    /// # Panics
    ///
    /// If there is none: the core touched memory that nobody gave it.
    pub fn frame_mut(&mut self, pfn: Pfn) -> &mut Frame {
        let index = pfn.get().wrapping_sub(FIRST) as usize;
        self.frames.get_mut(index).unwrap_or_else(|| panic!("frame {pfn:#x} is no memory of this machine"))
    }

    /// `Machine::load`. Words are the hypervisor's: it goes through the cache.
    pub fn load(&mut self, word: Word, pick: Pick<'_>) -> u64 {
        self.frame_mut(word.frame()).read(word.index(), pick)
    }

    /// `Machine::store`. Returns the entries that walkers see differently now.
    pub fn store(&mut self, word: Word, value: u64, pick: Pick<'_>) -> Vec<EntryWrite> {
        let now = self.tick();
        let frame = self.frame_mut(word.frame());
        frame.write(word.index(), value, true, now, pick);
        let tables = frame.tables.clone();
        tables.into_iter().flat_map(|table| self.entry(table, word.index(), value)).collect()
    }

    /// Word `index` of a reachable table now holds `raw`.
    fn entry(&mut self, table: usize, index: u16, raw: u64) -> Vec<EntryWrite> {
        let (vm, level, span) = {
            let table = self.tables.get(table);
            (table.vm, table.level, table.span(index))
        };
        let new = Descriptor::read(raw, level, &self.config);
        let mut writes = Vec::new();
        let child = match new {
            Descriptor::Table(frame) => self.link(vm, level + 1, span.start(), frame, &mut writes),
            _ => None,
        };
        let at = self.now;
        let old = self.tables.record(table, index, Past { at, descriptor: new, child });
        writes.push(EntryWrite { vm, table, index, level, span, old, new });
        writes
    }

    /// The table in `frame` becomes reachable, with all that stands in it.
    fn link(&mut self, vm: usize, level: u8, base: Gfn, frame: Pfn, writes: &mut Vec<EntryWrite>) -> Option<usize> {
        let known = self.frame(frame)?.tables.iter().copied().find(|known| {
            let table = self.tables.get(*known);
            (table.vm, table.level, table.base) == (vm, level, base)
        });
        if known.is_some() {
            return known;
        }
        let table = self.tables.add(vm, level, base, frame, false);
        let tables = &mut self.frame_mut(frame).tables;
        if vm < SHADOWS {
            // One of the second stage has one way to it.
            tables.clear();
        }
        tables.push(table);
        let words = self.frame_mut(frame).line().other_than(0);
        for (index, raw) in words {
            writes.extend(self.entry(table, index, raw));
        }
        Some(table)
    }

    /// The base register of `vm` will point to `root`.
    pub fn add_root(&mut self, vm: usize, level: u8, root: PfnRange) {
        for number in 0..root.count() {
            let frame = root.start().offset(number);
            let base = Gfn::new(number << (entresol_table::shift(level) + 9));
            let table = self.tables.add(vm, level, base, frame, true);
            self.frame_mut(frame).tables = vec![table];
        }
    }

    /// `cpu` runs `vm` on the shadow tables from `root` on, which are those of [`shadow`](linear::shadow) number `number`, and has flushed what it knew of
    /// others.
    pub fn load_shadow(&mut self, cpu: usize, number: usize, vmid: Vmid, root: Pfn) {
        let known = self.tables.root(number, Gfn::new(0)).map(|table| self.tables.get(table).frame);
        if known != Some(root) {
            // It stood elsewhere before all tables were dropped.
            self.tables.uproot(number);
            self.add_root(number, 0, PfnRange::single(root));
        }
        let now = self.tick();
        self.tlb.load_shadow(cpu, number, vmid, now);
    }

    /// A moment of its own: what happened before is older than what comes.
    pub fn moment(&mut self) -> Stamp {
        self.tick()
    }

    /// `Machine::zero` and the fresh page of a copy.
    pub fn replace(&mut self, pfn: Pfn, content: Content) {
        let now = self.tick();
        self.forget_table(pfn, now);
        self.frame_mut(pfn).replace(content, now);
    }

    /// `Machine::copy` of one frame.
    pub fn copy(&mut self, from: Pfn, to: Pfn) {
        let content = self.frame_mut(from).line().clone();
        self.replace(to, content);
    }

    /// The pool gave frames out.
    pub fn taken(&mut self, frames: PfnRange) {
        for pfn in (0..frames.count()).map(|offset| frames.start().offset(offset)) {
            self.frame_mut(pfn).taken = true;
        }
    }

    /// The pool has frames back: they hold poison from now on.
    pub fn freed(&mut self, frames: PfnRange) {
        let now = self.tick();
        for pfn in (0..frames.count()).map(|offset| frames.start().offset(offset)) {
            self.forget_table(pfn, now);
            self.frame_mut(pfn).poison();
        }
    }

    fn forget_table(&mut self, pfn: Pfn, now: Stamp) {
        for table in std::mem::take(&mut self.frame_mut(pfn).tables) {
            self.tables.retire(table, now);
        }
    }

    /// `Machine::clean_invalidate_to_poc`.
    pub fn begin_clean(&mut self, cpu: usize, frames: PfnRange) {
        for pfn in (0..frames.count()).map(|offset| frames.start().offset(offset)) {
            let cleaning = self.frame_mut(pfn).begin_clean();
            self.pending[cpu].cleans.push((pfn.get(), cleaning));
        }
    }

    /// `Machine::invalidate_icache`.
    pub fn begin_icache(&mut self, cpu: usize, frames: PfnRange) {
        let now = self.tick();
        self.pending[cpu].icache.push((frames, now));
    }

    /// `Machine::tlb`.
    pub fn begin_flush(&mut self, cpu: usize, op: TlbOp) {
        let now = self.tick();
        match op {
            TlbOp::Own(frames) => self.own.begin(cpu, frames, now),
            op => self.tlb.begin(cpu, op, now),
        }
    }

    /// `Machine::complete`.
    pub fn complete(&mut self, cpu: usize) {
        self.tick();
        self.tlb.complete(cpu);
        self.own.complete(cpu);
        let Pending { cleans, icache } = std::mem::take(&mut self.pending[cpu]);
        for (pfn, cleaning) in cleans {
            self.frame_mut(Pfn::new(pfn)).end_clean(cleaning);
        }
        for (frames, began) in icache {
            for pfn in (0..frames.count()).map(|offset| frames.start().offset(offset)) {
                self.frame_mut(pfn).end_icache(began);
            }
        }
    }

    /// `Machine::unmap_own`.
    pub fn unmap_own(&mut self, frames: PfnRange) {
        let now = self.tick();
        self.own.unmap(frames, now);
    }

    /// `cpu` runs `vm` from now on.
    pub fn load_vm(&mut self, cpu: usize, vm: usize, vmid: Vmid) {
        let now = self.tick();
        self.tlb.load(cpu, vm, vmid, now);
    }

    /// `cpu` runs nothing from now on.
    pub fn put_vm(&mut self, cpu: usize) {
        let now = self.tick();
        self.tlb.put(cpu, now);
    }
}
