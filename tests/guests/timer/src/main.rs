//! The generic timer's counters and its two timers at EL1, by WFI and by polling; on every CPU.

#![no_std]
#![no_main]

use core::fmt;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use guest_rt::entry::{MAX_CPUS, cpu};
use guest_rt::machine::Machine;
use guest_rt::report::Report;
use guest_rt::timer::{self, PHYSICAL, VIRTUAL};
use guest_rt::{gic, guest, smp, sysreg_read, sysreg_write, trap};

guest!(main);

/// Interrupts of each timer that a CPU waits for.
const SHOTS: u32 = 20;
/// CNTx_CTL: ENABLE, IMASK, ISTATUS.
const ENABLE: u64 = 1;
const IMASK: u64 = 2;
const ISTATUS: u64 = 4;

/// Interrupts that each CPU took, by timer.
static TAKEN: [[AtomicU32; 2]; MAX_CPUS] = [const { [const { AtomicU32::new(0) }; 2] }; MAX_CPUS];
static UNEXPECTED: AtomicU32 = AtomicU32::new(0);
static FAILED: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

struct Wrong(&'static str, u64);

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:#x})", self.0, self.1)
    }
}

fn main(machine: &Machine) {
    let mut report = Report::default();
    report.check("frequency", condition(timer::frequency() > 1_000_000, "too low", timer::frequency()));
    report.check("counters go up", counters());
    report.check("compare value and timer value", compare());
    report.check("a masked timer is pending without an interrupt", masked());
    gic::init_distributor();
    gic::init_cpu();
    trap::on_interrupt(interrupt);
    report.check("virtual timer", shots(VIRTUAL));
    report.check("physical timer", shots(PHYSICAL));
    report.check("WFI sleeps until the timer", sleep());
    report.check("WFI with interrupts masked", sleep_masked());
    report.check("every CPU", others(machine.cpus.min(MAX_CPUS)));
    let unexpected = UNEXPECTED.load(Ordering::Acquire);
    report.check("no other interrupt", condition(unexpected == 0, "interrupts of other sources", unexpected.into()));
    report.end();
}

fn condition(holds: bool, otherwise: &'static str, value: u64) -> Result<(), Wrong> {
    if holds { Ok(()) } else { Err(Wrong(otherwise, value)) }
}

fn counters() -> Result<(), Wrong> {
    for read in [timer::now, timer::physical_now] {
        let mut last = read();
        for _ in 0..10_000 {
            let now = read();
            condition(now >= last, "a counter went back by", last.wrapping_sub(now))?;
            last = now;
        }
    }
    Ok(())
}

/// TVAL is CVAL minus the counter (D12.2.4), for both timers.
fn compare() -> Result<(), Wrong> {
    timer::stop_virtual();
    let before = timer::now();
    sysreg_write!("cntv_tval_el0", 1_000_000);
    let at = sysreg_read!("cntv_cval_el0");
    let after = timer::now();
    condition((before + 1_000_000..=after + 1_000_000).contains(&at), "the virtual compare value is", at)?;
    timer::stop_physical();
    let before = timer::physical_now();
    sysreg_write!("cntp_tval_el0", 1_000_000);
    let at = sysreg_read!("cntp_cval_el0");
    let after = timer::physical_now();
    condition((before + 1_000_000..=after + 1_000_000).contains(&at), "the physical compare value is", at)?;
    sysreg_write!("cntp_cval_el0", u64::MAX >> 1);
    let kept = sysreg_read!("cntp_cval_el0");
    condition(kept == u64::MAX >> 1, "the physical compare value became", kept)
}

fn masked() -> Result<(), Wrong> {
    sysreg_write!("cntv_tval_el0", 0);
    sysreg_write!("cntv_ctl_el0", ENABLE | IMASK);
    let control = sysreg_read!("cntv_ctl_el0");
    timer::stop_virtual();
    condition(control & 7 == ENABLE | IMASK | ISTATUS, "CNTV_CTL_EL0 is", control)?;
    sysreg_write!("cntp_tval_el0", 0);
    sysreg_write!("cntp_ctl_el0", ENABLE | IMASK);
    let control = sysreg_read!("cntp_ctl_el0");
    timer::stop_physical();
    condition(control & 7 == ENABLE | IMASK | ISTATUS, "CNTP_CTL_EL0 is", control)
}

fn interrupt() {
    let intid = gic::acknowledge();
    let which = match intid {
        VIRTUAL => {
            timer::stop_virtual();
            0
        }
        PHYSICAL => {
            timer::stop_physical();
            1
        }
        // Taken back between the exception and the acknowledgement: the timer was stopped.
        gic::SPURIOUS => return,
        _ => {
            UNEXPECTED.fetch_add(1, Ordering::AcqRel);
            return gic::end(intid);
        }
    };
    TAKEN[cpu()][which].fetch_add(1, Ordering::AcqRel);
    gic::end(intid);
}

fn taken(intid: u32) -> u32 {
    TAKEN[cpu()][usize::from(intid == PHYSICAL)].load(Ordering::Acquire)
}

fn arm(intid: u32, ticks: u64) {
    if intid == VIRTUAL { timer::arm_virtual(ticks) } else { timer::arm_physical(ticks) }
}

/// One interrupt for each time that the timer is armed, not before its time.
fn shots(intid: u32) -> Result<(), Wrong> {
    gic::enable(intid, 0x80);
    let now = if intid == VIRTUAL { timer::now } else { timer::physical_now };
    let step = timer::frequency() / 5000;
    for shot in 0..SHOTS {
        let before = taken(intid);
        let due = now() + step;
        arm(intid, step);
        trap::interrupts(true);
        while taken(intid) == before {
            core::hint::spin_loop();
        }
        trap::interrupts(false);
        condition(now() >= due, "it fired too early by ticks", due.wrapping_sub(now()))?;
        condition(taken(intid) == before + 1, "more than one interrupt for shot", shot.into())?;
    }
    gic::disable(intid);
    Ok(())
}

fn sleep() -> Result<(), Wrong> {
    gic::enable(VIRTUAL, 0x80);
    let before = taken(VIRTUAL);
    let due = timer::now() + timer::frequency() / 100;
    timer::arm_virtual(timer::frequency() / 100);
    // Masked around WFI, so that the interrupt cannot come between the look and the sleep.
    while taken(VIRTUAL) == before {
        timer::wait_for_interrupt();
        trap::interrupts(true);
        guest_rt::memory::barrier();
        trap::interrupts(false);
    }
    gic::disable(VIRTUAL);
    condition(timer::now() >= due, "it woke too early by ticks", due.wrapping_sub(timer::now()))
}

/// A masked interrupt ends WFI too, and is taken only when it is unmasked.
fn sleep_masked() -> Result<(), Wrong> {
    gic::enable(PHYSICAL, 0x80);
    let before = taken(PHYSICAL);
    timer::arm_physical(timer::frequency() / 200);
    while !gic::is_pending(PHYSICAL) {
        timer::wait_for_interrupt();
    }
    condition(taken(PHYSICAL) == before, "a masked interrupt was taken", before.into())?;
    trap::interrupts(true);
    guest_rt::memory::barrier();
    trap::interrupts(false);
    gic::disable(PHYSICAL);
    condition(taken(PHYSICAL) == before + 1, "interrupts after unmasking", taken(PHYSICAL).into())
}

fn others(cpus: usize) -> Result<(), Wrong> {
    for cpu in 1..cpus {
        smp::on(cpu, on_another).map_err(|status| Wrong("CPU_ON", status as u64))?;
    }
    for cpu in 1..cpus {
        while smp::state(cpu) != 1 {
            core::hint::spin_loop();
        }
        let failed = FAILED[cpu].load(Ordering::Acquire);
        condition(failed == 0, "failed tests on another CPU", failed)?;
        for (timer, taken) in TAKEN[cpu].iter().enumerate() {
            let taken = taken.load(Ordering::Acquire);
            // SHOTS, and the sleeps: one of each timer.
            condition(
                taken == SHOTS + 1,
                "interrupts of one timer on another CPU",
                (timer as u64) << 32 | u64::from(taken),
            )?;
        }
    }
    Ok(())
}

fn on_another(cpu: usize) {
    gic::init_cpu();
    let results = [counters(), compare(), shots(VIRTUAL), shots(PHYSICAL), sleep(), sleep_masked()];
    for wrong in results.iter().filter_map(|result| result.as_ref().err()) {
        guest_rt::println!("cpu {cpu}: {wrong}");
        FAILED[cpu].fetch_add(1, Ordering::AcqRel);
    }
}
