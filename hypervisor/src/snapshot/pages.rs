//! Pages between objects and files.

use crate::arch::cpu;
use entresol_addr::PAGE_SIZE;
use entresol_backing::{AccessError, ObjectHandle, StoreSlot};
use entresol_machine::Tags;
use entresol_wire::snapshot::{self as form, TAGGED_PAGES, page_checksum};

use form::Pages as Layout;

use super::Refused;
use super::lazy::Pages;
use crate::host;
use crate::paging::{self, Missing};
use crate::store::{Failure, file};

/// Pages that are read at once.
const AT_ONCE: u64 = 16;

/// Copies frame `frame` of `object` to `page`, when it is in memory, and returns its tags, zero if it has none; `None`, and nothing copied, if
/// it was never written.
///
/// # Errors
///
/// [`Failure::OutOfMemory`], [`Failure::Absent`], [`Failure::Poisoned`].
pub async fn read(
    object: ObjectHandle,
    frame: u64,
    page: &mut [u8; PAGE_SIZE as usize],
) -> Result<Option<Tags>, Failure> {
    loop {
        match look(object, frame, page)? {
            Look::Here(tags) => return Ok(Some(tags)),
            Look::Nowhere => return Ok(None),
            Look::Stored(slot) => paging::bring(object, frame, slot).await.map_err(|missing| match missing {
                Missing::OutOfMemory => Failure::OutOfMemory,
                Missing::Unreadable => Failure::Absent { frame },
            })?,
        }
    }
}

/// Where a page is.
enum Look {
    Here(Tags),
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
    let supply = host.supply(cpu::index());
    match object.read(&supply, frame * PAGE_SIZE, page).and_then(|()| object.tags(&supply, frame)) {
        Ok(tags) => Ok(Look::Here(tags)),
        Err(AccessError::Stored { slot, .. }) => Ok(Look::Stored(slot)),
        Err(AccessError::Poisoned { frame }) => Err(Failure::Poisoned { frame }),
        Err(_) => Err(Failure::OutOfMemory),
    }
}

/// Fills `count` frames of `object` from frame `first` on with the pages of `file` from `page` on, each of which must have its
/// checksum, and gives them their tags, if the object has some.
///
/// # Errors
///
/// [`Refused`]; some of the frames may be filled.
pub async fn fill(source: &Pages, page: u64, (object, first, count): (ObjectHandle, u64, u64)) -> Result<(), Refused> {
    let layout = source.layout();
    let mut done = 0;
    while done < count {
        let next = page + done;
        // Those whose tags lie in one block lie side by side.
        let together = (count - done).min(AT_ONCE).min(TAGGED_PAGES - next % TAGGED_PAGES);
        let bytes = file::read(&source.file, layout.block(next), together).await?;
        let tags = match layout.tags(next) {
            Some((block, _)) => Some(file::read(&source.file, block, 1).await?),
            None => None,
        };
        for (index, bytes) in (0..).zip(bytes.chunks_exact(PAGE_SIZE as usize)) {
            let tags = source.check(next + index, bytes, tags.as_deref())?;
            write(object, first + done + index, bytes, tags.as_ref())?;
        }
        done += together;
    }
    Ok(())
}

impl Pages {
    /// How they lie.
    pub fn layout(&self) -> Layout {
        Layout { count: self.checksums.len() as u64, tagged: self.tagged }
    }

    /// The tags of page `page`, whose bytes these are, from the block that has its tags.
    ///
    /// # Errors
    ///
    /// [`Failure::Damaged`]: they have another checksum.
    pub fn check(&self, page: u64, bytes: &[u8], tags: Option<&[u8]>) -> Result<Option<Tags>, Failure> {
        let damaged = || Failure::Damaged { file: self.file.name.clone(), block: self.layout().block(page) };
        let tags = match self.layout().tags(page).zip(tags) {
            Some(((_, at), block)) => Some(block.get(at..).and_then(<[u8]>::first_chunk).ok_or_else(damaged)?),
            None => None,
        };
        let right = self.checksums.get(page as usize) == Some(&page_checksum(bytes, tags));
        if right { Ok(tags.map(Tags::from_bytes)) } else { Err(damaged()) }
    }
}

fn write(object: ObjectHandle, frame: u64, bytes: &[u8], tags: Option<&Tags>) -> Result<(), Refused> {
    let host = host::get();
    let pin = host.epoch.pin(cpu::index());
    let object = host.objects.get(&pin, object).ok_or_else(|| Refused::because("an object is gone"))?;
    let supply = host.supply(cpu::index());
    object.write(&supply, frame * PAGE_SIZE, bytes).map_err(Refused::out_of_memory)?;
    if let Some(tags) = tags.filter(|_| object.is_tagged()) {
        object.set_tags(&supply, frame, tags).map_err(Refused::out_of_memory)?;
    }
    Ok(())
}
