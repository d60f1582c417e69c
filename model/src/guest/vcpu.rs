//! One guest access: the hardware's walk, the fault, the core, and again, as metal does it.

use entresol_addr::{Gpa, PAGE_SHIFT};
use entresol_arch_arm64::abort;
use entresol_fault::{Access, Fault};
use entresol_machine::Word;
use entresol_mmu::Outcome;

use super::stage::{Actor, Stage};
use crate::check::inv11::Place;
use crate::check::{Check, inv09, inv15};
use crate::lab::{self, Lab};
use crate::litmus::outcome::Value;
use crate::machine::walk::{Translated, Walker};

/// A vCPU's access.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// Who.
    pub walker: Walker,
    /// Where.
    pub gpa: Gpa,
    /// What.
    pub access: Access,
    /// The value of a store.
    pub value: u64,
    /// The vCPU's own translation is off.
    pub mmu_off: bool,
}

/// How the hardware answered.
enum Answer {
    Done(u64),
    /// A second-stage fault with this syndrome.
    Fault(u64),
}

/// ESR_EL2 of an abort from a lower exception level (Arm DDI 0487 D24.2): class, 32-bit instruction, WnR, status code.
fn syndrome(access: Access, status: u64, level: u8) -> u64 {
    let class = if access == Access::Fetch { 0b10_0000 } else { 0b10_0100 };
    class << 26 | 1 << 25 | u64::from(access == Access::Write) << 6 | status << 2 | u64::from(level)
}

const TRANSLATION: u64 = 0b0001;
const ACCESS_FLAG: u64 = 0b0010;
const PERMISSION: u64 = 0b0011;

/// The fault as the exit path reads it from the registers.
fn fault(attempt: &Attempt, esr: u64) -> Fault {
    abort::fault(esr, attempt.gpa.get(), attempt.gpa.get() >> PAGE_SHIFT << 4)
}

/// Makes the access until it is done or leaves to the owner.
pub fn access(stage: &Stage<'_>, actor: &mut Actor, vm: usize, attempt: Attempt) -> Value {
    let (mut traps, mut last) = (0, None);
    loop {
        lab::before_guest();
        let (answer, since) = lab::with(|lab| (hardware(lab, &attempt), lab.world.now()));
        lab::settle();
        let esr = match answer {
            Answer::Done(value) => return Value::Word(value),
            Answer::Fault(esr) => esr,
        };
        traps += 1;
        lab::with(|lab| lab.found(Check::Inv15, inv15::trapped(traps, attempt.gpa.get())));
        lab::settle();
        let fault = fault(&attempt, esr);
        let outcome = stage.vms[vm].handle(&stage.host.epoch.pin(actor.cpu), &actor.hint, &fault);
        lab::with(|lab| judge(lab, &attempt, since, outcome));
        lab::settle();
        match outcome {
            // The same fault twice: a TLB still holds what another CPU has not finished changing.
            Outcome::Resume if last == Some(esr) => entresol_sync::hint::spin_loop(),
            Outcome::Resume => {}
            Outcome::Retry => entresol_sync::hint::spin_loop(),
            Outcome::Mmio => return Value::Mmio,
            Outcome::Skip => return Value::Skipped,
            Outcome::Inject(_) => return Value::Abort,
            Outcome::Exit(_) => return Value::Exit,
        }
        last = Some(esr);
    }
}

/// What the core made of a fault.
fn judge(lab: &mut Lab, attempt: &Attempt, since: u64, outcome: Outcome) {
    let (vm, gpa) = (attempt.walker.vm, attempt.gpa);
    lab.mark(match outcome {
        Outcome::Resume => "resume",
        Outcome::Retry => "retry",
        Outcome::Skip => "skip",
        Outcome::Inject(_) => "inject",
        Outcome::Mmio => "mmio",
        Outcome::Exit(_) => "exit",
    });
    lab.log(None, || format!("the core answers {outcome:?} for {gpa:#x}"));
    if outcome == Outcome::Mmio {
        let slot = lab.records.stable_at(vm, gpa.frame(), since);
        let wrong = inv09::emulated(slot, gpa.get(), attempt.access == Access::Write);
        lab.found(Check::Inv9, wrong);
    }
}

/// The access as the hardware makes it, whole.
fn hardware(lab: &mut Lab, attempt: &Attempt) -> Answer {
    let Attempt { walker, gpa, access, .. } = *attempt;
    let picks = lab.schedule.picks();
    let mut path = arrayvec::ArrayVec::new();
    let walked = lab.machine(|world, pick| world.walk(walker, gpa.frame(), &mut path, pick));
    let answer = match walked {
        Err(level) => Answer::Fault(syndrome(access, TRANSLATION, level)),
        Ok(found) if !found.leaf.accessed => Answer::Fault(syndrome(access, ACCESS_FLAG, found.level)),
        Ok(found) if !permits(&found, access) => Answer::Fault(syndrome(access, PERMISSION, found.level)),
        Ok(found) => Answer::Done(reach(lab, attempt, &found)),
    };
    let page = walked.ok().map(|found| (found.pfn, access == Access::Write));
    lab::touched(lab, &path, page.filter(|_| matches!(answer, Answer::Done(_))));
    if lab.schedule.picks() != picks {
        lab.mark("hardware choice");
    }
    if walked.is_ok_and(|found| found.stale) {
        lab.mark("stale translation");
    }
    lab.log(None, || {
        let what = match access {
            Access::Read => "load",
            Access::Write => "store",
            Access::Fetch => "fetch",
        };
        let past = if attempt.mmu_off { ", MMU off" } else { "" };
        match (&answer, walked) {
            (Answer::Done(value), Ok(found)) => {
                let stale = if found.stale { " by a stale translation" } else { "" };
                format!("guest {what} {gpa:#x}{past}: {value:#x} at frame {:#x}{stale}", found.pfn)
            }
            (_, Ok(found)) => {
                format!("guest {what} {gpa:#x}{past}: fault at level {}, the entry is there", found.level)
            }
            (_, Err(level)) => format!("guest {what} {gpa:#x}{past}: translation fault at level {level}"),
        }
    });
    answer
}

fn permits(found: &Translated, access: Access) -> bool {
    match access {
        Access::Read => found.leaf.read,
        Access::Write => found.leaf.write,
        Access::Fetch => found.leaf.execute,
    }
}

/// The access reaches memory.
fn reach(lab: &mut Lab, attempt: &Attempt, found: &Translated) -> u64 {
    let Attempt { walker, gpa, access, value, mmu_off } = *attempt;
    let gfn = gpa.frame();
    let word = Word::new(found.pfn, (gpa.page_offset() / 8) as u16).index();
    let by = |what: &str| format!("VM {} reached {gpa:#x} {what}, by frame {:#x}", walker.vm, found.pfn);
    if lab.records.any_at(walker.vm, gfn).is_none() {
        lab.found(Check::Inv3, Some(by("outside every slot")));
    }
    if lab.protected.iter().any(|(vm, range)| *vm == walker.vm && range.contains(gfn)) {
        lab.found(Check::Inv3, Some(by("while it is being invalidated")));
    }
    match lab.world.frame(found.pfn).map(|frame| frame.taken) {
        None => return 0,
        Some(false) => lab.found(Check::Inv7, Some(by("through a translation to a free frame"))),
        Some(true) => {}
    }
    let place = lab.records.stable_at(walker.vm, gfn, lab.world.now()).map(|slot| {
        let frame = slot.offset + gfn.since(slot.range.start());
        (Place { object: slot.object, frame, word }, slot.refuses_stores())
    });
    let fwb = lab.world.config.fwb;
    let uncached = mmu_off && !fwb;
    let now = lab.world.now();
    let result = lab.machine(|world, pick| {
        let frame = world.frame_mut(found.pfn);
        match access {
            Access::Read if uncached => frame.read_uncached(word, pick),
            Access::Read => frame.read(word, pick),
            Access::Fetch => frame.fetch(word, pick),
            Access::Write if uncached => {
                frame.write_uncached(word, value, pick);
                value
            }
            Access::Write => {
                frame.write(word, value, false, now, pick);
                value
            }
        }
    });
    match (place, access) {
        (Some((_, true)), Access::Write) => lab.found(Check::Inv13, Some(by("with a store to a read-only slot"))),
        (Some((place, false)), Access::Write) => lab.oracle.store(place, value, uncached, fwb),
        (Some((place, _)), _) => {
            let wrong = lab.oracle.judge(place, result, uncached);
            lab.found(Check::Inv11, wrong);
        }
        (None, _) => {}
    }
    result
}
