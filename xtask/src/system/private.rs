//! Private memory: absent from the hypervisor's own mapping whatever the guest does, and zero for whoever comes next.

use anyhow::{Result, bail, ensure};
use entresol_wire::config::{Arch, Console, PrivateIo, WrittenMemory, WrittenRom, WrittenVm};
use entresol_wire::control::{Answer, Audit, Op, State};

use super::Context;
use super::control::Listener;
use super::machine::Builder;
use super::owner::Owner;
use super::snapshot::{STILL_RIGHT, WORKLOAD};
use super::store::create;
use crate::bundle::{disk, linux, program};
use crate::guests;
use crate::initrd::{self, Initrd};

/// Audits while the guest works its disk and its console.
const AUDITS: u32 = 1000;
/// Pages that Linux's rings lie in, at most: a queue of 256 has three, and there are one for the disk, two for the console, and one
/// for randomness. They are leased as long as the queues work.
const RINGS: u64 = 4 * 3;
/// Frames that are leased of a Linux guest, at most: those, and the page with its records of stolen time.
const LEASED: u64 = RINGS + 1;
/// Exception class of a data abort taken from EL2 itself (Arm DDI 0487 D24.2.40).
const DATA_ABORT_SAME_LEVEL: u64 = 0x25;
/// Error code of a page fault of a supervisor's read where no entry is present (APM volume 2, 8.4.2).
const NOT_PRESENT: u64 = 0;

/// A page of Linux, wherever it puts itself: its loader wrote it.
const fn kernel_page(arch: Arch) -> u64 {
    match arch {
        Arch::Arm64 => 0x4020_0000,
        Arch::X86 => 0x0100_0000,
    }
}

/// Disk and console under load until it is told to stop.
const LOAD: &str = "(while test ! -e /run/stop; do dd if=/dev/vda bs=64k count=64 2>/dev/null | md5sum; \
     head -c 2097152 /dev/urandom | dd of=/dev/vda bs=64k seek=64 conv=fsync 2>/dev/null; \
     echo 3 > /proc/sys/vm/drop_caches; done; echo > /run/stopped) > /dev/console & true";

pub(super) fn private(mut vm: WrittenVm, size: &str) -> WrittenVm {
    vm.memory = WrittenMemory { size: size.to_owned(), private: true, ..Default::default() };
    vm
}

/// Linux with private memory works, and at no moment is a frame of it mapped; a stray read of one faults, is told, and harms
/// nobody; a killed machine leaves zeroes, to private and to other machines.
pub fn private_memory_is_nowhere_else(context: &Context) -> Result<()> {
    nowhere_else(context, "private_memory_is_nowhere_else", Arch::Arm64)
}

/// The same on x86-64.
pub fn x86_private_memory_is_nowhere_else(context: &Context) -> Result<()> {
    nowhere_else(context, "x86_private_memory_is_nowhere_else", Arch::X86)
}

fn nowhere_else(context: &Context, name: &str, arch: Arch) -> Result<()> {
    let builder = Builder::new(context, name)?.on(arch).outer("1G", 2);
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    let mut secret = private(builder.linux("secret", &initrd)?, "384M");
    secret.vcpus = Some(2);
    secret.disks.push(disk(&builder.file("disk.img", &[0xd5; 16 << 20])?));
    let toucher = match arch {
        Arch::Arm64 => guests::flat("toucher")?,
        Arch::X86 => guests::x86("guest-x86-toucher")?,
    };
    let victim = private(program("victim", &toucher, "mib=240 seed=5 hold"), "384M");
    let mut heir = program("heir", &toucher, "mib=240 seed=6 zero hold");
    heir.memory = "384M".into();
    let mut last = private(program("last", &toucher, "mib=240 seed=7 zero hold"), "384M");
    (heir.autostart, last.autostart) = (Some(false), Some(false));
    let mut machine = builder.boot(vec![secret, victim, heir, last])?;
    machine.expect(initrd::READY)?;
    machine.shell(LOAD)?;
    let mut owner = Owner::of(&mut machine)?;
    let (mut most, mut leased) = (0, 0);
    for _ in 0..AUDITS {
        let audit = owner.audit()?;
        ensure!(audit.leased <= LEASED && audit.wrong + audit.stuck == 0, "private frames are mapped: {audit:?}");
        leased = leased.max(audit.leased);
        most = most.max(audit.pages);
    }
    // The disk's three, and the records.
    ensure!(leased > 3, "at most {leased} frames were ever leased: rings or records are not remembered");
    ensure!(most > (240 << 8), "only {most} pages of private memory were ever seen");

    let probe = owner.probe("secret", kernel_page(arch))?;
    let met = probe.fault.map(|fault| (fault.syndrome, fault.address >> 12));
    let is_absent = |syndrome: u64| match arch {
        Arch::Arm64 => syndrome >> 26 == DATA_ABORT_SAME_LEVEL,
        Arch::X86 => syndrome == NOT_PRESENT,
    };
    let stopped = met.is_some_and(|(syndrome, page)| is_absent(syndrome) && page == probe.frame);
    ensure!(probe.private && stopped, "a stray read met {probe:x?}");
    machine.shell("touch /run/stop; while test ! -e /run/stopped; do sleep 1; done; dmesg | tail -n 1")?;

    let before = owner.audit()?;
    // Ctrl-] and the number of who comes.
    for (ends, comes, key) in [("victim", "heir", b"\x1d3"), ("heir", "last", b"\x1d4")] {
        owner.kill(ends)?;
        owner.resume(comes)?;
        machine.send(key)?;
        machine.expect("CLEAN 240 MiB")?;
        machine.expect("VERIFIED 240 MiB")?;
    }
    let after = owner.audit()?;
    ensure!(after.pages > 0 && before.pages > 0, "{before:?}, then {after:?}");
    owner.shutdown()?;
    machine.expect_power_off().map(drop)
}

/// Audits of a machine whose devices bounce.
const BOUNCE_AUDITS: u32 = 200;
/// Where its devices reach, in pages: the 128 MiB below 2 GiB.
const WINDOW: core::ops::Range<u64> = 0x78000..0x80000;
/// Pages of the buffers that Linux makes.
const BUFFERS: u64 = 64 << 8;

/// Linux whose devices reach nothing but a window of its private memory: rings and buffers lie there by what the device tree says, the
/// disk works, and what is mapped is the window and nothing else.
pub fn private_memory_bounces(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "private_memory_bounces")?.outer("2G", 2);
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    let mut secret = private(linux("secret", &context.guest.kernel()?, &initrd), "1280M");
    secret.memory.io = PrivateIo::Bounce;
    secret.vcpus = Some(2);
    secret.disks.push(disk(&builder.file("disk.img", &[0xd5; 16 << 20])?));
    let mut machine = builder.boot(vec![secret])?;
    machine.expect(initrd::READY)?;
    // "software IO TLB: mapped [mem 0x…-0x…] (64MB)"
    let buffers = machine.shell("dmesg | sed -n 's/.*software IO TLB: mapped .mem \\(0x[0-9a-f]*\\)-.*/\\1/p'")?;
    let first = u64::from_str_radix(buffers.trim().trim_start_matches("0x"), 16)?;
    let last = (first >> 12) + BUFFERS - 1;
    ensure!(
        WINDOW.contains(&(first >> 12)) && WINDOW.contains(&last),
        "Linux has its buffers at {first:#x}, outside the window"
    );
    let md5 = machine.shell("dd if=/dev/vda bs=64k 2>/dev/null | md5sum")?;
    machine.shell(LOAD)?;
    let mut owner = Owner::of(&mut machine)?;
    let window = WINDOW.end - WINDOW.start;
    let mut most = 0;
    for _ in 0..BOUNCE_AUDITS {
        let audit = owner.audit()?;
        ensure!(audit.wrong + audit.stuck == 0 && audit.leased <= LEASED, "private frames are mapped: {audit:?}");
        ensure!(audit.open <= window, "more is shared than the window: {audit:?}");
        most = most.max(audit.open);
    }
    ensure!(most > 0, "nothing of the window was ever touched");
    let probe = owner.probe("secret", kernel_page(Arch::Arm64))?;
    ensure!(probe.private && probe.fault.is_some(), "a stray read met {probe:x?}");
    machine.shell("touch /run/stop; while test ! -e /run/stopped; do sleep 1; done")?;
    let own = "head -c 1048576 /dev/urandom > /run/own; dd if=/run/own of=/dev/vda bs=64k conv=fsync 2>/dev/null; \
         echo 3 > /proc/sys/vm/drop_caches; head -c 1048576 /dev/vda | cmp - /run/own && echo same";
    let same = machine.shell(own)?;
    // The kernel says that it dropped its caches.
    ensure!(same.lines().last() == Some("same") && !md5.is_empty(), "the disk returned something else: {same:?}");
    owner.shutdown()?;
    machine.expect_power_off().map(drop)
}

/// Questions until what waits for a grace period is back.
const QUESTIONS: usize = 200;
/// How often the page with the records changes.
const CHANGES: u32 = 300;
/// Audits meanwhile.
const AUDITS_OF_CHANGES: u32 = 50;

/// Eight vCPUs on two CPUs, their records of stolen time in one private page, which is shared, taken back and given back all the time:
/// no time goes back, nothing is mapped that should not be, and no lease is left.
pub fn stolen_time_meets_conversions(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "stolen_time_meets_conversions")?.outer("1G", 2);
    let records = guests::flat("records")?;
    let mut vm = private(program("records", &records, &format!("rounds={CHANGES}")), "64M");
    vm.vcpus = Some(8);
    vm.policies.services = true;
    // Somebody must be left when it has ended.
    let mut witness = private(program("witness", &guests::flat("toucher")?, "mib=8 seed=5 hold"), "64M");
    witness.policies.console = Some(Console::Background);
    let mut machine = builder.boot(vec![vm, witness])?;
    machine.expect("RECORDS in one page")?;
    let mut owner = Owner::of(&mut machine)?;
    for _ in 0..AUDITS_OF_CHANGES {
        // What was given back counts as it was until it has been zeroed.
        let audit = owner.audit()?;
        ensure!(audit.wrong + audit.stuck == 0, "{audit:?}");
    }
    machine.expect("ALL PASS")?;
    // It powers itself off next, and its frames come back with the host's next work: each question is some.
    let mut left = owner.audit()?;
    for _ in 0..QUESTIONS {
        if owner.row("records")?.state == State::Stopped && left.leased + left.open == 0 {
            break;
        }
        left = owner.audit()?;
    }
    owner.expect_state("records", State::Stopped, Some("PowerOff"))?;
    ensure!(left.wrong + left.stuck + left.leased + left.open == 0, "it has ended, and left {left:?}");
    owner.shutdown()?;
    machine.expect_power_off().map(drop)
}

/// What the first sector of the disk is full of.
const SECTOR_BYTE: u8 = 0xa7;
/// Where its ROM is.
const ROM: u64 = 0x0700_0000;
/// Two guests with private memory whose rings lie where they should not: across pages, in no memory, in devices and ROM, in pages out
/// of a device's reach, in pages that are converted, given back and left. One has devices that reach a window only. A device of each
/// asks for a reset where it must, works after it, and leaves no lease.
pub fn rings_lie_where_they_should_not(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "rings_lie_where_they_should_not")?.outer("2G", 2);
    let rings = guests::flat("rings")?;
    let image = builder.file("disk.img", &[SECTOR_BYTE; 1 << 16])?;
    let rom = builder.file("rom.img", &[0; 4096])?.to_string_lossy().into_owned();
    let guest = |name: &str, size: &str, arguments: &str| {
        let cmdline = format!("byte={SECTOR_BYTE} rom={ROM:#x} {arguments}");
        let mut vm = private(program(name, &rings, &cmdline), size);
        vm.policies.services = true;
        vm.disks.push(disk(&image));
        vm.roms.push(WrittenRom { file: rom.clone(), at: ROM as i64 });
        vm
    };
    let lease = guest("lease", "64M", "");
    let mut bounce = guest("bounce", "1280M", &format!("window={:#x}", WINDOW.start << 12));
    bounce.memory.io = PrivateIo::Bounce;
    bounce.autostart = Some(false);
    let mut machine = builder.boot(vec![lease, bounce])?;
    machine.expect("ALL PASS")?;
    machine.expect("RINGS idle")?;
    let mut owner = Owner::of(&mut machine)?;
    owner.resume("bounce")?;
    // Ctrl-] and the number of who comes.
    machine.send(b"\x1d2")?;
    machine.expect("ALL PASS")?;
    machine.expect("RINGS idle")?;
    let mut left = owner.audit()?;
    for _ in 0..QUESTIONS {
        if left.leased == 0 {
            break;
        }
        left = owner.audit()?;
    }
    ensure!(left.leased + left.wrong + left.stuck == 0 && left.open > 0, "no queue works, and left is {left:?}");
    owner.shutdown()?;
    machine.expect_power_off().map(drop)
}

/// Who forks and is saved, its copy, and who is made from the file.
const FAMILY: [&str; 3] = ["secret", "copy", "back"];

/// Blocks that private machines which work take out of the hypervisor's mapping, at least.
const MANY: u64 = 32;

/// Nothing is where it should not be, and what is there of private machines.
fn audited(told: &mut Listener) -> Result<Audit> {
    match told.ask(Op::Audit)? {
        Answer::Audit(audit) if audit.wrong + audit.stuck == 0 => Ok(audit),
        other => bail!("the audit found {other:?}"),
    }
}

/// Waits until so many frames of private memory are mapped because their pages are shared: those that were given back are among
/// them until the host's next work, and each question is some.
fn shared_are(told: &mut Listener, wanted: u64, when: &str) -> Result<()> {
    let mut found = audited(told)?;
    for _ in 0..QUESTIONS {
        if found.open == wanted {
            return Ok(());
        }
        found = audited(told)?;
    }
    bail!("{when}: {wanted} pages should be shared: {found:?}")
}

/// Who shares pages, its copy, and those that are made from its two files.
const SHARER: &str = "sharer";
const TWIN: &str = "twin";
const OLD: &str = "old";
const NEW: &str = "new";
/// Pages that the guest shares at first, and after it was told `n`; and those of the second kind that it did not share at first.
const FIRST: u64 = 33;
const SECOND: u64 = 24;
const ADDED: u64 = 8;

/// What a machine has shared is shared by its copies, and by those that are made from its files, whole and different ones; they convert
/// pages on their own from then on.
fn conversions_are_kept(told: &mut Listener) -> Result<()> {
    let turn = |told: &mut Listener, name: &'static str, letter: &str, answer: &str| {
        told.turn_to(name)?;
        told.type_line(letter)?;
        told.hear(answer)
    };
    let next = format!("SHARED {SECOND}");
    told.turn_to(SHARER)?;
    told.done(Op::Resume { vm: SHARER.into() })?;
    told.hear(&format!("SHARED {FIRST}"))?;
    shared_are(told, FIRST, "it has begun")?;
    told.done(Op::Fork { vm: SHARER.into(), name: TWIN.into(), count: None })?;
    turn(told, TWIN, "n", &next)?;
    // What both share is in one frame; what the copy takes back is in one of its own.
    shared_are(told, FIRST + ADDED, "its copy has converted")?;
    turn(told, TWIN, "v", "SAME 64")?;
    told.done(Op::Kill { vm: TWIN.into() })?;
    shared_are(told, FIRST, "its copy has ended")?;

    told.done(Op::Snapshot { vm: SHARER.into(), file: "first".into(), base: None })?;
    turn(told, SHARER, "n", &next)?;
    told.done(Op::Snapshot { vm: SHARER.into(), file: "second".into(), base: Some("first".into()) })?;
    turn(told, SHARER, "v", "SAME 64")?;
    shared_are(told, SECOND, "it has converted")?;
    told.done(Op::Kill { vm: SHARER.into() })?;
    shared_are(told, 0, "it has ended")?;

    for (file, name, shared) in [("first", OLD, FIRST - 1), ("second", NEW, SECOND)] {
        told.done(Op::Restore { file: file.into(), name: Some(name.into()) })?;
        // The page with the records is a fresh one, and shared when it is touched.
        shared_are(told, shared, name)?;
        turn(told, name, "t", "TOUCHED")?;
        shared_are(told, if name == OLD { FIRST } else { SECOND }, name)?;
        turn(told, name, "v", "SAME 64")?;
        turn(told, name, "n", &next)?;
        turn(told, name, "v", "SAME 64")?;
        told.done(Op::Kill { vm: name.into() })?;
        shared_are(told, 0, "it has ended")?;
    }
    Ok(())
}

/// A private machine that works is forked, saved, and made again from the file. All have its data, write their own, and go on;
/// each is private; when they have ended nothing of them is left, and the hypervisor's mapping is put together again. Another one's shared pages are kept by all of that.
pub fn private_machines_fork_and_are_saved(context: &Context) -> Result<()> {
    const NAME: &str = "private_machines_fork_and_are_saved";
    let builder = Builder::new(context, NAME)?.outer("2G", 2);
    let store = builder.file("store.img", &[])?;
    create(&store, 1 << 30)?;
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    let guest = |name: &str| {
        let vm = linux(name, &context.guest.kernel()?, &initrd);
        anyhow::Ok(WrittenVm { vcpus: Some(2), autostart: Some(false), ..private(vm, "256M") })
    };
    let [first, copy, back] = FAMILY;
    let mut vm = guest(first)?;
    vm.disks.push(disk(&builder.file("disk.img", &[0; 1 << 20])?));
    let mut sharer = private(program(SHARER, &guests::flat("sharer")?, ""), "64M");
    sharer.policies.services = true;
    sharer.autostart = Some(false);
    // Somebody must be left when all of them have ended.
    let mut machine = builder.store(&store).boot(vec![vm, sharer, guest("witness")?])?;
    machine.expect("store: 0 files")?;
    let (mut told, mut asked) = (Listener::attach(machine.control()?, first)?, 0);
    let built = audited(&mut told)?;
    told.done(Op::Resume { vm: first.into() })?;
    told.hear(initrd::READY)?;
    let mut ask = |told: &mut Listener, command: &str| {
        asked += 1;
        told.shell(asked, command)
    };
    for command in WORKLOAD {
        ask(&mut told, command)?;
    }
    let alone = audited(&mut told)?;
    told.done(Op::Fork { vm: first.into(), name: copy.into(), count: None })?;
    told.done(Op::Snapshot { vm: first.into(), file: "one".into(), base: None })?;
    told.done(Op::Restore { file: "one".into(), name: Some(back.into()) })?;
    for name in FAMILY {
        told.turn_to(name)?;
        ensure!(ask(&mut told, STILL_RIGHT)? == "100", "{name}: its memory is another");
        ask(&mut told, &format!("for key in $(seq 100); do echo {name} > /run/kv/$key; done"))?;
    }
    for name in FAMILY {
        told.turn_to(name)?;
        let own = ask(&mut told, "sort -u /run/kv/*; md5sum < /run/blob | cmp - /run/sum && echo same")?;
        ensure!(own.lines().eq([name, "same"]), "{name}: finds {own:?}");
    }
    let all = audited(&mut told)?;
    ensure!(
        all.leased <= LEASED * FAMILY.len() as u64 && all.pages > 2 * alone.pages,
        "{alone:?} of one, {all:?} of three"
    );
    ensure!(
        all.own_absent > built.own_absent + MANY && all.own_blocks + MANY < built.own_blocks,
        "{built:?} before any had run, {all:?} with three"
    );
    for name in FAMILY {
        told.done(Op::Kill { vm: name.into() })?;
    }
    // What left the hypervisor's mapping in blocks is blocks again.
    let is_over = |left: &Audit| left.leased == 0 && left.pages < built.pages && left.own_blocks >= built.own_blocks;
    // Frames that a grace period keeps come back with the host's next work: each question is some.
    let mut left = audited(&mut told)?;
    for _ in 0..QUESTIONS {
        if is_over(&left) {
            break;
        }
        left = audited(&mut told)?;
    }
    ensure!(is_over(&left), "of ended machines {left:?} is left, and before any had run there was {built:?}");
    conversions_are_kept(&mut told)?;
    told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}
