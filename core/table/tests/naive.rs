//! Random operations on the table and on a plain list of leaves say the same, for every IPA size; the greedy TLB sees no
//! violation, and no table page is lost.

mod common;

use std::collections::BTreeMap;

use common::{Bench, VMID, gfns, leaf};
use entresol_addr::{Gfn, GfnRange, PageSize, Pfn};
use entresol_table::{Entry, Leaf, MapError, MergeError, Permissions, RelaxError, SplitError, Straddle};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Op {
    Map { gfn: u64, version: u64, size: PageSize, permissions: Permissions },
    Unmap { start: u64, count: u64 },
    Protect { start: u64, count: u64, straddle: Straddle },
    Relax { gfn: u64 },
    Split { gfn: u64 },
    Merge { gfn: u64, size: PageSize },
    Age { start: u64, count: u64 },
    MakeYoung { gfn: u64 },
}

/// The specification: leaves by first guest frame.
#[derive(Default)]
struct Naive(BTreeMap<u64, Leaf>);

impl Naive {
    fn overlapping(&self, range: GfnRange) -> Vec<(u64, Leaf)> {
        let overlaps = |start: u64, leaf: &Leaf| GfnRange::block(Gfn::new(start), leaf.size).overlaps(range);
        self.0.iter().filter(|(start, leaf)| overlaps(**start, leaf)).map(|(start, leaf)| (*start, *leaf)).collect()
    }

    fn at(&self, gfn: u64) -> Option<(u64, Leaf)> {
        self.overlapping(gfns(gfn, 1)).pop()
    }

    fn split(&mut self, start: u64, block: Leaf) {
        let smaller = block.size.smaller().unwrap();
        self.0.remove(&start);
        for index in 0..512 {
            self.0.insert(start + index as u64 * smaller.frames(), block.child(index, smaller));
        }
    }

    fn map(&mut self, gfn: u64, new: &Leaf) -> Result<(), MapError> {
        loop {
            match self.at(gfn) {
                Some((start, old)) if old.size > new.size => {
                    let serves = old.frame_of(Gfn::new(gfn)) == new.pfn && old.memory == new.memory;
                    if serves && old.permissions.contains(new.permissions) {
                        return Err(MapError::Present(old));
                    }
                    self.split(start, old);
                }
                Some((_, old)) if old.same_output(new) => return Err(MapError::Present(old)),
                _ => {
                    self.remove(GfnRange::block(Gfn::new(gfn), new.size));
                    self.0.insert(gfn, *new);
                    return Ok(());
                }
            }
        }
    }

    fn remove(&mut self, range: GfnRange) -> Vec<(Gfn, Leaf)> {
        let gone = self.overlapping(range);
        self.0.retain(|start, _| !gone.iter().any(|(gone, _)| gone == start));
        gone.into_iter().map(|(start, leaf)| (Gfn::new(start), leaf)).collect()
    }

    fn merge(&mut self, gfn: u64, size: PageSize) -> Result<(), MergeError> {
        let (block, smaller) = (GfnRange::block(Gfn::new(gfn), size), size.smaller().ok_or(MergeError::NotUniform)?);
        let parts = self.overlapping(block);
        let (start, first) = *parts.first().ok_or(MergeError::NotUniform)?;
        let continues = |index: usize, start: u64, leaf: &Leaf| {
            let expected = Leaf { young: leaf.young, ..first.child(index as u16, smaller) };
            start == block.start().get() + index as u64 * smaller.frames() && *leaf == expected
        };
        let uniform = parts.iter().enumerate().all(|(index, (start, leaf))| continues(index, *start, leaf));
        if parts.len() != 512 || !uniform || !first.pfn.is_aligned(size) {
            return Err(MergeError::NotUniform);
        }
        let young = parts.iter().any(|(_, leaf)| leaf.young);
        self.remove(block);
        self.0.insert(start, Leaf { size, young, ..first });
        Ok(())
    }

    fn change(&mut self, range: GfnRange, mut f: impl FnMut(u64, &mut Leaf) -> bool) -> u64 {
        let mut changed = 0;
        for (start, _) in self.overlapping(range) {
            changed += f(start, self.0.get_mut(&start).unwrap()) as u64;
        }
        changed
    }
}

/// Performs `op` on both and compares what they answer.
fn perform(bench: &mut Bench, naive: &mut Naive, op: &Op) {
    match *op {
        Op::Map { gfn, version, size, permissions } => {
            let gfn = Gfn::new(gfn).align_down(size).get();
            // Equal versions of neighbours are contiguous, so that merges happen.
            let new = leaf((version << 26) + gfn, size, permissions);
            let expected = if size == PageSize::Size1G && bench.table.geometry().root_level() == 2 {
                Err(MapError::TooLarge { size })
            } else {
                naive.map(gfn, &new)
            };
            assert_eq!(bench.map(gfn, &new, &mut ()), expected);
        }
        Op::Unmap { start, count } => {
            assert_eq!(bench.unmap(gfns(start, count)), naive.remove(gfns(start, count)));
        }
        Op::Protect { start, count, straddle } => {
            let range = gfns(start, count);
            let expected = naive.change(range, |start, leaf| {
                let inside = range.covers(GfnRange::block(Gfn::new(start), leaf.size));
                let hit = leaf.permissions.write && (inside || straddle == Straddle::Whole);
                leaf.permissions.write &= !hit;
                hit
            });
            assert_eq!(bench.table.protect(&bench.machine, VMID, range, Permissions::WRITE, straddle), expected);
        }
        Op::Relax { gfn } => {
            let found = naive.at(gfn);
            let frame = found.map_or(Pfn::new(0), |(_, leaf)| leaf.frame_of(Gfn::new(gfn)));
            let expected = found.map(|(start, _)| {
                let leaf = naive.0.get_mut(&start).unwrap();
                leaf.permissions = leaf.permissions.union(Permissions::WRITE);
                leaf.young = true;
                *leaf
            });
            let (machine, gfn) = (&bench.machine, Gfn::new(gfn));
            let wrong = bench.table.relax(machine, VMID, gfn, frame.offset(1), Permissions::WRITE, &mut ());
            assert_eq!(wrong, Err(RelaxError::Gone), "another frame is not relaxed");
            let result = bench.table.relax(machine, VMID, gfn, frame, Permissions::WRITE, &mut ());
            assert_eq!(result, expected.ok_or(RelaxError::Gone));
        }
        Op::Split { gfn } => {
            let expected = match naive.at(gfn) {
                Some((start, block)) if block.size != PageSize::Size4K => {
                    naive.split(start, block);
                    Ok(())
                }
                _ => Err(SplitError::NotBlock),
            };
            let mut reserve = bench.reserve(1);
            assert_eq!(bench.table.split(&bench.machine, VMID, Gfn::new(gfn), &mut reserve), expected);
            bench.give_back(reserve);
        }
        Op::Merge { gfn, size } => {
            let result = bench.table.merge(&bench.machine, VMID, Gfn::new(gfn), size);
            assert_eq!(result.as_ref().map(|_| ()).map_err(|error| *error), naive.merge(gfn, size));
            if let Ok(retired) = result {
                bench.retire(retired);
            }
        }
        Op::Age { start, count } => {
            let range = gfns(start, count);
            let young = naive.change(range, |_, leaf| std::mem::take(&mut leaf.young));
            assert_eq!(bench.table.test_young(&bench.machine, range), young != 0);
            assert_eq!(bench.table.age(&bench.machine, VMID, range), young);
        }
        Op::MakeYoung { gfn } => {
            let expected = naive.at(gfn).map(|(start, _)| {
                let leaf = naive.0.get_mut(&start).unwrap();
                leaf.young = true;
                *leaf
            });
            let result = bench.table.make_young(&bench.machine, Gfn::new(gfn));
            assert_eq!(result, expected.ok_or(RelaxError::Gone));
        }
    }
}

fn permissions() -> impl Strategy<Value = Permissions> {
    prop_oneof![Just(Permissions::READ), Just(Permissions::READ_WRITE), Just(Permissions::ALL)]
}

fn sizes() -> impl Strategy<Value = PageSize> {
    prop_oneof![4 => Just(PageSize::Size4K), 3 => Just(PageSize::Size2M), 1 => Just(PageSize::Size1G)]
}

/// Guest frames that are close enough to meet: two gigabytes at the bottom, two at the top.
fn places(ipa_bits: u8) -> impl Strategy<Value = u64> {
    let top = (1 << (ipa_bits - 12)) - (2 << 18);
    let region = prop_oneof![Just(0), Just(top)];
    (region, 0..2u64, 0..3u64, prop_oneof![Just(0), Just(1), Just(511), 0..512u64])
        .prop_map(|(region, giga, mega, page)| region + (giga << 18) + (mega << 9) + page)
}

fn counts() -> impl Strategy<Value = u64> {
    prop_oneof![1..4u64, Just(512), Just(513), Just(1024), Just(1 << 18), Just((1 << 18) + 5)]
}

fn ops(ipa_bits: u8) -> impl Strategy<Value = Op> {
    let range = || (places(ipa_bits), counts());
    let straddle = prop_oneof![Just(Straddle::Whole), Just(Straddle::Skip)];
    prop_oneof![
        6 => (places(ipa_bits), 0..2u64, sizes(), permissions())
            .prop_map(|(gfn, version, size, permissions)| Op::Map { gfn, version, size, permissions }),
        2 => range().prop_map(|(start, count)| Op::Unmap { start, count }),
        1 => (range(), straddle).prop_map(|((start, count), straddle)| Op::Protect { start, count, straddle }),
        1 => places(ipa_bits).prop_map(|gfn| Op::Relax { gfn }),
        2 => places(ipa_bits).prop_map(|gfn| Op::Split { gfn }),
        2 => (places(ipa_bits), sizes()).prop_map(|(gfn, size)| Op::Merge { gfn, size }),
        1 => range().prop_map(|(start, count)| Op::Age { start, count }),
        1 => places(ipa_bits).prop_map(|gfn| Op::MakeYoung { gfn }),
    ]
}

fn scripts() -> impl Strategy<Value = (u8, Vec<Op>)> {
    (32..=48u8).prop_flat_map(|bits| (Just(bits), prop::collection::vec(ops(bits), 1..24)))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_table_is_the_list((ipa_bits, script) in scripts()) {
        let (mut bench, mut naive) = (Bench::new(ipa_bits, 96), Naive::default());
        for op in &script {
            perform(&mut bench, &mut naive, op);
            let expected: Vec<_> = naive.0.iter().map(|(start, leaf)| (Gfn::new(*start), *leaf)).collect();
            assert_eq!(bench.leaves(), expected, "after {op:?}");
            bench.audit();
        }
        let (machine, frames) = (&bench.machine, bench.frames);
        for (start, leaf) in &naive.0 {
            let last = Gfn::new(start + leaf.size.frames() - 1);
            prop_assert_eq!(bench.table.walk(machine, last).unwrap().entry, Entry::Leaf(*leaf));
        }
        let tables = bench.table.census().tables;
        let mut freed = 0;
        let root = bench.table.destroy(machine, VMID, |_| freed += 1);
        prop_assert_eq!(freed, tables);
        prop_assert_eq!(root.start(), Pfn::new(common::FIRST));
        prop_assert_eq!(bench.free.len() as u64 + freed, frames);
    }
}
