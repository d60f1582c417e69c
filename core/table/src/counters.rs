//! How much is mapped.

use entresol_addr::PageSize;
use entresol_sync::atomic::Ordering;
use entresol_sync::tally::AtomicU64;

/// Numbers of entries and table pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Census {
    /// Leaves of 4 KiB, 2 MiB and 1 GiB, in the order of [`PageSize::ALL`].
    pub leaves: [u64; 3],
    /// Table pages, the root not among them.
    pub tables: u64,
}

impl Census {
    /// Leaves of one size.
    pub const fn of(&self, size: PageSize) -> u64 {
        self.leaves[size as usize]
    }

    /// 4 KiB frames behind all leaves.
    pub fn frames(&self) -> u64 {
        PageSize::ALL.iter().map(|size| self.of(*size) * size.frames()).sum()
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub(crate) fn count(&mut self, size: PageSize) {
        self.leaves[size as usize] += 1;
    }
}

/// The running numbers. They wrap below zero for a moment if a removal is counted before the installation it follows.
#[derive(Default)]
pub(crate) struct Counters {
    leaves: [AtomicU64; 3],
    tables: AtomicU64,
}

impl Counters {
    #[inline]
    pub(crate) fn add_leaves(&self, size: PageSize, count: u64) {
        self.leaves[size as usize].fetch_add(count, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn remove_leaves(&self, size: PageSize, count: u64) {
        self.leaves[size as usize].fetch_sub(count, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn add_table(&self) {
        self.tables.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts what an operation took away.
    pub(crate) fn remove(&self, gone: &Census) {
        for size in PageSize::ALL {
            if gone.of(size) != 0 {
                self.remove_leaves(size, gone.of(size));
            }
        }
        if gone.tables != 0 {
            self.tables.fetch_sub(gone.tables, Ordering::Relaxed);
        }
    }

    pub(crate) fn census(&self) -> Census {
        let read = |counter: &AtomicU64| {
            let value = counter.load(Ordering::Relaxed);
            if value > i64::MAX as u64 { 0 } else { value }
        };
        Census { leaves: [0, 1, 2].map(|size| read(&self.leaves[size])), tables: read(&self.tables) }
    }
}
