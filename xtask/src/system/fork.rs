//! Live forks of a Linux guest that works: every copy goes on with the same memory and disk, and is a machine of its own.

use std::collections::HashSet;

use anyhow::{Result, bail, ensure};
use entresol_wire::config::{OnReset, WrittenPolicies, WrittenVm};
use entresol_wire::control::{Code, Op, State};

use super::Context;
use super::control::Listener;
use super::machine::Builder;
use crate::bundle::{disk, linux};
use crate::guests;
use crate::initrd::{self, Initrd};

/// Who is forked.
const PARENT: &str = "store";
/// Who only waits, so that the machine stays on and says how many frames are free.
const WITNESS: &str = "witness";
/// The copies, in the order in which they are made.
const COPIES: [&str; 10] =
    ["copy-1", "copy-2", "copy-3", "four", "five", "six", "seven", "eight", "nine", "grandchild"];
/// In which order they end; the parent in between.
const ENDS: [&str; 11] =
    ["copy-2", "nine", "copy-1", "five", PARENT, "grandchild", "six", "four", "eight", "copy-3", "seven"];

/// What the guest keeps in memory: a table of keys, 1 MiB that is checked all the time, and a file that grows.
const WORKLOAD: [&str; 4] = [
    "dmesg -n 1; mkdir /run/kv && for key in $(seq 300); do echo \"value $key of the parent\" > /run/kv/$key; done",
    "head -c 1048576 /dev/urandom > /run/blob && md5sum < /run/blob > /run/sum && echo the disk of the parent > /dev/vda",
    "(while md5sum < /run/blob | cmp -s - /run/sum; do sleep 3; done; echo > /run/broken) & true",
    "(while echo >> /run/n; do sleep 1; done) & true",
];

/// Sums over every value of the table, as the parent has it.
const TABLE: &str = "cat /run/kv/* | md5sum";

/// A guest with 2 vCPUs is forked ten times while it works: all eleven answer with the parent's data, diverge, and are killed
/// in a mixed order; then exactly the frames are free that were before anything ran.
pub fn live_forks_answer_diverge_and_end(context: &Context) -> Result<()> {
    let before = free_before_anything_ran(context)?;
    let mut machine = start(context, "live_forks_answer_diverge_and_end")?;
    let mut owner = Owner { told: Listener::attach(machine.control()?, PARENT)?, asked: 0 };
    owner.told.done(Op::Resume { vm: PARENT.into() })?;
    owner.told.hear(initrd::READY)?;
    for command in WORKLOAD {
        owner.ask(command)?;
    }
    let table = owner.ask(TABLE)?;
    refusals(&mut owner)?;
    owner.told.done(Op::Fork { vm: PARENT.into(), name: "copy".into(), count: Some(3) })?;
    for name in &COPIES[3..9] {
        owner.ask("wc -l < /run/n")?;
        owner.told.done(Op::Fork { vm: PARENT.into(), name: (*name).into(), count: None })?;
    }
    owner.told.done(Op::Fork { vm: "copy-2".into(), name: COPIES[9].into(), count: None })?;
    let mut generations = HashSet::new();
    for name in [PARENT].into_iter().chain(COPIES) {
        owner.told.expect_running(name)?;
        owner.told.turn_to(name)?;
        ensure!(generations.insert(goes_on_and_diverges(&mut owner, name, &table)?), "{name}: a generation twice");
    }
    for name in COPIES.into_iter().chain([PARENT]) {
        owner.told.turn_to(name)?;
        has_its_own(&mut owner, name)?;
    }
    paused_parents_have_paused_children(&mut owner)?;
    for name in ENDS {
        owner.told.done(Op::Kill { vm: name.into() })?;
    }
    owner.expect_free(before)?;
    owner.told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

/// The machine of this test; nothing in it runs yet.
fn start(context: &Context, name: &str) -> Result<super::machine::Machine> {
    let builder = Builder::new(context, name)?;
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    let kernel = context.guest.kernel()?;
    let mut parent = linux(PARENT, &kernel, &initrd);
    parent.memory = "256M".into();
    parent.vcpus = Some(2);
    parent.disks.push(disk(&builder.file("disk.img", &[0; 1 << 20])?));
    let mut vms = vec![parent, linux(WITNESS, &kernel, &initrd)];
    vms.iter_mut().for_each(|vm| vm.autostart = Some(false));
    builder.boot(vms)
}

/// Free frames of the same machine when its parent was killed before its first instruction.
fn free_before_anything_ran(context: &Context) -> Result<u64> {
    let mut machine = start(context, "live_forks_answer_diverge_and_end-before")?;
    let mut told = Listener::attach(machine.control()?, PARENT)?;
    told.done(Op::Kill { vm: PARENT.into() })?;
    let free = told.stats(WITNESS)?.free_frames;
    told.done(Op::Shutdown)?;
    machine.expect_power_off().map(|_| free)
}

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

    /// Frames that a grace period keeps come back with the host's next work: each question is some.
    fn expect_free(&mut self, wanted: u64) -> Result<()> {
        const QUESTIONS: usize = 200;
        let mut free = 0;
        for _ in 0..QUESTIONS {
            free = self.told.stats(WITNESS)?.free_frames;
            if free == wanted {
                return Ok(());
            }
        }
        bail!("{wanted} frames were free before anything ran, {free} are after everything was killed")
    }
}

/// What cannot be: nothing is made, and the field is named.
fn refusals(owner: &mut Owner) -> Result<()> {
    let fork = |vm: &'static str, name: &'static str, count| Op::Fork { vm: vm.into(), name: name.into(), count };
    owner.told.refused(fork("nobody", "x", None), Code::NoSuchVm)?;
    owner.told.refused(fork(PARENT, WITNESS, None), Code::BadField)?;
    owner.told.refused(fork(PARENT, "Upper", None), Code::BadField)?;
    owner.told.refused(fork(PARENT, "", None), Code::BadField)?;
    owner.told.refused(fork(PARENT, "x", Some(0)), Code::BadField)?;
    owner.told.refused(fork(PARENT, "x", Some(63)), Code::BadField)?;
    owner.told.refused(fork(PARENT, "a-name-that-is-just-short-enoughh", Some(10)), Code::BadField)
}

/// A machine has the parent's memory and disk, works on, and changes both. Returns its generation.
fn goes_on_and_diverges(owner: &mut Owner, name: &str, table: &str) -> Result<String> {
    ensure!(owner.ask(TABLE)? == table, "{name}: the table is not the parent's");
    ensure!(owner.ask("test ! -e /run/broken && md5sum < /run/blob | cmp - /run/sum && echo same")? == "same");
    ensure!(owner.ask("head -n 1 /dev/vda")? == "the disk of the parent", "{name}: the disk is not the parent's");
    owner.ask(&format!("echo {name} > /run/kv/7 && echo {name} | dd of=/dev/vda conv=fsync 2>/dev/null"))?;
    owner.ask(&format!("yes {name} | head -c 524288 > /run/own && md5sum < /run/own > /run/ownsum"))?;
    // It goes on: otherwise this never ends, and the machine is reported to make no progress.
    owner.ask("lines=$(wc -l < /run/n); while [ $(wc -l < /run/n) = $lines ]; do sleep 1; done")?;
    owner.ask("devmem 0x90d0000 64; devmem 0x90d0008 64")
}

/// After all have changed what they share, each finds what it has written itself.
fn has_its_own(owner: &mut Owner, name: &str) -> Result<()> {
    let own = owner.ask("cat /run/kv/7; echo 3 > /proc/sys/vm/drop_caches; head -n 1 /dev/vda")?;
    ensure!(own.lines().eq([name; 2]), "{name}: finds {own:?}");
    let same = "test ! -e /run/broken && md5sum < /run/blob | cmp - /run/sum && md5sum < /run/own | cmp - /run/ownsum";
    ensure!(owner.ask(&format!("{same} && echo same"))? == "same", "{name}: its memory has changed");
    Ok(())
}

/// A copy of a paused machine is paused for the same reason, runs when it is resumed, and its name is free again after it.
fn paused_parents_have_paused_children(owner: &mut Owner) -> Result<()> {
    let fork = Op::Fork { vm: "copy-1".into(), name: "sleeper".into(), count: None };
    for _ in 0..2 {
        owner.told.done(Op::Pause { vm: "copy-1".into() })?;
        owner.told.done(fork.clone())?;
        let row = owner.told.row("sleeper")?;
        ensure!((row.state, row.reason.as_deref()) == (State::Paused, Some("Owner")), "ps says {row:?}");
        owner.told.done(Op::Resume { vm: "copy-1".into() })?;
        owner.told.done(Op::Resume { vm: "sleeper".into() })?;
        owner.told.turn_to("sleeper")?;
        ensure!(owner.ask("cat /run/kv/7")? == "copy-1", "the copy of a paused machine has not its memory");
        owner.told.turn_to("copy-1")?;
        owner.told.done(Op::Kill { vm: "sleeper".into() })?;
    }
    Ok(())
}

/// Rounds of the guest `stale`, each with a fork.
const ROUNDS: usize = 6;

/// A guest that looks at every byte with its MMU off, Non-cacheable and Cacheable, before and after forks and the copies on
/// write that follow, in the original and in each copy, finds what is new.
pub fn changed_memory_is_never_stale(context: &Context) -> Result<()> {
    let kernel = guests::flat("stale")?.to_string_lossy().into_owned();
    let policies = WrittenPolicies { services: true, on_guest_reset: OnReset::Stop, ..WrittenPolicies::default() };
    let vm = WrittenVm {
        name: "stale".to_owned(),
        memory: "128M".into(),
        kernel,
        cmdline: format!("rounds={ROUNDS}"),
        policies,
        ..WrittenVm::default()
    };
    let mut machine = Builder::new(context, "changed_memory_is_never_stale")?.boot(vec![vm])?;
    machine.expect(&format!("ALL PASS {ROUNDS}"))?;
    let log = machine.expect_power_off()?;
    let well = log.lines().filter(|line| line.contains("vm stale-") && line.contains(": powered off")).count();
    ensure!(!log.contains("FAIL") && well == ROUNDS, "{well} of {ROUNDS} copies ended well");
    Ok(())
}
