//! Disk requests.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use entresol_devices::bus::{Device, Work};
use entresol_devices::virtio::Broken;
use entresol_devices::virtio::block::{Block, DiskError};
use proptest::prelude::*;

use crate::driver::{BUFFERS, Desc, Driver, INDIRECT, INDIRECT_DESC, NEEDS_RESET, NEXT, STATUS, WRITE};
use crate::host::{RAM, RAM_BYTES, RamDisk};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const HEADER: u64 = BUFFERS;
const DATA: u64 = BUFFERS + 0x1000;
const STATUS_BYTE: u64 = BUFFERS + 0x800;

struct Bench {
    driver: Driver<Block<Arc<RamDisk>>>,
    disk: Arc<RamDisk>,
}

impl Bench {
    fn new(disk: RamDisk) -> Self {
        let disk = Arc::new(disk);
        let driver = Driver::new(Block::new(disk.clone(), b"entresol-disk").unwrap(), INDIRECT_DESC);
        Self { driver, disk }
    }

    /// The chain of a request with contiguous data.
    fn prepare(&self, kind: u32, sector: u64, bytes: u32) -> Vec<(u64, u32, bool)> {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.memory.poke(HEADER, &header);
        self.driver.memory.poke(STATUS_BYTE, &[0xee]);
        let data = (DATA, bytes, kind != OUT);
        vec![(HEADER, 16, false), data, (STATUS_BYTE, 1, true)]
    }

    /// Runs a request to its end and returns its status.
    fn request(&mut self, kind: u32, sector: u64, bytes: u32) -> u8 {
        let chain = self.prepare(kind, sector, bytes);
        self.driver.submit(0, &chain);
        let (head, _) = self.driver.used(0).expect("the request came back");
        assert_eq!(head, 0);
        self.status()
    }

    fn status(&self) -> u8 {
        self.driver.memory.peek(STATUS_BYTE, 1)[0]
    }

    fn data(&self, bytes: usize) -> Vec<u8> {
        self.driver.memory.peek(DATA, bytes)
    }
}

#[test]
fn the_configuration_describes_the_disk() {
    let bench = Bench::new(RamDisk::new(0x1_2345));
    assert_eq!(bench.driver.device.read(0x100, 8), 0x1_2345);
    assert_eq!(bench.driver.load(0x100 + 12), 254, "segments");
    assert_eq!(bench.driver.load(0x100 + 20), 512, "block size");
    assert_eq!(bench.driver.offered() & 0xffff, 1 << 2 | 1 << 6 | 1 << 9);
    let read_only = Bench::new(RamDisk { read_only: true, ..RamDisk::new(8) });
    assert_ne!(read_only.driver.offered() & 1 << 5, 0);
}

#[test]
fn what_is_written_is_read_back() {
    let mut bench = Bench::new(RamDisk::new(64));
    assert_eq!(bench.request(IN, 3, 1024), OK);
    assert_eq!(bench.data(1024), bench.disk.content(3, 1024));
    let text: Vec<u8> = (0..20 * 512).map(|n| (n * 13 % 256) as u8).collect();
    bench.driver.memory.poke(DATA, &text);
    assert_eq!(bench.request(OUT, 44, 20 * 512), OK);
    assert_eq!(bench.disk.content(44, 20 * 512), text);
    bench.driver.memory.poke(DATA, &vec![0; 20 * 512]);
    assert_eq!(bench.request(IN, 44, 20 * 512), OK);
    assert_eq!(bench.data(20 * 512), text);
    assert_eq!(bench.request(FLUSH, 0, 0), OK);
    assert_eq!(bench.disk.flushes.load(Ordering::Relaxed), 1);
}

#[test]
fn the_used_length_reaches_the_status() {
    let mut bench = Bench::new(RamDisk::new(64));
    for (kind, length) in [(IN, 513), (OUT, 1), (GET_ID, 513)] {
        let chain = bench.prepare(kind, 0, 512);
        bench.driver.submit(0, &chain);
        assert_eq!(bench.driver.used(0), Some((0, length)));
    }
}

#[test]
fn the_disk_names_itself() {
    let mut bench = Bench::new(RamDisk::new(1));
    assert_eq!(bench.request(GET_ID, 0, 20), OK);
    assert_eq!(bench.data(20), b"entresol-disk\0\0\0\0\0\0\0");
    bench.driver.memory.poke(DATA, &[0xee; 20]);
    assert_eq!(bench.request(GET_ID, 0, 4), OK);
    assert_eq!(bench.data(5), b"entr\xee");
}

#[test]
fn sectors_outside_the_disk_are_errors_and_touch_nothing() {
    let mut bench = Bench::new(RamDisk::new(64));
    let before = bench.disk.content(0, 64 * 512);
    for kind in [IN, OUT] {
        for (sector, bytes) in [(64, 512), (63, 1024), (u64::MAX, 512), (u64::MAX / 512, 1024), (0, 511), (0, 33 << 10)]
        {
            assert_eq!(bench.request(kind, sector, bytes), IOERR, "{kind} {sector} {bytes}");
        }
        assert_eq!(bench.request(kind, 64, 0), OK, "nothing, at the end");
    }
    assert_eq!(bench.disk.content(0, 64 * 512), before);
}

#[test]
fn unknown_requests_are_refused_by_name() {
    let mut bench = Bench::new(RamDisk::new(64));
    for kind in [2, 11, 13, 16, 0x8000_0000, u32::MAX] {
        assert_eq!(bench.request(kind, 0, 512), UNSUPP);
    }
}

#[test]
fn the_disks_own_errors_reach_the_guest() {
    let mut bench = Bench::new(RamDisk::new(64));
    *bench.disk.fault.lock().unwrap() = Some(DiskError::Io);
    assert_eq!([IN, OUT, FLUSH].map(|kind| bench.request(kind, 0, 512)), [IOERR; 3]);
    *bench.disk.fault.lock().unwrap() = None;
    assert_eq!(bench.request(IN, 0, 512), OK, "the device works on");
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut bench = Bench::new(RamDisk { read_only: true, ..RamDisk::new(64) });
    assert_eq!(bench.request(OUT, 0, 512), IOERR);
    assert_eq!(bench.request(IN, 0, 512), OK);
}

#[test]
fn an_indirect_table_may_end_a_chain() {
    let mut bench = Bench::new(RamDisk::new(64));
    bench.prepare(IN, 5, 1024);
    let table = BUFFERS + 0x40_0000;
    let entries = [
        Desc { gpa: DATA, len: 1024, flags: WRITE | NEXT, next: 2 },
        Desc { gpa: 0, len: 0, flags: INDIRECT, next: 0 },
        Desc { gpa: STATUS_BYTE, len: 1, flags: WRITE, next: 0 },
    ];
    for (n, entry) in entries.into_iter().enumerate() {
        bench.driver.memory.poke(table + 16 * n as u64, &entry.bytes());
    }
    bench.driver.set_descriptor(0, 9, Desc { gpa: HEADER, len: 16, flags: NEXT, next: 4 });
    bench.driver.set_descriptor(0, 4, Desc { gpa: table, len: 48, flags: INDIRECT, next: 0 });
    bench.driver.make_available(0, 9);
    assert_eq!(bench.driver.notify(0), Work::Idle);
    assert_eq!((bench.driver.used(0), bench.status()), (Some((9, 1025)), OK));
    assert_eq!(bench.data(1024), bench.disk.content(5, 1024));
}

#[test]
fn a_full_queue_is_served_in_one_notification() {
    let mut bench = Bench::new(RamDisk::new(64));
    bench.driver.bring_up(INDIRECT_DESC, 8);
    bench.prepare(FLUSH, 0, 0);
    for round in 0..40 {
        for head in 0..8 {
            let table = BUFFERS + 0x40_0000;
            bench.driver.memory.poke(table, &Desc { gpa: HEADER, len: 16, flags: NEXT, next: 1 }.bytes());
            bench.driver.memory.poke(table + 16, &Desc { gpa: STATUS_BYTE, len: 1, flags: WRITE, next: 0 }.bytes());
            bench.driver.set_descriptor(0, head, Desc { gpa: table, len: 32, flags: INDIRECT, next: 0 });
            bench.driver.make_available(0, head);
        }
        assert_eq!(bench.driver.notify(0), Work::Idle);
        let heads: Vec<u32> = std::iter::from_fn(|| bench.driver.used(0)).map(|(head, _)| head).collect();
        assert_eq!(heads, [0, 1, 2, 3, 4, 5, 6, 7], "round {round}");
    }
    assert_eq!(bench.disk.flushes.load(Ordering::Relaxed), 320);
}

#[test]
fn a_large_request_is_done_in_bounded_parts() {
    let mut bench = Bench::new(RamDisk::new(8192));
    let chain = bench.prepare(IN, 0, 4 << 20);
    bench.driver.chain(0, 0, &chain);
    bench.driver.make_available(0, 0);
    let mut work = bench.driver.notify(0);
    let mut parts = 1;
    while work == Work::More {
        assert_eq!(bench.driver.high(), bench.driver.used_index(0) == 1, "no interrupt before the end");
        work = bench.driver.device.run();
        parts += 1;
    }
    assert_eq!(work, Work::Idle);
    assert!((16..=20).contains(&parts), "{parts} parts of at most 256 KiB");
    assert_eq!(bench.driver.used(0), Some((0, (4 << 20) + 1)));
    assert_eq!(bench.data(4 << 20), bench.disk.content(0, 4 << 20));
}

#[test]
fn want_of_memory_delays_a_request_and_loses_nothing() {
    let bytes = 64 << 10;
    // Wherever in the request memory runs out, or a page is not there, it is completed in the end, once.
    for (copies, absent) in (0..120).map(|round| (round / 2, round % 2 == 1)) {
        let mut bench = Bench::new(RamDisk::new(256));
        let text: Vec<u8> = (0..bytes).map(|n| (n * 31 % 253) as u8).collect();
        bench.driver.memory.poke(DATA, &text);
        let chain = bench.prepare(OUT, 100, bytes as u32);
        bench.driver.chain(0, 0, &chain);
        bench.driver.make_available(0, 0);
        bench.driver.memory.absent.store(absent, Ordering::Relaxed);
        bench.driver.memory.copies_left.store(copies, Ordering::Relaxed);
        let stopped = if absent { Work::Waiting } else { Work::Stalled };
        let mut work = bench.driver.notify(0);
        if work == stopped {
            // It may be complete already: the look for a next one can be what failed.
            assert_eq!(bench.driver.used_index(0) == 1, bench.driver.high());
            assert_eq!(bench.driver.load(STATUS), 15);
            assert_eq!(bench.driver.device.run(), stopped, "nothing has changed");
            bench.driver.memory.copies_left.store(-1, Ordering::Relaxed);
            work = bench.driver.device.run();
        }
        assert_eq!(work, Work::Idle, "after {copies} copies");
        assert_eq!((bench.driver.used(0), bench.driver.used(0)), (Some((0, 1)), None));
        assert_eq!((bench.status(), bench.driver.high()), (OK, true));
        assert_eq!(bench.disk.content(100, bytes), text);
    }
}

#[test]
fn a_disk_without_memory_delays_a_request_too() {
    let mut bench = Bench::new(RamDisk::new(64));
    *bench.disk.fault.lock().unwrap() = Some(DiskError::OutOfMemory);
    let chain = bench.prepare(OUT, 0, 512);
    bench.driver.chain(0, 0, &chain);
    bench.driver.make_available(0, 0);
    assert_eq!(bench.driver.notify(0), Work::Stalled);
    assert_eq!((bench.driver.used(0), bench.status()), (None, 0xee));
    *bench.disk.fault.lock().unwrap() = None;
    assert_eq!(bench.driver.device.run(), Work::Idle);
    assert_eq!((bench.driver.used(0), bench.status()), (Some((0, 1)), OK));
}

#[test]
fn a_request_without_room_for_its_status_breaks_the_device() {
    for chain in [
        vec![(HEADER, 16, false)],
        vec![(HEADER, 15, false), (STATUS_BYTE, 1, true)],
        vec![(STATUS_BYTE, 1, true)],
        vec![(HEADER, 0, false)],
    ] {
        let mut bench = Bench::new(RamDisk::new(64));
        bench.driver.submit(0, &chain);
        assert_eq!(bench.driver.device.broken(), Some(Broken::Request), "{chain:?}");
        assert_eq!(bench.driver.load(STATUS), 15 | NEEDS_RESET);
        assert_eq!(bench.driver.take_interrupt(), 2, "a change of configuration tells the driver");
        bench.driver.bring_up(0, 16);
        assert_eq!(bench.request(IN, 0, 512), OK, "a reset mends it");
    }
}

#[test]
fn a_bad_page_fails_the_request_that_has_its_data_there_and_no_other() {
    for kind in [IN, OUT] {
        let mut bench = Bench::new(RamDisk::new(64));
        let before = bench.disk.content(0, 64 * 512);
        bench.driver.memory.poisoned.store(DATA + 0x1000, Ordering::Relaxed);
        assert_eq!(bench.request(kind, 0, 16 * 512), IOERR, "the second page of the data");
        assert_eq!(bench.request(kind, 0, 8 * 512), OK, "the first alone");
        assert_eq!(bench.disk.content(8, 56 * 512), before[8 * 512..]);
        assert_eq!(bench.driver.load(STATUS) & NEEDS_RESET, 0);
        // Where the request itself lies there is nobody to tell it to.
        bench.driver.memory.poisoned.store(HEADER & !0xfff, Ordering::Relaxed);
        let chain = bench.prepare(kind, 0, 512);
        bench.driver.submit(0, &chain);
        assert_eq!(bench.driver.used(0), None);
        assert_ne!(bench.driver.load(STATUS) & NEEDS_RESET, 0);
    }
}

#[test]
fn data_outside_memory_breaks_the_device() {
    for (gpa, kind) in [(0, IN), (RAM + RAM_BYTES - 256, OUT), (RAM + RAM_BYTES - 4096, IN), (1 << 63, OUT)] {
        let mut bench = Bench::new(RamDisk::new(64));
        let mut chain = bench.prepare(kind, 0, 512);
        chain[1].0 = gpa;
        bench.driver.submit(0, &chain);
        assert!(matches!(bench.driver.device.broken(), Some(Broken::Memory(_))), "{gpa:#x}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However a driver cuts a request, the device sees the same one (virtio 2.7.4.1).
    #[test]
    fn segments_do_not_matter(
        write: bool,
        sector in 0u64..40,
        sectors in 1u32..24,
        cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 0..20),
    ) {
        let mut bench = Bench::new(RamDisk::new(64));
        let bytes = sectors * 512;
        let text: Vec<u8> = (0..bytes).map(|n| (n * 11 % 249) as u8).collect();
        bench.driver.memory.poke(DATA, &text);
        let mut chain = bench.prepare(if write { OUT } else { IN }, sector, bytes);
        for (at, empty) in cuts {
            let at = at.index(chain.len());
            let (gpa, len, writable) = chain[at];
            let first = if empty { 0 } else { len / 3 };
            chain[at] = (gpa, first, writable);
            chain.insert(at + 1, (gpa + u64::from(first), len - first, writable));
        }
        let before = bench.disk.content(sector, bytes as usize);
        bench.driver.submit(0, &chain);
        prop_assert!(bench.driver.used(0).is_some());
        prop_assert_eq!(bench.status(), OK);
        let expected = if write { text } else { before };
        prop_assert_eq!(bench.disk.content(sector, bytes as usize), expected.clone());
        prop_assert_eq!(bench.data(bytes as usize), expected);
    }
}
