//! How a directory becomes the one that counts.
//!
//! Protocol: all data of the new generation was written, and its writes are done. Then every [`Step`] is carried out and
//! *done* before the next is asked for. After the last one the new directory counts; before the write it cannot, in between
//! it is one of both.

use alloc::vec::Vec;

use super::{AREA_BLOCKS, BLOCK, Directory, StoreError};

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Everything that was written stays.
    Flush,
    /// [`Commit::image`] is written from block [`Commit::block`] on.
    Write,
    /// Nothing: the new directory counts.
    Done,
}

/// A commit on its way.
#[derive(Clone, Debug)]
pub struct Commit {
    directory: Directory,
    image: Vec<u8>,
    done: u8,
}

impl Commit {
    /// Begins to make `directory` count.
    ///
    /// # Errors
    /// [`StoreError::DirectoryFull`].
    pub fn new(directory: Directory) -> Result<Self, StoreError> {
        let mut image = directory.encode()?;
        image.resize(image.len().next_multiple_of(BLOCK as usize), 0);
        Ok(Self { directory, image, done: 0 })
    }

    /// The step that is to be carried out now.
    pub fn step(&self) -> Step {
        match self.done {
            0 | 2 => Step::Flush,
            1 => Step::Write,
            _ => Step::Done,
        }
    }

    /// The step is done.
    pub fn advance(&mut self) {
        self.done = self.done.saturating_add(1);
    }

    /// Whether its directory was written, and may count already.
    pub fn is_written(&self) -> bool {
        self.done > 1
    }

    /// The directory's bytes, whole blocks.
    pub fn image(&self) -> &[u8] {
        &self.image
    }

    /// The block that they begin at.
    pub fn block(&self) -> u64 {
        self.directory.area() as u64 * AREA_BLOCKS
    }

    /// The directory, which counts when every step is done.
    pub fn into_directory(self) -> Directory {
        self.directory
    }
}
