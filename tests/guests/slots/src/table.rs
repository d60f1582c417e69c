//! Cache maintenance that traps, on every kind of target, and the other accesses to read-only memory: what the specification's
//! table says, with the MMU off and on.

use core::fmt;

use guest_rt::machine::{Machine, RAM};
use guest_rt::memory::{load32, load64, publish_code, store32, store64};
use guest_rt::mmu::{self, Kind, Space};
use guest_rt::report::Report;
use guest_rt::trap::{Fault, class, probe, status};

use crate::windows::{FIRST_ALIAS, PAGE, Window};

/// Where the windows are: writable, read-only.
const WRITABLE: u64 = 0x10_0000_0000;
const READ_ONLY: u64 = 0x10_0020_0000;
/// Pages of each.
const PAGES: u64 = 16;
/// Nothing is there.
const NOTHING: u64 = 0x0c20_0000;
const PATTERN: u64 = 0x1bad_cafe_5a5a_0ff1;
/// ESR_EL1: cache maintenance, and the write that it is reported as.
const MAINTENANCE: u64 = 1 << 8 | 1 << 6;

type Probe = fn(u64, u64) -> Result<u64, Fault>;

/// Those that name an address.
const OPERATIONS: [(&str, Probe); 6] = [
    ("dc ivac", probe::invalidate),
    ("dc cvac", probe::clean),
    ("dc cvau", probe::clean_to_unification),
    ("dc cvap", probe::clean_to_persistence),
    ("dc civac", probe::clean_invalidate),
    ("ic ivau", probe::invalidate_instructions),
];

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Happened {
    Done,
    Abort,
    Else(Fault),
}

impl fmt::Display for Happened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Abort => f.write_str("external abort"),
            Self::Else(fault) => write!(f, "{fault}"),
        }
    }
}

/// What an access at `address` came to; `maintenance` is what its abort has to say.
fn outcome(result: Result<u64, Fault>, address: u64, maintenance: bool) -> Happened {
    match result {
        Ok(_) => Happened::Done,
        Err(fault) => {
            let kind = fault.class() == class::DATA_ABORT && fault.status() == status::EXTERNAL && fault.serror == 0;
            let says = !maintenance || fault.esr & MAINTENANCE == MAINTENANCE;
            if kind && says && fault.far == address { Happened::Abort } else { Happened::Else(fault) }
        }
    }
}

/// A name of three parts, as a line of the report.
struct Cell<'a>(&'a str, &'a str, Happened);

/// The line of a cell, in a buffer of its own.
struct Line {
    text: [u8; 96],
    length: usize,
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.length + text.len();
        self.text.get_mut(self.length..end).ok_or(fmt::Error)?.copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}

fn check(report: &mut Report, cell: &Cell<'_>, expected: Happened) {
    let mut line = Line { text: [0; 96], length: 0 };
    fmt::write(&mut line, format_args!("{} on {}: {}", cell.0, cell.1, expected)).expect("a short line");
    let name = core::str::from_utf8(&line.text[..line.length]).unwrap_or_default();
    report.check(name, if cell.2 == expected { Ok(()) } else { Err(cell.2) });
}

/// All of it.
pub fn all(report: &mut Report, machine: &Machine) {
    let free = machine.free();
    let (tables, memory) = (free.start..free.start + (256 << 10), free.start + (1 << 20));
    let first = (memory - RAM) / PAGE;
    let writable = Window { number: FIRST_ALIAS, base: WRITABLE, pages: PAGES, first, read_only: false };
    let read_only = Window { number: FIRST_ALIAS + 1, base: READ_ONLY, read_only: true, ..writable };
    rules(report, &writable);
    assert!(writable.set() && read_only.set(), "this machine makes no slots for its guest");
    let device = machine.number("device");
    if let Some(device) = device {
        registers(report, device);
    }
    let aborts = machine.argument("ivac") != Some("clean");
    let each = |report: &mut Report| {
        for operation in OPERATIONS {
            maintain(report, operation, &writable, &read_only, memory, aborts);
            elsewhere(report, operation, device);
        }
        read_only_memory(report, &read_only, memory);
    };
    each(report);
    let mut space = Space::new(tables);
    space.map(RAM, RAM, machine.memory, Kind::Cacheable, true);
    space.map(0x0800_0000, 0x0800_0000, 64 << 20, Kind::Device, true);
    space.map(0x0c00_0000, 0x0c00_0000, 32 << 20, Kind::Device, true);
    for window in [&writable, &read_only] {
        space.map(window.base, window.base, PAGES * PAGE, Kind::Cacheable, true);
    }
    mmu::enable(&space);
    each(report);
    moves(report, writable, memory);
}

/// An operation on the windows, mapped and not: what it did, and that it lost nothing.
fn maintain(
    report: &mut Report,
    (name, operation): (&str, Probe),
    writable: &Window,
    read_only: &Window,
    memory: u64,
    aborts: bool,
) {
    let refused = if aborts && name == "dc ivac" { Happened::Abort } else { Happened::Done };
    for (what, window, mapped, expected) in [
        ("RW memory that is not mapped", writable, false, Happened::Done),
        ("RW memory that is mapped", writable, true, Happened::Done),
        ("RO memory that is not mapped", read_only, false, refused),
        ("RO memory that is mapped", read_only, true, refused),
    ] {
        store64(memory + 8, PATTERN);
        window.zap();
        if mapped {
            assert_eq!(load64(window.base + 8), PATTERN);
        }
        let happened = outcome(operation(window.base + 8, 0), window.base + 8, true);
        check(report, &Cell(name, what, happened), expected);
        let kept = load64(window.base + 8) == PATTERN && load64(memory + 8) == PATTERN;
        report.check("what is there stays", if kept { Ok(()) } else { Err("it is lost") });
    }
}

/// The device behind a slot is the machine's own: an entropy device in the first transport (virtio 1.2, 4.2.2), which keeps its
/// status and forgets it at a reset. Nothing is executed from it.
fn registers(report: &mut Report, device: u64) {
    const ENTROPY: u32 = 4;
    let magic = [0, 4, 8].map(|offset| load32(device + offset));
    let right = magic == [0x7472_6976, 2, ENTROPY];
    report.check("the device is there", if right { Ok(()) } else { Err("it is another") });
    let status = device + 0x70;
    for value in [0, 1, 3, 0] {
        store32(status, value);
        let kept = load32(status) == value;
        report.check("its status is what was stored", if kept { Ok(()) } else { Err("it is not") });
    }
    let fetched = probe::call(device);
    let refused = matches!(fetched, Err(fault) if fault.class() == class::INSTRUCTION_ABORT);
    report.check("nothing is executed from a device", if refused { Ok(()) } else { Err("it was") });
}

/// An operation where no memory is.
fn elsewhere(report: &mut Report, (name, operation): (&str, Probe), device: Option<u64>) {
    check(report, &Cell(name, "nothing", outcome(operation(NOTHING, 0), NOTHING, true)), Happened::Done);
    if let Some(device) = device {
        let before = load32(device);
        check(report, &Cell(name, "a device's slot", outcome(operation(device, 0), device, true)), Happened::Done);
        let same = load32(device) == before;
        report.check("the device stays", if same { Ok(()) } else { Err("it has changed") });
    }
}

/// Loads and fetches go through a read-only slot; stores of every kind are accesses to no memory, and change nothing (INV-13).
fn read_only_memory(report: &mut Report, window: &Window, memory: u64) {
    store64(memory, PATTERN);
    // mov w0, #42; ret
    store32(memory + 64, 0x5280_0540);
    store32(memory + 68, 0xd65f_03c0);
    publish_code(memory + 64..memory + 72);
    let base = window.base;
    for mapped in [false, true] {
        window.zap();
        if !mapped {
            let right = probe::call(base + 64) == Ok(42);
            report.check("a fetch from RO memory", if right { Ok(()) } else { Err("not what is there") });
            window.zap();
        }
        let right = probe::load64(base, 0) == Ok(PATTERN);
        report.check("a load from RO memory", if right { Ok(()) } else { Err("not what is there") });
        for (name, store) in [
            ("str", probe::store64 as Probe),
            ("strb", probe::store8),
            ("stp", probe::store_pair),
            ("str post", probe::store_post),
            ("dc zva", probe::zero_block),
        ] {
            if !mapped {
                window.zap();
            }
            let happened = outcome(store(base, !PATTERN), base, false);
            check(report, &Cell(name, "RO memory", happened), Happened::Abort);
            let kept = load64(base) == PATTERN && load64(memory) == PATTERN;
            report.check("RO memory stays", if kept { Ok(()) } else { Err("it was written") });
        }
    }
}

/// Updates that break a rule are refused, and change nothing.
fn rules(report: &mut Report, window: &Window) {
    for (name, bad) in [
        ("the machine's own slot", Window { number: 0, ..*window }),
        ("a slot of its files", Window { number: FIRST_ALIAS - 1, ..*window }),
        ("a number that no slot has", Window { number: 0xffff, ..*window }),
        ("over the memory", Window { base: RAM, ..*window }),
        ("behind the memory's end", Window { first: 1 << 30, ..*window }),
        ("beyond the address space", Window { base: 1 << 45, ..*window }),
        ("not aligned", Window { base: window.base + 8, ..*window }),
    ] {
        report.check(name, if bad.set() { Err("it was accepted") } else { Ok(()) });
    }
    report.check("delete what is not there", if window.delete() { Err("it was accepted") } else { Ok(()) });
}

/// A window that moves is where it is, and nowhere else; deleted it is nowhere.
fn moves(report: &mut Report, window: Window, memory: u64) {
    store64(memory, PATTERN);
    assert_eq!(load64(window.base), PATTERN);
    // Still in what stage 1 maps as the read-only window: that one goes first.
    let gone = Window { number: FIRST_ALIAS + 1, base: READ_ONLY, ..window }.delete();
    let moved = Window { base: READ_ONLY, ..window };
    let there = gone && moved.set() && load64(moved.base) == PATTERN;
    report.check("a move shows it there", if there { Ok(()) } else { Err("it is not there") });
    let old = outcome(probe::load64(window.base, 0), window.base, false);
    check(report, &Cell("a load", "where a slot was", old), Happened::Abort);
    store64(moved.base + 16, 7);
    let kept = moved.delete() && load64(memory + 16) == 7;
    report.check("a store through it arrives", if kept { Ok(()) } else { Err("it did not") });
    let old = outcome(probe::store_pair(moved.base, 0), moved.base, false);
    check(report, &Cell("a store", "where a slot was", old), Happened::Abort);
}
