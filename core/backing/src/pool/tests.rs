//! Counts, alignment, misuse, and random traffic against a map of what is taken.

use std::collections::BTreeMap;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::OutOfMemory;

fn pool(first: u64, frames: u64, cpus: usize) -> FramePool {
    let meta = (0..frames).map(|_| FrameMeta::new()).collect();
    let pool = FramePool::new(Pfn::new(first), meta, cpus).unwrap();
    pool.add(PfnRange::new(Pfn::new(first), frames).unwrap()).unwrap();
    pool
}

fn order(order: u8) -> Order {
    Order::new(order).unwrap()
}

#[test]
fn every_frame_is_given_out_once_and_comes_back() {
    let pool = pool(0x1003, 1600, 2);
    let mut taken: Vec<_> = std::iter::from_fn(|| pool.take(0, Order::PAGE).ok()).collect();
    assert_eq!((taken.len(), pool.free_frames()), (1600, 0));
    taken.sort();
    taken.dedup();
    assert_eq!(taken.len(), 1600);
    taken.into_iter().for_each(|pfn| pool.give(1, pfn, Order::PAGE));
    assert_eq!(pool.free_frames(), 1600);
    // Joined again: as many aligned blocks as the range holds.
    let blocks = std::iter::from_fn(|| pool.take(0, Order::BLOCK).ok()).inspect(|pfn| assert_eq!(pfn.get() % 512, 0));
    assert_eq!(blocks.count(), 2);
}

#[test]
fn caches_of_other_cpus_are_emptied_before_memory_is_out() {
    let pool = pool(0, 20, 3);
    let taken: Vec<_> = (0..20).map(|_| pool.take(0, Order::PAGE).unwrap()).collect();
    taken.into_iter().for_each(|pfn| pool.give(2, pfn, Order::PAGE));
    assert_eq!(pool.take_at_hand(Order::PAGE), None, "all are in the cache of CPU 2");
    assert!(pool.take(1, order(4)).is_ok());
    assert_eq!((0..5).filter(|_| pool.take(0, Order::PAGE).is_ok()).count(), 4);
    assert_eq!(pool.take(0, Order::PAGE), Err(OutOfMemory));
}

#[test]
fn holes_stay_holes() {
    let meta = (0..100).map(|_| FrameMeta::new()).collect();
    let pool = FramePool::new(Pfn::new(1000), meta, 1).unwrap();
    let range = |start, count| PfnRange::new(Pfn::new(start), count).unwrap();
    pool.add(range(1000, 10)).unwrap();
    pool.add(range(1050, 50)).unwrap();
    assert_eq!(pool.add(range(1045, 6)), Err(AddError::Present { pfn: Pfn::new(1050) }));
    assert_eq!(pool.add(range(1099, 2)), Err(AddError::Present { pfn: Pfn::new(1099) }));
    assert_eq!(pool.add(range(990, 5)), Err(AddError::Outside { pfn: Pfn::new(990) }));
    assert_eq!((pool.total_frames(), pool.free_frames()), (60, 60));
    assert_eq!(pool.any_of(range(0, 1000)), None);
    assert_eq!(pool.any_of(range(1020, 2000)), Some(Pfn::new(1050)));
    while let Ok(pfn) = pool.take(0, Order::PAGE) {
        assert!(range(1000, 10).contains(pfn) || range(1050, 50).contains(pfn));
    }
}

#[test]
#[should_panic(expected = "given back twice")]
fn a_page_given_back_twice_is_caught() {
    let pool = pool(0, 64, 1);
    let pfn = pool.take(0, Order::PAGE).unwrap();
    pool.give(0, pfn, Order::PAGE);
    pool.give(0, pfn, Order::PAGE);
}

#[test]
#[should_panic(expected = "given back twice")]
fn a_page_given_back_after_it_was_joined_is_caught() {
    let pool = pool(0, 512, 1);
    let pfn = pool.take(0, order(1)).unwrap();
    pool.give(0, pfn, order(1));
    pool.give(0, pfn.offset(1), Order::PAGE);
}

#[test]
#[should_panic(expected = "not its owner's")]
fn the_wrong_order_is_caught() {
    let pool = pool(0, 512, 1);
    let pfn = pool.take(0, order(3)).unwrap();
    pool.give(0, pfn, order(2));
}

#[test]
#[should_panic(expected = "not this pool's")]
fn a_foreign_frame_is_caught() {
    pool(100, 10, 1).give(0, Pfn::new(99), Order::PAGE);
}

#[test]
#[should_panic(expected = "given back twice")]
fn a_deferred_frame_cannot_be_given() {
    let pool = pool(0, 10, 1);
    let pfn = pool.take(0, Order::PAGE).unwrap();
    pool.defer(pfn, Order::PAGE);
    pool.give(0, pfn, Order::PAGE);
}

#[test]
fn deferred_frames_wait_for_those_who_were_pinned() {
    let (pool, epoch) = (pool(0, 1024, 1), Epoch::new());
    let (first, second) = (pool.take(0, Order::PAGE).unwrap(), pool.take(0, Order::BLOCK).unwrap());
    let early = epoch.pin(1);
    pool.defer(first, Order::PAGE);
    assert_eq!(pool.reap(&epoch, 0, 10), 0);
    pool.defer(second, Order::BLOCK);
    let late = epoch.pin(2);
    drop(early);
    assert_eq!(pool.reap(&epoch, 0, 10), 1, "the second batch may be in use by the late reader");
    assert_eq!((pool.free_frames(), pool.deferred_frames()), (512, 512));
    drop(late);
    assert_eq!(pool.reap(&epoch, 0, 10), 512);
    assert_eq!((pool.free_frames(), pool.deferred_frames()), (1024, 0));
}

#[test]
fn reaping_stops_at_its_limit() {
    let (pool, epoch) = (pool(0, 64, 1), Epoch::new());
    (0..10).for_each(|_| pool.defer(pool.take(0, Order::PAGE).unwrap(), Order::PAGE));
    assert_eq!([pool.reap(&epoch, 0, 4), pool.reap(&epoch, 0, 4), pool.reap(&epoch, 0, 4)], [4, 4, 2]);
    assert_eq!(pool.free_frames(), 64);
}

#[test]
fn a_split_block_goes_back_page_by_page() {
    let pool = pool(0, 512, 1);
    let block = pool.take(0, Order::BLOCK).unwrap();
    pool.split(block, Order::BLOCK);
    (0..512).for_each(|page| pool.give(0, block.offset(page), Order::PAGE));
    assert_eq!(pool.take(0, Order::BLOCK), Ok(block));
}

#[test]
fn cpus_in_parallel_lose_and_double_nothing() {
    let pool = pool(77, 700, 4);
    std::thread::scope(|scope| {
        for cpu in 0..4 {
            let pool = &pool;
            scope.spawn(move || {
                let mut mine = Vec::new();
                for round in 0..4000u64 {
                    let size = order([0, 0, 0, 1, 3][(round % 5) as usize]);
                    if round % 7 < 4 {
                        mine.extend(pool.take(cpu, size).ok().map(|pfn| (pfn, size)));
                    } else if let Some((pfn, size)) = mine.pop() {
                        pool.give(cpu, pfn, size);
                    }
                }
                mine.into_iter().for_each(|(pfn, size)| pool.give(cpu, pfn, size));
            });
        }
    });
    assert_eq!(pool.free_frames(), 700);
}

proptest! {
    #[test]
    fn blocks_never_overlap_and_counts_are_exact(
        first in 0u64..600,
        frames in 1u64..1400,
        traffic in prop::collection::vec((any::<bool>(), 0u8..10, any::<prop::sample::Index>(), 0usize..3), 1..200),
    ) {
        let pool = pool(first, frames, 3);
        let mut taken: BTreeMap<u64, Order> = BTreeMap::new();
        let mut used = 0;
        for (take, size, which, cpu) in traffic {
            if take {
                let size = order(size);
                let Ok(pfn) = pool.take(cpu, size) else { continue };
                let (start, end) = (pfn.get(), pfn.get() + size.frames());
                prop_assert!(start % size.frames() == 0 && start >= first && end <= first + frames);
                let below = taken.range(..end).next_back();
                prop_assert!(below.is_none_or(|(other, order)| other + order.frames() <= start));
                taken.insert(start, size);
                used += size.frames();
            } else if !taken.is_empty() {
                let pfn = *taken.keys().nth(which.index(taken.len())).unwrap();
                let size = taken.remove(&pfn).unwrap();
                pool.give(cpu, Pfn::new(pfn), size);
                used -= size.frames();
            }
            prop_assert_eq!(pool.free_frames(), frames - used);
        }
        for (pfn, size) in taken {
            pool.give(0, Pfn::new(pfn), size);
        }
        // Nothing is broken up for good: what fits as a block at the start fits again.
        let blocks = |pool: &FramePool| std::iter::from_fn(|| pool.take(0, Order::BLOCK).ok()).count();
        let whole = ((first + frames) / 512).saturating_sub(first.div_ceil(512));
        prop_assert_eq!(blocks(&pool) as u64, whole);
    }
}
