//! Stolen time: guests that share one CPU learn how long others had it.

use anyhow::{Context as _, Result, ensure};
use entresol_wire::config::WrittenVm;
use entresol_wire::control::Op;

use super::Context;
use super::control::Listener;
use super::machine::Builder;
use crate::bundle::linux;
use crate::initrd::{self, Initrd};

/// Who is asked.
const GUEST: &str = "guest";
/// Who takes its CPU.
const RIVAL: &str = "rival";
/// Its copy.
const COPY: &str = "copy";
/// Hundredths of a second that must be stolen from each vCPU of the guest.
const TICKS: u64 = 30;
/// Stolen hundredths of a second, of all vCPUs and of each (proc_pid_stat: the eighth number of a line `cpu`).
const STOLEN: &str = "awk '/^cpu/ {print $9}' /proc/stat";

/// What the guest says was stolen: first of all its vCPUs, then of each.
fn stolen(told: &mut Listener, asked: &mut u32) -> Result<Vec<u64>> {
    *asked += 1;
    let said = told.shell(*asked, STOLEN)?;
    said.split_whitespace().map(|ticks| ticks.parse().with_context(|| format!("{said:?} are no ticks"))).collect()
}

/// Two guests of two vCPUs work on one CPU: each vCPU of one learns what was stolen from it; a copy goes on counting where its
/// parent was; who has the CPU alone counts no more.
pub fn stolen_time_is_told(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "stolen_time_is_told")?.outer("2G", 1);
    let kernel = context.guest.kernel()?;
    let vm = |name: &str, initrd: &std::path::Path| {
        let vm = linux(name, &kernel, initrd);
        WrittenVm { memory: "256M".into(), vcpus: Some(2), autostart: Some(false), ..vm }
    };
    let guest = vm(GUEST, &builder.initrd("guest.cpio", &Initrd::interactive())?);
    let rival = vm(RIVAL, &builder.initrd("rival.cpio", &Initrd::scripted("while :; do :; done"))?);
    let mut machine = builder.boot(vec![guest, rival])?;
    let (mut told, mut asked) = (Listener::attach(machine.control()?, GUEST)?, 0);
    told.done(Op::Resume { vm: GUEST.into() })?;
    told.hear("using stolen time PV")?;
    told.hear(initrd::READY)?;
    let alone = stolen(&mut told, &mut asked)?;
    ensure!(alone.len() == 3, "two vCPUs are {alone:?}");
    told.done(Op::Resume { vm: RIVAL.into() })?;
    asked += 1;
    // Both vCPUs work until each has lost enough; who is told of nothing works for ever, and the test has no answer.
    let enough = format!("[ $(awk '/^cpu0/ {{print $9}}' /proc/stat) -ge {TICKS} ]");
    let other = enough.replace("cpu0", "cpu1");
    told.shell(asked, &format!("until {enough}; do :; done & until {other}; do :; done; wait"))?;
    let parent = stolen(&mut told, &mut asked)?;
    ensure!(parent.iter().all(|ticks| *ticks >= TICKS), "stolen {parent:?}");
    told.done(Op::Kill { vm: RIVAL.into() })?;
    told.done(Op::Fork { vm: GUEST.into(), name: COPY.into(), count: None })?;
    told.turn_to(COPY)?;
    let copy = stolen(&mut told, &mut asked)?;
    let grown = copy.iter().zip(&parent).all(|(copy, parent)| copy >= parent);
    ensure!(grown, "the copy has lost {copy:?}, and its parent had {parent:?}");
    told.turn_to(GUEST)?;
    let after = stolen(&mut told, &mut asked)?;
    ensure!(after[0] >= parent[0], "stolen time never goes back: {parent:?}, then {after:?}");
    told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}
