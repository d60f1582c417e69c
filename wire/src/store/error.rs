//! What can be wrong with a store, or with a wish about it.

use alloc::string::String;

use super::{MAX_FILES, VERSION};
use crate::Refusal;

/// Why a store cannot be used, or was not changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Neither area begins as a directory does.
    #[error("not a store: neither of its two directories begins with \"ENTSTORE\"")]
    NotAStore,
    /// Another version wrote it.
    #[error("the store has version {found}, this program reads version {VERSION}")]
    BadVersion {
        /// The version it says.
        found: u32,
    },
    /// The bytes are not those that were written.
    #[error("the store's directory has the checksum {says:#010x}, its bytes give {computed:#010x}: it was damaged")]
    BadChecksum {
        /// The checksum that it says.
        says: u32,
        /// The checksum of the bytes.
        computed: u32,
    },
    /// A number breaks a rule.
    #[error("the store's {0}")]
    BadField(Refusal),
    /// What was asked for breaks a rule.
    #[error("{0}")]
    Refused(Refusal),
    /// There is no such file.
    #[error("file {0:?}: must be in the store")]
    NoSuchFile(String),
    /// Another file cannot be read without it.
    #[error("file {name:?}: must not be what {other:?} cannot be read without")]
    Needed {
        /// It.
        name: String,
        /// The other.
        other: String,
    },
    /// No block is free.
    #[error("the store is full: no block of its {blocks} is free")]
    Full {
        /// Blocks of the store.
        blocks: u64,
    },
    /// The directory has no room for the file's extents, or for one more file.
    #[error("the store's directory is full: it has room for {MAX_FILES} files and 256 KiB of extents")]
    DirectoryFull,
}
