//! Stolen time of all CPUs in one private page, while the page is shared, taken back, given back, and touched again.
//!
//! Each CPU watches its own record: the time in it never goes back but to zero, which is what the page holds after it was given back,
//! until the hypervisor tells the time again. Runs on a machine with private memory that may use the hypervisor's services.

#![no_std]
#![no_main]

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use guest_rt::entry::MAX_CPUS;
use guest_rt::machine::Machine;
use guest_rt::report::{Report, same};
use guest_rt::smccc::call;
use guest_rt::{guest, memory, println, smp};

guest!(main);

/// PV_TIME_ST (DEN 0057, 3.2.2).
const STOLEN_TIME: u64 = 0xc500_0021;
/// The hypervisor's services: shares or takes back, and gives back.
const CONVERT: u64 = 0xc600_000a;
const DISCARD: u64 = 0xc600_000b;
/// Where the time is in a record, in nanoseconds.
const TIME: u64 = 8;
/// Bytes of a page.
const PAGE: u64 = 4096;
/// How often the page changes, if the owner says nothing.
const ROUNDS: u64 = 2_000;

static RECORDS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
/// Times that a CPU saw anew, and those that were before one that it had seen.
static TOLD: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
static STALE: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
static OVER: AtomicBool = AtomicBool::new(false);

struct Refused {
    what: &'static str,
    answer: i64,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} answers {}", self.what, self.answer)
    }
}

fn main(machine: &Machine) {
    let mut report = Report::default();
    let cpus = machine.cpus.min(MAX_CPUS);
    let rounds = machine.number("rounds").unwrap_or(ROUNDS);
    ask(0);
    for cpu in 1..cpus {
        let on = smp::on(cpu, watch).map_err(|answer| Refused { what: "CPU_ON", answer });
        report.check("CPU_ON", on);
    }
    for record in &RECORDS[..cpus] {
        while record.load(Ordering::Acquire) == 0 {
            core::hint::spin_loop();
        }
    }
    let page = RECORDS[0].load(Ordering::Acquire) & !(PAGE - 1);
    report.check("wrong ranges are refused", wrong_ranges(page));
    println!("RECORDS in one page");
    report.check("the page changes", change(page, rounds));
    OVER.store(true, Ordering::Release);
    for cpu in 1..cpus {
        while smp::state(cpu) == 0 {
            core::hint::spin_loop();
        }
    }
    for cpu in 1..cpus {
        let told = TOLD[cpu].load(Ordering::Acquire);
        report
            .check("time was told", if told != 0 { Ok(()) } else { Err(Refused { what: "CPU", answer: cpu as i64 }) });
        report.check("no time is stale", same(cpu as u64, 0, STALE[cpu].load(Ordering::Acquire)));
    }
    report.end();
}

/// Asks for the record of this CPU.
fn ask(cpu: usize) {
    RECORDS[cpu].store(call([STOLEN_TIME, 0, 0, 0]), Ordering::Release);
}

fn convert(start: u64, size: u64, shared: u64) -> i64 {
    call([CONVERT, start, size, shared]) as i64
}

fn wrong_ranges(page: u64) -> Result<(), Refused> {
    let ranges =
        [(page + 1, PAGE, 1), (page, 0, 1), (page, PAGE + 8, 0), (page, 2 * PAGE, 1), (page, PAGE, 2), (0, PAGE, 1)];
    for (start, size, shared) in ranges.into_iter().chain([(!(PAGE - 1), PAGE, 1)]) {
        match convert(start, size, shared) {
            -2 => {}
            answer => return Err(Refused { what: "a wrong range", answer }),
        }
    }
    Ok(())
}

/// Shares the page, takes it back, gives it back, and touches it, in turns.
fn change(page: u64, rounds: u64) -> Result<(), Refused> {
    for round in 0..rounds {
        let (what, answer) = match round % 4 {
            0 => ("sharing", until(|| convert(page, PAGE, 1))),
            2 => ("taking back", until(|| convert(page, PAGE, 0))),
            _ => ("giving back", until(|| call([DISCARD, page, PAGE, 0]) as i64)),
        };
        if answer != PAGE as i64 {
            return Err(Refused { what, answer });
        }
        memory::load64(page);
    }
    Ok(())
}

/// Asks again while something else is going on.
fn until(mut ask: impl FnMut() -> i64) -> i64 {
    loop {
        match ask() {
            0 => core::hint::spin_loop(),
            answer => return answer,
        }
    }
}

/// Watches the record of this CPU until the page changes no more.
fn watch(cpu: usize) {
    ask(cpu);
    let time = RECORDS[cpu].load(Ordering::Acquire) + TIME;
    let mut last = 0;
    while !OVER.load(Ordering::Acquire) {
        let now = memory::load64(time);
        if now > last {
            TOLD[cpu].fetch_add(1, Ordering::AcqRel);
            last = now;
        } else if now != 0 && now < last {
            STALE[cpu].fetch_add(1, Ordering::AcqRel);
        }
    }
}
