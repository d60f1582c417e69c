//! What we ask of EFI firmware.
//!
//! Protocol: [`Firmware`] stands for boot services that have not ended; ending them takes it away. After a first failed
//! ExitBootServices only memory services may be called (UEFI 2.10, 7.4.6), so it is not given back then.

use core::ffi::c_void;
use core::fmt::{self, Write};
use core::mem::offset_of;
use core::ptr::null_mut;
use core::slice;

use arrayvec::ArrayVec;
use r_efi::efi::{
    self, ALLOCATE_ANY_PAGES, Boolean, BootServices, DTB_TABLE_GUID, Guid, Handle, LOADER_DATA, Status, SystemTable,
};
use r_efi::protocols::{device_path, load_file2};

use super::memory_map::MemoryMap;
use crate::boot::{MAX_REGIONS, Region};

/// Pages of EFI, whatever the CPU's are (UEFI 2.10, 7.2).
const EFI_PAGE: usize = 4096;

/// The vendor device path on which loaders put an initial RAM disk (Linux, Documentation/admin-guide/efi-stub.rst).
const INITRD_MEDIA: Guid =
    Guid::from_fields(0x5568_e427, 0x68fc, 0x4f3d, 0xac, 0x74, &[0xca, 0x55, 0x52, 0x31, 0xcc, 0x68]);

/// How often ExitBootServices is tried: each time the map may have changed under us by an event.
const EXIT_ATTEMPTS: u32 = 8;
/// Room for what our own allocation and the firmware's events add to the memory map.
const MAP_SLACK: usize = 4096;

/// UEFI 2.10, 10.3.5.3: a vendor-defined media device path, and its end.
#[repr(C)]
struct InitrdPath {
    vendor: device_path::Protocol,
    guid: Guid,
    end: device_path::Protocol,
}

const _: () = assert!(offset_of!(InitrdPath, end) == 20 && size_of::<InitrdPath>() == 24, "nodes follow each other");

const END: device_path::Protocol =
    device_path::Protocol { r#type: device_path::TYPE_END, sub_type: device_path::End::SUBTYPE_ENTIRE, length: [4, 0] };

/// The firmware did not do what it was asked.
pub enum FirmwareError {
    /// The call with its purpose, and what it said.
    Call(&'static str, Status),
    /// The memory map is so fragmented that this range of ours is in none of its largest pieces.
    Lost(Region),
}

impl FirmwareError {
    /// The status for whoever started the application.
    pub fn status(&self) -> Status {
        match self {
            Self::Call(_, status) => *status,
            Self::Lost(_) => Status::OUT_OF_RESOURCES,
        }
    }
}

impl fmt::Display for FirmwareError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call(what, status) => write!(f, "the firmware's {what} failed: {:#x}", status.as_usize()),
            Self::Lost(range) => write!(
                f,
                "the firmware's memory map has more than {MAX_REGIONS} pieces, and {range:x?} is not in the largest"
            ),
        }
    }
}

/// A firmware whose boot services have not ended.
pub struct Firmware {
    image: Handle,
    table: *const SystemTable,
}

impl Firmware {
    /// # Safety
    ///
    /// Both are what the firmware passed to the application that runs, boot services have not ended, and nothing ends them
    /// but [`Firmware::exit_boot_services`].
    pub unsafe fn new(image: Handle, table: *const SystemTable) -> Self {
        Self { image, table }
    }

    fn table(&self) -> &SystemTable {
        // SAFETY: the system table lives as long as boot services do, by `new`'s contract.
        unsafe { &*self.table }
    }

    fn services(&self) -> &BootServices {
        // SAFETY: as above.
        unsafe { &*self.table().boot_services }
    }

    /// Writes to the firmware's console, if it has one.
    pub fn print(&self, text: fmt::Arguments<'_>) {
        let mut console = Console { output: self.table().con_out, pending: ArrayVec::new() };
        // The console never gives up; a formatter that does cuts the text short, and there is nobody left to tell.
        let _ = console.write_fmt(text);
        console.flush();
    }

    /// Address of the device tree in the configuration table.
    pub fn device_tree(&self) -> Option<usize> {
        let table = self.table();
        // SAFETY: the firmware states both.
        let entries = unsafe { slice::from_raw_parts(table.configuration_table, table.number_of_table_entries) };
        entries.iter().find(|entry| entry.vendor_guid == DTB_TABLE_GUID).map(|entry| entry.vendor_table as usize)
    }

    /// Whole pages for `size` bytes, which the firmware gives to nobody else; `what` names the call in an error. The range
    /// has exactly that size.
    ///
    /// # Errors
    ///
    /// [`FirmwareError::Call`].
    pub fn allocate(&self, size: usize, what: &'static str) -> Result<Region, FirmwareError> {
        let mut start = 0;
        let pages = size.div_ceil(EFI_PAGE);
        // SAFETY: a call as specified (UEFI 2.10, 7.2.1).
        let status =
            unsafe { (self.services().allocate_pages)(ALLOCATE_ANY_PAGES, LOADER_DATA, pages, &raw mut start) };
        succeeded(status, what)?;
        Region::sized(start, size as u64).ok_or(FirmwareError::Call(what, Status::LOAD_ERROR))
    }

    /// Loads the initial RAM disk; `None` when there is none.
    ///
    /// # Errors
    ///
    /// [`FirmwareError::Call`].
    pub fn bundle(&self) -> Result<Option<Region>, FirmwareError> {
        let vendor = device_path::Protocol {
            r#type: device_path::TYPE_MEDIA,
            sub_type: device_path::Media::SUBTYPE_VENDOR,
            length: [20, 0],
        };
        let mut path = InitrdPath { vendor, guid: INITRD_MEDIA, end: END };
        let mut rest = (&raw mut path).cast::<device_path::Protocol>();
        let Some(loader) = self.loader_of(&mut rest)? else { return Ok(None) };
        let load = |size: &mut usize, buffer: *mut c_void| {
            // SAFETY: the protocol is the firmware's; `rest` is what it left of our path (UEFI 2.10, 13.2).
            unsafe { ((*loader).load_file)(loader, rest, Boolean::FALSE, size, buffer) }
        };
        let mut size = 0;
        let status = load(&mut size, null_mut());
        if status != Status::BUFFER_TOO_SMALL {
            // Without a buffer, only a file without bytes can have been loaded.
            return succeeded(status, "LoadFile for the bundle's size").map(|()| None);
        }
        let pages = self.allocate(size, "AllocatePages for the bundle")?;
        let room = size;
        succeeded(load(&mut size, pages.start as *mut c_void), "LoadFile of the bundle")?;
        Ok(Some(Region { start: pages.start, end: pages.start + size.min(room) as u64 }))
    }

    /// The LoadFile2 protocol of exactly this path, of which only the end is left.
    fn loader_of(
        &self,
        path: &mut *mut device_path::Protocol,
    ) -> Result<Option<*mut load_file2::Protocol>, FirmwareError> {
        let (mut protocol, mut handle, mut interface) = (load_file2::PROTOCOL_GUID, null_mut(), null_mut());
        // SAFETY: a call as specified (UEFI 2.10, 7.3.8); `path` points to a whole device path.
        let status = unsafe { (self.services().locate_device_path)(&raw mut protocol, path, &raw mut handle) };
        if status == Status::NOT_FOUND {
            return Ok(None);
        }
        succeeded(status, "LocateDevicePath for the bundle")?;
        // SAFETY: the firmware leaves `path` at one of its nodes.
        if unsafe { (**path).r#type } != device_path::TYPE_END {
            return Ok(None);
        }
        // SAFETY: a call as specified (UEFI 2.10, 7.3.7).
        let status = unsafe { (self.services().handle_protocol)(handle, &raw mut protocol, &raw mut interface) };
        succeeded(status, "HandleProtocol for the bundle").map(|()| Some(interface.cast()))
    }

    /// Ends boot services; tells which RAM is free then. `ours` must be in it.
    ///
    /// # Errors
    ///
    /// [`FirmwareError`], with the firmware as long as it may be called.
    pub fn exit_boot_services(
        self,
        ours: impl Iterator<Item = Region> + Clone,
    ) -> Result<ArrayVec<Region, MAX_REGIONS>, (Option<Self>, FirmwareError)> {
        let buffer = match self.map_buffer() {
            Ok(buffer) => buffer,
            Err(error) => return Err((Some(self), error)),
        };
        let mut status = Status::SUCCESS;
        for attempt in 0..EXIT_ATTEMPTS {
            let found = self.memory_map(buffer).and_then(|(key, map)| {
                let ram = map.usable();
                let lost = ours.clone().find(|range| !ram.iter().any(|piece| piece.covers(*range)));
                lost.map_or(Ok((key, ram)), |range| Err(FirmwareError::Lost(range)))
            });
            let (key, ram) = match found {
                Ok(found) => found,
                Err(error) => return Err(((attempt == 0).then_some(self), error)),
            };
            // SAFETY: a call as specified (UEFI 2.10, 7.4.6). On success `self` ends here.
            status = unsafe { (self.services().exit_boot_services)(self.image, key) };
            match status {
                Status::SUCCESS => return Ok(ram),
                // The map has changed since it was read.
                Status::INVALID_PARAMETER => {}
                _ => break,
            }
        }
        Err((None, FirmwareError::Call("ExitBootServices", status)))
    }

    /// Memory for the map, made before it is read for good: making it changes the map.
    fn map_buffer(&self) -> Result<&'static mut [u8], FirmwareError> {
        let (mut size, mut key, mut stride, mut version) = (0, 0, 0, 0);
        let services = self.services();
        // SAFETY: a call as specified (UEFI 2.10, 7.2.3): no buffer, so only the size comes back.
        let status = unsafe {
            (services.get_memory_map)(&raw mut size, null_mut(), &raw mut key, &raw mut stride, &raw mut version)
        };
        if status != Status::BUFFER_TOO_SMALL {
            return Err(FirmwareError::Call("GetMemoryMap for its size", status));
        }
        let pages = self.allocate(size.saturating_add(MAP_SLACK), "AllocatePages for the memory map")?;
        let (start, size) = (pages.start as *mut u8, pages.size() as usize);
        // SAFETY: fresh pages of this size, whose only user is the returned reference; their bytes are made known first.
        unsafe {
            start.write_bytes(0, size);
            Ok(slice::from_raw_parts_mut(start, size))
        }
    }

    /// The map as it is now, with the key that proves it.
    fn memory_map<'a>(&self, buffer: &'a mut [u8]) -> Result<(usize, MemoryMap<'a>), FirmwareError> {
        let (mut size, mut key, mut stride, mut version) = (buffer.len(), 0, 0, 0);
        let map = buffer.as_mut_ptr().cast();
        // SAFETY: a call as specified; the buffer has this size.
        let status = unsafe {
            (self.services().get_memory_map)(&raw mut size, map, &raw mut key, &raw mut stride, &raw mut version)
        };
        succeeded(status, "GetMemoryMap")?;
        let written = size.min(buffer.len());
        Ok((key, MemoryMap::new(&buffer[..written], stride)))
    }
}

fn succeeded(status: Status, what: &'static str) -> Result<(), FirmwareError> {
    if status.is_error() { Err(FirmwareError::Call(what, status)) } else { Ok(()) }
}

/// The firmware's console takes UTF-16 with a zero at the end (UEFI 2.10, 12.4.3).
struct Console {
    output: *mut efi::protocols::simple_text_output::Protocol,
    pending: ArrayVec<u16, 80>,
}

impl Console {
    fn flush(&mut self) {
        if self.output.is_null() || self.pending.is_empty() {
            return;
        }
        // `write_str` keeps one place free.
        self.pending.push(0);
        // SAFETY: a call as specified, with a string that ends in zero. What a console cannot show is lost.
        unsafe { ((*self.output).output_string)(self.output, self.pending.as_mut_ptr()) };
        self.pending.clear();
    }
}

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for unit in text.encode_utf16() {
            self.pending.push(unit);
            if self.pending.remaining_capacity() == 1 {
                self.flush();
            }
        }
        Ok(())
    }
}
