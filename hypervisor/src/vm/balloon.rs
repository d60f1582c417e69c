//! Where the pages of a guest's balloon go: back to the pool.
//!
//! Protocol: the device calls from a vCPU's exit, or before an entry, with its lock held and no grace period pinned: so what is
//! given back may wait for one. The others that a grace period waits for never wait for a device.
//!
//! Lock order: the balloon's lock → dirty logs → notifier → object → pool.

use crate::arch::cpu;
use entresol_addr::{GfnRange, PAGE_SIZE};
use entresol_devices::virtio::balloon::{Busy, GiveBack, Given, TAGS};
use entresol_wire::Refusal;
use entresol_wire::control;

use super::Vm;
use super::link::Link;

/// The memory of a virtual machine, to be given back.
pub struct GuestPages(Link);

impl GuestPages {
    /// That of the virtual machine at the end of `link`.
    pub fn new(link: Link) -> Self {
        Self(link)
    }
}

impl GiveBack for GuestPages {
    fn give_back(&self, ranges: &[GfnRange]) -> Result<Given, Busy> {
        // While it is being made or taken apart no vCPU of it runs.
        let vm = self.0.vm().ok_or(Busy)?;
        let discarded = vm.memory.discard(cpu::index(), ranges).map_err(|entresol_mmu::Busy| Busy)?;
        Ok(Given { frames: discarded.frames, refused: discarded.refused, kept: discarded.kept })
    }
}

impl Vm {
    /// Asks the guest to put `size` bytes of its memory into its balloon, or to take out what is more.
    ///
    /// # Errors
    ///
    /// It has no balloon, or `size` is no whole number of pages that its memory has.
    pub fn set_balloon(&self, size: u64) -> Result<(), Refusal> {
        let balloon = self.devices.balloon();
        let balloon = balloon.ok_or_else(|| Refusal::text("vm", &self.config.name, "must have a balloon"))?;
        let most = self.config.memory;
        let pages = u32::try_from(size / PAGE_SIZE).ok().filter(|_| size.is_multiple_of(PAGE_SIZE) && size <= most);
        let rule = || alloc::format!("must be a multiple of {PAGE_SIZE}, and at most its memory of {most}");
        balloon.set_target(pages.ok_or_else(|| Refusal::new("size", size, rule()))?);
        Ok(())
    }

    /// What is known of its balloon. Asks the guest for newer counts of its own.
    pub fn balloon(&self) -> Option<control::Balloon<'static>> {
        let balloon = self.devices.balloon()?;
        let reading = balloon.reading();
        balloon.ask_statistics();
        let told = TAGS.iter().zip(reading.statistics);
        Some(control::Balloon {
            target: reading.target.into(),
            actual: reading.actual.into(),
            inflated: reading.inflated,
            deflated: reading.deflated,
            reported: reading.reported,
            refused: reading.refused,
            kept: reading.kept,
            updates: reading.updates,
            guest: told.filter_map(|(name, count)| Some(((*name).into(), count?))).collect(),
        })
    }
}
