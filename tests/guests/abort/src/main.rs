//! Addresses outside every slot: a fetch is a synchronous external abort at that address; a load or store that no device
//! claims follows the owner's policy.
//!
//! Command line: `policy=abort` (the default): loads and stores abort too; `policy=zero`: loads give zero, stores do
//! nothing. Fetches abort under both.

#![no_std]
#![no_main]

use core::fmt;

use guest_rt::machine::Machine;
use guest_rt::report::Report;
use guest_rt::trap::{Fault, class, probe, status};
use guest_rt::{guest, memory};

guest!(main);

/// Below memory between devices, where `virt` has PCI windows only on the bare machine, above any memory.
const HOLES: [u64; 5] = [0x0c10_0000, 0x0b00_0000, 0x0a10_0000, 0x30_0000_0000, 0x7f_ffff_f000];

enum Wrong {
    Faulted(Fault),
    DidNotFault(u64),
    Value { expected: u64, found: u64 },
    Kind { expected: u64, fault: Fault },
    Place { expected: u64, fault: Fault },
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Faulted(fault) => write!(f, "no exception was expected: {fault}"),
            Self::DidNotFault(value) => write!(f, "an abort was expected, X0 is {value:#x}"),
            Self::Value { expected, found } => write!(f, "expected {expected:#x}, found {found:#x}"),
            Self::Kind { expected, fault } => {
                write!(f, "expected class {expected:#x} with an external abort: {fault}")
            }
            Self::Place { expected, fault } => write!(f, "expected the address {expected:#x}: {fault}"),
        }
    }
}

fn main(machine: &Machine) {
    let mut report = Report::default();
    let zero = machine.argument("policy") == Some("zero");
    for hole in HOLES.into_iter().chain([machine.end()]) {
        report.check("fetch", external(probe::call(hole), class::INSTRUCTION_ABORT, hole, Some(hole)));
        for (name, result) in loads(hole) {
            report.check(name, if zero { is(result, 0) } else { external(result, class::DATA_ABORT, hole, None) });
        }
        for (name, result) in stores(hole) {
            let done = |result: Result<u64, Fault>| result.map(drop).map_err(Wrong::Faulted);
            report.check(name, if zero { done(result) } else { external(result, class::DATA_ABORT, hole, None) });
        }
    }
    report.check("memory before the hole", last_page(machine));
    report.end();
}

fn loads(hole: u64) -> [(&'static str, Result<u64, Fault>); 5] {
    [
        ("load 8", probe::load8(hole, 0)),
        ("load 16", probe::load16(hole, 0)),
        ("load 32", probe::load32(hole, 0)),
        ("load 64", probe::load64(hole, 0)),
        ("load 32 signed", probe::load_signed32(hole, 0)),
    ]
}

fn stores(hole: u64) -> [(&'static str, Result<u64, Fault>); 4] {
    [
        ("store 8", probe::store8(hole, u64::MAX)),
        ("store 16", probe::store16(hole, u64::MAX)),
        ("store 32", probe::store32(hole, u64::MAX)),
        ("store 64", probe::store64(hole, u64::MAX)),
    ]
}

/// The last page of memory is memory to its last byte.
fn last_page(machine: &Machine) -> Result<(), Wrong> {
    let last = machine.end() - 8;
    memory::store64(last, 0x1234_5678_9abc_def0);
    is(Ok(memory::load64(last)), 0x1234_5678_9abc_def0)
}

fn is(result: Result<u64, Fault>, expected: u64) -> Result<(), Wrong> {
    match result {
        Ok(found) if found == expected => Ok(()),
        Ok(found) => Err(Wrong::Value { expected, found }),
        Err(fault) => Err(Wrong::Faulted(fault)),
    }
}

/// An external abort of this class with this FAR_EL1, and this ELR_EL1 if one is given.
fn external(result: Result<u64, Fault>, expected: u64, far: u64, elr: Option<u64>) -> Result<(), Wrong> {
    let fault = match result {
        Ok(value) => return Err(Wrong::DidNotFault(value)),
        Err(fault) => fault,
    };
    if fault.serror != 0 || fault.class() != expected || fault.status() != status::EXTERNAL {
        return Err(Wrong::Kind { expected, fault });
    }
    if fault.far != far || elr.is_some_and(|elr| fault.elr != elr) {
        return Err(Wrong::Place { expected: far, fault });
    }
    Ok(())
}
