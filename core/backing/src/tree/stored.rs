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
//! ```
//!
//! The caller is pinned. The node of the word may be shared, or may be dead by now: a dead node's words are sealed before
//! their references go back, so an exchange there comes before that, or fails.
//!
//! Invariants: INV-7: the word's reference to the frame is counted before the exchange, the one to the place goes back after.

use entresol_machine::Machine;
use entresol_sync::atomic::Ordering;

use super::entry::{CLEAN, SHARED};
use super::{Entry, Tree, place};
use crate::{Fetch, GrantError, PutError, StoreSlot, Supply};

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
        supply.pool.share(pfn);
        let clean = Entry::Page(pfn).encode() | raw & SHARED | CLEAN;
        if supply.machine.compare_exchange(word, raw, clean).is_err() {
            supply.pool.release(pfn);
            return false;
        }
        supply.pool.stores().release(fetch.slot());
        self.stored.fetch_sub(1, Ordering::Relaxed);
        true
    }
}

impl From<GrantError> for PutError {
    fn from(error: GrantError) -> Self {
        Self::Grant(error)
    }
}
