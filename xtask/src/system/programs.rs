//! The programs of `tests/guests` on the hypervisor: each tests one side of it from inside and says what it found.

use std::time::Duration;

use anyhow::{Result, ensure};
use entresol_wire::config::{LargestEntry, UnclaimedMmio, WrittenRom, WrittenVm};
use entresol_wire::control::{State, Stats};

use super::Context;
use super::machine::Builder;
use super::owner::Owner;
use crate::bundle::{linux, program};
use crate::guests;
use crate::initrd::{self, Initrd};

/// How long a guest that prints for ever is waited for.
const TALKATIVE: Duration = Duration::from_secs(400);

/// Boots one program alone; it must report that everything passed, and power off. Returns the log.
fn passes(context: &Context, name: &str, vm: WrittenVm) -> Result<String> {
    let mut machine = Builder::new(context, name)?.boot(vec![vm])?;
    machine.expect("ALL PASS")?;
    let log = machine.expect_power_off()?;
    let failed: Vec<&str> =
        log.lines().filter(|line| line.starts_with("FAIL") || line.contains("GUEST STOPPED")).collect();
    ensure!(failed.is_empty(), "{name}: {}", failed.join("; "));
    Ok(log)
}

/// MMU off and on, memory of every type, set/way, code that changes: with blocks, and with pages.
pub fn memory_is_right_through_every_mapping(context: &Context) -> Result<()> {
    for (name, largest) in [("mmu_blocks", LargestEntry::Block2M), ("mmu_pages", LargestEntry::Page4K)] {
        let mut vm = program("mmu", &guests::flat("mmu")?, "");
        vm.memory = "128M".into();
        vm.vcpus = Some(2);
        vm.policies.page_size = largest;
        passes(context, name, vm)?;
    }
    Ok(())
}

/// The same where the second stage cannot force write-back: maintenance by set/way cleans all memory once, and again when the
/// caches go off and on after it, whatever else the guest does.
pub fn caches_without_forced_write_back_are_cleaned(context: &Context) -> Result<()> {
    let mut vm = program("mmu", &guests::flat("mmu")?, "");
    vm.memory = "128M".into();
    let builder = Builder::new(context, "caches_without_forced_write_back")?;
    let mut machine = builder.qemu(&["-cpu", "cortex-a76", "-M", "mte=off"]).boot(vec![vm])?;
    machine.expect("ALL PASS")?;
    let log = machine.expect_power_off()?;
    ensure!(!log.contains("FAIL"), "data was lost");
    let cleaned = "all of its memory was cleaned 3 times";
    ensure!(log.contains(cleaned), "the hypervisor does not say {cleaned:?}");
    Ok(())
}

/// Accesses outside every slot: 6 addresses, each loaded from in 5 ways and stored to in 4; fetches are not accesses.
const UNCLAIMED: u64 = 6 * (5 + 4);

/// A fetch there is an external abort; loads and stores follow the owner's policy, and are counted.
pub fn nothing_outside_the_slots_is_reached(context: &Context) -> Result<()> {
    for (name, cmdline, policy) in [
        ("abort_abort", "policy=abort", UnclaimedMmio::Abort),
        ("abort_zero", "policy=zero", UnclaimedMmio::ReadAsZero),
    ] {
        let mut vm = program("abort", &guests::flat("abort")?, cmdline);
        vm.policies.unclaimed_mmio = policy;
        let log = passes(context, name, vm)?;
        let counted = format!("{UNCLAIMED} accesses unclaimed");
        ensure!(log.contains(&counted), "{name}: the hypervisor does not report {counted:?}");
    }
    Ok(())
}

/// CPUs that come and go, the interrupt controller, the timers: more vCPUs than CPUs.
pub fn cpus_interrupts_and_timers_are_right(context: &Context) -> Result<()> {
    for name in ["smp", "gictest", "timer"] {
        let mut vm = program(name, &guests::flat(name)?, "");
        vm.vcpus = Some(4);
        passes(context, name, vm)?;
    }
    Ok(())
}

/// Entries are the pages touched, to the number: 64 MiB of pages, and of blocks.
pub fn every_touch_is_one_entry(context: &Context) -> Result<()> {
    const PAGES: u64 = 64 << 8;
    /// The program, its stack, its device tree.
    const OWN: u64 = 64;
    let kernel = guests::flat("toucher")?;
    let mut vms = [program("pages", &kernel, "mib=64 hold"), program("blocks", &kernel, "mib=64 hold")];
    vms[0].policies.page_size = LargestEntry::Page4K;
    vms.iter_mut().for_each(|vm| vm.memory = "256M".into());
    let mut machine = Builder::new(context, "every_touch_is_one_entry")?.boot(vms.into())?;
    machine.console.patience.overall = TALKATIVE;
    machine.expect("VERIFIED 64 MiB, round 2")?;
    machine.send(b"\x1dn")?;
    machine.expect("VERIFIED 64 MiB, round 2")?;
    let mut owner = Owner::of(&mut machine)?;
    let mut settled = |vm: &str| -> Result<Stats<'static>> {
        let stats = owner.stats(vm)?;
        Owner::entries_are_touches(&stats)?;
        ensure!(stats.faults.spurious + stats.faults.retry == 0, "nobody races with {vm}: {:?}", stats.faults);
        Ok(stats)
    };
    let (pages, blocks) = (settled("pages")?, settled("blocks")?);
    let entries = pages.entries;
    ensure!((entries.size_2m, entries.size_1g) == (0, 0), "blocks in spite of the policy: {entries:?}");
    ensure!((PAGES..PAGES + OWN).contains(&entries.size_4k), "{PAGES} pages were touched: {entries:?}");
    let entries = blocks.entries;
    ensure!((entries.size_4k, entries.size_1g) == (0, 0), "memory is whole blocks: {entries:?}");
    ensure!((PAGES / 512..=PAGES / 512 + 4).contains(&entries.size_2m), "{} blocks: {entries:?}", PAGES / 512);
    // Both still read all of it: what is mapped stays mapped.
    machine.expect("VERIFIED")?;
    let (before, after) = (blocks.faults, settled("blocks")?.faults);
    ensure!(
        (before.translation, before.fresh, before.populated) == (after.translation, after.fresh, after.populated),
        "reading it again faults again: {before:?}, then {after:?}"
    );
    owner.shutdown()?;
    machine.expect_power_off().map(drop)
}

/// One VM takes all the memory that there is: it waits, the others do not; with a third one's memory it goes on.
pub fn out_of_memory_pauses_who_asked(context: &Context) -> Result<()> {
    let kernel = guests::flat("toucher")?;
    let toucher = |name: &str, memory: &str, cmdline: &str| {
        let mut vm = program(name, &kernel, cmdline);
        vm.memory = memory.into();
        vm
    };
    let mut vms = vec![
        toucher("eats", "768M", "mib=560 seed=3"),
        toucher("runs", "64M", "mib=16 seed=1 hold"),
        toucher("gives", "512M", "mib=256 seed=2 hold"),
    ];
    vms[0].autostart = Some(false);
    let mut machine = Builder::new(context, "out_of_memory_pauses_who_asked")?.outer("768M", 2).boot(vms)?;
    machine.console.patience.overall = TALKATIVE;
    let mut owner = Owner::of(&mut machine)?;
    // The others have all that they will ever touch.
    for (key, size) in [(b'2', 16), (b'3', 256)] {
        machine.send(&[0x1d, key])?;
        machine.expect(&format!("VERIFIED {size} MiB, round 1"))?;
    }
    machine.send(b"\x1d1")?;
    owner.resume("eats")?;
    let paused = "vm eats: paused: OutOfMemory";
    machine.expect(paused)?;
    owner.expect_state("eats", State::Paused, Some("OutOfMemory"))?;
    owner.expect_state("runs", State::Running, None)?;
    owner.expect_state("gives", State::Running, None)?;
    // Far more than the console keeps: what is heard now is said now.
    machine.send(b"\x1d2")?;
    for _ in 0..200 {
        machine.expect("VERIFIED 16 MiB")?;
    }
    machine.send(b"\x1d1")?;
    owner.resume("eats")?;
    machine.expect(paused)?;
    owner.expect_state("eats", State::Paused, Some("OutOfMemory"))?;
    owner.kill("gives")?;
    owner.resume("eats")?;
    machine.expect("VERIFIED 560 MiB, round 1")?;
    machine.expect("vm eats: powered off")?;
    owner.expect_state("runs", State::Running, None)?;
    owner.shutdown()?;
    let log = machine.expect_power_off()?;
    ensure!(!log.contains("LOST"), "data was lost");
    Ok(())
}

/// Three guests attack, each with a seed of its own; the fourth answers all the time, and outlives them.
pub fn hostile_guests_harm_nobody(context: &Context) -> Result<()> {
    const SEEDS: [u64; 3] = [1, 0x5eed, 20_261_121];
    /// Exits that each attacker must make.
    const EXITS: u64 = 400_000;
    let builder = Builder::new(context, "hostile_guests_harm_nobody")?;
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    let mut vms = vec![linux("good", &context.guest.kernel()?, &initrd)];
    let hostile = guests::flat("hostile")?;
    let flash = builder.file("flash.img", &vec![0xff; 512 << 10])?.to_string_lossy().into_owned();
    let names = SEEDS.map(|seed| format!("seed-{seed}"));
    for (name, seed) in names.iter().zip(SEEDS) {
        let mut vm = program(name, &hostile, &format!("seed={seed}"));
        vm.vcpus = Some(2);
        // One copy of the ROM for all three, and a flash for each.
        vm.roms.push(WrittenRom { file: flash.clone(), at: 0 });
        vm.flash = Some(flash.clone());
        vms.push(vm);
    }
    let mut machine = builder.boot(vms)?;
    machine.expect(initrd::READY)?;
    let mut owner = Owner::of(&mut machine)?;
    for (round, name) in names.iter().cycle().enumerate() {
        let answer = machine.shell(&format!("echo still here {round}"))?;
        ensure!(answer == format!("still here {round}"), "it answers {answer:?}");
        owner.expect_state(name, State::Running, None)?;
        let mut least = u64::MAX;
        for name in &names {
            least = least.min(owner.stats(name)?.exits.values().sum());
        }
        if least >= EXITS {
            break;
        }
    }
    let stats = owner.stats("good")?;
    ensure!(stats.unclaimed_mmio == 0, "the good guest reached outside its devices");
    for name in &names {
        owner.kill(name)?;
        let answer = machine.shell(&format!("echo outlived {name}"))?;
        ensure!(answer == format!("outlived {name}"), "it answers {answer:?}");
    }
    machine.type_line("exit")?;
    machine.expect_power_off().map(drop)
}
