//! What is known of each frame: its state, how many hold it, and links for the list that it may be on.
//!
//! Shape: an array by frame number, from the first frame of the machine. Lists are linked by index, so that no free
//! frame is ever touched. Sixteen bytes a frame. The state's word also counts the references to a taken frame beyond
//! the first, so a frame that is given back while others hold it fails the same check as one given back twice.
//!
//! Invariants: a state changes only by the owner of the frame, or under the lock of the list that it is on. States
//! outlive locks: they are atomics so that giving back can check them with one exchange.

use alloc::boxed::Box;

use entresol_addr::Pfn;
use entresol_sync::atomic::{AtomicU32, Ordering, fence};

/// Base-two logarithm of a number of contiguous, naturally aligned frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Order(u8);

impl Order {
    /// One frame, 4 KiB.
    pub const PAGE: Self = Self(0);
    /// 512 frames, 2 MiB: the largest that the pool gives out.
    pub const BLOCK: Self = Self(9);
    /// 16 frames, 64 KiB: what goes into a CPU's cache at once.
    pub(crate) const BATCH: Self = Self(4);
    /// How many orders there are.
    pub(crate) const COUNT: usize = Self::BLOCK.0 as usize + 1;

    /// An order of at most [`Self::BLOCK`].
    pub const fn new(order: u8) -> Option<Self> {
        if order <= Self::BLOCK.0 { Some(Self(order)) } else { None }
    }

    /// Frames.
    #[inline]
    pub const fn frames(self) -> u64 {
        1 << self.0
    }

    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }

    pub(crate) const fn larger(self) -> Option<Self> {
        Self::new(self.0 + 1)
    }

    /// The largest order whose blocks may start at `pfn` and hold at most `frames` frames, which is not 0.
    pub(crate) fn fitting(pfn: Pfn, frames: u64) -> Self {
        let aligned = pfn.get().trailing_zeros();
        Self(aligned.min(frames.ilog2()).min(u32::from(Self::BLOCK.0)) as u8)
    }

    /// Every order from this one down to a page, but not this one.
    pub(crate) fn below(self) -> impl Iterator<Item = Self> {
        (0..self.0).rev().map(Self)
    }
}

/// What a frame is. Blocks are described at their first frame; the others are `Interior`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Not the pool's.
    Absent,
    /// Inside a larger block, not its first frame.
    Interior,
    /// On the buddy's list.
    Free(Order),
    /// In a CPU's cache.
    Cached,
    /// Given out.
    Taken(Order),
    /// Given back, waiting for a grace period.
    Deferred(Order),
    /// A single frame that is given out, and a place of a store holds the same bytes: which one is in its links.
    Kept,
    /// A single frame whose last reference is gone: nobody shares it any more.
    Leaving,
    /// Private, zero, and free.
    Hidden,
    /// Private, given back, and not zero yet.
    Dirty(Order),
    /// A single frame that is given out, and bad: see [`super::poison`].
    Poisoned,
    /// Bad, and nobody's any more. It stays so.
    Quarantined,
}

/// Bits 3:0 of the word: the order. Bits 7:4: the kind. Bits 31:8: references to a frame that is given out, beyond the first.
const KIND_SHIFT: u32 = 4;
const COUNT_SHIFT: u32 = 8;

impl State {
    /// The word of this state, of a frame that nobody shares.
    const fn encode(self) -> u32 {
        match self {
            Self::Absent => 0,
            Self::Interior => 1 << KIND_SHIFT,
            Self::Free(order) => 2 << KIND_SHIFT | order.0 as u32,
            Self::Cached => 3 << KIND_SHIFT,
            Self::Taken(order) => 4 << KIND_SHIFT | order.0 as u32,
            Self::Deferred(order) => 5 << KIND_SHIFT | order.0 as u32,
            Self::Kept => 6 << KIND_SHIFT,
            Self::Leaving => 7 << KIND_SHIFT,
            Self::Hidden => 8 << KIND_SHIFT,
            Self::Dirty(order) => 9 << KIND_SHIFT | order.0 as u32,
            Self::Poisoned => 10 << KIND_SHIFT,
            Self::Quarantined => 11 << KIND_SHIFT,
        }
    }

    fn decode(raw: u32) -> Self {
        let order = Order((raw & ((1 << KIND_SHIFT) - 1)) as u8);
        match raw >> KIND_SHIFT & ((1 << (COUNT_SHIFT - KIND_SHIFT)) - 1) {
            0 => Self::Absent,
            1 => Self::Interior,
            2 => Self::Free(order),
            3 => Self::Cached,
            4 => Self::Taken(order),
            5 => Self::Deferred(order),
            6 => Self::Kept,
            7 => Self::Leaving,
            8 => Self::Hidden,
            9 => Self::Dirty(order),
            10 => Self::Poisoned,
            11 => Self::Quarantined,
            _ => unreachable!("only encode writes states"),
        }
    }

    const fn is_given_out(self) -> bool {
        matches!(self, Self::Taken(_) | Self::Kept | Self::Poisoned)
    }

    const fn is_page(self) -> bool {
        matches!(self, Self::Taken(Order::PAGE) | Self::Kept | Self::Poisoned)
    }
}

/// The end of a list.
pub(crate) const NONE: u32 = u32::MAX;

/// What the pool knows of one frame.
#[derive(Debug)]
pub struct FrameMeta {
    state: AtomicU32,
    next: AtomicU32,
    prev: AtomicU32,
    /// See [`super::lease`].
    lease: AtomicU32,
}

impl FrameMeta {
    /// A frame that is not the pool's yet.
    pub const fn new() -> Self {
        Self {
            state: AtomicU32::new(0),
            next: AtomicU32::new(NONE),
            prev: AtomicU32::new(NONE),
            lease: AtomicU32::new(0),
        }
    }
}

impl Default for FrameMeta {
    fn default() -> Self {
        Self::new()
    }
}

const _: () = assert!(State::Absent.encode() == 0 && (size_of::<FrameMeta>() == 16 || cfg!(loom)));

/// The frames of a machine by index.
pub(crate) struct Frames {
    first: Pfn,
    meta: Box<[FrameMeta]>,
}

impl Frames {
    pub(crate) fn new(first: Pfn, meta: Box<[FrameMeta]>) -> Self {
        assert!(meta.len() < NONE as usize, "frames are numbered with 32 bits");
        Self { first, meta }
    }

    pub(crate) fn len(&self) -> u64 {
        self.meta.len() as u64
    }

    pub(crate) fn first(&self) -> Pfn {
        self.first
    }

    #[inline]
    pub(crate) fn pfn(&self, index: u32) -> Pfn {
        self.first.offset(index.into())
    }

    /// The index of a frame inside the machine's span.
    #[inline]
    pub(crate) fn index(&self, pfn: Pfn) -> Option<u32> {
        // Below `first` the difference wraps, to more than any length.
        let index = pfn.since(self.first);
        (index < self.len()).then_some(index as u32)
    }

    /// The word of its leases.
    #[inline]
    pub(crate) fn lease(&self, index: u32) -> &AtomicU32 {
        &self.meta[index as usize].lease
    }

    pub(crate) fn state(&self, index: u32) -> State {
        State::decode(self.meta[index as usize].state.load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn set_state(&self, index: u32, state: State) {
        self.meta[index as usize].state.store(state.encode(), Ordering::Relaxed);
    }

    /// Moves a frame from one state to another.
    ///
    /// # Panics
    ///
    /// If it is in neither: it was given back twice, or is not the caller's.
    #[inline]
    pub(crate) fn pass(&self, index: u32, from: State, to: State) {
        let found = self.meta[index as usize].state.swap(to.encode(), Ordering::Relaxed);
        if found != from.encode() {
            self.misuse(index, from, found);
        }
    }

    /// One reference more to a taken frame.
    ///
    /// # Panics
    ///
    /// If the frame is not taken, or has as many references as can be counted: a tree refers to a frame once for each of
    /// its own frames at most, and there are fewer trees than that.
    pub(crate) fn share(&self, index: u32) {
        let old = self.meta[index as usize].state.fetch_add(1 << COUNT_SHIFT, Ordering::Relaxed);
        let full = old >> COUNT_SHIFT == u32::MAX >> COUNT_SHIFT;
        assert!(State::decode(old).is_given_out() && !full, "only a frame that is given out is shared");
    }

    /// One reference more to a single frame, if it is given out still.
    pub(crate) fn share_if_held(&self, index: u32) -> bool {
        self.share_if(index, State::is_page, u32::MAX >> COUNT_SHIFT)
    }

    /// The same, if it is not bad and has at most `most` references, which can be counted.
    pub(crate) fn share_if_sound(&self, index: u32, most: u32) -> bool {
        self.share_if(index, |state| state.is_page() && state != State::Poisoned, most)
    }

    fn share_if(&self, index: u32, fits: impl Fn(State) -> bool, most: u32) -> bool {
        let one_more = |raw: u32| {
            let held = fits(State::decode(raw)) && raw >> COUNT_SHIFT < most;
            held.then(|| raw + (1 << COUNT_SHIFT))
        };
        let word = &self.meta[index as usize].state;
        word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    /// Gives one reference back. `true`: it was the only one, and the caller has the frame alone; then nothing changed.
    ///
    /// # Panics
    ///
    /// If the frame is not taken.
    pub(crate) fn release(&self, index: u32) -> bool {
        let word = &self.meta[index as usize].state;
        let one_less = |raw: u32| (raw >> COUNT_SHIFT != 0).then(|| raw - (1 << COUNT_SHIFT));
        // Whoever finds itself alone must see what the others did to the frame before they let go of it.
        let found = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_less);
        let raw = found.unwrap_or_else(|raw| raw);
        assert!(matches!(State::decode(raw), State::Taken(_)), "only a taken frame is released");
        found.is_err()
    }

    /// Gives one reference to a single frame back. `Some`: it was the last, the frame was in that state, and is the caller's
    /// alone: nobody shares it any more. Its links are as they were.
    ///
    /// # Panics
    ///
    /// If the frame is not given out.
    pub(crate) fn leave(&self, index: u32) -> Option<State> {
        let next = |raw: u32| {
            let last = raw >> COUNT_SHIFT == 0;
            Some(if last { State::Leaving.encode() } else { raw - (1 << COUNT_SHIFT) })
        };
        // Whoever finds itself alone must see what the others did to the frame before they let go of it.
        let found = self.meta[index as usize].state.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        let raw = found.unwrap_or_else(|raw| raw);
        let state = State::decode(raw);
        assert!(state.is_page(), "only a frame that is given out is released");
        (raw >> COUNT_SHIFT == 0).then_some(state)
    }

    /// A single frame's state changes, its references stay. `alone`: only if there is but one. Whether it did.
    pub(crate) fn turn(&self, index: u32, from: State, to: State, alone: bool) -> bool {
        let turned = |raw: u32| {
            let count = raw >> COUNT_SHIFT;
            let fits = State::decode(raw) == from && !(alone && count != 0);
            fits.then(|| to.encode() | count << COUNT_SHIFT)
        };
        self.meta[index as usize].state.fetch_update(Ordering::AcqRel, Ordering::Acquire, turned).is_ok()
    }

    /// The number of 64 bits that a frame's links hold, as long as it is kept.
    pub(crate) fn note(&self, index: u32) -> Option<u64> {
        let kept = || State::decode(self.meta[index as usize].state.load(Ordering::Acquire)) == State::Kept;
        if !kept() {
            return None;
        }
        let note = u64::from(self.prev(index)) << u32::BITS | u64::from(self.next(index));
        // Who lets go of the frame meanwhile puts it on a list.
        fence(Ordering::Acquire);
        kept().then_some(note)
    }

    pub(crate) fn set_note(&self, index: u32, note: u64) {
        self.set_next(index, note as u32);
        self.set_prev(index, (note >> u32::BITS) as u32);
    }

    /// The first frame of a block that was taken whole, and its 511 others, become frames that were taken one by one,
    /// each with the block's references.
    pub(crate) fn split_shared(&self, index: u32, order: Order) {
        let block = self.meta[index as usize].state.load(Ordering::Acquire);
        assert_eq!(State::decode(block), State::Taken(order), "only a taken block is split");
        let page = State::Taken(Order::PAGE).encode() | block >> COUNT_SHIFT << COUNT_SHIFT;
        for inside in index + 1..index + order.frames() as u32 {
            assert_eq!(self.state(inside), State::Interior, "inside a block");
            self.meta[inside as usize].state.store(page, Ordering::Relaxed);
        }
        self.meta[index as usize].state.store(page, Ordering::Release);
    }

    #[cold]
    fn misuse(&self, index: u32, from: State, found: u32) -> ! {
        panic!(
            "frame {:#x} is {:?}, not {from:?}: given back twice or not its owner's",
            self.pfn(index),
            State::decode(found)
        )
    }

    pub(crate) fn next(&self, index: u32) -> u32 {
        self.meta[index as usize].next.load(Ordering::Relaxed)
    }

    pub(crate) fn set_next(&self, index: u32, next: u32) {
        self.meta[index as usize].next.store(next, Ordering::Relaxed);
    }

    pub(crate) fn prev(&self, index: u32) -> u32 {
        self.meta[index as usize].prev.load(Ordering::Relaxed)
    }

    pub(crate) fn set_prev(&self, index: u32, prev: u32) {
        self.meta[index as usize].prev.store(prev, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_decode_to_what_was_encoded() {
        let orders = (0..Order::COUNT as u8).map(|order| Order::new(order).unwrap());
        let sized = orders
            .flat_map(|order| [State::Free(order), State::Taken(order), State::Deferred(order), State::Dirty(order)]);
        let single = [State::Absent, State::Interior, State::Cached, State::Kept, State::Leaving, State::Hidden];
        let single = single.into_iter().chain([State::Poisoned, State::Quarantined]);
        for state in single.chain(sized) {
            assert_eq!(State::decode(state.encode()), state);
        }
        assert_eq!(Order::new(10), None);
    }

    #[test]
    fn a_fitting_order_is_aligned_and_small_enough() {
        for (pfn, frames, order) in [(0, 5000, 9), (512, 511, 8), (6, 100, 1), (7, 100, 0), (1024, 1, 0)] {
            assert_eq!(Order::fitting(Pfn::new(pfn), frames), Order(order), "{pfn} {frames}");
        }
    }
}
