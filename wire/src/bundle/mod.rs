//! The boot bundle: a configuration and the files it names, in one piece of memory.
//!
//! The outer machine's firmware puts it there as the initrd and tells the hypervisor where. It is read in place: files
//! start on pages, so a bundle that starts on one can be mapped or copied page by page, and nothing is unpacked.
//!
//! Form, version 2; numbers are little-endian, offsets count from the bundle's first byte:
//!
//! | bytes | what |
//! |---|---|
//! | 0–7 | magic `ENTRESOL` |
//! | 8–11 | version |
//! | 12–15 | CRC-32 (ISO-HDLC) of the whole bundle, these four bytes taken as zero |
//! | 16–23 | length of the whole bundle |
//! | 24–31, 32–39 | offset and length of the configuration: JSON of [`Config<FileIndex>`] |
//! | 40–47 | offset of the file table |
//! | 48–51 | number of files |
//! | 52–55 | zero |
//! | 56–63 | length of the names, which follow the file table |
//!
//! A file's entry in the table:
//!
//! | bytes | what |
//! |---|---|
//! | 0–7, 8–15 | offset, a multiple of 4096, and length of its data |
//! | 16–19, 20–23 | offset, from the start of the names, and length of its name: UTF-8, for people only |
//! | 24–27 | bit 0: a guest may write to it; other bits zero |
//! | 28–31 | CRC-32 of its data, by which it is known again; not compared with the data: the bundle's covers both |
//!
//! Order: header, configuration, table, names, data in the order of the table. Nothing overlaps; gaps are padding.
//! The bundle ends with a page: nobody else's bytes share one with a file that is mapped. Bytes after the end are ignored:
//! firmware may round the length up.
//!
//! Invariants of a [`Bundle`]: every offset lies inside; the configuration passed [`Config::check`] and names only files
//! that exist. A file that a guest may write to is named by exactly one disk and its bytes belong to no other file, so
//! the hypervisor may keep that guest's writes in place without showing them to another (INV-11). Files that are only
//! read may be named by any number of VMs and are stored once.
//!
//! The checksum finds accidents (a cut or mixed-up file), not attackers: who can write the bundle owns the machine.

mod layout;
mod read;
#[cfg(test)]
mod tests;
mod write;

use alloc::format;
use alloc::string::String;
use core::fmt;

use serde::{Deserialize, Serialize};

pub use layout::{FILE_ALIGN, HEADER_LEN, MAGIC, VERSION};
pub use read::{Bundle, File};
pub use write::{Builder, Packed};

use crate::Refusal;
use crate::config::{Config, MAX_DISKS, MAX_ROMS, MAX_VMS};

/// Longest configuration, in bytes of JSON: above what [`MAX_VMS`] machines with the longest texts need.
pub const MAX_CONFIG: u64 = 1 << 20;
/// Most files: every VM with a kernel, an initrd, a flash and all disks and read-only files of its own.
pub const MAX_FILES: u32 = (MAX_VMS * (3 + MAX_DISKS + MAX_ROMS)) as u32;
/// Longest name of a file, in bytes.
pub const MAX_FILE_NAME: usize = 4096;

/// A file of a bundle, by its place in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FileIndex(pub u32);

impl fmt::Display for FileIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "file {}", self.0)
    }
}

/// Why some bytes are not a bundle, or some files do not make one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// There are fewer bytes than a header has.
    #[error("a bundle's header has {HEADER_LEN} bytes, {have} are there")]
    NoHeader {
        /// Bytes that are there.
        have: u64,
    },
    /// The first bytes are not the magic.
    #[error("not a bundle: it starts with {found:02x?}, not with \"ENTRESOL\"")]
    BadMagic {
        /// The bytes that are there.
        found: [u8; 8],
    },
    /// Another version wrote it.
    #[error("the bundle has version {found}, this hypervisor reads version {VERSION}")]
    BadVersion {
        /// The version it says.
        found: u32,
    },
    /// Its end is missing.
    #[error("cut off: the bundle says {says} bytes, {have} are there")]
    CutOff {
        /// Bytes that the header says.
        says: u64,
        /// Bytes that are there.
        have: u64,
    },
    /// Its bytes are not those that were written.
    #[error("the bundle's checksum is {says:#010x}, its bytes give {computed:#010x}: it was damaged")]
    BadChecksum {
        /// The checksum that the header says.
        says: u32,
        /// The checksum of the bytes.
        computed: u32,
    },
    /// A number in the header or the table breaks a rule.
    #[error("the bundle's {0}")]
    BadField(Refusal),
    /// The configuration is not the JSON that it should be.
    #[error("the bundle's configuration cannot be read: {0}")]
    BadConfig(String),
    /// The configuration breaks a rule.
    #[error("the bundle's configuration: {0}")]
    Refused(#[from] Refusal),
}

impl BundleError {
    fn field(field: impl Into<String>, value: impl fmt::Display, rule: impl Into<String>) -> Self {
        Self::BadField(Refusal::new(field, value, rule))
    }
}

/// Checks a configuration against the files it names. `lookup` gives a file's length and whether a guest may write to it.
fn check_references(
    config: &Config<FileIndex>,
    lookup: impl Fn(FileIndex) -> Option<(u64, bool)>,
) -> Result<(), BundleError> {
    for (at, (role, file)) in config.files().enumerate() {
        let refused = |rule: String| Err(Refusal::new(format!("{role}"), file, rule).into());
        let Some((_, writable)) = lookup(*file) else {
            return refused("must be in the bundle".into());
        };
        if writable != role.writable() {
            return refused(format!("must {}be a file that a guest may write to", if writable { "not " } else { "" }));
        }
        if writable && let Some((other, _)) = config.files().take(at).find(|(_, before)| *before == file) {
            return refused(format!("must be this disk's own, and {other} has it"));
        }
    }
    let mut length =
        |file: &FileIndex| lookup(*file).map(|(length, _)| length).ok_or_else(|| "not in the bundle".into());
    config.check(&mut length)?;
    Ok(())
}
