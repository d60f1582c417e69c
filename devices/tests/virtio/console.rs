//! Console input and output.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use entresol_devices::bus::{Device, Work};
use entresol_devices::virtio::Broken;
use entresol_devices::virtio::console::{Console, Size};

use crate::driver::{BUFFERS, Driver, STATUS};
use crate::host::Screen;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

fn bench() -> (Driver<Console>, Arc<Screen>) {
    let screen = Arc::new(Screen::default());
    let console = Console::new(screen.clone(), Some(Size { columns: 80, rows: 25 })).unwrap();
    (Driver::new(console, 1), screen)
}

fn text(screen: &Screen) -> Vec<u8> {
    screen.text.lock().unwrap().clone()
}

/// Puts up `count` receive buffers of `bytes` each, with descriptors from 0 on.
fn put_up(driver: &mut Driver<Console>, count: u16, bytes: u32) {
    for head in 0..count {
        driver.chain(RECEIVE, head, &[(BUFFERS + 0x1000 * u64::from(head), bytes, true)]);
        driver.make_available(RECEIVE, head);
    }
    assert_eq!(driver.notify(RECEIVE), Work::Idle);
}

#[test]
fn output_arrives_in_order() {
    let (mut driver, screen) = bench();
    driver.memory.poke(BUFFERS, b"hello, world");
    driver.submit(TRANSMIT, &[(BUFFERS + 7, 5, false), (BUFFERS, 5, false)]);
    assert_eq!(text(&screen), b"worldhello");
    assert_eq!(driver.used(TRANSMIT), Some((0, 0)));
    assert_eq!(driver.take_interrupt(), 1);
}

#[test]
fn much_output_is_taken_in_parts_and_each_byte_once() {
    let (mut driver, screen) = bench();
    let long: Vec<u8> = (0..1u32 << 20).map(|n| (n * 17 % 251) as u8).collect();
    driver.memory.poke(BUFFERS, &long);
    driver.submit(TRANSMIT, &[(BUFFERS, 1 << 20, false)]);
    assert_eq!(text(&screen), long);
}

#[test]
fn want_of_memory_does_not_repeat_output() {
    let long: Vec<u8> = (0..20_000u32).map(|n| (n % 251) as u8).collect();
    for copies in 0..12 {
        let (mut driver, screen) = bench();
        driver.memory.poke(BUFFERS, &long);
        driver.chain(TRANSMIT, 0, &[(BUFFERS, 20_000, false)]);
        driver.make_available(TRANSMIT, 0);
        driver.memory.copies_left.store(copies, Ordering::Relaxed);
        let work = driver.notify(TRANSMIT);
        driver.memory.copies_left.store(-1, Ordering::Relaxed);
        if work == Work::Stalled {
            assert_eq!(driver.device.run(), Work::Idle);
        }
        assert_eq!(text(&screen), long, "after {copies} copies");
        assert_eq!((driver.used(TRANSMIT), driver.used(TRANSMIT)), (Some((0, 0)), None));
    }
}

#[test]
fn input_waits_for_a_driver_and_its_buffers() {
    let screen = Arc::new(Screen::default());
    let mut driver = Driver::cold(Console::new(screen.clone(), None).unwrap());
    assert_eq!(driver.device.offer(b"early"), 0);
    driver.bring_up(0, 16);
    assert_eq!(driver.device.offer(b"early"), 0);
    assert_eq!(screen.calls.load(Ordering::Relaxed), 0);
    put_up(&mut driver, 2, 3);
    assert_eq!(screen.calls.load(Ordering::Relaxed), 1);
    assert_eq!(driver.device.offer(b"early bird"), 6);
    assert_eq!(driver.take_interrupt(), 1);
    assert_eq!([driver.used(RECEIVE), driver.used(RECEIVE)], [Some((0, 3)), Some((1, 3))]);
    assert_eq!(driver.memory.peek(BUFFERS, 3), b"ear");
    assert_eq!(driver.memory.peek(BUFFERS + 0x1000, 3), b"ly ");
    put_up(&mut driver, 1, 64);
    assert_eq!(screen.calls.load(Ordering::Relaxed), 2);
    assert_eq!(driver.device.offer(b"bird"), 4);
    put_up(&mut driver, 1, 64);
    assert_eq!(screen.calls.load(Ordering::Relaxed), 2, "nothing was refused since");
}

#[test]
fn input_that_memory_had_no_room_for_is_offered_again() {
    for copies in 0..6 {
        let (mut driver, screen) = bench();
        put_up(&mut driver, 1, 64);
        driver.memory.copies_left.store(copies, Ordering::Relaxed);
        let mut taken = driver.device.offer(b"line\n");
        driver.memory.copies_left.store(-1, Ordering::Relaxed);
        if taken == 0 {
            assert_eq!(driver.device.run(), Work::Idle);
            assert_eq!(screen.calls.load(Ordering::Relaxed), 1);
            taken = driver.device.offer(b"line\n");
        }
        assert_eq!(taken, 5, "after {copies} copies");
        assert_eq!((driver.used(RECEIVE), driver.used(RECEIVE)), (Some((0, 5)), None));
        assert_eq!(driver.memory.peek(BUFFERS, 5), b"line\n");
    }
}

#[test]
fn a_receive_buffer_without_room_breaks_the_device() {
    let (mut driver, _screen) = bench();
    driver.chain(RECEIVE, 0, &[(BUFFERS, 8, false)]);
    driver.make_available(RECEIVE, 0);
    assert_eq!(driver.device.offer(b"x"), 0);
    assert_eq!(driver.device.broken(), Some(Broken::Request));
}

#[test]
fn a_byte_in_an_emergency_needs_no_driver() {
    let screen = Arc::new(Screen::default());
    let driver = Driver::cold(Console::new(screen.clone(), None).unwrap());
    assert_ne!(driver.offered() & 1 << 2, 0);
    driver.store(0x108, b'!'.into());
    driver.store(0x104, b'?'.into());
    assert_eq!(text(&screen), b"!");
}

#[test]
fn a_new_size_is_announced() {
    let (driver, _screen) = bench();
    assert_eq!((driver.device.read(0x100, 2), driver.device.read(0x102, 2)), (80, 25));
    let generation = driver.load(0xfc);
    driver.device.resize(Size { columns: 80, rows: 25 });
    assert_eq!((driver.load(0xfc), driver.high()), (generation, false), "nothing changed");
    driver.device.resize(Size { columns: 132, rows: 43 });
    assert_ne!(driver.load(0xfc), generation);
    assert_eq!(driver.load(0x100), 43 << 16 | 132);
    assert_eq!(driver.take_interrupt(), 2);
    assert_eq!(driver.load(STATUS), 15);
}
