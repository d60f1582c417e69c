//! The hypervisor on x86-64: QEMU's TCG with SVM.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use entresol_wire::config::{LargestEntry, Paging, WrittenPolicies, WrittenVm};

use super::Context;
use super::machine::Builder;
use crate::bundle;
use crate::fetch;
use crate::guests;
use crate::initrd::{self, Initrd};
use crate::outer_bochs::HASWELL;
use crate::outer_x86::EPYC;

fn vm(kernel: PathBuf, page_size: LargestEntry, services: bool) -> WrittenVm {
    let cmdline = if services { "mib=32 services" } else { "mib=32" };
    let policies = WrittenPolicies { page_size, services, ..WrittenPolicies::default() };
    WrittenVm { memory: "128M".into(), policies, ..bundle::program("first", &kernel, cmdline) }
}

/// With 4 KiB entries and with blocks, with services and without, in shared memory and private.
pub fn x86_guest_works_its_memory(context: &Context) -> Result<()> {
    for (page_size, services) in [(LargestEntry::Block2M, false), (LargestEntry::Page4K, true)] {
        // What leaves the mapping is forgotten by the other CPU, which sleeps.
        let builder = Builder::new(context, "x86_guest_works_its_memory")?.outer("1G", 2);
        let mut vm = vm(guests::x86("guest-x86-first")?, page_size, services);
        vm.memory.private = services;
        let mut machine = builder.boot_x86(EPYC, vec![vm])?;
        machine.expect("ALL PASS")?;
        let log = machine.expect_power_off()?;
        ensure!(log.contains("vm first: powered off"), "the hypervisor did not see the guest's end");
        all_cpus_run(&log, 2)?;
    }
    Ok(())
}

/// The hypervisor found and started so many for guests, and the one that [`crate::bundle::on_x86`] adds.
fn all_cpus_run(log: &str, for_guests: u32) -> Result<()> {
    let cpus = for_guests + 1;
    ensure!(log.contains(&format!(" {cpus} CPUs,")), "the hypervisor did not find {cpus} CPUs");
    ensure!(!log.contains("going on with fewer"), "a CPU did not start");
    Ok(())
}

/// The same guest on shadow tables: it starts without paging, and comes to long mode by itself.
pub fn x86_guest_on_shadow_tables(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "x86_guest_on_shadow_tables")?.outer("1G", 1);
    let mut vm = vm(guests::x86("guest-x86-first")?, LargestEntry::Block2M, true);
    vm.policies.paging = Paging::Shadow;
    let mut machine = builder.boot_x86(EPYC, vec![vm])?;
    machine.expect("ALL PASS")?;
    machine.expect("vm first: powered off")?;
    machine.expect_power_off().map(drop)
}

/// GRUB starts the same image from a disk, by multiboot2.
pub fn x86_starts_from_a_disk(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "x86_starts_from_a_disk")?.outer("512M", 3);
    let mut machine =
        builder.boot_x86_disk(EPYC, vec![vm(guests::x86("guest-x86-first")?, LargestEntry::Page4K, true)])?;
    machine.expect("ALL PASS")?;
    all_cpus_run(&machine.expect_power_off()?, 3)
}

/// The same guest under Intel's VMX with its extended page tables. GRUB starts the hypervisor, from a disk.
pub fn vmx_guest_works_its_memory(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "vmx_guest_works_its_memory")?.outer("512M", 1);
    let mut machine =
        builder.boot_bochs(HASWELL, vec![vm(guests::x86("guest-x86-first")?, LargestEntry::Page4K, true)])?;
    machine.expect("ALL PASS")?;
    machine.expect("vm first: powered off")?;
    machine.expect_end()
}

/// Debian's amd64 kernel, unmodified, boots to user space under VMX too, where a script works on memory and powers off; another guest has worked
/// its own beside it. Neither has a second CPU: in Bochs 2.7 an entry whose guest has IF clear keeps the machine's interrupts from ending it, so
/// one that waits like that for another is never preempted.
pub fn vmx_linux_runs_a_script(context: &Context) -> Result<()> {
    let guest = fetch::guest_x86()?;
    let script = "set -e\nuname -m\ncd /tmp\ndd if=/dev/urandom of=random bs=64k count=16 2>/dev/null\n\
                  cp random copy && cmp random copy && echo intact\nexit 7\n";
    let builder = Builder::new(context, "vmx_linux_runs_a_script")?.outer("1G", 1);
    let initrd = builder.file("initrd.cpio", &Initrd::scripted(script).pack(&guest)?)?;
    let vm = WrittenVm {
        memory: "256M".into(),
        cmdline: "console=ttyS0 earlyprintk=ttyS0 panic=-1 reboot=acpi".into(),
        ..bundle::linux("linux", &guest.kernel()?, &initrd)
    };
    let mut beside = self::vm(guests::x86("guest-x86-first")?, LargestEntry::Block2M, true);
    beside.memory = "128M".into();
    let mut machine = builder.boot_bochs(HASWELL, vec![vm, beside])?;
    machine.expect("Linux version 6.")?;
    machine.expect("vm first: powered off")?;
    machine.expect("x86_64")?;
    machine.expect("intact")?;
    machine.expect(&format!("{}7", initrd::SCRIPT_EXIT))?;
    machine.expect("vm linux: powered off")?;
    machine.expect_end()
}

/// The first access to what is no memory leaves an entry, the next ones need no look-up; without an address bit to reserve each takes the
/// whole way, and is as right.
pub fn x86_mmio_entries(context: &Context) -> Result<()> {
    // Its local APIC's registers are not in memory either.
    let wide = format!("{EPYC},phys-bits=52,x2apic=on");
    for (cpu, argument) in [(EPYC, ""), (wide.as_str(), " entries=none")] {
        let builder = Builder::new(context, "x86_mmio_entries")?.outer("1G", 2);
        let mut vm = vm(guests::x86("guest-x86-first")?, LargestEntry::Page4K, true);
        vm.cmdline += argument;
        let mut machine = builder.boot_x86(cpu, vec![vm])?;
        machine.expect("PASS entries say where no memory is")?;
        machine.expect("ALL PASS")?;
        all_cpus_run(&machine.expect_power_off()?, 2)?;
    }
    Ok(())
}

/// Debian's amd64 kernel, unmodified, boots to user space: a script works on memory, sleeps, and powers off by the register that ACPI's
/// tables name.
pub fn x86_linux_runs_a_script(context: &Context) -> Result<()> {
    let script = "set -e\nuname -m\ncd /tmp\ndd if=/dev/urandom of=random bs=1M count=8 2>/dev/null\n\
                  cp random copy && cmp random copy && echo intact\nsleep 1\nexit 7\n";
    linux_runs_a_script(context, "x86_linux_runs_a_script", Paging::Nested, 1, script)
}

/// The same on shadow tables, with two vCPUs: each works on memory of its own, then on what the other has written, and programs come and go on both.
pub fn x86_linux_on_shadow_tables(context: &Context) -> Result<()> {
    let script = "set -e\nuname -m\ntest $(nproc) = 2\ncd /tmp\n\
                  fill() { dd if=/dev/urandom of=$1 bs=1M count=4 2>/dev/null && cp $1 $1.copy && cmp $1 $1.copy; }\n\
                  fill one & first=$!\nfill two & second=$!\nwait $first && wait $second\n\
                  (cmp two two.copy; for i in 1 2 3 4 5 6 7 8; do cat one two | md5sum; done >sums1) & first=$!\n\
                  (cmp one one.copy; for i in 1 2 3 4 5 6 7 8; do cat one two | md5sum; done >sums2) & second=$!\n\
                  wait $first && wait $second\n\
                  cmp sums1 sums2 && test $(sort -u sums1 | wc -l) = 1 && echo intact\nsleep 1\nexit 7\n";
    linux_runs_a_script(context, "x86_linux_on_shadow_tables", Paging::Shadow, 2, script)
}

fn linux_runs_a_script(context: &Context, name: &'static str, paging: Paging, vcpus: i64, script: &str) -> Result<()> {
    let guest = fetch::guest_x86()?;
    let builder = Builder::new(context, name)?.outer("2G", 2);
    let initrd = builder.file("initrd.cpio", &Initrd::scripted(script).pack(&guest)?)?;
    let vm = WrittenVm {
        vcpus: Some(vcpus),
        cmdline: "console=ttyS0 earlyprintk=ttyS0 panic=-1 reboot=acpi".into(),
        policies: WrittenPolicies { paging, ..WrittenPolicies::default() },
        ..bundle::linux("linux", &guest.kernel()?, &initrd)
    };
    let mut machine = builder.boot_x86(EPYC, vec![vm])?;
    machine.expect("Linux version 6.")?;
    machine.expect("x86_64")?;
    machine.expect("intact")?;
    machine.expect(&format!("{}7", initrd::SCRIPT_EXIT))?;
    machine.expect("vm linux: powered off")?;
    machine.expect_power_off().map(drop)
}

/// A processor without SVM, and one without instructions that the hypervisor is made of.
pub fn x86_refuses_by_name(context: &Context) -> Result<()> {
    let vm = vm(guests::x86("guest-x86-first")?, LargestEntry::Page4K, false);
    let (without_svm, without_bmi) = (format!("{EPYC},svm=off"), format!("{EPYC},bmi2=off"));
    for (cpu, reason) in [
        (without_svm.as_str(), "this CPU has no SVM"),
        (without_bmi.as_str(), "this CPU has no long mode, BMI1 or BMI2"),
    ] {
        let builder = Builder::new(context, "x86_refuses_by_name")?.outer("1G", 1);
        let mut machine = builder.boot_x86(cpu, vec![vm.clone()])?;
        machine.expect(reason)?;
        machine.expect("END OF PANIC")?;
    }
    Ok(())
}
