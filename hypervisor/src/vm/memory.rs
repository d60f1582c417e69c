//! Guest memory as devices and the loader see it: copies through slots and objects.
//!
//! Rings of virtqueues are reached again and again, so each has page-frame caches of its own, one for each page that it may lie in:
//! an area is at most 4 KiB long. A cache is for a page from the first access on that finds it of no use; what it cannot know (the
//! page is read-only, not in memory, out of the device's reach, or changes at the moment) or is not asked (a piece across the edge
//! of a page), goes the way of all copies, which says what is wrong. So no ring is refused because it cannot be remembered, and the
//! first access after a fork, a hole or a conversion finds its way by itself.
//!
//! Invariants: INV-10: what a cache leases of private memory is given back when the queue stops working.
//! Lock order: the device's lock → a cache's; no caller is pinned.

use entresol_addr::{Gpa, PAGE_SIZE};
use entresol_backing::Reach;
use entresol_devices::bus::{Area, GuestMemory, MemoryError, Ring};
use entresol_devices::virtio::QUEUE_SIZE_MAX;
use entresol_loader::Memory as LoaderMemory;
use entresol_mmu::{CacheError, CopyError, Piece};
use entresol_slot::Hint;
use entresol_sync::hint;
use entresol_wire::config::PrivateIo;

use super::Vm;
use super::link::Link;
use crate::arch::{Memory, cpu};
use crate::host;
use crate::paging::{self, Wanted};

/// Pages that an area may lie in.
const PAGES: usize = 2;
/// Areas of a queue.
const AREAS: usize = 3;
/// Page-frame caches of a queue.
pub const QUEUE_CACHES: usize = AREAS * PAGES;

const _: () = assert!(16 * QUEUE_SIZE_MAX as u64 <= PAGE_SIZE, "the longest area lies in two pages at most");

/// For devices.
pub struct DeviceMemory {
    link: Link,
    hint: Hint,
    restricted: bool,
    /// The first page-frame cache of its device's first queue.
    first_cache: usize,
}

/// The cache of a queue, counted from its first, for the piece of `area` at `gpa`: neighbouring pages have different ones.
fn cache(area: Area, gpa: Gpa) -> usize {
    let area = match area {
        Area::Descriptors => 0,
        Area::Driver => 1,
        Area::Device => 2,
    };
    area * PAGES + (gpa.frame().get() % PAGES as u64) as usize
}

/// How much of its memory the devices of `vm` see.
fn reach(vm: &Vm) -> Reach {
    match vm.config.private_io {
        PrivateIo::Lease => Reach::Everything,
        PrivateIo::Bounce => Reach::Open,
    }
}

impl DeviceMemory {
    /// The memory of the virtual machine at the end of `link`, whose devices reach its private pages so, for a device that has the
    /// page-frame caches from `first_cache` on, [`QUEUE_CACHES`] for each queue.
    pub fn new(link: Link, private_io: PrivateIo, first_cache: usize) -> Self {
        Self { link, hint: Hint::new(), restricted: private_io == PrivateIo::Bounce, first_cache }
    }

    /// Does `access` to the `len` bytes of `ring` at `gpa` through their cache; what it may not be able to, see the module. Whether
    /// it did.
    fn through_cache(&self, vm: &Vm, ring: Ring, gpa: Gpa, len: usize, mut access: impl FnMut(&Piece<'_, '_>)) -> bool {
        let index = self.first_cache + ring.queue * QUEUE_CACHES + cache(ring.area, gpa);
        let mut once = || {
            let pin = host::get().epoch.pin(cpu::index());
            let piece = vm.memory.check_at(&pin, index, gpa, len as u64);
            piece.as_ref().map(&mut access).is_some()
        };
        once() || gpa.page_offset() + len as u64 <= PAGE_SIZE && find(vm, index, gpa) && once()
    }
}

/// Has cache `index` look for the page around `gpa`. Whether it knows it now.
#[cold]
fn find(vm: &Vm, index: usize, gpa: Gpa) -> bool {
    let page = gpa.frame().base();
    let found = vm.memory.activate_as(cpu::index(), index, reach(vm), page, PAGE_SIZE);
    if let Err(error) = &found {
        log::trace!("vm {}: a ring at {gpa:#x} is not remembered: {error:?}", vm.config.name);
    }
    found.is_ok()
}

/// What a device of `vm` is told, or `None` if it has to try again, unpinned in between.
fn device_error(vm: &Vm, error: CopyError) -> Option<MemoryError> {
    match error {
        CopyError::Outside { gpa } => Some(MemoryError::Outside { gpa }),
        CopyError::ReadOnly { gpa } => Some(MemoryError::ReadOnly { gpa }),
        CopyError::OutOfMemory => Some(MemoryError::OutOfMemory),
        CopyError::Absent { gpa, .. } => absent(vm, gpa),
        CopyError::Poisoned { gpa } => Some(MemoryError::Poisoned { gpa }),
        CopyError::MemoryFault(fault) => Some(MemoryError::Private { gpa: fault.gpa() }),
        CopyError::Busy => None,
    }
}

/// The page at `gpa` is on its way; the device's lock is held, so that who cannot have it is paused afterwards
/// ([`super::devices`]).
#[cold]
fn absent(vm: &Vm, gpa: Gpa) -> Option<MemoryError> {
    match paging::want(vm, gpa) {
        Wanted::Later(_) => Some(MemoryError::Absent),
        Wanted::Now => None,
        Wanted::OutOfMemory => Some(MemoryError::OutOfMemory),
        Wanted::Lost => {
            vm.devices.lose();
            Some(MemoryError::Absent)
        }
    }
}

/// Makes an access until no fork or invalidation is in its way: another CPU ends that, and waits only for pins.
fn when_settled(vm: &Vm, mut access: impl FnMut() -> Result<(), CopyError>) -> Result<(), MemoryError> {
    loop {
        match access().map_err(|error| device_error(vm, error)) {
            Ok(()) => return Ok(()),
            Err(Some(error)) => return Err(error),
            Err(None) => hint::spin_loop(),
        }
    }
}

impl DeviceMemory {
    fn read_from(&self, vm: &Vm, gpa: Gpa, to: &mut [u8]) -> Result<(), MemoryError> {
        when_settled(vm, || {
            let pin = host::get().epoch.pin(cpu::index());
            vm.memory.read_as(&pin, &self.hint, reach(vm), gpa, to)
        })
    }

    fn write_to(&self, vm: &Vm, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        when_settled(vm, || {
            let pin = host::get().epoch.pin(cpu::index());
            vm.memory.write_as(&pin, &self.hint, reach(vm), gpa, from)
        })
    }
}

impl GuestMemory for DeviceMemory {
    fn read(&self, gpa: Gpa, to: &mut [u8]) -> Result<(), MemoryError> {
        let vm = self.link.vm().ok_or(MemoryError::Outside { gpa })?;
        self.read_from(&vm, gpa, to)
    }

    fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        let vm = self.link.vm().ok_or(MemoryError::Outside { gpa })?;
        self.write_to(&vm, gpa, from)
    }

    fn read_ring(&self, ring: Ring, gpa: Gpa, to: &mut [u8]) -> Result<(), MemoryError> {
        let vm = self.link.vm().ok_or(MemoryError::Outside { gpa })?;
        let known = self.through_cache(&vm, ring, gpa, to.len(), |piece| {
            vm.memory.read_piece(piece, to);
        });
        if known { Ok(()) } else { self.read_from(&vm, gpa, to) }
    }

    fn write_ring(&self, ring: Ring, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        let vm = self.link.vm().ok_or(MemoryError::Outside { gpa })?;
        let known = self.through_cache(&vm, ring, gpa, from.len(), |piece| vm.memory.write_piece(piece, from));
        if known { Ok(()) } else { self.write_to(&vm, gpa, from) }
    }

    /// May wait for a grace period.
    fn forget_rings(&self, queue: usize) {
        // While it is being taken apart its caches end with it.
        let Some(vm) = self.link.vm() else { return };
        let first = self.first_cache + queue * QUEUE_CACHES;
        for index in first..first + QUEUE_CACHES {
            match vm.memory.deactivate(index) {
                // A copy has none before it runs, and so no lease.
                Ok(()) | Err(CacheError::Absent { .. }) => {}
                Err(error) => log::warn!("vm {}: page-frame cache {index} stays: {error:?}", vm.config.name),
            }
        }
    }

    fn is_restricted(&self) -> bool {
        self.restricted
    }
}

/// For the loader, before the virtual machine runs.
pub struct BootMemory<'m> {
    memory: &'m Memory,
    hint: Hint,
}

impl<'m> BootMemory<'m> {
    /// `memory`, whose slots are set.
    pub fn new(memory: &'m Memory) -> Self {
        Self { memory, hint: Hint::new() }
    }
}

impl LoaderMemory for BootMemory<'_> {
    type Error = CopyError;

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), CopyError> {
        let pin = host::get().epoch.pin(cpu::index());
        self.memory.write(&pin, &self.hint, gpa, bytes)
    }

    /// Fresh memory reads as zero already.
    fn zero(&mut self, _gpa: Gpa, _size: u64) -> Result<(), CopyError> {
        Ok(())
    }
}
