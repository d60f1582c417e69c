//! The radix tree of an anonymous object (D2).
//!
//! Shape: a node is a frame of 512 words ([`Entry`]). A node of level 0 spans 2 MiB of pages, of level 1 1 GiB, of level
//! 2 512 GiB, of level 3 256 TiB; the root's level follows from the object's size. A word of level 1 may hold a 2 MiB
//! block instead of a node.
//!
//! Protocol: whoever meets a vacant word claims it (`Vacant → Filling`), makes the part, zeroes it, and stores it; on
//! failure it stores `Vacant` again. Whoever meets `Filling` gets [`GrantError::Busy`]. A node above pages is
//! allocated first and put in with one exchange; the loser gives its own back. Words that hold something change only
//! under the object's structure lock ([`structure`]).
//!
//! ```text
//! Vacant ─claim→ Filling ─┬→ Page | Block | Node          Block ─split→ Node       (structure lock)
//!    ↑                    └→ Vacant (out of memory)       Page | Block ─punch→ Vacant (structure lock)
//!    └─────exchange→ Node                                 shared ─claim→ copying ─→ own ([`own`])
//! ```
//!
//! # Sharing
//!
//! A fork gives another tree the same root, whatever hangs from it. A word that is marked *shared* says that others may
//! refer to what it names, and to all that is reached through it, whatever the words below say. What is reached through
//! a shared word never changes but to what reads the same: it is read, copied, and in the end freed. So a tree's own part is a cap of words without
//! the mark above what it shares, all changes happen in that cap, and readers need to know no more than whether they met
//! the mark ([`GrantError::Shared`]).
//!
//! Who writes makes the cap reach to the page: it copies the first shared node on the way, which marks all its words and
//! counts one reference more to what each names, then the next, then the page ([`own`]). Each step is complete in
//! itself and changes nothing of what is read; out of memory between two of them leaves a longer cap and exact counts.
//!
//! A fork must not see half of a change, and a page that was granted for writing must not be shared while it is written:
//! the root is *frozen* first, then a grace period goes by, translations are taken away, and only then the root is
//! shared and thawed ([`fork`]). A frozen tree is read; who would write it gets [`GrantError::Forking`].
//!
//! Pages of equal content may become one frame ([`merge`]): that frame is shared too, by trees that need not be relatives.
//!
//! Untouched memory of a tree that was ever forked, or takes part in merging, reads as the zero page, so reading makes nothing, and the difference
//! of two relatives ([`difference`]) is what was written.
//!
//! # Stored pages
//!
//! A word of level 0 may name a place of a store instead of a frame. It reads the same, so it may change in place, even below a
//! shared word ([`stored`]): one exchange, from exactly what was there, by a caller that is pinned. All who copy or take away
//! words count with that: they look again after they have counted, or take the word by an exchange.
//!
//! # Bad frames
//!
//! A frame may be found to be bad, whoever refers to it ([`crate::FramePool::mark`]). Its words stay, and so does the sharing; a word that was the
//! tree's own is marked shared, so that it is not on the shortest path any more, and whoever takes the longer one asks the frame
//! ([`poison`]). Nobody copies or reads it; who takes the word away has a vacant page again.
//!
//! # Tags
//!
//! Where a guest may use allocation tags, every frame that its tree reads has valid ones: cleared with the bytes and copied
//! with them, in the same step, before the word that names the frame says so. The word is the frame's state: `Filling`
//! and copying are "being initialised", what names the frame is "tagged". So no frame needs a mark of its own, and a tree
//! without tags pays nothing.
//!
//! # Private memory
//!
//! The pages of a private tree come from the pool's private frames, which are absent from the hypervisor's mapping and zero
//! ([`crate::pool`]); its nodes are like any other's, and so is the zero page. Copies are made through windows.
//!
//! Each page of it is private or *open*, shared with the hypervisor: the word of level 0 says which, vacant or not, and is the
//! only one to say it ([`convert`]). So relatives, snapshots and holes keep it. The frame of an open page is in the mapping.
//!
//! Invariants: INV-7, INV-10, INV-11 (zeroed before stored; the store is a release; what is shared is never written again). Nodes
//! of the tree's own part never go away before the object does, and shared ones only after a grace period, so a pinned
//! walker needs no lock. A walk is at most four words.

mod convert;
mod difference;
mod entry;
mod fork;
mod merge;
mod own;
mod poison;
mod stored;
mod structure;

use entresol_addr::{PageSize, Pfn, PfnRange};
use entresol_machine::{Machine, Word};
use entresol_sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use entresol_sync::{planted, tally};
pub(crate) use entry::Entry;
use entry::{CLEAN, OPEN, SHARED};
pub use merge::{Merged, Offered, Span, Standing};
pub use own::Ahead;
pub(crate) use own::reclaim;

use crate::{Grant, GrantError, Memory, Order, OutOfMemory, Policy, StoreSlot, Supply};

/// Base-two logarithm of the words in a node.
const NODE_SHIFT: u32 = 9;
/// Most levels.
const LEVELS: u32 = 4;
/// The level whose words may hold blocks.
const BLOCK_LEVEL: u32 = 1;
/// Frames of a block, and of a node of level 0.
const BLOCK_FRAMES: u64 = PageSize::Size2M.frames();

/// The most frames that a tree can hold: 256 TiB.
pub(crate) const MAX_FRAMES: u64 = 1 << (NODE_SHIFT * LEVELS);

const _: () = assert!(1 << NODE_SHIFT == Word::PER_FRAME as u64 && Order::BLOCK.frames() == BLOCK_FRAMES);

/// It shares, or ever did.
const FORKED: u32 = 1 << 0;
/// Its content is private memory.
pub(crate) const PRIVATE: u32 = 1 << 1;
/// Its frames have valid allocation tags.
pub(crate) const TAGGED: u32 = 1 << 2;
/// It has a limit.
const LIMITED: u32 = 1 << 3;
/// Pages of it were converted: words of level 0 may say so.
const CONVERTED: u32 = 1 << 4;

/// The tree of one object. Its shape changes only while nobody can reach the object.
#[derive(Debug)]
pub(crate) struct Tree {
    /// The word that names the root's node.
    root: AtomicU64,
    levels: AtomicU32,
    /// Frames below this may be backed by blocks; a multiple of the block.
    blocks_below: AtomicU64,
    /// Whether a shared block is copied whole.
    copies_blocks: AtomicBool,
    /// [`FORKED`], [`PRIVATE`], [`TAGGED`], [`LIMITED`], [`CONVERTED`]; without the first two it is the common case.
    traits: AtomicU32,
    /// Whether some page is clean, or ever was.
    cleaned: AtomicBool,
    /// Pages of content that the tree reads.
    resident: tally::AtomicU64,
    /// Frames of nodes that the tree reaches.
    nodes: tally::AtomicU64,
    /// How many of `resident` no frame has, as far as this tree's own doing goes: a relative may have fetched or stored what
    /// both share. Two's complement.
    stored: tally::AtomicU64,
    /// Frames of content from which on it gets no more, if it is limited.
    limit: AtomicU64,
}

/// What a tree has for a frame.
pub(crate) enum Look {
    /// It is in memory.
    Present(Grant),
    /// A store has it.
    Stored(StoreSlot),
    /// Nothing yet: it reads as zero.
    Vacant,
}

/// Levels that a tree of `frames` (at most [`MAX_FRAMES`]) needs.
fn levels(frames: u64, policy: Policy) -> u32 {
    let least = match policy {
        Policy::Pages => 1,
        // A block needs a word of level 1 to be in.
        Policy::Blocks | Policy::WholeBlocks => BLOCK_LEVEL + 1,
    };
    (least..LEVELS).find(|levels| frames <= 1 << (NODE_SHIFT * levels)).unwrap_or(LEVELS)
}

/// The word that leads to `frame` in its node of `level`.
#[inline]
fn place(node: Pfn, level: u32, frame: u64) -> Word {
    // `Word::new` takes the index modulo 512.
    Word::new(node, (frame >> (NODE_SHIFT * level)) as u16)
}

#[inline]
fn page(pfn: Pfn, frame: u64, writable: bool, fresh: bool) -> Grant {
    Grant { pfn, extent_start: frame, size: PageSize::Size4K, writable, memory: Memory::Normal, fresh }
}

#[inline]
fn block(pfn: Pfn, frame: u64, writable: bool, fresh: bool) -> Grant {
    let extent_start = frame & !(BLOCK_FRAMES - 1);
    Grant { pfn, extent_start, size: PageSize::Size2M, writable, memory: Memory::Normal, fresh }
}

/// The grant, or what is left of it where a frame is bad.
#[inline]
fn sound<M>(supply: &Supply<'_, M>, grant: Grant, frame: u64) -> Result<Grant, GrantError> {
    supply.pool.sound(grant, frame).ok_or(GrantError::Poisoned)
}

/// Why what is shared is not granted for writing.
#[inline]
fn refusal<M>(supply: &Supply<'_, M>, pfn: Pfn) -> GrantError {
    if supply.pool.is_poisoned(pfn) { GrantError::Poisoned } else { GrantError::Shared }
}

/// Where a walk ended: the first word that does not lead to a node.
struct Located {
    entry: Entry,
    word: Word,
    level: u32,
    /// Every word on the way, joined: for the marks that one of them had.
    marks: u64,
}

impl Located {
    /// Whether the way led through a shared word, or to what may not be written for another reason.
    #[inline]
    const fn is_shared(&self) -> bool {
        self.marks & (SHARED | CLEAN) != 0
    }
}

/// What became of a word that may hold a block.
enum Filled {
    Content(Grant),
    Node(Pfn),
}

impl Tree {
    /// No tree; holds nothing, and has nothing of its own.
    pub(crate) const fn new() -> Self {
        Self {
            root: AtomicU64::new(0),
            levels: AtomicU32::new(0),
            blocks_below: AtomicU64::new(0),
            copies_blocks: AtomicBool::new(false),
            traits: AtomicU32::new(FORKED),
            cleaned: AtomicBool::new(false),
            resident: tally::AtomicU64::new(0),
            nodes: tally::AtomicU64::new(0),
            stored: tally::AtomicU64::new(0),
            limit: AtomicU64::new(u64::MAX),
        }
    }

    /// Becomes the tree, all vacant, of `frames` frames. It holds nothing yet, and nobody reaches it.
    pub(crate) fn make<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        frames: u64,
        policy: Policy,
        traits: u32,
    ) -> Result<(), OutOfMemory> {
        let root = self.new_node(supply)?;
        let blocks_below = match policy {
            Policy::Pages => 0,
            Policy::Blocks | Policy::WholeBlocks => frames & !(BLOCK_FRAMES - 1),
        };
        self.root.store(Entry::Node(root).encode(), Ordering::Relaxed);
        self.copies_blocks.store(policy == Policy::WholeBlocks, Ordering::Relaxed);
        self.cleaned.store(false, Ordering::Relaxed);
        self.traits.store(traits, Ordering::Relaxed);
        self.stored.store(0, Ordering::Relaxed);
        self.levels.store(levels(frames, policy), Ordering::Relaxed);
        self.blocks_below.store(blocks_below, Ordering::Relaxed);
        Ok(())
    }

    /// Whether its content is private memory.
    #[inline]
    pub(crate) fn is_private(&self) -> bool {
        self.traits.load(Ordering::Relaxed) & PRIVATE != 0
    }

    /// Pages of content, in memory or not.
    pub(crate) fn content(&self) -> u64 {
        self.resident.load(Ordering::Relaxed)
    }

    /// Frames of content.
    pub(crate) fn resident(&self) -> u64 {
        let stored = self.stored.load(Ordering::Relaxed) as i64;
        self.content().saturating_sub(stored.max(0) as u64)
    }

    /// Frames of content from which on nothing vacant is filled; nodes do not count, nor does what is fetched. CPUs that fill at the
    /// same moment may go past it by a page each.
    pub(crate) fn set_limit(&self, frames: u64) {
        self.limit.store(frames, Ordering::Relaxed);
        self.traits.fetch_or(LIMITED, Ordering::Relaxed);
    }

    /// Frames of content up to its limit. `None`: it has none.
    pub(crate) fn room(&self) -> Option<u64> {
        let limited = self.traits.load(Ordering::Relaxed) & LIMITED != 0;
        limited.then(|| self.limit.load(Ordering::Relaxed).saturating_sub(self.resident()))
    }

    #[inline]
    fn has_room(&self, frames: u64) -> bool {
        self.room().is_none_or(|room| room >= frames)
    }

    /// Frames of nodes.
    pub(crate) fn nodes(&self) -> u64 {
        self.nodes.load(Ordering::Relaxed)
    }

    /// What backs `frame`, which lies inside; made if there is nothing yet. Never copies: what is shared is granted for
    /// reading only.
    #[inline]
    pub(crate) fn grant<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        frame: u64,
        write: bool,
    ) -> Result<Grant, GrantError> {
        // The common cases, in few instructions: the tree's own all the way, and there, or not there yet.
        let mut word = self.root.load(Ordering::Acquire);
        let mut level = self.levels.load(Ordering::Relaxed);
        while entry::is_own_node(word) && level > 0 {
            level -= 1;
            let at = place(entry::frame(word), level, frame);
            word = supply.machine.load(at);
            if entry::is_own_page(word) {
                return Ok(page(entry::frame(word), frame, true, false));
            }
            if word == Entry::Vacant.encode() {
                return self.touch(supply, at, level, frame, write);
            }
        }
        if entry::is_own_block(word) {
            return Ok(block(entry::frame(word), frame, true, false));
        }
        self.grant_slow(supply, frame, write)
    }

    /// The same, whatever is on the way.
    #[inline(never)]
    fn grant_slow<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64, write: bool) -> Result<Grant, GrantError> {
        let found = self.locate(supply.machine, frame);
        let shared = found.is_shared();
        match found.entry {
            Entry::Page(pfn) if write & shared => Err(refusal(supply, pfn)),
            Entry::Block(pfn) if write & shared => Err(refusal(supply, pfn.offset(frame & (BLOCK_FRAMES - 1)))),
            Entry::Page(pfn) => sound(supply, page(pfn, frame, !shared, false), frame),
            Entry::Block(pfn) => sound(supply, block(pfn, frame, !shared, false), frame),
            Entry::Stored(slot) => Err(GrantError::Stored { slot }),
            Entry::Vacant => self.touch(supply, found.word, found.level, frame, write),
            Entry::Filling | Entry::Node(_) => Err(GrantError::Busy),
        }
    }

    /// The first touch of `frame`, the word of which at `level` is vacant.
    #[inline(never)]
    fn touch<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        word: Word,
        level: u32,
        frame: u64,
        write: bool,
    ) -> Result<Grant, GrantError> {
        let traits = self.traits.load(Ordering::Relaxed) & (FORKED | PRIVATE);
        if traits == 0 {
            return self.fill::<M, false>(supply, word, level, frame);
        }
        if traits == PRIVATE {
            return self.fill::<M, true>(supply, word, level, frame);
        }
        if write {
            // The zero page may be mapped: whoever writes has to take it away.
            return Err(GrantError::Shared);
        }
        Ok(page(supply.pool.zero_page(supply.machine, supply.cpu)?, frame, false, false))
    }

    /// What there is for `frame`, which lies inside, bad or not.
    pub(crate) fn look<M: Machine>(&self, machine: &M, frame: u64) -> Look {
        let found = self.locate(machine, frame);
        match found.entry {
            Entry::Page(pfn) => Look::Present(page(pfn, frame, !found.is_shared(), false)),
            Entry::Block(pfn) => Look::Present(block(pfn, frame, !found.is_shared(), false)),
            Entry::Stored(slot) => Look::Stored(slot),
            Entry::Vacant | Entry::Filling | Entry::Node(_) => Look::Vacant,
        }
    }

    /// The word that decides about `frame`.
    fn locate<M: Machine>(&self, machine: &M, frame: u64) -> Located {
        let mut marks = self.root.load(Ordering::Acquire);
        let mut node = entry::frame(marks);
        for level in (0..self.levels.load(Ordering::Relaxed)).rev() {
            let word = place(node, level, frame);
            let raw = machine.load(word);
            marks |= raw;
            match Entry::decode(raw) {
                Entry::Node(next) => node = next,
                entry => return Located { entry, word, level, marks },
            }
        }
        unreachable!("a word of level 0 never holds a node")
    }

    /// The same for content of whichever kind the tree's is.
    fn fill_own<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        word: Word,
        level: u32,
        frame: u64,
    ) -> Result<Grant, GrantError> {
        if self.is_private() {
            self.fill::<M, true>(supply, word, level, frame)
        } else {
            self.fill::<M, false>(supply, word, level, frame)
        }
    }

    /// Makes what is missing below a vacant word of the tree's own part, one level a turn.
    fn fill<M: Machine, const HIDDEN: bool>(
        &self,
        supply: &Supply<'_, M>,
        mut word: Word,
        mut level: u32,
        frame: u64,
    ) -> Result<Grant, GrantError> {
        while level > 0 {
            let node = if level == BLOCK_LEVEL && frame < self.blocks_below.load(Ordering::Relaxed) {
                match self.fill_block::<M, HIDDEN>(supply, word, frame)? {
                    Filled::Content(grant) => return Ok(grant),
                    Filled::Node(node) => node,
                }
            } else {
                self.fill_node(supply, word)?
            };
            level -= 1;
            word = place(node, level, frame);
        }
        self.fill_page::<M, HIDDEN>(supply, word, frame)
    }

    /// An empty node that nobody can reach yet.
    fn new_node<M: Machine>(&self, supply: &Supply<'_, M>) -> Result<Pfn, OutOfMemory> {
        let node = supply.pool.take(supply.cpu, Order::PAGE)?;
        supply.machine.zero(PfnRange::single(node));
        self.nodes.fetch_add(1, Ordering::Relaxed);
        Ok(node)
    }

    /// Gives back a node that nobody can reach.
    fn drop_node<M: Machine>(&self, supply: &Supply<'_, M>, node: Pfn) {
        self.nodes.fetch_sub(1, Ordering::Relaxed);
        supply.pool.give(supply.cpu, node, Order::PAGE);
    }

    fn fill_node<M: Machine>(&self, supply: &Supply<'_, M>, word: Word) -> Result<Pfn, GrantError> {
        let node = self.new_node(supply)?;
        if supply.machine.compare_exchange(word, Entry::Vacant.encode(), Entry::Node(node).encode()).is_err() {
            self.drop_node(supply, node);
            return Err(GrantError::Busy);
        }
        Ok(node)
    }

    fn claim<M: Machine>(&self, supply: &Supply<'_, M>, word: Word) -> Result<(), GrantError> {
        let claimed = supply.machine.compare_exchange(word, Entry::Vacant.encode(), Entry::Filling.encode());
        claimed.map(drop).map_err(|_| GrantError::Busy)
    }

    /// Makes frames that nobody can reach what untouched memory reads as: bytes, and tags where it has some.
    fn clear<M: Machine>(&self, supply: &Supply<'_, M>, frames: PfnRange) {
        if !self.is_tagged() | planted!(ZE2) {
            supply.machine.zero(frames);
        } else if planted!(ZE3) {
            supply.machine.zero(frames);
            supply.machine.clear_tags(PfnRange::single(frames.start()));
        } else {
            supply.machine.zero_tagged(frames);
        }
    }

    /// Whether its frames have valid allocation tags.
    pub(crate) fn is_tagged(&self) -> bool {
        self.traits.load(Ordering::Relaxed) & TAGGED != 0
    }

    fn fill_page<M: Machine, const HIDDEN: bool>(
        &self,
        supply: &Supply<'_, M>,
        word: Word,
        frame: u64,
    ) -> Result<Grant, GrantError> {
        if !self.has_room(1) {
            return Err(GrantError::OutOfMemory);
        }
        if HIDDEN {
            return self.fill_hidden(supply, word, frame);
        }
        self.claim(supply, word)?;
        let taken = supply.pool.take(supply.cpu, Order::PAGE);
        let pfn = taken.inspect_err(|_| supply.machine.store(word, Entry::Vacant.encode()))?;
        self.clear(supply, PfnRange::single(pfn));
        self.resident.fetch_add(1, Ordering::Relaxed);
        supply.machine.store(word, Entry::Page(pfn).encode());
        if planted!(ZE2) && self.is_tagged() {
            supply.machine.clear_tags(PfnRange::single(pfn));
        }
        Ok(page(pfn, frame, true, true))
    }

    /// The same for private memory, by the page's attribute.
    fn fill_hidden<M: Machine>(&self, supply: &Supply<'_, M>, word: Word, frame: u64) -> Result<Grant, GrantError> {
        let open = supply.machine.load(word) & OPEN;
        let [vacant, filling] = [Entry::Vacant, Entry::Filling].map(|entry| entry.encode() | open);
        supply.machine.compare_exchange(word, vacant, filling).map_err(|_| GrantError::Busy)?;
        let taken = supply.pool.take_private(supply.machine, supply.cpu);
        let pfn = taken.inspect_err(|_| supply.machine.store(word, vacant))?;
        if open != 0 {
            supply.pool.open(supply.machine, pfn);
        }
        self.resident.fetch_add(1, Ordering::Relaxed);
        supply.machine.store(word, Entry::Page(pfn).encode() | open);
        Ok(page(pfn, frame, true, true))
    }

    /// Makes a block, or where no block is free a node for pages.
    fn fill_block<M: Machine, const HIDDEN: bool>(
        &self,
        supply: &Supply<'_, M>,
        word: Word,
        frame: u64,
    ) -> Result<Filled, GrantError> {
        self.claim(supply, word)?;
        let taken = if !self.has_room(BLOCK_FRAMES) {
            None
        } else if HIDDEN {
            supply.pool.take_private_block(supply.machine, supply.cpu)
        } else {
            supply.pool.take_at_hand(Order::BLOCK)
        };
        if let Some(pfn) = taken {
            if !HIDDEN {
                self.clear(supply, PfnRange::block(pfn, PageSize::Size2M));
            }
            self.resident.fetch_add(BLOCK_FRAMES, Ordering::Relaxed);
            supply.machine.store(word, Entry::Block(pfn).encode());
            return Ok(Filled::Content(block(pfn, frame, true, true)));
        }
        let node = self.new_node(supply).inspect_err(|_| {
            supply.machine.store(word, Entry::Vacant.encode());
        })?;
        supply.machine.store(word, Entry::Node(node).encode());
        Ok(Filled::Node(node))
    }
}

impl From<OutOfMemory> for GrantError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}
