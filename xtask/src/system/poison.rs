//! Frames that turn out to be bad: who has one is aborted where it is, everybody goes on, and no frame of them comes back.

use anyhow::{Context as _, Result, bail, ensure};
use entresol_cli::client::ClientError;
use entresol_wire::config::{Console, WrittenVm};
use entresol_wire::control::{Answer, Audit, Code, Op, Poisoned};

use super::Context;
use super::control::Listener;
use super::machine::{Builder, Machine};
use super::private::private;
use super::store::create;
use crate::bundle::program;
use crate::guests;

/// Machines with bad pages: ordinary, its copy, private; those that are as they and never run; and who knows of nothing.
const PLAIN: &str = "plain";
const COPY: &str = "copy";
const SECRET: &str = "secret";
const TWINS: [&str; 2] = ["plain-twin", "secret-twin"];
const BYSTANDER: &str = "bystander";
/// Pages that each guest watches.
const PAGES: u64 = 24;
/// Those whose frames are found to be bad: the odd ones are given back by their guests.
const BAD: [u64; 9] = [0, 1, 2, 3, 7, 8, 13, 22, 23];
/// What the guests find of them in the end.
const FOUND: &str = "good 15 bad 4 anew 5 ESR 0x96000010";
/// Private pages that are found to be bad.
const PRIVATE_BAD: [u64; 4] = [4, 5, 11, 20];
const PRIVATE_FOUND: &str = "good 20 bad 2 anew 2 ESR 0x96000010";
/// Questions until what waits for a grace period is back.
const QUESTIONS: usize = 20_000;
/// Equal answers in a row after which nothing more comes back: each question has the host do some of its work.
const STEADY: usize = 100;

const PAGE: u64 = 4096;

fn watcher(name: &str) -> Result<WrittenVm> {
    let mut vm = program(name, &guests::flat("poisoned")?, &format!("pages={PAGES}"));
    vm.memory = "64M".into();
    vm.autostart = Some(false);
    vm.policies.services = true;
    vm.policies.console = Some(Console::Background);
    Ok(vm)
}

fn start(context: &Context) -> Result<Machine> {
    let builder = Builder::new(context, "poisoned_page_aborts_and_rest_goes_on")?.outer("512M", 2);
    let mut bystander = program(BYSTANDER, &guests::flat("toucher")?, "mib=8 seed=3 hold");
    bystander.memory = "64M".into();
    let store = builder.file("store.img", &[])?;
    create(&store, 1 << 30)?;
    let mut vms = vec![bystander];
    for (name, twin) in [PLAIN, SECRET].into_iter().zip(TWINS) {
        for name in [name, twin] {
            let vm = watcher(name)?;
            vms.push(if twin == TWINS[1] { private(vm, "64M") } else { vm });
        }
    }
    builder.store(&store).boot(vms)
}

/// What the owner of the machine asks.
struct Owner(Listener);

impl Owner {
    /// The frame behind the page is bad.
    fn poison(&mut self, vm: &str, gpa: u64) -> Result<Poisoned> {
        match self.0.ask(Op::Poison { vm: vm.into(), gpa })? {
            Answer::Poisoned(poisoned) => Ok(poisoned),
            other => bail!("poison is answered with {other:?}"),
        }
    }

    fn refused(&mut self, vm: &str, gpa: u64) -> Result<()> {
        self.0.refused(Op::Poison { vm: vm.to_owned().into(), gpa }, Code::BadField)
    }

    /// A snapshot is refused for its bad page, and for nothing else.
    fn no_snapshot(&mut self, vm: &str) -> Result<()> {
        let snapshot = Op::Snapshot { vm: vm.to_owned().into(), file: "one".into(), base: None };
        let answer = self.0.ask(snapshot);
        let refused = answer.as_ref().err().and_then(|error| error.downcast_ref());
        match refused {
            Some(ClientError::Refused(error))
                if error.code == Code::StoreFailed && error.message.contains("is poisoned") =>
            {
                Ok(())
            }
            _ => bail!("a snapshot with a bad page should be refused, but: {answer:?}"),
        }
    }

    fn audit(&mut self) -> Result<Audit> {
        match self.0.ask(Op::Audit)? {
            Answer::Audit(audit) if audit.wrong + audit.stuck == 0 => Ok(audit),
            other => bail!("the audit found {other:?}"),
        }
    }

    fn free(&mut self) -> Result<u64> {
        Ok(self.0.stats(BYSTANDER)?.free_frames)
    }

    fn kill(&mut self, vm: &str) -> Result<()> {
        self.0.done(Op::Kill { vm: vm.to_owned().into() })
    }

    /// Starts a watcher; where its pages are.
    fn resume(&mut self, vm: &'static str) -> Result<u64> {
        self.0.turn_to(vm)?;
        self.0.done(Op::Resume { vm: vm.into() })?;
        self.0.hear(&format!("PAGES {PAGES} at 0x"))?;
        let base = self.0.line()?;
        let base = u64::from_str_radix(base.trim(), 16).with_context(|| format!("{base:?} is no address"))?;
        self.0.hear(&format!("good {PAGES} bad 0 anew 0"))?;
        Ok(base)
    }
}

/// Nine frames of a guest and its copy, and four of a private guest, are found to be bad: each aborts where it has them, with the right
/// syndrome, gives every second one back and goes on; another guest notices nothing; a snapshot with a bad page is refused; when all have
/// ended, the bad frames are missing, and nothing else is.
pub fn poisoned_page_aborts_and_rest_goes_on(context: &Context) -> Result<()> {
    let mut machine = start(context)?;
    // While the directory of the store is read, a frame is its buffer: it would be missing from what is counted first.
    machine.expect("store: 0 files")?;
    machine.expect("VERIFIED 8 MiB")?;
    let mut owner = Owner(Listener::attach(machine.control()?, BYSTANDER)?);
    let before = owner.audit()?;
    ensure!(before.poisoned == 0, "{before:?}");
    // A machine that never ran gives back what building it took; blocks go between private memory and the rest.
    let built = settled(&mut owner, |_| true)?;
    for twin in TWINS {
        owner.kill(twin)?;
    }
    let ended = settled(&mut owner, |free| free > built)?;
    let wanted = ended + (ended - built) - BAD.len() as u64;
    let plain = owner.resume(PLAIN)?;
    owner.0.done(Op::Fork { vm: PLAIN.into(), name: COPY.into(), count: None })?;
    bad_pages_of_relatives(&mut owner, plain)?;
    let secret = owner.resume(SECRET)?;
    private_bad_pages(&mut owner, secret)?;
    owner.0.turn_to(BYSTANDER)?;
    owner.0.hear("VERIFIED 8 MiB")?;
    owner.0.hear("VERIFIED 8 MiB")?;
    for vm in [COPY, PLAIN, SECRET] {
        owner.kill(vm)?;
    }
    settled(&mut owner, |free| free == wanted)
        .with_context(|| format!("free frames: {built} at first, {ended} without the twins, {wanted} wanted"))?;
    let after = owner.audit()?;
    let all = (BAD.len() + PRIVATE_BAD.len()) as u64;
    ensure!(after.poisoned == all && after.pages == 0 && after.leased + after.open == 0, "{after:?}");
    // Blocks with a bad frame stay private memory's, and all of them absent.
    ensure!(after.private == 512 * after.own_absent && after.own_absent > 0, "{after:?}");
    owner.0.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

/// Asks until the frames that are free, or private memory's, are as expected and stay so: what a grace period keeps comes back with the
/// host's next work.
fn settled(owner: &mut Owner, expected: impl Fn(u64) -> bool) -> Result<u64> {
    let (mut last, mut equal) = (None, 0);
    for _ in 0..QUESTIONS {
        let found = (owner.free()?, owner.audit()?);
        let free = found.0 + found.1.private;
        equal = if last == Some(found) { equal + 1 } else { 0 };
        if expected(free) && equal == STEADY {
            return Ok(free);
        }
        equal = equal.min(STEADY - 1);
        last = Some(found);
    }
    bail!("the free frames are not what they should be: {last:?}")
}

fn bad_pages_of_relatives(owner: &mut Owner, base: u64) -> Result<()> {
    let mut frames = Vec::new();
    for (number, page) in BAD.iter().enumerate() {
        // By the one and the other: the frames are shared.
        let vm = if number.is_multiple_of(2) { PLAIN } else { COPY };
        let poisoned = owner.poison(vm, base + page * PAGE + 8 * *page)?;
        ensure!(!poisoned.private && !frames.contains(&poisoned.frame), "{poisoned:?} beside {frames:?}");
        frames.push(poisoned.frame);
        let audit = owner.audit()?;
        ensure!(audit.poisoned == frames.len() as u64, "{audit:?} with {frames:x?}");
    }
    owner.0.hear(FOUND)?;
    owner.0.turn_to(COPY)?;
    owner.0.hear(FOUND)?;
    for vm in [PLAIN, COPY] {
        let stats = owner.0.stats(vm)?;
        // Each for a load, a store and a fetch at least.
        let least = 3 * BAD.len() as u64;
        ensure!(stats.faults.poisoned >= least && stats.poisoned_frames == BAD.len() as u64, "{vm}: {stats:?}");
        owner.0.expect_running(vm)?;
    }
    owner.no_snapshot(PLAIN)?;
    // Bad still, never touched, no memory, no address.
    for gpa in [base, base + (8 << 20), 0x0a00_0000, 0x3000_0000, u64::MAX] {
        owner.refused(PLAIN, gpa)?;
    }
    owner.0.refused(Op::Poison { vm: "nobody".into(), gpa: base }, Code::NoSuchVm)?;
    ensure!(owner.audit()?.poisoned == BAD.len() as u64, "a refusal made a frame bad");
    Ok(())
}

fn private_bad_pages(owner: &mut Owner, base: u64) -> Result<()> {
    let before = owner.audit()?;
    for page in PRIVATE_BAD {
        let poisoned = owner.poison(SECRET, base + page * PAGE)?;
        ensure!(poisoned.private, "{poisoned:?}");
    }
    owner.0.hear(PRIVATE_FOUND)?;
    let audit = owner.audit()?;
    ensure!(audit.poisoned == before.poisoned + PRIVATE_BAD.len() as u64 && audit.leased == 0, "{audit:?}");
    Ok(())
}
