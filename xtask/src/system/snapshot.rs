//! Snapshots of a Linux guest that works: files that outlive the machine, whatever happens to it, and guests made from them.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use entresol_cli::client::ClientError;
use entresol_wire::config::Arch;
use entresol_wire::control::{Code, Op, State};
use entresol_wire::snapshot::Trailer;
use entresol_wire::store::{AREA_BYTES, BLOCK, Directory, File};

use super::Context;
use super::control::Listener;
use super::machine::{Builder, Machine};
use super::store::{create, files};
use crate::bundle::disk;
use crate::initrd::{self, Initrd};

/// Questions until something that must happen does not.
const QUESTIONS: usize = 100_000;
/// Who is saved.
const GUEST: &str = "worker";

/// What it keeps in memory and on its disk: a table, 1 MiB with its sum, and a file that grows.
pub(super) const WORKLOAD: [&str; 3] = [
    "dmesg -n 1; mkdir /run/kv && for key in $(seq 100); do echo \"value $key\" > /run/kv/$key; done",
    "head -c 1048576 /dev/urandom > /run/blob && md5sum < /run/blob > /run/sum && echo first > /dev/vda && sync",
    "(while echo >> /run/n; do sleep 1; done) & true",
];

/// It answers with its data, and goes on.
pub(super) const STILL_RIGHT: &str = "md5sum < /run/blob | cmp - /run/sum && cat /run/kv/* | wc -l && \
     lines=$(wc -l < /run/n); while [ $(wc -l < /run/n) = $lines ]; do sleep 1; done";

struct Owner {
    told: Listener,
    asked: u32,
}

impl Owner {
    fn ask(&mut self, command: &str) -> Result<String> {
        self.asked += 1;
        self.told.shell(self.asked, command)
    }

    fn snapshot(&mut self, file: &'static str, base: Option<&'static str>) -> Result<()> {
        self.told.done(Op::Snapshot { vm: GUEST.into(), file: file.into(), base: base.map(Into::into) })
    }

    fn expect_right(&mut self, vm: &str, words: &str) -> Result<()> {
        ensure!(self.ask(STILL_RIGHT)? == "100", "{vm}: its memory is another");
        let own = self.ask("cat /run/own; echo 3 > /proc/sys/vm/drop_caches; head -n 1 /dev/vda")?;
        ensure!(own.lines().eq([words; 2]), "{vm}: finds {own:?}, not {words:?} twice");
        Ok(())
    }

    fn change(&mut self, words: &str) -> Result<()> {
        self.ask(&format!("echo {words} > /run/own && echo {words} | dd of=/dev/vda conv=fsync 2>/dev/null")).map(drop)
    }
}

fn boot(context: &Context, name: &str, arch: Arch, store: &Path) -> Result<Machine> {
    let builder = Builder::new(context, name)?.on(arch);
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    let mut guest = builder.linux(GUEST, &initrd)?;
    guest.memory = "256M".into();
    guest.vcpus = Some(2);
    guest.disks.push(disk(&builder.file("disk.img", &[0; 1 << 20])?));
    guest.autostart = Some(false);
    builder.store(store).boot(vec![guest])
}

/// A guest is saved, changed, and saved as a difference; the machine is killed while the second file is written again. On the
/// next machine both are whole; a guest made from the second has all of its data and goes on; damage and what else cannot be
/// is refused. That machine is killed too, later in a file, and the third has what the second had.
pub fn snapshots_outlive_the_machine(context: &Context) -> Result<()> {
    outlive_the_machine(context, "snapshots_outlive_the_machine", Arch::Arm64)
}

/// The same on x86-64.
pub fn x86_snapshots_outlive_the_machine(context: &Context) -> Result<()> {
    outlive_the_machine(context, "x86_snapshots_outlive_the_machine", Arch::X86)
}

fn outlive_the_machine(context: &Context, name: &str, arch: Arch) -> Result<()> {
    let store = Builder::new(context, name)?.file("store.img", &[])?;
    create(&store, 1 << 30)?;
    saved_and_killed(boot(context, name, arch, &store)?)?;
    let mut machine = boot(context, &format!("{name}-again"), arch, &store)?;
    let mut owner = Owner { told: Listener::attach(machine.control()?, GUEST)?, asked: 0 };
    machine.expect("store: 2 files")?;
    restored(&mut machine, &mut owner, &store)?;
    owner.told.begin(Op::Snapshot { vm: "last".into(), file: "four".into(), base: None })?;
    machine.expect("snapshot four: 12288 pages so far")?;
    drop(machine);
    let mut machine = boot(context, &format!("{name}-third"), arch, &store)?;
    let mut owner = Owner { told: Listener::attach(machine.control()?, GUEST)?, asked: 0 };
    machine.expect("store: 3 files")?;
    owner.told.done(Op::Restore { file: "four".into(), name: Some("third".into()) })?;
    owner.told.turn_to("third")?;
    owner.expect_right("third", "fourth")?;
    owner.told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

/// The first machine, until its end.
fn saved_and_killed(mut machine: Machine) -> Result<()> {
    let mut owner = Owner { told: Listener::attach(machine.control()?, GUEST)?, asked: 0 };
    owner.told.done(Op::Resume { vm: GUEST.into() })?;
    owner.told.hear(initrd::READY)?;
    for command in WORKLOAD {
        owner.ask(command)?;
    }
    owner.change("first")?;
    owner
        .told
        .refused(Op::Snapshot { vm: GUEST.into(), file: "one".into(), base: Some("none".into()) }, Code::StoreFailed)?;
    owner.told.refused(Op::Snapshot { vm: GUEST.into(), file: "a/b".into(), base: None }, Code::BadField)?;
    owner.snapshot("one", None)?;
    owner.expect_right(GUEST, "first")?;
    owner.change("second")?;
    owner.snapshot("two", Some("one"))?;
    owner.expect_right(GUEST, "second")?;
    let rows = files(&mut owner.told)?.rows;
    let [one, two] = &rows[..] else { bail!("the store has {rows:?}") };
    ensure!(two.base.as_deref() == Some("one") && two.length * 2 < one.length, "a difference is small: {rows:?}");
    // The base is no image of this machine's any more, the other's is needed, and a file is not its own base.
    let again = |file: &'static str, base: &'static str| Op::Snapshot {
        vm: GUEST.into(),
        file: file.into(),
        base: Some(base.into()),
    };
    owner.told.refused(again("three", "one"), Code::BadField)?;
    owner.told.refused(again("two", "two"), Code::StoreFailed)?;
    owner.told.refused(Op::RemoveFile { file: "one".into() }, Code::StoreFailed)?;
    owner.change("third")?;
    owner.told.begin(Op::Snapshot { vm: GUEST.into(), file: "two".into(), base: None })?;
    machine.expect("snapshot two: 4096 pages so far")?;
    // Its drop kills it.
    drop(machine);
    Ok(())
}

/// The second machine.
fn restored(machine: &mut Machine, owner: &mut Owner, store: &Path) -> Result<()> {
    let restore = |file: &'static str, name: &'static str| Op::Restore { file: file.into(), name: Some(name.into()) };
    owner.told.refused(restore("three", "x"), Code::StoreFailed)?;
    owner.told.refused(Op::Restore { file: "two".into(), name: None }, Code::BadField)?;
    owner.told.done(restore("two", "back"))?;
    machine.expect("restore two: back runs")?;
    owner.told.turn_to("back")?;
    owner.expect_right("back", "second")?;
    // Its own next difference, and one more machine from all three files.
    owner.change("fourth")?;
    owner.told.done(Op::Snapshot { vm: "back".into(), file: "four".into(), base: Some("two".into()) })?;
    let rows = files(&mut owner.told)?.rows;
    let size = |name: &str| rows.iter().find(|row| row.name == name).map_or(0, |row| row.length);
    ensure!(size("four") * 4 < size("one"), "what was only read since is no difference: {rows:?}");
    machine.expect("restore two: all of its memory is read")?;
    owner.told.done(restore("four", "last"))?;
    owner.told.turn_to("last")?;
    owner.expect_right("last", "fourth")?;
    owner.told.turn_to("back")?;
    owner.expect_right("back", "fourth")?;
    machine.expect("restore four: all of its memory is read")?;
    damaged(owner, store, &restore)
}

/// A file whose trailer is another makes no machine. One whose pages are others makes one that stops where it touches them,
/// and goes on when they are what they were.
fn damaged(owner: &mut Owner, store: &Path, restore: &dyn Fn(&'static str, &'static str) -> Op<'static>) -> Result<()> {
    let image = OpenOptions::new().read(true).write(true).open(store).context("cannot open the store")?;
    let mut areas = [vec![0; AREA_BYTES], vec![0; AREA_BYTES]];
    for (index, area) in areas.iter_mut().enumerate() {
        image.read_exact_at(area, (index * AREA_BYTES) as u64)?;
    }
    let directory = Directory::newest([&areas[0], &areas[1]], image.metadata()?.len() / BLOCK)?;
    let file = directory.file("one")?;
    let last = file.blocks() - 1;
    let mut trailer = [0; BLOCK as usize];
    image.read_exact_at(&mut trailer, block_at(file, last)? * BLOCK)?;
    // Memory comes before disks, which are read before the machine runs.
    let pages = Trailer::decode(&trailer, file.blocks())?.pages / 2;
    turn_bits(&image, file, last..last + 1)?;
    owner.told.refused(restore("one", "x"), Code::StoreFailed)?;
    turn_bits(&image, file, last..last + 1)?;
    turn_bits(&image, file, 0..pages)?;
    owner.told.done(restore("one", "x"))?;
    stopped(&mut owner.told, "x")?;
    owner.told.refused(Op::RemoveFile { file: "one".into() }, Code::WrongState)?;
    turn_bits(&image, file, 0..pages)?;
    owner.told.done(Op::Resume { vm: "x".into() })?;
    owner.told.turn_to("x")?;
    owner.expect_right("x", "first")
}

/// Where block `block` of `file` lies.
fn block_at(file: &File, block: u64) -> Result<u64> {
    Ok(file.place(block).context("a block is nowhere")?.0)
}

/// One bit of each of these blocks of `file` becomes another, or what it was.
fn turn_bits(image: &std::fs::File, file: &File, blocks: std::ops::Range<u64>) -> Result<()> {
    for block in blocks {
        let at = block_at(file, block)? * BLOCK + 5;
        let mut byte = [0];
        image.read_exact_at(&mut byte, at)?;
        image.write_all_at(&[byte[0] ^ 1], at)?;
    }
    Ok(())
}

/// Asks until the virtual machine waits for a store; each question is some of the host's work.
fn stopped(told: &mut Listener, vm: &str) -> Result<()> {
    for _ in 0..QUESTIONS {
        if told.row(vm)?.state == State::Paused {
            return Ok(());
        }
    }
    bail!("{vm} goes on with pages that are not what was written")
}

/// A store that has no room, and one that is not there: a reason, the guest goes on, the store is as it was.
pub fn a_full_store_harms_nobody(context: &Context) -> Result<()> {
    full_store_harms_nobody(context, "a_full_store_harms_nobody", Arch::Arm64)
}

/// The same on x86-64.
pub fn x86_a_full_store_harms_nobody(context: &Context) -> Result<()> {
    full_store_harms_nobody(context, "x86_a_full_store_harms_nobody", Arch::X86)
}

fn full_store_harms_nobody(context: &Context, name: &str, arch: Arch) -> Result<()> {
    let store: PathBuf = Builder::new(context, name)?.file("store.img", &[])?;
    create(&store, 16 << 20)?;
    let mut machine = boot(context, name, arch, &store)?;
    let mut owner = Owner { told: Listener::attach(machine.control()?, GUEST)?, asked: 0 };
    owner.told.done(Op::Resume { vm: GUEST.into() })?;
    owner.told.hear(initrd::READY)?;
    for command in WORKLOAD {
        owner.ask(command)?;
    }
    owner.change("first")?;
    let before = files(&mut owner.told)?;
    for _ in 0..2 {
        match owner.told.ask(Op::Snapshot { vm: GUEST.into(), file: "one".into(), base: None }) {
            Err(error) if is_full(&error) => {}
            other => bail!("the store should be full, but: {other:?}"),
        }
        owner.expect_right(GUEST, "first")?;
        ensure!(files(&mut owner.told)? == before, "the store has changed");
    }
    owner.told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

fn is_full(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Refused(error)) => {
            error.code == Code::StoreFailed && error.message.starts_with("the store is full")
        }
        _ => false,
    }
}
