//! Requests about the store.

use alloc::borrow::Cow;
use alloc::vec::Vec;
use core::future::Future;

use entresol_wire::control::{Answer, Code, Error, FileRow, Files};
use entresol_wire::store::{BLOCK, StoreError};

use super::later::Later;
use crate::registry;
use crate::snapshot::{lazy, restore, take};
use crate::store::change::{self, Turn};
use crate::store::{self, Failure};

/// A failure as the client is told it.
pub fn refused(failure: Failure) -> Error {
    match failure {
        Failure::Store(StoreError::Refused(refusal)) => Error::refused(Code::BadField, refusal),
        Failure::OutOfMemory => Error::new(Code::OutOfMemory, alloc::format!("{failure}")),
        failure => Error::new(Code::StoreFailed, alloc::format!("{failure}")),
    }
}

/// What is in the store.
pub fn files() -> Result<Files<'static>, Error> {
    let directory = store::directory().map_err(refused)?;
    let base = |id| directory.by_id(id).map(|file| Cow::Owned(file.name.clone()));
    let rows = directory.files().iter().map(|file| FileRow {
        name: Cow::Owned(file.name.clone()),
        length: file.length,
        base: base(file.base),
    });
    let rows: Vec<_> = rows.collect();
    Ok(Files { size: directory.blocks() * BLOCK, free: directory.free_blocks() * BLOCK, rows })
}

/// Takes `file` out of it.
pub fn remove(file: &str) -> Result<Later, Error> {
    let turn = Turn::take().map_err(refused)?;
    let directory = store::directory().map_err(refused)?;
    lazy::check_unused(&directory, file).map_err(|refused| refused.0)?;
    let next = directory.without(file).map_err(|error| refused(error.into()))?;
    Ok(later(async move { change::commit(&turn, next).await.map_err(refused) }))
}

/// Takes a snapshot of `vm`. The machine's moment is over when this returns; the answer comes when the file is whole.
pub fn snapshot(vm: &str, file: &str, base: Option<&str>) -> Result<Later, Error> {
    let number = registry::number_of(vm).ok_or_else(|| Error::no_such_vm(vm))?;
    let taken = take::begin(number, file, base).map_err(|refused| refused.0)?;
    Ok(later(async move { taken.write().await.map_err(|refused| refused.0) }))
}

/// Makes a machine from `file`, called `name` or as it was. The answer comes when it runs.
pub fn restore(file: &str, name: Option<&str>) -> Result<Later, Error> {
    let wanted = restore::begin(file, name).map_err(|refused| refused.0)?;
    Ok(later(async move { wanted.make().await.map_err(|refused| refused.0) }))
}

/// Begins a task whose end is the answer.
fn later(task: impl Future<Output = Result<(), Error>> + Send + 'static) -> Later {
    let later = Later::default();
    let answer = later.clone();
    store::task::spawn(async move { answer.say(task.await.map(|()| Answer::Done)) });
    later
}
