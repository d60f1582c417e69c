//! GICv3 as a guest sees it: identification, SGIs between CPUs, PPIs and SPIs by software, priorities, masks, levels.
//!
//! Everything is in group 1, with affinity routing, one security state.

#![no_std]
#![no_main]

use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

use guest_rt::entry::{MAX_CPUS, cpu};
use guest_rt::machine::{GICD, GICR, Machine};
use guest_rt::memory::{load32, store32};
use guest_rt::report::Report;
use guest_rt::{gic, guest, smp, trap};

guest!(main);

/// SGIs of each CPU to each other.
const ROUNDS: u32 = 200;
/// SPIs that `virt` gives to PCI, which nobody drives here: free for software.
const SPI: u32 = 35;
const OTHER_SPI: u32 = 36;
/// PPI that nothing drives.
const PPI: u32 = 20;

/// Times that each interrupt number below 64 was taken, by CPU.
static TAKEN: [[AtomicU32; 64]; MAX_CPUS] = [const { [const { AtomicU32::new(0) }; 64] }; MAX_CPUS];
/// The order in which CPU 0 took its last interrupts, a byte each.
static ORDER: AtomicU32 = AtomicU32::new(0);
static READY: AtomicU32 = AtomicU32::new(0);
static STOP: AtomicU32 = AtomicU32::new(0);

struct Wrong(&'static str, u64);

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:#x})", self.0, self.1)
    }
}

fn main(machine: &Machine) {
    let mut report = Report::default();
    let cpus = machine.cpus.min(MAX_CPUS);
    report.check("identification", identification());
    report.check("redistributors", redistributors(cpus));
    gic::init_distributor();
    gic::init_cpu();
    trap::on_interrupt(interrupt);
    report.check("registers keep what is written", registers());
    report.check("nothing is pending", is(u64::from(gic::acknowledge()), gic::SPURIOUS.into(), "acknowledged"));
    report.check("SGI to oneself", own_sgi());
    report.check("PPI by software", by_software(PPI));
    report.check("SPI by software", by_software(SPI));
    report.check("a disabled interrupt waits", disabled());
    report.check("the most urgent first", priorities());
    report.check("the priority mask holds back", priority_mask());
    report.check("active until its end", active());
    report.check("SGIs between CPUs", between(cpus));
    report.end();
}

fn is(found: u64, expected: u64, what: &'static str) -> Result<(), Wrong> {
    if found == expected { Ok(()) } else { Err(Wrong(what, found)) }
}

/// GICD_PIDR2 says version 3 (IHI 0069, 12.9.30); TYPER says at least the interrupts of `virt`'s devices.
fn identification() -> Result<(), Wrong> {
    is(u64::from(load32(GICD + 0xffe8)) >> 4 & 0xf, 3, "GICD_PIDR2")?;
    is(u64::from(load32(GICR + 0xffe8)) >> 4 & 0xf, 3, "GICR_PIDR2")?;
    if gic::lines() < 96 { Err(Wrong("GICD_TYPER has too few lines", gic::lines().into())) } else { Ok(()) }
}

/// Each CPU has one, with its affinity; the last one says so (GICR_TYPER).
fn redistributors(cpus: usize) -> Result<(), Wrong> {
    for cpu in 0..cpus {
        let frame = GICR + 0x2_0000 * cpu as u64;
        is(load32(frame + 0xc).into(), cpu as u64, "GICR_TYPER.Affinity_Value")?;
        let last = load32(frame + 8) >> 4 & 1;
        is(last.into(), u64::from(cpu + 1 == cpus), "GICR_TYPER.Last")?;
    }
    Ok(())
}

fn registers() -> Result<(), Wrong> {
    gic::set_priority(SPI, 0xa0);
    is(u64::from(load32(GICD + 0x400 + u64::from(SPI & !3)) >> 24), 0xa0, "GICD_IPRIORITYR")?;
    gic::set_edge(SPI, true);
    is(u64::from(load32(GICD + 0xc00 + 4 * u64::from(SPI / 16)) >> (2 * (SPI % 16)) & 2), 2, "GICD_ICFGR, edge")?;
    gic::set_edge(SPI, false);
    is(u64::from(load32(GICD + 0xc00 + 4 * u64::from(SPI / 16)) >> (2 * (SPI % 16)) & 2), 0, "GICD_ICFGR, level")?;
    gic::enable(SPI, 0xa0);
    is(u64::from(load32(GICD + 0x104) >> (SPI - 32) & 1), 1, "GICD_ISENABLER")?;
    is(u64::from(load32(GICD + 0x184) >> (SPI - 32) & 1), 1, "GICD_ICENABLER")?;
    gic::disable(SPI);
    is(u64::from(load32(GICD + 0x104) >> (SPI - 32) & 1), 0, "GICD_ISENABLER after a disable")?;
    // Reserved and identification registers are not changed by stores.
    store32(GICD + 0xffe8, 0);
    is(u64::from(load32(GICD + 0xffe8)) >> 4 & 0xf, 3, "GICD_PIDR2 after a store")
}

fn interrupt() {
    let intid = gic::acknowledge();
    if intid == gic::SPURIOUS {
        return;
    }
    if let Some(taken) = TAKEN[cpu()].get(intid as usize) {
        taken.fetch_add(1, Ordering::AcqRel);
    }
    if cpu() == 0 {
        ORDER.store(ORDER.load(Ordering::Acquire) << 8 | intid & 0xff, Ordering::Release);
    }
    gic::end(intid);
}

fn taken(cpu: usize, intid: u32) -> u32 {
    TAKEN[cpu][intid as usize].load(Ordering::Acquire)
}

/// Lets in what is pending.
fn window() {
    trap::interrupts(true);
    guest_rt::memory::barrier();
    trap::interrupts(false);
}

/// Takes one interrupt of `intid`, which is or will be pending.
fn take(intid: u32) -> Result<(), Wrong> {
    let before = taken(0, intid);
    trap::interrupts(true);
    while taken(0, intid) == before {
        core::hint::spin_loop();
    }
    trap::interrupts(false);
    window();
    is(taken(0, intid).into(), u64::from(before) + 1, "times that it was taken")
}

fn own_sgi() -> Result<(), Wrong> {
    for sgi in 0..16 {
        gic::enable(sgi, 0x80);
        gic::send(sgi, 1);
        take(sgi)?;
    }
    // Sent twice before it is taken: one interrupt.
    gic::send(3, 1);
    gic::send(3, 1);
    take(3)
}

fn by_software(intid: u32) -> Result<(), Wrong> {
    gic::set_edge(intid, true);
    gic::enable(intid, 0x80);
    for _ in 0..100 {
        gic::set_pending(intid);
        take(intid)?;
        is(gic::is_pending(intid).into(), 0, "still pending")?;
    }
    gic::set_pending(intid);
    gic::clear_pending(intid);
    let before = taken(0, intid);
    window();
    is(taken(0, intid).into(), before.into(), "taken although it was cleared")
}

fn disabled() -> Result<(), Wrong> {
    gic::disable(SPI);
    gic::set_pending(SPI);
    let before = taken(0, SPI);
    window();
    is(taken(0, SPI).into(), before.into(), "taken although it was disabled")?;
    is(gic::is_pending(SPI).into(), 1, "not pending")?;
    gic::enable(SPI, 0x80);
    take(SPI)
}

fn priorities() -> Result<(), Wrong> {
    gic::set_edge(OTHER_SPI, true);
    gic::enable(SPI, 0xc0);
    gic::enable(OTHER_SPI, 0x40);
    gic::enable(5, 0x80);
    gic::set_pending(SPI);
    gic::send(5, 1);
    gic::set_pending(OTHER_SPI);
    while !(gic::is_pending(SPI) && gic::is_pending(5) && gic::is_pending(OTHER_SPI)) {
        core::hint::spin_loop();
    }
    ORDER.store(0, Ordering::Release);
    let before = taken(0, SPI);
    trap::interrupts(true);
    while taken(0, SPI) == before {
        core::hint::spin_loop();
    }
    trap::interrupts(false);
    is(ORDER.load(Ordering::Acquire).into(), u64::from(OTHER_SPI << 16 | 5 << 8 | SPI), "the order was")
}

fn priority_mask() -> Result<(), Wrong> {
    gic::enable(SPI, 0x80);
    gic::mask_below(0x80);
    gic::set_pending(SPI);
    let before = taken(0, SPI);
    window();
    let held = taken(0, SPI);
    gic::mask_below(0xff);
    is(held.into(), before.into(), "taken although its priority was masked")?;
    take(SPI)
}

/// Acknowledged by hand: active, not pending, and no second time until its end.
fn active() -> Result<(), Wrong> {
    gic::enable(SPI, 0x80);
    gic::set_pending(SPI);
    let mut intid = gic::SPURIOUS;
    while intid == gic::SPURIOUS {
        intid = gic::acknowledge();
    }
    is(intid.into(), SPI.into(), "acknowledged")?;
    is(gic::is_active(SPI).into(), 1, "active after the acknowledgement")?;
    gic::set_pending(SPI);
    let second = gic::acknowledge();
    gic::end(SPI);
    is(second.into(), gic::SPURIOUS.into(), "acknowledged while active")?;
    take(SPI)?;
    is(gic::is_active(SPI).into(), 0, "active after its end")
}

/// Each CPU answers SGI 1 with SGI 2; SGI 4 goes to all but the sender.
fn between(cpus: usize) -> Result<(), Wrong> {
    gic::enable(2, 0x80);
    for cpu in 1..cpus {
        smp::on(cpu, answer).map_err(|status| Wrong("CPU_ON", status as u64))?;
    }
    while READY.load(Ordering::Acquire) != cpus as u32 - 1 {
        core::hint::spin_loop();
    }
    for cpu in 1..cpus {
        for _ in 0..ROUNDS {
            let before = taken(0, 2);
            gic::send(1, 1 << cpu);
            trap::interrupts(true);
            while taken(0, 2) == before {
                core::hint::spin_loop();
            }
            trap::interrupts(false);
        }
        is(taken(cpu, 1).into(), ROUNDS.into(), "SGIs that a CPU took")?;
    }
    gic::send_to_others(4);
    for cpu in 1..cpus {
        while taken(cpu, 4) == 0 {
            core::hint::spin_loop();
        }
    }
    window();
    is(taken(0, 4).into(), 1, "SGI 4 at its sender, from before")?;
    STOP.store(1, Ordering::Release);
    gic::send_to_others(4);
    for cpu in 1..cpus {
        while smp::state(cpu) != 1 {
            core::hint::spin_loop();
        }
    }
    Ok(())
}

fn answer(cpu: usize) {
    gic::init_cpu();
    gic::enable(1, 0x80);
    gic::enable(4, 0x80);
    READY.fetch_add(1, Ordering::AcqRel);
    let mut answered = 0;
    while STOP.load(Ordering::Acquire) == 0 {
        guest_rt::timer::wait_for_interrupt();
        window();
        while answered != taken(cpu, 1) {
            answered += 1;
            gic::send(2, 1);
        }
    }
}
