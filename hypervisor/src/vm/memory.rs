//! Guest memory as devices and the loader see it: copies through slots and objects.

use entresol_addr::Gpa;
use entresol_arch_arm64::stage2::Stage2;
use entresol_backing::Reach;
use entresol_devices::bus::{GuestMemory, MemoryError};
use entresol_loader::Memory as LoaderMemory;
use entresol_metal_arm64::{Metal, cpu};
use entresol_mmu::CopyError;
use entresol_slot::Hint;
use entresol_sync::hint;
use entresol_wire::config::PrivateIo;

use super::Vm;
use super::lines::Link;
use crate::host;
use crate::paging::{self, Wanted};

type Memory = entresol_mmu::Vm<'static, Metal, Stage2>;

/// For devices.
pub struct DeviceMemory {
    link: Link,
    hint: Hint,
    restricted: bool,
}

/// How much of its memory the devices of `vm` see.
fn reach(vm: &Vm) -> Reach {
    match vm.config.private_io {
        PrivateIo::Lease => Reach::Everything,
        PrivateIo::Bounce => Reach::Open,
    }
}

impl DeviceMemory {
    /// The memory of the virtual machine at the end of `link`, whose devices reach its private pages so.
    pub fn new(link: Link, private_io: PrivateIo) -> Self {
        Self { link, hint: Hint::new(), restricted: private_io == PrivateIo::Bounce }
    }
}

/// What a device of `vm` is told, or `None` if it has to try again, unpinned in between.
fn device_error(vm: &Vm, error: CopyError) -> Option<MemoryError> {
    match error {
        CopyError::Outside { gpa } => Some(MemoryError::Outside { gpa }),
        CopyError::ReadOnly { gpa } => Some(MemoryError::ReadOnly { gpa }),
        CopyError::OutOfMemory => Some(MemoryError::OutOfMemory),
        CopyError::Absent { gpa, .. } => absent(vm, gpa),
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

impl GuestMemory for DeviceMemory {
    fn read(&self, gpa: Gpa, to: &mut [u8]) -> Result<(), MemoryError> {
        let vm = self.link.vm().ok_or(MemoryError::Outside { gpa })?;
        when_settled(&vm, || {
            let pin = host::get().epoch.pin(cpu::index());
            vm.memory.read_as(&pin, &self.hint, reach(&vm), gpa, to)
        })
    }

    fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        let vm = self.link.vm().ok_or(MemoryError::Outside { gpa })?;
        when_settled(&vm, || {
            let pin = host::get().epoch.pin(cpu::index());
            vm.memory.write_as(&pin, &self.hint, reach(&vm), gpa, from)
        })
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
