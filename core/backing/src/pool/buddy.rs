//! The buddy allocator: free blocks of a power of two, halved when a smaller one is wanted, joined when both halves are
//! free (Knowlton 1965).
//!
//! Invariants: a free block is naturally aligned in the machine's address space; its first frame is `Free(order)` and
//! on the list of that order, its others are `Interior`. Two free buddies of one order do not exist below the largest.
//! Everything here happens under the pool's buddy lock; taking and giving are bounded by the number of orders.

use entresol_addr::Pfn;

use super::meta::{Frames, NONE, Order, State};

pub(crate) struct Buddy {
    heads: [u32; Order::COUNT],
    free: u64,
}

impl Buddy {
    pub(crate) const fn new() -> Self {
        Self { heads: [NONE; Order::COUNT], free: 0 }
    }

    /// Frames on its lists.
    pub(crate) fn free(&self) -> u64 {
        self.free
    }

    /// Takes a block off the lists. Its first frame becomes `state`.
    pub(crate) fn take(&mut self, frames: &Frames, order: Order, state: State) -> Option<u32> {
        let mut have = order;
        while self.heads[have.index()] == NONE {
            have = have.larger()?;
        }
        let index = self.heads[have.index()];
        self.unlink(frames, index, have);
        for half in have.below().take_while(|half| *half >= order) {
            self.link(frames, index + half.frames() as u32, half);
        }
        frames.set_state(index, state);
        self.free -= order.frames();
        Some(index)
    }

    /// Puts a block back, joined with as many buddies as are free. The caller has checked its state.
    pub(crate) fn give(&mut self, frames: &Frames, mut index: u32, mut order: Order) {
        self.free += order.frames();
        while let Some(larger) = order.larger() {
            let pfn = frames.pfn(index).get();
            let buddy = match frames.index(Pfn::new(pfn ^ order.frames())) {
                Some(buddy) if frames.state(buddy) == State::Free(order) => buddy,
                _ => break,
            };
            self.unlink(frames, buddy, order);
            frames.set_state(index.max(buddy), State::Interior);
            index = index.min(buddy);
            order = larger;
        }
        self.link(frames, index, order);
    }

    fn link(&mut self, frames: &Frames, index: u32, order: Order) {
        let head = &mut self.heads[order.index()];
        frames.set_state(index, State::Free(order));
        frames.set_prev(index, NONE);
        frames.set_next(index, *head);
        if *head != NONE {
            frames.set_prev(*head, index);
        }
        *head = index;
    }

    fn unlink(&mut self, frames: &Frames, index: u32, order: Order) {
        let (prev, next) = (frames.prev(index), frames.next(index));
        if prev == NONE {
            self.heads[order.index()] = next;
        } else {
            frames.set_next(prev, next);
        }
        if next != NONE {
            frames.set_prev(next, prev);
        }
    }
}
