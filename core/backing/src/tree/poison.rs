//! A page whose frame is found to be bad.
//!
//! Protocol: the caller holds the structure lock and is pinned. The word is found, the frame marked, and the word taken off the shortest
//! path by the mark *shared*; after a grace period nobody has a grant of the frame. A block of the tree's own becomes pages
//! first; of one that others share the words stay as they are, and each of its frames is asked.
//!
//! A fault may copy a shared page meanwhile: then the frame that was behind the page when this looked is bad, and the copy is not. Where
//! nobody else had that frame it is gone, and this looks again.
//!
//! Invariants: INV-7: no reference changes.

use entresol_addr::Pfn;
use entresol_machine::Machine;
use entresol_sync::hint::spin_loop;

use super::entry::SHARED;
use super::{BLOCK_FRAMES, Entry, Tree};
use crate::object::PoisonError;
use crate::pool::Marked;
use crate::{OutOfMemory, Supply};

impl Tree {
    /// The frame behind the page at `frame`, which lies inside, is bad from now on. Returns it.
    pub(crate) fn poison<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Result<Pfn, PoisonError> {
        loop {
            let found = self.locate(supply.machine, frame);
            let (pfn, block) = match found.entry {
                Entry::Page(pfn) => (pfn, None),
                // Its own block cannot be taken away: the structure lock is held.
                Entry::Block(pfn) if !found.is_shared() => {
                    self.split_block(supply, found.word, pfn).map_err(|OutOfMemory| PoisonError::OutOfMemory)?;
                    continue;
                }
                Entry::Block(pfn) => (pfn.offset(frame & (BLOCK_FRAMES - 1)), Some(pfn)),
                Entry::Vacant => return Err(PoisonError::Untouched),
                Entry::Stored(_) => return Err(PoisonError::Stored),
                Entry::Filling | Entry::Node(_) => {
                    spin_loop();
                    continue;
                }
            };
            match supply.pool.mark(pfn, block) {
                Marked::Now => {
                    if block.is_none() {
                        self.leave_shortest_path(supply, frame, pfn);
                    }
                    return Ok(pfn);
                }
                Marked::Before => return Err(PoisonError::Already),
                Marked::Gone => spin_loop(),
            }
        }
    }

    /// The word of `frame`, as long as it names `pfn`, is marked shared.
    fn leave_shortest_path<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64, pfn: Pfn) {
        loop {
            let word = self.locate(supply.machine, frame).word;
            let raw = supply.machine.load(word);
            if Entry::decode(raw) != Entry::Page(pfn) || raw & SHARED != 0 {
                return;
            }
            if supply.machine.compare_exchange(word, raw, raw | SHARED).is_ok() {
                return;
            }
        }
    }
}
