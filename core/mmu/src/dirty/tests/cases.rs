//! Single cases.

use entresol_addr::{GfnRange, Gpa, PAGE_SIZE, PageSize};
use entresol_backing::{Policy, Spec};
use entresol_fault::{Access, Cause, Fault};
use entresol_slot::{ErrorKind, Hint, SlotError, SlotFlags};

use super::*;
use crate::tests::{CPU, TestVm, coherent, host, host_with, memory, slot, touch, vm};
use crate::{CopyError, LogError, RingFull, RingsError};
use entresol_addr::Pfn;
use entresol_backing::ObjectHandle;

const LOG: SlotFlags = SlotFlags::LOG_DIRTY;
const PLAIN: SlotFlags = SlotFlags::empty();

fn set(vm: &TestVm<'_>, frames: u64, object: ObjectHandle, flags: SlotFlags) {
    vm.set_slot(CPU, &slot(0, RAM, frames, object, flags)).unwrap();
}

fn get(vm: &TestVm<'_>, frames: u64) -> Vec<u64> {
    let mut words = std::vec![u64::MAX; frames.div_ceil(64) as usize];
    let count = vm.get_dirty_log(CPU, 0, &mut words).unwrap();
    let named = pages(&words);
    assert_eq!(named.len() as u64, count);
    named
}

fn write(vm: &TestVm<'_>, gpa: u64, bytes: &[u8]) {
    vm.write(&vm.host().epoch.pin(CPU), &Hint::new(), Gpa::new(gpa), bytes).unwrap();
}

#[test]
fn a_read_page_is_write_protected_until_the_first_write() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 256, Policy::Pages);
    set(&vm, 256, object, LOG);
    assert_eq!(touch(&vm, RAM, Access::Read), Outcome::Resume);
    assert_eq!(touch(&vm, RAM + 4096, Access::Fetch), Outcome::Resume);
    assert!(!is_writable(&vm, 0) && !is_writable(&vm, 1));
    assert_eq!(get(&vm, 256), []);
    assert_eq!(store(&vm, CPU, 0), 1);
    assert_eq!(store(&vm, CPU, 200), 1, "a page that was never there");
    assert_eq!(store(&vm, CPU, 200), 0);
    check_writable(&vm, CPU, 256);
    assert_eq!(get(&vm, 256), [0, 200]);
    assert_eq!(get(&vm, 256), [], "fetched is cleared");
    assert!(!is_writable(&vm, 0) && !is_writable(&vm, 200), "and write-protected");
    assert_eq!(store(&vm, CPU, 200), 1);
    assert_eq!(get(&vm, 256), [200]);
}

#[test]
fn what_was_writable_before_is_named_too() {
    let host = host(4096);
    for policy in [Policy::Pages, Policy::Blocks] {
        let vm = vm(&host);
        let object = memory(&host, 1024, policy);
        set(&vm, 1024, object, PLAIN);
        assert_eq!(store(&vm, CPU, 5), 1);
        set(&vm, 1024, object, LOG);
        assert!(!is_writable(&vm, 5));
        check_writable(&vm, CPU, 1024);
        assert!(store(&vm, CPU, 5) >= 1);
        assert_eq!(get(&vm, 1024), [5]);
        vm.destroy(CPU);
    }
}

#[test]
fn a_block_is_split_by_the_first_write_and_put_together_in_the_end() {
    let host = host(4096);
    let vm = vm(&host);
    let object = memory(&host, 1024, Policy::Blocks);
    set(&vm, 1024, object, PLAIN);
    assert_eq!((store(&vm, CPU, 7), store(&vm, CPU, 900)), (1, 1));
    let frames = host.pool.free_frames();
    set(&vm, 1024, object, LOG);
    let census = vm.census();
    assert_eq!((census.of(PageSize::Size2M), census.of(PageSize::Size4K)), (2, 0), "not before a write");
    assert_eq!(store(&vm, CPU, 7), 1, "split and relaxed in one trap");
    let census = vm.census();
    assert_eq!((census.of(PageSize::Size2M), census.of(PageSize::Size4K)), (1, 16), "the pages around the write");
    check_writable(&vm, CPU, 1024);
    assert_eq!(get(&vm, 1024), [7]);
    set(&vm, 1024, object, PLAIN);
    let census = vm.census();
    assert_eq!((census.of(PageSize::Size2M), census.of(PageSize::Size4K)), (2, 0));
    assert!(is_writable(&vm, 7), "a block put together is as a fault makes it");
    host.pool.reap(&host.epoch, CPU, usize::MAX);
    assert_eq!(host.pool.free_frames(), frames, "log and table went back");
}

#[test]
fn blocks_are_split_ahead_on_request() {
    let host = host(4096);
    let vm = vm(&host);
    let object = memory(&host, 1024 + 7, Policy::Blocks);
    set(&vm, 1024 + 7, object, PLAIN);
    assert_eq!(vm.split_ahead(CPU, 0), Err(LogError::NotLogged { slot: 0 }));
    for page in [7, 900, 1030] {
        store(&vm, CPU, page);
    }
    set(&vm, 1024 + 7, object, LOG);
    assert_eq!(vm.split_ahead(CPU, 0), Ok(2));
    assert_eq!(vm.split_ahead(CPU, 0), Ok(0));
    assert_eq!(vm.census().of(PageSize::Size2M), 0);
    assert_eq!(store(&vm, CPU, 8), 1);
    assert_eq!(get(&vm, 1024 + 7), [8]);
}

#[test]
fn no_frame_for_a_split_is_an_outcome_and_splitting_ahead_stops() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 512, Policy::Blocks);
    set(&vm, 512, object, PLAIN);
    store(&vm, CPU, 0);
    set(&vm, 512, object, LOG);
    let mut hoard = Vec::new();
    while let Ok(frame) = host.pool.take(CPU, entresol_backing::Order::PAGE) {
        hoard.push(frame);
    }
    assert_eq!(vm.split_ahead(CPU, 0), Err(LogError::OutOfMemory { split: 0 }));
    let write = Fault { cause: Cause::Permission { level: 2 }, ..fault(RAM, Access::Write) };
    let outcome = vm.handle(&host.epoch.pin(CPU), &Hint::new(), &write);
    assert_eq!(outcome, Outcome::Exit(crate::Reason::OutOfMemory));
    assert_eq!(get(&vm, 512), [], "what was not installed is not dirty");
    hoard.into_iter().for_each(|frame| host.pool.give(CPU, frame, entresol_backing::Order::PAGE));
    assert_eq!(store(&vm, CPU, 0), 1);
    assert_eq!(get(&vm, 512), [0]);
}

#[test]
fn no_frame_for_the_log_refuses_the_slot_and_loses_none() {
    let host = host(64);
    let vm = vm(&host);
    let object = memory(&host, 1 << 20, Policy::Pages);
    set(&vm, 1 << 20, object, PLAIN);
    assert_eq!(store(&vm, CPU, 0), 1);
    let generation = vm.slots().generation();
    let mut hoard = Vec::new();
    while let Ok(frame) = host.pool.take(CPU, entresol_backing::Order::PAGE) {
        hoard.push(frame);
    }
    for spare in 0..33 {
        let refused = vm.set_slot(CPU, &slot(0, RAM, 1 << 20, object, LOG)).unwrap_err();
        assert_eq!((refused, refused.kind()), (SlotError::NoLog { pages: 1 << 20 }, ErrorKind::OutOfMemory));
        assert_eq!(host.pool.free_frames(), spare);
        host.pool.give(CPU, hoard.pop().unwrap(), entresol_backing::Order::PAGE);
    }
    assert_eq!(vm.slots().generation(), generation, "nothing was published");
    assert!(is_writable(&vm, 0));
    set(&vm, 1 << 20, object, LOG);
    assert_eq!((host.pool.free_frames(), is_writable(&vm, 0)), (0, false));
}

#[test]
fn every_frame_comes_back() {
    let host = host(4096);
    for (last, flags) in [(1024, LOG), (0, PLAIN), (1024, PLAIN)] {
        let vm = vm(&host);
        let object = memory(&host, 1024, Policy::Pages);
        set(&vm, 1024, object, LOG);
        store(&vm, CPU, 1000);
        set(&vm, last, object, flags);
        vm.destroy(CPU);
        host.objects.destroy(&host.supply(CPU), &host.epoch, object).unwrap();
        host.pool.reap(&host.epoch, CPU, usize::MAX);
        assert_eq!(host.pool.free_frames(), 4096, "{last} {flags:?}");
    }
}

#[test]
fn a_moved_slot_keeps_its_log() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 64, Policy::Pages);
    set(&vm, 64, object, LOG);
    store(&vm, CPU, 3);
    vm.set_slot(CPU, &slot(0, RAM + (1 << 30), 64, object, LOG)).unwrap();
    assert_eq!(get(&vm, 64), [3]);
}

#[test]
fn writes_of_owner_and_devices_are_named() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 64, Policy::Pages);
    set(&vm, 64, object, LOG);
    write(&vm, RAM + 3 * PAGE_SIZE - 2, b"over a page's end");
    assert_eq!(get(&vm, 64), [2, 3]);
    let beyond = vm.write(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(RAM + 64 * PAGE_SIZE - 2), b"1234");
    assert_eq!(beyond, Err(CopyError::Outside { gpa: Gpa::new(RAM + 64 * PAGE_SIZE) }));
    assert_eq!(get(&vm, 64), [63], "what was written before it stopped");
}

#[test]
fn manual_clearing_protects_just_what_it_clears() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 200, Policy::Pages);
    set(&vm, 200, object, LOG);
    for page in [0, 1, 63, 64, 199] {
        store(&vm, CPU, page);
    }
    let mut words = [0; 4];
    assert_eq!(vm.read_dirty_log(CPU, 0, &mut words), Ok(5));
    assert_eq!(pages(&words), [0, 1, 63, 64, 199]);
    assert!([0, 1, 63, 64, 199].into_iter().all(|page| is_writable(&vm, page)), "reading changes nothing");
    assert_eq!(vm.clear_dirty_log(CPU, 0, 0, 64, &[0b101 | 1 << 63]), Ok(2));
    assert!(!is_writable(&vm, 0) && !is_writable(&vm, 63) && is_writable(&vm, 1) && is_writable(&vm, 64));
    assert_eq!(vm.clear_dirty_log(CPU, 0, 192, 8, &[u64::MAX]), Ok(1), "the slot's end need not be a whole word");
    check_writable(&vm, CPU, 200);
    assert_eq!(get(&vm, 200), [1, 64]);
}

#[test]
fn requests_are_refused_by_the_rules() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 200, Policy::Pages);
    set(&vm, 200, object, PLAIN);
    let mut words = [7; 4];
    assert_eq!(vm.get_dirty_log(CPU, 0, &mut words), Err(LogError::NotLogged { slot: 0 }));
    assert_eq!(vm.get_dirty_log(CPU, 5, &mut words), Err(LogError::Absent { slot: 5 }));
    assert_eq!(vm.get_dirty_log(CPU, u16::MAX, &mut words), Err(LogError::Absent { slot: u16::MAX }));
    set(&vm, 200, object, LOG);
    let small = LogError::Buffer { words: 3, needed: 4 };
    assert_eq!(vm.get_dirty_log(CPU, 0, &mut words[..3]), Err(small));
    assert_eq!(vm.read_dirty_log(CPU, 0, &mut words[..3]), Err(small));
    assert_eq!(words, [7; 4], "nothing changed");
    assert_eq!(vm.clear_dirty_log(CPU, 0, 32, 64, &words), Err(LogError::Unaligned { first: 32 }));
    let partial = LogError::Partial { first: 64, count: 7, pages: 200 };
    assert_eq!(vm.clear_dirty_log(CPU, 0, 64, 7, &words), Err(partial));
    let outside = LogError::Outside { first: 192, count: 64, pages: 200 };
    assert_eq!(vm.clear_dirty_log(CPU, 0, 192, 64, &words), Err(outside));
    assert_eq!(vm.clear_dirty_log(CPU, 0, 0, 200, &words[..3]), Err(small));
    assert_eq!(vm.enable_dirty_rings(0, 128), Err(RingsError::Vcpus { value: 0 }));
    assert_eq!(vm.enable_dirty_rings(1, 100), Err(RingsError::Entries { value: 100 }));
    assert_eq!(vm.enable_dirty_rings(1, 128), Ok(()));
    assert_eq!(vm.enable_dirty_rings(1, 128), Err(RingsError::Enabled));
}

#[test]
fn a_device_is_mapped_as_ever_and_never_named() {
    let host = host(2048);
    let vm = vm(&host);
    let device = Spec::Device { first: Pfn::new(0x900), frames: 4 };
    let object = host.objects.create(&host.supply(CPU), device).unwrap();
    set(&vm, 4, object, PLAIN);
    assert_eq!(store(&vm, CPU, 0), 1);
    set(&vm, 4, object, LOG);
    assert_eq!(store(&vm, CPU, 0), 1);
    assert_eq!(touch(&vm, RAM + PAGE_SIZE, Access::Read), Outcome::Resume);
    assert!(is_writable(&vm, 1), "no reason to trap the first write");
    assert_eq!(get(&vm, 4), []);
}

#[test]
fn execution_is_no_write() {
    let host = host_with(2048, entresol_machine::Features { coherent_icache: false, ..coherent() });
    let vm = vm(&host);
    let object = memory(&host, 512, Policy::Blocks);
    set(&vm, 512, object, PLAIN);
    store(&vm, CPU, 0);
    set(&vm, 512, object, LOG);
    let fetch = Fault { cause: Cause::Permission { level: 2 }, ..fault(RAM, Access::Fetch) };
    assert_eq!(vm.handle(&host.epoch.pin(CPU), &Hint::new(), &fetch), Outcome::Resume);
    let Entry::Leaf(leaf) = entry(&vm, 0) else { panic!() };
    assert_eq!((leaf.size, leaf.permissions.write, leaf.permissions.execute), (PageSize::Size2M, false, true));
    assert_eq!(get(&vm, 512), []);
}

#[test]
fn a_full_ring_stops_its_vcpu_until_the_reset() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 256, Policy::Pages);
    set(&vm, 256, object, LOG);
    vm.enable_dirty_rings(2, 128).unwrap();
    let ring = vm.dirty_ring(1).unwrap();
    for page in 0..64 {
        assert_eq!(vm.enter(CPU, 1), Ok(()), "{page}");
        store(&vm, CPU, page);
        vm.leave(CPU);
    }
    for _ in 0..3 {
        assert_eq!(vm.enter(CPU, 1), Err(RingFull), "at every run");
    }
    assert_eq!(vm.enter(CPU, 0), Ok(()), "the other vCPU has its own");
    vm.leave(CPU);
    assert_eq!(vm.reset_dirty_rings(CPU), 0, "nothing is harvested yet");
    assert_eq!(vm.enter(CPU, 1), Err(RingFull));
    let mut named = Vec::new();
    assert_eq!(ring.harvest(|slot, page| named.push((slot, page))), 64);
    assert!(named.into_iter().eq((0..64).map(|page| (0, page))));
    assert_eq!(vm.enter(CPU, 1), Err(RingFull), "harvested is not free");
    assert_eq!(vm.reset_dirty_rings(CPU), 64);
    assert_eq!(vm.enter(CPU, 1), Ok(()));
    assert!((0..64).all(|page| !is_writable(&vm, page)));
    assert_eq!(get(&vm, 256), [], "the ring and the log say the same");
    assert_eq!(vm.dirty_ring(2).map(crate::Ring::used), None);
}

#[test]
fn what_finds_no_room_is_in_the_log() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 256, Policy::Pages);
    set(&vm, 256, object, LOG);
    vm.enable_dirty_rings(1, 128).unwrap();
    vm.enter(CPU, 0).unwrap();
    for page in 0..150 {
        store(&vm, CPU, page);
    }
    vm.leave(CPU);
    store(&vm, CPU, 200);
    let ring = vm.dirty_ring(0).unwrap();
    assert_eq!(ring.harvest(|_, _| {}), 128);
    assert_eq!(vm.reset_dirty_rings(CPU), 128);
    assert!(get(&vm, 256).into_iter().eq((128..150).chain([200])));
}

#[test]
fn a_reset_takes_consecutive_harvested_entries_only() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 256, Policy::Pages);
    set(&vm, 256, object, LOG);
    vm.enable_dirty_rings(1, 128).unwrap();
    vm.enter(CPU, 0).unwrap();
    for page in [9, 70, 8, 71, 10] {
        store(&vm, CPU, page);
    }
    let ring = vm.dirty_ring(0).unwrap();
    for place in [0, 1, 3, 4] {
        ring.entries()[place].harvest();
    }
    assert_eq!(vm.reset_dirty_rings(CPU), 2);
    assert_eq!([9, 70, 8, 71, 10].map(|page| is_writable(&vm, page)), [false, false, true, true, true]);
    ring.entries()[2].harvest();
    assert_eq!(vm.reset_dirty_rings(CPU), 3);
    assert_eq!(ring.used(), 0);
    assert_eq!(get(&vm, 256), []);
}

/// Z-F4.
#[test]
fn what_a_ring_entry_cannot_mean_is_ignored() {
    let host = host(2048);
    let vm = vm(&host);
    let (object, below) = (memory(&host, 100, Policy::Pages), memory(&host, 100, Policy::Pages));
    set(&vm, 100, object, LOG);
    vm.set_slot(CPU, &slot(1, RAM - 100 * PAGE_SIZE, 100, below, PLAIN)).unwrap();
    assert_eq!(touch(&vm, RAM - PAGE_SIZE, Access::Write), Outcome::Resume);
    vm.enable_dirty_rings(1, 128).unwrap();
    vm.enter(CPU, 0).unwrap();
    let bad = [(0, 100), (0, 127), (0, 128), (0, u64::MAX), (0, u64::MAX - 63), (1, 99), (7, 0), (8, 0), (1 << 16, 0)];
    for (place, (slot, offset)) in bad.into_iter().enumerate() {
        store(&vm, CPU, place as u64);
        vm.dirty_ring(0).unwrap().entries()[place].overwrite(slot, offset);
    }
    store(&vm, CPU, 99);
    assert_eq!(vm.dirty_ring(0).unwrap().harvest(|_, _| {}), 10);
    assert_eq!(vm.reset_dirty_rings(CPU), 10);
    assert!(!is_writable(&vm, 99), "a good one beside bad ones counts");
    let neighbour = vm.table().walk(&host.machine, Gfn::new(FIRST - 1)).unwrap().entry;
    assert!(matches!(neighbour, Entry::Leaf(leaf) if leaf.permissions.write));
    assert!(get(&vm, 100).into_iter().eq(0..9), "pages that a bad entry hid are in the log");
}

#[test]
fn young_pages_are_found_and_aged_without_an_invalidation() {
    let host = host(2048);
    let vm = vm(&host);
    let object = memory(&host, 64, Policy::Pages);
    set(&vm, 64, object, PLAIN);
    let range = |start, count| GfnRange::new(Gfn::new(FIRST + start), count).unwrap();
    for page in [1, 2, 40] {
        store(&vm, CPU, page);
    }
    assert_eq!(vm.test_young(CPU, range(0, 64)), Ok(true));
    assert_eq!(vm.test_young(CPU, range(3, 30)), Ok(false));
    let sample = vm.notifier.sample();
    assert_eq!(vm.clear_young(CPU, range(0, 32)), Ok(2));
    assert_eq!(vm.clear_young(CPU, range(0, 64)), Ok(1));
    assert!(!vm.notifier.moved(sample, range(0, 64)), "no fault goes round for it");
    assert_eq!(vm.test_young(CPU, range(0, 64)), Ok(false));
    assert_eq!(store(&vm, CPU, 2), 1, "one access flag fault");
    assert_eq!(vm.test_young(CPU, range(2, 1)), Ok(true));
    assert_eq!(vm.clear_young(CPU, range(0, 64)), Ok(1));
    let outside = GfnRange::new(Gfn::new((1 << 28) - 1), 2).unwrap();
    assert_eq!(vm.clear_young(CPU, outside), Err(crate::InvalidateError::Outside { range: outside }));
}
