//! Live forks of a Linux guest in which a store in memory (Redis) works under load: every copy goes on with the same data and
//! disk, and is a machine of its own.

use std::collections::HashSet;

use anyhow::{Result, bail, ensure};
use entresol_wire::config::{Arch, OnReset, WrittenPolicies, WrittenVm};
use entresol_wire::control::{Code, Op, State};

use super::Context;
use super::control::Listener;
use super::machine::Builder;
use crate::bundle::disk;
use crate::fetch::{self, programs::REDIS};
use crate::guests;
use crate::initrd::{self, Initrd};

/// Who is forked.
const PARENT: &str = "store";
/// Who only waits, so that the machine stays on and says how many frames are free.
const WITNESS: &str = "witness";
/// The copies, in the order in which they are made: [`AT_ONCE`] of them at once, one by one, and at last one of a copy.
const fn copies(arch: Arch) -> &'static [&'static str] {
    match arch {
        Arch::Arm64 => &["copy-1", "copy-2", "copy-3", "four", "five", "six", "seven", "eight", "nine", "grandchild"],
        // Fewer show the same of what both architectures share.
        Arch::X86 => &["copy-1", "copy-2", "copy-3", "four", "grandchild"],
    }
}
const AT_ONCE: usize = 3;
/// Decides in which order they end; another number is another order.
const SEED: u64 = 7;

/// The client of the guest's store.
macro_rules! ask_store {
    ($command:literal) => {
        concat!("redis-cli --raw -s /run/redis ", $command)
    };
}

/// What works in the guest: the store with a table of keys, a client that counts in it, another that compares what it is
/// answered, two that ask as fast as they can, and a file of 1 MiB that is checked all the time.
const WORKLOAD: [&str; 7] = [
    "dmesg -n 1; cd /run; redis-server --port 0 --unixsocket /run/redis --save '' --daemonize yes --logfile /run/log",
    concat!("until ", ask_store!("ping"), "; do sleep 1; done"),
    concat!("for key in $(seq 300); do echo set item:$key value:$key:of:the:parent; done | ", ask_store!("| sort -u")),
    "head -c 1048576 /dev/urandom > /run/blob && md5sum < /run/blob > /run/sum && echo the disk of the parent > /dev/vda",
    "(while md5sum < /run/blob | cmp -s - /run/sum; do sleep 5; done; echo > /run/broken) & true",
    concat!(
        "(n=0; while n=$((n + 1)) && [ \"$(printf 'set mine %s\\nget mine\\n' $n | ",
        ask_store!("| tr -d '\\n')\" = OK$n ]; do sleep 5; done; echo > /run/broken) & true"),
    ),
    // In a copy the fast ones end with their hundred: all machines share two CPUs that are emulated themselves.
    concat!(
        "(",
        ask_store!("-r -1 -i 0.5 incr counted > /dev/null) & "),
        "(own=$(devmem $generation 64); while [ $(devmem $generation 64) = $own -a ! -e /run/calm ]; ",
        "do redis-benchmark -q -s /run/redis -c 2 -n 100 -r 500 -t set,get > /dev/null || echo > /run/broken; done; ",
        "echo > /run/calm) & true"
    ),
];

/// Sums over every value of the table, as the parent has it.
const TABLE: &str = concat!(ask_store!("mget $(for key in $(seq 300); do echo item:$key; done) | md5sum"));
/// Waits until those who ask as fast as they can have ended: the store goes on, and so do who counts and who compares.
const CALM: &str = "until [ -e /run/calm ]; do sleep 1; done";

/// A guest is forked, ten times on arm64, while its store is under load: all answer with the parent's data, diverge, and are killed in an
/// order that a seed decides; then exactly the frames are free that were before anything ran.
pub fn live_forks_answer_diverge_and_end(context: &Context) -> Result<()> {
    answer_diverge_and_end(context, "live_forks_answer_diverge_and_end", Arch::Arm64)
}

/// The same on x86-64.
pub fn x86_live_forks_answer_diverge_and_end(context: &Context) -> Result<()> {
    answer_diverge_and_end(context, "x86_live_forks_answer_diverge_and_end", Arch::X86)
}

fn answer_diverge_and_end(context: &Context, name: &str, arch: Arch) -> Result<()> {
    let before = free_before_anything_ran(context, name, arch)?;
    let mut machine = start(context, name, arch)?;
    let mut owner = Owner { told: Listener::attach(machine.control()?, PARENT)?, asked: 0 };
    owner.told.done(Op::Resume { vm: PARENT.into() })?;
    owner.told.hear(initrd::READY)?;
    owner.ask(&format!("generation={:#x}", generation_page(arch)))?;
    for command in WORKLOAD {
        owner.ask(command)?;
    }
    let table = owner.ask(TABLE)?;
    refusals(&mut owner)?;
    let copies = copies(arch);
    let Some((grandchild, children)) = copies.split_last() else { bail!("no copies") };
    owner.told.done(Op::Fork { vm: PARENT.into(), name: "copy".into(), count: Some(AT_ONCE as u32) })?;
    for name in &children[AT_ONCE..] {
        owner.ask(ask_store!("get counted"))?;
        owner.told.done(Op::Fork { vm: PARENT.into(), name: (*name).into(), count: None })?;
    }
    owner.told.done(Op::Fork { vm: "copy-2".into(), name: (*grandchild).into(), count: None })?;
    owner.ask("test ! -e /run/calm && echo > /run/calm")?;
    let mut generations = HashSet::new();
    for name in [PARENT].into_iter().chain(copies.iter().copied()) {
        owner.told.expect_running(name)?;
        owner.told.turn_to(name)?;
        owner.ask(CALM)?;
        ensure!(generations.insert(goes_on_and_diverges(&mut owner, name, &table)?), "{name}: a generation twice");
    }
    for name in copies.iter().copied().chain([PARENT]) {
        owner.told.turn_to(name)?;
        has_its_own(&mut owner, name)?;
    }
    paused_parents_have_paused_children(&mut owner)?;
    let ends = in_an_order_of(SEED, copies);
    println!("    they end in the order of seed {SEED}: {}", ends.join(", "));
    for name in ends {
        owner.told.done(Op::Kill { vm: name.into() })?;
    }
    owner.expect_free(before)?;
    owner.told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

/// Where a guest finds its machine's generation.
fn generation_page(arch: Arch) -> u64 {
    match arch {
        Arch::Arm64 => 0x90d_0000,
        // Behind the 32 virtio transports.
        Arch::X86 => 0xd000_4000,
    }
}

/// The machine of this test; nothing in it runs yet.
fn start(context: &Context, name: &str, arch: Arch) -> Result<super::machine::Machine> {
    let builder = Builder::new(context, name)?.on(arch);
    let redis = fetch::programs(REDIS, arch)?.files()?;
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive().with(redis))?;
    let mut parent = builder.linux(PARENT, &initrd)?;
    parent.memory = "256M".into();
    parent.vcpus = Some(2);
    parent.disks.push(disk(&builder.file("disk.img", &[0; 1 << 20])?));
    let mut vms = vec![parent, builder.linux(WITNESS, &initrd)?];
    vms.iter_mut().for_each(|vm| vm.autostart = Some(false));
    builder.boot(vms)
}

/// Free frames of the same machine when its parent was killed before its first instruction.
fn free_before_anything_ran(context: &Context, name: &str, arch: Arch) -> Result<u64> {
    let mut machine = start(context, &format!("{name}-before"), arch)?;
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

/// Parent and copies, in an order that `seed` decides.
fn in_an_order_of(seed: u64, copies: &[&'static str]) -> Vec<&'static str> {
    let mut names: Vec<_> = copies.iter().copied().chain([PARENT]).collect();
    let mut state = seed;
    for last in (1..names.len()).rev() {
        // Knuth's generator of 64 bits: the upper half is well mixed.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        names.swap(last, (state >> 33) as usize % (last + 1));
    }
    names
}

/// A machine has the parent's data, memory and disk, works on, and changes all of it. Returns its generation.
fn goes_on_and_diverges(owner: &mut Owner, name: &str, table: &str) -> Result<String> {
    let get = ask_store!("get counted");
    owner.ask(&format!("before=$({get})"))?;
    ensure!(owner.ask(TABLE)? == table, "{name}: the table is not the parent's");
    ensure!(owner.ask("test ! -e /run/broken && md5sum < /run/blob | cmp - /run/sum && echo same")? == "same");
    ensure!(owner.ask("head -n 1 /dev/vda")? == "the disk of the parent", "{name}: the disk is not the parent's");
    let set = concat!(ask_store!("set item:7 "));
    owner.ask(&format!("{set}{name} && echo {name} | dd of=/dev/vda conv=fsync 2>/dev/null"))?;
    // Some 100 KiB, made by the shell alone.
    let set = ask_store!("-x set own");
    owner.ask(&format!(
        "own={name}.; for i in $(seq 14); do own=$own$own; done; printf $own | {set} && echo $own > /run/own"
    ))?;
    // It counts on: otherwise this never ends, and the machine is reported to make no progress.
    owner.ask(&format!("while [ \"$({get})\" = \"$before\" ]; do sleep 1; done"))?;
    owner.ask("devmem $generation 64; devmem $((generation + 8)) 64")
}

/// After all have changed what they share, each finds what it has written itself.
fn has_its_own(owner: &mut Owner, name: &str) -> Result<()> {
    let get = ask_store!("get item:7");
    let own = owner.ask(&format!("{get}; echo 3 > /proc/sys/vm/drop_caches; head -n 1 /dev/vda"))?;
    ensure!(own.lines().eq([name; 2]), "{name}: finds {own:?}");
    let same = "test ! -e /run/broken && md5sum < /run/blob | cmp - /run/sum";
    let own = concat!(ask_store!("get own | cmp - /run/own"));
    ensure!(owner.ask(&format!("{same} && {own} && echo same"))? == "same", "{name}: its memory has changed");
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
        ensure!(owner.ask(ask_store!("get item:7"))? == "copy-1", "the copy of a paused machine has not its memory");
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
