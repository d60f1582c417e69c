//! What two relatives read differently, found by walking only what they do not share.
//!
//! Protocol: both trees are walked side by side. Where both name the same frame, all below is the same, because what two
//! trees name is shared and never changes. The answer for one frame comes with the end of the span that it holds for.
//!
//! A page counts as different if its frame is, unless both frames, or one and what the other tree has stored, are known to
//! hold what one place of a store does; a page that was written with what it held is a difference. Of a tree that
//! is written meanwhile each answer is of some moment of the call.

use entresol_addr::Pfn;
use entresol_machine::{Machine, Word};
use entresol_sync::atomic::Ordering;
use entresol_sync::planted;

use super::{Entry, NODE_SHIFT, Tree, entry, place};
use crate::{FramePool, StoreSlot, Supply};

/// What one tree has for a span of frames.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Vacant,
    /// Being made: not what the other has.
    Filling,
    Node(Pfn),
    /// Frames of content from here on, to the end of the span.
    Run(Pfn),
    /// A page that no frame has.
    Stored(StoreSlot),
}

impl Side {
    /// What it has for the part of the span around `frame` that one word of level `level` stands for.
    fn below<M: Machine>(self, machine: &M, level: u32, frame: u64) -> Self {
        match self {
            Self::Vacant | Self::Filling | Self::Stored(_) => self,
            Self::Node(node) => match Entry::decode(machine.load(place(node, level, frame))) {
                Entry::Vacant => Self::Vacant,
                Entry::Filling => Self::Filling,
                Entry::Node(below) => Self::Node(below),
                Entry::Page(pfn) | Entry::Block(pfn) => Self::Run(pfn),
                Entry::Stored(slot) => Self::Stored(slot),
            },
            Self::Run(pfn) => {
                let index = frame >> (NODE_SHIFT * level) & u64::from(Word::PER_FRAME - 1);
                Self::Run(pfn.offset(index << (NODE_SHIFT * level)))
            }
        }
    }

    /// Whether both have the same, or `None` if one must look below.
    fn same(self, other: Self, pool: &FramePool) -> Option<bool> {
        match (self, other) {
            (Self::Filling, _) | (_, Self::Filling) => Some(false),
            (Self::Node(_), Self::Run(_)) | (Self::Run(_), Self::Node(_)) if planted!(ZG2) => Some(true),
            (mine, its) if mine == its => Some(true),
            (Self::Node(_), _) | (_, Self::Node(_)) => None,
            // Fetched for one and not for the other, or for each by itself, and not written since.
            _ => Some(self.place(pool).is_some_and(|place| other.place(pool) == Some(place))),
        }
    }

    /// The place of a store that holds the same as this page, if one is known. A frame of a block is not kept.
    fn place(self, pool: &FramePool) -> Option<StoreSlot> {
        match self {
            Self::Stored(slot) => Some(slot),
            Self::Run(pfn) => pool.kept_at(pfn),
            Self::Vacant | Self::Filling | Self::Node(_) => None,
        }
    }
}

impl Tree {
    /// Whether this tree and `base`, of the same shape, differ at `frame`, and the end of a span in which the answer is
    /// the same.
    pub(crate) fn differs<M: Machine>(&self, supply: &Supply<'_, M>, base: &Self, frame: u64) -> (bool, u64) {
        let root = |tree: &Self| Side::Node(entry::frame(tree.root.load(Ordering::Acquire)));
        let (mut mine, mut its) = (root(self), root(base));
        let mut level = self.levels.load(Ordering::Relaxed);
        loop {
            if let Some(same) = mine.same(its, supply.pool) {
                return (!same, (frame | ((1 << (NODE_SHIFT * level)) - 1)) + 1);
            }
            // Only nodes need a look below, and level 0 has none.
            level -= 1;
            mine = mine.below(supply.machine, level, frame);
            its = its.below(supply.machine, level, frame);
        }
    }

    /// Whether both have words of the same meaning.
    pub(crate) fn is_shaped_as(&self, other: &Self) -> bool {
        self.levels.load(Ordering::Relaxed) == other.levels.load(Ordering::Relaxed)
    }
}
