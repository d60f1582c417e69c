//! Guest memory as devices and the loader see it: copies through slots and objects.

use entresol_addr::Gpa;
use entresol_arch_arm64::stage2::Stage2;
use entresol_devices::bus::{GuestMemory, MemoryError};
use entresol_loader::Memory as LoaderMemory;
use entresol_metal_arm64::{Metal, cpu};
use entresol_mmu::CopyError;
use entresol_slot::Hint;

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

fn device_error(error: CopyError) -> MemoryError {
    match error {
        CopyError::Outside { gpa } => MemoryError::Outside { gpa },
        CopyError::ReadOnly { gpa } => MemoryError::ReadOnly { gpa },
        CopyError::OutOfMemory => MemoryError::OutOfMemory,
    }
}

impl GuestMemory for DeviceMemory {
    fn read(&self, gpa: Gpa, to: &mut [u8]) -> Result<(), MemoryError> {
        let vm = self.link.vm().ok_or(MemoryError::Outside { gpa })?;
        let pin = host::get().epoch.pin(cpu::index());
        vm.memory.read(&pin, &self.hint, gpa, to).map_err(device_error)
    }

    fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        let vm = self.link.vm().ok_or(MemoryError::Outside { gpa })?;
        let pin = host::get().epoch.pin(cpu::index());
        vm.memory.write(&pin, &self.hint, gpa, from).map_err(device_error)
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
