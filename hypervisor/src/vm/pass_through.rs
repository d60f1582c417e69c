//! Devices of the outer machine that a virtual machine reaches by a slot of its own: Device memory, never executable.
//!
//! Protocol: only pages of virtio-mmio transports are given away, and none that has the control channel's or a disk of the hypervisor's. A device is reset
//! when it is given, and when its virtual machine ends, before any memory of that one is free.
//!
//! Trust: there is no SMMU. What the device is told to read or write it reads or writes in the machine's own addresses, so
//! an owner who gives one away trusts the guest with everything. Its interrupt is not forwarded: the guest polls.
//!
//! Invariants: nobody else uses such a page: the configuration gives each to one virtual machine.

use alloc::string::String;
use alloc::vec::Vec;

use crate::arch::boot::{BootInfo, Device};
use crate::arch::{Memory, cpu};
use entresol_addr::{Gpa, PAGE_SIZE, Pfn};
use entresol_backing::{ObjectHandle, Spec};
use entresol_slot::{ObjectId, SlotFlags, SlotRequest};
use entresol_sync::Once;
use entresol_wire::config::{MAX_PASS_THROUGH, PassThrough};

use super::OutOfHeap;
use crate::{block, control, host};

/// The first slot of these; the ones below are the memory's.
pub const FIRST_SLOT: u32 = super::build::SLOTS - MAX_PASS_THROUGH as u32;

/// A virtio-mmio transport's device status (virtio 1.2, 4.2.2); storing 0 resets it.
const STATUS: u64 = 0x70;

static MACHINE: Once<&'static BootInfo> = Once::new();

/// Names the machine whose devices may be given away. Once, before any virtual machine is made.
pub fn init(info: &'static BootInfo) {
    MACHINE.call_once(|| info);
}

/// The devices that one virtual machine was given.
pub struct Passed(Vec<(ObjectHandle, PassThrough)>);

impl Passed {
    /// Takes and resets what is asked for.
    ///
    /// # Errors
    ///
    /// What is wrong, and the rule; nothing is taken then.
    pub fn new(wanted: &[PassThrough]) -> Result<Self, String> {
        let mut passed = Self(Vec::new());
        passed.0.try_reserve_exact(wanted.len()).map_err(|_| OutOfHeap::text())?;
        for (index, it) in wanted.iter().enumerate() {
            let named = |rule: &str| alloc::format!("pass_through[{index}].machine = {:#x}: {rule}", it.machine);
            if !(it.machine..it.machine + it.size).step_by(PAGE_SIZE as usize).all(may_be_given) {
                return Err(named("must be pages of virtio-mmio transports, without the hypervisor's own"));
            }
            let spec = Spec::Device { first: Pfn::new(it.machine / PAGE_SIZE), frames: it.size / PAGE_SIZE };
            let object = host::get().objects.create(&host::get().supply(cpu::index()), spec);
            passed.0.push((object.map_err(|error| named(&alloc::format!("{error}")))?, *it));
        }
        passed.reset();
        Ok(passed)
    }

    /// None of them.
    pub const fn none() -> Self {
        Self(Vec::new())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Shows them to the guest.
    ///
    /// # Errors
    ///
    /// What is wrong.
    pub fn show(&self, memory: &Memory) -> Result<(), String> {
        for (id, (object, it)) in (FIRST_SLOT..).zip(&self.0) {
            let request = SlotRequest {
                id,
                base: Gpa::new(it.base),
                size: it.size,
                object: ObjectId::new(object.raw()),
                offset: 0,
                flags: SlotFlags::empty().bits(),
            };
            memory.set_slot(cpu::index(), &request).map_err(|error| alloc::format!("pass_through: {error}"))?;
        }
        Ok(())
    }

    /// Makes them forget every address that they were told.
    pub fn reset(&self) {
        let slots = MACHINE.get().into_iter().flat_map(|info| &info.virtio_mmio);
        for slot in slots.filter(|slot| self.0.iter().any(|(_, it)| overlaps(slot, it.machine, it.size))) {
            // SAFETY: a virtio-mmio transport's register by the device tree, mapped as Device memory at EL2 for ever; the
            // hypervisor uses no transport in this page.
            unsafe { ((slot.registers.start + STATUS) as *mut u32).write_volatile(0) };
        }
    }
}

impl Drop for Passed {
    /// After the slots that showed them.
    fn drop(&mut self) {
        let host = host::get();
        for (object, it) in self.0.drain(..) {
            if let Err(error) = host.objects.destroy(&host.supply(cpu::index()), &host.epoch, object) {
                log::error!("the device at {:#x} stays with nobody: {error:?}", it.machine);
            }
        }
    }
}

fn overlaps(device: &Device, start: u64, size: u64) -> bool {
    device.registers.start < start + size && start < device.registers.end
}

/// Whether the page at `page` has transports, and none of the hypervisor's own.
fn may_be_given(page: u64) -> bool {
    let mut transports = MACHINE.get().into_iter().flat_map(|info| &info.virtio_mmio);
    let (mut some, mut ours) = (false, false);
    for slot in transports.by_ref().filter(|slot| overlaps(slot, page, PAGE_SIZE)) {
        some = true;
        ours |= control::owns(slot.intid) || block::owns(slot.intid);
    }
    some && !ours
}
