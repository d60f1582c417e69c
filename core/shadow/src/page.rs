//! The record of one shadow table.

use alloc::boxed::Box;
use alloc::vec::Vec;

use entresol_addr::{Gfn, Pfn};

use crate::{Key, Rights};

/// Words of a table.
pub(crate) const WORDS: usize = 512;

/// What a word says, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// Nothing.
    Vacant,
    /// The table with this number.
    Link(u32),
    /// A page.
    Leaf {
        /// Its guest frame.
        gfn: Gfn,
        /// What the word allows.
        rights: Rights,
        /// Where it is.
        pfn: Pfn,
    },
    /// There is no memory.
    Mmio {
        /// The guest frame.
        gfn: Gfn,
        /// What the guest's tables allow.
        rights: Rights,
        /// The slots' generation when that was found out.
        generation: u64,
    },
}

/// A shadow table.
pub(crate) struct Page {
    /// Which; `None`: it is free.
    pub key: Option<Key>,
    /// The guest may write to the table that it shows. [`Shadow`](crate::Shadow) lists those.
    pub unsynced: bool,
    pub records: Box<[Record]>,
}

impl Page {
    /// A free one; `None` if the heap has no room.
    pub(crate) fn new() -> Option<Self> {
        let mut records = Vec::new();
        records.try_reserve_exact(WORDS).ok()?;
        records.resize(WORDS, Record::Vacant);
        Some(Self { key: None, unsynced: false, records: records.into_boxed_slice() })
    }

    /// Whether it shows the guest's table in `gfn`.
    pub(crate) fn shows(&self, gfn: Gfn) -> bool {
        self.key.is_some_and(|key| key.table() == Some(gfn))
    }
}
