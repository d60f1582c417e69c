//! The attribute of private memory's pages: private, or open, which is shared with the hypervisor.
//!
//! Purpose: the guest decides page by page what the hypervisor may see by its own mapping. The word of level 0 has the attribute
//! ([`OPEN`]), whatever else it says, and nothing else has it: who fills, copies or punches the page keeps the bit, relatives
//! read it where they read the page, and the frame behind the page follows it.
//!
//! Protocol: the caller holds the structure lock, is pinned, and has taken the translations away. First every word of the range is
//! reached in nodes of the tree's own, blocks split and shared pages copied where the attribute is to change: that can fail. Then
//! the bits change, which cannot. The content stays. A page that opens is in the mapping before its word says so, and one that
//! closes leaves the mapping after; who looks at a page in between asks its frame, under the frame's lock
//! ([`crate::FramePool::access_open`]).
//!
//! The attribute of a page whose frame is bad changes like any other; the frame, which is absent for good, does not follow it.
//!
//! Devices may fill or copy pages of the range meanwhile: what they claim is waited for, and they carry the bit that they found.
//!
//! Invariants: INV-7, INV-10 (an open page's frame is mapped, a private one's is not but for leases), INV-11.

use entresol_addr::Pfn;
use entresol_machine::{Machine, Word};
use entresol_sync::atomic::Ordering;
use entresol_sync::hint::spin_loop;

use super::entry::{OPEN, SHARED};
use super::own::Ahead;
use super::structure::{after, waited, waited_once};
use super::{BLOCK_FRAMES, CONVERTED, Entry, NODE_SHIFT, Tree};
use crate::{GrantError, Supply};

impl Tree {
    /// Whether words of it may have attributes that are not the common one.
    pub(super) fn has_attributes(&self) -> bool {
        self.traits.load(Ordering::Relaxed) & CONVERTED != 0
    }

    /// Whether the page at `frame`, which lies inside, is open.
    pub(crate) fn is_open<M: Machine>(&self, machine: &M, frame: u64) -> bool {
        // Only words of level 0 have the bit.
        self.has_attributes() && self.locate(machine, frame).marks & OPEN != 0
    }

    /// Whether the page at `frame`, which lies inside, is open, and the end of a span around it in which the answer is the same.
    pub(crate) fn open_until<M: Machine>(&self, machine: &M, frame: u64) -> (bool, u64) {
        if !self.has_attributes() {
            return (false, u64::MAX);
        }
        let found = self.locate(machine, frame);
        (found.marks & OPEN != 0, after(frame, found.level))
    }

    /// Gives the pages `start .. end`, which lie inside, the attribute `open`. Returns how many had the other one.
    ///
    /// # Errors
    ///
    /// [`GrantError::OutOfMemory`], [`GrantError::Forking`]; no page changed.
    pub(crate) fn convert<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        start: u64,
        end: u64,
        open: bool,
    ) -> Result<u64, GrantError> {
        // Before any word has the bit, and before a fork could miss it.
        self.traits.fetch_or(CONVERTED, Ordering::Relaxed);
        self.reach_pages(supply, start, end)?;
        for frame in start..end {
            let shared = || {
                let (_, raw, _) = self.locate_own(supply.machine, frame);
                raw & SHARED != 0 && (raw & OPEN != 0) != open
            };
            if shared() {
                let mut none = Ahead::NONE;
                match waited(|| self.own(supply, frame, &mut none)) {
                    // Only its attribute changes.
                    Ok(_) | Err(GrantError::Poisoned) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok((start..end).map(|frame| u64::from(self.convert_page(supply, frame, open))).sum())
    }

    /// The word of `frame` is reached, and is the tree's own. Whether it changed.
    fn convert_page<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64, open: bool) -> bool {
        let attribute = if open { OPEN } else { 0 };
        loop {
            let (word, raw, level) = self.locate_own(supply.machine, frame);
            assert!(level == 0, "the way to it was made, and nodes of the tree's own stay");
            if raw & OPEN == attribute {
                return false;
            }
            let changed = raw & !OPEN | attribute;
            match Entry::decode(raw) {
                Entry::Vacant if supply.machine.compare_exchange(word, raw, changed).is_ok() => return true,
                // A bad frame is absent, whatever its page's attribute is.
                Entry::Page(pfn) if supply.pool.is_poisoned(pfn) => {
                    if supply.machine.compare_exchange(word, raw, changed).is_ok() {
                        return true;
                    }
                }
                Entry::Page(pfn) => {
                    assert!(raw & SHARED == 0, "a page that changes was copied, and what is the tree's own stays so");
                    if open {
                        supply.pool.open(supply.machine, pfn);
                    }
                    supply.machine.store(word, changed);
                    if !open {
                        supply.pool.close(supply.machine, pfn);
                    }
                    return true;
                }
                // Whoever fills it stores what they found; then it is looked at again.
                _ => spin_loop(),
            }
        }
    }

    /// Makes the way to each of the pages `start .. end` the tree's own, down to words of level 0.
    fn reach_pages<M: Machine>(&self, supply: &Supply<'_, M>, start: u64, end: u64) -> Result<(), GrantError> {
        let mut frame = start;
        while frame < end {
            waited(|| self.own_root(supply))?;
            let (word, raw, level) = self.locate_own(supply.machine, frame);
            if level == 0 {
                frame = after(frame, 1);
                continue;
            }
            waited_once(match Entry::decode(raw) {
                Entry::Vacant => self.fill_node(supply, word).map(drop),
                Entry::Node(below) => self.copy_node(supply, word, raw, below),
                Entry::Block(pfn) if raw & SHARED == 0 => self.split_block(supply, word, pfn).map_err(GrantError::from),
                Entry::Block(pfn) => self.break_block(supply, word, raw, pfn),
                Entry::Filling | Entry::Page(_) | Entry::Stored(_) => Err(GrantError::Busy),
            })?;
        }
        Ok(())
    }

    /// Makes nodes the tree's own that hold words of `start .. end`; what is vacant or a block stays.
    pub(super) fn reach_nodes<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        start: u64,
        end: u64,
    ) -> Result<(), GrantError> {
        let mut frame = start;
        while frame < end {
            waited(|| self.own_root(supply))?;
            let (word, raw, level) = self.locate_own(supply.machine, frame);
            match Entry::decode(raw) {
                Entry::Node(below) => waited_once(self.copy_node(supply, word, raw, below))?,
                _ => frame = after(frame, level.max(1)),
            }
        }
        Ok(())
    }

    /// Every page of content: its frame in the object, the machine's, and whether it is open.
    pub(crate) fn visit_content<M: Machine>(&self, machine: &M, visit: &mut impl FnMut(u64, Pfn, bool)) {
        let levels = self.levels.load(Ordering::Relaxed);
        visit_below(machine, self.root.load(Ordering::Acquire), 0, levels, visit);
    }

    /// Whether the frame behind the page at `frame`, if there is one, follows the page's attribute. The caller holds the structure
    /// lock and is pinned.
    pub(crate) fn is_followed<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> bool {
        let found = self.locate(supply.machine, frame);
        match found.entry {
            Entry::Page(pfn) => supply.pool.is_poisoned(pfn) || supply.pool.is_open(pfn) == (found.marks & OPEN != 0),
            Entry::Block(_) | Entry::Vacant | Entry::Filling | Entry::Node(_) | Entry::Stored(_) => true,
        }
    }
}

/// What is at or below a word for the part that begins at `frame`, with `levels` of nodes below it: at most four.
fn visit_below<M: Machine>(machine: &M, raw: u64, frame: u64, levels: u32, visit: &mut impl FnMut(u64, Pfn, bool)) {
    match Entry::decode(raw) {
        Entry::Vacant | Entry::Filling | Entry::Stored(_) => {}
        Entry::Page(pfn) => visit(frame, pfn, raw & OPEN != 0),
        Entry::Block(pfn) => {
            (0..BLOCK_FRAMES).for_each(|index| visit(frame + index, pfn.offset(index), false));
        }
        Entry::Node(node) => {
            for index in 0..Word::PER_FRAME {
                let first = frame + (u64::from(index) << (NODE_SHIFT * (levels - 1)));
                visit_below(machine, machine.load(Word::new(node, index)), first, levels - 1, visit);
            }
        }
    }
}
