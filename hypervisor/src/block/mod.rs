//! Block devices of the outer machine that are the hypervisor's own.
//!
//! Purpose: what is kept longer than a machine is on, or does not fit into its memory. A device is told by its serial number;
//! one with another serial number is reset and left to whoever may have it.
//!
//! | serial | work | whose |
//! |---|---|---|
//! | `entresol-store` | [`Work::Store`] | snapshots: [`crate::store`] |
//! | `entresol-swap` | [`Work::Swap`] | pages that left memory: [`crate::swap`] |
//!
//! Protocol: [`init`] at boot; then [`find`], [`Disk::submit`], and in the work that the disk's interrupt raises
//! [`Disk::take`] until there is nothing. Nothing here waits but [`init`].

mod buffer;
mod disk;

use crate::arch::boot::{BootInfo, Device};
use crate::arch::lines;
use arrayvec::ArrayVec;
use entresol_sync::Once;
use virtio_drivers::Error;
use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};
use virtio_drivers::transport::{DeviceType, Transport};

pub use buffer::Buffer;
pub use disk::{Completion, DEPTH, Disk, DiskError, Operation, Request, SECTOR};

use crate::control;
use crate::host_work::{self, Work};

/// Serial numbers, and whose work their interrupts raise.
const KNOWN: [(&[u8], Work); 2] = [(b"entresol-store", Work::Store), (b"entresol-swap", Work::Swap)];

static DISKS: Once<ArrayVec<Disk, { KNOWN.len() }>> = Once::new();

/// Finds the hypervisor's disks: after the control channel, before any guest has a device.
pub fn init(info: &BootInfo) {
    let mut disks = ArrayVec::<Disk, { KNOWN.len() }>::new();
    // A transport that is looked at is reset when it is let go of: not one that works already.
    for device in info.virtio_mmio.iter().filter(|device| !control::owns(device.intid)) {
        match probe(device, &disks) {
            Ok(Some(disk)) => disks.push(disk),
            Ok(None) => {}
            Err(error) => log::error!("disk at {:#x}: not used: {error}", device.registers.start),
        }
    }
    for disk in DISKS.call_once(|| disks) {
        let enabled =
            lines::set_edge(disk.device.intid, disk.device.edge).and_then(|()| lines::enable(disk.device.intid));
        if let Err(error) = enabled {
            log::error!("disk at {:#x}: no interrupt: {error}", disk.device.registers.start);
        }
        // The line may have risen before the interrupt was edge-triggered, and would never rise again.
        disk.acknowledge();
        host_work::raise(disk.work());
    }
}

/// The device's disk, if it is one and is known; a second one of a name is nobody's.
fn probe(device: &Device, found: &[Disk]) -> Result<Option<Disk>, Error> {
    let Some(header) = core::ptr::NonNull::new(device.registers.start as *mut VirtIOHeader) else { return Ok(None) };
    // SAFETY: the device tree says that these are a virtio-mmio slot's registers; EL2 maps them as Device memory for ever,
    // and no other code uses a block device's.
    let transport = unsafe { MmioTransport::new(header, device.registers.size() as usize) };
    // An error: the slot is empty, or of a kind that is not known.
    let Ok(transport) = transport else { return Ok(None) };
    if transport.device_type() != DeviceType::Block {
        return Ok(None);
    }
    let work_of = |serial: &[u8]| {
        let (_, work) = KNOWN.into_iter().find(|(known, _)| *known == serial)?;
        (!found.iter().any(|disk| disk.work() == work)).then_some(work)
    };
    Disk::start(transport, *device, work_of)
}

/// The disk whose interrupt raises `work`, if the machine has it.
pub fn find(work: Work) -> Option<&'static Disk> {
    DISKS.get()?.iter().find(|disk| disk.work() == work)
}

/// Whether `intid` is a disk's.
pub fn owns(intid: u32) -> bool {
    DISKS.get().is_some_and(|disks| disks.iter().any(|disk| disk.device.intid == intid))
}

/// The interrupt `intid`, a disk's, has come.
pub fn acknowledge(intid: u32) {
    for disk in DISKS.get().into_iter().flatten().filter(|disk| disk.device.intid == intid) {
        disk.acknowledge();
        host_work::raise(disk.work());
    }
}
