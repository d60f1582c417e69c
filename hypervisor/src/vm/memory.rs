//! Guest memory as devices and the loader see it: copies through slots and objects.

use entresol_addr::Gpa;
use entresol_arch_arm64::stage2::Stage2;
use entresol_devices::bus::{GuestMemory, MemoryError};
use entresol_loader::Memory as LoaderMemory;
use entresol_metal_arm64::{Metal, cpu};
use entresol_mmu::CopyError;
use entresol_slot::Hint;
use entresol_sync::hint;

use super::lines::Link;
use crate::host;

type Memory = entresol_mmu::Vm<'static, Metal, Stage2>;

/// For devices.
pub struct DeviceMemory {
    link: Link,
    hint: Hint,
}

impl DeviceMemory {
    /// The memory of the virtual machine at the end of `link`.
    pub fn new(link: Link) -> Self {
        Self { link, hint: Hint::new() }
    }
}

/// What a device is told, or `None` if it has to try again, unpinned in between.
fn device_error(error: CopyError) -> Option<MemoryError> {
    match error {
        CopyError::Outside { gpa } => Some(MemoryError::Outside { gpa }),
        CopyError::ReadOnly { gpa } => Some(MemoryError::ReadOnly { gpa }),
        CopyError::OutOfMemory => Some(MemoryError::OutOfMemory),
        CopyError::Absent { .. } => Some(MemoryError::Absent),
        CopyError::Busy => None,
    }
}

/// Makes an access until no fork or invalidation is in its way: another CPU ends that, and waits only for pins.
fn when_settled(mut access: impl FnMut() -> Result<(), CopyError>) -> Result<(), MemoryError> {
    loop {
        match access().map_err(device_error) {
            Ok(()) => return Ok(()),
            Err(Some(error)) => return Err(error),
            Err(None) => hint::spin_loop(),
        }
    }
}

impl GuestMemory for DeviceMemory {
    fn read(&self, gpa: Gpa, to: &mut [u8]) -> Result<(), MemoryError> {
        let vm = self.link.vm().ok_or(MemoryError::Outside { gpa })?;
        when_settled(|| {
            let pin = host::get().epoch.pin(cpu::index());
            vm.memory.read(&pin, &self.hint, gpa, to)
        })
    }

    fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        let vm = self.link.vm().ok_or(MemoryError::Outside { gpa })?;
        when_settled(|| {
            let pin = host::get().epoch.pin(cpu::index());
            vm.memory.write(&pin, &self.hint, gpa, from)
        })
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
