use super::*;
use core::cell::Cell;
use proptest::prelude::*;
use std::boxed::Box;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::vec::Vec;

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const CPUS: usize = 2;
/// Blocks of RAM, from 2 MiB on; the first is mapped by pages. Behind 1 GiB is one leaf of 1 GiB.
const BLOCKS: u64 = 4;
const ROOT: u64 = 0x1000;
/// First frame of the reserve; the map's own tables come before.
const RESERVE: u64 = 8;
const TABLES: u64 = 32;

/// An architecture whose tables are words of a test. A CPU's root is what it switched to last.
struct Fake {
    words: Box<[AtomicU64]>,
    cpu: Cell<usize>,
    roots: [Cell<u64>; CPUS],
    forgotten_tables: Cell<u64>,
    forgotten_windows: Cell<u64>,
}

impl Fake {
    fn new() -> Self {
        let words: Box<[AtomicU64]> = (0..TABLES * 512).map(|_| AtomicU64::new(0)).collect();
        let put = |table: u64, index: u64, raw: u64| words[(table / 8 + index) as usize].store(raw, Ordering::Relaxed);
        put(ROOT, 0, 0x2000 | PRESENT);
        put(0x2000, 0, 0x3000 | PRESENT);
        put(0x2000, 1, 1 << 30 | LARGE | PRESENT);
        put(0x3000, 1, 0x4000 | PRESENT);
        (0..512).for_each(|page| put(0x4000, page, (512 + page) << 12 | PRESENT));
        (2..=BLOCKS).for_each(|block| put(0x3000, block, block << 21 | LARGE | PRESENT));
        let roots = [const { Cell::new(ROOT) }; CPUS];
        Self { words, cpu: Cell::new(0), roots, forgotten_tables: Cell::new(0), forgotten_windows: Cell::new(0) }
    }
}

impl Regime for Fake {
    const WINDOWS: u64 = WINDOW_ROOT_INDEX << 39;

    fn cpu(&self) -> usize {
        self.cpu.get()
    }

    fn cpus(&self) -> usize {
        CPUS
    }

    fn root(&self) -> u64 {
        self.roots[self.cpu.get()].get()
    }

    fn word(&self, table: Table, index: u64) -> &AtomicU64 {
        &self.words[(table.address() / 8 + index) as usize]
    }

    fn table(&self, address: u64) -> u64 {
        address | PRESENT
    }

    fn leaf(&self, address: u64, size: Leaf) -> u64 {
        address | PRESENT | if size == Leaf::Block { LARGE } else { 0 }
    }

    fn entry(&self, raw: u64, shift: u32) -> Entry {
        match raw {
            raw if raw & PRESENT == 0 => Entry::Absent,
            raw if raw & LARGE != 0 || shift == 12 => Entry::Leaf,
            raw => Entry::Table(raw & ADDRESS),
        }
    }

    fn publish(&self) {}

    fn forget_tables(&self) {
        self.forgotten_tables.set(self.forgotten_tables.get() + 1);
    }

    fn forget_window(&self, _address: u64) {
        self.forgotten_windows.set(self.forgotten_windows.get() + 1);
    }

    fn switch(&self, root: Table) {
        self.roots[self.cpu.get()].set(root.address());
    }
}

fn frames(start: u64, count: u64) -> PfnRange {
    PfnRange::new(Pfn::new(start), count).unwrap()
}

/// RAM that can leave, and a reserve for it.
fn made() -> Own<Fake> {
    let (span, own) = (frames(OWN_BLOCK, BLOCKS * OWN_BLOCK), Own::new(Fake::new()));
    let wanted = reserve_for(span, CPUS);
    assert!(RESERVE + wanted <= TABLES, "the test has room");
    assert!(!own.can_unmap());
    own.init(Aside { reserve: frames(RESERVE, wanted), span });
    for cpu in 0..CPUS {
        own.regime.cpu.set(cpu);
        own.init_cpu();
    }
    own
}

/// What a CPU's walk finds at an address.
fn translated(own: &Own<Fake>, address: u64) -> Option<u64> {
    let mut table = own.root();
    for shift in SHIFTS {
        let raw = own.word(table, address >> shift).load(Ordering::Relaxed);
        match own.regime.entry(raw, shift) {
            Entry::Absent => return None,
            Entry::Leaf => return Some(raw & ADDRESS & !((1 << shift) - 1) | address & ((1 << shift) - 1)),
            Entry::Table(next) => table = Table(next),
        }
    }
    None
}

#[test]
fn each_cpu_has_windows_of_its_own() {
    let own = made();
    own.regime.cpu.set(1);
    let (frame, source) = (Pfn::new(3 * OWN_BLOCK + 5), Pfn::new(7));
    own.through(Window::Work, frame, |work| {
        assert_eq!(translated(&own, work + 3), Some(frame.base().get() + 3));
        own.through(Window::Source, source, |address| {
            assert_ne!(address, work);
            assert_eq!(translated(&own, address), Some(source.base().get()));
        });
        own.regime.cpu.set(0);
        assert_eq!(translated(&own, work), None, "another CPU sees it");
        own.regime.cpu.set(1);
        let again = catch_unwind(AssertUnwindSafe(|| own.through(Window::Work, source, |_| ())));
        assert!(again.is_err(), "an open window is opened");
    });
    assert_eq!(translated(&own, Fake::WINDOWS), None);
    assert_eq!(own.regime.forgotten_windows.get(), 2);
}

#[test]
fn tables_are_set_aside_where_that_is_not_felt() {
    let mut ranges = [frames(0x1_0000, 0x8000), frames(0x400, 0x1000)];
    let aside = set_aside(&mut ranges, 2).unwrap();
    // From frame 0x400 to 0x18000, in blocks of 0x200, and four for each CPU.
    let wanted = 8 + (0x1_8000 - 0x400) / 0x200;
    assert_eq!(aside, Aside { reserve: frames(0x1_8000 - wanted, wanted), span: frames(0x400, 0x1_8000 - 0x400) });
    assert_eq!(ranges, [frames(0x1_0000, 0x8000 - wanted), frames(0x400, 0x1000)]);
    let mut small = [frames(0x400, 0x80)];
    assert_eq!(set_aside(&mut small, 4), Err(17));
    assert_eq!(small, [frames(0x400, 0x80)]);
    assert_eq!(set_aside(&mut [], 1), Err(0));
}

#[test]
fn what_is_mapped_by_more_than_a_block_stays() {
    let own = made();
    let giant = frames(1 << 18, OWN_BLOCK);
    assert_eq!(own.unmap(giant), Err(RemoveError::Unsplittable { pfn: giant.start() }));
    let single = frames(2 * OWN_BLOCK + 1, 1);
    assert_eq!(own.unmap(single), Err(RemoveError::Unsplittable { pfn: single.start() }), "its block never left");
    let below = frames(0, OWN_BLOCK);
    assert_eq!(own.unmap(below), Err(RemoveError::Unsplittable { pfn: below.start() }), "no table is set aside");
    assert!(own.is_mapped(giant.start()) && own.count_mapped(giant) == OWN_BLOCK);
    assert!(!own.may_be_absent(frames(OWN_BLOCK, BLOCKS * OWN_BLOCK)), "nothing ever left");
}

#[test]
fn a_table_is_forgotten_before_its_block_is_put_together() {
    let own = made();
    let block = frames(2 * OWN_BLOCK, OWN_BLOCK);
    own.unmap(block).unwrap();
    own.map(block);
    assert_eq!(own.regime.forgotten_tables.get(), 0, "no walk ever saw a table there");
    own.unmap(block).unwrap();
    let single = PfnRange::single(block.start().offset(9));
    own.map(single);
    assert_eq!(own.census(), Census { blocks: BLOCKS - 2, tables: 2, absent: 0 }, "the first has pages from the start");
    assert!(catch_unwind(AssertUnwindSafe(|| own.map(block))).is_err(), "one of its frames is mapped");
    own.unmap(single).unwrap();
    own.map(block);
    assert_eq!(own.regime.forgotten_tables.get(), 1);
    assert_eq!(own.census(), Census { blocks: BLOCKS - 1, tables: 1, absent: 0 });
}

/// A step: a block leaves, or comes back; one of its frames comes back, or leaves.
#[derive(Clone, Copy, Debug)]
enum Step {
    Block(u64),
    Page(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..BLOCKS).prop_map(Step::Block),
        (0..BLOCKS, prop_oneof![0u64..4, 508u64..512]).prop_map(|(block, page)| Step::Page(block, page)),
    ]
}

proptest! {
    /// After any sequence every CPU's walk finds exactly the frames that are in, each where it is.
    #[test]
    fn walks_find_what_is_in(steps in proptest::collection::vec(step(), 0..60)) {
        let own = made();
        // Blocks that left, with the frames that came back.
        let mut left: Vec<Option<BTreeSet<u64>>> = std::vec![None; BLOCKS as usize];
        for step in steps {
            match step {
                Step::Block(number) => {
                    let block = frames((number + 1) * OWN_BLOCK, OWN_BLOCK);
                    let state = &mut left[number as usize];
                    match state {
                        None => {
                            own.unmap(block).unwrap();
                            *state = Some(BTreeSet::new());
                        }
                        Some(back) if back.is_empty() => {
                            own.map(block);
                            *state = None;
                        }
                        // Its owner would take them out first.
                        Some(_) => {}
                    }
                }
                Step::Page(number, page) => {
                    let Some(back) = &mut left[number as usize] else { continue };
                    let single = frames((number + 1) * OWN_BLOCK + page, 1);
                    if back.remove(&page) {
                        own.unmap(single).unwrap();
                    } else {
                        own.map(single);
                        back.insert(page);
                    }
                }
            }
        }
        for (cpu, number) in (0..CPUS).flat_map(|cpu| (0..BLOCKS).map(move |number| (cpu, number))) {
            own.regime.cpu.set(cpu);
            let block = frames((number + 1) * OWN_BLOCK, OWN_BLOCK);
            let inside = |page: u64| left[number as usize].as_ref().is_none_or(|back| back.contains(&page));
            for page in 0..OWN_BLOCK {
                let frame = block.start().offset(page);
                let address = frame.base().get();
                prop_assert_eq!(translated(&own, address + 8), inside(page).then_some(address + 8));
                prop_assert_eq!(own.is_mapped(frame), inside(page));
                prop_assert!(inside(page) || own.may_be_absent(PfnRange::single(frame)));
            }
            prop_assert_eq!(own.count_mapped(block), (0..OWN_BLOCK).filter(|page| inside(*page)).count() as u64);
        }
    }
}
