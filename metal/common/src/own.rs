//! What leaves the hypervisor's own mapping, and comes back; and the windows of each CPU (design D9, INV-10).
//!
//! Purpose: frames of private guests are not in the identity map, so no speculation of the hypervisor reaches them. The map was
//! built with blocks of 2 MiB; here such a block goes away as one entry, gets a table when the first of its frames comes back
//! alone, and becomes a block again when all are given back: [`Own::census`] counts them.
//!
//! Protocol: [`Own::init`] is given memory once, [`Own::init_cpu`] runs on each CPU before a window is opened there. A block of
//! 2 MiB leaves when all of its frames are the caller's and nobody uses any of them, so no entry changes under an access of
//! another CPU, and there is nobody to wait for in between (Arm DDI 0487 D8.17.1, break-before-make). What a frame's entry
//! says from then on is the business of whoever has the frame's lock.
//!
//! Each 2 MiB of the pool has its own table set aside in the memory that `init` was given, so nothing here allocates,
//! and nothing can fail for want of memory: 1/512 of the pool.
//!
//! What entries look like and which instructions go with them is an architecture's to say: a [`Regime`]. All have four levels
//! of 512 entries, the leaf of the last of 4 KiB.
//!
//! # Windows
//!
//! A translation that only one CPU can have needs a root of its own: in a table that others walk too, they might cache the
//! entry by speculation, and only all of them could forget it. So each CPU has four pages: a root, equal to the
//! boot CPU's but for its last entry, and a table of each level for the windows behind that entry.
//!
//! Invariants: the root's and its tables' entries never change after boot. A reserved table that no entry names is all zero. A
//! window is closed, and its translation invalidated, before the function that opened it returns.
//! Lock order: `changing` is a leaf.
//!
//! Known holes: RAM that was mapped with 1 GiB blocks cannot leave.

use entresol_addr::{PAGE_SIZE, Pfn, PfnRange};
use entresol_machine::own::{OWN_BLOCK, RemoveError, Work, is_own_unit};
use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Tables of one CPU: root, and the three levels of its windows.
const CPU_TABLES: u64 = 4;
/// The root's entry behind which the windows are: addresses that no memory has, since the map is the identity.
const WINDOW_ROOT_INDEX: u64 = 511;
/// Address bits below what an entry of a level translates, from the root's on.
const SHIFTS: [u32; 4] = [39, 30, 21, 12];
const BLOCK_SHIFT: u32 = 21;

/// Where a table of the mapping is. Made of a root, of an entry, or of the memory that [`Own::init`] was given, and of
/// nothing else: words of it may be loaded and stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table(u64);

impl Table {
    /// Its first byte.
    #[inline]
    pub const fn address(self) -> u64 {
        self.0
    }
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing is there.
    Absent,
    /// A table of the next level, at this address.
    Table(u64),
    /// Memory.
    Leaf,
}

/// Size of a leaf that this module writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaf {
    /// 4 KiB.
    Page,
    /// 2 MiB.
    Block,
}

/// How an architecture translates the hypervisor's own addresses.
pub trait Regime {
    /// Address of the first window: what the root's last entry translates.
    const WINDOWS: u64;

    /// Number of this CPU.
    fn cpu(&self) -> usize;

    /// How many there are.
    fn cpus(&self) -> usize;

    /// Address of the root that this CPU walks.
    fn root(&self) -> u64;

    /// Word `index`, below 512, of a table.
    fn word(&self, table: Table, index: u64) -> &AtomicU64;

    /// An entry that names the table at `address`.
    fn table(&self, address: u64) -> u64;

    /// An entry of memory at `address`: read and write.
    fn leaf(&self, address: u64, size: Leaf) -> u64;

    /// What `raw` says, in an entry that translates `1 << shift` bytes.
    fn entry(&self, raw: u64, shift: u32) -> Entry;

    /// Orders stores to entries that were absent before this CPU's next access through them, and before others' that learn of it.
    fn publish(&self);

    /// Has all CPUs forget tables that were named by an entry which is absent now; returns when they have.
    fn forget_tables(&self);

    /// Has this CPU forget what it knows of the page at `address`, of which no other CPU can know.
    fn forget_window(&self, address: u64);

    /// Makes this CPU walk `root`, and forget what it knew. It translates all that the old one does to the same.
    fn switch(&self, root: Table);
}

/// How bytes are moved. Guests may write the same memory meanwhile.
pub trait Moves {
    /// `count` bytes from `from` to `to`, which are mapped and do not overlap.
    fn bytes(&self, from: u64, to: u64, count: u64);

    /// Of the whole pages at `from` and `to`.
    fn page(&self, from: u64, to: u64);

    /// Fills the page at `at` with zero.
    fn zero(&self, at: u64);
}

/// A window of a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// The frame that is worked on.
    Work = 0,
    /// The frame that is copied from.
    Source = 1,
    /// The frame whose caches are maintained.
    Caches = 2,
}

/// How the blocks of 2 MiB are mapped whose frames can leave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// As one entry.
    pub blocks: u64,
    /// By a table of pages.
    pub tables: u64,
    /// Not at all.
    pub absent: u64,
}

/// The own mapping, as far as it changes.
pub struct Own<R> {
    regime: R,
    /// First byte of the memory that [`Self::init`] was given; 0 before.
    reserve: AtomicU64,
    /// Where the tables of blocks are in it: behind those of the CPUs.
    tables: AtomicU64,
    /// First frame, and number of 2 MiB blocks, that have a table set aside.
    first: AtomicU64,
    blocks: AtomicU64,
    /// Whether a frame ever left.
    used: AtomicBool,
    /// Held while an entry of the last two levels changes.
    changing: Mutex<()>,
}

/// Memory for the tables that let frames leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aside {
    /// The tables.
    pub reserve: PfnRange,
    /// From the first to the last frame that can leave.
    pub span: PfnRange,
}

/// Takes memory for tables from the end of the first of `ranges`, which is the largest, on a machine of `cpus` CPUs.
///
/// # Errors
///
/// How many frames it would be, on a machine so small that it would be felt. Nothing has changed.
pub fn set_aside(ranges: &mut [PfnRange], cpus: usize) -> Result<Aside, u64> {
    const MOST_PART: u64 = 16;
    let span = span(ranges).ok_or(0u64)?;
    let wanted = reserve_for(span, cpus);
    let largest = ranges.first_mut().filter(|range| range.count() / MOST_PART >= wanted).ok_or(wanted)?;
    let left = largest.count() - wanted;
    let part = |start, count| PfnRange::new(start, count).ok_or(wanted);
    let (rest, reserve) = (part(largest.start(), left)?, part(largest.start().offset(left), wanted)?);
    *largest = rest;
    Ok(Aside { reserve, span })
}

/// From the first to the last frame of `ranges`.
pub fn span(ranges: &[PfnRange]) -> Option<PfnRange> {
    let first = ranges.iter().map(|range| range.start().get()).min()?;
    let end = ranges.iter().map(|range| range.end().get()).max()?;
    PfnRange::new(Pfn::new(first), end - first)
}

/// Frames that [`Own::init`] needs for frames of `span`, on a machine of `cpus` CPUs.
pub fn reserve_for(span: PfnRange, cpus: usize) -> u64 {
    CPU_TABLES * cpus as u64 + blocks(span)
}

/// Blocks of 2 MiB that touch `span`.
fn blocks(span: PfnRange) -> u64 {
    span.end().get().div_ceil(OWN_BLOCK) - span.start().get() / OWN_BLOCK
}

impl<R: Regime> Own<R> {
    /// Nothing can leave yet.
    pub const fn new(regime: R) -> Self {
        Self {
            regime,
            reserve: AtomicU64::new(0),
            tables: AtomicU64::new(0),
            first: AtomicU64::new(0),
            blocks: AtomicU64::new(0),
            used: AtomicBool::new(false),
            changing: Mutex::new(()),
        }
    }

    /// Lets frames leave the mapping, with tables in memory that is nobody else's and stays mapped. The boot CPU, once, before other
    /// CPUs run.
    ///
    /// # Panics
    ///
    /// If the reserve is smaller than [`reserve_for`] says.
    pub fn init(&self, Aside { reserve, span }: Aside) {
        let cpus = self.regime.cpus();
        assert!(reserve.count() >= reserve_for(span, cpus), "{} frames are too few tables", reserve.count());
        for frame in 0..reserve.count() {
            let table = Table(reserve.start().offset(frame).base().get());
            for index in 0..512 {
                self.word(table, index).store(0, Ordering::Relaxed);
            }
        }
        self.first.store(span.start().get() & !(OWN_BLOCK - 1), Ordering::Relaxed);
        self.blocks.store(blocks(span), Ordering::Relaxed);
        let tables = reserve.start().offset(CPU_TABLES * cpus as u64);
        self.tables.store(tables.base().get(), Ordering::Relaxed);
        self.reserve.store(reserve.start().base().get(), Ordering::Release);
    }

    /// Gives this CPU its own root. Nothing that it translates changes.
    pub fn init_cpu(&self) {
        if !self.can_unmap() {
            return;
        }
        let [root, second, third, last] = self.cpu_tables();
        let shared = self.root();
        for index in 0..512 {
            self.word(root, index).store(self.word(shared, index).load(Ordering::Acquire), Ordering::Relaxed);
        }
        let windows = self.word(root, WINDOW_ROOT_INDEX);
        assert_eq!(windows.load(Ordering::Relaxed), 0, "nothing of this machine is at the windows");
        windows.store(self.regime.table(second.0), Ordering::Relaxed);
        self.word(second, 0).store(self.regime.table(third.0), Ordering::Relaxed);
        self.word(third, 0).store(self.regime.table(last.0), Ordering::Release);
        self.regime.switch(root);
    }

    /// Whether frames can leave.
    #[inline]
    pub fn can_unmap(&self) -> bool {
        self.reserve.load(Ordering::Acquire) != 0
    }

    /// `Machine::unmap_own`.
    ///
    /// # Errors
    ///
    /// [`RemoveError::Unsplittable`]: it is mapped by something larger than 2 MiB, or has not left with its block before.
    pub fn unmap(&self, frames: PfnRange) -> Result<(), RemoveError> {
        assert!(is_own_unit(frames), "{frames:x?} are no unit of the own mapping");
        let unsplittable = RemoveError::Unsplittable { pfn: frames.start() };
        let reserved = self.reserved_table(frames.start()).ok_or(unsplittable)?;
        let _changing = self.changing.lock();
        let word = self.block_word(frames.start()).ok_or(unsplittable)?;
        let entry = self.regime.entry(word.load(Ordering::Acquire), BLOCK_SHIFT);
        if frames.count() == OWN_BLOCK {
            let gone = entry == Entry::Absent || entry == Entry::Table(reserved.0);
            assert!(!gone, "{frames:x?} are absent already, or some of them");
            self.used.store(true, Ordering::Release);
            word.store(0, Ordering::Release);
            return Ok(());
        }
        if entry != Entry::Table(reserved.0) {
            return Err(unsplittable);
        }
        let was = self.word(reserved, frames.start().get()).swap(0, Ordering::AcqRel);
        assert!(was != 0, "frame {:#x} is absent already", frames.start());
        Ok(())
    }

    /// `Machine::map_own`.
    pub fn map(&self, frames: PfnRange) {
        assert!(is_own_unit(frames), "{frames:x?} are no unit of the own mapping");
        let first = frames.start();
        let reserved = self.reserved_table(first).expect("what left has a table set aside");
        let _changing = self.changing.lock();
        let word = self.block_word(first).expect("what left was no part of a larger block");
        let entry = self.regime.entry(word.load(Ordering::Acquire), BLOCK_SHIFT);
        assert!(entry == Entry::Absent || entry == Entry::Table(reserved.0), "frame {first:#x} never left");
        if frames.count() == OWN_BLOCK {
            if entry != Entry::Absent {
                let left = (0..OWN_BLOCK).find(|index| self.word(reserved, *index).load(Ordering::Relaxed) != 0);
                assert_eq!(left, None, "a frame of the block at {first:#x} is mapped");
                word.store(0, Ordering::Release);
                // Walks may have cached the table (break before make).
                self.regime.forget_tables();
            }
            word.store(self.regime.leaf(first.base().get(), Leaf::Block), Ordering::Release);
        } else {
            let page = self.regime.leaf(first.base().get(), Leaf::Page);
            let was = self.word(reserved, first.get()).swap(page, Ordering::AcqRel);
            assert_eq!(was, 0, "frame {first:#x} is mapped already");
            if entry == Entry::Absent {
                // Who walks through the new table finds what is in it.
                self.regime.publish();
                word.store(self.regime.table(reserved.0), Ordering::Release);
            }
        }
        self.regime.publish();
    }

    /// `Machine::is_mapped_own`.
    pub fn is_mapped(&self, frame: Pfn) -> bool {
        let (mut table, address) = (self.root(), frame.base().get());
        for shift in SHIFTS {
            match self.regime.entry(self.word(table, address >> shift).load(Ordering::Acquire), shift) {
                Entry::Absent => return false,
                Entry::Leaf => return true,
                Entry::Table(next) => table = Table(next),
            }
        }
        false
    }

    /// `Machine::count_mapped_own`: an entry of 2 MiB tells about all of its frames.
    pub fn count_mapped(&self, frames: PfnRange) -> u64 {
        let (mut frame, mut count) = (frames.start(), 0);
        while frame != frames.end() {
            let left = frames.end().since(frame).min(OWN_BLOCK - frame.get() % OWN_BLOCK);
            count += match self.block_entry(frame) {
                Entry::Leaf => left,
                Entry::Absent => 0,
                Entry::Table(_) => (0..left).filter(|offset| self.is_mapped(frame.offset(*offset))).count() as u64,
            };
            frame = frame.offset(left);
        }
        count
    }

    /// How the blocks are mapped now. Each is as it was at some moment of the call.
    pub fn census(&self) -> Census {
        let mut census = Census::default();
        let first = Pfn::new(self.first.load(Ordering::Relaxed));
        for number in 0..self.blocks.load(Ordering::Relaxed) {
            match self.block_entry(first.offset(number * OWN_BLOCK)) {
                Entry::Leaf => census.blocks += 1,
                Entry::Absent => census.absent += 1,
                Entry::Table(_) => census.tables += 1,
            }
        }
        census
    }

    /// Whether one of `frames` may be absent now or soon: the caller, who keeps them from being given away, uses windows. Else
    /// the identity map has them as long as the caller keeps them.
    #[inline]
    pub fn may_be_absent(&self, frames: PfnRange) -> bool {
        self.used.load(Ordering::Acquire)
            && (frames.start().get() / OWN_BLOCK..frames.end().get().div_ceil(OWN_BLOCK)).any(|block| {
                let first = Pfn::new(block * OWN_BLOCK);
                match self.block_entry(first) {
                    Entry::Leaf => false,
                    Entry::Absent => true,
                    Entry::Table(table) => Some(Table(table)) == self.reserved_table(first),
                }
            })
    }

    /// Opens `window` of this CPU on `frame`, calls `work` with its address, and closes it.
    #[inline]
    pub fn through<T>(&self, window: Window, frame: Pfn, work: impl FnOnce(u64) -> T) -> T {
        let [.., last] = self.cpu_tables();
        let word = self.word(last, window as u64);
        assert_eq!(word.load(Ordering::Relaxed), 0, "{window:?} is open already");
        word.store(self.regime.leaf(frame.base().get(), Leaf::Page), Ordering::Release);
        self.regime.publish();
        let address = R::WINDOWS + window as u64 * PAGE_SIZE;
        let result = work(address);
        word.store(0, Ordering::Release);
        self.regime.forget_window(address);
        result
    }

    /// `Machine::through_window`.
    ///
    /// # Panics
    ///
    /// If the work leaves the frame.
    #[inline]
    pub fn work(&self, moves: &impl Moves, frame: Pfn, work: Work<'_>) {
        let inside = |at: u16, len: usize| {
            assert!(u64::from(at) + len as u64 <= PAGE_SIZE, "{len} bytes at {at:#x} leave the window");
            u64::from(at)
        };
        self.through(Window::Work, frame, |window| match work {
            Work::Read { at, to } => {
                moves.bytes(window + inside(at, to.len()), to.as_mut_ptr() as u64, to.len() as u64)
            }
            Work::Write { at, from } => {
                moves.bytes(from.as_ptr() as u64, window + inside(at, from.len()), from.len() as u64);
            }
            Work::Zero => moves.zero(window),
            Work::Copy { from } => self.through(Window::Source, from, |source| moves.page(source, window)),
        });
    }

    fn root(&self) -> Table {
        Table(self.regime.root())
    }

    /// The word of `table` for `index`, modulo 512.
    #[inline]
    fn word(&self, table: Table, index: u64) -> &AtomicU64 {
        self.regime.word(table, index % 512)
    }

    /// This CPU's: root, and the three levels of its windows.
    #[inline]
    fn cpu_tables(&self) -> [Table; 4] {
        let reserve = self.reserve.load(Ordering::Acquire);
        assert!(reserve != 0, "windows need tables");
        let first = reserve + self.regime.cpu() as u64 * CPU_TABLES * PAGE_SIZE;
        [0, 1, 2, 3].map(|number| Table(first + number * PAGE_SIZE))
    }

    /// The entry of 2 MiB for `frame`; `None` if it is mapped by something larger, or nothing is near.
    fn block_word(&self, frame: Pfn) -> Option<&AtomicU64> {
        let (mut table, address) = (self.root(), frame.base().get());
        for shift in [39, 30] {
            match self.regime.entry(self.word(table, address >> shift).load(Ordering::Acquire), shift) {
                Entry::Table(next) => table = Table(next),
                Entry::Absent | Entry::Leaf => return None,
            }
        }
        Some(self.word(table, address >> BLOCK_SHIFT))
    }

    /// What it says. What is mapped by something larger never leaves.
    fn block_entry(&self, frame: Pfn) -> Entry {
        let word = self.block_word(frame);
        word.map_or(Entry::Leaf, |word| self.regime.entry(word.load(Ordering::Acquire), BLOCK_SHIFT))
    }

    /// The table that is set aside for the block around `frame`.
    fn reserved_table(&self, frame: Pfn) -> Option<Table> {
        let offset = frame.get().checked_sub(self.first.load(Ordering::Relaxed))?;
        let number = offset / OWN_BLOCK;
        let inside = self.can_unmap() && number < self.blocks.load(Ordering::Relaxed);
        inside.then(|| Table(self.tables.load(Ordering::Relaxed) + number * PAGE_SIZE))
    }
}

#[cfg(test)]
#[path = "own_tests.rs"]
mod tests;
