//! Every form of load and store on devices: right values, sizes, signs, byte order, writeback, and each side effect once.
//!
//! What is expected is what the architecture says; the same program passes on the bare machine, where QEMU executes it all,
//! but for what a hypervisor decides: `policy=abort` says that nothing answers outside devices with an abort that cancels
//! everything, `no-syndrome=inject` that exclusives and atomics on a device take one, `cmo=trap` that cache
//! maintenance takes the faults that it should, `posted` that stores are to be taken by the owner ([`posted`]).
//!
//! The line `once: ` must come with its letters in order and each once: the harness compares it.

#![no_std]
#![no_main]

mod bench;
mod cases;
mod edges;
mod maintenance;
mod posted;
mod run;

use guest_rt::machine::{Machine, RAM, UART};
use guest_rt::mmu::{self, Kind, Space};
use guest_rt::report::Report;
use guest_rt::trap::{class, status};
use guest_rt::{guest, println};

use cases::{Case, Wrong};
use run::{Code, Registers, run};

guest!(main);

/// Where devices are mapped as Normal Non-cacheable memory, above their addresses.
pub const ALIAS: u64 = 0x20_0000_0000;

fn main(machine: &Machine) {
    let mut report = Report::default();
    run::enable_simd();
    bench::prepare();
    every(&mut report, 0);
    for case in cases::UNPRIVILEGED {
        report.check(case.name(), case.check(0, false));
    }
    for case in cases::BIG_ENDIAN {
        report.check(case.name(), case.check(0, true));
    }
    once(0);
    let aborts = machine.argument("policy") == Some("abort");
    if aborts {
        nothing(&mut report);
    }
    if machine.argument("no-syndrome") == Some("inject") {
        refused(&mut report);
    }

    if machine.argument("posted").is_some() {
        posted::all(&mut report, aborts);
        return report.end();
    }

    let free = machine.free();
    let (tables, page) = (free.start..free.start + (256 << 10), free.start + (256 << 10));
    let mut space = Space::new(tables);
    let [devices, size] = edges::MAPPED;
    space.map(devices, devices, size, Kind::Device, true);
    space.map(RAM, RAM, machine.memory, Kind::Cacheable, true);
    space.map(ALIAS + devices, devices, size, Kind::NonCacheable, true);
    mmu::enable(&space);
    every(&mut report, 0);
    every(&mut report, ALIAS);
    edges::all(&mut report, &mut space, page, aborts);
    maintenance::all(&mut report, &mut space, page + 0x1000, machine.argument("cmo") == Some("trap"));
    once(ALIAS);
    report.end();
}

fn every(report: &mut Report, alias: u64) {
    for case in [cases::DESCRIBED, cases::PAIRS, cases::SINGLES, cases::VECTORS].into_iter().flatten() {
        report.check(Case::name(case), case.check(alias, false));
    }
}

/// Letters through the serial port's data register, one for each instruction. Other halves fall on the register behind it,
/// which takes any store to clear errors (DDI 0183 3.3.2).
fn once(alias: u64) {
    let port = UART + alias;
    let forms: [(Code, i64); 6] = [
        (code!("str w0, [x9], #4"), 0),
        (code!("strb w0, [x9, #4]!"), -4),
        (code!("stp w0, wzr, [x9]"), 0),
        (code!("stp w0, wzr, [x9, #-8]!"), 8),
        (code!("str s0, [x9], #-4"), 0),
        (code!("stp s0, s1, [x9, #16]!"), -16),
    ];
    println!("once: (");
    for (letter, (code, offset)) in (b'a'..).zip(forms) {
        let mut before = cases::registers(port.wrapping_add_signed(offset), 0);
        (before.x[0], before.v[0], before.v[1]) = (letter.into(), [letter.into(), 0], [0, 0]);
        let after = run(code, &before, false);
        assert_eq!(after.taken, 0, "a letter was refused: {after:x?}");
    }
    println!(") letters");
}

/// Accesses where nothing answers: an abort at the address, and neither registers nor base change.
fn nothing(report: &mut Report) {
    const HOLE: u64 = 0x0c10_0000;
    for (name, code, far) in [
        ("nothing: ldr post", code!("ldr x0, [x9], #8"), HOLE),
        ("nothing: ldr pre", code!("ldr x0, [x9, #8]!"), HOLE + 8),
        ("nothing: ldp", code!("ldp x0, x1, [x9, #16]!"), HOLE + 16),
        ("nothing: ldr q0", code!("ldr q0, [x9], #16"), HOLE),
        ("nothing: str post", code!("str x0, [x9], #8"), HOLE),
        ("nothing: stp", code!("stp w0, w1, [x9, #-8]!"), HOLE - 8),
        ("nothing: stp q0", code!("stp q0, q1, [x9], #32"), HOLE),
    ] {
        report.check(name, external(run(code, &cases::registers(HOLE, 0), false), HOLE, far));
    }
}

/// What no device answers, whoever is there.
fn refused(report: &mut Report) {
    let at = bench::ROUTERS;
    for (name, code) in [
        ("refused: ldxr", code!("ldxr x0, [x9]")),
        ("refused: stxr", code!("stlxr w0, x1, [x9]")),
        ("refused: ldxp", code!("ldaxp x0, x1, [x9]")),
        ("refused: ldadd", code!("ldadd x0, x1, [x9]")),
        ("refused: swp", code!("swpal x0, x1, [x9]")),
        ("refused: cas", code!("cas x0, x1, [x9]")),
        ("refused: ld1", code!("ld1 {{v0.2d}}, [x9], #16")),
    ] {
        bench::set(&bench::BEFORE);
        let after = run(code, &cases::registers(at, 0), false);
        // A store-exclusive without a monitor does not reach memory: it fails, and says so.
        let failed = after.taken == 0 && name.ends_with("stxr") && after.x[0] == 1;
        let right = if failed { Ok(()) } else { external(after, at, at) };
        report.check(name, right);
        assert!(bench::get() == bench::BEFORE, "{name} changed a device");
    }
}

/// An external abort at `far` that left every register alone.
fn external(after: Registers, base: u64, far: u64) -> Result<(), Wrong> {
    let untouched = Registers { taken: after.taken, esr: after.esr, far: after.far, ..cases::registers(base, 0) };
    let abort = after.taken == 5 && after.esr >> 26 == class::DATA_ABORT && after.esr & 0x3f == status::EXTERNAL;
    if abort && after.far == far && after == untouched { Ok(()) } else { Err(Wrong::taken(&after)) }
}
