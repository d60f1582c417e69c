//! Which blocks are free.

use alloc::vec::Vec;

use super::{DATA_START, Directory, Extent};

/// The free blocks of a store, in rising order, none beside another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Space(Vec<Extent>);

impl Space {
    /// What `directory`, which was checked, leaves.
    pub fn of(directory: &Directory) -> Self {
        let mut used: Vec<Extent> = directory.files.iter().flat_map(|file| file.extents.iter().copied()).collect();
        used.sort_unstable();
        let mut free = Vec::new();
        let mut next = DATA_START;
        for extent in used.iter().copied().chain([Extent { start: directory.blocks as u32, count: 0 }]) {
            let start = u64::from(extent.start);
            if start > next {
                free.push(Extent { start: next as u32, count: (start - next) as u32 });
            }
            next = extent.end().max(next);
        }
        Self(free)
    }

    /// How many there are.
    pub fn blocks(&self) -> u64 {
        self.0.iter().map(|extent| u64::from(extent.count)).sum()
    }

    /// Takes at most `most` blocks that lie together; the lowest.
    pub fn take(&mut self, most: u32) -> Option<Extent> {
        let first = self.0.first_mut()?;
        let taken = Extent { start: first.start, count: first.count.min(most) };
        first.start += taken.count;
        first.count -= taken.count;
        if first.count == 0 {
            self.0.remove(0);
        }
        Some(taken)
    }

    /// Gives back the end of what [`Space::take`] answered last.
    pub fn give(&mut self, extent: Extent) {
        match self.0.first_mut().filter(|first| u64::from(first.start) == extent.end()) {
            Some(first) => *first = Extent { start: extent.start, count: extent.count + first.count },
            None => self.0.insert(0, extent),
        }
    }
}
