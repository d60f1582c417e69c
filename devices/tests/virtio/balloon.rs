//! The balloon: pages that go in, come out, or are reported free; statistics; an owner's wishes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use entresol_addr::PAGE_SIZE;
use entresol_devices::bus::{Device, Work};
use entresol_devices::virtio::balloon::{Balloon, TAGS};

use crate::driver::{BUFFERS, Driver, RING_RESET, STATUS};
use crate::host::{RAM, Taker};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
/// Where drivers that skip queues which are not offered have reports, and where the specification has them.
const REPORTS: [usize; 2] = [3, 4];

/// STATS_VQ, DEFLATE_ON_OOM, PAGE_POISON, PAGE_REPORTING.
const FEATURES: u64 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5;

fn bench() -> (Driver<Balloon<Arc<Taker>>>, Arc<Taker>) {
    let taker = Taker::new();
    (Driver::new(Balloon::new(taker.clone()).unwrap(), FEATURES), taker)
}

/// Page `page` of memory as drivers number it.
fn number(page: u64) -> u32 {
    (RAM / PAGE_SIZE + page) as u32
}

fn put_numbers(driver: &Driver<Balloon<Arc<Taker>>>, numbers: &[u32]) -> (u64, u32, bool) {
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    driver.memory.poke(BUFFERS, &bytes);
    (BUFFERS, bytes.len() as u32, false)
}

#[test]
fn it_says_what_it_is() {
    let (driver, _) = bench();
    assert_eq!(driver.load(8), 5);
    assert_eq!(driver.offered() & 0x3f, FEATURES);
    assert_eq!([0x100, 0x104, 0x108, 0x10c].map(|at| driver.load(at)), [0; 4]);
}

#[test]
fn inflated_pages_go_and_deflated_ones_are_counted() {
    let (mut driver, taker) = bench();
    let buffer = put_numbers(&driver, &[number(9), number(8), number(40), number(8), 3]);
    driver.submit(INFLATE, &[buffer]);
    assert_eq!(driver.used(INFLATE), Some((0, 0)));
    assert_eq!(taker.gone(), [8, 9, 40]);
    driver.submit(DEFLATE, &[(BUFFERS, 8, false)]);
    assert_eq!(driver.used(DEFLATE), Some((0, 0)));
    driver.store(0x104, 1);
    let reading = driver.device.reading();
    assert_eq!((reading.inflated, reading.deflated, reading.refused, reading.actual), (3, 2, 1, 1));
    assert_eq!(driver.load(0x104), 1);
    assert_eq!(driver.take_interrupt(), 1);
}

#[test]
fn a_long_list_in_pieces_is_taken_in_bounded_parts() {
    let (mut driver, taker) = bench();
    let numbers: Vec<u32> = (0..1001).rev().map(|page| number(2 * page)).collect();
    let (_, bytes, _) = put_numbers(&driver, &numbers);
    // Cut in the middle of a number, and with a tail that is none.
    driver.chain(INFLATE, 0, &[(BUFFERS, 6, false), (BUFFERS + 6, bytes - 6 + 3, false)]);
    driver.make_available(INFLATE, 0);
    let (mut work, mut parts) = (driver.notify(INFLATE), 1);
    while work == Work::More {
        work = driver.device.run();
        parts += 1;
    }
    assert_eq!(work, Work::Idle);
    assert!(parts >= 4, "{parts}");
    assert!(taker.most.load(Ordering::Relaxed) <= 256);
    assert_eq!(taker.gone(), (0..1001).map(|page| 2 * page).collect::<Vec<_>>());
    assert_eq!(driver.device.reading().inflated, 1001);
}

#[test]
fn who_is_busy_is_asked_again() {
    let (mut driver, taker) = bench();
    taker.busy.store(3, Ordering::Relaxed);
    let buffer = put_numbers(&driver, &[number(1)]);
    driver.chain(INFLATE, 0, &[buffer]);
    driver.make_available(INFLATE, 0);
    assert_eq!(driver.notify(INFLATE), Work::More);
    assert_eq!((driver.used(INFLATE), taker.gone().len()), (None, 0), "the page is not the driver's again yet");
    assert_eq!([driver.device.run(), driver.device.run()], [Work::More; 2]);
    assert_eq!(driver.device.run(), Work::Idle);
    assert_eq!((driver.used(INFLATE), taker.gone()), (Some((0, 0)), vec![1]));
}

#[test]
fn reports_are_taken_at_either_number() {
    for queue in REPORTS {
        let (mut driver, taker) = bench();
        let page = |page| RAM + page * PAGE_SIZE;
        driver.submit(queue, &[(page(512), 4 << 20, true), (page(3) + 1, 3 * 4096, true), (page(9), 4095, true)]);
        assert_eq!(driver.used(queue), Some((0, 0)));
        assert_eq!(taker.gone(), [4, 5].into_iter().chain(512..1536).collect::<Vec<_>>(), "whole pages");
        assert_eq!(taker.most.load(Ordering::Relaxed), 512);
        assert_eq!(driver.device.reading().reported, 1026);
    }
}

#[test]
fn poisoned_pages_stay() {
    let (mut driver, taker) = bench();
    driver.store(0x10c, 0xaaaa_aaaa);
    driver.submit(REPORTS[0], &[(RAM, 1 << 20, true)]);
    assert_eq!((driver.used(REPORTS[0]), taker.gone().len()), (Some((0, 0)), 0));
    driver.store(0x10c, 0);
    driver.submit(REPORTS[0], &[(RAM, 1 << 20, true)]);
    assert_eq!(taker.gone().len(), 256);
    driver.store(0x10c, 1);
    driver.store(STATUS, 0);
    assert_eq!(driver.load(0x10c), 0, "another driver, another value");
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let (mut driver, _) = bench();
    let tell = |driver: &mut Driver<Balloon<Arc<Taker>>>, told: &[(u16, u64)]| {
        let bytes: Vec<u8> =
            told.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect();
        driver.memory.poke(BUFFERS, &bytes);
        driver.submit(STATISTICS, &[(BUFFERS, bytes.len() as u32 + 9, false)]);
    };
    tell(&mut driver, &[(5, 1 << 29), (4, 1 << 28), (99, 1), (2, 7)]);
    let reading = driver.device.reading();
    assert_eq!((reading.updates, driver.used(STATISTICS)), (1, None), "the device keeps the buffer");
    let known = [("major-faults", 7), ("free-memory", 1 << 28), ("total-memory", 1 << 29)];
    let told = TAGS.iter().zip(reading.statistics).filter_map(|(name, value)| Some((*name, value?)));
    assert!(told.eq(known));
    assert_eq!(driver.notify(STATISTICS), Work::Idle);
    assert_eq!(driver.device.reading().updates, 1, "a notification is no news");
    driver.device.ask_statistics();
    assert_eq!((driver.used(STATISTICS), driver.take_interrupt()), (Some((0, 0)), 1));
    driver.device.ask_statistics();
    assert_eq!(driver.used(STATISTICS), None);
    tell(&mut driver, &[(0, 5)]);
    // Asked for twice, so what came goes back at once, and the next is kept.
    assert_eq!((driver.used(STATISTICS), driver.device.reading().updates), (Some((0, 0)), 2));
    assert_eq!(driver.device.reading().statistics[0], Some(5));
    tell(&mut driver, &[(0, 6)]);
    assert_eq!((driver.used(STATISTICS), driver.device.reading().statistics[0]), (None, Some(6)));
}

#[test]
fn the_owners_wish_is_told_and_outlives_the_driver() {
    let (driver, _) = bench();
    let generation = driver.load(0xfc);
    driver.device.set_target(77);
    assert_eq!((driver.load(0x100), driver.take_interrupt()), (77, 2));
    assert_ne!(driver.load(0xfc), generation);
    driver.device.set_target(77);
    assert!(!driver.high(), "nothing has changed");
    driver.store(0x104, 50);
    driver.device.reset();
    let reading = driver.device.reading();
    assert_eq!((reading.target, reading.actual, driver.load(0x100)), (77, 0, 77));
}

#[test]
fn a_copy_has_the_parents_balloon_and_queues() {
    let (mut driver, _) = bench();
    driver.device.set_target(9);
    let buffer = put_numbers(&driver, &[number(1), number(2)]);
    driver.submit(INFLATE, &[buffer]);
    driver.store(0x104, 2);
    let taker = Taker::new();
    let make = |balloon: &Balloon<Arc<Taker>>| balloon.fork(taker.clone());
    let copy = driver.device.fork(make, driver.memory.clone(), Arc::new(crate::host::Line::default())).unwrap();
    let reading = copy.reading();
    assert_eq!((reading.target, reading.actual, reading.inflated), (9, 2, 2));
    let buffer = put_numbers(&driver, &[number(5)]);
    driver.chain(INFLATE, 0, &[buffer]);
    driver.make_available(INFLATE, 0);
    assert_eq!(copy.write(0x50, 4, 0), Work::Idle);
    assert_eq!((taker.gone(), copy.reading().inflated), (vec![5], 3));
}

#[test]
fn queues_that_were_reset_begin_anew() {
    let (mut driver, _) = bench();
    driver.bring_up(FEATURES | RING_RESET, 16);
    driver.memory.poke(BUFFERS, &[0; 10]);
    driver.submit(STATISTICS, &[(BUFFERS, 10, false)]);
    driver.store(0x30, STATISTICS as u64);
    driver.store(0xc0, 1);
    driver.set_up_queue(STATISTICS);
    driver.submit(STATISTICS, &[(BUFFERS, 10, false)]);
    assert_eq!(driver.device.reading().updates, 2);
}
