//! The files that there are, and the next version of them.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::layout::{self, field};
use super::space::Space;
use super::{BLOCK, DATA_START, Extent, MAX_FILES, StoreError, check_name};
use crate::Refusal;

/// A file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Its name.
    pub name: String,
    /// Its number, which no other file ever had.
    pub id: u64,
    /// The number of the file that it cannot be read without, or 0.
    pub base: u64,
    /// Bytes.
    pub length: u64,
    /// CRC-32 of its bytes.
    pub checksum: u32,
    /// Where they are, in order.
    pub extents: Vec<Extent>,
}

impl File {
    /// Blocks that it fills.
    pub fn blocks(&self) -> u64 {
        self.extents.iter().map(|extent| u64::from(extent.count)).sum()
    }

    /// The store's block that holds the file's block `index`, and how many follow it without a gap.
    pub fn place(&self, index: u64) -> Option<(u64, u64)> {
        let mut before = 0;
        for extent in &self.extents {
            let count = u64::from(extent.count);
            if index < before + count {
                let within = index - before;
                return Some((u64::from(extent.start) + within, count - within));
            }
            before += count;
        }
        None
    }
}

/// What is in a store, at one generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    pub(super) generation: u64,
    pub(super) blocks: u64,
    pub(super) next_id: u64,
    pub(super) files: Vec<File>,
}

impl Directory {
    /// The two directories that a new store of `blocks` blocks begins with, for area 0 and area 1.
    ///
    /// # Errors
    /// [`StoreError::Refused`]: too small, or too large for its block numbers.
    pub fn first(blocks: u64) -> Result<[Self; 2], StoreError> {
        if !(DATA_START + 1..=u64::from(u32::MAX)).contains(&blocks) {
            let rule = format!("must be from {} to {} bytes", (DATA_START + 1) * BLOCK, u64::from(u32::MAX) * BLOCK);
            return Err(StoreError::Refused(Refusal::new("size", blocks.saturating_mul(BLOCK), rule)));
        }
        Ok([0, 1].map(|generation| Self { generation, blocks, next_id: 1, files: Vec::new() }))
    }

    /// The directory that counts, of a store of `blocks` blocks whose areas hold these bytes.
    ///
    /// # Errors
    /// What is wrong with the better one.
    pub fn newest(areas: [&[u8]; 2], blocks: u64) -> Result<Self, StoreError> {
        let [first, second] = areas.map(|area| Self::decode(area, blocks));
        let in_area = |found: Result<Self, StoreError>, area: u64| {
            found.and_then(|directory| {
                let rule = "must be even in area 0 and odd in area 1";
                let fits = directory.area() as u64 == area;
                if fits { Ok(directory) } else { Err(field("generation", directory.generation, rule.into())) }
            })
        };
        match (in_area(first, 0), in_area(second, 1)) {
            (Ok(first), Ok(second)) => Ok(if first.generation > second.generation { first } else { second }),
            (Ok(only), Err(_)) | (Err(_), Ok(only)) => Ok(only),
            (Err(StoreError::NotAStore), Err(error)) | (Err(error), Err(_)) => Err(error),
        }
    }

    /// The directory in `area`, of a store of `blocks` blocks, every rule checked.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn decode(area: &[u8], blocks: u64) -> Result<Self, StoreError> {
        let directory = layout::decode(area)?;
        directory.check(blocks)?;
        Ok(directory)
    }

    /// Its bytes, from the start of its area.
    ///
    /// # Errors
    /// [`StoreError::DirectoryFull`].
    pub fn encode(&self) -> Result<Vec<u8>, StoreError> {
        layout::encode(self)
    }

    fn check(&self, blocks: u64) -> Result<(), StoreError> {
        if self.blocks > blocks || self.blocks <= DATA_START || self.blocks > u64::from(u32::MAX) {
            let rule = format!("must be from {} to the device's {blocks}", DATA_START + 1);
            return Err(field("blocks", self.blocks, rule));
        }
        let mut used = Vec::new();
        for (index, file) in self.files.iter().enumerate() {
            let name = &file.name;
            if self.files[..index].iter().any(|other| other.name == *name || other.id == file.id) {
                return Err(field(
                    &format!("file {name:?}"),
                    file.id,
                    "must have a name and a number of its own".into(),
                ));
            }
            if file.id == 0 || file.id >= self.next_id {
                let rule = format!("must be from 1 to {}", self.next_id.saturating_sub(1));
                return Err(field(&format!("file {name:?} number"), file.id, rule));
            }
            if file.base != 0 && (file.base >= file.id || !self.files.iter().any(|base| base.id == file.base)) {
                let rule = "must be that of an older file";
                return Err(field(&format!("file {name:?} base"), file.base, rule.into()));
            }
            if file.blocks() != file.length.div_ceil(BLOCK) {
                let rule = format!("must fill its {} blocks", file.blocks());
                return Err(field(&format!("file {name:?} length"), file.length, rule));
            }
            used.extend(file.extents.iter().copied());
        }
        self.check_extents(used)
    }

    fn check_extents(&self, mut used: Vec<Extent>) -> Result<(), StoreError> {
        used.sort_unstable();
        let mut free_from = DATA_START;
        for extent in used {
            if u64::from(extent.start) < free_from || extent.end() > self.blocks || extent.count == 0 {
                let value = format_args!("{} blocks at {}", extent.count, extent.start);
                let rule = format!("must be some blocks from {DATA_START} to {} that no other has", self.blocks);
                return Err(field("extent", value, rule));
            }
            free_from = extent.end();
        }
        Ok(())
    }

    /// Its generation.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The area that it lies in.
    pub fn area(&self) -> usize {
        (self.generation % 2) as usize
    }

    /// Blocks of the whole store.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Blocks that no file has.
    pub fn free_blocks(&self) -> u64 {
        Space::of(self).blocks()
    }

    /// Every file.
    pub fn files(&self) -> &[File] {
        &self.files
    }

    /// The file called `name`.
    ///
    /// # Errors
    /// [`StoreError::NoSuchFile`].
    pub fn file(&self, name: &str) -> Result<&File, StoreError> {
        self.files.iter().find(|file| file.name == name).ok_or_else(|| StoreError::NoSuchFile(name.into()))
    }

    /// The file of this number.
    pub fn by_id(&self, id: u64) -> Option<&File> {
        self.files.iter().find(|file| file.id == id)
    }

    /// That nobody needs the file called `name`, if there is one.
    fn check_unneeded(&self, name: &str) -> Result<(), StoreError> {
        let Some(file) = self.files.iter().find(|file| file.name == name) else { return Ok(()) };
        match self.files.iter().find(|other| other.base == file.id) {
            Some(other) => Err(StoreError::Needed { name: name.into(), other: other.name.clone() }),
            None => Ok(()),
        }
    }

    /// The next generation, without the file called `name`.
    ///
    /// # Errors
    /// [`StoreError::NoSuchFile`], [`StoreError::Needed`].
    pub fn without(&self, name: &str) -> Result<Self, StoreError> {
        self.file(name)?;
        self.check_unneeded(name)?;
        let files = self.files.iter().filter(|file| file.name != name).cloned().collect();
        Ok(Self { generation: self.generation + 1, files, ..*self })
    }
}

/// A file that is being written: to blocks that the directory does not name.
#[derive(Clone, Debug)]
pub struct Writer {
    name: String,
    base: u64,
    space: Space,
    extents: Vec<Extent>,
    directory: Directory,
}

impl Writer {
    /// A new file called `name`, which needs the file of number `base`, or 0. It takes the place of one of that name.
    ///
    /// # Errors
    /// [`StoreError::Refused`], [`StoreError::Needed`], [`StoreError::DirectoryFull`].
    pub fn new(directory: &Directory, name: &str, base: u64) -> Result<Self, StoreError> {
        check_name("file", name).map_err(StoreError::Refused)?;
        directory.check_unneeded(name)?;
        let based = directory.by_id(base).map(|file| &*file.name);
        if based == Some(name) {
            return Err(StoreError::Needed { name: name.into(), other: name.into() });
        }
        if base != 0 && based.is_none() {
            return Err(StoreError::Refused(Refusal::new("base", base, "must be the number of a file in the store")));
        }
        let replaced = directory.files.iter().any(|file| file.name == name);
        if directory.files.len() == MAX_FILES && !replaced {
            return Err(StoreError::DirectoryFull);
        }
        let (space, directory) = (Space::of(directory), directory.clone());
        Ok(Self { name: name.into(), base, space, extents: Vec::new(), directory })
    }

    /// Where the next blocks of the file go: from one to `most`, which is not 0.
    ///
    /// # Errors
    /// [`StoreError::Full`].
    pub fn append(&mut self, most: u32) -> Result<Extent, StoreError> {
        let taken = self.space.take(most).ok_or(StoreError::Full { blocks: self.directory.blocks })?;
        match self.extents.last_mut() {
            Some(last) if last.end() == u64::from(taken.start) => last.count += taken.count,
            _ => self.extents.push(taken),
        }
        Ok(taken)
    }

    /// Gives back the last `count` blocks of what [`Writer::append`] answered last; fewer than that were.
    pub fn give_back(&mut self, count: u32) {
        let Some(last) = self.extents.last_mut().filter(|last| last.count > count && count != 0) else { return };
        last.count -= count;
        self.space.give(Extent { start: last.end() as u32, count });
    }

    /// The number that the file gets.
    pub fn id(&self) -> u64 {
        self.directory.next_id
    }

    /// The next generation, with the file: all of its `length` bytes, whose CRC-32 is `checksum`, are written.
    ///
    /// # Errors
    /// [`StoreError::DirectoryFull`]. [`StoreError::BadField`]: the length does not fill the blocks that were taken.
    pub fn finish(self, length: u64, checksum: u32) -> Result<Directory, StoreError> {
        let Self { name, base, extents, directory, .. } = self;
        let mut files = directory.files;
        files.retain(|file| file.name != name);
        files.push(File { name, id: directory.next_id, base, length, checksum, extents });
        let (generation, next_id) = (directory.generation + 1, directory.next_id + 1);
        let next = Directory { generation, next_id, files, ..directory };
        next.check(next.blocks)?;
        next.encode()?;
        Ok(next)
    }
}
