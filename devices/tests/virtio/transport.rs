//! The register file, negotiation, interrupts, resets.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use entresol_devices::bus::{Area, Device, Work};
use entresol_devices::virtio::Broken;
use entresol_devices::virtio::block::Block;
use entresol_devices::virtio::console::{Console, Size};

use crate::driver::{
    BUFFERS, Desc, Driver, INDIRECT, INDIRECT_DESC, NEEDS_RESET, RING_RESET, STATUS, VERSION_1, WRITE,
};
use crate::host::{RamDisk, Screen};

fn disk() -> Block<Arc<RamDisk>> {
    Block::new(Arc::new(RamDisk::new(64)), b"disk").unwrap()
}

#[test]
fn the_registers_introduce_the_device() {
    let driver = Driver::cold(disk());
    assert_eq!([0, 4, 8].map(|register| driver.load(register)), [0x7472_6976, 2, 2]);
    assert_eq!([0xb0, 0xb4, 0xb8, 0xbc].map(|register| driver.load(register)), [0xffff_ffff; 4]);
    assert_eq!(driver.load(0x34), 256);
    driver.store(0x30, 1);
    assert_eq!(driver.load(0x34), 0, "there is no second queue");
    driver.store(0x30, u64::MAX);
    assert_eq!((driver.load(0x34), driver.load(0x44)), (0, 0));
    for (offset, size) in [(0, 1), (0, 2), (0, 8), (1, 4), (0xfe, 4)] {
        assert_eq!(driver.device.read(offset, size), 0);
    }
}

#[test]
fn features_must_be_offered_and_modern() {
    let driver = Driver::cold(disk());
    let offered = driver.offered();
    assert_eq!(offered & (VERSION_1 | INDIRECT_DESC | RING_RESET), VERSION_1 | INDIRECT_DESC | RING_RESET);
    assert!(driver.negotiate(offered));
    assert!(driver.negotiate(VERSION_1));
    assert!(!driver.negotiate(offered & !VERSION_1), "a legacy driver");
    assert!(!driver.negotiate(VERSION_1 | 1 << 29), "EVENT_IDX was not offered");
    assert!(!driver.negotiate(VERSION_1 | 1 << 63));
    driver.store(STATUS, 15);
    assert_eq!(driver.load(STATUS), 3, "no DRIVER_OK without FEATURES_OK");
    driver.store(STATUS, 0);
    driver.store(0x24, 7);
    driver.store(0x20, 1);
    driver.store(0x24, 1);
    driver.store(0x20, 1);
    driver.store(STATUS, 11);
    assert_eq!(driver.load(STATUS), 3, "a feature above bit 63");
}

#[test]
fn features_are_settled_by_features_ok() {
    let driver = Driver::cold(disk());
    assert!(driver.negotiate(VERSION_1));
    driver.store(0x24, 1);
    driver.store(0x20, 0xffff_ffff);
    driver.store(STATUS, 15);
    assert_eq!(driver.load(STATUS), 15);
}

#[test]
fn status_bits_go_only_by_reset() {
    let driver = Driver::new(disk(), 0);
    driver.store(STATUS, 1);
    assert_eq!(driver.load(STATUS), 15);
    driver.store(STATUS, 0xff);
    assert_eq!(driver.load(STATUS), 15 | 128, "NEEDS_RESET is the device's to set");
    driver.store(STATUS, 0);
    assert_eq!((driver.load(STATUS), driver.load(0x44)), (0, 0));
}

#[test]
fn a_queue_that_cannot_work_breaks_the_device() {
    let mut driver = Driver::cold(disk());
    assert!(driver.negotiate(VERSION_1));
    driver.store(0x30, 0);
    driver.store(0x38, 100);
    driver.store(0x44, 1);
    assert_eq!(driver.load(0x44), 0);
    assert_eq!(driver.device.broken(), Some(Broken::QueueSize { size: 100 }));
    assert_eq!(driver.load(STATUS), 11 | NEEDS_RESET);
    assert!(!driver.high(), "nobody is told before DRIVER_OK");
    driver.bring_up(0, 256);
    assert_eq!(driver.device.broken(), None);
}

#[test]
fn queues_wait_for_features_ok() {
    let driver = Driver::cold(disk());
    driver.store(0x38, 8);
    driver.store(0x44, 1);
    assert_eq!((driver.load(0x44), driver.load(STATUS)), (0, 0));
}

#[test]
fn one_queue_is_reset_and_works_again() {
    let mut driver = Driver::new(disk(), RING_RESET);
    driver.submit(0, &[(BUFFERS, 16, false), (BUFFERS + 16, 513, true)]);
    assert_eq!(driver.used(0), Some((0, 513)));
    driver.store(0x30, 0);
    driver.store(0xc0, 1);
    assert_eq!((driver.load(0xc0), driver.load(0x44)), (0, 0));
    driver.set_up_queue(0);
    driver.submit(0, &[(BUFFERS, 16, false), (BUFFERS + 16, 513, true)]);
    assert_eq!(driver.used(0), Some((0, 513)));
}

/// A driver whose disk has answered a request, with its header behind an indirect table.
fn worked() -> Driver<Block<Arc<RamDisk>>> {
    let mut driver = Driver::new(disk(), RING_RESET | INDIRECT_DESC);
    let table = BUFFERS + 0x1000;
    for (at, (gpa, len, flags)) in [(BUFFERS, 16, 1), (BUFFERS + 16, 513, WRITE)].into_iter().enumerate() {
        driver.memory.poke(table + 16 * at as u64, &Desc { gpa, len, flags, next: 1 }.bytes());
    }
    driver.set_descriptor(0, 3, Desc { gpa: table, len: 32, flags: INDIRECT, next: 0 });
    driver.make_available(0, 3);
    assert_eq!((driver.notify(0), driver.used(0)), (Work::Idle, Some((3, 513))));
    driver
}

#[test]
fn what_is_read_again_and_again_is_the_rings() {
    let driver = worked();
    let seen = |area| driver.memory.remembered(0, area);
    let table = driver.table(0);
    assert_eq!(seen(Area::Descriptors), Some((table + 48, table + 64)), "the table, and no indirect one");
    let (available, used) = (driver.driver_area(0), driver.device_area(0));
    assert_eq!(seen(Area::Driver), Some((available, available + 6)), "flags, index and entry");
    assert_eq!(seen(Area::Device), Some((used + 2, used + 12)), "index and element");
}

#[test]
fn whatever_stops_a_queue_has_its_rings_forgotten() {
    type Stops = fn(&Driver<Block<Arc<RamDisk>>>);
    let stops: [(&str, Stops); 6] = [
        ("the driver resets the device", |driver| driver.store(STATUS, 0)),
        ("the machine resets the device", |driver| driver.device.reset()),
        ("the driver resets the queue", |driver| driver.store(0xc0, 1)),
        ("the driver stops the queue", |driver| driver.store(0x44, 0)),
        ("the driver gives up", |driver| driver.store(STATUS, 0x80)),
        ("the driver breaks the format", |driver| {
            driver.memory.poke(driver.driver_area(0) + 2, &[0xff; 2]);
            assert_eq!(driver.notify(0), Work::Idle);
            assert!(driver.device.broken().is_some());
        }),
    ];
    for (name, stop) in stops {
        let driver = worked();
        driver.store(0x30, 0);
        stop(&driver);
        assert!(driver.memory.rings.lock().unwrap().is_empty(), "{name}");
        let _ = driver.notify(0);
        assert!(driver.memory.rings.lock().unwrap().is_empty(), "{name}: and nothing is used after");
    }
}

#[test]
fn a_reset_takes_the_interrupt_back() {
    let mut driver = Driver::new(disk(), 0);
    for reset in [|driver: &Driver<_>| driver.store(STATUS, 0), |driver: &Driver<_>| driver.device.reset()] {
        driver.submit(0, &[(BUFFERS, 16, false), (BUFFERS + 16, 513, true)]);
        assert!(driver.high());
        reset(&driver);
        assert!(!driver.high());
        assert_eq!((driver.load(0x60), driver.load(STATUS)), (0, 0));
        driver.bring_up(0, 16);
    }
}

#[test]
fn a_queue_is_not_reset_without_the_feature() {
    let driver = Driver::new(disk(), 0);
    driver.store(0x30, 0);
    driver.store(0xc0, 1);
    assert_eq!(driver.load(0x44), 1);
}

#[test]
fn the_line_is_high_until_all_is_acknowledged() {
    let mut driver = Driver::new(disk(), 0);
    assert!(!driver.high());
    driver.submit(0, &[(BUFFERS, 16, false), (BUFFERS + 16, 513, true)]);
    assert!(driver.high());
    driver.store(0x64, 2);
    assert!(driver.high());
    assert_eq!(driver.take_interrupt(), 1);
    assert!(!driver.high());
    driver.memory.poke(driver.driver_area(0), &1u16.to_le_bytes());
    driver.submit(0, &[(BUFFERS, 16, false), (BUFFERS + 16, 513, true)]);
    assert!(!driver.high(), "the driver polls");
    assert_eq!(driver.used_index(0), 2);
}

#[test]
fn a_reason_that_is_left_makes_a_new_edge() {
    let screen = Arc::new(Screen::default());
    let mut driver = Driver::new(Console::new(screen, Some(Size { columns: 80, rows: 25 })).unwrap(), 1);
    driver.submit(1, &[(BUFFERS, 4, false)]);
    driver.device.resize(Size { columns: 132, rows: 43 });
    assert_eq!((driver.load(0x60), driver.line.edges.load(Ordering::Relaxed)), (3, 1));
    driver.store(0x64, 1);
    assert!(driver.high());
    assert_eq!(driver.line.edges.load(Ordering::Relaxed), 2);
    assert_eq!(driver.take_interrupt(), 2);
    assert!(!driver.high());
}

#[test]
fn notifications_count_only_while_the_driver_is_at_work() {
    let mut driver = Driver::new(disk(), 0);
    driver.chain(0, 0, &[(BUFFERS, 16, false), (BUFFERS + 16, 513, true)]);
    driver.make_available(0, 0);
    for queue in [1, 2, usize::MAX] {
        assert_eq!(driver.notify(queue), Work::Idle);
    }
    driver.store(STATUS, 128);
    assert_eq!(driver.notify(0), Work::Idle);
    assert_eq!(driver.used(0), None, "the driver has failed");
    driver.device.reset();
    assert_eq!(driver.notify(0), Work::Idle);
    assert_eq!(driver.used(0), None);
}

#[test]
fn a_driver_that_gives_up_in_the_middle_of_work_ends_it() {
    let mut driver = Driver::new(Block::new(Arc::new(RamDisk::new(4096)), b"").unwrap(), 0);
    driver.chain(0, 0, &[(BUFFERS, 16, false), (BUFFERS + 16, 2 << 20, true), (BUFFERS + (3 << 20), 1, true)]);
    driver.make_available(0, 0);
    assert_eq!(driver.notify(0), Work::More);
    driver.store(STATUS, 128);
    assert_eq!(driver.device.run(), Work::Idle);
    assert_eq!(driver.used(0), None);
}

#[test]
fn a_reset_in_the_middle_of_work_ends_it() {
    let mut driver = Driver::new(Block::new(Arc::new(RamDisk::new(4096)), b"").unwrap(), 0);
    driver.chain(0, 0, &[(BUFFERS, 16, false), (BUFFERS + 16, 2 << 20, true), (BUFFERS + (3 << 20), 1, true)]);
    driver.make_available(0, 0);
    assert_eq!(driver.notify(0), Work::More);
    assert!(!driver.high());
    driver.store(STATUS, 0);
    let copies = driver.memory.copies.load(Ordering::Relaxed);
    assert_eq!(driver.device.run(), Work::Idle);
    assert_eq!(driver.memory.copies.load(Ordering::Relaxed), copies);
}

#[test]
fn what_was_saved_goes_on_and_a_strangers_state_is_refused() {
    let driver = Driver::new(disk(), INDIRECT_DESC);
    let saved = driver.device.save();
    let text = serde_json::to_string(&saved).unwrap();
    let other = Driver::cold(disk());
    other.device.load(&serde_json::from_str(&text).unwrap()).unwrap();
    assert_eq!(other.device.save(), saved);
    assert_eq!(other.load(STATUS), driver.load(STATUS));
    assert_eq!(other.load(0x44), 1, "its queue is ready");
    let refused = |from: &str, to: &str| {
        assert!(text.contains(from), "{text}");
        let fresh = Driver::cold(disk());
        let before = fresh.device.save();
        let stranger = serde_json::from_str(&text.replacen(from, to, 1)).unwrap();
        let error = fresh.device.load(&stranger).unwrap_err();
        assert_eq!(fresh.device.save(), before, "nothing has changed");
        error.field
    };
    assert_eq!(refused("\"status\":15", "\"status\":31"), "virtio.status");
    assert_eq!(refused("\"status\":15", "\"status\":7"), "virtio.status");
    assert_eq!(refused("\"foreign_features\":false", "\"foreign_features\":true"), "virtio.driver_features");
    assert_eq!(refused("\"interrupt_status\":0", "\"interrupt_status\":4"), "virtio.interrupt_status");
    assert_eq!(refused("\"size\":", "\"size\":1"), "virtio.queues");
}
