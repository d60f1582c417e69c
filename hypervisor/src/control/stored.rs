//! Requests about the store.

use alloc::borrow::Cow;
use alloc::string::String;
use alloc::vec::Vec;

use entresol_wire::control::{Answer, Code, Error, FileRow, Files};
use entresol_wire::store::{BLOCK, StoreError};

use super::later::Later;
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
    let next = store::directory().and_then(|directory| Ok(directory.without(file)?)).map_err(refused)?;
    let (later, name) = (Later::default(), String::from(file));
    let answer = later.clone();
    store::task::spawn(async move {
        let done = change::commit(&turn, next).await;
        log::info!("store: file {name:?} removed: {done:?}");
        drop(turn);
        answer.say(done.map(|()| Answer::Done).map_err(refused));
    });
    Ok(later)
}
