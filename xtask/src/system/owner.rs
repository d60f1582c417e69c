//! What the owner of a machine under test asks over the control channel, and checks in the answers.

use anyhow::{Context, Result, bail, ensure};
use entresol_cli::client::{Client, ClientError};
use entresol_wire::control::{Alias, Answer, Audit, Code, Op, Probe, SlotRow, State, Stats, VmRow};

use super::machine::Machine;

/// A session. One at a time is served.
pub struct Owner {
    client: Client,
}

impl Owner {
    /// Connects to the machine's control channel.
    ///
    /// # Errors
    /// When the hypervisor does not answer.
    pub fn of(machine: &mut Machine) -> Result<Self> {
        Ok(Self { client: machine.control()? })
    }

    fn done(&mut self, op: Op<'_>) -> Result<()> {
        let name = op.name();
        match self.client.call(op).with_context(|| format!("control channel: {name}"))? {
            Answer::Done => Ok(()),
            other => bail!("{name} is answered with {other:?}"),
        }
    }

    /// Pauses a VM; when this returns none of its vCPUs runs.
    pub fn pause(&mut self, vm: &str) -> Result<()> {
        self.done(Op::Pause { vm: vm.into() })
    }

    /// Resumes or starts a VM.
    pub fn resume(&mut self, vm: &str) -> Result<()> {
        self.done(Op::Resume { vm: vm.into() })
    }

    /// Kills a VM; when this returns its memory is free.
    pub fn fork(&mut self, vm: &str, name: &str) -> Result<()> {
        self.done(Op::Fork { vm: vm.into(), name: name.into(), count: None })
    }

    pub fn kill(&mut self, vm: &str) -> Result<()> {
        self.done(Op::Kill { vm: vm.into() })
    }

    /// Makes, moves or deletes a slot of a VM's memory.
    pub fn set_slot(&mut self, vm: &str, slot: Alias) -> Result<()> {
        self.done(Op::SetSlot { vm: vm.into(), slot })
    }

    /// Asks for a slot that must be refused with `why` in the reason.
    pub fn refuses_slot(&mut self, vm: &str, slot: Alias, why: &str) -> Result<()> {
        match self.client.call(Op::SetSlot { vm: vm.into(), slot }) {
            Err(ClientError::Refused(error)) if error.code == Code::SlotRefused && error.message.contains(why) => {
                Ok(())
            }
            other => bail!("{slot:x?} should be refused with {why:?}, but: {other:?}"),
        }
    }

    /// Ends every VM and with them the machine.
    pub fn shutdown(&mut self) -> Result<()> {
        self.done(Op::Shutdown)
    }

    /// What was counted for a VM.
    pub fn stats(&mut self, vm: &str) -> Result<Stats<'static>> {
        match self.client.call(Op::Stats { vm: vm.into() }).context("control channel: stats")? {
            Answer::Stats(stats) => Ok(*stats),
            other => bail!("stats are answered with {other:?}"),
        }
    }

    /// What is in the hypervisor's own mapping: nothing may be wrong.
    pub fn audit(&mut self) -> Result<Audit> {
        match self.client.call(Op::Audit).context("control channel: audit")? {
            Answer::Audit(audit) if audit.wrong == 0 => Ok(audit),
            other => bail!("the audit found {other:?}"),
        }
    }

    /// Reads a page by its machine address, as a mistake of the hypervisor would.
    pub fn probe(&mut self, vm: &str, address: u64) -> Result<Probe> {
        match self.client.call(Op::Probe { vm: vm.into(), address }).context("control channel: probe")? {
            Answer::Probe(probe) => Ok(probe),
            other => bail!("probe is answered with {other:?}"),
        }
    }

    /// The VM's row of `ps`.
    pub fn row(&mut self, vm: &str) -> Result<VmRow<'static>> {
        match self.client.call(Op::Ps).context("control channel: ps")? {
            Answer::Ps(rows) => {
                rows.into_iter().find(|row| row.name == vm).with_context(|| format!("ps does not list {vm}"))
            }
            other => bail!("ps is answered with {other:?}"),
        }
    }

    /// The VM's slots, all of them.
    pub fn slots(&mut self, vm: &str) -> Result<Vec<SlotRow<'static>>> {
        let (mut rows, mut from) = (Vec::new(), Some(0));
        while let Some(first) = from {
            match self.client.call(Op::Slots { vm: vm.into(), from: first }).context("control channel: slots")? {
                Answer::Slots(page) => {
                    rows.extend(page.rows);
                    from = page.next;
                }
                other => bail!("slots are answered with {other:?}"),
            }
        }
        Ok(rows)
    }

    /// The VM must be in this state for this reason now.
    pub fn expect_state(&mut self, vm: &str, state: State, reason: Option<&str>) -> Result<()> {
        let row = self.row(vm)?;
        ensure!(
            (row.state, row.reason.as_deref()) == (state, reason),
            "{vm} is {} ({:?}), expected {state} ({reason:?})",
            row.state,
            row.reason
        );
        Ok(())
    }

    /// Bytes that a VM's second stage maps, by entries and their size.
    pub fn mapped(stats: &Stats<'_>) -> u64 {
        let entries = stats.entries;
        (entries.size_4k << 12) + (entries.size_2m << 21) + (entries.size_1g << 30)
    }

    /// Every entry was made by one fault on a page that was not mapped, and maps frames that are resident. Faults that
    /// found the entry there already, or had to try again, made none.
    pub fn entries_are_touches(stats: &Stats<'_>) -> Result<()> {
        let (entries, faults) = (stats.entries, stats.faults);
        let made = entries.size_4k + entries.size_2m + entries.size_1g;
        let most = faults.fresh + faults.populated - faults.spurious;
        ensure!(
            made <= most && made >= most.saturating_sub(faults.retry),
            "{made} entries do not follow from the faults: {faults:?}"
        );
        // The page with the records of stolen time is not among the machine's memory.
        let resident = (stats.resident_frames + 1) << 12;
        ensure!(Self::mapped(stats) <= resident, "{} bytes are mapped, {resident} are resident", Self::mapped(stats));
        Ok(())
    }
}
