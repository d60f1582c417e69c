//! Pages that no frame has: words that name a place of a store, and the change between the two, in place.
//!
//! Protocol: a word of level 0 goes from `Stored` to a page that is marked *clean* by one exchange, from exactly what was seen.
//! The page is known to hold the same as the place ([`crate::FramePool`] keeps it so), and nobody writes it: who wants to
//! write gets [`GrantError::Shared`], and [`super::own`] lets go of the place first, or copies. So the frame can go again
//! without being written anywhere, and two relatives that each have the page from one place do not differ.
//!
//! The mark *shared* of a word stays what it is: it says that others may name the same place.
//!
//! ```text
//! Vacant ─put→ Stored ─restore→ Page + clean ─own→ Page       Stored | Page + clean ─punch→ Vacant (exchange)
//!                 ↑                │   ↑             │
//!                 └────discard─────┘   └──begin_out──┘
//! ```
//!
//! A page leaves memory in two steps, each with its translations gone. First it becomes clean, with a place taken for it that is
//! not valid yet, and somebody writes it there: nobody changes it meanwhile, because who would write gets a copy as long as
//! the writer has the frame. Then, when the place is valid, the word names it instead of the frame. Touched in between, the page
//! is simply there; so it is never both out and in, nor neither. The tree's own pages become clean under the structure
//! lock, because only its holder may change words that are not marked.
//!
//! The caller is pinned. The node of the word may be shared, or may be dead by now: a dead node's words are sealed before
//! their references go back, so an exchange there comes before that, or fails.
//!
//! Invariants: INV-7: the word's reference to the frame is counted before the exchange, the one to the place goes back after.

use entresol_addr::Pfn;
use entresol_machine::Machine;
use entresol_sync::atomic::Ordering;

use super::entry::{CLEAN, COPYING, SHARED};
use super::{Entry, NODE_SHIFT, Tree, place};
use crate::{Fetch, GrantError, OutError, PutError, StoreId, StoreSlot, Supply};

impl Tree {
    /// `frame`, which lies inside and was never touched, reads as the place does from now on.
    pub(crate) fn put_stored<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        frame: u64,
        slot: StoreSlot,
    ) -> Result<(), PutError> {
        let mut node = self.own_root(supply)?;
        for level in (1..self.levels.load(Ordering::Relaxed)).rev() {
            let word = place(node, level, frame);
            let raw = supply.machine.load(word);
            node = match Entry::decode(raw) {
                Entry::Node(below) if raw & SHARED == 0 => below,
                Entry::Vacant => self.fill_node(supply, word)?,
                _ => return Err(PutError::Occupied { frame }),
            };
        }
        supply.pool.stores().name(slot)?;
        let word = place(node, 0, frame);
        let stored = Entry::Stored(slot).encode();
        if supply.machine.compare_exchange(word, Entry::Vacant.encode(), stored).is_err() {
            supply.pool.stores().release(slot);
            return Err(PutError::Occupied { frame });
        }
        self.resident.fetch_add(1, Ordering::Relaxed);
        self.stored.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Puts what was fetched where `frame`, which lies inside, is stored, if it is stored there still. Whether it did.
    pub(crate) fn restore<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64, fetch: &Fetch) -> bool {
        let word = self.locate(supply.machine, frame).word;
        let raw = supply.machine.load(word);
        if Entry::decode(raw) != Entry::Stored(fetch.slot()) {
            return false;
        }
        let pfn = fetch.pfn();
        // Another had it in memory, and it is bad by now: who waits has it read again.
        if supply.pool.is_poisoned(pfn) {
            return false;
        }
        supply.pool.share(pfn);
        let clean = Entry::Page(pfn).encode() | raw & SHARED | CLEAN;
        self.cleaned.store(true, Ordering::Release);
        if supply.machine.compare_exchange(word, raw, clean).is_err() {
            supply.pool.release(pfn);
            return false;
        }
        supply.pool.stores().release(fetch.slot());
        self.stored.fetch_sub(1, Ordering::Relaxed);
        true
    }
}

impl Tree {
    /// The first step for `frame`, which lies inside: the frame and the place that it is to be written to, with a reference to
    /// each, if it is in memory and in no store yet. The caller holds the structure lock, and no translation to the page is left,
    /// nor comes meanwhile.
    pub(crate) fn begin_out<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        frame: u64,
        store: StoreId,
    ) -> Result<Option<(Pfn, StoreSlot)>, OutError> {
        loop {
            let found = self.locate(supply.machine, frame);
            let raw = supply.machine.load(found.word);
            let pfn = match Entry::decode(raw) {
                Entry::Page(pfn) if raw & COPYING == 0 && !supply.pool.is_poisoned(pfn) => pfn,
                // Only the tree's own block is split: the words of a shared one are not its to change.
                Entry::Block(pfn) if !found.is_shared() && raw & SHARED == 0 => {
                    self.split_block(supply, found.word, pfn)?;
                    continue;
                }
                _ => return Ok(None),
            };
            if supply.pool.kept_at(pfn).is_some() {
                return Ok(None);
            }
            // Others have it under words that no translation of the caller's stands for.
            if !supply.pool.share_if_held(pfn) {
                return Ok(None);
            }
            let slot = supply.pool.stores().take(store, self.is_tagged()).inspect_err(|_| supply.pool.release(pfn))?;
            self.cleaned.store(true, Ordering::Release);
            if supply.machine.compare_exchange(found.word, raw, raw | CLEAN).is_err() {
                supply.pool.release(pfn);
                supply.pool.stores().release(slot);
                continue;
            }
            // The writer's reference; the one that was taken becomes the frame's.
            supply.pool.stores().retain(slot);
            if !supply.pool.keep(pfn, slot) {
                supply.pool.stores().release(slot);
                supply.pool.stores().release(slot);
                supply.pool.release(pfn);
                return Ok(None);
            }
            return Ok(Some((pfn, slot)));
        }
    }

    /// The second step for `frame`, which lies inside, if its page is clean and the place valid. Whether it left.
    /// No translation to it is left, nor comes meanwhile.
    pub(crate) fn discard<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> bool {
        let word = self.locate(supply.machine, frame).word;
        let raw = supply.machine.load(word);
        let Entry::Page(pfn) = Entry::decode(raw) else { return false };
        let Some(slot) = supply.pool.kept_at(pfn).filter(|_| raw & COPYING == 0) else { return false };
        // The word's reference, before the word names the place.
        if !supply.pool.stores().retain_valid(slot) {
            return false;
        }
        let stored = Entry::Stored(slot).encode() | raw & SHARED;
        if supply.machine.compare_exchange(word, raw, stored).is_err() {
            supply.pool.stores().release(slot);
            return false;
        }
        self.stored.fetch_add(1, Ordering::Relaxed);
        supply.pool.release(pfn);
        true
    }
}

impl Tree {
    /// Where `frame`, which lies inside, is stored, if it is, and the end of what one word decides about.
    pub(crate) fn stored_from<M: Machine>(&self, machine: &M, frame: u64) -> (Option<StoreSlot>, u64) {
        let found = self.locate(machine, frame);
        let slot = if let Entry::Stored(slot) = found.entry { Some(slot) } else { None };
        (slot, (frame | ((1 << (NODE_SHIFT * found.level)) - 1)) + 1)
    }
}

impl From<GrantError> for PutError {
    fn from(error: GrantError) -> Self {
        Self::Grant(error)
    }
}
