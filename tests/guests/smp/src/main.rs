//! CPUs on, off and on again: CPU_ON, CPU_OFF, AFFINITY_INFO, and memory that all of them see.
//!
//! Runs on as many CPUs as the device tree has, up to the runtime's limit.

#![no_std]
#![no_main]

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use guest_rt::entry::MAX_CPUS;
use guest_rt::machine::Machine;
use guest_rt::report::{Report, same};
use guest_rt::smccc::{call, psci};
use guest_rt::{guest, smp};

guest!(main);

/// AFFINITY_INFO (DEN 0022, 5.7.2).
const ON: i64 = 0;
const OFF: i64 = 1;
const ON_PENDING: i64 = 2;
/// Increments of each CPU.
const INCREMENTS: u64 = 20_000;
/// Each CPU is turned on so often.
const ROUNDS: u64 = 4;

static COUNTER: AtomicU64 = AtomicU64::new(0);
static SEEN: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
static HOLD: AtomicU64 = AtomicU64::new(0);

struct Status {
    what: &'static str,
    cpu: usize,
    expected: i64,
    found: i64,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of cpu {}: expected {}, found {}", self.what, self.cpu, self.expected, self.found)
    }
}

fn main(machine: &Machine) {
    let mut report = Report::default();
    let cpus = machine.cpus.min(MAX_CPUS);
    report.check("version", version());
    report.check("bad targets", bad_targets(cpus));
    report.check("states before", states(cpus, OFF));
    report.check("on, run, off, again", rounds(cpus));
    report.check("on when on", on_when_on(cpus));
    report.check("states after", states(cpus, OFF));
    report.check("shared counter", same(0, (cpus as u64 - 1) * ROUNDS * INCREMENTS, COUNTER.load(Ordering::Acquire)));
    report.end();
}

fn expect(what: &'static str, cpu: usize, expected: i64, found: i64) -> Result<(), Status> {
    if expected == found { Ok(()) } else { Err(Status { what, cpu, expected, found }) }
}

/// PSCI 1.0 or later, with the functions that this program needs.
fn version() -> Result<(), Status> {
    let version = call([psci::VERSION, 0, 0, 0]) as i64;
    expect("PSCI's major version", 0, 1, version >> 16)?;
    for function in [psci::CPU_ON, psci::CPU_OFF, psci::AFFINITY_INFO, psci::SYSTEM_OFF, psci::SYSTEM_RESET] {
        expect("PSCI_FEATURES", 0, 0, call([psci::FEATURES, function, 0, 0]) as i64)?;
    }
    expect("PSCI_FEATURES of nothing", 0, psci::NOT_SUPPORTED, call([psci::FEATURES, 0x8400_ffff, 0, 0]) as i64)
}

fn bad_targets(cpus: usize) -> Result<(), Status> {
    let on = |target: u64| call([psci::CPU_ON, target, smp::entry(), 0]) as i64;
    expect("CPU_ON past the last", cpus, psci::INVALID_PARAMETERS, on(cpus as u64))?;
    expect("CPU_ON in another cluster", 0, psci::INVALID_PARAMETERS, on(0x1_0000))?;
    expect("CPU_ON of this CPU", 0, psci::ALREADY_ON, on(0))?;
    expect("AFFINITY_INFO past the last", cpus, psci::INVALID_PARAMETERS, smp::state(cpus))
}

fn states(cpus: usize, others: i64) -> Result<(), Status> {
    expect("AFFINITY_INFO", 0, ON, smp::state(0))?;
    (1..cpus).try_for_each(|cpu| expect("AFFINITY_INFO", cpu, others, smp::state(cpu)))
}

fn rounds(cpus: usize) -> Result<(), Status> {
    for round in 1..=ROUNDS {
        for cpu in 1..cpus {
            expect("CPU_ON", cpu, psci::SUCCESS, smp::on(cpu, count).err().unwrap_or(psci::SUCCESS))?;
        }
        for (cpu, seen) in SEEN.iter().enumerate().take(cpus).skip(1) {
            // Not by its state: QEMU's own firmware says OFF until a CPU that was turned on has begun to run.
            while seen.load(Ordering::Acquire) != round * cpu as u64 {
                core::hint::spin_loop();
            }
            until_off(cpu)?;
        }
    }
    Ok(())
}

/// Waits for a CPU to be off; every state on the way is one of PSCI's.
fn until_off(cpu: usize) -> Result<(), Status> {
    loop {
        match smp::state(cpu) {
            OFF => return Ok(()),
            ON | ON_PENDING => core::hint::spin_loop(),
            found => return Err(Status { what: "AFFINITY_INFO", cpu, expected: OFF, found }),
        }
    }
}

/// A CPU that is on stays what it is when it is turned on again.
fn on_when_on(cpus: usize) -> Result<(), Status> {
    if cpus == 1 {
        return Ok(());
    }
    HOLD.store(1, Ordering::Release);
    expect("CPU_ON", 1, psci::SUCCESS, smp::on(1, hold).err().unwrap_or(psci::SUCCESS))?;
    while HOLD.load(Ordering::Acquire) == 1 {
        core::hint::spin_loop();
    }
    let again = call([psci::CPU_ON, 1, smp::entry(), 0]) as i64;
    let state = smp::state(1);
    HOLD.store(0, Ordering::Release);
    until_off(1)?;
    expect("CPU_ON again", 1, psci::ALREADY_ON, again)?;
    expect("AFFINITY_INFO", 1, ON, state)
}

fn count(cpu: usize) {
    SEEN[cpu].fetch_add(cpu as u64, Ordering::AcqRel);
    (0..INCREMENTS).for_each(|_| {
        COUNTER.fetch_add(1, Ordering::AcqRel);
    });
}

fn hold(_cpu: usize) {
    HOLD.store(2, Ordering::Release);
    while HOLD.load(Ordering::Acquire) == 2 {
        core::hint::spin_loop();
    }
}
