//! Private memory: absent from the hypervisor's own mapping whatever the guest does, and zero for whoever comes next.

use anyhow::{Result, ensure};
use entresol_wire::config::{WrittenMemory, WrittenVm};

use super::Context;
use super::machine::Builder;
use super::owner::Owner;
use crate::bundle::{disk, linux, program};
use crate::guests;
use crate::initrd::{self, Initrd};

/// Audits while the guest works its disk and its console.
const AUDITS: u32 = 1000;
/// Exception class of a data abort taken from EL2 itself (Arm DDI 0487 D24.2.40).
const DATA_ABORT_SAME_LEVEL: u64 = 0x25;

/// Disk and console under load until it is told to stop.
const LOAD: &str = "(while test ! -e /run/stop; do dd if=/dev/vda bs=64k count=64 2>/dev/null | md5sum; \
     head -c 2097152 /dev/urandom | dd of=/dev/vda bs=64k seek=64 conv=fsync 2>/dev/null; \
     echo 3 > /proc/sys/vm/drop_caches; done; echo > /run/stopped) > /dev/ttyAMA0 & true";

fn private(mut vm: WrittenVm, size: &str) -> WrittenVm {
    vm.memory = WrittenMemory { size: size.to_owned(), private: true };
    vm
}

/// Linux with private memory works, and at no moment is a frame of it mapped; a stray read of one faults, is told, and harms
/// nobody; a killed machine leaves zeroes, to private and to other machines.
pub fn private_memory_is_nowhere_else(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "private_memory_is_nowhere_else")?.outer("1G", 2);
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    let mut secret = private(linux("secret", &context.guest.kernel()?, &initrd), "384M");
    secret.vcpus = Some(2);
    secret.disks.push(disk(&builder.file("disk.img", &[0xd5; 16 << 20])?));
    let toucher = guests::flat("toucher")?;
    let victim = private(program("victim", &toucher, "mib=240 seed=5 hold"), "384M");
    let mut heir = program("heir", &toucher, "mib=240 seed=6 zero hold");
    heir.memory = "384M".into();
    let mut last = private(program("last", &toucher, "mib=240 seed=7 zero hold"), "384M");
    (heir.autostart, last.autostart) = (Some(false), Some(false));
    let mut machine = builder.boot(vec![secret, victim, heir, last])?;
    machine.expect(initrd::READY)?;
    machine.shell(LOAD)?;
    let mut owner = Owner::of(&mut machine)?;
    let (mut most, mut leased) = (0, false);
    for _ in 0..AUDITS {
        let audit = owner.audit()?;
        // Linux has asked for its stolen time: the page with the records is leased.
        ensure!(audit.leased <= 1 && audit.stuck == 0, "private frames are mapped: {audit:?}");
        leased |= audit.leased == 1;
        most = most.max(audit.pages);
    }
    ensure!(leased, "no record of stolen time was ever seen");
    ensure!(most > (240 << 8), "only {most} pages of private memory were ever seen");

    let kernel_page = 0x4020_0000;
    let probe = owner.probe("secret", kernel_page)?;
    let class = probe.fault.map(|fault| (fault.esr >> 26, fault.far >> 12));
    ensure!(probe.private && class == Some((DATA_ABORT_SAME_LEVEL, probe.frame)), "a stray read met {probe:x?}");
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
