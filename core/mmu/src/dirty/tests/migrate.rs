//! A memory is copied while vCPUs and a device write to it, by what the log or the rings name. If a write is ever missed, the
//! copy differs in the end.
//!
//! The machine is flat, but a TLB invalidation completes as on hardware only when every store through the old entry is done:
//! stores hold `stores` shared, `complete` takes it alone.

use std::boxed::Box;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use entresol_addr::{Gpa, Hpa, Pfn, PfnRange};
use entresol_arch_arm64::stage2::Stage2;
use entresol_backing::{FrameMeta, FramePool, Objects, Policy, Spec};
use entresol_machine::flat::FlatMachine;
use entresol_machine::model::{Model, Modelled};
use entresol_machine::{Features, Tags, TlbOp, Word};
use entresol_slot::{ObjectId, SlotFlags, SlotRequest};

use super::*;
use crate::Host;
use crate::tests::{CPU, OPTIONS, coherent};

const PAGES_OF_SLOT: u64 = 1024;
const WORDS_OF_LOG: usize = PAGES_OF_SLOT as usize / 64;
const STORES: u64 = 5_000;

struct Waiting {
    flat: FlatMachine,
    stores: RwLock<()>,
}

impl Model for Waiting {
    fn features(&self) -> Features {
        self.flat.features()
    }
    fn load(&self, word: Word) -> u64 {
        self.flat.load(word)
    }
    fn store(&self, word: Word, value: u64) {
        self.flat.store(word, value);
    }
    fn compare_exchange(&self, word: Word, current: u64, new: u64) -> Result<u64, u64> {
        self.flat.compare_exchange(word, current, new)
    }
    fn published(&self) {}
    fn zero(&self, frames: PfnRange) {
        self.flat.zero(frames);
    }
    fn copy(&self, from: Pfn, to: Pfn, count: u64) {
        self.flat.copy(from, to, count);
    }
    fn clear_tags(&self, frames: PfnRange) {
        self.flat.clear_tags(frames);
    }
    fn copy_tags(&self, from: Pfn, to: Pfn, count: u64) {
        self.flat.copy_tags(from, to, count);
    }
    fn load_tags(&self, frame: Pfn) -> Tags {
        self.flat.load_tags(frame)
    }
    fn store_tags(&self, frame: Pfn, tags: &Tags) {
        self.flat.store_tags(frame, tags);
    }
    fn read(&self, from: Hpa, to: &mut [u8]) {
        self.flat.read(from, to);
    }
    fn write(&self, to: Hpa, from: &[u8]) {
        self.flat.write(to, from);
    }
    fn clean_invalidate_to_poc(&self, _: PfnRange) {}
    fn invalidate_icache(&self, _: PfnRange) {}
    fn tlb(&self, _: TlbOp) {}
    fn complete(&self) {
        drop(self.stores.write().unwrap());
        drop(self.flat.events());
    }
}

type Machine_ = Modelled<Waiting>;
type WaitingVm<'h> = Vm<'h, Machine_, Stage2>;

fn host(frames: u64) -> Host<Machine_> {
    let first = Pfn::new(0x8_0000);
    let meta: Box<[FrameMeta]> = (0..frames).map(|_| FrameMeta::new()).collect();
    let pool = FramePool::new(first, meta, 4).unwrap();
    pool.add(PfnRange::new(first, frames).unwrap()).unwrap();
    let flat = FlatMachine::new(first, frames, coherent());
    Host::new(Modelled(Waiting { flat, stores: RwLock::new(()) }), pool, Objects::with_capacity(8).unwrap()).unwrap()
}

/// One store of a vCPU on `cpu`: faults until the entry lets it through.
fn store_word(vm: &WaitingVm<'_>, cpu: usize, page: u64, value: u64) {
    loop {
        let through = {
            let _store = vm.host().machine.0.stores.read().unwrap();
            match entry(vm, page) {
                Entry::Leaf(leaf) if leaf.permissions.write && leaf.young => {
                    let frame = leaf.frame_of(Gfn::new(FIRST + page));
                    vm.host().machine.write(frame.base(), &value.to_le_bytes());
                    true
                }
                _ => false,
            }
        };
        if through {
            return;
        }
        if let Some(fault) = store_fault(vm, page) {
            let outcome = vm.handle(&vm.host().epoch.pin(cpu), &Hint::new(), &fault);
            // The fault that takes the ring to its limit is handled too: it is the next entry that is refused.
            let expected = [Outcome::Resume, Outcome::Retry, Outcome::Exit(Reason::DirtyRingFull)];
            assert!(expected.contains(&outcome), "{outcome:?}");
        }
    }
}

/// Pages that follow each other closely and pages that do not.
fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    let random = *seed >> 33;
    if random & 1 == 0 { random / 2 % PAGES_OF_SLOT } else { random / 2 % 70 }
}

/// Copies the pages named; the caller has had them cleared before.
fn copy(vm: &WaitingVm<'_>, named: &[u64], to: &mut [u64]) {
    for page in named {
        let mut bytes = [0; 16];
        let gpa = Gpa::new(RAM + page * PAGE_SIZE);
        vm.read(&vm.host().epoch.pin(CPU), &Hint::new(), gpa, &mut bytes).unwrap();
        for (half, word) in bytes.chunks(8).zip(&mut to[2 * *page as usize..]) {
            *word = u64::from_le_bytes(half.try_into().unwrap());
        }
    }
}

/// How the owner learns and clears what was written.
#[derive(Clone, Copy, PartialEq)]
enum By {
    Get,
    ReadThenClear,
    Rings,
}

fn round(vm: &WaitingVm<'_>, by: By, to: &mut [u64]) {
    let mut words = [0; WORDS_OF_LOG];
    match by {
        By::Get => drop(vm.get_dirty_log(CPU, 0, &mut words).unwrap()),
        By::ReadThenClear => {
            vm.read_dirty_log(CPU, 0, &mut words).unwrap();
            for (index, word) in words.iter().enumerate() {
                vm.clear_dirty_log(CPU, 0, index as u64 * 64, 64, &[*word]).unwrap();
            }
        }
        By::Rings => {
            let mut named = Vec::new();
            for ring in (0..2).filter_map(|vcpu| vm.dirty_ring(vcpu)) {
                ring.harvest(|_, page| named.push(page));
            }
            vm.reset_dirty_rings(CPU);
            copy(vm, &named, to);
            return;
        }
    }
    copy(vm, &pages(&words), to);
}

fn vcpu(vm: &WaitingVm<'_>, number: u32, cpu: usize) {
    let mut seed = u64::from(number) + 1;
    for value in 1..=STORES {
        while vm.enter(cpu, number).is_err() {
            std::thread::yield_now();
        }
        store_word(vm, cpu, next(&mut seed), value << 8 | u64::from(number));
        vm.leave(cpu);
    }
}

/// The second word of a page is the device's.
fn device(vm: &WaitingVm<'_>, cpu: usize, stop: &AtomicBool) {
    let mut seed = 99;
    for value in 1u64.. {
        if stop.load(Ordering::Acquire) {
            return;
        }
        let gpa = Gpa::new(RAM + next(&mut seed) * PAGE_SIZE + 8);
        vm.write(&vm.host().epoch.pin(cpu), &Hint::new(), gpa, &value.to_le_bytes()).unwrap();
    }
}

/// A vCPU that runs until this is dropped, also by a panic.
struct Running<'a>(&'a AtomicUsize);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn migrate(by: By, policy: Policy) {
    let host = host(4096);
    let vm = Vm::new(&host, CPU, Stage2 { fwb: true }, OPTIONS).unwrap();
    let object = host.objects.create(&host.supply(CPU), Spec::anonymous(PAGES_OF_SLOT, policy)).unwrap();
    let set = |flags: SlotFlags| {
        let (base, size) = (Gpa::new(RAM), PAGES_OF_SLOT * PAGE_SIZE);
        let object = ObjectId::new(object.raw());
        vm.set_slot(CPU, &SlotRequest { id: 0, base, size, object, offset: 0, flags: flags.bits() }).unwrap();
    };
    set(SlotFlags::empty());
    let mut there = std::vec![0; 2 * PAGES_OF_SLOT as usize];
    let (stop, running) = (AtomicBool::new(false), AtomicUsize::new(2));
    std::thread::scope(|scope| {
        let (vm, stop, running) = (&vm, &stop, &running);
        scope.spawn(move || device(vm, 3, stop));
        for number in 0..2 {
            scope.spawn(move || {
                let _running = Running(running);
                vcpu(vm, number, number as usize + 1);
            });
        }
        if by == By::Rings {
            vm.enable_dirty_rings(2, 128).unwrap();
        }
        set(SlotFlags::LOG_DIRTY);
        copy(vm, &(0..PAGES_OF_SLOT).collect::<Vec<_>>(), &mut there);
        while running.load(Ordering::Acquire) != 0 {
            round(vm, by, &mut there);
        }
        stop.store(true, Ordering::Release);
    });
    round(&vm, by, &mut there);
    // What no ring had: the device's, and what was written before a ring.
    round(&vm, By::Get, &mut there);
    check_writable(&vm, CPU, PAGES_OF_SLOT);
    let mut here = std::vec![0; there.len()];
    copy(&vm, &(0..PAGES_OF_SLOT).collect::<Vec<_>>(), &mut here);
    let differ: Vec<_> = (0..here.len()).filter(|word| here[*word] != there[*word]).collect();
    assert!(differ.is_empty(), "{differ:?}");
}

#[test]
fn a_copy_by_fetched_logs_is_whole() {
    migrate(By::Get, Policy::Pages);
    migrate(By::Get, Policy::Blocks);
}

#[test]
fn a_copy_by_logs_cleared_in_parts_is_whole() {
    migrate(By::ReadThenClear, Policy::Blocks);
}

#[test]
fn a_copy_by_rings_is_whole() {
    migrate(By::Rings, Policy::Pages);
    migrate(By::Rings, Policy::Blocks);
}
