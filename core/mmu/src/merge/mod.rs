//! Same-page merging: pages of equal content become one frame, for virtual machines whose owner asked for it.
//!
//! | file | what |
//! |---|---|
//! | `area` | what is remembered of an object from one round to the next: where the scan is, and a sum for each page |
//! | `index` | where a page of a given sum is |
//! | `scan` | a round, piece by piece: sums are taken, partners are looked up, and it is planned what shall happen |
//! | `apply` | a plan is carried out, under the notifier |
//!
//! # Protocol of a scan
//!
//! The scanner walks the objects of a machine in spans of 512 frames ([`Vm::merge_scan`]), as many pages a call as its
//! caller pays for. Of each page that is its object's own it takes a sum. A page whose sum is not what it was a round ago
//! is left alone: it would soon part again. A sum that nobody has is put into the index. A sum that another page has makes
//! that one *wanted*; when the scan comes by the wanted page and finds its sum unchanged, it is *offered*: never written
//! again, so that others may join it. A page whose sum is that of an offered one joins it. So two equal pages that stay as
//! they are become one within two rounds after they were first seen, as long as the index has room, and each is invalidated
//! once. A page of zeros becomes vacant, which reads the same.
//!
//! Sums decide nothing. Whether pages are equal is found by comparing all bytes, and tags where there are some, while no translation reaches the page
//! that joins and none can come ([`apply`](self), steps there), and the offered one cannot change any more. A write that comes
//! before is compared; one that comes after waits for the end and takes an ordinary copy-on-write trap.
//!
//! # Blocks
//!
//! A block of 2 MiB is broken up when at least [`BREAK_AT`] of its pages would be offered, joined or vacated; a block that is
//! all zeros is given back whole. Equal blocks are merged page by page.
//!
//! # Memory
//!
//! Index and sums lie in frames of the pool: 16 bytes for each frame that the pool has, at most, and 8 for each frame of
//! memory that takes part. They are hints; a lack of frames means that pages are not merged. They are taken only while at
//! least one in [`SPARE`] of all frames is free, and who runs out of memory takes them back ([`Merging::shed`]).
//!
//! The hash is keyed, so that no guest can choose pages whose sums collide; if it could, it would waste the scanner's
//! time, which is bounded by the budget, and nothing else. What a guest can find out, as with every scheme of this kind,
//! is whether some other machine that takes part has a page that it can guess: by the time that a write takes. So it is
//! the owner's choice, for each machine.
//!
//! Invariants: INV-3, INV-7, INV-11, INV-12. A step of the scan invalidates at most 512 frames, and compares them at most once.
//! Lock order: merging → fork → dirty logs → slot update → notifier → object → pool.
//!
//! Known holes: memory that relatives share is not merged with strangers' ([`entresol_backing::Standing`]). Two offered pages
//! of equal content stay two. What was joined and is left with one reference is copied when it is written.

mod apply;
mod area;
mod index;
mod scan;

#[cfg(test)]
mod tests;

use alloc::vec::Vec;
use core::fmt;
use core::hash::{BuildHasher, Hasher};

use area::Area;
use entresol_addr::PAGE_SIZE;
use entresol_backing::{FramePool, ObjectHandle, Order};
use entresol_machine::Tags;
use entresol_sync::Mutex;
use entresol_sync::atomic::Ordering;
use entresol_sync::tally::AtomicU64;
use foldhash::quality::FixedState;
use index::Index;

use crate::InvalidateError;
use crate::OutOfHeap;
use apply::Action;
pub use apply::MergeRefusal;

/// Frames of a span: of a 2 MiB block.
pub(crate) const SPAN: u64 = 512;
/// A block is broken up when so many of its pages have partners.
pub const BREAK_AT: usize = 64;
/// So many pages that are only looked at count as one that is read.
const LOOKS: u64 = 16;
/// One in so many of the pool's frames stays free of index and sums.
pub const SPARE: u64 = 64;

/// Why a machine does not take part. Nothing changed that anybody reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeError {
    /// The heap has no room for what is remembered of its memory.
    OutOfHeap,
    /// What is mapped could not be taken away.
    Invalidate(InvalidateError),
}

impl fmt::Display for MergeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfHeap => f.write_str("heap: no room for what merging remembers of the memory"),
            Self::Invalidate(error) => write!(f, "invalidations: {error:?}"),
        }
    }
}

impl core::error::Error for MergeError {}

impl From<OutOfHeap> for MergeError {
    fn from(OutOfHeap: OutOfHeap) -> Self {
        Self::OutOfHeap
    }
}

impl From<InvalidateError> for MergeError {
    fn from(error: InvalidateError) -> Self {
        Self::Invalidate(error)
    }
}

/// What a step of the scan did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Pages that were read.
    pub pages: u64,
    /// Pages that were looked at, those that were read among them.
    pub looked: u64,
    /// Pages that were offered, so that others may join them.
    pub offered: u64,
    /// Pages that joined an offered one: frames given back.
    pub joined: u64,
    /// Pages of zeros that became vacant: frames given back.
    pub vacated: u64,
    /// Blocks that were broken up.
    pub broken: u64,
    /// Whether the end of the machine's memory was reached. The next call begins again.
    pub round_over: bool,
}

impl Scan {
    /// What a budget pays for, in pages: those that were read, and a sixteenth of those that were looked at.
    pub fn cost(&self) -> u64 {
        self.pages + self.looked / LOOKS
    }
}

/// What all virtual machines of one machine share to merge their pages.
pub struct Merging {
    state: Mutex<State>,
    /// Objects that take part: whoever ends a machine, or runs out of memory, takes no lock while there are none.
    areas: AtomicU64,
}

/// What the lock protects.
struct State {
    hash: FixedState,
    /// The sums of a page of zeros that has no tags, and of one that has.
    zeros: [u64; 2],
    index: Index,
    areas: Vec<Area>,
    /// The page that a sum is taken of.
    page: Vec<u8>,
    /// The plan for one span.
    plan: Vec<Action>,
}

impl State {
    fn sum(&self, tags: Option<Tags>) -> u64 {
        sum(&self.hash, &self.page, tags)
    }
}

/// The sum of a page, with its tags where it has some: what cannot be one frame shall not meet. 0 is "none".
fn sum(hash: &FixedState, page: &[u8], tags: Option<Tags>) -> u64 {
    let mut hasher = hash.build_hasher();
    hasher.write(page);
    tags.iter().flat_map(|tags| tags.0).for_each(|word| hasher.write_u64(word));
    hasher.finish().max(1)
}

impl Merging {
    /// Nobody takes part.
    pub const fn new() -> Self {
        let state = State {
            hash: FixedState::with_seed(0),
            zeros: [0; 2],
            index: Index::new(),
            areas: Vec::new(),
            page: Vec::new(),
            plan: Vec::new(),
        };
        Self { state: Mutex::new(state), areas: AtomicU64::new(0) }
    }

    /// The key of the hash: a number that no guest knows. Not while anybody takes part.
    pub fn set_key(&self, key: u64) {
        self.state.lock().hash = FixedState::with_seed(key);
    }

    /// A new round: sums that were not found since the last but one are forgotten. Called when every machine that takes
    /// part was scanned to its end; that it is not called just then costs merges, and nothing else.
    pub fn next_round(&self) {
        self.state.lock().index.next_round();
    }

    /// Frames that index and sums hold. Not called by a pinned CPU.
    pub fn held_frames(&self) -> u64 {
        if self.areas.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        let state = self.state.lock();
        state.index.frames() + state.areas.iter().map(Area::frames).sum::<u64>()
    }

    /// Gives the frames of index and sums back, and says how many they were; none while a scan is under way.
    #[cold]
    pub fn shed(&self, pool: &FramePool, cpu: usize) -> u64 {
        if self.areas.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        let Some(mut state) = self.state.try_lock() else { return 0 };
        let mut given = 0;
        let mut give = |pfn| {
            pool.give(cpu, pfn, Order::PAGE);
            given += 1;
        };
        state.index.clear(&mut give);
        state.areas.iter_mut().for_each(|area| area.clear(&mut give));
        given
    }

    /// The object of `handle`, of so many frames, takes part.
    fn join(&self, pool: &FramePool, handle: ObjectHandle, frames: u64) -> Result<(), OutOfHeap> {
        let mut state = self.state.lock();
        if state.areas.iter().any(|area| area.object() == handle) {
            return Ok(());
        }
        let state = &mut *state;
        state.page.try_reserve_exact(PAGE_SIZE as usize).map_err(|_| OutOfHeap)?;
        state.plan.try_reserve_exact(SPAN as usize).map_err(|_| OutOfHeap)?;
        state.areas.try_reserve(1).map_err(|_| OutOfHeap)?;
        state.index.reserve(pool.total_frames())?;
        let area = Area::new(handle, frames)?;
        state.page.resize(PAGE_SIZE as usize, 0);
        state.plan.resize_with(SPAN as usize, || Action::Leave);
        state.page.fill(0);
        state.zeros = [state.sum(None), state.sum(Some(Tags::ZERO))];
        state.areas.push(area);
        self.areas.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Those objects take part no more.
    pub(crate) fn leave(&self, pool: &FramePool, cpu: usize, mut whose: impl FnMut(ObjectHandle) -> bool) {
        if self.areas.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut state = self.state.lock();
        let mut give = |pfn| pool.give(cpu, pfn, Order::PAGE);
        state.areas.retain_mut(|area| {
            let goes = whose(area.object());
            if goes {
                area.clear(&mut give);
                self.areas.fetch_sub(1, Ordering::Relaxed);
            }
            !goes
        });
        if state.areas.is_empty() {
            state.index.clear(&mut give);
        }
    }
}

impl Default for Merging {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether there is room for a frame more of hints.
fn has_room(pool: &FramePool) -> bool {
    pool.free_frames() > pool.total_frames() / SPARE
}
