//! Accesses to devices by every form of load and store: on the hypervisor, and on the bare machine to prove that what the
//! guest expects is what the architecture says.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use entresol_wire::config::{CacheMaintenance, NoSyndrome, WrittenVm};

use super::Context;
use super::machine::{Builder, Machine};
use crate::guests;

/// What the guest sends through the serial port's data register, one instruction for each letter, twice.
const ONCE: &str = "once: (\r\nabcdef) letters";

fn vm(kernel: PathBuf, cmdline: &str) -> WrittenVm {
    WrittenVm {
        name: "mmio".to_owned(),
        memory: "64M".into(),
        kernel: kernel.to_string_lossy().into_owned(),
        cmdline: cmdline.to_owned(),
        ..WrittenVm::default()
    }
}

fn passes(mut machine: Machine) -> Result<()> {
    machine.expect("ALL PASS")?;
    let log = machine.expect_power_off()?;
    let once = log.matches(ONCE).count();
    ensure!(once == 2, "a side effect came more or less than once: {once} of 2 lines say {ONCE:?}");
    Ok(())
}

/// Pairs, writeback, SIMD, byte order, page boundaries, aborts: decoded and emulated.
pub fn mmio_of_every_kind(context: &Context) -> Result<()> {
    let vm = vm(guests::flat("mmio")?, "policy=abort no-syndrome=inject");
    passes(Builder::new(context, "mmio_of_every_kind")?.boot(vec![vm])?)
}

/// The same with every cache maintenance operation carried out by the hypervisor.
pub fn trapped_cache_maintenance(context: &Context) -> Result<()> {
    let mut vm = vm(guests::flat("mmio")?, "policy=abort no-syndrome=inject cmo=trap");
    vm.policies.cache_maintenance = CacheMaintenance::Trap;
    passes(Builder::new(context, "trapped_cache_maintenance")?.boot(vec![vm])?)
}

/// The same program without the hypervisor.
pub fn bare_mmio_of_every_kind(context: &Context) -> Result<()> {
    let kernel = guests::flat("mmio")?;
    passes(Builder::new(context, "bare_mmio_of_every_kind")?.boot_bare(&kernel, None, "")?)
}

/// A load-exclusive on a device ends the VM if its owner wants that, and says which instruction it was.
pub fn owner_stops_on_what_is_not_emulated(context: &Context) -> Result<()> {
    let mut vm = vm(guests::flat("mmio")?, "no-syndrome=inject");
    vm.policies.no_syndrome = NoSyndrome::Stop;
    let mut machine = Builder::new(context, "owner_stops_on_what_is_not_emulated")?.boot(vec![vm])?;
    // ldxr x0, [x9] at GICD_IROUTER64.
    machine.expect("vm mmio: crashed: NoSyndrome { instruction: Some(c85f7d20), gpa: 8006200")?;
    Ok(())
}
