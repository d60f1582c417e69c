//! Touches its memory bit by bit, keeps a pattern in it, and reads it all back: for machines that have too little.
//!
//! Command line: `mib=N` touches N MiB (all free memory if absent); `seed=N` changes the pattern; `tags` gives its granules tags by a
//! pattern too, with the MMU on; `hold` keeps what was touched and verifies it again and again until the guest is killed; `churn` does
//! so and gives about every fourth page a new pattern each time; `zero` looks at every word of it first, which must be zero, and with `tags`
//! at every tag: `CLEAN n MiB`, else `FAILED`; `whole` takes the device tree's place too. Prints `TOUCHED n MiB` for every 4 MiB, then
//! `VERIFIED n MiB`; a word, or a granule, that is not what was written is `LOST`.

#![no_std]
#![no_main]

mod work;

use guest_rt::machine::{Machine, RAM};
use guest_rt::memory::{load_tag, load64, store_tag, store64};
use guest_rt::mmu::{self, Kind, Space};
use guest_rt::{guest, println};
use work::{PAGE, Tags};

guest!(main);

/// Room for stage-1 tables.
const TABLES: u64 = 64 * PAGE;

fn main(machine: &Machine) {
    let free = if machine.argument("whole").is_some() { machine.behind_image() } else { machine.free() };
    if machine.argument("tags").is_some() {
        let start = see_tags(machine, free.start);
        work::run(machine, start..free.end, Some(Tags { load: load_tag, store: store_tag }));
    } else {
        work::run(machine, free, None);
    }
}

/// Turns the MMU on, with all memory tagged; where memory is free behind the tables.
fn see_tags(machine: &Machine, free: u64) -> u64 {
    let tables = free.next_multiple_of(PAGE);
    let mut space = Space::new(tables..tables + TABLES);
    space.map(0x0800_0000, 0x0800_0000, 64 << 20, Kind::Device, true);
    space.map(RAM, RAM, machine.memory, Kind::Tagged, true);
    mmu::enable(&space);
    mmu::enable_tags();
    tables + TABLES
}
