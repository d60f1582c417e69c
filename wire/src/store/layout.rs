//! Where the numbers of a store stand; see the tables in the parent.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::str;

use super::{Directory, File, StoreError};
use crate::Refusal;

/// Bytes of a block.
pub const BLOCK: u64 = 4096;
/// Blocks of one directory's area.
pub const AREA_BLOCKS: u64 = 64;
/// Bytes of one directory's area.
pub const AREA_BYTES: usize = (AREA_BLOCKS * BLOCK) as usize;
/// The first block of data.
pub const DATA_START: u64 = 2 * AREA_BLOCKS;
/// The version that this code writes and reads.
pub const VERSION: u32 = 1;
/// Most files.
pub const MAX_FILES: usize = 256;
/// Longest name, in bytes.
pub const MAX_NAME: usize = 64;

const MAGIC: [u8; 8] = *b"ENTSTORE";
/// Bytes of the header.
const HEADER: usize = 64;
/// Where the checksum stands.
const CHECKSUM: usize = 12;

/// Contiguous blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Extent {
    /// The first.
    pub start: u32,
    /// How many.
    pub count: u32,
}

impl Extent {
    /// One past the last block.
    pub fn end(self) -> u64 {
        u64::from(self.start) + u64::from(self.count)
    }
}

/// Checks a name: 1 to [`MAX_NAME`] of `a`–`z`, `A`–`Z`, `0`–`9`, `.`, `_`, `-`, not beginning with `.` or `-`.
///
/// # Errors
/// [`Refusal`] of `field`.
pub fn check_name(field: &str, name: &str) -> Result<(), Refusal> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let fits = (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with(['.', '-']);
    if fits {
        return Ok(());
    }
    let rule = format!("must be 1 to {MAX_NAME} letters, digits, '.', '_' or '-', and not begin with '.' or '-'");
    Err(Refusal::text(field, name, rule))
}

/// A directory's bytes, without what fills up its area.
pub(super) fn encode(directory: &Directory) -> Result<Vec<u8>, StoreError> {
    let mut image = Vec::from([0; HEADER]);
    for file in &directory.files {
        image.extend(file.id.to_le_bytes());
        image.extend(file.base.to_le_bytes());
        image.extend(file.length.to_le_bytes());
        image.extend(file.checksum.to_le_bytes());
        image.extend((file.extents.len() as u32).to_le_bytes());
        image.extend((file.name.len() as u16).to_le_bytes());
        image.extend([0; 6]);
        image.extend(file.name.as_bytes());
        image.resize(image.len().next_multiple_of(8), 0);
        for extent in &file.extents {
            image.extend(extent.start.to_le_bytes());
            image.extend(extent.count.to_le_bytes());
        }
    }
    if image.len() > AREA_BYTES || directory.files.len() > MAX_FILES {
        return Err(StoreError::DirectoryFull);
    }
    image[..8].copy_from_slice(&MAGIC);
    image[8..12].copy_from_slice(&VERSION.to_le_bytes());
    image[16..24].copy_from_slice(&directory.generation.to_le_bytes());
    image[24..32].copy_from_slice(&directory.blocks.to_le_bytes());
    let (len, count) = (image.len() as u32, directory.files.len() as u32);
    image[32..36].copy_from_slice(&len.to_le_bytes());
    image[36..40].copy_from_slice(&count.to_le_bytes());
    image[40..48].copy_from_slice(&directory.next_id.to_le_bytes());
    let checksum = crc32fast::hash(&image);
    image[CHECKSUM..CHECKSUM + 4].copy_from_slice(&checksum.to_le_bytes());
    Ok(image)
}

/// Reads numbers one after the other; what is not there is an error.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], StoreError> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or_else(|| {
            field("directory", format_args!("{} bytes", self.0.len()), "must have room for what it counts".into())
        })?;
        self.0 = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StoreError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, StoreError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, StoreError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn zeros(&mut self, name: &str, count: usize) -> Result<(), StoreError> {
        let bytes = self.bytes(count)?;
        let zero = bytes.iter().all(|byte| *byte == 0);
        if zero { Ok(()) } else { Err(field(name, format_args!("{bytes:02x?}"), "must be zero".into())) }
    }
}

pub(super) fn field(name: &str, value: impl core::fmt::Display, rule: String) -> StoreError {
    StoreError::BadField(Refusal::new(name, value, rule))
}

/// The directory at the start of `area`, as it says it is; nothing but its form is checked.
pub(super) fn decode(area: &[u8]) -> Result<Directory, StoreError> {
    let head = area.first_chunk::<HEADER>().ok_or(StoreError::NotAStore)?;
    if head[..8] != MAGIC {
        return Err(StoreError::NotAStore);
    }
    let mut reader = Reader(&head[8..]);
    let (version, says) = (reader.u32()?, reader.u32()?);
    if version != VERSION {
        return Err(StoreError::BadVersion { found: version });
    }
    let (generation, blocks, len, count) = (reader.u64()?, reader.u64()?, reader.u32()?, reader.u32()?);
    let next_id = reader.u64()?;
    let image = area.get(..len as usize).filter(|image| (HEADER..=AREA_BYTES).contains(&image.len()));
    let image =
        image.ok_or_else(|| field("directory length", len, format!("must be from {HEADER} to {}", area.len())))?;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&image[..CHECKSUM]);
    hasher.update(&[0; 4]);
    hasher.update(&image[CHECKSUM + 4..]);
    let computed = hasher.finalize();
    if computed != says {
        return Err(StoreError::BadChecksum { says, computed });
    }
    reader.zeros("reserved bytes", 16)?;
    if count as usize > MAX_FILES {
        return Err(field("file count", count, format!("must be at most {MAX_FILES}")));
    }
    let mut reader = Reader(&image[HEADER..]);
    let files = (0..count).map(|_| decode_file(&mut reader)).collect::<Result<Vec<_>, _>>()?;
    if !reader.0.is_empty() {
        return Err(field("directory", format_args!("{} bytes behind its files", reader.0.len()), "must be 0".into()));
    }
    Ok(Directory { generation, blocks, next_id, files })
}

fn decode_file(reader: &mut Reader<'_>) -> Result<File, StoreError> {
    let (id, base, length, checksum) = (reader.u64()?, reader.u64()?, reader.u64()?, reader.u32()?);
    let (count, name) = (reader.u32()? as usize, usize::from(u16::from_le_bytes(reader.array()?)));
    reader.zeros("file's reserved bytes", 6)?;
    let bytes = reader.bytes(name)?;
    let name =
        str::from_utf8(bytes).map_err(|_| field("file name", format_args!("{bytes:02x?}"), "must be UTF-8".into()))?;
    check_name("file name", name).map_err(StoreError::BadField)?;
    reader.zeros("bytes behind a name", name.len().next_multiple_of(8) - name.len())?;
    let (extents, _) = reader.bytes(count.saturating_mul(8))?.as_chunks::<8>();
    let extents = extents.iter().map(|[a, b, c, d, e, f, g, h]| Extent {
        start: u32::from_le_bytes([*a, *b, *c, *d]),
        count: u32::from_le_bytes([*e, *f, *g, *h]),
    });
    Ok(File { name: name.into(), id, base, length, checksum, extents: extents.collect() })
}
