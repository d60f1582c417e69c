//! Swap: memory of a Linux guest goes to the outer machine's disk and comes back, through a fork and an error of the disk; and
//! guests that use more than there is.

use std::time::Instant;

use anyhow::{Result, bail, ensure};
use entresol_wire::config::{Arch, WrittenMemory, WrittenVm};
use entresol_wire::control::{Answer, Code, Op, State};

use super::Context;
use super::control::Listener;
use super::machine::{ANSWER, Builder, Machine};
use crate::bundle::program;
use crate::guests;
use crate::initrd::{self, Initrd};

/// Who works.
const GUEST: &str = "guest";
/// The same, and never runs: what it takes is what the other took before it ran.
const TWIN: &str = "twin";
/// Its copy.
const COPY: &str = "copy";
/// Who only keeps the machine on.
const WITNESS: &str = "witness";

const MIB: u64 = 1 << 20;
/// Frames of a MiB.
const FRAMES: u64 = MIB >> 12;
/// Bytes of the disk: room for 512 MiB, each page with a ninth sector for its tags.
const DISK: u64 = 512 * MIB / 8 * 9;
/// Readings that the hypervisor has at once.
const READINGS: u64 = 64;
/// Questions until frames that were freed have come back: each is some of the host's work.
const QUESTIONS: usize = 20_000;

/// The first read after the first write fails, once. QEMU itself reads the disk's beginning when the machine starts.
const ONE_ERROR: &str = "[set-state]\nevent = \"write_aio\"\nstate = \"1\"\nnew_state = \"2\"\n\n\
    [inject-error]\nevent = \"read_aio\"\nstate = \"2\"\nerrno = \"5\"\nonce = \"on\"\n";

/// What a guest does not use leaves and comes back the same; a read that fails pauses it, and it goes on when it is let; a copy and its
/// parent share what is out; frames are exact in the end.
pub fn swap_takes_and_brings_back(context: &Context) -> Result<()> {
    takes_and_brings_back(context, "swap_takes_and_brings_back", Arch::Arm64)
}

/// The same on x86-64.
pub fn x86_swap_takes_and_brings_back(context: &Context) -> Result<()> {
    takes_and_brings_back(context, "x86_swap_takes_and_brings_back", Arch::X86)
}

fn takes_and_brings_back(context: &Context, name: &str, arch: Arch) -> Result<()> {
    let mut machine = start(context, name, arch)?;
    machine.expect("swap: 512 MiB")?;
    let mut told = Listener::attach(machine.control()?, GUEST)?;
    refusals(&mut told)?;
    let built = told.stats(WITNESS)?.free_frames;
    told.done(Op::Kill { vm: TWIN.into() })?;
    let without = told.stats(WITNESS)?.free_frames;
    let free = without + (without - built);
    told.done(Op::Resume { vm: GUEST.into() })?;
    told.hear(initrd::READY)?;
    told.shell(
        1,
        "dmesg -n 1; dd if=/dev/urandom of=/run/kept bs=1M count=48 2> /dev/null && md5sum < /run/kept > /run/kept.sum",
    )?;
    let before = told.stats(GUEST)?;
    let left = put_out(&mut told, GUEST, 100)?;
    let after = told.stats(GUEST)?;
    ensure!(
        left > 50 * FRAMES && after.resident_frames < before.resident_frames,
        "{left} left, {before:?} became {after:?}"
    );
    // The first read fails, whenever that is.
    if told.type_through("md5sum < /run/kept | cmp - /run/kept.sum && echo \"fi\"\"ne\"", Some("Storage"))? == 0 {
        told.state(State::Paused, Some("Storage"))?;
        told.done(Op::Resume { vm: GUEST.into() })?;
    }
    told.hear("fine")?;
    let back = told.stats(GUEST)?;
    // How many are out says nothing: the other half may still be on its way.
    ensure!(back.faults.absent > after.faults.absent, "nothing came back: {back:?}");
    a_copy_shares_what_is_out(&mut told)?;
    for vm in [GUEST, COPY] {
        told.done(Op::Kill { vm: vm.into() })?;
    }
    let mut last = 0;
    for _ in 0..QUESTIONS {
        last = told.stats(WITNESS)?.free_frames;
        if last == free {
            break;
        }
    }
    ensure!(last == free, "{last} frames are free after everything was killed, not {free}");
    told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

fn start(context: &Context, name: &str, arch: Arch) -> Result<Machine> {
    let builder = Builder::new(context, name)?.on(arch);
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    let vm = |name: &str| {
        let vm = builder.linux(name, &initrd)?;
        Ok(WrittenVm { memory: "256M".into(), vcpus: Some(2), autostart: Some(false), ..vm })
    };
    let vms = [GUEST, TWIN, WITNESS].map(vm).into_iter().collect::<Result<Vec<_>>>()?;
    let image = builder.file("swap.img", &[])?;
    std::fs::File::options().write(true).open(&image)?.set_len(DISK)?;
    let rules = builder.file("errors", ONE_ERROR.as_bytes())?;
    let drive = format!(
        "file.driver=blkdebug,file.config={},file.image.driver=file,file.image.filename={},if=none,id=swap,format=raw,\
         werror=report,rerror=report",
        rules.display(),
        image.display()
    );
    let device = "virtio-blk-device,drive=swap,serial=entresol-swap";
    builder.qemu(&["-drive", &drive, "-device", device]).boot(vms)
}

/// Guests that keep tags, one of which never changes what it has, one of which always does, and one without tags: their memory leaves as often as
/// it has come back, read only or written, of copies too. Nothing is lost, no tag either; and nobody finds others' tags in fresh memory.
pub fn tags_come_back_from_the_disk(context: &Context) -> Result<()> {
    const MIBS: u64 = 16;
    let kernel = guests::flat("toucher")?;
    let vm = |name: &str, mte, merge, arguments: &str| {
        let vm = program(name, &kernel, &format!("mib={MIBS} {arguments}"));
        WrittenVm { memory: "64M".to_owned().into(), mte, merge, autostart: Some(false), ..vm }
    };
    let vms = vec![
        vm("still", true, true, "seed=1 tags zero hold"),
        vm("twin", true, true, "seed=1 tags zero hold"),
        vm("churns", true, false, "seed=2 tags zero churn"),
        vm("plain", false, false, "seed=3 zero churn"),
        vm("late", true, false, "seed=4 tags zero"),
    ];
    let builder = Builder::new(context, "tags_come_back_from_the_disk")?;
    let mut machine = with_swap(builder)?.boot(vms)?;
    let mut told = Listener::attach(machine.control()?, "still")?;
    let all = ["still", "twin", "churns", "plain"];
    for vm in all {
        told.turn_to(vm)?;
        told.done(Op::Resume { vm: vm.into() })?;
        told.hear("VERIFIED")?;
    }
    for round in 0..4 {
        if round == 2 {
            told.done(Op::Fork { vm: "churns".into(), name: COPY.into(), count: None })?;
        }
        let shares = |vm| round >= 2 && ["churns", COPY].contains(&vm);
        let running = || all.into_iter().chain((round >= 2).then_some(COPY));
        // What anybody uses who may share it stays.
        for vm in running() {
            told.done(Op::Pause { vm: vm.into() })?;
        }
        for vm in running() {
            let left = put_out(&mut told, vm, MIBS)?;
            // Blocks that a copy shares stay until they are written.
            ensure!(left > MIBS * FRAMES / 2 || shares(vm), "{left} pages of {vm} left in round {round}");
        }
        for vm in running() {
            told.done(Op::Resume { vm: vm.into() })?;
        }
        for vm in running() {
            told.turn_to(vm)?;
            // All of what it verifies comes back; one that finds something else ends, and is not to be paused again.
            let deadline = Instant::now() + ANSWER;
            while !shares(vm) && told.stats(vm)?.resident_frames < MIBS * FRAMES {
                ensure!(Instant::now() < deadline, "{vm} does not look at its memory");
            }
            for _ in 0..if shares(vm) { 3 } else { 1 } {
                told.hear("VERIFIED")?;
            }
        }
    }
    let out = told.stats("still")?;
    ensure!(out.faults.absent != 0, "it has come back too seldom: {out:?}");
    // One keeps the machine on.
    for vm in all.into_iter().filter(|vm| *vm != "plain").chain([COPY]) {
        told.done(Op::Kill { vm: vm.into() })?;
    }
    // Frames and places that others' tags were in.
    told.turn_to("late")?;
    told.done(Op::Resume { vm: "late".into() })?;
    told.hear("ALL PASS")?;
    told.done(Op::Shutdown)?;
    let log = machine.expect_power_off()?;
    let counts = log.lines().filter_map(|line| {
        let (left, unwritten) = line.split_once(" pages have left, ")?;
        let left = left.rsplit(' ').next()?.parse::<u64>().ok()?;
        Some((left, unwritten.split(' ').next()?.parse::<u64>().ok()?))
    });
    ensure!(
        counts.clone().any(|(left, unwritten)| left > MIBS * FRAMES / 2 && 10 * unwritten > 9 * left),
        "what nobody wrote is written again: {:?}",
        counts.collect::<Vec<_>>()
    );
    Ok(())
}

/// Three guests of 512 MiB, each of which works on 400 MiB, where there are about 800 MiB for all of them: memory is reclaimed unasked,
/// all of them finish, and find what they wrote, tags too where there are any.
pub fn guests_share_less_than_they_use(context: &Context) -> Result<()> {
    share_less_than_they_use(context, "guests_share_less_than_they_use", Arch::Arm64)
}

/// The same on x86-64.
pub fn x86_guests_share_less_than_they_use(context: &Context) -> Result<()> {
    share_less_than_they_use(context, "x86_guests_share_less_than_they_use", Arch::X86)
}

fn share_less_than_they_use(context: &Context, name: &str, arch: Arch) -> Result<()> {
    const ALL: [&str; 3] = ["one", "two", "three"];
    let (kernel, mte, tags) = match arch {
        Arch::Arm64 => (guests::flat("toucher")?, true, "tags"),
        Arch::X86 => (guests::x86("guest-x86-toucher")?, false, ""),
    };
    let mut vms = Vec::new();
    for (seed, name) in (1..).zip(ALL) {
        let vm = program(name, &kernel, &format!("mib=400 seed={seed} whole {tags}"));
        vms.push(WrittenVm { memory: "512M".to_owned().into(), mte, autostart: Some(false), ..vm });
    }
    vms.push(WrittenVm { autostart: Some(false), ..program(WITNESS, &kernel, "mib=1") });
    let builder = Builder::new(context, name)?.on(arch).outer("864M", 2);
    let image = builder.file("swap.img", &[])?;
    std::fs::File::options().write(true).open(&image)?.set_len(2 * DISK)?;
    let drive = format!("file={},if=none,id=swap,format=raw", image.display());
    let mut machine =
        builder.qemu(&["-drive", &drive, "-device", "virtio-blk-device,drive=swap,serial=entresol-swap"]).boot(vms)?;
    machine.expect("swap: 1024 MiB")?;
    let mut told = Listener::attach(machine.control()?, WITNESS)?;
    let free = told.stats(WITNESS)?.free_frames;
    ensure!(free < 810 * FRAMES, "{free} frames are free, which is too much for a test of too little");
    for vm in ALL {
        told.done(Op::Resume { vm: vm.into() })?;
    }
    for _ in ALL {
        machine.expect(": powered off:")?;
    }
    for key in *b"123" {
        machine.send(&[0x1d, key])?;
        machine.expect("VERIFIED 400 MiB, round 1")?;
    }
    told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

/// A guest never has more than it may, and finishes; who is to keep so much keeps it while others have more, and among them the one of
/// lower priority gives first.
pub fn limits_say_whose_memory_leaves(context: &Context) -> Result<()> {
    const MAX: u64 = 32;
    let kernel = guests::flat("toucher")?;
    let vm = |name: &str, arguments: &str, limits: &dyn Fn(&mut WrittenMemory)| {
        let mut memory = "256M".into();
        limits(&mut memory);
        WrittenVm { memory, autostart: Some(false), ..program(name, &kernel, arguments) }
    };
    let vms = vec![
        vm("bounded", "mib=96 seed=1 hold", &|memory| memory.max = Some(format!("{MAX}M"))),
        vm("kept", "mib=100 seed=2 hold", &|memory| memory.low = Some("128M".to_owned())),
        vm("dear", "mib=80 seed=3 hold", &|memory| memory.priority = Some(101)),
        vm("cheap", "mib=240 seed=4 whole", &|_| {}),
        WrittenVm { autostart: Some(false), ..program(WITNESS, &kernel, "mib=1") },
    ];
    let builder = Builder::new(context, "limits_say_whose_memory_leaves")?.outer("400M", 2);
    let mut machine = with_swap(builder)?.boot(vms)?;
    machine.expect("swap: 512 MiB")?;
    let mut told = Listener::attach(machine.control()?, "bounded")?;
    told.done(Op::Resume { vm: "bounded".into() })?;
    // In memory may be what is read at once, above what it may have.
    let most = MAX * FRAMES + READINGS;
    let (mut out, deadline) = (0, Instant::now() + ANSWER);
    while !told.has_heard("VERIFIED") {
        ensure!(Instant::now() < deadline, "bounded does not finish");
        let stats = told.stats("bounded")?;
        ensure!(stats.resident_frames <= most, "{} frames are in memory, of {most}", stats.resident_frames);
        out = out.max(stats.stored_frames);
    }
    told.done(Op::Kill { vm: "bounded".into() })?;
    ensure!(out >= (96 - MAX) * FRAMES - READINGS, "{out} frames of 96 MiB were out at most");
    // They use nothing of it any more, and keep it all the same.
    for vm in ["kept", "dear"] {
        told.turn_to(vm)?;
        told.done(Op::Resume { vm: vm.into() })?;
        told.hear("VERIFIED")?;
        told.done(Op::Pause { vm: vm.into() })?;
    }
    told.turn_to("cheap")?;
    told.done(Op::Resume { vm: "cheap".into() })?;
    told.hear("ALL PASS")?;
    let [kept, dear] = [told.stats("kept")?, told.stats("dear")?];
    ensure!((kept.stored_frames, dear.stored_frames) == (0, 0), "{kept:?} and {dear:?} were not to leave");
    told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

fn with_swap(builder: Builder<'_>) -> Result<Builder<'_>> {
    let image = builder.file("swap.img", &[])?;
    std::fs::File::options().write(true).open(&image)?.set_len(DISK)?;
    let drive = format!("file={},if=none,id=swap,format=raw", image.display());
    Ok(builder.qemu(&["-drive", &drive, "-device", "virtio-blk-device,drive=swap,serial=entresol-swap"]))
}

fn refusals(told: &mut Listener) -> Result<()> {
    let reclaim = |vm: &'static str, size| Op::Reclaim { vm: vm.into(), size };
    told.refused(reclaim(GUEST, 0), Code::BadField)?;
    told.refused(reclaim(GUEST, 4095), Code::BadField)?;
    told.refused(reclaim("nobody", 4096), Code::NoSuchVm)
}

/// Asks for `mib` of a virtual machine's memory, until no more leaves: it uses some meanwhile. Returns the frames that left.
fn put_out(told: &mut Listener, vm: &'static str, mib: u64) -> Result<u64> {
    let Answer::Count(bytes) = told.ask(Op::Reclaim { vm: vm.into(), size: mib * MIB })? else {
        bail!("a reclaim has another answer");
    };
    ensure!(bytes <= mib * MIB, "{bytes} bytes left, where {mib} MiB were to");
    Ok(bytes >> 12)
}

fn a_copy_shares_what_is_out(told: &mut Listener) -> Result<()> {
    told.done(Op::Fork { vm: GUEST.into(), name: COPY.into(), count: None })?;
    // Blocks that both share stay.
    let left = put_out(told, GUEST, 80)?;
    ensure!(left > 10 * FRAMES, "{left} frames of what a copy shares left");
    for (serial, vm) in [(10, COPY), (20, GUEST)] {
        told.turn_to(vm)?;
        told.shell(serial, "md5sum < /run/kept | cmp - /run/kept.sum")?;
        told.shell(serial + 1, "cat /run/kept > /run/more && cmp /run/more /run/kept && rm /run/more")?;
    }
    Ok(())
}
