//! One bit for each page of a slot.
//!
//! Shape: frames of bits that follow each other, where the pool has so many in a row; else a radix tree of frames that is made
//! whole. A frame of bits has 512 words, bit `b` of word `w` is page `64 w + b` of what the frame covers, as in
//! `KVM_GET_DIRTY_LOG`; above it are at most three levels of frames that hold frame numbers. A slot of 128 MiB or less has one
//! frame; one of 64 GiB or less has 512 in a row, or one level above.
//!
//! Invariants: INV-7: what [`Bitmap::make`] took, [`Bitmap::free`] gives back; a failed `make` has given back all it took.
//! Bits at and above the slot's pages stay 0.

use entresol_addr::{Pfn, PfnRange};
use entresol_backing::{Order, OutOfMemory, Supply};
use entresol_machine::{Machine, Word};

/// Pages in a word.
pub(crate) const PAGES: u64 = u64::BITS as u64;
/// Words in a frame of bits, and frames below a frame of frames: a power of two.
const WORDS: u64 = Word::PER_FRAME as u64;
/// Levels above the frames of bits: enough for 2^36 pages, the most that 48 bits of address have.
pub(crate) const MAX_HEIGHT: u8 = 3;

const _: () = assert!(span(MAX_HEIGHT) >= 1 << 36);

/// Pages that a subtree of `height` covers.
const fn span(height: u8) -> u64 {
    PAGES * WORDS.pow(height as u32 + 1)
}

/// The order of a row of frames for the bits of `pages` pages, if there are rows of such an order.
fn order_of(pages: u64) -> Option<Order> {
    let frames = pages.div_ceil(span(0)).next_power_of_two();
    Order::new(frames.trailing_zeros() as u8).filter(|order| *order <= Order::BLOCK)
}

/// Levels above the frames of bits for `pages` pages.
fn height_of(pages: u64) -> u8 {
    (0..MAX_HEIGHT).find(|height| span(*height) >= pages).unwrap_or(MAX_HEIGHT)
}

/// Frames of a subtree; at most four calls deep.
fn count(height: u8, pages: u64) -> u64 {
    1 + children(height, pages).map(|(_, below)| count(height - 1, below)).sum::<u64>()
}

/// The bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bitmap {
    root: Pfn,
    /// 0 for a row of frames.
    height: u8,
}

impl Bitmap {
    /// Bits for `pages` pages, all clear.
    pub(crate) fn make<M: Machine>(supply: &Supply<'_, M>, pages: u64) -> Result<Self, OutOfMemory> {
        if let Some(order) = order_of(pages)
            && let Ok(root) = supply.pool.take(supply.cpu, order)
        {
            let row = PfnRange::new(root, order.frames()).expect("the pool's frames do not wrap");
            supply.machine.zero(row);
            return Ok(Self { root, height: 0 });
        }
        let height = height_of(pages);
        Ok(Self { root: build(supply, height, pages)?, height })
    }

    /// Frames that the bitmap, of `pages` pages, is made of.
    pub(crate) fn frames(self, pages: u64) -> u64 {
        match order_of(pages) {
            Some(order) if self.height == 0 => order.frames(),
            _ => count(self.height, pages),
        }
    }

    /// What it came from by [`Self::from_parts`].
    pub(crate) const fn parts(self) -> (Pfn, u8) {
        (self.root, self.height)
    }

    /// The bitmap that these are the parts of.
    #[inline]
    pub(crate) const fn from_parts(root: Pfn, height: u8) -> Self {
        Self { root, height }
    }

    /// Gives the frames of a bitmap of `pages` pages to `free`, in blocks of an order.
    pub(crate) fn free<M: Machine>(self, machine: &M, pages: u64, free: &mut dyn FnMut(Pfn, Order)) {
        match order_of(pages) {
            Some(order) if self.height == 0 => free(self.root, order),
            _ => raze(machine, self.root, self.height, pages, &mut |frame| free(frame, Order::PAGE)),
        }
    }

    /// Where word `index` is.
    #[inline]
    fn word<M: Machine>(self, machine: &M, index: u64) -> Word {
        // `Word::new` keeps nine bits.
        if self.height == 0 {
            return Word::new(self.root.offset(index / WORDS), index as u16);
        }
        self.word_below(machine, index)
    }

    #[inline(never)]
    fn word_below<M: Machine>(self, machine: &M, index: u64) -> Word {
        let mut frame = self.root;
        for level in (1..=u32::from(self.height)).rev() {
            let above = Word::new(frame, (index >> (level * WORDS.ilog2())) as u16);
            frame = Pfn::new(machine.load(above));
        }
        Word::new(frame, index as u16)
    }

    /// Word `index`: pages `64 index ..`.
    #[inline]
    pub(crate) fn load<M: Machine>(self, machine: &M, index: u64) -> u64 {
        machine.load(self.word(machine, index))
    }

    /// Whether the bit of `page` is set.
    pub(crate) fn is_set<M: Machine>(self, machine: &M, page: u64) -> bool {
        self.load(machine, page / PAGES) >> (page % PAGES) & 1 != 0
    }

    /// Sets the bit of `page`. Returns whether it was clear.
    #[inline]
    pub(crate) fn set<M: Machine>(self, machine: &M, page: u64) -> bool {
        let bit = 1 << (page % PAGES);
        machine.set_bits(self.word(machine, page / PAGES), bit) & bit == 0
    }

    /// The same where the frames of bits follow each other: `None` where they do not.
    #[inline(always)]
    pub(crate) fn set_in_row<M: Machine>(self, machine: &M, page: u64) -> Option<bool> {
        let (index, bit) = (page / PAGES, 1 << (page % PAGES));
        let word = Word::new(self.root.offset(index / WORDS), index as u16);
        (self.height == 0).then(|| machine.set_bits(word, bit) & bit == 0)
    }

    /// Clears the bits of `mask` in word `index` and returns those that were set.
    #[inline]
    pub(crate) fn take<M: Machine>(self, machine: &M, index: u64, mask: u64) -> u64 {
        let word = self.word(machine, index);
        let mut old = machine.load(word);
        while old & mask != 0 {
            match machine.compare_exchange(word, old, old & !mask) {
                Ok(_) => break,
                Err(now) => old = now,
            }
        }
        old & mask
    }
}

/// A subtree; at most four calls deep.
fn build<M: Machine>(supply: &Supply<'_, M>, height: u8, pages: u64) -> Result<Pfn, OutOfMemory> {
    let frame = supply.pool.take(supply.cpu, Order::PAGE)?;
    supply.machine.zero(PfnRange::single(frame));
    for (index, below) in children(height, pages) {
        match build(supply, height - 1, below) {
            Ok(child) => supply.machine.store(Word::new(frame, index), child.get()),
            Err(error) => {
                let done = u64::from(index) * span(height - 1);
                raze(supply.machine, frame, height, done, &mut |frame| {
                    supply.pool.give(supply.cpu, frame, Order::PAGE);
                });
                return Err(error);
            }
        }
    }
    Ok(frame)
}

/// Gives back a subtree that covers `pages` pages.
fn raze<M: Machine>(machine: &M, frame: Pfn, height: u8, pages: u64, free: &mut dyn FnMut(Pfn)) {
    for (index, below) in children(height, pages) {
        raze(machine, Pfn::new(machine.load(Word::new(frame, index))), height - 1, below, free);
    }
    free(frame);
}

/// The children of a frame at `height` that covers `pages` pages, with the pages of each. A frame of bits has none.
fn children(height: u8, pages: u64) -> impl Iterator<Item = (u16, u64)> {
    let each = if height == 0 { u64::MAX } else { span(height - 1) };
    let count = if height == 0 { 0 } else { pages.div_ceil(each).min(WORDS) };
    (0..count).map(move |index| (index as u16, (pages - index * each).min(each)))
}

#[cfg(test)]
mod tests {
    use std::boxed::Box;
    use std::vec::Vec;

    use entresol_backing::{FrameMeta, FramePool};
    use entresol_machine::flat::FlatMachine;
    use proptest::prelude::*;

    use super::*;

    const FIRST: Pfn = Pfn::new(0x8_0000);

    fn machine(frames: u64) -> (FlatMachine, FramePool) {
        let meta: Box<[FrameMeta]> = (0..frames).map(|_| FrameMeta::new()).collect();
        let pool = FramePool::new(FIRST, meta, 1).unwrap();
        pool.add(PfnRange::new(FIRST, frames).unwrap()).unwrap();
        (FlatMachine::coherent(FIRST, frames), pool)
    }

    /// Takes every other frame, so that no two free ones follow each other.
    fn scatter(pool: &FramePool) -> Vec<Pfn> {
        let all: Vec<Pfn> = core::iter::from_fn(|| pool.take(0, Order::PAGE).ok()).collect();
        let (held, free) = all.into_iter().partition(|frame| frame.get() % 2 == 0);
        Vec::into_iter(free).for_each(|frame| pool.give(0, frame, Order::PAGE));
        held
    }

    #[test]
    fn frames_are_as_many_as_the_pages_need() {
        for (pages, row, tree) in [(1, 1, 1), (32_768, 1, 1), (32_769, 2, 3), (1 << 18, 8, 9), (1 << 20, 32, 33)] {
            let (machine, pool) = machine(64);
            for scattered in [false, true] {
                let held = if scattered { scatter(&pool) } else { Vec::new() };
                let (free, frames) = (pool.free_frames(), if scattered { tree } else { row });
                if free < frames {
                    continue;
                }
                let bitmap = Bitmap::make(&Supply::new(&machine, &pool, 0), pages).unwrap();
                assert_eq!((free - pool.free_frames(), bitmap.frames(pages)), (frames, frames), "{pages} pages");
                let last = pages - 1;
                assert!(
                    bitmap.set(&machine, last) && bitmap.is_set(&machine, last) && !bitmap.is_set(&machine, 0)
                        || pages == 1
                );
                bitmap.free(&machine, pages, &mut |frame, order| pool.give(0, frame, order));
                held.into_iter().for_each(|frame| pool.give(0, frame, Order::PAGE));
                assert_eq!(pool.free_frames(), 64);
            }
        }
    }

    #[test]
    fn whichever_frame_is_missing_none_is_lost() {
        for frames in 0..18 {
            let (machine, pool) = machine(frames);
            let held = scatter(&pool);
            let free = pool.free_frames();
            let made = Bitmap::make(&Supply::new(&machine, &pool, 0), 1 << 18);
            assert_eq!(made.is_ok(), free >= 9, "{free} frames");
            assert_eq!(pool.free_frames(), if free >= 9 { free - 9 } else { free });
            assert_eq!(held.len() as u64 + free, frames);
        }
    }

    #[test]
    fn the_largest_slot_has_a_shape() {
        let (machine, pool) = machine(8);
        assert_eq!(Bitmap::make(&Supply::new(&machine, &pool, 0), 1 << 36), Err(OutOfMemory));
        assert_eq!(pool.free_frames(), 8);
        assert_eq!(children(MAX_HEIGHT, 1 << 36).count(), 8);
    }

    proptest! {
        #[test]
        fn bits_are_a_set(
            pages in prop::sample::select(&[1u64, 64, 4097, 40_000, 70_000][..]),
            steps in prop::collection::vec((any::<bool>(), any::<u64>(), any::<u64>()), 1..100),
        ) {
            let (machine, pool) = machine(8);
            let bitmap = Bitmap::make(&Supply::new(&machine, &pool, 0), pages).unwrap();
            let mut naive = std::collections::BTreeSet::new();
            for (set, at, mask) in steps {
                let page = at % pages;
                if set {
                    prop_assert_eq!(bitmap.set(&machine, page), naive.insert(page));
                } else {
                    let taken = bitmap.take(&machine, page / PAGES, mask);
                    let bits = (0..PAGES).filter(|bit| mask >> bit & 1 != 0).map(|bit| page / PAGES * PAGES + bit);
                    let gone: Vec<u64> = bits.filter(|page| naive.remove(page)).collect();
                    prop_assert_eq!(taken, gone.iter().fold(0, |word, page| word | 1 << (page % PAGES)));
                }
                prop_assert_eq!(bitmap.is_set(&machine, page), naive.contains(&page));
            }
        }
    }
}
