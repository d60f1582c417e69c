//! A disk: the image in the boot bundle, and over it the pages that the guest wrote.
//!
//! Purpose: the image stays as it was given, so that virtual machines can share it and a restart of the hypervisor finds it
//! unchanged; what a guest writes lives in an anonymous memory object, page by page, as long as its disk does. A reboot of
//! the guest keeps it.
//!
//! Protocol: a page of the overlay exists exactly if the guest wrote to it. A first write of less than a page copies the rest
//! from the image before the page is made known: both under the disk's lock.

use alloc::sync::Arc;

use crate::arch::cpu;
use entresol_addr::PAGE_SIZE;
use entresol_backing::{AccessError, CreateError, ForkError, ObjectHandle, Policy, Spec};
use entresol_devices::virtio::block::{Disk, DiskError};
use entresol_sync::Mutex;

use crate::host;

/// Bytes of a sector (virtio 1.2, 5.2.4).
const SECTOR: u64 = 512;

/// A disk.
pub struct Overlay {
    image: &'static [u8],
    read_only: bool,
    written: Mutex<Option<ObjectHandle>>,
}

impl Overlay {
    /// A disk that holds `image`.
    pub fn new(image: &'static [u8], read_only: bool) -> Arc<Self> {
        Arc::new(Self { image, read_only, written: Mutex::new(None) })
    }

    /// A second disk that reads as this one does now; each has its own writes from then on. Not called by a pinned CPU.
    ///
    /// # Errors
    ///
    /// [`ForkError`]; nothing changed.
    pub fn fork(&self) -> Result<Arc<Self>, ForkError> {
        let host = host::get();
        let written = self.written.lock();
        // No guest maps it: who writes holds the lock.
        let fork = |handle| host.objects.fork(&host.supply(cpu::index()), &host.epoch, handle);
        let written = written.map(fork).transpose()?;
        Ok(Arc::new(Self { image: self.image, read_only: self.read_only, written: Mutex::new(written) }))
    }

    /// A disk over `image` whose written pages are those of `written`, which it owns.
    pub fn over(image: &'static [u8], read_only: bool, written: ObjectHandle) -> Arc<Self> {
        Arc::new(Self { image, read_only, written: Mutex::new(Some(written)) })
    }

    /// The object of its written pages, if one was ever written.
    pub fn written(&self) -> Option<ObjectHandle> {
        *self.written.lock()
    }

    /// Copies the bytes at `offset`, which lie in one page, to `to`.
    fn read_page(&self, written: Option<ObjectHandle>, offset: u64, to: &mut [u8]) -> Result<(), DiskError> {
        let host = host::get();
        let pin = host.epoch.pin(cpu::index());
        if let Some(object) = written.and_then(|handle| host.objects.get(&pin, handle))
            && object.is_resident(&host.machine, offset / PAGE_SIZE)
        {
            return object.read(&host.supply(pin.cpu()), offset, to).map_err(|_| DiskError::Io);
        }
        to.copy_from_slice(self.image.get(offset as usize..offset as usize + to.len()).ok_or(DiskError::Io)?);
        Ok(())
    }

    /// Stores `from` at `offset`, all in one page.
    fn write_page(&self, handle: ObjectHandle, offset: u64, from: &[u8]) -> Result<(), DiskError> {
        let host = host::get();
        let pin = host.epoch.pin(cpu::index());
        let object = host.objects.get(&pin, handle).ok_or(DiskError::Io)?;
        let page = offset & !(PAGE_SIZE - 1);
        let supply = host.supply(cpu::index());
        if !object.is_resident(&host.machine, offset / PAGE_SIZE) {
            let end = self.image.len().min((page + PAGE_SIZE) as usize);
            let rest = self.image.get(page as usize..end).ok_or(DiskError::Io)?;
            object.write(&supply, page, rest).map_err(disk_error)?;
        }
        object.write(&supply, offset, from).map_err(disk_error)
    }

    /// The object of written pages, made at the first write.
    fn object(&self, written: &mut Option<ObjectHandle>) -> Result<ObjectHandle, DiskError> {
        if let Some(handle) = *written {
            return Ok(handle);
        }
        let host = host::get();
        let frames = (self.image.len() as u64).div_ceil(PAGE_SIZE);
        let spec = Spec::anonymous(frames, Policy::Pages);
        let handle = host.objects.create(&host.supply(cpu::index()), spec).map_err(|error| match error {
            CreateError::OutOfMemory => DiskError::OutOfMemory,
            _ => DiskError::Io,
        })?;
        *written = Some(handle);
        Ok(handle)
    }

    /// Whether `len` bytes from `sector` are on the disk; their byte offset if so.
    fn place(&self, sector: u64, len: usize) -> Result<u64, DiskError> {
        let offset = sector.checked_mul(SECTOR).ok_or(DiskError::Io)?;
        let end = offset.checked_add(len as u64).ok_or(DiskError::Io)?;
        if end <= self.image.len() as u64 { Ok(offset) } else { Err(DiskError::Io) }
    }
}

fn disk_error(error: AccessError) -> DiskError {
    match error {
        AccessError::OutOfMemory => DiskError::OutOfMemory,
        _ => DiskError::Io,
    }
}

impl Disk for Overlay {
    fn sectors(&self) -> u64 {
        self.image.len() as u64 / SECTOR
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, sector: u64, to: &mut [u8]) -> Result<(), DiskError> {
        let mut offset = self.place(sector, to.len())?;
        let written = *self.written.lock();
        let mut rest = to;
        while !rest.is_empty() {
            let step = rest.len().min((PAGE_SIZE - offset % PAGE_SIZE) as usize);
            let (part, after) = rest.split_at_mut(step);
            self.read_page(written, offset, part)?;
            offset += step as u64;
            rest = after;
        }
        Ok(())
    }

    fn write(&self, sector: u64, from: &[u8]) -> Result<(), DiskError> {
        let mut offset = self.place(sector, from.len())?;
        let mut written = self.written.lock();
        let handle = self.object(&mut written)?;
        let mut rest = from;
        while !rest.is_empty() {
            let step = rest.len().min((PAGE_SIZE - offset % PAGE_SIZE) as usize);
            let (part, after) = rest.split_at(step);
            self.write_page(handle, offset, part)?;
            offset += step as u64;
            rest = after;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let host = host::get();
        if let Some(handle) = *self.written.lock()
            && let Err(error) = host.objects.destroy(&host.supply(cpu::index()), &host.epoch, handle)
        {
            log::error!("a disk's written pages stay: {error:?}");
        }
    }
}
