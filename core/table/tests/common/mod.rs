//! What the tests share: a plain format, a pool of table pages, and a TLB that remembers everything.
#![allow(dead_code, reason = "each test program uses its part")]

pub mod tlb;

use std::collections::BTreeSet;

use entresol_addr::{Gfn, GfnRange, PageSize, Pfn, PfnRange};
use entresol_machine::Machine;
use entresol_machine::flat::FlatMachine;
use entresol_table::{
    Entry, Format, Geometry, Leaf, Mapped, Memory, PageWork, Permissions, Reserve, Retired, Table, Vmid, level_of,
    size_at,
};

/// The VMID of all tests.
pub const VMID: Vmid = Vmid::new(7);
/// First frame of the test machine's memory; its roots are aligned to 16 frames.
pub const FIRST: u64 = 0x100;

const VALID: u64 = 1 << 0;
const TABLE: u64 = 1 << 1;
const READ: u64 = 1 << 2;
const WRITE: u64 = 1 << 3;
const EXECUTE: u64 = 1 << 4;
const DEVICE: u64 = 1 << 5;
const YOUNG: u64 = 1 << 6;

/// A format of nobody's hardware: one bit for each thing.
#[derive(Clone, Copy)]
pub struct Plain;

impl Format for Plain {
    const BROKEN: u64 = 1 << 7;
    const FRAME_BITS: u32 = 40;

    fn geometry(&self, ipa_bits: u8) -> Option<Geometry> {
        Geometry::new(ipa_bits, 16)
    }

    fn decode(&self, raw: u64, level: u8) -> Entry {
        let pfn = Pfn::new(raw >> 12);
        match (raw & (VALID | TABLE), size_at(level)) {
            (0, _) if raw == 0 => Entry::Vacant,
            (bits, _) if bits == VALID | TABLE && level < 3 => Entry::Table(pfn),
            (VALID, Some(size)) => Entry::Leaf(Leaf {
                pfn,
                size,
                permissions: Permissions {
                    read: raw & READ != 0,
                    write: raw & WRITE != 0,
                    execute: raw & EXECUTE != 0,
                },
                memory: if raw & DEVICE != 0 { Memory::Device } else { Memory::Normal },
                young: raw & YOUNG != 0,
            }),
            _ => Entry::Broken,
        }
    }

    fn leaf(&self, leaf: &Leaf) -> u64 {
        let bit = |set: bool, bit: u64| if set { bit } else { 0 };
        leaf.pfn.get() << 12
            | VALID
            | bit(leaf.permissions.read, READ)
            | bit(leaf.permissions.write, WRITE)
            | bit(leaf.permissions.execute, EXECUTE)
            | bit(leaf.memory == Memory::Device, DEVICE)
            | bit(leaf.young, YOUNG)
    }

    fn table(&self, frame: Pfn) -> u64 {
        frame.get() << 12 | VALID | TABLE
    }

    fn young(&self, raw: u64) -> u64 {
        raw | YOUNG
    }
}

/// A young leaf of normal memory.
pub fn leaf(pfn: u64, size: PageSize, permissions: Permissions) -> Leaf {
    Leaf { pfn: Pfn::new(pfn), size, permissions, memory: Memory::Normal, young: true }
}

pub fn gfns(start: u64, count: u64) -> GfnRange {
    GfnRange::new(Gfn::new(start), count).unwrap()
}

/// A machine, a table on it, and the frames that are left for table pages.
pub struct Bench {
    pub machine: FlatMachine,
    pub table: Table<Plain>,
    pub free: BTreeSet<Pfn>,
    pub frames: u64,
    pub tlb: tlb::GreedyTlb,
}

impl Bench {
    /// `frames` is for table pages.
    pub fn new(ipa_bits: u8, frames: u64) -> Self {
        let machine = FlatMachine::coherent(Pfn::new(FIRST), 16 + frames);
        let geometry = Plain.geometry(ipa_bits).unwrap();
        let root = PfnRange::new(Pfn::new(FIRST), geometry.root_frames()).unwrap();
        let table = Table::new(&machine, Plain, geometry, root).unwrap();
        let free = (0..frames).map(|frame| Pfn::new(FIRST + 16 + frame)).collect();
        let tlb = tlb::GreedyTlb::new(geometry, root);
        machine.events();
        Self { machine, table, free, frames, tlb }
    }

    /// A reserve of `count` pages.
    pub fn reserve(&mut self, count: usize) -> Reserve {
        let mut reserve = Reserve::new();
        for _ in 0..count {
            let frame = self.free.pop_first().expect("the bench has frames for the test");
            self.machine.zero(PfnRange::single(frame));
            reserve.push(frame).unwrap();
        }
        reserve
    }

    /// Takes back what a reserve has left.
    pub fn give_back(&mut self, mut reserve: Reserve) {
        while let Some(frame) = reserve.pop() {
            let words = (0..512).map(|index| self.machine.load(entresol_machine::Word::new(frame, index)));
            assert!(words.into_iter().all(|raw| raw == 0), "a frame in the reserve is zeroed");
            assert!(self.free.insert(frame), "{frame:?} came back twice");
        }
    }

    /// Takes back retired pages: nobody else walks here.
    pub fn retire(&mut self, retired: Retired) {
        let free = &mut self.free;
        retired.drain(&self.machine, Plain, |frame| assert!(free.insert(frame), "{frame:?} came back twice"));
    }

    /// Maps with as many table pages as it says it needs.
    pub fn map(&mut self, gfn: u64, leaf: &Leaf, work: &mut impl PageWork) -> Result<(), entresol_table::MapError> {
        let gfn = Gfn::new(gfn);
        let needed = self.table.needed(&self.machine, gfn, leaf.size);
        let mut reserve = self.reserve(needed);
        let result = self.table.map(&self.machine, VMID, gfn, leaf, &mut reserve, work);
        self.give_back(reserve);
        result.map(|Mapped { retired }| self.retire(retired))
    }

    /// Unmaps and settles; returns the leaves removed.
    pub fn unmap(&mut self, range: GfnRange) -> Vec<(Gfn, Leaf)> {
        let mut gone = Gone::default();
        let settled = self.table.unmap(&self.machine, VMID, range, &mut gone).settle(&self.machine, VMID);
        self.retire(settled.retired);
        gone.0
    }

    /// All leaves.
    pub fn leaves(&self) -> Vec<(Gfn, Leaf)> {
        let mut leaves = Vec::new();
        self.table.visit(&self.machine, gfns(0, u64::MAX), |gfn, leaf| leaves.push((gfn, leaf)));
        leaves
    }

    /// Replays what happened since the last call to the TLB, and checks that nothing is owed and no frame lost.
    pub fn audit(&mut self) {
        self.tlb.replay(self.machine.events());
        self.tlb.assert_settled();
        let census = self.table.census();
        assert_eq!(self.free.len() as u64 + census.tables, self.frames, "each table page is in the tree or free");
        let mut leaves = [0; 3];
        for (gfn, leaf) in self.leaves() {
            assert!(gfn.is_aligned(leaf.size) && leaf.pfn.is_aligned(leaf.size), "INV-5: {gfn:?} {leaf:?}");
            leaves[3 - level_of(leaf.size) as usize] += 1;
        }
        assert_eq!(census.leaves, leaves, "the census counts the leaves that are there");
    }
}

/// Remembers what was removed.
#[derive(Default)]
pub struct Gone(pub Vec<(Gfn, Leaf)>);

impl PageWork for Gone {
    fn removed(&mut self, gfn: Gfn, leaf: Leaf) {
        self.0.push((gfn, leaf));
    }
}
