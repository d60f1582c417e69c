//! Memory that is replaced underneath: every byte is looked at through every kind of mapping before and after, and is
//! never an old one.
//!
//! A round writes all of the memory through one view (MMU off, Non-cacheable, Cacheable), does the maintenance that the
//! architecture asks for between views (Arm DDI 0487 B2.8), has what is behind the memory changed, and then reads every
//! byte through each view without any maintenance: the content is the same, so that is the hypervisor's business. Then it
//! writes every second page anew, which copies what is shared, and reads every byte through each view again.
//!
//! What changes the memory: `change=fork`, a live fork (a service of our hypervisor); `change=owner`, whatever the owner does
//! between the line `CHANGE n` and the byte that it types: a merge, a fork, a slot that shows the memory a second time, a
//! snapshot. After a fork the original and the copy both go on with their own numbers, and the copy ends with the round.
//! `change=owner` also waits for a byte before the stores, after the line `WRITE n`, and behind them, after `WROTE n`, so that
//! the owner can count what they cost. From round `windows=N` on, the owner shows the memory, from the address in the first
//! line on, a second time at [`WINDOW`] and that many GiB on, and it is read there too.
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
/// Where a slot of the owner's shows the memory a second time: so many GiB behind as the round's number says.
const WINDOW: u64 = 0x10_0000_0000;
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
    /// By the second slot of a round, MMU off.
    WindowOff(u64),
    /// By the second slot of a round, Cacheable.
    Window(u64),
}

const VIEWS: [View; 3] = [View::Off, View::NonCacheable, View::Cacheable];

impl View {
    /// What it adds to an address of the memory.
    fn base(self, memory: &Range<u64>) -> u64 {
        match self {
            Self::Off | Self::Cacheable => 0,
            Self::NonCacheable => NON_CACHEABLE,
            Self::WindowOff(round) | Self::Window(round) => window(round) - memory.start,
        }
    }

    fn is_off(self) -> bool {
        matches!(self, Self::Off | Self::WindowOff(_))
    }
}

fn window(round: u64) -> u64 {
    WINDOW + (round << 30)
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
    let rounds = machine.number("rounds").unwrap_or(6);
    let windows = machine.number("windows").unwrap_or(rounds);
    let size = memory.end - memory.start;
    (windows..rounds).for_each(|round| space.map(window(round), window(round), size, Kind::Cacheable, true));
    let forks = machine.argument("change") != Some("owner");
    println!("MEMORY {:#x} {:#x}", memory.start, size);
    let mut report = Report::default();
    for round in 0..rounds {
        let writer = VIEWS[round as usize % VIEWS.len()];
        let plan = Round { number: round, writer, forks, window: round >= windows };
        report.check("every byte", plan.run(&space, &memory));
    }
    report.end();
}

/// The end of a copy.
fn leave(result: &Result<(), impl fmt::Display>) -> ! {
    if let Err(why) = result {
        println!("FAIL in a copy: {why}");
        smccc::call([psci::SYSTEM_RESET, 0, 0, 0]);
    }
    println!("PASS in a copy");
    smccc::system_off()
}

struct Round {
    number: u64,
    writer: View,
    /// It forks itself; else the owner does something.
    forks: bool,
    /// A second slot is there once the owner has done it.
    window: bool,
}

impl Round {
    fn run(&self, space: &Space, memory: &Range<u64>) -> Result<(), Stale> {
        let (round, writer) = (self.number, self.writer);
        let before = |_| round * 4;
        write(space, memory, writer, before, 1);
        read(space, memory, writer, &VIEWS, before)?;
        let generation = load64(GENERATION);
        if self.forks {
            fork(round)
        } else {
            wait("CHANGE", round)
        }
        let copied = load64(GENERATION) != generation;
        let mine = round * 4 + 1 + u64::from(copied);
        let after = |page: u64| if page.is_multiple_of(2) { mine } else { round * 4 };
        let both = [View::Off, View::NonCacheable, View::Cacheable, View::WindowOff(round), View::Window(round)];
        let views = if self.window { &both[..] } else { &VIEWS };
        let result = read(space, memory, writer, views, before).and_then(|()| {
            if !self.forks {
                wait("WRITE", round);
            }
            write(space, memory, writer, after, 2);
            if !self.forks {
                wait("WROTE", round);
            }
            read(space, memory, writer, views, after)
        });
        if copied {
            leave(&result);
        }
        result
    }
}

fn pattern(address: u64, salt: u64) -> u64 {
    (address ^ salt << 52).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Does something with the MMU as the view wants it, and leaves it on.
fn through<T>(space: &Space, view: View, act: impl FnOnce() -> T) -> T {
    if view.is_off() {
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
            (page..page + PAGE).step_by(8).for_each(|at| store64(view.base(memory) + at, pattern(at, salt)));
        }
        memory::barrier();
    });
    through(space, View::Cacheable, maintain);
}

/// Reads every byte through each view.
fn read(
    space: &Space,
    memory: &Range<u64>,
    writer: View,
    views: &[View],
    salt: impl Fn(u64) -> u64,
) -> Result<(), Stale> {
    for &reader in views {
        let base = reader.base(memory);
        let whole = || {
            memory.clone().step_by(8).try_for_each(|at| {
                let expected = pattern(at, salt((at - memory.start) / PAGE));
                same(at, expected, load64(base + at))
            })
        };
        through(space, reader, whole).map_err(|differs| Stale { writer, reader, differs })?;
    }
    Ok(())
}

/// Forks this machine.
fn fork(name: u64) {
    assert_eq!(smccc::hvc([FORK, name, 0, 0]), 0, "this hypervisor does not fork");
    while smccc::hvc([FORK, u64::MAX, 0, 0]) != 0 {}
}

/// Says where it is, and waits until the owner types.
fn wait(what: &str, round: u64) {
    println!("{what} {round}");
    while memory::load32(UART + 0x18) & RXFE != 0 {
        core::hint::spin_loop();
    }
    memory::load32(UART);
}
