//! One guest access: the hardware's walk, the fault, the core, and again, as metal does it.
//!
//! Protocol: [`access`] is the instruction. The hardware tries ([`hardware`]); what it refuses becomes the registers of an
//! exit, the decoder makes a fault of them, the core answers, and the answer is judged before it is obeyed. Maintenance
//! that traps goes to the core's other door and is done or not when that returns. What the owner emulates is answered here in its
//! stead, and ends as the core's [`Completion`] has it.

use entresol_addr::Gpa;
use entresol_arch_x86::fault::SecondStage;
use entresol_fault::Access;
use entresol_mmu::{Completion, Instruction, Outcome, Reason};

use super::operation::Operation;
use super::stage::{Actor, Stage};
use super::swap::Brought;
use super::trap::{Cause, Trap};
use super::{memory, shadowed, swap};
use crate::check::{Check, completion, inv08, inv09, inv15, maintenance};
use crate::lab::{self, Lab};
use crate::litmus::Emulated;
use crate::litmus::outcome::Value;
use crate::machine::walk::{Missing, Translated, Walker};
use crate::machine::x86;

/// A vCPU's access.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// Who.
    pub walker: Walker,
    /// Where.
    pub gpa: Gpa,
    /// What.
    pub what: Operation,
    /// The vCPU's own translation is off.
    pub mmu_off: bool,
}

/// How the hardware answered.
enum Answer {
    Done(Value),
    /// A second-stage fault.
    Fault(Trap),
}

/// Makes the access, and looks at what the vCPU has of it.
pub fn access(stage: &Stage<'_>, actor: &mut Actor, vm: usize, attempt: Attempt) -> Value {
    if stage.shadowed {
        return shadowed::access(stage, actor, vm, attempt);
    }
    let before = actor.context;
    let writes = attempt.what.needs() == Access::Write;
    if writes {
        lab::with(|lab| {
            let page = memory::page(lab, vm, attempt.gpa);
            lab.written.begin(actor.cpu, page);
        });
    }
    let end = perform(stage, actor, vm, attempt);
    if writes {
        lab::with(|lab| lab.written.end(actor.cpu));
    }
    let value = match end {
        Value::Word(value) => Some(value),
        Value::Mmio => Some(answer(&attempt)),
        _ => None,
    };
    let wrong = completion::ended(before, actor.context, end, value.filter(|_| attempt.what.loads()));
    lab::with(|lab| lab.found(Check::Completion, wrong));
    lab::settle();
    end
}

/// Makes the access until it is done or leaves to the owner.
fn perform(stage: &Stage<'_>, actor: &mut Actor, vm: usize, attempt: Attempt) -> Value {
    let began = lab::with(|lab| lab.schedule.others());
    if let Some(line) = attempt.what.line().filter(|_| stage.policy.trap_maintenance) {
        return maintain(stage, actor, vm, &attempt, line);
    }
    let (mut traps, mut in_vain, mut last) = (0, 0, None);
    loop {
        lab::before_guest();
        let (answer, since) = lab::with(|lab| (hardware(lab, &attempt), lab.world.now()));
        lab::settle();
        let trap = match answer {
            Answer::Done(value) => return retire(actor, &attempt, value),
            Answer::Fault(trap) => trap,
        };
        traps += 1;
        lab::with(|lab| {
            // An exception return leaves no location watched (Arm DDI 0487 B2.17.5).
            lab.monitors[actor.cpu] = None;
            let alone = lab.schedule.others() == began;
            lab.found(Check::Inv15, inv15::trapped(traps, alone, attempt.gpa.get()));
        });
        lab::settle();
        let (outcome, needs_write) = ask(stage, actor, vm, &attempt, trap);
        lab::with(|lab| judge(lab, stage, &attempt, since, Door::Abort { needs_write }, outcome));
        lab::settle();
        match outcome {
            // The same fault twice: a TLB still holds what another CPU has not finished changing.
            Outcome::Resume if last == Some(trap) => entresol_sync::hint::spin_loop(),
            Outcome::Resume => {}
            Outcome::Retry => entresol_sync::hint::spin_loop(),
            Outcome::Unshare => {
                if let Some(end) = unshare(stage, actor, vm, &attempt) {
                    return end;
                }
            }
            Outcome::Mmio => return conclude(stage, actor, &attempt, Value::Mmio),
            Outcome::Skip => return conclude(stage, actor, &attempt, Value::Skipped),
            Outcome::Inject(_) => return conclude(stage, actor, &attempt, Value::Abort),
            Outcome::Exit(Reason::Stored { .. }) => match swap::bring(stage, actor.cpu, vm, attempt.gpa) {
                Brought::There => (traps, in_vain) = (traps - 1, 0),
                Brought::OutOfMemory => return conclude(stage, actor, &attempt, Value::Exit),
                // Twice in a row: another CPU must have changed something.
                Brought::InVain if in_vain != 0 => entresol_sync::hint::spin_loop(),
                Brought::InVain => in_vain += 1,
            },
            Outcome::Exit(_) => return conclude(stage, actor, &attempt, Value::Exit),
        }
        last = Some(trap);
    }
}

/// Asks the core, by the door that the exit belongs to. Its answer, and whether the access needs to write.
fn ask(stage: &Stage<'_>, actor: &mut Actor, vm: usize, attempt: &Attempt, trap: Trap) -> (Outcome, bool) {
    let memory = stage.vm(vm);
    let paging = lab::with(|lab| lab.world.config.format);
    let (hint, cache) = (&actor.hint, &mut actor.cache);
    let pin = || stage.host.epoch.pin(actor.cpu);
    match trap.decode(paging, attempt.gpa) {
        SecondStage::Fault(fault) if !paging.is_x86() => (memory.handle(&pin(), hint, &fault), fault.is_write()),
        SecondStage::Fault(fault) => (memory.handle_noting(&pin(), hint, cache, &fault), fault.is_write()),
        SecondStage::Refused(fault) => {
            // The slots are asked in the pin: an update that is not seen here waits for its end.
            let pin = pin();
            let (known, before) = (cache.counts(), memory.slots().generation());
            let outcome = memory.handle_refused(&pin, hint, cache, &fault);
            let hit = outcome == Outcome::Mmio && cache.counts().refreshed == known.refreshed;
            if hit {
                let wrong = inv08::hit(before, memory.slots().generation(), attempt.gpa.get());
                lab::with(|lab| {
                    lab.mark("mmio entry");
                    lab.found(Check::Inv8, wrong);
                });
            }
            (outcome, fault.is_write())
        }
    }
}

/// The vCPU is out of its pin, and its page becomes its own by the notifier. The end of the access, if that cannot be.
fn unshare(stage: &Stage<'_>, actor: &mut Actor, vm: usize, attempt: &Attempt) -> Option<Value> {
    let outcome = stage.vm(vm).unshare(actor.cpu, attempt.gpa);
    lab::with(|lab| lab.log(None, || format!("the core answers {outcome:?} for {:#x}", attempt.gpa)));
    let ends = matches!(outcome, Outcome::Exit(reason) if !matches!(reason, Reason::Stored { .. }));
    ends.then(|| conclude(stage, actor, attempt, Value::Exit))
}

/// The hardware has done it.
fn retire(actor: &mut Actor, attempt: &Attempt, value: Value) -> Value {
    if let Value::Word(word) = value
        && attempt.what.loads()
    {
        actor.context.load(word);
    }
    actor.context.advance();
    value
}

/// The core has answered, and the access is over.
fn conclude(stage: &Stage<'_>, actor: &mut Actor, attempt: &Attempt, end: Value) -> Value {
    match end {
        Value::Mmio => return emulate(stage, actor, attempt),
        Value::Abort => actor.context.abort(),
        Value::Exit => {}
        _ => actor.context.advance(),
    }
    end
}

/// The owner answers, and then decides whether it shall count.
fn emulate(stage: &Stage<'_>, actor: &mut Actor, attempt: &Attempt) -> Value {
    let pending = Completion::pending();
    let answered = if attempt.what.loads() { pending.loaded(answer(attempt)) } else { pending.stored() };
    let (completion, end) = match stage.policy.emulated {
        Emulated::Done => (answered, Value::Mmio),
        Emulated::Abort => (answered.aborted(), Value::Abort),
    };
    completion.settle(&mut actor.context);
    end
}

/// What the owner's device has at an address: another value than any memory of a scenario.
const fn answer(attempt: &Attempt) -> u64 {
    !attempt.gpa.get()
}

/// By which door maintenance came to the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// A data abort; `needs_write`: one for want of write permission.
    Abort {
        /// A permission fault.
        needs_write: bool,
    },
    /// The instruction itself.
    Trap,
}

/// Maintenance that traps: the core carries it out.
fn maintain(stage: &Stage<'_>, actor: &mut Actor, vm: usize, attempt: &Attempt, line: super::operation::Line) -> Value {
    let gpa = attempt.gpa;
    loop {
        lab::before_guest();
        let (since, begun) = lab::with(|lab| {
            lab.monitors[actor.cpu] = None;
            lab.log(None, || format!("guest {} {gpa:#x} traps", attempt.what.name()));
            (lab.world.now(), memory::begin_clean(lab, vm, gpa, line))
        });
        let outcome = stage.vm(vm).maintain(&stage.host.epoch.pin(actor.cpu), &actor.hint, gpa, line.trapped());
        lab::with(|lab| {
            judge(lab, stage, attempt, since, Door::Trap, outcome);
            if outcome == Outcome::Skip {
                memory::end_clean(lab, begun);
            }
        });
        lab::settle();
        match outcome {
            Outcome::Skip => return conclude(stage, actor, attempt, Value::Skipped),
            Outcome::Retry | Outcome::Resume => entresol_sync::hint::spin_loop(),
            Outcome::Unshare => {
                if let Some(end) = unshare(stage, actor, vm, attempt) {
                    return end;
                }
            }
            Outcome::Mmio => return conclude(stage, actor, attempt, Value::Mmio),
            Outcome::Inject(_) => return conclude(stage, actor, attempt, Value::Abort),
            Outcome::Exit(_) => return conclude(stage, actor, attempt, Value::Exit),
        }
    }
}

/// What the core made of an access.
fn judge(lab: &mut Lab, stage: &Stage<'_>, attempt: &Attempt, since: u64, door: Door, outcome: Outcome) {
    let (vm, gpa) = (attempt.walker.vm, attempt.gpa);
    lab.mark(match outcome {
        Outcome::Resume => "resume",
        Outcome::Retry => "retry",
        Outcome::Unshare => "unshare",
        Outcome::Skip => "skip",
        Outcome::Inject(_) => "inject",
        Outcome::Mmio => "mmio",
        Outcome::Exit(_) => "exit",
    });
    lab.log(None, || format!("the core answers {outcome:?} for {gpa:#x}"));
    if outcome == Outcome::Mmio {
        let slot = lab.records.stable_at(vm, gpa.frame(), since);
        let wrong = inv09::emulated(slot, gpa.get(), attempt.what);
        lab.found(Check::Inv9, wrong);
    }
    if let Some(line) = attempt.what.line() {
        let target = lab.records.target(vm, gpa.frame(), since);
        let asked = maintenance::Asked { line, door, policy: stage.policy.read_only_ivac.into() };
        lab.found(Check::Maintenance, maintenance::answered(target, asked, gpa.get(), outcome));
    }
}

/// The access as the hardware makes it, whole.
fn hardware(lab: &mut Lab, attempt: &Attempt) -> Answer {
    let Attempt { walker, gpa, what, .. } = *attempt;
    let (picks, paging) = (lab.schedule.picks(), lab.world.config.format);
    let mut path = arrayvec::ArrayVec::new();
    let walked = lab.machine(|world, pick| world.walk(walker, gpa.frame(), &mut path, pick));
    let refused = |cause, level| Answer::Fault(Trap { what, cause, level });
    let answer = match walked {
        Err(missing) => refused(if missing.refused { Cause::Refused } else { Cause::Translation }, missing.level),
        Ok(found) if !found.leaf.accessed && !paging.is_x86() => refused(Cause::AccessFlag, found.level),
        Ok(found) if !permits(&found, what.needs()) => refused(Cause::Permission, found.level),
        Ok(found) => {
            if let Some(word) = path.last().filter(|_| !found.leaf.accessed) {
                lab::set_by_hardware(lab, *word, x86::accessed(paging));
            }
            Answer::Done(memory::reach(lab, attempt, &found))
        }
    };
    let page = walked.ok().map(|found| (found.pfn, what.stores() || what.line().is_some()));
    lab::touched(lab, &path, page.filter(|_| matches!(answer, Answer::Done(_))));
    if lab.schedule.picks() != picks {
        lab.mark("hardware choice");
    }
    if walked.is_ok_and(|found| found.stale) {
        lab.mark("stale translation");
    }
    lab.log(None, || {
        let past = if attempt.mmu_off { ", MMU off" } else { "" };
        let head = format!("guest {} {gpa:#x}{past}", what.name());
        match (&answer, walked) {
            (Answer::Done(value), Ok(found)) => {
                let stale = if found.stale { " by a stale translation" } else { "" };
                format!("{head}: {value} at frame {:#x}{stale}", found.pfn)
            }
            (_, Ok(found)) => format!("{head}: fault at level {}, the entry is there", found.level),
            (_, Err(Missing { level, refused: true })) => format!("{head}: an entry at level {level} is refused"),
            (_, Err(Missing { level, .. })) => format!("{head}: translation fault at level {level}"),
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
