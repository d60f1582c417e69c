//! What shadow tables must know of the guest's own tables, without any architecture.

use entresol_addr::{Gfn, Gpa};

/// What is allowed through an entry, or through all on the way to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rights {
    /// Accesses by user code.
    pub user: bool,
    /// Stores.
    pub write: bool,
    /// Fetches.
    pub execute: bool,
    /// The page's protection key; 0 for a table.
    pub key: u8,
}

impl Rights {
    /// Everything.
    pub const ALL: Self = Self { user: true, write: true, execute: true, key: 0 };

    /// Whether an entry with `self` stays right when its guest says `now`: no more is allowed than that, and whose page it is, and
    /// under which key, is as it was.
    pub(crate) const fn stays_under(self, now: Self) -> bool {
        self.user == now.user && self.key == now.key && (now.write || !self.write) && (now.execute || !self.execute)
    }
}

/// What the words of a shadow table stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// Entries of a table of the guest: that behind word `index` is at `at + (index * 8 >> shift)`, rounded down to an entry.
    Table {
        /// Where the entry behind word 0 is.
        at: Gpa,
        /// 0 where an entry has eight bytes; 1 where it has four; 2 where two words share one of four.
        shift: u8,
    },
    /// Parts of a large page, or of physical memory: the words of a table of level 1 are frames from here on.
    Page {
        /// The first frame.
        gfn: Gfn,
    },
    /// What registers say: no memory of the guest is behind it.
    Registers {
        /// The root.
        root: u64,
        /// Entries that the processor keeps.
        pointers: [u64; 4],
    },
}

/// Which shadow table it is: two ways with equal keys share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// What its words stand for.
    pub source: Source,
    /// Its level; 1 is that of pages.
    pub level: u8,
    /// What all entries above it allow.
    pub rights: Rights,
    /// The guest's paging mode, and whatever else decides how its entries are read.
    pub role: u32,
}

impl Key {
    /// The frame of the guest's table behind it, if there is one.
    pub const fn table(&self) -> Option<Gfn> {
        match self.source {
            Source::Table { at, .. } => Some(at.frame()),
            Source::Page { .. } | Source::Registers { .. } => None,
        }
    }
}

/// What stands behind one word of a shadow table now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    /// Nothing that a processor could have used: not present, not accessed, or with a reserved bit.
    Nothing,
    /// A table.
    Table(Key),
    /// A page of the guest.
    Page {
        /// Its frame.
        gfn: Gfn,
        /// What the whole way allows; stores only if it is dirty already.
        rights: Rights,
    },
}

/// The most levels that shadow tables have.
pub const MOST_LEVELS: usize = 5;

/// A walk of the guest's tables that ended at a page.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    /// The keys of the shadow tables on the way, from the root to level 1.
    pub keys: [Key; MOST_LEVELS],
    /// How many there are.
    pub depth: usize,
    /// The address, to the byte.
    pub gpa: Gpa,
    /// What an entry for it may allow.
    pub rights: Rights,
}

/// The guest's own tables, as its architecture reads them.
pub trait GuestTables {
    /// An access.
    type Request: Copy;
    /// Why a walk led nowhere: mostly an exception for the guest.
    type Error;

    /// Walks as the processor would for `request`, sets accessed and dirty flags as it would, and judges the access.
    ///
    /// # Errors
    ///
    /// The implementor's.
    fn walk(&mut self, linear: u64, request: Self::Request) -> Result<Walk, Self::Error>;

    /// Where `request` at `linear` leads from the table `key` of level 1, to which the way of `linear` has come: the address, and what an
    /// entry for it may allow, as [`Self::walk`] would say. `None`: the walk is to say, because a flag is to be set, the access is not
    /// allowed, or the entry leads to no page.
    ///
    /// # Errors
    ///
    /// The implementor's.
    fn last(&mut self, key: &Key, linear: u64, request: Self::Request) -> Result<Option<(Gpa, Rights)>, Self::Error>;

    /// What stands behind word `index` of the table `key`, which is no [`Source::Page`]. No flag is set. What cannot be read says
    /// nothing.
    fn read(&mut self, key: &Key, index: u16) -> Says;

    /// The key of the root.
    fn root(&self) -> Key;

    /// Whether `key` is that of the root.
    #[inline]
    fn is_root(&self, key: &Key) -> bool {
        *key == self.root()
    }

    /// Whether `request` stores.
    fn writes(&self, request: Self::Request) -> bool;

    /// Whether it fetches an instruction.
    fn fetches(&self, request: Self::Request) -> bool;

    /// Whether `rights` allow `request`.
    fn allows(&self, rights: Rights, request: Self::Request) -> bool;
}

/// How the hardware that walks shadow tables reads their words.
pub trait ShadowFormat {
    /// The word of a page.
    fn leaf(&self, frame: entresol_addr::Pfn, rights: Rights) -> u64;

    /// The word of the table `above` that leads to another, open to everything.
    fn table(&self, frame: entresol_addr::Pfn, above: &Key) -> u64;

    /// The word that says that there is no memory, if one can; the hardware reports it apart.
    fn mmio(&self, gfn: Gfn, rights: Rights, generation: u64) -> Option<u64>;
}

impl<F: ShadowFormat + ?Sized> ShadowFormat for alloc::boxed::Box<F> {
    fn leaf(&self, frame: entresol_addr::Pfn, rights: Rights) -> u64 {
        (**self).leaf(frame, rights)
    }

    fn table(&self, frame: entresol_addr::Pfn, above: &Key) -> u64 {
        (**self).table(frame, above)
    }

    fn mmio(&self, gfn: Gfn, rights: Rights, generation: u64) -> Option<u64> {
        (**self).mmio(gfn, rights, generation)
    }
}

/// The words of the guest's memory that its tables are made of, eight bytes each.
pub trait GuestWords {
    /// Why a word cannot be reached now.
    type Error;

    /// The word at `at`, which is aligned to it.
    ///
    /// # Errors
    ///
    /// The implementor's.
    fn load(&mut self, at: Gpa) -> Result<u64, Self::Error>;

    /// Stores `new` if the word at `at` is `current`; whether it was.
    ///
    /// # Errors
    ///
    /// The implementor's.
    fn compare_exchange(&mut self, at: Gpa, current: u64, new: u64) -> Result<bool, Self::Error>;
}

/// Why a walk of the guest's tables ended before a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop<G, E> {
    /// The guest gets an exception.
    Guest(G),
    /// The guest changes its tables faster than they can be walked.
    Contended,
    /// A word of them cannot be reached.
    Words(E),
}

/// What a vCPU's registers say of its tables, which are reached only while the shadow tables are held.
pub trait Regime {
    /// An access.
    type Request: Copy;
    /// An exception for the guest.
    type Fault;
    /// The tables as seen through `W`.
    type Tables<W: GuestWords>: GuestTables<Request = Self::Request, Error: Into<Stop<Self::Fault, W::Error>>>;

    /// Them.
    fn tables<W: GuestWords>(&self, words: W) -> Self::Tables<W>;
}

/// What the slots and objects have for a guest frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A frame of memory.
    Frame {
        /// Which.
        pfn: entresol_addr::Pfn,
        /// It may be written in place.
        writable: bool,
    },
    /// No slot.
    Nothing,
}

/// Where guest frames are in the machine's memory. Asked and used under one reading of slots and notifier.
pub trait GuestMemory {
    /// Why a frame cannot be given now.
    type Error;

    /// The memory behind `gfn`, writable if `write`.
    ///
    /// # Errors
    ///
    /// The implementor's.
    fn backing(&mut self, gfn: Gfn, write: bool) -> Result<Backing, Self::Error>;

    /// The slots' generation, whole; `None` while an update is in progress.
    fn generation(&self) -> Option<u64>;
}
