//! A virtio disk's rings where they should not be: across pages, in nothing, in devices, in read-only memory, in pages that the
//! device may not see; and where they should be, while the pages change under them.
//!
//! Whatever is wrong, the device asks for a reset and works after it. Runs on a machine with private memory, a disk whose first
//! sector is of one byte, an empty ROM, and the hypervisor's services. Command line: `byte=N` says which; `rom=ADDRESS`;
//! `window=ADDRESS` where devices reach nothing else but pages from there on. It prints `RINGS idle` in the end, with the device
//! reset, and waits to be killed.

#![no_std]
#![no_main]

mod disk;

use core::fmt;

use disk::{Answer, Disk, Places};
use guest_rt::machine::{GICD, Machine, RAM, UART, VIRTIO};
use guest_rt::mmu::{self, Kind, Space};
use guest_rt::report::Report;
use guest_rt::smccc::call;
use guest_rt::{guest, println, timer};

guest!(main);

const PAGE: u64 = 4096;
/// Room for stage-1 tables.
const TABLES: u64 = 64 * PAGE;
/// The hypervisor's services: shares or takes back, and gives back.
const CONVERT: u64 = 0xc600_000a;
const DISCARD: u64 = 0xc600_000b;
/// Neither memory nor a device.
const NOWHERE: u64 = 0x3000_0000;
/// The page for records of stolen time, which is memory.
const RECORDS: u64 = 0x090a_0000;
/// How often pages change under rings that work.
const ROUNDS: u64 = 40;

/// Something that a device answered, and should not have.
struct Unexpected {
    at: Places,
    answer: Answer,
}

impl fmt::Display for Unexpected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rings at {:x?}: {:?}", self.at, self.answer)
    }
}

/// The disk, and where its rings may be.
struct Bench {
    disk: Disk,
    /// Pages that the device reaches.
    pages: u64,
    /// Pages that only this program reaches, if there are such.
    private: u64,
    bounces: bool,
}

fn main(machine: &Machine) {
    let mut report = Report::default();
    let free = machine.free().start.next_multiple_of(PAGE);
    let mut space = Space::new(free..free + TABLES);
    space.map(0x0800_0000, 0x0800_0000, 64 << 20, Kind::Device, true);
    space.map(RAM, RAM, machine.memory, Kind::Cacheable, true);
    mmu::enable(&space);
    let private = free + TABLES;
    let window = machine.number("window");
    let pages = window.unwrap_or(private + 64 * PAGE);
    let byte = machine.number("byte").unwrap_or(0) as u8;
    let Some(disk) = Disk::find(byte, pages, machine.end()) else {
        println!("FAILED: there is no disk");
        return;
    };
    let mut bench = Bench { disk, pages: pages + PAGE, private, bounces: window.is_some() };
    report.check("rings in one page work", bench.serves(bench.side_by_side(), 3));
    report.check("rings across pages work", bench.serves(bench.across(), 3 * disk::SIZE));
    report.check("rings that are misaligned, or wrap, are refused", bench.refused_at_once());
    report.check("rings where no memory is need a reset", bench.without_memory(machine.end()));
    if let Some(rom) = machine.number("rom") {
        report.check("rings in read-only memory need a reset, or say nothing", bench.read_only(rom));
    }
    report.check("rings in private pages are as the owner says", bench.in_private_pages());
    report.check("rings are converted under the device", bench.converted());
    report.check("rings are given back under the device", bench.given_back());
    report.check("rings that move are found", bench.moved());
    report.check("rings in one page work again", bench.serves(bench.side_by_side(), 3));
    bench.disk.reset();
    report.end();
    println!("RINGS idle");
    loop {
        timer::wait_for_interrupt();
    }
}

impl Bench {
    fn page(&self, index: u64) -> u64 {
        self.pages + index * PAGE
    }

    /// All three in one page.
    fn side_by_side(&self) -> Places {
        [self.page(0), self.page(0) + 0x400, self.page(0) + 0x800]
    }

    /// Each across the end of a page, one element of the used ring, too.
    fn across(&self) -> Places {
        [self.page(2) - 0x80, self.page(4) - 0x14, self.page(6) - 0x48]
    }

    /// The usual rings but for one, which is at `place`.
    fn with(&self, area: usize, place: u64) -> Places {
        let mut places = self.side_by_side();
        places[area] = place;
        places
    }

    fn expect(&self, at: Places, expected: Answer, answer: Answer) -> Result<(), Unexpected> {
        if answer == expected { Ok(()) } else { Err(Unexpected { at, answer }) }
    }

    /// The device works there.
    fn serves(&mut self, places: Places, times: u64) -> Result<(), Unexpected> {
        if !self.disk.begin(places) {
            return Err(Unexpected { at: places, answer: Answer::NeedsReset });
        }
        (0..times).try_for_each(|_| {
            let answer = self.disk.ask();
            self.expect(places, Answer::Served, answer)
        })
    }

    /// The device is started there, and answers so.
    fn answers(&mut self, places: Places, expected: Answer) -> Result<(), Unexpected> {
        let answer = if self.disk.begin(places) { self.disk.ask() } else { Answer::NeedsReset };
        self.expect(places, expected, answer)
    }

    fn refused_at_once(&mut self) -> Result<(), Unexpected> {
        for (area, shift, last) in [(0, 8, !0xf), (1, 1, !1), (2, 2, !3)] {
            for place in [self.side_by_side()[area] + shift, last] {
                let places = self.with(area, place);
                if self.disk.begin(places) {
                    return Err(Unexpected { at: places, answer: Answer::Served });
                }
            }
        }
        Ok(())
    }

    fn without_memory(&mut self, end: u64) -> Result<(), Unexpected> {
        for area in 0..3 {
            for place in [NOWHERE, GICD, UART, VIRTIO.0, VIRTIO.0 + 0x1000, end, 1 << 40, u64::MAX << 16] {
                self.answers(self.with(area, place), Answer::NeedsReset)?;
            }
        }
        // The third descriptor, the first entry, and a half of the first element are behind the end.
        for (area, before) in [(0, 32), (1, 4), (2, 8)] {
            self.answers(self.with(area, end - before), Answer::NeedsReset)?;
        }
        Ok(())
    }

    fn read_only(&mut self, rom: u64) -> Result<(), Unexpected> {
        // An empty table has nothing that a disk could answer to; an empty ring asks for nothing.
        self.answers(self.with(0, rom), Answer::NeedsReset)?;
        self.answers(self.with(1, rom), Answer::Nothing)?;
        self.answers(self.with(2, rom), Answer::NeedsReset)
    }

    fn in_private_pages(&mut self) -> Result<(), Unexpected> {
        let expected = if self.bounces { Answer::NeedsReset } else { Answer::Served };
        (0..3).try_for_each(|area| self.answers(self.with(area, self.private), expected))?;
        // A page of its own, in which this program has nothing: only what the device says of it.
        if self.bounces { self.answers(self.with(2, RECORDS), Answer::NeedsReset) } else { Ok(()) }
    }

    /// Takes the rings' page away from the devices, and gives it back, in turns.
    fn converted(&mut self) -> Result<(), Unexpected> {
        let places = self.side_by_side();
        self.serves(places, 1)?;
        for round in 0..ROUNDS {
            let shared = round % 2 == u64::from(self.bounces);
            self.service([CONVERT, self.page(0), PAGE, shared.into()], places)?;
            let answer = self.disk.ask();
            if shared || !self.bounces {
                self.expect(places, Answer::Served, answer)?;
            } else {
                self.expect(places, Answer::NeedsReset, answer)?;
                self.service([CONVERT, self.page(0), PAGE, 1], places)?;
                self.serves(places, 1)?;
            }
        }
        Ok(())
    }

    /// Gives the page that all rings are in back; the next request writes to a fresh one.
    fn given_back(&mut self) -> Result<(), Unexpected> {
        let places = self.side_by_side();
        self.serves(places, 1)?;
        for _ in 0..ROUNDS {
            self.service([DISCARD, self.page(0), PAGE, 0], places)?;
            let answer = self.disk.ask();
            self.expect(places, Answer::Served, answer)?;
        }
        Ok(())
    }

    fn moved(&mut self) -> Result<(), Unexpected> {
        self.serves(self.side_by_side(), 1)?;
        for round in 0..ROUNDS {
            let places = [self.page(round % 8), self.page(round % 5) + 0x400, self.page(round % 3) + 0x800];
            self.disk.move_queue(places);
            for _ in 0..3 {
                let answer = self.disk.ask();
                self.expect(places, Answer::Served, answer)?;
            }
        }
        Ok(())
    }

    /// Calls until it is done.
    fn service(&self, arguments: [u64; 4], at: Places) -> Result<(), Unexpected> {
        loop {
            match call(arguments) {
                0 => core::hint::spin_loop(),
                PAGE => return Ok(()),
                _ => return Err(Unexpected { at, answer: Answer::Wrong }),
            }
        }
    }
}
