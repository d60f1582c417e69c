//! Frames that were unpublished, until nobody can still be using them.
//!
//! Protocol: frames join the open batch as they come. Reaping closes it, stamped with the beginning of a grace period,
//! and gives back a closed batch whose grace period is over. One stamp serves a batch, because whatever joined before
//! the batch was closed was unpublished before its grace period began.
//!
//! Invariants: INV-7. Frames are linked through their own [`super::FrameMeta`], so deferring cannot fail. First
//! in, first out.

use entresol_sync::Epoch;
use entresol_sync::epoch::Moment;

use super::meta::{Frames, NONE, Order, State};

/// Blocks in the order in which they were deferred.
struct Batch {
    head: u32,
    tail: u32,
}

impl Batch {
    const EMPTY: Self = Self { head: NONE, tail: NONE };

    fn push(&mut self, frames: &Frames, index: u32) {
        frames.set_next(index, NONE);
        if self.head == NONE {
            self.head = index;
        } else {
            frames.set_next(self.tail, index);
        }
        self.tail = index;
    }

    fn pop(&mut self, frames: &Frames) -> Option<u32> {
        let index = self.head;
        if index == NONE {
            return None;
        }
        self.head = frames.next(index);
        Some(index)
    }
}

pub(crate) struct Deferred {
    open: Batch,
    closed: Batch,
    /// When the grace period of `closed` began; `None` if that batch is empty.
    stamp: Option<Moment>,
    frames: u64,
}

impl Deferred {
    pub(crate) const fn new() -> Self {
        Self { open: Batch::EMPTY, closed: Batch::EMPTY, stamp: None, frames: 0 }
    }

    /// Frames that wait.
    pub(crate) fn frames(&self) -> u64 {
        self.frames
    }

    /// Adds a block whose state is `Deferred(order)` already.
    pub(crate) fn push(&mut self, frames: &Frames, index: u32, order: Order) {
        self.open.push(frames, index);
        self.frames += order.frames();
    }

    /// The next block whose grace period is over. It stays `Deferred`.
    pub(crate) fn pop(&mut self, frames: &Frames, epoch: &Epoch) -> Option<(u32, Order)> {
        if self.stamp.is_none() && self.open.head != NONE {
            self.closed = core::mem::replace(&mut self.open, Batch::EMPTY);
            self.stamp = Some(epoch.advance());
        }
        if !epoch.is_over(self.stamp?) {
            return None;
        }
        let index = self.closed.pop(frames)?;
        if self.closed.head == NONE {
            self.stamp = None;
        }
        let State::Deferred(order) = frames.state(index) else {
            unreachable!("a frame leaves the deferred state only here");
        };
        self.frames -= order.frames();
        Some((index, order))
    }
}
