//! Pages between objects and files.

use entresol_addr::PAGE_SIZE;
use entresol_backing::{AccessError, ObjectHandle, StoreSlot};
use entresol_metal_arm64::cpu;
use entresol_wire::store::File;

use super::Refused;
use crate::host;
use crate::paging::{self, Missing};
use crate::store::{Failure, file};

/// Pages that are read at once.
const AT_ONCE: u64 = 16;

/// Copies frame `frame` of `object` to `page`, when it is in memory; false, and nothing copied, if it was never written.
///
/// # Errors
///
/// [`Failure::OutOfMemory`], [`Failure::Absent`].
pub async fn read(object: ObjectHandle, frame: u64, page: &mut [u8; PAGE_SIZE as usize]) -> Result<bool, Failure> {
    loop {
        match look(object, frame, page)? {
            Look::Here => return Ok(true),
            Look::Nowhere => return Ok(false),
            Look::Stored(slot) => paging::bring(object, frame, slot).await.map_err(|missing| match missing {
                Missing::OutOfMemory => Failure::OutOfMemory,
                Missing::Unreadable => Failure::Absent { frame },
            })?,
        }
    }
}

/// Where a page is.
enum Look {
    Here,
    Stored(StoreSlot),
    Nowhere,
}

/// Copies the page if it is in memory.
fn look(object: ObjectHandle, frame: u64, page: &mut [u8; PAGE_SIZE as usize]) -> Result<Look, Failure> {
    let host = host::get();
    let pin = host.epoch.pin(cpu::index());
    let Some(object) = host.objects.get(&pin, object) else { return Ok(Look::Nowhere) };
    if let Some(slot) = object.stored_at(&host.machine, frame) {
        return Ok(Look::Stored(slot));
    }
    if !object.is_resident(&host.machine, frame) {
        // It may have left since, but not into nothing.
        return Ok(object.stored_at(&host.machine, frame).map_or(Look::Nowhere, Look::Stored));
    }
    match object.read(&host.supply(cpu::index()), frame * PAGE_SIZE, page) {
        Ok(()) => Ok(Look::Here),
        Err(AccessError::Stored { slot, .. }) => Ok(Look::Stored(slot)),
        Err(_) => Err(Failure::OutOfMemory),
    }
}

/// Fills `count` frames of `object` from frame `first` on with the pages of `file` from `page` on, each of which must have its
/// checksum.
///
/// # Errors
///
/// [`Refused`]; some of the frames may be filled.
pub async fn fill(
    file: &File,
    checksums: &[u32],
    page: u64,
    (object, first, count): (ObjectHandle, u64, u64),
) -> Result<(), Refused> {
    let mut done = 0;
    while done < count {
        let together = (count - done).min(AT_ONCE);
        let bytes = file::read(file, page + done, together).await?;
        for (index, bytes) in (done..).zip(bytes.chunks_exact(PAGE_SIZE as usize)) {
            let block = page + index;
            if checksums.get(block as usize) != Some(&crc32fast::hash(bytes)) {
                return Err(Failure::Damaged { file: file.name.as_str().into(), block }.into());
            }
            write(object, first + index, bytes)?;
        }
        done += together;
    }
    Ok(())
}

fn write(object: ObjectHandle, frame: u64, bytes: &[u8]) -> Result<(), Refused> {
    let host = host::get();
    let pin = host.epoch.pin(cpu::index());
    let object = host.objects.get(&pin, object).ok_or_else(|| Refused::because("an object is gone"))?;
    object.write(&host.supply(cpu::index()), frame * PAGE_SIZE, bytes).map_err(Refused::out_of_memory)
}
