//! Two guests with the same memory: merging gives most of one back, nobody reads anything else, and writes are private.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use entresol_wire::control::{Answer, Code, MergeStatus, Op, Stats};

use super::Context;
use super::control::Listener;
use super::machine::{Builder, Machine};
use crate::bundle::{disk, linux};
use crate::initrd::{self, Initrd};

/// The guests that merge.
const TWINS: [&str; 2] = ["castor", "pollux"];
/// Who only waits, so that the machine stays on and says how many frames are free.
const WITNESS: &str = "witness";
/// Files that each guest fills, and blocks of 1 MiB in each.
const FILES: u64 = 4;
const BLOCKS: u64 = 100;
/// Pages that one of them writes again.
const REWRITTEN: u64 = 1024;
/// No progress for so long is a failure: other machines run beside this one.
const PATIENCE: Duration = Duration::from_secs(120);

/// Two guests of 512 MiB fill 400 MiB alike. Merging gives back at least 80 % of what one has; a write to a merged page costs one
/// fault and is the writer's alone; both read what they wrote; and when both are gone every frame is back.
pub fn equal_guests_give_memory_back(context: &Context) -> Result<()> {
    let before = free_before_anything_ran(context)?;
    let mut machine = start(context, "equal_guests_give_memory_back")?;
    let mut owner = Owner { told: Listener::attach(machine.control()?, TWINS[0])?, asked: 0 };
    for twin in TWINS {
        owner.told.turn_to(twin)?;
        owner.told.done(Op::Resume { vm: twin.into() })?;
        owner.told.hear(initrd::READY)?;
        owner.ask("dmesg -n 1; mkdir /fill && mount -t tmpfs -o size=430m tmpfs /fill")?;
    }
    fill(&mut owner)?;
    let one = owner.told.stats(TWINS[0])?;
    let merged = merge(&mut owner, &one)?;
    println!("    {}", merged.told);
    writes_are_private(&mut owner)?;
    for twin in TWINS {
        owner.told.turn_to(twin)?;
        owner.reads_back(2..=FILES)?;
    }
    owner.told.done(Op::Kill { vm: TWINS[0].into() })?;
    owner.reads_back(2..=FILES)?;
    owner.told.done(Op::Kill { vm: TWINS[1].into() })?;
    owner.expect_free(before)?;
    owner.told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

/// The machine of this test; nothing in it runs yet.
fn start(context: &Context, name: &str) -> Result<Machine> {
    let builder = Builder::new(context, name)?.outer("2G", 2);
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    let kernel = context.guest.kernel()?;
    let block = builder.file("block.img", &pseudo_random(1 << 20))?;
    let twin = |name| {
        let mut vm = linux(name, &kernel, &initrd);
        vm.merge = true;
        vm.disks.push(disk(&block));
        vm
    };
    let mut vms = vec![twin(TWINS[0]), twin(TWINS[1]), linux(WITNESS, &kernel, &initrd)];
    vms.iter_mut().for_each(|vm| vm.autostart = Some(false));
    builder.boot(vms)
}

/// Bytes that no run of zeros and no repetition is in (xorshift64).
fn pseudo_random(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(len).collect()
}

/// Free frames of the same machine when both were killed before their first instruction.
fn free_before_anything_ran(context: &Context) -> Result<u64> {
    let mut machine = start(context, "equal_guests_give_memory_back-before")?;
    let mut told = Listener::attach(machine.control()?, TWINS[0])?;
    for twin in TWINS {
        told.turn_to(twin)?;
        told.done(Op::Kill { vm: twin.into() })?;
    }
    let free = told.stats(WITNESS)?.free_frames;
    told.done(Op::Shutdown)?;
    machine.expect_power_off().map(|_| free)
}

/// A line before each block shifts the next, so that no page of a guest is equal to another of the same guest.
fn fill(owner: &mut Owner) -> Result<()> {
    for file in 1..=FILES {
        let (first, last) = ((file - 1) * BLOCKS + 1, file * BLOCKS);
        let blocks = format!("for i in $(seq {first} {last}); do echo \"block $i\"; cat /dev/vda; done");
        for twin in TWINS {
            owner.told.turn_to(twin)?;
            owner.ask(&format!("({blocks}) | tee /fill/{file} | md5sum > /run/sum{file}"))?;
        }
    }
    let mut sums = Vec::new();
    for twin in TWINS {
        owner.told.turn_to(twin)?;
        sums.push(owner.ask("cat /run/sum*")?);
    }
    ensure!(sums[0] == sums[1] && sums[0].lines().count() as u64 == FILES, "the guests are not alike: {sums:?}");
    Ok(())
}

struct Gain {
    told: String,
}

/// Two rounds merge what stays as it is.
fn merge(owner: &mut Owner, one: &Stats<'_>) -> Result<Gain> {
    owner.told.refused(Op::Merge { rounds: Some(0) }, Code::BadField)?;
    let free = owner.told.stats(WITNESS)?.free_frames;
    let began = owner.status(None)?;
    owner.status(Some(3))?;
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
        back = owner.told.stats(WITNESS)?.free_frames.saturating_sub(free);
        if back * 100 >= one.resident_frames * 80 {
            break;
        }
    }
    let (pages, spent) = (last.scanned - began.scanned, last.nanoseconds - began.nanoseconds);
    let told = format!(
        "{back} frames back of the {} of one guest ({} %), {pages} pages read, {} ns a page, {} frames hold sums",
        one.resident_frames,
        back * 100 / one.resident_frames,
        spent / pages.max(1),
        last.held_frames
    );
    ensure!(back * 100 >= one.resident_frames * 80, "{told}; {last:?}");
    Ok(Gain { told })
}

/// One guest writes pages that both share: each costs it one fault and a copy, and the other does not see it.
fn writes_are_private(owner: &mut Owner) -> Result<()> {
    let writer = TWINS[1];
    owner.told.turn_to(writer)?;
    // The programs' own pages are there from here on.
    let write = |skip: u64, pages: u64| {
        format!("yes {writer} | head -c {} | dd of=/fill/1 bs=4096 seek={skip} conv=notrunc 2>/dev/null", pages << 12)
    };
    owner.ask(&write(2 * REWRITTEN, 16))?;
    let before = owner.told.stats(writer)?;
    owner.ask(&write(0, REWRITTEN))?;
    let after = owner.told.stats(writer)?;
    let faults = |stats: &Stats<'_>| stats.faults.translation + stats.faults.permission;
    let (copies, faults) = (after.merge.copied - before.merge.copied, faults(&after) - faults(&before));
    // The shell and its programs touch pages of their own beside.
    ensure!(
        (REWRITTEN..REWRITTEN + REWRITTEN / 2).contains(&copies) && faults < copies + REWRITTEN / 2,
        "{REWRITTEN} pages were written: {copies} copies, {faults} faults"
    );
    let lines = owner.ask(&format!("head -c {} /fill/1 | grep -c '^{writer}$'", REWRITTEN << 12))?;
    ensure!(lines == ((REWRITTEN << 12) / (writer.len() as u64 + 1)).to_string(), "{lines} lines were written");
    owner.told.turn_to(TWINS[0])?;
    owner.reads_back(1..=1)
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

    /// The attached guest's files hold what was written.
    fn reads_back(&mut self, files: std::ops::RangeInclusive<u64>) -> Result<()> {
        for file in files {
            let same = self.ask(&format!("md5sum < /fill/{file} | cmp - /run/sum{file} && echo same"))?;
            ensure!(same == "same", "file {file} holds something else: {same}");
        }
        Ok(())
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
