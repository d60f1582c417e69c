//! Shares pages of its private memory with the hypervisor, others when it is told, and knows what each holds.
//!
//! Every second page of its region is shared at first, and the page with the records of stolen time. It obeys letters on its console:
//! `t` touches the page with the records, `n` takes pages back and shares others, `v` looks at every word. Prints `SHARED n` for n
//! pages, `TOUCHED`, and `SAME n` or `LOST n` for n pages or words.

#![no_std]
#![no_main]

use core::ops::Range;

use guest_rt::machine::{Machine, RAM};
use guest_rt::memory::{load64, store64};
use guest_rt::mmu::{self, Kind, Space};
use guest_rt::smccc::call;
use guest_rt::{console, guest, println};

guest!(main);

const PAGE: u64 = 4096;
/// Pages of the region.
const PAGES: u64 = 64;
/// Room for stage-1 tables.
const TABLES: u64 = 16 * PAGE;
/// The hypervisor's service: shares or takes back.
const CONVERT: u64 = 0xc600_000a;
/// The page with the records of stolen time.
const RECORDS: u64 = 0x090a_0000;

fn main(machine: &Machine) {
    let free = machine.free().start.next_multiple_of(PAGE);
    let mut space = Space::new(free..free + TABLES);
    space.map(0x0800_0000, 0x0800_0000, 64 << 20, Kind::Device, true);
    space.map(RAM, RAM, machine.memory, Kind::Cacheable, true);
    mmu::enable(&space);
    let region = Region(free + TABLES);
    region.words(0..PAGES).for_each(|address| store64(address, word(address)));
    let odd = |pages: Range<u64>| pages.skip(1).step_by(2);
    region.convert(odd(0..PAGES), true);
    convert(RECORDS, true);
    load64(RECORDS);
    println!("SHARED {}", PAGES / 2 + 1);
    loop {
        match console::read() {
            b't' => {
                load64(RECORDS);
                println!("TOUCHED");
            }
            b'n' => {
                region.convert(odd(0..PAGES / 2), false);
                region.convert((PAGES / 2..PAGES * 3 / 4).step_by(2), true);
                convert(RECORDS, false);
                println!("SHARED {}", PAGES / 4 + PAGES / 8);
            }
            b'v' => {
                let lost = region.words(0..PAGES).filter(|address| load64(*address) != word(*address)).count();
                if lost == 0 { println!("SAME {PAGES}") } else { println!("LOST {lost}") }
            }
            _ => {}
        }
    }
}

/// What the word at an address is.
fn word(address: u64) -> u64 {
    address.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

fn convert(page: u64, shared: bool) {
    loop {
        match call([CONVERT, page, PAGE, shared.into()]) {
            PAGE => return,
            0 => core::hint::spin_loop(),
            answer => return println!("FAILED: page {page:#x} is not converted: {}", answer as i64),
        }
    }
}

/// Pages from an address on.
struct Region(u64);

impl Region {
    fn words(&self, pages: Range<u64>) -> impl Iterator<Item = u64> {
        (self.0 + pages.start * PAGE..self.0 + pages.end * PAGE).step_by(8)
    }

    fn convert(&self, pages: impl Iterator<Item = u64>, shared: bool) {
        pages.for_each(|page| convert(self.0 + page * PAGE, shared));
    }
}
