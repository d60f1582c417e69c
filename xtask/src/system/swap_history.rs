//! Histories at random of guests whose tagged memory leaves, comes back, is copied and merged.

use std::collections::VecDeque;

use anyhow::{Context as _, Result, bail, ensure};
use entresol_wire::config::WrittenVm;
use entresol_wire::control::{Answer, Op};

use super::Context;
use super::control::Listener;
use super::machine::Builder;
use crate::bundle::program;
use crate::guests;

/// What the histories come from: the same ones each time.
const SEEDS: [u64; 2] = [1, 2];
/// Acts of a history.
const ACTS: usize = 60;
/// Who is there from the start: two that may have equal pages, and one that may not.
const FIRST: [&str; 3] = ["one", "two", "apart"];
/// Copies, each of which lives once.
const COPIES: [&str; 10] = ["c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8", "c9"];
/// Virtual machines at once.
const MOST: usize = 6;
const MIBS: u64 = 8;
const MIB: u64 = 1 << 20;
/// Bytes of the disk: room for 512 MiB, each page with a ninth sector for its tags.
const DISK: u64 = 512 * MIB / 8 * 9;

/// Whatever happens to their memory, in whatever order, no guest misses a word or a tag, and none finds another's.
pub fn tagged_memory_survives_any_history(context: &Context) -> Result<()> {
    for seed in SEEDS {
        let kernel = guests::flat("toucher")?;
        let vm = |name: &str, seed: u32, merge| WrittenVm {
            memory: "64M".into(),
            mte: true,
            merge,
            ..program(name, &kernel, &format!("mib={MIBS} seed={seed} tags zero churn"))
        };
        let builder = Builder::new(context, "tagged_memory_survives_any_history")?.outer("1G", 2);
        let image = builder.file("swap.img", &[])?;
        std::fs::File::options().write(true).open(&image)?.set_len(DISK)?;
        let drive = format!("file={},if=none,id=swap,format=raw", image.display());
        let mut machine = builder
            .qemu(&["-drive", &drive, "-device", "virtio-blk-device,drive=swap,serial=entresol-swap"])
            .boot(vec![vm(FIRST[0], 1, true), vm(FIRST[1], 1, true), vm(FIRST[2], 2, false)])?;
        let told = Listener::attach(machine.control()?, FIRST[0])?;
        let guests = FIRST.map(|name| Guest { name, runs: true }).to_vec();
        let mut history =
            History { told, random: Random(seed), guests, copies: COPIES.into(), swaps: true, acts: Vec::new() };
        history.live().with_context(|| format!("seed {seed}, after {:?}", history.acts))?;
        history.told.done(Op::Shutdown)?;
        machine.expect_power_off()?;
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Guest {
    name: &'static str,
    runs: bool,
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Reclaim(&'static str, u64),
    Pause(&'static str),
    Resume(&'static str),
    Fork(&'static str, &'static str),
    Kill(&'static str),
    Merge,
    Verify(&'static str),
    SwapOff,
    SwapOn,
}

struct History {
    told: Listener,
    random: Random,
    guests: Vec<Guest>,
    /// Names that were not used.
    copies: VecDeque<&'static str>,
    swaps: bool,
    acts: Vec<Act>,
}

impl History {
    fn live(&mut self) -> Result<()> {
        for guest in FIRST {
            self.verify(guest)?;
        }
        while self.acts.len() < ACTS {
            let Some(act) = self.next() else { continue };
            self.acts.push(act);
            self.carry_out(act)?;
        }
        if !self.swaps {
            self.carry_out(Act::SwapOn)?;
        }
        let left = self.told.ask(Op::Reclaim { vm: FIRST[0].into(), size: MIB })?;
        ensure!(matches!(left, Answer::Count(_)), "a reclaim is answered with {left:?}");
        for Guest { name, runs } in self.guests.clone() {
            if !runs {
                self.told.done(Op::Resume { vm: name.into() })?;
            }
        }
        // What a guest finds in a round that was begun after all this.
        for Guest { name, .. } in self.guests.clone() {
            for _ in 0..3 {
                self.verify(name)?;
            }
        }
        Ok(())
    }

    /// An act that is possible now, or none.
    fn next(&mut self) -> Option<Act> {
        let Guest { name, runs } = self.guests[self.random.below(self.guests.len())];
        match self.random.below(20) {
            0..6 if self.swaps => Some(Act::Reclaim(name, (1 + self.random.below(MIBS as usize) as u64) * MIB)),
            6..8 if runs => Some(Act::Pause(name)),
            6..10 if !runs => Some(Act::Resume(name)),
            10..13 if runs && self.guests.len() < MOST => self.copies.pop_front().map(|copy| Act::Fork(name, copy)),
            13 if !FIRST.contains(&name) => Some(Act::Kill(name)),
            14..16 => Some(Act::Merge),
            16..19 if runs => Some(Act::Verify(name)),
            19 => Some(if self.swaps { Act::SwapOff } else { Act::SwapOn }),
            _ => None,
        }
    }

    fn carry_out(&mut self, act: Act) -> Result<()> {
        match act {
            Act::Reclaim(vm, size) => self.counted(Op::Reclaim { vm: vm.into(), size }),
            Act::Pause(vm) => self.done(Op::Pause { vm: vm.into() }, vm, false),
            Act::Resume(vm) => self.done(Op::Resume { vm: vm.into() }, vm, true),
            Act::Fork(vm, name) => {
                self.guests.push(Guest { name, runs: true });
                self.told.done(Op::Fork { vm: vm.into(), name: name.into(), count: None })
            }
            Act::Kill(vm) => {
                self.guests.retain(|guest| guest.name != vm);
                self.told.done(Op::Kill { vm: vm.into() })
            }
            Act::Merge => self.told.ask(Op::Merge { rounds: Some(1) }).map(drop),
            Act::Verify(vm) => self.verify(vm),
            Act::SwapOff | Act::SwapOn => {
                self.swaps = !self.swaps;
                self.counted(if self.swaps { Op::SwapOn } else { Op::SwapOff })
            }
        }
    }

    fn done(&mut self, op: Op<'_>, vm: &str, runs: bool) -> Result<()> {
        self.guests.iter_mut().filter(|guest| guest.name == vm).for_each(|guest| guest.runs = runs);
        self.told.done(op)
    }

    fn counted(&mut self, op: Op<'_>) -> Result<()> {
        match self.told.ask(op)? {
            Answer::Count(_) => Ok(()),
            other => bail!("bytes are counted as {other:?}"),
        }
    }

    /// One that finds something wrong says so, and is off.
    fn verify(&mut self, vm: &'static str) -> Result<()> {
        self.told.turn_to(vm)?;
        self.told.hear("VERIFIED")
    }
}

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % end as u64) as usize
    }
}
