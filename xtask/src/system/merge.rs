//! Two guests with the same memory: merging gives most of one back, nobody reads anything else, and writes are private.

use std::fs;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use entresol_wire::config::{Arch, WrittenVm};
use entresol_wire::control::{Answer, Code, MergeStatus, Op, Stats};

use super::Context;
use super::control::Listener;
use super::machine::{Builder, Machine};
use crate::guests;
use crate::initrd::{self, Initrd};

/// The guests that merge.
const TWINS: [&str; 2] = ["castor", "pollux"];
/// Who only waits, so that the machine stays on and says how many frames are free.
const WITNESS: &str = "witness";
/// Pages that each guest fills: 400 MiB.
const PAGES: u64 = 400 << 8;
/// Pages that one command fills or checks: 50 MiB.
const PART: u64 = 50 << 8;
/// What both fill them with, and with what one of them writes some again.
const SEED: u64 = 1;
const OTHER: u64 = 2;
/// Pages that one of them writes again.
const REWRITTEN: u64 = 1024;
/// Pages a second that may be read while nobody asks for more: few, so that what comes back comes back when it is asked for.
const RATE: u64 = 128;
/// Pages that a step may read beyond its budget, and its budget.
const STEP: u64 = 2 * 512;
/// Rounds that are asked for at once.
const ROUNDS: u32 = 3;
/// No progress for so long is a failure: other machines run beside this one.
const PATIENCE: Duration = Duration::from_secs(120);

/// Two guests of 512 MiB fill 400 MiB alike. Merging gives back at least 80 % of what one has; a write to a merged page costs one
/// fault and is the writer's alone; both read what they wrote; and when both are gone every frame is back.
pub fn equal_guests_give_memory_back(context: &Context) -> Result<()> {
    give_memory_back(context, "equal_guests_give_memory_back", Arch::Arm64)
}

/// The same on x86-64.
pub fn x86_equal_guests_give_memory_back(context: &Context) -> Result<()> {
    give_memory_back(context, "x86_equal_guests_give_memory_back", Arch::X86)
}

fn give_memory_back(context: &Context, name: &str, arch: Arch) -> Result<()> {
    let before = free_before_anything_ran(context, name, arch)?;
    let mut machine = start(context, name, arch)?;
    let mut owner = Owner { told: Listener::attach(machine.control()?, TWINS[0])?, asked: 0 };
    fill(&mut owner)?;
    println!("    {}", merge(&mut owner)?);
    writes_are_private(&mut owner)?;
    owner.told.turn_to(TWINS[0])?;
    owner.holds(SEED, 0, PAGES)?;
    owner.told.done(Op::Kill { vm: TWINS[0].into() })?;
    owner.told.turn_to(TWINS[1])?;
    owner.holds(OTHER, 0, REWRITTEN)?;
    owner.holds(SEED, REWRITTEN, PAGES / 4)?;
    owner.told.done(Op::Kill { vm: TWINS[1].into() })?;
    owner.expect_free(before)?;
    owner.told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

/// The machine of this test; nothing in it runs yet.
fn start(context: &Context, name: &str, arch: Arch) -> Result<Machine> {
    let builder = Builder::new(context, name)?.on(arch);
    let program = guests::linux("pages", arch)?;
    let bytes = fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
    let initrd = Initrd::interactive().with(vec![("bin/pages".to_owned(), bytes)]);
    let initrd = builder.initrd("initrd.cpio", &initrd)?;
    let vm = |name| {
        let vm = builder.linux(name, &initrd)?;
        Ok(WrittenVm { merge: TWINS.contains(&name), autostart: Some(false), ..vm })
    };
    let vms = [TWINS[0], TWINS[1], WITNESS].map(vm).into_iter().collect::<Result<Vec<_>>>()?;
    builder.outer("2G", 2).merge_pages_per_second(RATE).boot(vms)
}

/// Free frames of the same machine when both were killed before their first instruction.
fn free_before_anything_ran(context: &Context, name: &str, arch: Arch) -> Result<u64> {
    let mut machine = start(context, &format!("{name}-before"), arch)?;
    let mut told = Listener::attach(machine.control()?, TWINS[0])?;
    for twin in TWINS {
        told.turn_to(twin)?;
        told.done(Op::Kill { vm: twin.into() })?;
    }
    let free = told.stats(WITNESS)?.free_frames;
    told.done(Op::Shutdown)?;
    machine.expect_power_off().map(|_| free)
}

/// Both get the same pages, of which no two are alike in one of them. Meanwhile the search reads no more than it may.
fn fill(owner: &mut Owner) -> Result<()> {
    let (clock, began) = (Instant::now(), owner.status(None)?);
    for twin in TWINS {
        owner.told.turn_to(twin)?;
        owner.told.done(Op::Resume { vm: twin.into() })?;
        owner.told.hear(initrd::READY)?;
        owner.ask("dmesg -n 1; mkdir /fill && mount -t tmpfs -o size=430m tmpfs /fill")?;
        owner.pages("fill", SEED, 0..PAGES)?;
    }
    let scanned = owner.status(None)?.scanned - began.scanned;
    let allowed = (clock.elapsed().as_secs_f64() * RATE as f64) as u64 + STEP;
    println!("    {scanned} pages were read of {allowed} that {RATE} a second allow");
    ensure!((1..=allowed).contains(&scanned), "{scanned} pages were read, {allowed} are allowed");
    Ok(())
}

/// Rounds at once merge what stays as it is, and read each page at most once in each.
fn merge(owner: &mut Owner) -> Result<String> {
    owner.told.refused(Op::Merge { rounds: Some(0) }, Code::BadField)?;
    let (one, other) = (owner.told.stats(TWINS[0])?, owner.told.stats(TWINS[1])?);
    let began = owner.status(None)?;
    owner.status(Some(ROUNDS))?;
    let (mut last, mut moved) = (began, Instant::now());
    while last.rounds_left != 0 || last == began {
        let now = owner.status(None)?;
        if (now.rounds, now.scanned) != (last.rounds, last.scanned) {
            moved = Instant::now();
        }
        ensure!(moved.elapsed() < PATIENCE, "no progress: {now:?}");
        last = now;
    }
    // What is deferred comes back with the host's next work.
    let mut back = 0;
    for _ in 0..QUESTIONS {
        back = owner.told.stats(WITNESS)?.free_frames.saturating_sub(one.free_frames);
        if back * 100 >= one.resident_frames * 80 {
            break;
        }
    }
    let (pages, spent) = (last.scanned - began.scanned, last.nanoseconds - began.nanoseconds);
    let told = format!(
        "{back} frames back of the {} of one guest ({} %), {pages} pages read in {ROUNDS} rounds, {} ns a page, {} frames hold sums",
        one.resident_frames,
        back * 100 / one.resident_frames,
        spent / pages.max(1),
        last.held_frames
    );
    ensure!(back * 100 >= one.resident_frames * 80, "{told}; {last:?}");
    // The guests' own work between two questions needs some memory more.
    let allowed = u64::from(ROUNDS) * (one.resident_frames + other.resident_frames + REWRITTEN);
    ensure!(pages <= allowed, "{told}: {allowed} are allowed");
    Ok(told)
}

/// One guest writes pages that both share: each costs it one fault and a copy, and the other does not see it. All of them are
/// shared: they have stayed as they are for two whole rounds, and the search has room for far more pages than these guests have.
fn writes_are_private(owner: &mut Owner) -> Result<()> {
    let writer = TWINS[1];
    owner.told.turn_to(writer)?;
    // The programs' own pages are there from here on.
    let write = |first: u64, count: u64| format!("pages fill /fill/pages {OTHER} {first} {count}");
    owner.ask(&write(0, 16))?;
    let before = owner.told.stats(writer)?;
    owner.ask(&write(16, REWRITTEN - 16))?;
    let after = owner.told.stats(writer)?;
    let (copies, traps) = (after.merge.copied - before.merge.copied, traps(&after) - traps(&before));
    let written = REWRITTEN - 16;
    println!("    {written} merged pages were written: {copies} copies, {traps} traps");
    // The shell and its programs touch pages of their own beside.
    ensure!(
        (written..written + written / 4).contains(&copies) && (copies..copies + written / 4).contains(&traps),
        "{written} merged pages were written: {copies} copies, {traps} traps"
    );
    Ok(())
}

/// Second-stage faults on memory so far: aborts that no device answered. x86-64 counts no exits for them: what they came to.
pub(super) fn traps(stats: &Stats<'_>) -> u64 {
    let count = |reason: &str| stats.exits.get(reason).copied().unwrap_or(0);
    match count("data-abort") {
        0 => stats.merge.copied + stats.faults.fresh + stats.faults.populated + stats.faults.retry,
        aborts => aborts - count("mmio"),
    }
}

const QUESTIONS: usize = 200;

/// The session, and how many commands its shells were given.
struct Owner {
    told: Listener,
    asked: u32,
}

impl Owner {
    /// Runs a command in the attached guest's shell.
    fn ask(&mut self, command: &str) -> Result<String> {
        self.asked += 1;
        self.told.shell(self.asked, command)
    }

    fn status(&mut self, rounds: Option<u32>) -> Result<MergeStatus> {
        match self.told.ask(Op::Merge { rounds })? {
            Answer::Merge(status) => Ok(status),
            other => bail!("merge is answered with {other:?}"),
        }
    }

    /// These pages of the attached guest hold what was written.
    fn holds(&mut self, seed: u64, first: u64, count: u64) -> Result<()> {
        self.pages("check", seed, first..first + count)
    }

    /// Has the attached guest fill or check pages, a few at a time: a host that is busy is waited for as long as a part is done.
    fn pages(&mut self, what: &str, seed: u64, pages: Range<u64>) -> Result<()> {
        pages.clone().step_by(PART as usize).try_for_each(|first| {
            let count = PART.min(pages.end - first);
            self.ask(&format!("pages {what} /fill/pages {seed} {first} {count}")).map(drop)
        })
    }

    /// Frames that a grace period keeps come back with the host's next work: each question is some.
    fn expect_free(&mut self, wanted: u64) -> Result<()> {
        let mut free = 0;
        for _ in 0..QUESTIONS {
            free = self.told.stats(WITNESS)?.free_frames;
            if free == wanted {
                return Ok(());
            }
        }
        bail!("{wanted} frames were free before anything ran, {free} are after both are gone")
    }
}
