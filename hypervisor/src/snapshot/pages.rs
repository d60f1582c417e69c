//! Pages between objects and files.

use entresol_addr::PAGE_SIZE;
use entresol_backing::ObjectHandle;
use entresol_metal_arm64::cpu;
use entresol_wire::store::File;

use super::Refused;
use crate::host;
use crate::store::{Failure, file};

/// Pages that are read at once.
const AT_ONCE: u64 = 16;

/// Copies frame `frame` of `object` to `page`; false, and nothing copied, if it was never written.
///
/// # Errors
///
/// [`Failure::OutOfMemory`]: the page is not in memory.
pub fn read(object: ObjectHandle, frame: u64, page: &mut [u8; PAGE_SIZE as usize]) -> Result<bool, Failure> {
    let host = host::get();
    let pin = host.epoch.pin(cpu::index());
    let Some(object) = host.objects.get(&pin, object) else { return Ok(false) };
    if !object.is_resident(&host.machine, frame) {
        return Ok(false);
    }
    object.read(&host.supply(cpu::index()), frame * PAGE_SIZE, page).map_err(|_| Failure::OutOfMemory)?;
    Ok(true)
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
