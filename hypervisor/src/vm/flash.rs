//! Flash: where its bytes are, and how the guest sees them.
//!
//! Purpose: [`FlashMemory`] is an anonymous memory object that begins as a copy of a file and lives, like a disk's overlay (ADR
//! 15), over the resets of its virtual machine. [`Window`] shows it to one life of the guest: as a read-only slot while the
//! flash reads its array, and as no slot, so that every access exits, while it does anything else.
//!
//! Protocol: [`entresol_devices::flash`] calls `hide` before and `show` after whatever changes bytes. Taking the slot away waits
//! for every CPU that may have found it and flushes its translations, so bytes change only where nobody maps them; the fault
//! that maps them again cleans them first (INV-1), and makes new instructions of them (INV-6).
//!
//! Invariants: the slot is there exactly while the flash says that it is shown; only the flash, under its lock, updates it. An owner
//! who puts an alias in its place while it is away keeps it away.
//!
//! Forks: where the array is shown, the core copies what its slot shows, as it does with memory; else its owner's object is copied. No vCPU is
//! in a store to it then.
//!
//! Lock order: the flash's lock → slots → objects; the name of its object is a leaf.

use alloc::sync::Arc;

use entresol_addr::{Gpa, PAGE_SIZE};
use entresol_backing::{AccessError, CreateError, ForkError, ObjectHandle, Policy, Spec};
use entresol_devices::flash::{Backing, BackingError};
use entresol_slot::{ObjectId, SlotError, SlotFlags, SlotRequest};
use entresol_sync::Mutex;

use super::link::Link;
use super::slots;
use crate::arch::{cpu, map};
use crate::host;

/// The bytes of a flash.
pub struct FlashMemory {
    /// Of a copy that is being made, none yet.
    object: Mutex<Option<ObjectHandle>>,
    size: u64,
}

/// Why there is no flash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlashMemoryError {
    /// No object.
    Create(CreateError),
    /// No frames for what it holds at boot.
    Write(AccessError),
}

impl FlashMemory {
    /// A flash that holds `image`. Pages that are zero take no memory. `tagged`: its guest has memory tagging.
    ///
    /// # Errors
    ///
    /// [`FlashMemoryError`]; nothing is left behind.
    pub fn new(image: &'static [u8], tagged: bool) -> Result<Arc<Self>, FlashMemoryError> {
        let (host, size) = (host::get(), image.len() as u64);
        let supply = host.supply(cpu::index());
        let frames = size.div_ceil(PAGE_SIZE);
        let spec = Spec::Anonymous { frames, policy: Policy::Pages, tagged };
        let object = host.objects.create(&supply, spec).map_err(FlashMemoryError::Create)?;
        let memory = Arc::new(Self { object: Mutex::new(Some(object)), size });
        for (page, bytes) in image.chunks(PAGE_SIZE as usize).enumerate() {
            if bytes.iter().any(|byte| *byte != 0) {
                memory.store(page as u64 * PAGE_SIZE, bytes).map_err(FlashMemoryError::Write)?;
            }
        }
        Ok(memory)
    }

    /// For a copy of its virtual machine, which gets its bytes by [`Self::copy_to`].
    pub fn like(&self) -> Arc<Self> {
        Arc::new(Self { object: Mutex::new(None), size: self.size })
    }

    /// The bytes as they are now become those of `copy`; no slot shows them.
    ///
    /// # Errors
    ///
    /// [`ForkError`]; `copy` has none still.
    pub fn copy_to(&self, copy: &Self) -> Result<(), ForkError> {
        let host = host::get();
        let object = host.objects.fork(&host.supply(cpu::index()), &host.epoch, self.object())?;
        copy.take(object);
        Ok(())
    }

    /// Its bytes are `object`'s, which it owns from now on.
    pub fn take(&self, object: ObjectHandle) {
        *self.object.lock() = Some(object);
    }

    fn object(&self) -> ObjectHandle {
        self.object.lock().expect("a flash that somebody uses has its bytes")
    }

    /// The slot that shows it.
    pub fn slot(&self) -> SlotRequest {
        SlotRequest {
            id: slots::FLASH,
            base: Gpa::new(map::FLASH_BASE),
            size: self.size,
            object: ObjectId::new(self.object().raw()),
            offset: 0,
            flags: SlotFlags::READ_ONLY.bits(),
        }
    }

    fn store(&self, offset: u64, from: &[u8]) -> Result<(), AccessError> {
        let host = host::get();
        let pin = host.epoch.pin(cpu::index());
        let object = host.objects.get(&pin, self.object()).expect("it lives as long as its owner");
        object.write(&host.supply(pin.cpu()), offset, from)
    }

    fn load(&self, offset: u64, to: &mut [u8]) -> Result<(), AccessError> {
        let host = host::get();
        let pin = host.epoch.pin(cpu::index());
        let object = host.objects.get(&pin, self.object()).expect("it lives as long as its owner");
        object.read(&host.supply(pin.cpu()), offset, to)
    }
}

impl Drop for FlashMemory {
    fn drop(&mut self) {
        let host = host::get();
        let Some(object) = self.object.get_mut().take() else { return };
        if let Err(error) = host.objects.destroy(&host.supply(cpu::index()), &host.epoch, object) {
            log::error!("a flash's pages stay: {error:?}");
        }
    }
}

/// A flash as one life of the guest sees it. Its slot is there from the start.
pub struct Window {
    memory: Arc<FlashMemory>,
    link: Link,
}

impl Window {
    /// Of `memory`, for the virtual machine at the end of `link`.
    pub fn new(memory: Arc<FlashMemory>, link: Link) -> Self {
        Self { memory, link }
    }

    /// A virtual machine that is gone shows nothing.
    fn set(&self, request: &SlotRequest) -> Result<(), SlotError> {
        self.link.vm().map_or(Ok(()), |vm| vm.memory.set_slot(cpu::index(), request))
    }
}

impl Backing for Window {
    fn size(&self) -> u64 {
        self.memory.size
    }

    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), BackingError> {
        self.memory.load(offset, to).map_err(|_| BackingError)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), BackingError> {
        self.memory.store(offset, from).map_err(|_| BackingError)
    }

    /// Not while the owner has put another slot in its place.
    fn show(&self) -> bool {
        self.set(&self.memory.slot()).is_ok()
    }

    fn hide(&self) {
        let gone = self.set(&SlotRequest { size: 0, ..self.memory.slot() });
        gone.expect("a slot that is shown is there, and nobody else has its number");
    }
}
