//! Read-only files: one memory object for each, shared by every virtual machine that names it.
//!
//! Purpose: the bytes stay where the boot loader put them, in the bundle; they are not copied, whoever and however many show
//! them (D1). An object is made when the first virtual machine names the file, and lives as long as the bundle: for ever.
//!
//! Invariants: nobody writes to the bundle (INV-13). It ends with a page, so the last page of a file holds zeros behind it and no
//! other bytes (INV-11).

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::arch::{Metal, cpu};
use entresol_addr::{PAGE_SIZE, Pfn, PfnRange};
use entresol_backing::{ObjectHandle, Spec};
use entresol_sync::Mutex;
use entresol_wire::bundle::{Bundle, FileIndex};

use crate::host;

/// Every file that has an object.
static OBJECTS: Mutex<Vec<(FileIndex, ObjectHandle)>> = Mutex::new(Vec::new());

/// A file as guests see it.
#[derive(Clone, Copy, Debug)]
pub struct Rom {
    /// The object.
    pub object: ObjectHandle,
    /// Whole pages, in bytes.
    pub size: u64,
}

/// The frames of `bundle` may be looked at. Once, before any virtual machine is made.
pub fn init(bundle: &'static [u8]) {
    let frames = bundle.len() as u64 / PAGE_SIZE;
    if let Some(frames) = page(bundle).and_then(|first| PfnRange::new(first, frames)) {
        Metal::set_rom(frames);
    }
}

/// The frame at which `bytes` begin, if they begin with one.
fn page(bytes: &[u8]) -> Option<Pfn> {
    // EL2's mapping is the identity.
    let address = bytes.as_ptr() as u64;
    address.is_multiple_of(PAGE_SIZE).then(|| Pfn::new(address / PAGE_SIZE))
}

/// The file `index` of `bundle`.
///
/// # Errors
///
/// Why there is none: the bundle does not lie at a page, or there is no room for an object.
pub fn find(bundle: &Bundle<'static>, index: FileIndex) -> Result<Rom, String> {
    let file = bundle.file(index).ok_or("the bundle has no such file")?;
    let first = page(file.data).ok_or("the loader must put the boot bundle at a multiple of 4K")?;
    let frames = (file.data.len() as u64).div_ceil(PAGE_SIZE);
    let rom = |object| Rom { object, size: frames * PAGE_SIZE };
    let mut objects = OBJECTS.lock();
    if let Some((_, object)) = objects.iter().find(|(known, _)| *known == index) {
        return Ok(rom(*object));
    }
    objects.try_reserve(1).map_err(|_| "the hypervisor's heap has no room for it")?;
    let host = host::get();
    let spec = Spec::Rom { first, frames, owned: false };
    let object = host.objects.create(&host.supply(cpu::index()), spec).map_err(|error| error.to_string())?;
    objects.push((index, object));
    Ok(rom(object))
}
