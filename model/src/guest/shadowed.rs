//! One guest access on shadow tables, by its linear address: the hardware's walk, the fault, the core, and again.
//!
//! Protocol: the hardware walks what the core shows it ([`attempt`]). What it finds is held against two references: the ways that the
//! architecture leaves a walk of the guest's own tables open ([`Linear`](crate::machine::linear::Linear)), and the second-stage entries
//! that a processor with a second stage could use. A frame, a permission, a device or a page fault that no pair of them gives is a
//! finding ("shadow"); an access that they do give goes on as everywhere, with its guest address, under all other checkers.
//!
//! A vCPU begins on the tables at [`ROOT`]; a load of CR3 takes it to others, and flushes what its CPU keeps of shadow tables, as metal does.
//!
//! Known holes: a fork's child does not run.

use entresol_addr::{Gpa, Pfn};
use entresol_arch_x86::paging::{Controls, Kind, Mode, Regime, Request};
use entresol_arch_x86::shadow::Shadow;
use entresol_fault::Access;
use entresol_machine::{Vmid, Word};
use entresol_mmu::{Outcome, Reason, ShadowOutcome};

use super::operation::Operation;
use super::stage::{Actor, LabVm, Stage};
use super::swap::Brought;
use super::vcpu::Attempt;
use super::{memory, swap};
use crate::check::{Check, inv08, inv09, inv15};
use crate::lab::{self, Lab};
use crate::litmus::outcome::Value;
use crate::machine::linear::{Led, shadow};
use crate::machine::tlb::Stamp;
use crate::machine::walk::{Path, Translated, Walker};

/// Where every vCPU finds its table of level 4 when it begins.
pub const ROOT: Gpa = Gpa::new(0x1000);
/// Shadow tables of a machine: a root for each CPU, a way, and one more.
pub const TABLES: usize = 10;

/// What the registers of a vCPU say whose root is there.
fn regime(root: Gpa) -> Regime {
    let controls = Controls::WRITE_PROTECT | Controls::NO_EXECUTE;
    Regime { mode: Mode::Level4, root: root.get(), pointers: [0; 4], controls, pkru: 0, physical_bits: 40 }
}

/// The root of the tables that the vCPU of `cpu` runs on.
pub fn root(cpu: usize) -> Gpa {
    lab::with(|lab| lab.linear.roots[cpu])
}

/// The words of shadow tables on a machine with so many address bits.
pub fn words(physical_bits: u8) -> Box<Shadow> {
    Box::new(Shadow::new(physical_bits, None))
}

/// The vCPU of `cpu` loads CR3 with `root`: everything is flushed.
pub fn load(stage: &Stage<'_>, cpu: usize, vm: usize, vmid: Vmid, root: Gpa) {
    let began = lab::with(|lab| lab.world.moment());
    let shown = stage.vm(vm).shadow_load(&stage.host.epoch.pin(cpu), cpu, &regime(root));
    lab::with(|lab| {
        lab.world.load_shadow(cpu, shadow(vm, root), vmid, shown);
        lab.linear.roots[cpu] = root;
        lab.linear.flush(cpu, None, began);
        lab.log(None, || format!("guest loads CR3 with {root:#x}"));
    });
    lab::settle();
}

/// The vCPU of `actor` flushes the page at `linear`.
pub fn invlpg(stage: &Stage<'_>, actor: &Actor, vm: usize, linear: u64) {
    lab::before_guest();
    let began = lab::with(|lab| {
        lab.log(None, || format!("guest INVLPG {linear:#x}"));
        lab.world.moment()
    });
    let regime = regime(root(actor.cpu));
    stage.vm(vm).shadow_invalidate_page(&stage.host.epoch.pin(actor.cpu), actor.cpu, &regime, linear);
    lab::with(|lab| lab.linear.flush(actor.cpu, Some(linear), began));
    lab::settle();
}

/// How the hardware answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Done(Value),
    /// A page fault; whether by an entry that the hardware refuses.
    Fault {
        refused: bool,
    },
}

/// Makes the access, and says what it may write.
pub fn access(stage: &Stage<'_>, actor: &mut Actor, vm: usize, access: Attempt) -> Value {
    let writes = access.what.needs() == Access::Write;
    if writes {
        lab::with(|lab| {
            if let Some((gpa, _)) = ways(lab, &access).first() {
                let page = memory::page(lab, vm, *gpa);
                lab.written.begin(actor.cpu, page);
            }
        });
    }
    let value = perform(stage, actor, vm, access);
    if writes {
        lab::with(|lab| lab.written.end(actor.cpu));
    }
    lab::settle();
    value
}

/// Makes the access until it is done or leaves to the owner, or the guest gets an exception.
fn perform(stage: &Stage<'_>, actor: &mut Actor, vm: usize, access: Attempt) -> Value {
    let began = lab::with(|lab| lab.schedule.others());
    let memory = stage.vm(vm);
    let (mut traps, mut in_vain, mut last) = (0, 0, None);
    loop {
        lab::before_guest();
        let (answer, since) = lab::with(|lab| (attempt(lab, &access), lab.world.moment()));
        lab::settle();
        let refused = match answer {
            Answer::Done(value) => return value,
            Answer::Fault { refused } => refused,
        };
        traps += 1;
        let alone = lab::with(|lab| lab.schedule.others() == began);
        // A fault for each table on the way, of both stages.
        lab::with(|lab| lab.found(Check::Inv15, inv15::trapped(traps / TABLES as u32, alone, access.gpa.get())));
        lab::settle();
        let (outcome, gpa) = match ask(stage, actor, &memory, &access, refused) {
            ShadowOutcome::Memory(outcome, fault) => (outcome, fault.gpa),
            ShadowOutcome::Guest(_) => {
                lab::with(|lab| lab.found(Check::Shadow, page_fault(lab, &access)));
                lab::settle();
                return Value::Abort;
            }
            ShadowOutcome::Unloaded => {
                load(stage, actor.cpu, vm, access.walker.vmid, root(actor.cpu));
                continue;
            }
        };
        lab::with(|lab| judge(lab, &access, since, outcome, gpa));
        lab::settle();
        match outcome {
            Outcome::Resume if last == Some(answer) => entresol_sync::hint::spin_loop(),
            Outcome::Resume => {}
            Outcome::Retry => entresol_sync::hint::spin_loop(),
            Outcome::Unshare => match memory.unshare(actor.cpu, gpa) {
                Outcome::Exit(Reason::Stored { .. }) => {}
                Outcome::Exit(_) => return Value::Exit,
                _ => {}
            },
            Outcome::Mmio => return Value::Mmio,
            Outcome::Skip => return Value::Skipped,
            Outcome::Inject(_) => return Value::Abort,
            Outcome::Exit(Reason::Stored { .. }) => match swap::bring(stage, actor.cpu, vm, gpa) {
                Brought::There => (traps, in_vain) = (traps - 1, 0),
                Brought::OutOfMemory => return Value::Exit,
                Brought::InVain if in_vain != 0 => entresol_sync::hint::spin_loop(),
                Brought::InVain => in_vain += 1,
            },
            Outcome::Exit(_) => return Value::Exit,
        }
        last = Some(answer);
    }
}

/// Asks the core; whether it answered by an MMIO entry in time is INV-8.
fn ask(
    stage: &Stage<'_>,
    actor: &Actor,
    memory: &LabVm<'_>,
    access: &Attempt,
    refused: bool,
) -> ShadowOutcome<entresol_arch_x86::shadow::Exception> {
    let kind = match access.what.needs() {
        Access::Read => Kind::Read,
        Access::Write => Kind::Write,
        Access::Fetch => Kind::Fetch,
    };
    let request = Request { kind, user: true, by_leave: false };
    let pin = stage.host.epoch.pin(actor.cpu);
    let looked = || memory.shadow_mmio_counts(actor.cpu).map(|counts| counts.cached + counts.walked);
    let (known, before) = (looked(), memory.slots().generation());
    let regime = regime(root(actor.cpu));
    let outcome = memory.shadow_fault(&pin, &actor.hint, actor.cpu, &regime, access.gpa.get(), request, refused);
    if looked() != known {
        let wrong = inv08::hit(before, memory.slots().generation(), access.gpa.get());
        lab::with(|lab| {
            lab.mark("mmio entry");
            lab.found(Check::Inv8, wrong);
        });
    }
    outcome
}

/// What the core made of a fault; `gpa` is where it says that the access goes.
fn judge(lab: &mut Lab, access: &Attempt, since: Stamp, outcome: Outcome, gpa: Gpa) {
    let linear = access.gpa.get();
    lab.log(None, || format!("the core answers {outcome:?} for {linear:#x}, at {gpa:#x}"));
    lab.mark(match outcome {
        Outcome::Resume => "resume",
        Outcome::Retry => "retry",
        Outcome::Unshare => "unshare",
        Outcome::Mmio => "mmio",
        _ => "exit",
    });
    if outcome != Outcome::Mmio {
        return;
    }
    let slot = lab.records.stable_at(access.walker.vm, gpa.frame(), since);
    let wrong = inv09::emulated(slot, gpa.get(), access.what);
    lab.found(Check::Inv9, wrong);
    let leads = ways(lab, access).into_iter().any(|(to, _)| to == gpa);
    let wrong = format!(
        "{linear:#x} was given to the owner as {gpa:#x}, and the guest's tables lead elsewhere since its flush"
    );
    lab.found(Check::Shadow, (!leads).then_some(wrong));
}

/// Where the guest's tables may still lead the access, and whether they permit it.
fn ways(lab: &Lab, access: &Attempt) -> Vec<(Gpa, bool)> {
    let permitted = ends(lab, access).into_iter().filter_map(|way| match way {
        Led::To { gpa, write, execute } => Some((
            gpa,
            match access.what.needs() {
                Access::Read => true,
                Access::Write => write,
                Access::Fetch => execute,
            },
        )),
        Led::Nowhere => None,
    });
    permitted.collect()
}

/// Where a walk of the guest's tables may still end.
fn ends(lab: &Lab, access: &Attempt) -> Vec<Led> {
    let Attempt { walker, gpa: linear, .. } = *access;
    let floor = lab.linear.floor(walker.cpu, linear.get());
    lab.linear.ways(walker.vm, lab.linear.roots[walker.cpu], linear.get(), floor)
}

/// The guest got a page fault: some way must end in one.
fn page_fault(lab: &Lab, access: &Attempt) -> Option<String> {
    let linear = access.gpa;
    let faults = ends(lab, access).contains(&Led::Nowhere) || ways(lab, access).iter().any(|(_, permits)| !permits);
    (!faults).then(|| format!("{linear:#x} was a page fault, and the guest's tables permit the access since its flush"))
}

/// The access as the hardware makes it, whole.
fn attempt(lab: &mut Lab, access: &Attempt) -> Answer {
    let Attempt { walker, gpa: linear, what, .. } = *access;
    let shadow = Walker { vm: shadow(walker.vm, lab.linear.roots[walker.cpu]), ..walker };
    let mut path = Path::new();
    let walked = lab.machine(|world, pick| world.walk(shadow, linear.frame(), &mut path, pick));
    let found = walked.ok().filter(|found| match what.needs() {
        Access::Read => found.leaf.read,
        Access::Write => found.leaf.write,
        Access::Fetch => found.leaf.execute,
    });
    let page = found.map(|found| (found.pfn, what.stores()));
    lab::touched(lab, &path, page);
    let Some(found) = found else {
        let refused = walked.is_err_and(|missing| missing.refused);
        lab.log(None, || {
            format!("guest {} {linear:#x}: a fault{}", what.name(), if refused { ", refused" } else { "" })
        });
        return Answer::Fault { refused };
    };
    lab::touched_word(lab, Word::new(found.pfn, (linear.page_offset() / 8) as u16), what.stores());
    if found.stale {
        lab.mark("stale translation");
    }
    let value = match guest_address(lab, access, found.pfn) {
        Some(gpa) => reach(lab, &Attempt { gpa, ..*access }, &found),
        None => {
            let wrong = format!(
                "{} of {linear:#x} reached frame {:#x}, where neither the guest's tables nor the second stage lead since its flush",
                what.name(),
                found.pfn
            );
            lab.found(Check::Shadow, Some(wrong));
            Value::Done
        }
    };
    lab.log(None, || format!("guest {} {linear:#x}: {value} at frame {:#x}", what.name(), found.pfn));
    Answer::Done(value)
}

/// The guest address by which both stages may lead the access to `pfn`.
fn guest_address(lab: &Lab, access: &Attempt, pfn: Pfn) -> Option<Gpa> {
    let may = |gpa: &Gpa| {
        let mut possible = lab.world.possible(access.walker, gpa.frame()).into_iter();
        possible.any(|(leaf, frame)| frame == pfn && (leaf.write || access.what.needs() != Access::Write))
    };
    ways(lab, access).into_iter().filter(|(_, permits)| *permits).map(|(gpa, _)| gpa).find(may)
}

/// The access reaches memory at a guest address.
fn reach(lab: &mut Lab, access: &Attempt, found: &Translated) -> Value {
    let Attempt { walker, gpa, what, .. } = *access;
    if what.stores() {
        let page = memory::page(lab, walker.vm, gpa);
        lab.written.begin(walker.cpu, page);
    }
    let value = memory::reach(lab, access, found);
    if let Operation::Store(value) = what {
        let now = lab.world.moment();
        lab.linear.wrote(walker.vm, gpa, value, now);
    }
    value
}
