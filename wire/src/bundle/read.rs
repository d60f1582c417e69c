//! Reading a bundle in place, believing nothing.

use alloc::format;
use alloc::string::ToString;
use core::str;

use super::layout::{CHECKSUM, ENTRY_LEN, Entry, Header, TABLE_ALIGN};
use super::{
    BundleError, FILE_ALIGN, FileIndex, HEADER_LEN, MAGIC, MAX_CONFIG, MAX_FILE_NAME, MAX_FILES, VERSION,
    check_references,
};
use crate::config::Config;

/// A bundle whose every part was checked.
#[derive(Clone, Debug)]
pub struct Bundle<'a> {
    /// Exactly the bundle: what lies behind its end is not part of it.
    bytes: &'a [u8],
    entries: &'a [[u8; ENTRY_LEN]],
    names: &'a [u8],
    config: Config<FileIndex>,
}

/// A file in a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct File<'a> {
    /// The name it was packed under.
    pub name: &'a str,
    /// Where its data starts, in bytes from the start of the bundle; a multiple of [`FILE_ALIGN`].
    pub offset: u64,
    /// Its data.
    pub data: &'a [u8],
    /// Whether a guest may write to it.
    pub writable: bool,
    /// CRC-32 of its data, as it was packed.
    pub checksum: u32,
}

impl<'a> Bundle<'a> {
    /// Checks the bundle at the start of `bytes`; what follows its end is ignored.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BundleError> {
        let (header, bytes) = whole(bytes)?;
        let config_end = section(bytes, "config", header.config, header.config_len, HEADER_LEN as u64)?;
        if header.config_len > MAX_CONFIG {
            let rule = format!("must be at most {MAX_CONFIG} bytes");
            return Err(BundleError::field("config length", header.config_len, rule));
        }
        if header.count > MAX_FILES {
            return Err(BundleError::field("file count", header.count, format!("must be at most {MAX_FILES}")));
        }
        if header.reserved != 0 || !header.table.is_multiple_of(TABLE_ALIGN) {
            let value = format_args!("{:#x}, reserved {:#x}", header.table, header.reserved);
            return Err(BundleError::field("table", value, "must be a multiple of 8, reserved bytes zero"));
        }
        let table_len = u64::from(header.count) * ENTRY_LEN as u64;
        let table_end = section(bytes, "table", header.table, table_len, config_end)?;
        let names_end = section(bytes, "names", table_end, header.names_len, table_end)?;
        let (entries, _) = cut(bytes, header.table, table_end).as_chunks();
        let names = cut(bytes, table_end, names_end);
        check_files(bytes, entries, names, names_end)?;
        let config = serde_json::from_slice(cut(bytes, header.config, config_end))
            .map_err(|error| BundleError::BadConfig(error.to_string()))?;
        let bundle = Self { bytes, entries, names, config };
        check_references(&bundle.config, |index| {
            bundle.file(index).map(|file| (file.data.len() as u64, file.writable))
        })?;
        Ok(bundle)
    }

    /// The configuration; every file that it names is in this bundle.
    pub fn config(&self) -> &Config<FileIndex> {
        &self.config
    }

    /// The file at a place of the table, if there is one.
    pub fn file(&self, index: FileIndex) -> Option<File<'a>> {
        let entry = Entry::decode(self.entries.get(usize::try_from(index.0).ok()?)?);
        let name = u64::from(entry.name);
        Some(File {
            name: str::from_utf8(cut(self.names, name, name + u64::from(entry.name_len))).ok()?,
            offset: entry.offset,
            data: cut(self.bytes, entry.offset, entry.offset + entry.length),
            writable: entry.writable(),
            checksum: entry.checksum,
        })
    }

    /// Every file, in the order of the table.
    pub fn files(&self) -> impl Iterator<Item = File<'a>> {
        (0..self.entries.len() as u32).filter_map(|index| self.file(FileIndex(index)))
    }

    /// Length in bytes.
    pub fn total(&self) -> u64 {
        self.bytes.len() as u64
    }
}

/// The header, and exactly the bytes that it speaks of, whose checksum is right.
fn whole(bytes: &[u8]) -> Result<(Header, &[u8]), BundleError> {
    let have = bytes.len() as u64;
    let head = bytes.first_chunk::<HEADER_LEN>().ok_or(BundleError::NoHeader { have })?;
    let header = Header::decode(head);
    if header.magic != MAGIC {
        return Err(BundleError::BadMagic { found: header.magic });
    }
    if header.version != VERSION {
        return Err(BundleError::BadVersion { found: header.version });
    }
    if header.total < HEADER_LEN as u64 {
        let rule = format!("must be at least the header's {HEADER_LEN} bytes");
        return Err(BundleError::field("length", header.total, rule));
    }
    if !header.total.is_multiple_of(FILE_ALIGN) {
        return Err(BundleError::field("length", header.total, format!("must be a multiple of {FILE_ALIGN}")));
    }
    if header.total > have {
        return Err(BundleError::CutOff { says: header.total, have });
    }
    let bytes = cut(bytes, 0, header.total);
    let computed = checksum(bytes);
    if computed != header.checksum {
        return Err(BundleError::BadChecksum { says: header.checksum, computed });
    }
    Ok((header, bytes))
}

/// The checksum of a whole bundle, whose own bytes count as zero.
fn checksum(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..CHECKSUM]);
    hasher.update(&[0; 4]);
    hasher.update(&bytes[CHECKSUM + 4..]);
    hasher.finalize()
}

/// The end of a section that must lie between `after` and the end of the bundle.
fn section(bytes: &[u8], name: &str, offset: u64, length: u64, after: u64) -> Result<u64, BundleError> {
    let total = bytes.len() as u64;
    match offset.checked_add(length) {
        Some(end) if offset >= after && end <= total => Ok(end),
        _ => {
            let rule = format!("must lie in the bundle between {after:#x} and {total:#x}");
            Err(BundleError::field(name, format_args!("{length:#x} bytes at {offset:#x}"), rule))
        }
    }
}

/// Every entry points to data behind the one before, and to a name.
fn check_files(bytes: &[u8], entries: &[[u8; ENTRY_LEN]], names: &[u8], names_end: u64) -> Result<(), BundleError> {
    let mut end = names_end;
    for (index, entry) in entries.iter().map(Entry::decode).enumerate() {
        let at = |part: &str| format!("files[{index}].{part}");
        end = section(bytes, &at("data"), entry.offset, entry.length, end)?;
        if !entry.offset.is_multiple_of(FILE_ALIGN) {
            let rule = format!("must be a multiple of {FILE_ALIGN}");
            return Err(BundleError::field(at("offset"), format_args!("{:#x}", entry.offset), rule));
        }
        if entry.flags & !Entry::WRITABLE != 0 {
            return Err(BundleError::field(
                at("flags"),
                format_args!("{:#x}", entry.flags),
                "unknown bits must be zero",
            ));
        }
        let name_end = section(names, &at("name"), u64::from(entry.name), u64::from(entry.name_len), 0)?;
        let name = cut(names, u64::from(entry.name), name_end);
        if name.len() > MAX_FILE_NAME || str::from_utf8(name).is_err() {
            let rule = format!("must be at most {MAX_FILE_NAME} bytes of UTF-8");
            return Err(BundleError::field(at("name"), format_args!("{} bytes", name.len()), rule));
        }
    }
    Ok(())
}

/// Bytes from `start` to `end`, which [`section`] found to lie inside.
fn cut(bytes: &[u8], start: u64, end: u64) -> &[u8] {
    &bytes[start as usize..end as usize]
}
