//! `entresol store`: a store's image on the host, while no machine has it.
//!
//! The same code that the hypervisor's store is made of decides what is right and in which order things are written; see
//! [`entresol_wire::store`]. A file is put as crash-safe here as there: the image is synced where the protocol says flush.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use entresol_wire::config::parse_size;
use entresol_wire::store::{AREA_BYTES, BLOCK, Commit, Directory, Step, StoreError, Writer};

use crate::{Exit, table};

/// What `entresol store` can do.
#[derive(Clone, Debug, Subcommand)]
pub enum Store {
    /// Make an empty store; the machine gets it as a virtio disk with the serial number entresol-store
    Create {
        /// The image; must not exist
        image: PathBuf,
        /// Its size, like 4G. The file is sparse
        #[arg(long, value_parser = size)]
        size: u64,
    },
    /// List its files
    List {
        /// The image
        image: PathBuf,
    },
    /// Copy a file out of it
    Get {
        /// The image
        image: PathBuf,
        /// The file's name in the store
        name: String,
        /// Where to write it; must not exist
        #[arg(short, long)]
        output: PathBuf,
    },
    /// Put a file into it, in place of one of that name
    Put {
        /// The image
        image: PathBuf,
        /// The file's name in the store
        name: String,
        /// What is put there
        input: PathBuf,
    },
    /// Take a file out of it
    Remove {
        /// The image
        image: PathBuf,
        /// The file's name in the store
        name: String,
    },
    /// Read everything, and compare it with its checksums
    Check {
        /// The image
        image: PathBuf,
    },
}

/// Why nothing was done.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{}: {error}", path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("{}: {error}", path.display())]
    Store { path: PathBuf, error: StoreError },
    #[error("{}: file {name:?}: its bytes have the CRC-32 {computed:#010x}, not {says:#010x}: it was damaged", path.display())]
    Damaged { path: PathBuf, name: String, says: u32, computed: u32 },
    #[error("cannot write the answer: {0}")]
    Output(#[from] io::Error),
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).ok_or_else(|| "must be a whole number followed by K, M, G or T".to_owned())
}

/// Carries a command out.
pub fn run(store: &Store) -> Exit {
    match carry_out(store) {
        Ok(()) => Exit::Done,
        Err(failure) => {
            eprintln!("entresol: {failure}");
            Exit::Usage
        }
    }
}

fn carry_out(store: &Store) -> Result<(), Failure> {
    match store {
        Store::Create { image, size } => create(image, *size),
        Store::List { image } => {
            let (_, directory) = Image::open(image, false)?;
            Ok(crate::print(&table::files(&listing(&directory)))?)
        }
        Store::Get { image, name, output } => get(image, name, output),
        Store::Put { image, name, input } => put(image, name, input),
        Store::Remove { image, name } => {
            let (image, directory) = Image::open(image, true)?;
            let next = directory.without(name).map_err(|error| image.store(error))?;
            image.commit(next)
        }
        Store::Check { image } => check(image),
    }
}

/// A directory as the hypervisor would list it.
fn listing(directory: &Directory) -> entresol_wire::control::Files<'_> {
    let base = |id| directory.by_id(id).map(|file| file.name.as_str().into());
    let rows = directory.files().iter().map(|file| entresol_wire::control::FileRow {
        name: file.name.as_str().into(),
        length: file.length,
        base: base(file.base),
    });
    entresol_wire::control::Files {
        size: directory.blocks() * BLOCK,
        free: directory.free_blocks() * BLOCK,
        rows: rows.collect(),
    }
}

/// An image that is open.
struct Image {
    path: PathBuf,
    file: File,
}

impl Image {
    fn open(path: &Path, write: bool) -> Result<(Self, Directory), Failure> {
        let file = OpenOptions::new().read(true).write(write).open(path);
        let file = file.map_err(|error| Failure::File { path: path.to_owned(), error })?;
        let image = Self { path: path.to_owned(), file };
        let blocks = image.file.metadata().map_err(|error| image.io(error))?.len() / BLOCK;
        let areas = [image.area(0)?, image.area(1)?];
        let directory = Directory::newest([&areas[0], &areas[1]], blocks).map_err(|error| image.store(error))?;
        Ok((image, directory))
    }

    fn io(&self, error: io::Error) -> Failure {
        Failure::File { path: self.path.clone(), error }
    }

    fn store(&self, error: StoreError) -> Failure {
        Failure::Store { path: self.path.clone(), error }
    }

    /// A directory's area, or what is there of it.
    fn area(&self, index: usize) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; AREA_BYTES];
        let mut have = 0;
        while have < bytes.len() {
            match self.file.read_at(&mut bytes[have..], (index * AREA_BYTES + have) as u64) {
                Ok(0) => break,
                Ok(count) => have += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.io(error)),
            }
        }
        bytes.truncate(have);
        Ok(bytes)
    }

    fn write(&self, block: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.file.write_all_at(bytes, block * BLOCK).map_err(|error| self.io(error))
    }

    fn commit(&self, directory: Directory) -> Result<(), Failure> {
        let mut commit = Commit::new(directory).map_err(|error| self.store(error))?;
        loop {
            match commit.step() {
                Step::Flush => self.file.sync_all().map_err(|error| self.io(error))?,
                Step::Write => self.write(commit.block(), commit.image())?,
                Step::Done => return Ok(()),
            }
            commit.advance();
        }
    }

    /// Gives every byte of a file to `take`, and compares its checksum.
    fn read(
        &self,
        file: &entresol_wire::store::File,
        mut take: impl FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let (mut checksum, mut left) = (crc32fast::Hasher::new(), file.length);
        for extent in &file.extents {
            for block in u64::from(extent.start)..extent.end() {
                let mut bytes = [0; BLOCK as usize];
                self.file.read_exact_at(&mut bytes, block * BLOCK).map_err(|error| self.io(error))?;
                let part = &bytes[..left.min(BLOCK) as usize];
                checksum.update(part);
                take(part)?;
                left -= part.len() as u64;
            }
        }
        let (computed, says) = (checksum.finalize(), file.checksum);
        let damaged = || Failure::Damaged { path: self.path.clone(), name: file.name.clone(), says, computed };
        if computed == says { Ok(()) } else { Err(damaged()) }
    }
}

fn create(path: &Path, size: u64) -> Result<(), Failure> {
    let first = Directory::first(size / BLOCK).map_err(|error| Failure::Store { path: path.to_owned(), error })?;
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
    let image =
        Image { path: path.to_owned(), file: file.map_err(|error| Failure::File { path: path.to_owned(), error })? };
    image.file.set_len(size / BLOCK * BLOCK).map_err(|error| image.io(error))?;
    for directory in first {
        image.commit(directory)?;
    }
    Ok(())
}

fn get(path: &Path, name: &str, output: &Path) -> Result<(), Failure> {
    let (image, directory) = Image::open(path, false)?;
    let file = directory.file(name).map_err(|error| image.store(error))?;
    let failed = |error| Failure::File { path: output.to_owned(), error };
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // It appears under its name when it is whole.
    let mut to = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
    image.read(file, |bytes| to.write_all(bytes).map_err(failed))?;
    to.persist_noclobber(output).map_err(|error| failed(error.error)).map(drop)
}

fn put(path: &Path, name: &str, input: &Path) -> Result<(), Failure> {
    let (image, directory) = Image::open(path, true)?;
    let failed = |error| Failure::File { path: input.to_owned(), error };
    let mut from = File::open(input).map_err(failed)?;
    let mut writer = Writer::new(&directory, name, 0).map_err(|error| image.store(error))?;
    let (mut length, mut checksum) = (0, crc32fast::Hasher::new());
    loop {
        let mut block = Vec::new();
        Read::take(&mut from, BLOCK).read_to_end(&mut block).map_err(failed)?;
        if block.is_empty() {
            break;
        }
        checksum.update(&block);
        length += block.len() as u64;
        block.resize(BLOCK as usize, 0);
        let place = writer.append(1).map_err(|error| image.store(error))?;
        image.write(place.start.into(), &block)?;
    }
    let next = writer.finish(length, checksum.finalize()).map_err(|error| image.store(error))?;
    image.commit(next)
}

fn check(path: &Path) -> Result<(), Failure> {
    let (image, directory) = Image::open(path, false)?;
    for file in directory.files() {
        image.read(file, |_| Ok(()))?;
    }
    let (files, free) = (directory.files().len(), directory.free_blocks() * BLOCK);
    Ok(crate::print(&format!("{}: right; {files} files, {free} bytes free\n", path.display()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_is_got() {
        let dir = tempfile::tempdir().unwrap();
        let (image, input, output) = (dir.path().join("store"), dir.path().join("in"), dir.path().join("out"));
        create(&image, 1 << 20).unwrap();
        assert!(create(&image, 1 << 20).is_err(), "a store that exists is not made anew");
        std::fs::write(&input, vec![7; 10_000]).unwrap();
        put(&image, "one", &input).unwrap();
        put(&image, "two", &input).unwrap();
        get(&image, "two", &output).unwrap();
        assert_eq!(std::fs::read(&output).unwrap(), vec![7; 10_000]);
        check(&image).unwrap();
        carry_out(&Store::Remove { image: image.clone(), name: "one".into() }).unwrap();
        assert_eq!(
            get(&image, "one", &dir.path().join("x")).unwrap_err().to_string(),
            format!("{}: file \"one\": must be in the store", image.display())
        );
        std::fs::write(&input, vec![8; 2 << 20]).unwrap();
        assert!(put(&image, "two", &input).unwrap_err().to_string().contains("the store is full"));
        check(&image).unwrap();
    }

    #[test]
    fn damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let (image, input) = (dir.path().join("store"), dir.path().join("in"));
        create(&image, 1 << 20).unwrap();
        std::fs::write(&input, vec![7; 10_000]).unwrap();
        put(&image, "one", &input).unwrap();
        let (open, directory) = Image::open(&image, true).unwrap();
        let place = directory.file("one").unwrap().place(1).unwrap().0;
        open.file.write_all_at(&[8], place * BLOCK + 100).unwrap();
        assert!(check(&image).unwrap_err().to_string().contains("file \"one\": its bytes have the CRC-32"));
        assert!(get(&image, "one", &dir.path().join("out")).is_err());
        assert!(!dir.path().join("out").exists(), "a damaged file is not got");
        std::fs::write(dir.path().join("other"), [0; 4096]).unwrap();
        assert!(check(&dir.path().join("other")).unwrap_err().to_string().contains("not a store"));
    }
}
