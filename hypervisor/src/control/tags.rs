//! Requests about allocation tags.
//!
//! A task for each request: a page that is out is brought first. It goes page by page, as far as it can; if that is not one page, it says why.

use alloc::borrow::Cow;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::future::Future;

use crate::arch::cpu;
use entresol_addr::{Gpa, PAGE_SIZE};
use entresol_machine::Tags;
use entresol_mmu::{CopyError, TagError};
use entresol_slot::Hint;
use entresol_sync::Pin;
use entresol_wire::Refusal;
use entresol_wire::control::{Answer, Bytes, Code, Error, TAGGED_PER_ANSWER};

use super::later::Later;
use super::ops::no_memory;
use crate::host;
use crate::paging::{self, Missing};
use crate::store::task;
use crate::vm::Vm;

/// Tags of a page as they are told.
const PAGE: usize = Tags::GRANULES;

/// Why a page's tags are neither read nor written.
fn refused(error: TagError) -> Error {
    let code = match error {
        TagError::Untagged => Code::WrongState,
        TagError::Copy(CopyError::OutOfMemory) => Code::OutOfMemory,
        TagError::Copy(CopyError::Absent { .. }) => Code::StoreFailed,
        TagError::Unaligned { .. } | TagError::Copy(_) => Code::BadField,
    };
    Error::new(code, alloc::format!("{error}"))
}

/// Pages of `bytes` bytes, as many as are told at once.
fn pages(field: &'static str, bytes: u64, unit: u64) -> Result<u64, Error> {
    let pages = bytes / unit;
    if bytes.is_multiple_of(unit) && (1..=TAGGED_PER_ANSWER).contains(&pages) {
        return Ok(pages);
    }
    let rule = alloc::format!("must be a multiple of {unit}, of 1 to {TAGGED_PER_ANSWER} pages");
    Err(Error::refused(Code::BadField, Refusal::new(field, bytes, rule)))
}

/// The page `number` of those from `gpa` on.
fn page(gpa: u64, number: u64) -> Result<Gpa, TagError> {
    let first = Gpa::new(gpa);
    first.checked_add(number * PAGE_SIZE).ok_or(TagError::Copy(CopyError::Outside { gpa: first }))
}

/// Reads the tags of `size` bytes from `gpa` on.
pub fn read(vm: Arc<Vm>, gpa: u64, size: u64) -> Result<Later, Error> {
    let count = pages("size", size, PAGE_SIZE)?;
    let mut told = Vec::new();
    told.try_reserve_exact(count as usize * PAGE).map_err(|_| no_memory())?;
    check(&vm, gpa)?;
    Ok(later(async move {
        for number in 0..count {
            let tags = with_page(&vm, gpa, number, |pin, gpa| vm.memory.read_tags(pin, &Hint::new(), gpa)).await;
            match tags {
                Ok(tags) => told.extend((0..PAGE).map(|granule| tags.get(granule))),
                Err(error) if number == 0 => return Err(refused(error)),
                Err(_) => break,
            }
        }
        Ok(Answer::Tags(Bytes(Cow::Owned(told))))
    }))
}

/// Gives the pages from `gpa` on these tags.
pub fn write(vm: Arc<Vm>, gpa: u64, tags: &[u8]) -> Result<Later, Error> {
    let count = pages("tags", tags.len() as u64, PAGE as u64)?;
    if let Some(tag) = tags.iter().find(|tag| **tag > 0xf) {
        return Err(Error::refused(Code::BadField, Refusal::new("tags", tag, "must be 0 to 15 each")));
    }
    let mut packed: Vec<Tags> = Vec::new();
    packed.try_reserve_exact(count as usize).map_err(|_| no_memory())?;
    packed.extend(tags.chunks_exact(PAGE).map(|page| {
        let mut tags = Tags::ZERO;
        page.iter().enumerate().for_each(|(granule, tag)| tags.set(granule, *tag));
        tags
    }));
    check(&vm, gpa)?;
    Ok(later(async move {
        let mut done = 0;
        for (number, tags) in (0..).zip(&packed) {
            let write = |pin: &Pin<'_>, gpa| vm.memory.write_tags(pin, &Hint::new(), gpa, tags);
            match with_page(&vm, gpa, number, write).await {
                Ok(()) => done += 1,
                Err(error) if number == 0 => return Err(refused(error)),
                Err(_) => break,
            }
        }
        Ok(Answer::Count(done))
    }))
}

/// What is wrong whatever is there.
fn check(vm: &Vm, gpa: u64) -> Result<(), Error> {
    let pin = host::get().epoch.pin(cpu::index());
    match vm.memory.read_tags(&pin, &Hint::new(), Gpa::new(gpa)) {
        Err(error @ (TagError::Untagged | TagError::Unaligned { .. })) => Err(refused(error)),
        _ => Ok(()),
    }
}

/// Asks for a page, again when it has been brought, or when the fork is over that keeps it from being written.
async fn with_page<T>(
    vm: &Vm,
    gpa: u64,
    number: u64,
    mut ask: impl FnMut(&Pin<'_>, Gpa) -> Result<T, TagError>,
) -> Result<T, TagError> {
    let gpa = page(gpa, number)?;
    loop {
        let (answer, absent) = {
            let pin = host::get().epoch.pin(cpu::index());
            let answer = ask(&pin, gpa);
            let away = matches!(answer, Err(TagError::Copy(CopyError::Absent { .. })));
            (answer, away.then(|| vm.memory.absent(&pin, gpa)))
        };
        match (&answer, absent) {
            (_, Some(Some(absent))) => match paging::bring(absent.object, absent.frame, absent.slot).await {
                Ok(()) => {}
                Err(Missing::OutOfMemory) => return Err(TagError::Copy(CopyError::OutOfMemory)),
                Err(Missing::Unreadable) => return answer,
            },
            // It has come meanwhile.
            (_, Some(None)) | (Err(TagError::Copy(CopyError::Busy)), None) => task::pause().await,
            (_, None) => return answer,
        }
    }
}

fn later(task: impl Future<Output = Result<Answer<'static>, Error>> + Send + 'static) -> Later {
    let later = Later::default();
    let answer = later.clone();
    task::spawn(async move { answer.say(task.await) });
    later
}
