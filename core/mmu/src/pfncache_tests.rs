//! Page-frame caches on a flat machine: what each kind of change does to what they know.

use entresol_addr::{Gfn, GfnRange, Gpa, Hpa, PAGE_SIZE, Pfn};
use entresol_backing::{ObjectHandle, Policy, Spec};
use entresol_machine::Machine;
use entresol_machine::flat::FlatMachine;
use entresol_slot::{Hint, SlotFlags, SlotRequest};

use crate::tests::{CPU, RAM, TestVm, host, memory, slot, vm};
use crate::{CacheError, CopyError, Host};

const FRAMES: u64 = 1024;
/// What the cache is for: 64 bytes at the end of page 3.
const PIECE: Gpa = Gpa::new(RAM + 4 * PAGE_SIZE - 64);

fn with_cache<'h>(host: &'h Host<FlatMachine>, flags: SlotFlags) -> (TestVm<'h>, ObjectHandle) {
    let vm = vm(host);
    let object = memory(host, FRAMES, Policy::Blocks);
    vm.set_slot(CPU, &slot(0, RAM, FRAMES, object, flags)).unwrap();
    vm.make_caches(2).unwrap();
    (vm, object)
}

/// Where the cache says that its memory is.
fn known(vm: &TestVm<'_>) -> Option<Hpa> {
    let pin = vm.host().epoch.pin(CPU);
    vm.check(&pin, 0, 64).map(|piece| piece.address())
}

/// Writes through the cache, refreshed if need be.
fn write(vm: &TestVm<'_>, byte: u8) {
    if known(vm).is_none() {
        vm.refresh(CPU, 0).unwrap();
    }
    let pin = vm.host().epoch.pin(CPU);
    let piece = vm.check(&pin, 0, 1).expect("it was refreshed");
    vm.write_piece(&piece, &[byte]);
}

/// What the guest reads there.
fn read(vm: &TestVm<'_>) -> u8 {
    let mut byte = [0xee];
    vm.read(&vm.host().epoch.pin(CPU), &Hint::new(), PIECE, &mut byte).unwrap();
    byte[0]
}

#[test]
fn what_is_written_through_a_cache_is_the_guests_memory() {
    let host = host(8192);
    let (vm, _) = with_cache(&host, SlotFlags::empty());
    assert_eq!((known(&vm), vm.refresh(CPU, 0)), (None, Err(CacheError::Inactive)));
    vm.activate(CPU, 0, PIECE, 64).unwrap();
    write(&vm, 7);
    assert_eq!(read(&vm), 7);
    let pin = host.epoch.pin(CPU);
    assert!(vm.check(&pin, 0, 65).is_none() && vm.check(&pin, 0, 0).is_none(), "it must fit");
    assert!(vm.check(&pin, 1, 1).is_none() && vm.check(&pin, 2, 1).is_none());
    let piece = vm.check(&pin, 0, 2).unwrap();
    vm.write_piece(&piece, &[1; 100]);
    let mut beside = [0; 3];
    vm.read(&pin, &Hint::new(), PIECE, &mut beside).unwrap();
    assert_eq!((piece.bytes(), beside), (2, [1, 1, 0]), "never past the piece");
    drop(pin);
    vm.deactivate(0).unwrap();
    assert_eq!((known(&vm), vm.refresh(CPU, 0)), (None, Err(CacheError::Inactive)));
}

#[test]
fn a_piece_lies_in_one_page() {
    let host = host(8192);
    let (vm, _) = with_cache(&host, SlotFlags::empty());
    for (gpa, len) in [(PIECE, 65), (PIECE, 0), (Gpa::new(RAM), 4097), (Gpa::new(u64::MAX), 2), (PIECE, u64::MAX)] {
        assert_eq!(vm.activate(CPU, 0, gpa, len), Err(CacheError::Straddles { gpa, len }));
    }
    assert_eq!(vm.activate(CPU, 2, PIECE, 1), Err(CacheError::Absent { index: 2 }));
    vm.activate(CPU, 0, PIECE, 64).unwrap();
    let first = known(&vm).unwrap();
    vm.activate(CPU, 0, Gpa::new(PIECE.get() - 128), 64).unwrap();
    assert_eq!(known(&vm), Some(Hpa::new(first.get() - 128)), "the same page, another place in it (Z-D7)");
}

#[test]
fn an_invalidation_takes_what_is_known_and_a_refresh_waits_for_its_end() {
    let host = host(8192);
    let (vm, _) = with_cache(&host, SlotFlags::empty());
    vm.activate(CPU, 0, PIECE, 64).unwrap();
    let page = GfnRange::single(PIECE.frame());
    let beside = GfnRange::single(PIECE.frame().offset(1));
    vm.zap(CPU, beside).unwrap();
    assert!(known(&vm).is_some(), "elsewhere is elsewhere");
    let invalidation = vm.invalidate_range_start(CPU, page).unwrap();
    assert_eq!(known(&vm), None);
    assert_eq!(vm.refresh(CPU, 0), Err(CacheError::Memory(CopyError::Busy)), "it changes at the moment");
    assert_eq!(known(&vm), None);
    vm.invalidate_range_end(invalidation);
    vm.refresh(CPU, 0).unwrap();
    assert!(known(&vm).is_some());
}

#[test]
fn a_page_given_back_is_another_one_after_it() {
    let host = host(8192);
    let (vm, _) = with_cache(&host, SlotFlags::empty());
    vm.activate(CPU, 0, PIECE, 64).unwrap();
    write(&vm, 9);
    let before = known(&vm).unwrap();
    let page = GfnRange::single(PIECE.frame());
    assert_eq!(vm.discard(CPU, &[page]).unwrap().frames, 1);
    assert_eq!((known(&vm), read(&vm)), (None, 0));
    // Another owner has the frame.
    let mut frames = std::vec::Vec::new();
    while let Ok(frame) = host.pool.take(CPU, entresol_backing::Order::PAGE) {
        let found = frame == Pfn::new(before.get() / PAGE_SIZE);
        frames.push(frame);
        if found {
            break;
        }
    }
    let others = *frames.last().unwrap();
    assert_eq!(others.base().get(), before.get() & !(PAGE_SIZE - 1), "it came back to the pool");
    host.machine.write(before, &[0x55]);
    frames.pop();
    frames.drain(..).for_each(|frame| host.pool.give(CPU, frame, entresol_backing::Order::PAGE));
    write(&vm, 3);
    let mut byte = [0];
    host.machine.read(before, &mut byte);
    assert_eq!((read(&vm), byte), (3, [0x55]), "Z-D2: nothing is written to a frame that is another's");
}

#[test]
fn relatives_do_not_see_what_is_written_after_a_fork() {
    let host = host(8192);
    let (parent, _) = with_cache(&host, SlotFlags::empty());
    parent.activate(CPU, 0, PIECE, 64).unwrap();
    write(&parent, 1);
    let child = parent.fork(CPU).unwrap();
    assert_eq!((known(&parent), known(&child)), (None, None));
    write(&parent, 2);
    child.make_caches(1).unwrap();
    child.activate(CPU, 0, PIECE, 64).unwrap();
    assert_eq!((read(&parent), read(&child)), (2, 1));
    write(&child, 3);
    assert_eq!((read(&parent), read(&child)), (2, 3));
}

#[test]
fn slot_updates_are_seen() {
    let host = host(8192);
    let (vm, object) = with_cache(&host, SlotFlags::empty());
    vm.activate(CPU, 0, PIECE, 64).unwrap();
    let other = slot(1, 2 * RAM, 4, object, SlotFlags::empty());
    vm.set_slot(CPU, &other).unwrap();
    assert_eq!(known(&vm), None, "another generation");
    write(&vm, 4);
    vm.set_slot(CPU, &SlotRequest { size: 0, ..slot(0, RAM, FRAMES, object, SlotFlags::empty()) }).unwrap();
    assert_eq!(vm.refresh(CPU, 0), Err(CacheError::Memory(CopyError::Outside { gpa: PIECE })));
    assert_eq!(known(&vm), None);
    vm.set_slot(CPU, &slot(0, RAM, FRAMES, object, SlotFlags::READ_ONLY)).unwrap();
    assert_eq!(vm.refresh(CPU, 0), Err(CacheError::Memory(CopyError::ReadOnly { gpa: PIECE })));
    let device = host.objects.create(&host.supply(CPU), Spec::Device { first: Pfn::new(0x9000), frames: 4 }).unwrap();
    vm.set_slot(CPU, &slot(2, 3 * RAM, 4, device, SlotFlags::empty())).unwrap();
    let gpa = Gpa::new(3 * RAM);
    assert_eq!(vm.activate(CPU, 1, gpa, 8), Err(CacheError::Memory(CopyError::Outside { gpa })), "no memory");
}

#[test]
fn writes_through_a_cache_are_logged() {
    let host = host(8192);
    let (vm, _) = with_cache(&host, SlotFlags::LOG_DIRTY);
    vm.activate(CPU, 0, PIECE, 64).unwrap();
    let mut words = [0; FRAMES as usize / 64];
    vm.get_dirty_log(CPU, 0, &mut words).unwrap();
    assert_eq!(vm.get_dirty_log(CPU, 0, &mut words).unwrap(), 0);
    write(&vm, 1);
    assert_eq!((vm.get_dirty_log(CPU, 0, &mut words).unwrap(), words[0]), (1, 1 << 3));
    let dirty = vm.is_dirty(&host.epoch.pin(CPU), Gfn::new(RAM / PAGE_SIZE + 3));
    assert_eq!(dirty, Some(false));
}

#[test]
fn no_frame_is_an_error_and_a_later_refresh_does_better() {
    let host = host(64);
    let vm = vm(&host);
    let object = memory(&host, 8, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, 8, object, SlotFlags::empty())).unwrap();
    vm.make_caches(1).unwrap();
    let mut hoard = std::vec::Vec::new();
    while let Ok(frame) = host.pool.take(CPU, entresol_backing::Order::PAGE) {
        hoard.push(frame);
    }
    assert_eq!(vm.activate(CPU, 0, PIECE, 64), Err(CacheError::Memory(CopyError::OutOfMemory)));
    assert_eq!(known(&vm), None);
    hoard.drain(..8).for_each(|frame| host.pool.give(CPU, frame, entresol_backing::Order::PAGE));
    write(&vm, 6);
    assert_eq!(read(&vm), 6);
}

/// Z-D2 with real threads: one writes through the cache all the time, the other gives the page back and looks after every frame
/// that came back. Nobody else writes those.
#[test]
fn a_frame_that_is_another_s_is_never_written() {
    const ROUNDS: usize = 300;
    const OTHER: usize = 1;
    let host = host(64);
    let vm = vm(&host);
    let object = memory(&host, 8, Policy::Pages);
    vm.set_slot(CPU, &slot(0, RAM, 8, object, SlotFlags::empty())).unwrap();
    vm.make_caches(1).unwrap();
    vm.activate(CPU, 0, PIECE, 64).unwrap();
    let over = std::sync::atomic::AtomicBool::new(false);
    let written = std::sync::atomic::AtomicU64::new(0);
    let offset = PIECE.page_offset();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                if known(&vm).is_none() && vm.refresh(CPU, 0).is_err() {
                    continue;
                }
                let pin = host.epoch.pin(CPU);
                if let Some(piece) = vm.check(&pin, 0, 1) {
                    vm.write_piece(&piece, &[7]);
                    written.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
            }
        });
        let page = GfnRange::single(PIECE.frame());
        let mut stray = None;
        let mut round = 0;
        // However late the other thread begins.
        while round < ROUNDS || written.load(std::sync::atomic::Ordering::Relaxed) < ROUNDS as u64 {
            round += 1;
            while vm.discard(OTHER, &[page]).is_err() {}
            let Ok(frame) = host.pool.take(OTHER, entresol_backing::Order::PAGE) else { continue };
            let at = Hpa::new(frame.base().get() + offset);
            host.machine.write(at, &[0x55]);
            for _ in 0..50 {
                let mut byte = [0];
                host.machine.read(at, &mut byte);
                stray = stray.or((byte != [0x55]).then_some(frame));
            }
            host.pool.give(OTHER, frame, entresol_backing::Order::PAGE);
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(stray, None, "a frame is written through a cache after it was given back");
    });
}

/// A machine of private memory with caches, none of which is active.
fn private<'h>(host: &'h Host<FlatMachine>, caches: usize) -> (TestVm<'h>, ObjectHandle) {
    let vm = vm(host);
    let spec = Spec::Private { frames: FRAMES, policy: Policy::Pages };
    let object = host.objects.create(&host.supply(CPU), spec).unwrap();
    vm.set_slot(CPU, &slot(0, RAM, FRAMES, object, SlotFlags::empty())).unwrap();
    vm.make_caches(caches).unwrap();
    (vm, object)
}

/// Leased frames; every frame is mapped exactly if it should be (INV-10).
fn leased(host: &Host<FlatMachine>) -> u64 {
    host.pool.reap(&host.epoch, CPU, usize::MAX);
    host.supply(CPU).scrub(usize::MAX);
    let audit = entresol_backing::audit(&host.supply(CPU), &host.objects, &host.epoch.pin(CPU));
    assert_eq!((audit.wrong, audit.stuck), (0, 0), "{audit:?}");
    audit.leased
}

#[test]
fn a_cache_of_private_memory_leases_it_as_long_as_it_is_needed() {
    let host = host(4 * 512);
    let (vm, object) = private(&host, 2);
    assert_eq!(leased(&host), 0);
    vm.activate(CPU, 0, PIECE, 64).unwrap();
    vm.activate(CPU, 1, Gpa::new(PIECE.get() - 64), 64).unwrap();
    write(&vm, 7);
    assert_eq!((leased(&host), read(&vm)), (1, 7), "both in one frame (Z-D1)");
    vm.deactivate(1).unwrap();
    write(&vm, 8);
    assert_eq!((leased(&host), read(&vm)), (1, 8));
    vm.refresh(CPU, 0).unwrap();
    vm.refresh(CPU, 0).unwrap();
    vm.deactivate(0).unwrap();
    assert_eq!((leased(&host), read(&vm)), (0, 8), "leases are counted, each once");
    vm.activate(CPU, 0, PIECE, 64).unwrap();
    vm.destroy(CPU);
    assert_eq!(leased(&host), 0, "an end releases");
    host.objects.destroy(&host.supply(CPU), &host.epoch, object).unwrap();
    assert_eq!((leased(&host), host.pool.private_frames()), (0, 0));
}

#[test]
fn a_private_page_given_back_takes_its_lease_with_it() {
    let host = host(4 * 512);
    let (vm, _) = private(&host, 1);
    // Keeps the frames around it private.
    vm.write(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(RAM), &[1]).unwrap();
    vm.activate(CPU, 0, PIECE, 64).unwrap();
    write(&vm, 9);
    let before = known(&vm).unwrap();
    assert_eq!(vm.discard(CPU, &[GfnRange::single(PIECE.frame())]).unwrap().frames, 1);
    assert_eq!((leased(&host), known(&vm), read(&vm)), (0, None, 0), "zeroed, and absent again");
    assert!(!host.machine.is_mapped_own(Pfn::new(before.get() / PAGE_SIZE)));
    write(&vm, 3);
    assert_eq!((leased(&host), read(&vm)), (1, 3), "the late release took nothing (Z-D3)");
}

#[test]
fn a_fork_leaves_the_lease_to_the_next_refresh() {
    let host = host(8 * 512);
    let (parent, _) = private(&host, 1);
    parent.activate(CPU, 0, PIECE, 64).unwrap();
    write(&parent, 1);
    let before = known(&parent).unwrap();
    let child = parent.fork(CPU).unwrap();
    assert_eq!((known(&parent), leased(&host)), (None, 1));
    write(&parent, 2);
    assert_ne!(known(&parent), Some(before));
    assert_eq!((leased(&host), read(&parent), read(&child)), (1, 2, 1));
    parent.destroy(CPU);
    assert_eq!((leased(&host), read(&child)), (0, 1));
}

/// Eight caches in one private page, each written by its own CPU, while the page is given back and forked again and again. A use
/// of an absent frame stops the flat machine; what each CPU wrote last is what the guest reads in the end.
#[test]
fn eight_records_in_one_private_page_that_comes_and_goes() {
    const CPUS: usize = 8;
    const RECORD: u64 = 64;
    let first = Pfn::new(0x8_0000);
    let frames = 16 * 512;
    let meta = (0..frames).map(|_| entresol_backing::FrameMeta::new()).collect();
    let pool = entresol_backing::FramePool::new(first, meta, CPUS + 1).unwrap();
    pool.add(entresol_addr::PfnRange::new(first, frames).unwrap()).unwrap();
    let machine = FlatMachine::new(first, frames, crate::tests::coherent());
    let host = Host::new(machine, pool, entresol_backing::Objects::with_capacity(64).unwrap()).unwrap();
    let (vm, _) = private(&host, CPUS);
    let page = Gpa::new(RAM);
    let over = std::sync::atomic::AtomicBool::new(false);
    let record = |cpu: usize| Gpa::new(page.get() + RECORD * cpu as u64);
    let tell = |cpu: usize, value: u64| {
        let pin = host.epoch.pin(cpu);
        let piece = vm.check(&pin, cpu - 1, 8);
        if let Some(piece) = &piece {
            vm.write_piece(piece, &value.to_le_bytes());
        }
        piece.is_some()
    };
    let mut last = std::vec::Vec::new();
    std::thread::scope(|scope| {
        let writers: std::vec::Vec<_> = (1..=CPUS)
            .map(|cpu| {
                let (vm, over, tell, record) = (&vm, &over, &tell, &record);
                scope.spawn(move || {
                    while let Err(error) = vm.activate(cpu, cpu - 1, record(cpu), 8) {
                        assert_eq!(error, CacheError::Memory(CopyError::Busy));
                    }
                    let mut told = 0;
                    while !over.load(std::sync::atomic::Ordering::Relaxed) {
                        // Out of memory: what was given back waits for others' pins.
                        if tell(cpu, told + 1) || vm.refresh(cpu, cpu - 1).is_ok() && tell(cpu, told + 1) {
                            told += 1;
                        }
                    }
                    told
                })
            })
            .collect();
        for round in 0..200 {
            while vm.discard(CPU, &[GfnRange::single(page.frame())]).is_err() {}
            if round % 20 == 0 {
                let child = vm.fork(CPU).unwrap();
                let object = crate::fork_tests::child_object(&child);
                child.destroy(CPU);
                host.objects.destroy(&host.supply(CPU), &host.epoch, object).unwrap();
            }
            host.pool.reap(&host.epoch, CPU, usize::MAX);
            host.supply(CPU).scrub(usize::MAX);
            let audit = entresol_backing::audit(&host.supply(CPU), &host.objects, &host.epoch.pin(CPU));
            assert_eq!(audit.wrong, 0, "{audit:?}");
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        last.extend(writers.into_iter().map(|writer| writer.join().unwrap()));
    });
    for (cpu, told) in (1..).zip(&last) {
        assert!(*told > 0, "CPU {cpu} has told nothing");
        vm.refresh(cpu, cpu - 1).unwrap();
        assert!(tell(cpu, *told));
    }
    for (cpu, told) in (1..).zip(&last) {
        let mut bytes = [0; 8];
        vm.read(&host.epoch.pin(CPU), &Hint::new(), record(cpu), &mut bytes).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), *told, "CPU {cpu}");
    }
    assert_eq!(leased(&host), 1);
    (0..CPUS).for_each(|index| vm.deactivate(index).unwrap());
    assert_eq!(leased(&host), 0);
}
