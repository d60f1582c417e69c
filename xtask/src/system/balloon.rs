//! A Linux guest's memory balloon: free pages go back by themselves, more when its owner asks, and come again.

use anyhow::{Context as _, Result, bail, ensure};
use entresol_wire::config::WrittenVm;
use entresol_wire::control::{Balloon, Code, Op, Stats};

use super::Context;
use super::control::Listener;
use super::machine::{Builder, Machine};
use crate::bundle::linux;
use crate::initrd::{self, Initrd};

/// Who has a balloon and works.
const GUEST: &str = "guest";
/// The same, and never runs: what it takes is what the other took before it ran.
const TWIN: &str = "twin";
/// Its copy.
const COPY: &str = "copy";
/// Who has no balloon, and only keeps the machine on.
const WITNESS: &str = "witness";

const MIB: u64 = 1 << 20;
/// Frames of a MiB.
const FRAMES: u64 = MIB >> 12;
/// MiB that the guest has.
const MEMORY: u64 = 384;
/// MiB that it writes and deletes.
const WRITTEN: u64 = 150;
/// Questions until a guest has done something that takes it seconds; it works or sleeps a second of its own before each.
const QUESTIONS: usize = 150;

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

    /// Asks for counts until `found` likes them; the attached guest lives a second of its own between two questions.
    fn until(&mut self, vm: &str, what: &str, found: impl Fn(&Stats<'_>, &Balloon<'_>) -> bool) -> Result<u64> {
        let mut last = Stats::default();
        for _ in 0..QUESTIONS {
            last = self.told.stats(vm)?;
            let balloon = last.balloon.as_ref().context("it has a balloon")?;
            if found(&last, balloon) {
                return Ok(last.resident_frames);
            }
            self.ask("sleep 1")?;
        }
        bail!("{vm}: {what} does not come: {} frames, {:?}", last.resident_frames, last.balloon)
    }

    fn set(&mut self, vm: &str, mib: u64) -> Result<()> {
        self.told.done(Op::Balloon { vm: vm.to_owned().into(), size: mib * MIB })
    }

    /// Waits until the balloon of the attached guest has `mib`; it has no frames for these then.
    fn filled(&mut self, vm: &str, mib: u64) -> Result<()> {
        let resident = self.until(vm, "the balloon's size", |_, balloon| balloon.actual == mib * FRAMES)?;
        let most = (MEMORY - mib) * FRAMES;
        ensure!(resident <= most, "{vm}: {resident} frames with {mib} MiB in the balloon, which leaves {most}");
        Ok(())
    }

    /// The file that was written first holds what it did, and what is written now does, too.
    fn memory_works(&mut self) -> Result<()> {
        self.ask("md5sum < /run/kept | cmp - /run/kept.sum")?;
        self.ask("copies=; for n in $(seq 25); do copies=\"$copies /run/kept\"; done; cat $copies > /run/new")?;
        self.ask("cat $copies | cmp - /run/new && rm /run/new").map(drop)
    }
}

/// What a guest deleted comes back by its reports; a balloon takes more and gives it back; a copy has the parent's balloon and
/// its own memory; in the end exactly the frames are free that were.
pub fn balloon_gives_memory_back(context: &Context) -> Result<()> {
    let mut machine = start(context)?;
    let mut owner = Owner { told: Listener::attach(machine.control()?, GUEST)?, asked: 0 };
    refusals(&mut owner)?;
    let built = owner.told.stats(WITNESS)?.free_frames;
    owner.told.done(Op::Kill { vm: TWIN.into() })?;
    let before = owner.told.stats(WITNESS)?.free_frames;
    let (taken, before) = (before - built, before + (before - built));
    ensure!(taken > 0, "a machine that was built has a kernel in its memory");
    owner.told.done(Op::Resume { vm: GUEST.into() })?;
    owner.told.hear(initrd::READY)?;
    owner.ask("dmesg -n 1; head -c 4194304 /dev/urandom > /run/kept && md5sum < /run/kept > /run/kept.sum")?;
    reports_give_back_what_was_deleted(&mut owner)?;
    owner.set(GUEST, 200)?;
    owner.filled(GUEST, 200)?;
    the_guest_tells_of_itself(&mut owner)?;
    owner.set(GUEST, 0)?;
    owner.filled(GUEST, 0)?;
    owner.memory_works()?;
    a_copy_has_a_balloon_of_its_own(&mut owner)?;
    for vm in [GUEST, COPY] {
        owner.told.done(Op::Kill { vm: vm.into() })?;
    }
    expect_free(&mut owner, before)?;
    owner.told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

fn start(context: &Context) -> Result<Machine> {
    let builder = Builder::new(context, "balloon_gives_memory_back")?;
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    let kernel = context.guest.kernel()?;
    let vm = |name: &str, balloon| {
        let vm = linux(name, &kernel, &initrd);
        WrittenVm { memory: format!("{MEMORY}M").into(), vcpus: Some(2), autostart: Some(false), balloon, ..vm }
    };
    builder.boot(vec![vm(GUEST, true), vm(TWIN, true), vm(WITNESS, false)])
}

fn refusals(owner: &mut Owner) -> Result<()> {
    let balloon = |vm: &'static str, size| Op::Balloon { vm: vm.into(), size };
    owner.told.refused(balloon(WITNESS, 0), Code::BadField)?;
    owner.told.refused(balloon(GUEST, 4095), Code::BadField)?;
    owner.told.refused(balloon(GUEST, (MEMORY + 1) * MIB), Code::BadField)?;
    owner.told.refused(balloon("nobody", 0), Code::NoSuchVm)
}

fn reports_give_back_what_was_deleted(owner: &mut Owner) -> Result<()> {
    owner.ask(&format!("dd if=/dev/zero of=/run/big bs=1M count={WRITTEN}"))?;
    let full = owner.told.stats(GUEST)?.resident_frames;
    ensure!(full > WRITTEN * FRAMES, "{full} frames hold {WRITTEN} MiB");
    owner.ask("rm /run/big")?;
    // Pieces of free memory below 2 MiB are not reported.
    let less = full - WRITTEN * FRAMES * 9 / 10;
    owner.until(GUEST, "reported memory", |stats, balloon| {
        stats.resident_frames <= less && balloon.reported >= full - less
    })?;
    owner.ask("md5sum < /run/kept | cmp - /run/kept.sum").map(drop)
}

/// Statistics that the guest keeps come with a later question, and are those of a guest without its balloon's memory.
fn the_guest_tells_of_itself(owner: &mut Owner) -> Result<()> {
    let told = |balloon: &Balloon<'_>, name: &str| balloon.guest.get(name).copied().unwrap_or(u64::MAX);
    let first = owner.told.stats(GUEST)?.balloon.context("it has a balloon")?.updates;
    owner.until(GUEST, "the guest's statistics", |_, balloon| {
        balloon.updates > first + 1 && told(balloon, "free-memory") < (MEMORY - 200) * MIB
    })?;
    let balloon = owner.told.stats(GUEST)?.balloon.context("it has a balloon")?;
    ensure!(balloon.refused == 0 && balloon.kept == 0, "a good driver names its own memory: {balloon:?}");
    ensure!(told(&balloon, "total-memory") <= MEMORY * MIB, "{balloon:?}");
    Ok(())
}

fn a_copy_has_a_balloon_of_its_own(owner: &mut Owner) -> Result<()> {
    owner.set(GUEST, 100)?;
    owner.filled(GUEST, 100)?;
    owner.told.done(Op::Fork { vm: GUEST.into(), name: COPY.into(), count: None })?;
    owner.told.turn_to(COPY)?;
    let balloon = owner.told.stats(COPY)?.balloon.context("it has a balloon")?;
    ensure!((balloon.target, balloon.actual) == (100 * FRAMES, 100 * FRAMES), "the copy has {balloon:?}");
    owner.set(COPY, 0)?;
    owner.until(COPY, "an empty balloon", |_, balloon| balloon.actual == 0)?;
    owner.memory_works()?;
    owner.told.turn_to(GUEST)?;
    owner.filled(GUEST, 100)?;
    owner.ask("md5sum < /run/kept | cmp - /run/kept.sum").map(drop)
}

/// Frames that a grace period keeps come back with the host's next work: each question is some.
fn expect_free(owner: &mut Owner, wanted: u64) -> Result<()> {
    let mut free = 0;
    for _ in 0..QUESTIONS {
        free = owner.told.stats(WITNESS)?.free_frames;
        if free == wanted {
            return Ok(());
        }
    }
    bail!("{free} frames are free after everything was killed, not {wanted}")
}
