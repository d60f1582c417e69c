//! Making a bundle.

use alloc::borrow::Cow;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::layout::{CHECKSUM, ENTRY_LEN, Entry, Header, TABLE_ALIGN};
use super::{
    BundleError, FILE_ALIGN, FileIndex, HEADER_LEN, MAGIC, MAX_CONFIG, MAX_FILE_NAME, MAX_FILES, VERSION,
    check_references,
};
use crate::config::Config;

/// Zeros for the gap before a file and after the last.
static PADDING: [u8; FILE_ALIGN as usize] = [0; FILE_ALIGN as usize];

/// Collects files, then packs them.
#[derive(Debug, Default)]
pub struct Builder<'a> {
    files: Vec<Source<'a>>,
}

#[derive(Debug)]
struct Source<'a> {
    name: String,
    data: Cow<'a, [u8]>,
    writable: bool,
}

/// A bundle in pieces: the head, and the files that follow it, each after its padding.
#[derive(Debug)]
pub struct Packed<'a> {
    head: Vec<u8>,
    files: Vec<Source<'a>>,
    total: u64,
}

impl<'a> Builder<'a> {
    /// Without files.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a file. One that a guest may write to is for one disk only: add it again for another.
    ///
    /// # Errors
    /// The name is too long, or there are [`MAX_FILES`] files.
    pub fn add(
        &mut self,
        name: impl Into<String>,
        data: impl Into<Cow<'a, [u8]>>,
        writable: bool,
    ) -> Result<FileIndex, BundleError> {
        let name = name.into();
        if name.len() > MAX_FILE_NAME {
            let value = alloc::format!("{} bytes", name.len());
            return Err(BundleError::field(
                "file name",
                value,
                alloc::format!("must be at most {MAX_FILE_NAME} bytes"),
            ));
        }
        let index = self.files.len() as u32;
        if index == MAX_FILES {
            return Err(BundleError::field("files", index + 1, alloc::format!("must be at most {MAX_FILES}")));
        }
        self.files.push(Source { name, data: data.into(), writable });
        Ok(FileIndex(index))
    }

    /// Packs the configuration with the files that were added.
    ///
    /// # Errors
    /// The configuration breaks a rule or names files wrongly; never what [`Bundle::parse`](super::Bundle::parse) would refuse.
    pub fn pack(self, config: &Config<FileIndex>) -> Result<Packed<'a>, BundleError> {
        check_references(config, |index| {
            let source = self.files.get(usize::try_from(index.0).ok()?)?;
            Some((source.data.len() as u64, source.writable))
        })?;
        let json = serde_json::to_vec(config).map_err(|error| BundleError::BadConfig(error.to_string()))?;
        if json.len() as u64 > MAX_CONFIG {
            let rule = alloc::format!("must be at most {MAX_CONFIG} bytes");
            return Err(BundleError::field("config length", json.len(), rule));
        }
        let config_end = (HEADER_LEN + json.len()) as u64;
        let table = config_end.next_multiple_of(TABLE_ALIGN);
        let names = table + (self.files.len() * ENTRY_LEN) as u64;
        let names_len: u64 = self.files.iter().map(|source| source.name.len() as u64).sum();
        let (entries, total) = place(&self.files, names + names_len);
        let header = Header {
            magic: MAGIC,
            version: VERSION,
            checksum: 0,
            total,
            config: HEADER_LEN as u64,
            config_len: json.len() as u64,
            table,
            count: self.files.len() as u32,
            reserved: 0,
            names_len,
        };
        let mut head = Vec::from(header.encode());
        head.extend_from_slice(&json);
        head.resize(table as usize, 0);
        head.extend(entries.iter().flat_map(Entry::encode));
        head.extend(self.files.iter().flat_map(|source| source.name.bytes()));
        let mut packed = Packed { head, files: self.files, total };
        packed.seal();
        Ok(packed)
    }
}

/// Entries for files whose data follows `start`, and the end of the last one's last page.
fn place(files: &[Source<'_>], start: u64) -> (Vec<Entry>, u64) {
    let (mut end, mut name) = (start, 0);
    let entries = files.iter().map(|source| {
        let (offset, length) = (end.next_multiple_of(FILE_ALIGN), source.data.len() as u64);
        let name_len = source.name.len() as u32;
        let flags = if source.writable { Entry::WRITABLE } else { 0 };
        let checksum = crc32fast::hash(&source.data);
        let entry = Entry { offset, length, name, name_len, flags, checksum };
        (end, name) = (offset + length, name + name_len);
        entry
    });
    let entries = entries.collect();
    (entries, end.next_multiple_of(FILE_ALIGN))
}

impl Packed<'_> {
    /// Length of the bundle in bytes.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The bundle in order, piece by piece.
    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        let mut end = self.head.len() as u64;
        let files = self.files.iter().flat_map(move |source| {
            let gap = end.next_multiple_of(FILE_ALIGN) - end;
            end += gap + source.data.len() as u64;
            [&PADDING[..gap as usize], &source.data]
        });
        let data = |source: &Source<'_>| source.data.len() as u64;
        let used = self
            .files
            .iter()
            .fold(self.head.len() as u64, |end, source| end.next_multiple_of(FILE_ALIGN) + data(source));
        let rest = &PADDING[..(self.total - used) as usize];
        core::iter::once(self.head.as_slice()).chain(files).chain(core::iter::once(rest))
    }

    /// The bundle in one piece.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.total as usize);
        self.pieces().for_each(|piece| bytes.extend_from_slice(piece));
        bytes
    }

    /// Writes the bundle.
    ///
    /// # Errors
    /// Those of the writer.
    #[cfg(any(test, feature = "std"))]
    pub fn write_to(&self, out: &mut impl std::io::Write) -> std::io::Result<()> {
        self.pieces().try_for_each(|piece| out.write_all(piece))
    }

    /// Puts the checksum into the header, where zeros stand until now.
    fn seal(&mut self) {
        let mut hasher = crc32fast::Hasher::new();
        self.pieces().for_each(|piece| hasher.update(piece));
        self.head[CHECKSUM..CHECKSUM + 4].copy_from_slice(&hasher.finalize().to_le_bytes());
    }
}
