//! A snapshot: a virtual machine at one moment, in a file of the [store](crate::store).
//!
//! Form, version 4. Numbers are little-endian; every part begins at a block of 4096 bytes and is filled up with zeros:
//!
//! | part | what |
//! |---|---|
//! | pages | the bytes of each page that is in the file, one after the other; with tags, a block of tags behind each 32 pages, and behind the last |
//! | state | JSON: configuration, vCPUs, devices |
//! | index | which page is whose: runs, then the CRC-32 of each page, 4 bytes each; with tags, of its bytes and then its tags |
//! | shared pages | of a private machine: the guest frames that it shares with its hypervisor ([`Shared`]) |
//! | trailer | one block |
//!
//! A run, in the order of objects, and of frames within an object:
//!
//! | bytes | what |
//! |---|---|
//! | 0–3 | object: 0 is the memory, 1 the first disk's written pages, and so on |
//! | 4–7 | 0: its pages are in the file, after those of the run before; 1: they read as zero, or as the disk's image |
//! | 8–15 | first frame of 4096 bytes |
//! | 16–23 | number of frames, not 0 |
//!
//! The trailer:
//!
//! | bytes | what |
//! |---|---|
//! | 0–7 | magic `ENTSNAPS` |
//! | 8–11 | version |
//! | 12–15 | CRC-32 of the block, these four bytes taken as zero |
//! | 16–23 | number of the store's file that this one is the difference to, or 0 |
//! | 24–31 | number of pages |
//! | 32–39 | bytes of the state |
//! | 40–43 | CRC-32 of the state |
//! | 44–47 | CRC-32 of the index |
//! | 48–55 | number of runs |
//! | 56–59 | bit 0: the pages have allocation tags (FEAT_MTE2); bit 1: there are shared pages, or could be: the machine is private |
//! | 60–63 | CRC-32 of the list of shared pages; zero without bit 1, as the number of runs is |
//! | 64–71 | number of runs in it |
//! | 72– | zero |
//!
//! A block of tags has 128 bytes for each page, in their order: four bits a granule of 16 bytes, the lower granule in the low four.
//! Pages of disks have zeros there. The state of an earlier version has another form: such a file is refused.
//!
//! A page that no run of a file names is as the base has it; without a base it reads as zero, or as the disk's image.
//!
//! Trust: every number is checked before it is used ([`Trailer::decode`], [`Index::decode`]); the state is read by whoever
//! made it.

use alloc::collections::TryReserveError;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::Refusal;
use crate::store::BLOCK;

mod shared;
#[cfg(test)]
mod tests;

pub use shared::{Shared, SharedPart};

/// The version that this code writes and reads.
pub const VERSION: u32 = 4;
/// Bytes of a page's tags.
pub const TAGS: usize = 128;
/// Pages whose tags are in one block.
pub const TAGGED_PAGES: u64 = BLOCK / TAGS as u64;
const WITH_TAGS: u32 = 1 << 0;
const WITH_SHARED: u32 = 1 << 1;
/// Longest state, in bytes: many times what 8 vCPUs with all devices need.
pub const MAX_STATE: u64 = 4 << 20;
const MAGIC: [u8; 8] = *b"ENTSNAPS";
const CHECKSUM: usize = 12;
const RUN: usize = 24;

/// A file that a configuration names, by what it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Known {
    /// The name that it was packed under, for people.
    pub name: String,
    /// Bytes.
    pub length: u64,
    /// CRC-32 of its bytes.
    pub checksum: u32,
}

/// Why a file is not used as a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// It is another kind of file.
    #[error("not a snapshot: its last block does not begin with \"ENTSNAPS\"")]
    NotASnapshot,
    /// Another version wrote it.
    #[error("the snapshot has version {found}, this hypervisor reads version {VERSION}")]
    BadVersion {
        /// The version it says.
        found: u32,
    },
    /// A part's bytes are not those that were written.
    #[error("the snapshot's {part} has the checksum {says:#010x}, its bytes give {computed:#010x}: it was damaged")]
    BadChecksum {
        /// Which part.
        part: &'static str,
        /// The checksum that is written.
        says: u32,
        /// The checksum of the bytes.
        computed: u32,
    },
    /// A number breaks a rule.
    #[error("the snapshot's {0}")]
    BadField(Refusal),
}

fn field(name: &str, value: impl core::fmt::Display, rule: impl Into<String>) -> SnapshotError {
    SnapshotError::BadField(Refusal::new(name, value, rule))
}

/// That `bytes` are what was written.
///
/// # Errors
/// [`SnapshotError::BadChecksum`].
pub fn check_part(part: &'static str, bytes: &[u8], says: u32) -> Result<(), SnapshotError> {
    let computed = crc32fast::hash(bytes);
    if computed == says { Ok(()) } else { Err(SnapshotError::BadChecksum { part, says, computed }) }
}

/// Blocks of so many bytes.
fn blocks(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK)
}

/// The checksum of a page and its tags, if the file has tags.
pub fn page_checksum(page: &[u8], tags: Option<&[u8; TAGS]>) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(page);
    if let Some(tags) = tags {
        hasher.update(tags);
    }
    hasher.finalize()
}

/// Where everything is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// Number of the file that this one is the difference to, or 0.
    pub base: u64,
    /// Pages in the file.
    pub pages: u64,
    /// Bytes of the state.
    pub state: u64,
    /// Their CRC-32.
    pub state_checksum: u32,
    /// CRC-32 of the index.
    pub index_checksum: u32,
    /// Runs in the index.
    pub runs: u64,
    /// The pages have tags.
    pub tagged: bool,
    /// The list of shared pages, of a private machine.
    pub shared: Option<SharedPart>,
}

/// How the pages of a file lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// How many there are.
    pub count: u64,
    /// They have tags.
    pub tagged: bool,
}

impl Pages {
    /// Blocks of all of them.
    pub fn blocks(&self) -> u64 {
        self.count + if self.tagged { self.count.div_ceil(TAGGED_PAGES) } else { 0 }
    }

    /// The block of page `page`.
    pub fn block(&self, page: u64) -> u64 {
        page + if self.tagged { page / TAGGED_PAGES } else { 0 }
    }

    /// The block that has the tags of page `page`, which is in the file, and their first byte there; `None` if there are none.
    pub fn tags(&self, page: u64) -> Option<(u64, usize)> {
        let group = page / TAGGED_PAGES;
        let behind = self.count.min((group + 1) * TAGGED_PAGES);
        self.tagged.then_some((behind + group, (page % TAGGED_PAGES) as usize * TAGS))
    }
}

impl Trailer {
    /// The block.
    pub fn encode(&self) -> [u8; BLOCK as usize] {
        let mut block = [0; BLOCK as usize];
        block[..8].copy_from_slice(&MAGIC);
        block[8..12].copy_from_slice(&VERSION.to_le_bytes());
        block[16..24].copy_from_slice(&self.base.to_le_bytes());
        block[24..32].copy_from_slice(&self.pages.to_le_bytes());
        block[32..40].copy_from_slice(&self.state.to_le_bytes());
        block[40..44].copy_from_slice(&self.state_checksum.to_le_bytes());
        block[44..48].copy_from_slice(&self.index_checksum.to_le_bytes());
        block[48..56].copy_from_slice(&self.runs.to_le_bytes());
        let flags = [(self.tagged, WITH_TAGS), (self.shared.is_some(), WITH_SHARED)];
        let flags = flags.into_iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag);
        block[56..60].copy_from_slice(&flags.to_le_bytes());
        let shared = self.shared.unwrap_or(SharedPart { runs: 0, checksum: 0 });
        block[60..64].copy_from_slice(&shared.checksum.to_le_bytes());
        block[64..72].copy_from_slice(&shared.runs.to_le_bytes());
        let checksum = crc32fast::hash(&block);
        block[CHECKSUM..CHECKSUM + 4].copy_from_slice(&checksum.to_le_bytes());
        block
    }

    /// The trailer in the last block of a file of `file_blocks` blocks.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn decode(block: &[u8; BLOCK as usize], file_blocks: u64) -> Result<Self, SnapshotError> {
        if block[..8] != MAGIC {
            return Err(SnapshotError::NotASnapshot);
        }
        let version = small(block, 8);
        if version != VERSION {
            return Err(SnapshotError::BadVersion { found: version });
        }
        let mut unsealed = *block;
        unsealed[CHECKSUM..CHECKSUM + 4].fill(0);
        check_part("trailer", &unsealed, small(block, CHECKSUM))?;
        let flags = small(block, 56);
        if flags & !(WITH_TAGS | WITH_SHARED) != 0 {
            return Err(field("flags", flags, format!("must be known in version {version}")));
        }
        let trailer = Self {
            base: number(block, 16),
            pages: number(block, 24),
            state: number(block, 32),
            state_checksum: small(block, 40),
            index_checksum: small(block, 44),
            runs: number(block, 48),
            tagged: flags & WITH_TAGS != 0,
            shared: (flags & WITH_SHARED != 0)
                .then(|| SharedPart { runs: number(block, 64), checksum: small(block, 60) }),
        };
        if trailer.state > MAX_STATE || trailer.pages > file_blocks || trailer.runs > file_blocks * BLOCK / RUN as u64 {
            let value =
                format_args!("{} pages, {} runs, {} bytes of state", trailer.pages, trailer.runs, trailer.state);
            return Err(field("trailer", value, format!("must fit into the file's {file_blocks} blocks")));
        }
        if let Some(shared) = trailer.shared.filter(|shared| shared.blocks() > file_blocks) {
            return Err(field("shared pages", shared.runs, format!("must fit into the file's {file_blocks} blocks")));
        }
        let (first, shared) = trailer.shared_place();
        let whole = first + shared + 1;
        if whole != file_blocks {
            return Err(field("length", file_blocks, format!("must be {whole} blocks, as its trailer says")));
        }
        Ok(trailer)
    }

    /// How the pages lie.
    pub fn layout(&self) -> Pages {
        Pages { count: self.pages, tagged: self.tagged }
    }

    /// First block of the state, and its blocks.
    pub fn state_place(&self) -> (u64, u64) {
        (self.layout().blocks(), blocks(self.state))
    }

    /// First block of the index, and its blocks.
    pub fn index_place(&self) -> (u64, u64) {
        (self.layout().blocks() + blocks(self.state), self.index_blocks())
    }

    /// First block of the list of shared pages, and its blocks: none if there is no list.
    pub fn shared_place(&self) -> (u64, u64) {
        let (first, count) = self.index_place();
        (first + count, self.shared.map_or(0, |shared| shared.blocks()))
    }

    fn index_bytes(&self) -> u64 {
        self.runs * RUN as u64 + self.pages * 4
    }

    fn index_blocks(&self) -> u64 {
        blocks(self.index_bytes())
    }
}

fn small(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn number(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Frames of one object that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The object.
    pub object: u32,
    /// They read as if nobody had ever written them, and are not in the file.
    pub vacant: bool,
    /// The first frame.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// Which page is whose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    /// The runs, in rising order.
    pub runs: Vec<Run>,
    /// CRC-32 of each page in the file: [`page_checksum`].
    pub checksums: Vec<u32>,
}

impl Index {
    /// One frame more, behind all others: vacant, or the next page of the file, with its CRC-32.
    ///
    /// # Errors
    /// The heap has no room: the index is as it was.
    pub fn push(&mut self, object: u32, frame: u64, page: Option<u32>) -> Result<(), TryReserveError> {
        let vacant = page.is_none();
        self.checksums.try_reserve(1)?;
        match self.runs.last_mut() {
            Some(run) if run.object == object && run.vacant == vacant && run.first + run.count == frame => {
                run.count += 1
            }
            _ => {
                self.runs.try_reserve(1)?;
                self.runs.push(Run { object, vacant, first: frame, count: 1 });
            }
        }
        self.checksums.extend(page);
        Ok(())
    }

    /// Its bytes, without what fills up the last block.
    ///
    /// # Errors
    /// The heap has no room.
    pub fn encode(&self) -> Result<Vec<u8>, TryReserveError> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(self.runs.len() * RUN + self.checksums.len() * 4)?;
        for run in &self.runs {
            bytes.extend(run.object.to_le_bytes());
            bytes.extend(u32::from(run.vacant).to_le_bytes());
            bytes.extend(run.first.to_le_bytes());
            bytes.extend(run.count.to_le_bytes());
        }
        bytes.extend(self.checksums.iter().flat_map(|checksum| checksum.to_le_bytes()));
        Ok(bytes)
    }

    /// The index in `bytes`, of a machine whose objects have so many frames each.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn decode(bytes: &[u8], trailer: &Trailer, objects: &[u64]) -> Result<Self, SnapshotError> {
        let bytes = bytes.get(..trailer.index_bytes() as usize);
        let bytes = bytes.ok_or_else(|| field("index", trailer.runs, "must be in the file"))?;
        check_part("index", bytes, trailer.index_checksum)?;
        let (runs, checksums) = bytes.split_at(trailer.runs as usize * RUN);
        let (mut index, mut pages, mut behind) = (Self::default(), 0, (0, 0));
        let room = index.runs.try_reserve_exact(runs.len() / RUN);
        let room = room.and_then(|()| index.checksums.try_reserve_exact(checksums.len() / 4));
        room.map_err(|_| field("index", trailer.runs, "must fit into the heap"))?;
        for bytes in runs.as_chunks::<RUN>().0 {
            let run = Run {
                object: small(bytes, 0),
                vacant: small(bytes, 4) == 1,
                first: number(bytes, 8),
                count: number(bytes, 16),
            };
            let frames = objects.get(run.object as usize).copied().unwrap_or(0);
            let end = run.first.checked_add(run.count).filter(|end| *end <= frames && run.count != 0);
            let Some(end) = end.filter(|_| small(bytes, 4) <= 1 && (run.object, run.first) >= behind) else {
                let value = format_args!("{} frames at {} of object {}", run.count, run.first, run.object);
                return Err(field(
                    "run",
                    value,
                    format!("must lie in the object's {frames} frames, behind the one before"),
                ));
            };
            behind = (run.object, end);
            pages += if run.vacant { 0 } else { run.count };
            index.runs.push(run);
        }
        if pages != trailer.pages {
            return Err(field("runs", pages, format!("must have the file's {} pages", trailer.pages)));
        }
        index.checksums.extend(checksums.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)));
        Ok(index)
    }
}
