//! Drivers that mean harm: each rule broken by name, and then everything at random.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use entresol_devices::bus::{Device, Work};
use entresol_devices::virtio::balloon::Balloon;
use entresol_devices::virtio::block::Block;
use entresol_devices::virtio::console::Console;
use entresol_devices::virtio::entropy::EntropySource;
use entresol_devices::virtio::{Broken, VirtioDevice};
use proptest::prelude::*;

use crate::driver::{BUFFERS, Desc, Driver, INDIRECT, INDIRECT_DESC, NEEDS_RESET, NEXT, RING_RESET, STATUS, WRITE};
use crate::host::{Counter, RAM, RAM_BYTES, RamDisk, Screen, Taker};

fn bench(features: u64) -> Driver<Block<Arc<RamDisk>>> {
    Driver::new(Block::new(Arc::new(RamDisk::new(64)), b"").unwrap(), features)
}

/// The most copies that one part of the work may make: each costs at least a part of its bound, or is one of a few for
/// each descriptor.
const COPIES_PER_PART: usize = 4096;

const DRIVER_OK: u64 = 4;
const FAILED: u64 = 128;

/// Writes `descriptors` from 0 on, makes head 0 available, and returns what the device found wrong.
fn broken_by(features: u64, descriptors: &[(u64, u32, u16, u16)]) -> Option<Broken> {
    let mut driver = bench(features);
    for (at, (gpa, len, flags, next)) in descriptors.iter().copied().enumerate() {
        driver.set_descriptor(0, at as u16, Desc { gpa, len, flags, next });
    }
    driver.make_available(0, 0);
    assert_eq!(driver.notify(0), Work::Idle);
    assert_eq!(driver.used(0), None);
    let broken = driver.device.broken();
    assert_eq!(driver.load(STATUS) & NEEDS_RESET != 0, broken.is_some());
    assert_eq!(driver.notify(0), Work::Idle, "a broken device rests");
    broken
}

#[test]
fn chains_that_run_in_a_circle() {
    assert_eq!(broken_by(0, &[(BUFFERS, 1, NEXT, 0)]), Some(Broken::ChainLength));
    assert_eq!(broken_by(0, &[(BUFFERS, 0, NEXT, 1), (BUFFERS, 0, NEXT, 0)]), Some(Broken::ChainLength));
}

#[test]
fn indices_outside_the_table() {
    assert_eq!(broken_by(0, &[(BUFFERS, 1, NEXT, 256)]), Some(Broken::DescriptorIndex { index: 256 }));
    let mut driver = bench(0);
    driver.make_available(0, u16::MAX);
    assert_eq!(driver.notify(0), Work::Idle);
    assert_eq!(driver.device.broken(), Some(Broken::DescriptorIndex { index: u16::MAX }));
}

#[test]
fn an_available_index_that_jumps() {
    for index in [257u16, 0x8000, u16::MAX] {
        let driver = bench(0);
        driver.memory.poke(driver.driver_area(0) + 2, &index.to_le_bytes());
        assert_eq!(driver.notify(0), Work::Idle);
        assert_eq!(driver.device.broken(), Some(Broken::AvailableIndex { index }));
    }
}

#[test]
fn more_bytes_than_there_are() {
    let all = (BUFFERS, u32::MAX, NEXT, 1);
    assert_eq!(broken_by(0, &[all, (BUFFERS, u32::MAX, 0, 0)]), Some(Broken::ChainBytes));
    assert_eq!(broken_by(0, &[(u64::MAX, 2, 0, 0)]), Some(Broken::ChainBytes));
}

#[test]
fn readable_after_writable() {
    assert_eq!(broken_by(0, &[(BUFFERS, 8, WRITE | NEXT, 1), (BUFFERS, 8, 0, 0)]), Some(Broken::ReadAfterWrite));
}

#[test]
fn indirect_tables_where_none_may_be() {
    let table = BUFFERS + 0x1000;
    assert_eq!(broken_by(0, &[(table, 16, INDIRECT, 0)]), Some(Broken::Indirect), "not negotiated");
    for (len, flags) in [(0, 0), (15, 0), (17, 0), (16, NEXT)] {
        assert_eq!(broken_by(INDIRECT_DESC, &[(table, len, INDIRECT | flags, 0)]), Some(Broken::Indirect), "{len}");
    }
    assert_eq!(broken_by(INDIRECT_DESC, &[(!0xf, 32, INDIRECT, 0)]), Some(Broken::ChainBytes));
    assert!(matches!(broken_by(INDIRECT_DESC, &[(64, 16, INDIRECT, 0)]), Some(Broken::Memory(_))));
    // The descriptor table as its own indirect table: an indirect descriptor inside one.
    let own = bench(0).table(0);
    assert_eq!(broken_by(INDIRECT_DESC, &[(own, 16, INDIRECT, 0)]), Some(Broken::Indirect));
}

#[test]
fn rings_outside_memory() {
    for (register, reason) in [(0x80, "table"), (0x90, "driver"), (0xa0, "device")] {
        let mut driver = bench(RING_RESET);
        driver.store(0xc0, 1);
        driver.set_up_queue(0);
        driver.store(0xc0, 1);
        // Every area is set again, one of them to nowhere.
        driver.store(0x38, 256);
        for (at, area) in [(0x80, driver.table(0)), (0x90, driver.driver_area(0)), (0xa0, driver.device_area(0))] {
            driver.store(at, if at == register { 0x1000 } else { area });
        }
        driver.store(0x44, 1);
        driver.submit(0, &[(BUFFERS, 16, false), (BUFFERS + 16, 1, true)]);
        assert!(matches!(driver.device.broken(), Some(Broken::Memory(_))), "{reason}");
    }
}

/// A queue full of long chains keeps no CPU: each part is bounded, and other CPUs' stores in between do not matter.
#[test]
fn a_queue_full_of_the_longest_chains_is_served_in_bounded_parts() {
    let mut driver = bench(0);
    let mut chain = vec![(BUFFERS, 16, false)];
    chain.extend((0..254).map(|_| (BUFFERS + 4096, 1, true)));
    chain.push((BUFFERS + 64, 1, true));
    driver.memory.poke(BUFFERS, &[0xff; 16]);
    driver.chain(0, 0, &chain);
    for _ in 0..256 {
        driver.make_available(0, 0);
    }
    let mut work = driver.notify(0);
    let mut parts = 1;
    while work == Work::More {
        let before = driver.memory.copies.load(Ordering::Relaxed);
        work = driver.device.run();
        assert!(driver.memory.copies.load(Ordering::Relaxed) - before < COPIES_PER_PART);
        parts += 1;
    }
    assert_eq!(driver.used_index(0), 256);
    assert!(parts >= 64, "{parts}");
}

#[derive(Clone, Debug)]
enum Step {
    Load(u64, u8),
    Store(u64, u8, u64),
    Poke(u64, Vec<u8>),
    Descriptor(u8, Desc),
    Available(u8),
    Notify(u8),
    OutOfMemory(i64),
    Run,
    Reset,
    BringUp(u64),
}

/// Numbers that a hostile driver likes, among all others.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0u64..20,
        2 => prop::sample::select(vec![255, 256, 257, 0xffff, 0x1_0000, 0xffff_ffff, 1 << 32, u64::MAX, u64::MAX - 15]),
        3 => (0..RAM_BYTES).prop_map(|offset| RAM + offset),
        1 => any::<u64>(),
    ]
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0u64..64).prop_map(|n| BUFFERS + n * 16),
        2 => (0u64..0x300).prop_map(|n| RAM + 0x1_0000 + n * 16),
        1 => Just(RAM + RAM_BYTES - 8),
        1 => number(),
    ]
}

fn descriptor() -> impl Strategy<Value = Desc> {
    let len = prop_oneof![4 => 0u32..64, 3 => (0u32..20).prop_map(|n| n * 512), 1 => any::<u32>()];
    let next = prop_oneof![6 => 0u16..16, 1 => any::<u16>()];
    (address(), len, prop_oneof![9 => 0u16..8, 1 => any::<u16>()], next).prop_map(|(gpa, len, flags, next)| Desc {
        gpa,
        len,
        flags,
        next,
    })
}

fn step() -> impl Strategy<Value = Step> {
    let offset = || prop_oneof![8 => (0u64..0x50).prop_map(|n| n * 4), 1 => any::<u64>()];
    let size = || prop_oneof![8 => Just(4u8), 1 => any::<u8>()];
    // Queue areas inside the rings' pages, so that what is poked is what is read.
    let bytes = prop::collection::vec(prop_oneof![3 => 0u8..8, 1 => any::<u8>()], 1..24);
    let features = prop::sample::select(vec![0, INDIRECT_DESC, INDIRECT_DESC | RING_RESET]);
    prop_oneof![
        2 => (offset(), size()).prop_map(|(offset, size)| Step::Load(offset, size)),
        2 => (offset(), size(), number()).prop_map(|(offset, size, value)| Step::Store(offset, size, value)),
        3 => (0u64..0x7f00, bytes).prop_map(|(offset, bytes)| Step::Poke(RAM + 0x1_0000 + offset, bytes)),
        8 => (0u8..16, descriptor()).prop_map(|(at, desc)| Step::Descriptor(at, desc)),
        6 => (0u8..18).prop_map(Step::Available),
        6 => (0u8..6).prop_map(Step::Notify),
        1 => prop_oneof![Just(-1), 0i64..30].prop_map(Step::OutOfMemory),
        2 => Just(Step::Run),
        1 => Just(Step::Reset),
        3 => features.prop_map(Step::BringUp),
    ]
}

/// Applies `steps` to a device and checks after each what must always hold.
fn torture<D: VirtioDevice>(device: D, steps: &[Step], offer: impl Fn(&Driver<D>)) {
    let mut driver = Driver::new(device, INDIRECT_DESC);
    for step in steps {
        let before = driver.memory.copies.load(Ordering::Relaxed);
        match step {
            Step::Load(offset, size) => {
                let value = driver.device.read(*offset, *size);
                assert!(*size >= 8 || value >> (u32::from(*size) * 8) == 0);
            }
            Step::Store(offset, size, value) => drop_work(driver.device.write(*offset, *size, *value)),
            Step::Poke(gpa, bytes) => driver.memory.poke(*gpa, bytes),
            Step::Descriptor(at, desc) => (0..D::QUEUES).for_each(|q| driver.set_descriptor(q, (*at).into(), *desc)),
            Step::Available(head) => (0..D::QUEUES).for_each(|q| driver.make_available(q, (*head).into())),
            Step::Notify(queue) => drop_work(driver.notify((*queue).into())),
            Step::OutOfMemory(copies) => driver.memory.copies_left.store(*copies, Ordering::Relaxed),
            Step::Run => drop_work(driver.device.run()),
            Step::Reset => driver.device.reset(),
            Step::BringUp(features) => driver.bring_up(*features, 16),
        }
        offer(&driver);
        let copies = driver.memory.copies.load(Ordering::Relaxed) - before;
        assert!(copies < 2 * COPIES_PER_PART, "{copies} copies in {step:?}");
        assert_eq!(driver.high(), driver.load(0x60) != 0);
        let status = driver.load(STATUS);
        assert_eq!(status & NEEDS_RESET != 0, driver.device.broken().is_some());
        if status & (NEEDS_RESET | FAILED | DRIVER_OK) != DRIVER_OK {
            assert_eq!(driver.device.run(), Work::Idle, "no work without a driver at work, after {step:?}");
        }
    }
    // Whatever came before, a reset makes it a working device.
    driver.memory.copies_left.store(-1, Ordering::Relaxed);
    driver.bring_up(0, 16);
    assert_eq!(driver.device.broken(), None);
    assert_eq!(driver.device.run(), Work::Idle);
}

/// The torturer does not wait for what it started.
fn drop_work(work: Work) {
    assert!(matches!(work, Work::Idle | Work::More | Work::Stalled | Work::Waiting));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn a_block_device_survives_anything(steps in prop::collection::vec(step(), 0..120)) {
        torture(Block::new(Arc::new(RamDisk::new(64)), b"").unwrap(), &steps, |_| {});
    }

    #[test]
    fn a_console_survives_anything(steps in prop::collection::vec(step(), 0..120)) {
        let console = Console::new(Arc::new(Screen::default()), None).unwrap();
        torture(console, &steps, |driver| {
            let taken = driver.device.offer(b"input from the host");
            assert!(taken <= 19);
        });
    }

    #[test]
    fn an_entropy_device_survives_anything(steps in prop::collection::vec(step(), 0..120)) {
        torture(EntropySource::new(Arc::new(Counter::default())).unwrap(), &steps, |_| {});
    }
    #[test]
    fn a_balloon_survives_anything(
        steps in prop::collection::vec(step(), 0..120),
        busy in prop::collection::vec(0usize..3, 1..8),
    ) {
        let taker = Taker::new();
        let next = Cell::new(0);
        torture(Balloon::new(taker.clone()).unwrap(), &steps, |driver| {
            next.set(next.get() + 1);
            taker.busy.store(busy[next.get() % busy.len()], Ordering::Relaxed);
            driver.device.set_target(next.get() as u32 % 7);
            driver.device.ask_statistics();
            assert!(taker.most.load(Ordering::Relaxed) <= 512, "one step is bounded");
            assert!(taker.calls.swap(0, Ordering::Relaxed) < COPIES_PER_PART);
        });
    }
}
