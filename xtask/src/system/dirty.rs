//! Dirty tracking of a machine that works: log, rings and a mark name the pages that the guest says it wrote, and no others.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail, ensure};
use entresol_wire::config::{Arch, ReadOnlyStore, WrittenMemory, WrittenVm};
use entresol_wire::control::{Alias, Answer, Bytes, Code, Dirty, Entries, Op, PagePlace, State};

use super::Context;
use super::control::Listener;
use super::machine::Builder;
use crate::bundle::program;
use crate::guests;

const VM: &str = "dirty";
/// Where the guest looks for the sign to begin: neither memory nor a device is there.
const GO: [u64; 2] = [0x10_0000_0000, 0xc800_0000];
/// The slot that is the sign.
const SIGN: u32 = 20;
/// The guest's memory, slot 0.
const RAM: u32 = 0;
/// Entries of a ring: so few that it is full many times in a round.
const RING: u32 = 128;

/// Pages of the guest's memory.
type Pages = BTreeSet<u64>;

/// The machine's owner.
struct Owner {
    told: Listener,
    /// Where the sign is shown.
    go: u64,
}

impl Owner {
    fn dirty(what: Dirty<'_>) -> Op<'_> {
        Op::Dirty { vm: VM.into(), what }
    }

    fn done(&mut self, what: Dirty<'_>) -> Result<()> {
        self.told.done(Self::dirty(what))
    }

    /// Every page of slot 0 that `what` tells, piece by piece; the sign's slot is read-only, and has none.
    fn pages(&mut self, what: impl Fn(PagePlace) -> Dirty<'static>) -> Result<Pages> {
        let (mut pages, mut from) = (Pages::new(), PagePlace::default());
        loop {
            let Answer::Pages(piece) = self.told.ask(Self::dirty(what(from)))? else { bail!("no pages are answered") };
            for run in piece.runs {
                ensure!(run.0 == RAM, "slot {} has no log", run.0);
                pages.extend(run.1..run.1 + run.2);
            }
            match piece.next {
                Some(next) => from = next,
                None => return Ok(pages),
            }
        }
    }

    fn sign(&mut self, shown: bool) -> Result<()> {
        let slot =
            Alias { number: SIGN, base: self.go, size: if shown { 4096 } else { 0 }, offset: 0, read_only: true };
        self.told.done(Op::SetSlot { vm: VM.into(), slot })
    }

    /// Starts `ways` while no vCPU runs, so that all begin at one moment.
    fn start(&mut self, ways: &[Dirty<'static>]) -> Result<()> {
        self.told.done(Op::Pause { vm: VM.into() })?;
        for way in ways {
            self.done(way.clone())?;
        }
        self.told.done(Op::Resume { vm: VM.into() })
    }

    /// Has the guest do its round. Returns the pages of its range, those that it says it wrote, and what was harvested on the
    /// way because a ring was full, and how often it was.
    fn round(&mut self, number: u64, ways: &[Dirty<'static>]) -> Result<Round> {
        self.told.hear(&format!("READY {number} "))?;
        let line = self.told.line()?;
        let place: Vec<u64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [first, count] = place[..] else { bail!("READY {line:?}") };
        let before = self.told.stats(VM)?.entries;
        self.start(ways)?;
        self.sign(true)?;
        let (mut harvested, mut full, mut wrote) = (Pages::new(), 0, Pages::new());
        loop {
            match self.told.line_or_state(State::Paused, "DirtyRingFull")? {
                None => {
                    harvested.extend(self.pages(|_| Dirty::Harvest)?);
                    full += 1;
                }
                Some(line) => match line.split_whitespace().collect::<Vec<_>>()[..] {
                    ["WROTE", index, bits] => {
                        let digits = bits.strip_prefix("0x").context("bits are hexadecimal")?;
                        let (index, bits): (u64, u64) = (index.parse()?, u64::from_str_radix(digits, 16)?);
                        wrote.extend((0..64).filter(|bit| bits >> bit & 1 != 0).map(|bit| first + index * 64 + bit));
                    }
                    ["DONE", _] => break,
                    _ => bail!("the guest says {line:?}"),
                },
            }
        }
        self.told.done(Op::Pause { vm: VM.into() })?;
        Ok(Round { range: first..first + count, before, wrote, harvested, full })
    }

    fn end(&mut self) -> Result<()> {
        self.sign(false)?;
        self.told.done(Op::Resume { vm: VM.into() })
    }
}

struct Round {
    range: std::ops::Range<u64>,
    /// The second stage when it began.
    before: Entries,
    wrote: Pages,
    harvested: Pages,
    full: u32,
}

impl Round {
    /// `named` must be, in the range, what the guest wrote.
    fn check(&self, way: &str, named: &Pages) -> Result<()> {
        let inside: Pages = named.range(self.range.clone()).copied().collect();
        let (missed, invented) = (self.wrote.difference(&inside).count(), inside.difference(&self.wrote).count());
        ensure!(
            missed == 0 && invented == 0,
            "{way}: of {} written pages {missed} are missed, and {invented} are named that were not",
            self.wrote.len()
        );
        ensure!(self.wrote.len() > 500, "the guest wrote {} pages only", self.wrote.len());
        Ok(())
    }
}

/// Two vCPUs store at random, with every kind of store: log, rings and a mark name the same pages, exactly those that the guest
/// says; blocks are put together again in the end; and requests that make no sense are refused.
pub fn log_rings_and_mark_name_what_was_written(context: &Context) -> Result<()> {
    written_is_named(context, "log_rings_and_mark_name_what_was_written", Arch::Arm64, false)
}

/// The same of private memory.
pub fn private_writes_are_named_too(context: &Context) -> Result<()> {
    written_is_named(context, "private_writes_are_named_too", Arch::Arm64, true)
}

/// The same on x86-64, of one vCPU.
pub fn x86_log_rings_and_mark_name_what_was_written(context: &Context) -> Result<()> {
    written_is_named(context, "x86_log_rings_and_mark_name_what_was_written", Arch::X86, false)
}

/// The same of private memory.
pub fn x86_private_writes_are_named_too(context: &Context) -> Result<()> {
    written_is_named(context, "x86_private_writes_are_named_too", Arch::X86, true)
}

fn written_is_named(context: &Context, name: &str, arch: Arch, private: bool) -> Result<()> {
    let (guest, vcpus, go) = match arch {
        Arch::Arm64 => (guests::flat("dirty")?, 2, GO[0]),
        Arch::X86 => (guests::x86("guest-x86-dirty")?, 1, GO[1]),
    };
    let mut vm: WrittenVm = program(VM, &guest, &format!("rounds=3 seed=7 go={go:#x}"));
    vm.memory = WrittenMemory { size: "64M".to_owned(), private, ..Default::default() };
    vm.vcpus = Some(vcpus);
    vm.policies.services = true;
    if arch == Arch::Arm64 {
        vm.policies.read_only_store = ReadOnlyStore::Abort;
    }
    vm.autostart = Some(false);
    let mut machine = Builder::new(context, name)?.on(arch).boot(vec![vm])?;
    let mut owner = Owner { told: Listener::attach(machine.control()?, VM)?, go };
    // Before the guest runs: it would fill a ring.
    refusals(&mut owner)?;
    owner.told.done(Op::Resume { vm: VM.into() })?;
    let start = |manual, ahead, ring| Dirty::Start { manual, ahead, ring };
    manual_log(&mut owner, start(true, false, None))?;
    // Split ahead; the mark names the same.
    let round = owner.round(1, &[Dirty::Mark, start(false, true, None)])?;
    let (log, since) = (owner.pages(Dirty::Get)?, owner.pages(Dirty::Since)?);
    round.check("log", &log)?;
    round.check("mark", &since)?;
    ensure!(log == since, "log and mark differ in {:?}", log.symmetric_difference(&since).collect::<Vec<_>>());
    ensure!(owner.pages(Dirty::Get)?.is_empty(), "what was fetched is named again");
    ensure!(owner.pages(Dirty::Since)? == since, "asking for what changed changes nothing");
    owner.done(Dirty::Stop)?;
    owner.end()?;
    rings(&mut owner, start(false, false, Some(RING)))?;
    owner.told.hear("ALL PASS")?;
    machine.expect_power_off().map(drop)
}

fn refusals(owner: &mut Owner) -> Result<()> {
    let at = PagePlace::default();
    let start = |ring| Dirty::Start { manual: false, ahead: false, ring: Some(ring) };
    for what in [Dirty::Stop, Dirty::Get(at), Dirty::Harvest, Dirty::Unmark, Dirty::Since(at)] {
        owner.told.refused(Owner::dirty(what), Code::WrongState)?;
    }
    for ring in [0, 100, 1 << 17] {
        owner.told.refused(Owner::dirty(start(ring)), Code::BadField)?;
    }
    owner.done(start(RING))?;
    owner.told.refused(Owner::dirty(start(RING)), Code::WrongState)?;
    owner.told.refused(Owner::dirty(Dirty::Get(PagePlace { slot: 0, page: 1 })), Code::BadField)?;
    owner.told.refused(Owner::dirty(Dirty::Get(PagePlace { slot: 0, page: 1 << 40 })), Code::BadField)?;
    owner.done(Dirty::Stop)?;
    owner.told.refused(Owner::dirty(start(2 * RING)), Code::BadField)
}

/// Round 0: what is read stays dirty until it is cleared, page by page.
fn manual_log(owner: &mut Owner, start: Dirty<'static>) -> Result<()> {
    let round = owner.round(0, &[start])?;
    let before = round.before;
    let named = owner.pages(Dirty::Get)?;
    round.check("manual log", &named)?;
    ensure!(owner.pages(Dirty::Get)? == named, "a manual log is cleared by reading it");
    // The first half of what the guest wrote, and pages beside that are not dirty.
    let first = round.range.start / 64 * 64;
    let half = named.range(first..first + 2048).count() as u64;
    let what = Dirty::Clear { at: PagePlace { slot: RAM, page: first }, bits: Bytes::from(&[0xff; 256][..]) };
    let answer = owner.told.ask(Owner::dirty(what))?;
    ensure!(answer == Answer::Count(half), "{answer:?} of {half} pages were cleared");
    let rest: Pages = named.iter().copied().filter(|page| !(first..first + 2048).contains(page)).collect();
    ensure!(owner.pages(Dirty::Get)? == rest, "other pages were cleared than were named");
    let split = owner.told.stats(VM)?.entries;
    owner.done(Dirty::Stop)?;
    let whole = owner.told.stats(VM)?.entries;
    ensure!(split.size_2m < before.size_2m, "no block was split: {before:?}, {split:?}");
    ensure!(whole.size_2m >= before.size_2m, "blocks stay split: {before:?} before, {whole:?} after");
    println!("blocks before, with and after the log: {}, {}, {}", before.size_2m, split.size_2m, whole.size_2m);
    owner.end()
}

/// Round 2: rings that are full again and again.
fn rings(owner: &mut Owner, start: Dirty<'static>) -> Result<()> {
    let mut round = owner.round(2, &[Dirty::Mark, start])?;
    ensure!(round.full > 3, "a ring of {RING} entries was full {} times", round.full);
    let mut named = std::mem::take(&mut round.harvested);
    named.extend(owner.pages(|_| Dirty::Harvest)?);
    round.check("rings", &named)?;
    named.extend(owner.pages(Dirty::Get)?);
    round.check("rings and log", &named)?;
    let since = owner.pages(Dirty::Since)?;
    ensure!(named == since, "rings and mark differ in {:?}", named.symmetric_difference(&since).collect::<Vec<_>>());
    println!("rings of {RING} entries were full {} times", round.full);
    owner.done(Dirty::Stop)?;
    owner.done(Dirty::Unmark)?;
    owner.end()
}
