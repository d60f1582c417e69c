//! What an unmodified Linux does with its machine: memory, disk, CPUs, devices, its own end and its next beginning.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use entresol_wire::config::{Arch, LargestEntry};
use entresol_wire::control::State;

use super::Context;
use super::machine::{Builder, Machine};
use super::owner::Owner;
use crate::bundle::{disk, linux};
use crate::initrd::{self, Initrd};

const MIB: u64 = 1 << 20;
/// Bytes of lines of 12 at the start of the disk.
const KNOWN: usize = 12 << 14;

/// 4 vCPUs on 2 CPUs write 400 MiB and a disk, and every byte is read back; the tables hold what was touched.
pub fn linux_works_its_memory_and_disk(context: &Context) -> Result<()> {
    works_its_memory_and_disk(Builder::new(context, "linux_works_its_memory_and_disk")?.outer("2G", 2))
}

/// The same on x86-64.
pub fn x86_linux_works_its_memory_and_disk(context: &Context) -> Result<()> {
    works_its_memory_and_disk(Builder::new(context, "x86_linux_works_its_memory_and_disk")?.on(Arch::X86))
}

fn works_its_memory_and_disk(builder: Builder<'_>) -> Result<()> {
    const TOUCHED: u64 = 400 * MIB;
    let mut vm = builder.linux("debian", &builder.initrd("initrd.cpio", &Initrd::interactive())?)?;
    vm.vcpus = Some(4);
    // The guest makes the same lines with `yes`.
    let mut image = b"of the disk\n".repeat(KNOWN / 12);
    image.resize(65 << 20, 0);
    vm.disks.push(disk(&builder.file("disk.img", &image)?));
    let mut machine = builder.boot(vec![vm])?;
    machine.expect(initrd::READY)?;
    let cpus = machine.shell("nproc")?;
    ensure!(cpus == "4", "nproc says {cpus:?}");
    let mut owner = Owner::of(&mut machine)?;
    let before = owner.stats("debian")?;
    ensure!(before.entries.size_2m > 0, "no 2 MiB block is in use: {:?}", before.entries);
    let mapped_before = Owner::mapped(&before);
    ensure!(mapped_before < 256 * MIB, "{mapped_before} bytes were mapped before the guest touched them");

    work_the_disk(&mut machine)?;
    work_the_memory(&mut machine, TOUCHED / MIB / 4)?;

    let after = owner.stats("debian")?;
    let mapped = Owner::mapped(&after);
    ensure!((TOUCHED..=512 * MIB).contains(&mapped), "{mapped} bytes are mapped after {TOUCHED} were touched");
    ensure!(mapped > mapped_before, "the touches mapped nothing: {mapped_before} bytes before, {mapped} after");
    Owner::entries_are_touches(&after)?;
    drop(owner);
    power_off(machine, "debian")
}

/// Known contents from the host, then 32 MiB written, dropped from the page cache and read back.
fn work_the_disk(machine: &mut Machine) -> Result<()> {
    machine.shell(&format!("yes 'of the disk' | head -c {KNOWN} > known; head -c {KNOWN} /dev/vda | cmp - known"))?;
    machine.shell("dd if=/dev/urandom of=random bs=1M count=16 2>/dev/null")?;
    machine
        .shell("(for at in 1 17; do dd if=random of=/dev/vda bs=1M seek=$at conv=fsync 2>/dev/null || exit 1; done)")?;
    machine.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    machine.shell(
        "(for at in 1 17; do dd if=/dev/vda bs=1M skip=$at count=16 2>/dev/null | cmp - random || exit 1; done)",
    )?;
    machine.shell(&format!("rm random && head -c {KNOWN} /dev/vda | cmp - known")).map(drop)
}

/// Four writers at once, each with `each` MiB and no page like another; then all of it is read back.
fn work_the_memory(machine: &mut Machine, each: u64) -> Result<()> {
    let at_once = |work: &str| format!("for n in 1 2 3 4; do ({work}) & done; wait");
    machine.shell("mkdir /fill && mount -t tmpfs -o size=430m tmpfs /fill && head -c 1048576 /dev/urandom > block")?;
    // A line before each block shifts the next, so that equal bytes never lie equally in two pages.
    let blocks = format!("for i in $(seq {each}); do echo \"block $i of writer $n\"; cat block; done");
    machine.shell(&at_once(&format!("({blocks}) | tee /fill/$n | md5sum > sum$n")))?;
    let size = machine.shell("cat /fill/[1-4] | wc -c")?;
    ensure!(size.parse::<u64>().is_ok_and(|size| size >= 4 * each * MIB), "only {size} bytes were written");
    let same = machine.shell(&at_once("md5sum < /fill/$n | cmp - sum$n && echo same"))?;
    ensure!(same.lines().filter(|line| *line == "same").count() == 4, "the memory holds something else: {same}");
    let sums = machine.shell("cat sum[1-4] | sort -u | wc -l")?;
    ensure!(sums == "4", "the writers wrote the same");
    Ok(())
}

/// A VM that waits to be started has no entry; one with 4 KiB pages gets exactly one for each page that it touches.
pub fn nothing_is_mapped_before_the_first_touch(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "nothing_is_mapped_before_the_first_touch")?.outer("2G", 2);
    let mut vm = linux("waits", &context.guest.kernel()?, &builder.initrd("initrd.cpio", &Initrd::interactive())?);
    vm.autostart = Some(false);
    vm.policies.page_size = LargestEntry::Page4K;
    let mut machine = builder.boot(vec![vm])?;
    let mut owner = Owner::of(&mut machine)?;
    owner.expect_state("waits", State::Paused, Some("NotStarted"))?;
    let before = owner.stats("waits")?;
    ensure!(Owner::mapped(&before) == 0, "entries before the first instruction: {:?}", before.entries);
    ensure!(before.faults == Default::default(), "faults before the first instruction: {:?}", before.faults);
    ensure!(before.resident_frames > 0, "the loader has written a kernel, but no frame is resident");
    owner.resume("waits")?;
    machine.expect(initrd::READY)?;
    machine.shell("dd if=/dev/zero of=fill bs=1M count=64 2>/dev/null")?;
    owner.pause("waits")?;
    let after = owner.stats("waits")?;
    let (entries, faults) = (after.entries, after.faults);
    ensure!((entries.size_2m, entries.size_1g) == (0, 0), "blocks in spite of the policy: {entries:?}");
    ensure!(Owner::mapped(&after) > 64 * MIB, "fewer entries than were touched: {entries:?}");
    // One vCPU: nobody races with it.
    ensure!(
        faults.translation == entries.size_4k && faults.fresh + faults.populated == entries.size_4k,
        "{} entries from other than as many faults: {faults:?}",
        entries.size_4k
    );
    ensure!(faults.populated > 0 && faults.fresh > 0, "the kernel was there, other memory was not: {faults:?}");
    let made = after.resident_frames - before.resident_frames;
    ensure!(made == faults.fresh, "{made} frames were made by {} fresh faults", faults.fresh);
    owner.resume("waits")?;
    drop(owner);
    power_off(machine, "waits")
}

/// 8 vCPUs on 2 CPUs: all work, go off and come back; devices deliver; a reboot starts over with the same disk.
pub fn linux_uses_every_cpu_and_device(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "linux_uses_every_cpu_and_device")?.outer("2G", 2);
    let mut vm = linux("eight", &context.guest.kernel()?, &builder.initrd("initrd.cpio", &Initrd::interactive())?);
    vm.vcpus = Some(8);
    vm.disks.push(disk(&builder.file("disk.img", &[0; 4096])?));
    let mut machine = builder.boot(vec![vm])?;
    machine.expect(initrd::READY)?;
    use_every_cpu(&mut machine)?;
    use_every_device(&mut machine)?;
    machine.shell("echo survivor | dd of=/dev/vda conv=fsync 2>/dev/null")?;
    machine.expect(initrd::PROMPT)?;
    machine.type_line("reboot -f")?;
    machine.expect("vm eight: reset")?;
    machine.expect(initrd::READY)?;
    let cpus = machine.shell("nproc")?;
    ensure!(cpus == "8", "nproc says {cpus:?} after the reboot");
    let kept = machine.shell("head -n 1 /dev/vda")?;
    ensure!(kept == "survivor", "the disk says {kept:?} after the reboot");
    power_off(machine, "eight")
}

fn use_every_cpu(machine: &mut Machine) -> Result<()> {
    let nproc = |machine: &mut Machine, expected: &str, when: &str| {
        let cpus = machine.shell("nproc")?;
        ensure!(cpus == expected, "nproc says {cpus:?} {when}");
        Ok(())
    };
    nproc(machine, "8", "at first")?;
    // The shell gives its own CPU away to the eight: a CPU that does not run its timer or takes no wake-up hangs here.
    let busy = "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); done; echo done";
    let done = machine.shell(&format!("for c in 0 1 2 3 4 5 6 7; do taskset -c $c sh -c '{busy}' & done; wait"))?;
    ensure!(done.lines().filter(|line| *line == "done").count() == 8, "not every CPU has worked: {done}");
    let switch = |machine: &mut Machine, to: u32| {
        machine.shell(&format!(
            "(for c in 1 2 3 4 5 6 7; do echo {to} > /sys/devices/system/cpu/cpu$c/online || exit 1; done)"
        ))
    };
    for _ in 0..2 {
        switch(machine, 0)?;
        nproc(machine, "1", "with the others off")?;
        switch(machine, 1)?;
        nproc(machine, "8", "with the others on again")?;
    }
    Ok(())
}

fn use_every_device(machine: &mut Machine) -> Result<()> {
    let clock: u64 = machine.shell("cat /sys/class/rtc/rtc0/since_epoch")?.parse().context("the PL031's time")?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("this host's clock is before 1970")?.as_secs();
    ensure!(clock.abs_diff(now) < 600, "the PL031 says {clock}, this host {now}");
    let source = machine.shell("cat /sys/class/misc/hw_random/rng_current")?;
    ensure!(source.starts_with("virtio_rng"), "entropy comes from {source:?}");
    let random = |machine: &mut Machine| machine.shell("dd if=/dev/hwrng bs=64 count=16 2>/dev/null | sha256sum");
    let (one, other) = (random(machine)?, random(machine)?);
    ensure!(one != other, "/dev/hwrng repeats itself: {one}");
    let said = machine.shell("echo over the virtio console > /dev/hvc0; sleep 1")?;
    ensure!(said.contains("over the virtio console"), "the virtio console shows {said:?}");
    Ok(())
}

/// MD5 of the 99 lines that are typed below: their number, a space, 96 times `x`.
const LINES_SUM: &str = "bc4712b65c33a991e5a11d59b345fc27";

/// A guest whose console is its virtio port, in both directions.
pub fn linux_lives_on_its_virtio_console(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "linux_lives_on_its_virtio_console")?;
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive().on_console("hvc0"))?;
    let mut vm = linux("hvc", &context.guest.kernel()?, &initrd);
    // A port that is the kernel's console stays open for good, and would be who listens.
    "console=hvc0".clone_into(&mut vm.cmdline);
    let mut machine = builder.boot(vec![vm])?;
    machine.expect(initrd::READY)?;
    let tty = machine.shell("tty")?;
    ensure!(tty == "/dev/hvc0", "the shell is on {tty}");
    machine.expect(initrd::PROMPT)?;
    machine.type_line("echo \"beg\"\"un:\"; head -n 99 | md5sum; echo \"en\"\"ded:\"")?;
    machine.expect("begun:")?;
    // More than the guest has buffers for, at once.
    let lines: String = (0..99).map(|n| format!("{n:02} {}\n", "x".repeat(96))).collect();
    machine.send(lines.as_bytes())?;
    let output = machine.expect("ended:")?;
    ensure!(output.contains(LINES_SUM), "what was typed is not what the guest has read: {output}");
    power_off(machine, "hvc")
}

/// The guest powers off by PSCI, the hypervisor says so, and the machine ends well.
fn power_off(mut machine: Machine, vm: &str) -> Result<()> {
    machine.expect(initrd::PROMPT)?;
    machine.type_line("poweroff -f")?;
    let log = machine.expect_power_off()?;
    if !log.contains(&format!("vm {vm}: powered off")) {
        bail!("the hypervisor does not report the end of {vm}");
    }
    Ok(())
}
