//! What is in the store.

use alloc::borrow::Cow;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use super::response::owned;

/// The store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files<'a> {
    /// Bytes that it has.
    pub size: u64,
    /// Bytes that no file has.
    pub free: u64,
    /// Its files.
    #[serde(borrow)]
    pub rows: Vec<FileRow<'a>>,
}

/// One file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRow<'a> {
    /// Its name.
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    /// Bytes.
    pub length: u64,
    /// The file that it cannot be read without.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Cow<'a, str>>,
}

impl Files<'_> {
    pub(super) fn into_owned(self) -> Files<'static> {
        let row = |row: FileRow<'_>| FileRow { name: owned(row.name), length: row.length, base: row.base.map(owned) };
        Files { size: self.size, free: self.free, rows: self.rows.into_iter().map(row).collect() }
    }
}
