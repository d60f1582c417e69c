//! Making a page the tree's own: copying the path to it, then the page; and letting go of what was shared.
//!
//! Protocol: from the root down, the first shared word is claimed (`copying`), what it names is copied into a frame of the
//! tree's own, the word is stored without the mark, and the reference to the original is given back. Who meets a claimed
//! word gets [`GrantError::Busy`]; readers go on through it, because the original does not change. All that can fail is
//! the frame, which is taken before anything is counted; then the word is stored as it was.
//!
//! The reference is given back while translations to the original may still be used: the caller is pinned, and takes
//! them away before it unpins. What nobody refers to any more is deferred, so it stays what it is until then.
//!
//! A node that nobody refers to any more gives its own references back later ([`reclaim`]), one node for each node that is
//! copied: a guest's write never does the work of freeing a whole tree.

use entresol_addr::{PageSize, Pfn, PfnRange};
use entresol_machine::{Machine, Word};
use entresol_sync::atomic::Ordering;
use entresol_sync::planted;

use super::entry::{self, CLEAN, COPYING, FROZEN, OPEN, SHARED};
use super::{BLOCK_FRAMES, Entry, Tree, block, page, place};
use crate::{Grant, GrantError, Order, OutOfMemory, Supply};

/// A page that was copied before it is known whether the copy will be used: for whoever must not copy later. It holds a
/// reference to the original, so that this stays what it is.
#[must_use = "the copy and the reference are lost if it is dropped"]
#[derive(Debug)]
pub struct Ahead(Option<Copied>);

#[derive(Debug)]
struct Copied {
    from: Pfn,
    to: Pfn,
}

impl Ahead {
    /// Nothing was copied.
    pub(crate) const NONE: Self = Self(None);

    /// Gives the copy and the reference back.
    pub fn give_back<M: Machine>(self, supply: &Supply<'_, M>) {
        if let Some(Copied { from, to }) = self.0 {
            supply.pool.give(supply.cpu, to, Order::PAGE);
            supply.pool.release(from);
        }
    }

    /// The copy of `pfn`, if it is one.
    fn take<M: Machine>(&mut self, supply: &Supply<'_, M>, pfn: Pfn) -> Option<Pfn> {
        let Copied { from, to } = self.0.take_if(|copied| copied.from == pfn)?;
        supply.pool.release(from);
        Some(to)
    }
}

impl Tree {
    /// Copies what backs `frame`, if relatives may share it and it is a page. Nobody sees the copy yet.
    pub(crate) fn copy_ahead<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Result<Ahead, OutOfMemory> {
        let found = self.locate(supply.machine, frame);
        let Entry::Page(from) = found.entry else { return Ok(Ahead::NONE) };
        if !found.is_shared() || supply.pool.is_poisoned(from) {
            return Ok(Ahead::NONE);
        }
        let to = self.take_page(supply)?;
        // The caller is pinned, so it is still taken: what was released since is deferred, and waits for the caller.
        if !supply.pool.share_if_held(from) {
            supply.pool.give(supply.cpu, to, Order::PAGE);
            return Ok(Ahead::NONE);
        }
        self.copy_content(supply, PfnRange::single(from), to);
        Ok(Ahead(Some(Copied { from, to })))
    }

    /// What backs `frame`, which lies inside, for writing: made, or copied from what is shared. `ahead` is used if it is a
    /// copy of just that page, and is `NONE` then.
    pub(crate) fn own<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        frame: u64,
        ahead: &mut Ahead,
    ) -> Result<Grant, GrantError> {
        let mut node = self.own_root(supply)?;
        let mut level = self.levels.load(Ordering::Relaxed) - 1;
        loop {
            let word = place(node, level, frame);
            let raw = supply.machine.load(word);
            let shared = raw & SHARED != 0;
            match Entry::decode(raw) {
                Entry::Node(below) if !shared || planted!(ZG1) => (node, level) = (below, level - 1),
                Entry::Node(below) => self.copy_node(supply, word, raw, below)?,
                Entry::Stored(slot) => return Err(GrantError::Stored { slot }),
                Entry::Page(pfn) if raw & (SHARED | CLEAN) != 0 => {
                    return self.copy_page(supply, word, raw, pfn, frame, ahead);
                }
                Entry::Page(pfn) => return Ok(page(pfn, frame, true, false)),
                Entry::Block(pfn) if shared => {
                    if let Some(grant) = self.copy_block(supply, word, raw, pfn, frame)? {
                        return Ok(grant);
                    }
                }
                Entry::Block(pfn) => return Ok(block(pfn, frame, true, false)),
                Entry::Vacant => return self.fill_own(supply, word, level, frame),
                Entry::Filling => return Err(GrantError::Busy),
            }
        }
    }

    /// The root's node, the tree's own from now on.
    pub(super) fn own_root<M: Machine>(&self, supply: &Supply<'_, M>) -> Result<Pfn, GrantError> {
        let raw = self.root.load(Ordering::Acquire);
        let root = entry::frame(raw);
        if raw & SHARED == 0 || planted!(ZG1) {
            return Ok(root);
        }
        if raw & FROZEN != 0 {
            return Err(GrantError::Forking);
        }
        let claim = self.root.compare_exchange(raw & !COPYING, raw | COPYING, Ordering::AcqRel, Ordering::Acquire);
        claim.map_err(|_| GrantError::Busy)?;
        let copy = copied(supply, root).inspect_err(|_| self.root.store(raw, Ordering::Release))?;
        self.root.store(Entry::Node(copy).encode(), Ordering::Release);
        let_go_of_node(supply, root);
        Ok(copy)
    }

    /// Gives the tree its own copy of the node behind a shared word.
    pub(super) fn copy_node<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        word: Word,
        raw: u64,
        node: Pfn,
    ) -> Result<(), GrantError> {
        claim_copy(supply, word, raw)?;
        let copy = copied(supply, node).inspect_err(|_| supply.machine.store(word, raw))?;
        supply.machine.store(word, Entry::Node(copy).encode());
        let_go_of_node(supply, node);
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "the place, what was found there, and what is in hand")]
    fn copy_page<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        word: Word,
        raw: u64,
        pfn: Pfn,
        frame: u64,
        ahead: &mut Ahead,
    ) -> Result<Grant, GrantError> {
        if supply.pool.is_poisoned(pfn) {
            return Err(GrantError::Poisoned);
        }
        claim_copy(supply, word, raw)?;
        if raw & SHARED == 0 && supply.pool.stop_keeping(pfn) {
            supply.machine.store(word, Entry::Page(pfn).encode() | raw & OPEN);
            return Ok(page(pfn, frame, true, false));
        }
        let copy = match ahead.take(supply, pfn) {
            Some(copy) => copy,
            None => {
                let copy = self.take_page(supply);
                let copy = copy.inspect_err(|_| supply.machine.store(word, raw))?;
                self.copy_content(supply, PfnRange::single(pfn), copy);
                copy
            }
        };
        if raw & OPEN != 0 {
            supply.pool.open(supply.machine, copy);
        }
        supply.machine.store(word, Entry::Page(copy).encode() | raw & OPEN);
        supply.pool.release(pfn);
        Ok(page(copy, frame, true, false))
    }

    /// Copies a shared block whole, if its owner wants that and one is free; else shows the same frames page by page.
    fn copy_block<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        word: Word,
        raw: u64,
        pfn: Pfn,
        frame: u64,
    ) -> Result<Option<Grant>, GrantError> {
        if !self.copies_blocks.load(Ordering::Relaxed) || supply.pool.has_poison(pfn) {
            return self.break_block(supply, word, raw, pfn).map(|()| None);
        }
        claim_copy(supply, word, raw)?;
        let copy = if self.is_private() {
            supply.pool.take_private_block(supply.machine, supply.cpu)
        } else {
            supply.pool.take_at_hand(Order::BLOCK)
        };
        let Some(copy) = copy else {
            supply.machine.store(word, raw);
            return self.break_block(supply, word, raw, pfn).map(|()| None);
        };
        self.copy_content(supply, PfnRange::block(pfn, PageSize::Size2M), copy);
        supply.machine.store(word, Entry::Block(copy).encode());
        supply.pool.release_block(pfn);
        Ok(Some(block(copy, frame, true, false)))
    }

    /// Puts a node of the tree's own, whose words share the block's frames one by one, where the shared block is.
    pub(super) fn break_block<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        word: Word,
        raw: u64,
        pfn: Pfn,
    ) -> Result<(), GrantError> {
        claim_copy(supply, word, raw)?;
        let node = supply.pool.take(supply.cpu, Order::PAGE).inspect_err(|_| supply.machine.store(word, raw))?;
        supply.pool.split_shared(pfn);
        for index in 0..BLOCK_FRAMES {
            let shared = Entry::Page(pfn.offset(index)).encode() | SHARED;
            supply.machine.store(Word::new(node, index as u16), shared);
        }
        self.nodes.fetch_add(1, Ordering::Relaxed);
        supply.machine.store(word, Entry::Node(node).encode());
        Ok(())
    }

    /// A frame for content that will be copied into it.
    fn take_page<M: Machine>(&self, supply: &Supply<'_, M>) -> Result<Pfn, OutOfMemory> {
        if self.is_private() {
            supply.pool.take_private(supply.machine, supply.cpu)
        } else {
            supply.pool.take(supply.cpu, Order::PAGE)
        }
    }

    /// Copies frames of the tree that nobody writes, tags with them. Without forced write-back the guest may have written them past the
    /// caches, and a cache may have a line from before.
    fn copy_content<M: Machine>(&self, supply: &Supply<'_, M>, from: PfnRange, to: Pfn) {
        if !supply.machine.features().forced_write_back {
            supply.machine.clean_invalidate_to_poc(from);
            supply.machine.complete();
        }
        if self.is_private() {
            for offset in 0..from.count() {
                supply.pool.copy_private(supply.machine, from.start().offset(offset), to.offset(offset));
            }
            return;
        }
        supply.machine.copy(from.start(), to, from.count());
        if self.is_tagged() && !planted!(ZE5) {
            supply.machine.copy_tags(from.start(), to, from.count());
        }
    }
}

/// Claims a word that held `raw`, of what is shared or clean.
fn claim_copy<M: Machine>(supply: &Supply<'_, M>, word: Word, raw: u64) -> Result<(), GrantError> {
    let claimed = supply.machine.compare_exchange(word, raw & !COPYING, raw | COPYING);
    claimed.map(drop).map_err(|_| GrantError::Busy)
}

/// A copy of a shared node that nobody can reach yet: every word is marked, and what it names has a reference more.
fn copied<M: Machine>(supply: &Supply<'_, M>, node: Pfn) -> Result<Pfn, OutOfMemory> {
    let copy = supply.pool.take(supply.cpu, Order::PAGE)?;
    for index in 0..Word::PER_FRAME {
        let raw = retained(supply, Word::new(node, index));
        let mark = if entry::is_vacant(raw) { 0 } else { SHARED };
        supply.machine.store(Word::new(copy, index), raw | mark);
    }
    Ok(copy)
}

/// What a shared node's word says, with one reference more to what it names. A page may come or go in place meanwhile, so
/// the word is looked at again; the caller is pinned, so that a frame that has gone is nobody else's yet.
fn retained<M: Machine>(supply: &Supply<'_, M>, word: Word) -> u64 {
    loop {
        let raw = supply.machine.load(word);
        let counted = match Entry::decode(raw) {
            Entry::Vacant => return raw,
            Entry::Node(node) => {
                supply.pool.share(node);
                return raw;
            }
            Entry::Block(pfn) => {
                supply.pool.share_block(pfn);
                return raw;
            }
            Entry::Page(pfn) => supply.pool.share_if_held(pfn),
            Entry::Stored(slot) => supply.pool.stores().retain(slot),
            Entry::Filling => {
                unreachable!("who filled was pinned, and a grace period went by before the node was shared")
            }
        };
        if counted {
            if supply.machine.load(word) == raw {
                return raw;
            }
            let_go(supply, raw);
        }
    }
}

/// Gives back the reference of a word that is gone.
pub(super) fn let_go<M: Machine>(supply: &Supply<'_, M>, raw: u64) {
    match Entry::decode(raw) {
        Entry::Page(pfn) => supply.pool.release(pfn),
        Entry::Block(pfn) => supply.pool.release_block(pfn),
        Entry::Node(node) => supply.pool.release_node(node),
        Entry::Stored(slot) => supply.pool.stores().release(slot),
        Entry::Vacant | Entry::Filling => {}
    }
}

fn let_go_of_node<M: Machine>(supply: &Supply<'_, M>, node: Pfn) {
    supply.pool.release_node(node);
    reclaim(supply, 1);
}

/// Lets at most `limit` dead nodes give their references back; some may bring more dead nodes. Returns how many it was.
pub(crate) fn reclaim<M: Machine>(supply: &Supply<'_, M>, limit: usize) -> usize {
    for done in 0..limit {
        let Some(node) = supply.pool.exhume() else { return done };
        for index in 0..Word::PER_FRAME {
            let_go(supply, sealed(supply.machine, Word::new(node, index)));
        }
        supply.pool.defer(node, Order::PAGE);
    }
    limit
}

/// What a dead node's word says, from now on for good: who reads through it still does, and who would change a page of it in
/// place does not find the word any more that it saw.
fn sealed<M: Machine>(machine: &M, word: Word) -> u64 {
    loop {
        let raw = machine.load(word);
        match Entry::decode(raw) {
            Entry::Page(_) | Entry::Stored(_) => {
                if machine.compare_exchange(word, raw, raw | COPYING).is_ok() {
                    return raw;
                }
            }
            Entry::Vacant | Entry::Filling | Entry::Block(_) | Entry::Node(_) => return raw,
        }
    }
}
