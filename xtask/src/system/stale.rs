//! Memory that its owner replaces under guests with caches off: merged, forked, shown a second time.

use std::ops::Range;

use anyhow::{Context as _, Result, bail, ensure};
use entresol_wire::config::WrittenVm;
use entresol_wire::control::{Alias, Answer, Op, Stats};

use super::Context;
use super::control::Listener;
use super::machine::Builder;
use super::merge::traps;
use crate::bundle::program;
use crate::guests;

/// The guests: the same program with the same memory.
const TWINS: [&str; 2] = ["stale", "twin"];
/// Rounds by what the owner does. In each the guest writes with its MMU off, Non-cacheable and Cacheable, in this order.
const MERGES: Range<u64> = 0..3;
const FORKS: Range<u64> = 3..6;
/// A second slot, which moves from round to round, and forks.
const WINDOWS: Range<u64> = 6..9;
/// What the copies are called.
const COPIES: [&str; 6] = ["copy-3", "copy-4", "copy-5", "copy-6", "copy-7", "copy-8"];
/// Where the guest looks for its memory a second time, and how much further in each round.
const WINDOW: u64 = 0x10_0000_0000;
const STEP: u64 = 1 << 30;
/// Where a virtual machine's memory begins, and the number of the second slot.
const RAM: u64 = 0x4000_0000;
const SLOT: u32 = 20;
const PAGE: u64 = 4096;

/// Every byte through every mapping, after merges, forks, a slot that comes and moves, and the writes that follow, with forced
/// write-back and without; and each of those writes is one trap.
pub fn replaced_memory_is_never_stale(context: &Context) -> Result<()> {
    for (name, cpu) in [("max", &[][..]), ("without-fwb", &["-cpu", "cortex-a76", "-M", "mte=off"])] {
        let folder = format!("replaced_memory_is_never_stale-{name}");
        rounds(context, &folder, cpu).with_context(|| format!("machine {name}"))?;
    }
    Ok(())
}

fn rounds(context: &Context, folder: &str, cpu: &[&str]) -> Result<()> {
    let kernel = guests::flat("stale")?;
    let arguments = format!("change=owner rounds={} windows={}", WINDOWS.end, WINDOWS.start);
    let twin = |name| WrittenVm { merge: true, autostart: Some(false), ..program(name, &kernel, &arguments) };
    let builder = Builder::new(context, folder)?.qemu(cpu).merge_pages_per_second(0);
    let mut machine = builder.boot(TWINS.map(twin).into())?;
    let mut owner = Owner { told: Listener::attach(machine.control()?, TWINS[0])?, memory: 0..0 };
    for twin in TWINS {
        owner.told.turn_to(twin)?;
        owner.told.done(Op::Resume { vm: twin.into() })?;
        let line = owner.line("MEMORY ")?;
        let mut numbers =
            line.split(' ').skip(1).map(|number| u64::from_str_radix(number.trim_start_matches("0x"), 16));
        let (Some(Ok(start)), Some(Ok(size))) = (numbers.next(), numbers.next()) else { bail!("{line:?}") };
        owner.memory = start..start + size;
        owner.line("CHANGE 0")?;
    }
    MERGES
        .chain(FORKS)
        .chain(WINDOWS)
        .try_for_each(|round| owner.round(round).with_context(|| format!("round {round}")))?;
    machine.expect_power_off().map(drop)
}

/// The session, and where the guests' memory is.
struct Owner {
    told: Listener,
    memory: Range<u64>,
}

impl Owner {
    /// Both guests wait for the round's change, and then for the next one's.
    fn round(&mut self, round: u64) -> Result<()> {
        if MERGES.contains(&round) {
            self.merge()?;
            for twin in TWINS {
                self.told.turn_to(twin)?;
                self.goes_on(twin, round)?;
            }
            return Ok(());
        }
        if WINDOWS.contains(&round) {
            for twin in TWINS {
                let base = WINDOW + round * STEP;
                let size = self.memory.end - self.memory.start;
                let slot = Alias { number: SLOT, base, size, offset: self.memory.start - RAM, read_only: false };
                self.told.done(Op::SetSlot { vm: twin.into(), slot })?;
            }
        }
        let copy = COPIES[(round - FORKS.start) as usize];
        self.told.done(Op::Fork { vm: TWINS[0].into(), name: copy.into(), count: None })?;
        // The copy before its parent, or after.
        let order = if round.is_multiple_of(2) { [TWINS[0], copy] } else { [copy, TWINS[0]] };
        for vm in order.into_iter().chain([TWINS[1]]) {
            self.told.turn_to(vm)?;
            self.goes_on(vm, round)?;
        }
        Ok(())
    }

    /// The attached guest looks at its memory, writes every second page, one trap each, and looks again.
    fn goes_on(&mut self, vm: &str, round: u64) -> Result<()> {
        self.told.type_line("")?;
        self.line(&format!("WRITE {round}"))?;
        let before = self.counted(vm)?;
        self.told.type_line("")?;
        self.line(&format!("WROTE {round}"))?;
        let after = self.counted(vm)?;
        let written = (self.memory.end - self.memory.start) / PAGE / 2;
        let trapped = traps(&after) - traps(&before);
        let shared = MERGES.contains(&round) || vm != TWINS[1];
        let wanted = if shared { written } else { 0 };
        ensure!(
            trapped == wanted && copies(&after) - copies(&before) == wanted,
            "{vm} wrote {written} pages: {trapped} traps, {} copies, and not {wanted}",
            copies(&after) - copies(&before)
        );
        self.told.type_line("")?;
        let last = round + 1 == WINDOWS.end;
        match () {
            () if !TWINS.contains(&vm) => self.line("PASS in a copy")?,
            () if last => self.line(&format!("ALL PASS {}", WINDOWS.end))?,
            () => self.line(&format!("CHANGE {}", round + 1))?,
        };
        Ok(())
    }

    /// The counters between two instructions: a guest that waits for its owner exits all the time.
    fn counted(&mut self, vm: &str) -> Result<Stats<'static>> {
        self.told.done(Op::Pause { vm: vm.to_owned().into() })?;
        let stats = self.told.stats(vm)?;
        self.told.done(Op::Resume { vm: vm.to_owned().into() })?;
        Ok(stats)
    }

    /// All that both have alike becomes one.
    fn merge(&mut self) -> Result<()> {
        let joined = |owner: &mut Self| -> Result<u64> {
            let [one, other] = [owner.told.stats(TWINS[0])?, owner.told.stats(TWINS[1])?];
            Ok(one.merge.joined + other.merge.joined)
        };
        let before = joined(self)?;
        let mut left = 3;
        self.told.ask(Op::Merge { rounds: Some(left) })?;
        while left != 0 {
            let Answer::Merge(status) = self.told.ask(Op::Merge { rounds: None })? else { bail!("no status") };
            left = status.rounds_left;
        }
        let (joined, pages) = (joined(self)? - before, (self.memory.end - self.memory.start) / PAGE);
        ensure!(joined >= pages, "{joined} pages were merged of {pages} that are alike");
        Ok(())
    }

    /// Waits for the line that begins so; the guest must not complain before.
    fn line(&mut self, wanted: &str) -> Result<String> {
        loop {
            let line = self.told.line()?;
            ensure!(!line.starts_with("FAIL") && !line.contains("STOPPED"), "{line}");
            if line.starts_with(wanted) {
                return Ok(line);
            }
        }
    }
}

fn copies(stats: &Stats<'_>) -> u64 {
    stats.merge.copied
}
