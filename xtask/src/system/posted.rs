//! Zones of coalesced MMIO and doorbells: a guest stores, its owner takes.

use anyhow::{Result, bail, ensure};
use entresol_wire::config::{CoalescedZone, Doorbell};
use entresol_wire::control::{Answer, Op, POSTED_WRITES, Posted, PostedWrite, State};

use super::Context;
use super::control::Listener;
use super::machine::Builder;
use crate::bundle::program;
use crate::guests;

/// Where the guest expects them.
const ZONE: u64 = 0x0c00_0000;
const DOORBELL: u64 = 0x0c00_1000;
/// Writes that the guest makes one after the other, at consecutive words of the zone.
const NUMBERED: u64 = 400;
/// What the guest stores first: address, size, value.
const KNOWN: [(u64, u32, u64); 6] = [
    (ZONE + 3, 1, 0x11),
    (ZONE + 6, 2, 0x2222),
    (ZONE, 4, 0x3333_3333),
    (ZONE + 0xff8, 8, 0x4444_4444_4444_4444),
    (ZONE + 0x10, 8, 0x5555),
    // Big-endian, as a little-endian device sees it.
    (ZONE + 8, 4, 0x9988_7766),
];

fn take(listener: &mut Listener) -> Result<Posted> {
    match listener.ask(Op::Posted { vm: "mmio".into() })? {
        Answer::Posted(posted) => Ok(posted),
        other => bail!("posted is answered with {other:?}"),
    }
}

/// Every store arrives once and in order; a full ring stops the machine until some are taken; doorbells are told.
pub fn posted_stores_reach_the_owner(context: &Context) -> Result<()> {
    let mut vm = program("mmio", &guests::flat("mmio")?, "policy=abort posted");
    vm.autostart = Some(false);
    vm.coalesced_mmio = vec![CoalescedZone { base: ZONE, size: 0x1000 }];
    vm.doorbells = vec![Doorbell { address: DOORBELL, size: 4 }];
    let mut machine = Builder::new(context, "posted_stores_reach_the_owner")?.boot(vec![vm])?;
    let mut listener = Listener::attach(machine.control()?, "mmio")?;
    ensure!(take(&mut listener)?.writes.is_empty(), "nothing runs yet");
    listener.ask(Op::Resume { vm: "mmio".into() })?;
    listener.until("doorbell", |told| std::mem::take(&mut told.rung).then_some(()))?;
    let (mut writes, mut rings) = (Vec::new(), 0);
    let all = KNOWN.len() + NUMBERED as usize;
    while all - writes.len() > POSTED_WRITES {
        listener.state(State::Paused, Some("CoalescedFull"))?;
        let posted = take(&mut listener)?;
        ensure!(posted.writes.len() == POSTED_WRITES, "a full ring has {} writes", posted.writes.len());
        ensure!(posted.doorbells.len() == 1 && posted.doorbells[0].address == DOORBELL, "{:?}", posted.doorbells);
        rings += posted.doorbells[0].rings;
        writes.extend(posted.writes);
        listener.ask(Op::Resume { vm: "mmio".into() })?;
    }
    listener.hear("ALL PASS")?;
    // The last ones wait when it ends; it goes with them.
    machine.expect_power_off()?;
    ensure!(rings == 3, "the doorbell rang {rings} times");
    let known = KNOWN.into_iter();
    let numbered = (0..NUMBERED).map(|number| (ZONE + number % 512 * 8, 8, number));
    for (place, (expected, found)) in known.chain(numbered).zip(&writes).enumerate() {
        let PostedWrite { address, size, value } = found;
        ensure!((*address, *size, value.0) == expected, "write {place} is {found:?}, not {expected:x?}");
    }
    Ok(())
}
