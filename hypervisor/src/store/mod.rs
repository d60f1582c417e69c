//! The store on the outer machine's disk: files that outlive the machine ([`entresol_wire::store`] says in which form).
//!
//! Rooms:
//!
//! | room | what it does |
//! |---|---|
//! | [`task`] | long work, a part at a time |
//! | [`io`] | requests to the disk |
//! | [`file`] | the bytes of one file, written and read |
//! | [`change`] | commits: at most one change is on its way |
//!
//! Protocol: [`serve`] is host's work. The first time, it begins to read the directory; until that is done, and if it failed,
//! who asks is told so. Changes happen one after the other: whoever makes one has the [`change::Turn`].
//!
//! Lock order: the store's state is a leaf; nobody holds it while a task waits.

pub mod change;
pub mod file;
pub mod io;
pub mod task;

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use entresol_backing::Order;
use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicBool, Ordering};
use entresol_wire::store::{AREA_BLOCKS, AREA_BYTES, BLOCK, Directory, StoreError};

use crate::block::{self, Buffer, DiskError, SECTOR};
use crate::host_work::Work;

/// Why the store did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The machine has no disk for it.
    NoDisk,
    /// The directory is still being read.
    Opening,
    /// Another change is on its way.
    Busy,
    /// The store, or the wish, breaks a rule.
    Store(StoreError),
    /// The disk.
    Disk(DiskError),
    /// No frames for buffers.
    OutOfMemory,
    /// A page of the machine's memory is on a disk, and cannot be read.
    Absent {
        /// Its number in the memory.
        frame: u64,
    },
    /// A page of the machine's memory is bad.
    Poisoned {
        /// Its number in the memory.
        frame: u64,
    },
    /// The bytes of a file are not those that were written.
    Damaged {
        /// Its name.
        file: String,
        /// Its first such block.
        block: u64,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDisk => f.write_str("the machine has no disk with the serial number \"entresol-store\""),
            Self::Opening => f.write_str("the store's directory is still being read"),
            Self::Busy => f.write_str("another change of the store is on its way"),
            Self::Store(error) => error.fmt(f),
            Self::Disk(error) => error.fmt(f),
            Self::OutOfMemory => f.write_str("the machine has no memory for the store's buffers"),
            Self::Absent { frame } => write!(f, "page {frame:#x} of the memory is on a disk, and cannot be read"),
            Self::Poisoned { frame } => write!(f, "page {frame:#x} of the memory is poisoned, and cannot be read"),
            Self::Damaged { file, block } => write!(f, "file {file:?}: block {block} was damaged"),
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<DiskError> for Failure {
    fn from(error: DiskError) -> Self {
        Self::Disk(error)
    }
}

impl From<entresol_backing::OutOfMemory> for Failure {
    fn from(_: entresol_backing::OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

/// The directory that counts, or why there is none.
static DIRECTORY: Mutex<Result<Option<Directory>, Failure>> = Mutex::new(Ok(None));
/// The directory is being read, or was.
static BEGUN: AtomicBool = AtomicBool::new(false);

/// Host's work: takes what the disk has finished, and goes on with what waits for it.
pub fn serve() {
    if block::find(Work::Store).is_some() && !BEGUN.swap(true, Ordering::Relaxed) {
        task::spawn(open());
    }
    io::collect();
    task::run();
}

/// The directory as it is now.
///
/// # Errors
///
/// [`Failure::NoDisk`], [`Failure::Opening`], or what was wrong when it was read.
pub fn directory() -> Result<Directory, Failure> {
    if block::find(Work::Store).is_none() {
        return Err(Failure::NoDisk);
    }
    DIRECTORY.lock().clone()?.ok_or(Failure::Opening)
}

/// Reads the directory.
async fn open() {
    let found = read_directory().await;
    match &found {
        Ok(directory) => log::info!(
            "store: {} files, {} of {} blocks free",
            directory.files().len(),
            directory.free_blocks(),
            directory.blocks()
        ),
        Err(failure) => log::error!("store: not used: {failure}"),
    }
    *DIRECTORY.lock() = found.map(Some);
}

async fn read_directory() -> Result<Directory, Failure> {
    let blocks = block::find(Work::Store).ok_or(Failure::NoDisk)?.sectors() / (BLOCK / SECTOR);
    let areas = [read_area(0).await?, read_area(1).await?];
    Ok(Directory::newest([&areas[0], &areas[1]], blocks)?)
}

/// The bytes of a directory's area.
async fn read_area(area: u64) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(AREA_BYTES).map_err(|_| Failure::OutOfMemory)?;
    let mut buffer = Buffer::take(Order::PAGE)?;
    for block in area * AREA_BLOCKS..(area + 1) * AREA_BLOCKS {
        buffer = io::read(block, 1, buffer).await?;
        bytes.extend_from_slice(buffer.bytes());
    }
    Ok(bytes)
}
