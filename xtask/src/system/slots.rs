//! Memory slots that come and go under a guest that uses them, and what maintenance does to each kind.

use anyhow::{Context as _, Result, ensure};
use entresol_wire::config::{CacheMaintenance, PassThrough, ReadOnlyIvac, ReadOnlyStore, WrittenVm};
use entresol_wire::control::Alias;

use super::Context;
use super::machine::Builder;
use super::owner::Owner;
use crate::bundle::program;
use crate::guests;

/// Where a test that was asked to be long says for how long, in seconds.
const LONG: &str = "ENTRESOL_SOAK_SECONDS";
/// Where the guest has the device that is its own.
const DEVICE: u64 = 0x0c10_0000;
/// How long updates and accesses go on otherwise.
const SECONDS: u64 = 40;

/// A device of the outer machine that is the guest's own does what it is told by nobody but the guest, and one that is the
/// hypervisor's is not given away.
pub fn only_what_is_free_is_passed_through(context: &Context) -> Result<()> {
    for (name, machine) in [("control", 0x0a00_3000), ("memory", 0x4800_0000), ("uart", 0x0900_0000)] {
        let mut vm = vm("")?;
        vm.pass_through = vec![PassThrough { machine, base: DEVICE, size: 0x1000 }];
        let refused = Builder::new(context, &format!("pass_through_{name}"))?.boot(vec![vm])?;
        let rule = "must be pages of virtio-mmio transports, without the hypervisor's own";
        refused.expect_refusal(&format!("vm slots: pass_through[0].machine = {machine:#x}: {rule}"))?;
    }
    Ok(())
}

/// An owner shows a running guest its memory a second time, read-only, and takes that away; what breaks a rule changes nothing.
pub fn owner_changes_slots(context: &Context) -> Result<()> {
    const WINDOW: u64 = 0x10_0000_0000;
    let mut machine = Builder::new(context, "owner_changes_slots")?.boot(vec![vm(&format!("watch={WINDOW:#x}"))?])?;
    let line = machine.expect("WATCH 0x")?;
    let mut owner = Owner::of(&mut machine)?;
    let rest = machine.expect("\n")?;
    let digits = rest.trim();
    let offset = u64::from_str_radix(digits, 16).with_context(|| format!("{line:?} and then {rest:?}"))?;
    let numbers =
        |owner: &mut Owner| Ok::<_, anyhow::Error>(owner.slots("slots")?.iter().map(|row| row.id).collect::<Vec<_>>());
    let slot = Alias { number: 20, base: WINDOW, size: 4096, offset, read_only: true };
    for (bad, why) in [
        (Alias { number: 0, ..slot }, "slot 0: must be from 16 to 59"),
        (Alias { number: 60, ..slot }, "slot 60: must be from 16 to 59"),
        (Alias { base: WINDOW + 8, ..slot }, "base"),
        (Alias { offset: 1 << 40, ..slot }, "offset"),
        (Alias { base: 0x4000_0000, ..slot }, "overlap"),
        (Alias { size: 0, ..slot }, "20"),
    ] {
        owner.refuses_slot("slots", bad, why)?;
    }
    // 15 is the page of stolen time.
    ensure!(numbers(&mut owner)? == [0, 15], "a refused slot is there");
    owner.set_slot("slots", slot)?;
    ensure!(numbers(&mut owner)? == [0, 15, 20], "the slot is not there");
    machine.expect("SEEN")?;
    owner.set_slot("slots", Alias { size: 0, ..slot })?;
    machine.expect("GONE")?;
    machine.expect("ALL PASS")?;
    machine.expect_power_off().map(drop)
}

fn vm(cmdline: &str) -> Result<WrittenVm> {
    let mut vm = program("slots", &guests::flat("slots")?, cmdline);
    vm.memory = "64M".into();
    vm.policies.services = true;
    vm.policies.read_only_store = ReadOnlyStore::Abort;
    Ok(vm)
}

/// Every maintenance operation on every kind of target, by both policies, as the specification's table has it.
pub fn maintenance_follows_the_table(context: &Context) -> Result<()> {
    // Transports of the outer machine, far from the control channel's, which is in the last one.
    let device = PassThrough { machine: 0x0a00_0000, base: DEVICE, size: 0x1000 };
    for (policy, ivac) in [(ReadOnlyIvac::Abort, "abort"), (ReadOnlyIvac::Clean, "clean")] {
        let mut vm = vm(&format!("table ivac={ivac} device={DEVICE:#x}"))?;
        vm.pass_through = vec![device];
        vm.policies.cache_maintenance = CacheMaintenance::Trap;
        vm.policies.read_only_ivac = policy;
        let builder = Builder::new(context, &format!("maintenance_{ivac}"))?;
        let mut machine = builder.qemu(&["-device", "virtio-rng-device,bus=virtio-mmio-bus.0"]).boot(vec![vm])?;
        machine.expect("ALL PASS")?;
        let log = machine.expect_power_off()?;
        let failed: Vec<&str> = log.lines().filter(|line| line.starts_with("FAIL")).collect();
        ensure!(failed.is_empty(), "{ivac}: {}", failed.join("; "));
    }
    Ok(())
}

/// Random updates under eight vCPUs that access everything: no wrong data, no memory that is emulated.
pub fn slots_change_under_eight_vcpus(context: &Context) -> Result<()> {
    let seconds = match std::env::var(LONG) {
        Ok(text) => text.parse().map_err(|error| anyhow::anyhow!("{LONG}={text}: must be seconds: {error}"))?,
        Err(_) => SECONDS,
    };
    let mut vm = vm(&format!("soak={seconds}"))?;
    vm.vcpus = Some(8);
    let mut machine = Builder::new(context, "slots_change_under_eight_vcpus")?.boot(vec![vm])?;
    machine.console.patience.overall += std::time::Duration::from_secs(2 * seconds);
    machine.expect("ALL PASS")?;
    let log = machine.expect_power_off()?;
    let failed: Vec<&str> = log.lines().filter(|line| line.starts_with("FAIL")).collect();
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    let line = log.lines().find(|line| line.contains("accesses to windows")).unwrap_or_default();
    println!("{}", line.trim());
    Ok(())
}
