//! Memory that is replaced underneath: every byte is looked at through every kind of mapping before and after, and is
//! never an old one.
//!
//! A round writes all of the memory through one view (MMU off, Non-cacheable, Cacheable), does the maintenance that the
//! architecture asks for between views (Arm DDI 0487 B2.8), has what is behind the memory changed, and then reads every
//! byte through each view without any maintenance: the content is the same, so that is the hypervisor's business. Then it
//! writes every second page anew, which copies what is shared, and reads every byte through each view again.
//!
//! What changes the memory: `change=fork`, a live fork (a service of our hypervisor), after which the original and the copy
//! both go on with their own numbers, and the copy ends with the round; `change=owner`, whatever the owner does between
//! the line `CHANGE n` and the byte that it types: a merge, a page-out, a snapshot.
//!
//! A failure of a copy, whose console nobody may read, is a reset instead of a power-off. Arguments: `mib=N` of memory,
//! `rounds=N`.

#![no_std]
#![no_main]

use core::fmt;
use core::ops::Range;

use guest_rt::machine::{Machine, RAM, UART};
use guest_rt::memory::{self, clean_invalidate, each_line, load64, store64};
use guest_rt::mmu::{self, Kind, Space};
use guest_rt::report::{Differs, Report, same};
use guest_rt::smccc::psci;
use guest_rt::{guest, println, smccc};

guest!(main);

const PAGE: u64 = 0x1000;
/// Where memory is mapped Non-cacheable, besides its own addresses.
const NON_CACHEABLE: u64 = 0x20_0000_0000;
/// Our hypervisor's service: forks the caller, or tells whether that is done.
const FORK: u64 = 0xc600_0004;
/// The first half of the machine's generation.
const GENERATION: u64 = 0x090d_0000;
/// PL011 FR (Arm DDI 0183, 3.3): the receive FIFO is empty.
const RXFE: u32 = 1 << 4;

/// How memory is reached.
#[derive(Clone, Copy, Debug)]
enum View {
    Off,
    NonCacheable,
    Cacheable,
}

const VIEWS: [View; 3] = [View::Off, View::NonCacheable, View::Cacheable];

impl View {
    fn base(self) -> u64 {
        if let Self::NonCacheable = self { NON_CACHEABLE } else { 0 }
    }
}

/// What was wrong, and through which view.
struct Stale {
    writer: View,
    reader: View,
    differs: Differs<u64>,
}

impl fmt::Display for Stale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "written {:?}, read {:?}: {}", self.writer, self.reader, self.differs)
    }
}

fn main(machine: &Machine) {
    let mut free = machine.free();
    let tables = free.start..free.start + (256 << 10);
    // Pages of one block and of the next, and never the block that the tables are in.
    free.start += 2 << 20;
    let memory = free.start..free.start + (machine.number("mib").unwrap_or(4) << 20);
    assert!(memory.end <= free.end, "this machine has too little memory");
    let mut space = Space::new(tables);
    space.map(0x0800_0000, 0x0800_0000, 64 << 20, Kind::Device, true);
    space.map(RAM, RAM, machine.memory, Kind::Cacheable, true);
    space.map(NON_CACHEABLE + RAM, RAM, machine.memory, Kind::NonCacheable, true);
    let forks = machine.argument("change") != Some("owner");
    let mut report = Report::default();
    for round in 0..machine.number("rounds").unwrap_or(6) {
        let writer = VIEWS[round as usize % VIEWS.len()];
        report.check("every byte", a_round(&space, &memory, round, writer, forks));
    }
    report.end();
}

/// The end of a copy.
fn leave(result: &Result<(), impl fmt::Display>) -> ! {
    if let Err(why) = result {
        println!("FAIL in a copy: {why}");
        smccc::call([psci::SYSTEM_RESET, 0, 0, 0]);
    }
    smccc::system_off()
}

fn a_round(space: &Space, memory: &Range<u64>, round: u64, writer: View, forks: bool) -> Result<(), Stale> {
    let before = |_| round * 4;
    write(space, memory, writer, before, 1);
    read(space, memory, writer, before)?;
    let copied = if forks { fork(round) } else { owner(round) };
    let mine = round * 4 + 1 + u64::from(copied);
    let after = |page: u64| if page.is_multiple_of(2) { mine } else { round * 4 };
    let result = read(space, memory, writer, before).and_then(|()| {
        write(space, memory, writer, after, 2);
        read(space, memory, writer, after)
    });
    if copied {
        leave(&result);
    }
    result
}

fn pattern(address: u64, salt: u64) -> u64 {
    (address ^ salt << 52).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Does something with the MMU as the view wants it, and leaves it on.
fn through<T>(space: &Space, view: View, act: impl FnOnce() -> T) -> T {
    if let View::Off = view {
        mmu::disable();
        let result = act();
        mmu::enable(space);
        return result;
    }
    if !mmu::is_on() {
        mmu::enable(space);
    }
    act()
}

/// Writes every `step`th page. Before, no cache has a line of it that could be written back over it; after, what is in a
/// cache is in memory too, and no cache has an older line.
fn write(space: &Space, memory: &Range<u64>, view: View, salt: impl Fn(u64) -> u64, step: usize) {
    let pages = || memory.clone().step_by(PAGE as usize).step_by(step);
    let maintain = || pages().for_each(|page| each_line(page..page + PAGE, clean_invalidate));
    through(space, View::Cacheable, maintain);
    through(space, view, || {
        for page in pages() {
            let salt = salt((page - memory.start) / PAGE);
            (page..page + PAGE).step_by(8).for_each(|at| store64(view.base() + at, pattern(at, salt)));
        }
        memory::barrier();
    });
    through(space, View::Cacheable, maintain);
}

/// Reads every byte through each view.
fn read(space: &Space, memory: &Range<u64>, writer: View, salt: impl Fn(u64) -> u64) -> Result<(), Stale> {
    for reader in VIEWS {
        let whole = || {
            memory.clone().step_by(8).try_for_each(|at| {
                let expected = pattern(at, salt((at - memory.start) / PAGE));
                same(at, expected, load64(reader.base() + at))
            })
        };
        through(space, reader, whole).map_err(|differs| Stale { writer, reader, differs })?;
    }
    Ok(())
}

/// Forks this machine. True in the copy.
fn fork(name: u64) -> bool {
    let generation = load64(GENERATION);
    assert_eq!(smccc::hvc([FORK, name, 0, 0]), 0, "this hypervisor does not fork");
    while smccc::hvc([FORK, u64::MAX, 0, 0]) != 0 {}
    load64(GENERATION) != generation
}

/// Waits until the owner has changed what is behind the memory.
fn owner(round: u64) -> bool {
    println!("CHANGE {round}");
    while memory::load32(UART + 0x18) & RXFE != 0 {
        core::hint::spin_loop();
    }
    memory::load32(UART);
    false
}
