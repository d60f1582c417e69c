//! Taking content away: punching holes, splitting blocks, destroying the tree.
//!
//! Protocol: the caller holds the object's structure lock, so words that hold something stay what they are but for what
//! happens here, for shared ones, which a fault may make the tree's own, and for pages that come from a store; claims and exchanges of vacant words go on
//! meanwhile. What is unpublished is deferred, because pinned readers may still use it. Destroying is different: nobody
//! can reach the object any more, but others may hold what it shares.
//!
//! Only the tree's own words change, so a hole begins with both its edges: the paths to them are made the tree's own, and
//! then whatever is shared inside hangs from words that lie in the hole whole. All that can fail is in that part.

use entresol_addr::Pfn;
use entresol_machine::{Machine, Word};
use entresol_sync::atomic::Ordering;
use entresol_sync::hint::spin_loop;

use super::entry::{self, CLEAN, COPYING, OPEN, SHARED};
use super::own::{let_go, reclaim};
use super::{BLOCK_FRAMES, Entry, FORKED, NODE_SHIFT, Tree, place};
use crate::{GrantError, Order, OutOfMemory, Supply};

/// The first frame after the part that a word of `level` stands for, seen from a frame in it.
pub(super) fn after(frame: u64, level: u32) -> u64 {
    (frame | (span(level) - 1)) + 1
}

/// Frames that a word of `level` stands for.
fn span(level: u32) -> u64 {
    1 << (NODE_SHIFT * level)
}

impl Tree {
    /// Makes the frames `start .. end` vacant; they lie inside. Returns how many went. A part that another CPU fills
    /// meanwhile may be there afterwards: it is zero, as if it had been touched later.
    ///
    /// # Errors
    ///
    /// [`GrantError::OutOfMemory`], [`GrantError::Forking`]; what is read did not change.
    pub(crate) fn punch<M: Machine>(&self, supply: &Supply<'_, M>, start: u64, end: u64) -> Result<u64, GrantError> {
        for edge in [start, end] {
            self.open(supply, edge)?;
        }
        if self.has_attributes() {
            // They are in words of level 0, which may hang from what is shared.
            self.reach_nodes(supply, start, end)?;
        }
        let (mut frame, mut punched) = (start, 0);
        while frame < end {
            let (word, raw, level) = self.locate_own(supply.machine, frame);
            let next = after(frame, level);
            let whole = frame.is_multiple_of(span(level)) && next <= end;
            punched += match Entry::decode(raw) {
                Entry::Vacant | Entry::Filling => 0,
                // A block that appeared across an edge since is zero.
                _ if !whole => 0,
                entry if changes_in_place(entry, raw) => match self.cut_off(supply, word, raw) {
                    Some(count) => count,
                    None => continue,
                },
                Entry::Stored(_) => unreachable!("it changes in place"),
                Entry::Page(pfn) => self.unpublish(supply, word, raw, pfn, Order::PAGE),
                Entry::Block(pfn) => self.unpublish(supply, word, raw, pfn, Order::BLOCK),
                Entry::Node(_) => unreachable!("the walk goes through nodes of the tree's own"),
            };
            frame = next;
        }
        Ok(punched)
    }

    /// Makes every word the tree's own that stands for frames on both sides of `edge`, and splits a block there.
    fn open<M: Machine>(&self, supply: &Supply<'_, M>, edge: u64) -> Result<(), GrantError> {
        let mut node = waited(|| self.own_root(supply))?;
        for level in (0..self.levels.load(Ordering::Relaxed)).rev() {
            // The end of the whole tree is such an edge too.
            if edge.is_multiple_of(span(level)) {
                return Ok(());
            }
            let word = place(node, level, edge);
            node = loop {
                let raw = supply.machine.load(word);
                match Entry::decode(raw) {
                    Entry::Vacant | Entry::Filling | Entry::Page(_) | Entry::Stored(_) => return Ok(()),
                    Entry::Node(below) if raw & SHARED == 0 => break below,
                    Entry::Node(below) => waited_once(self.copy_node(supply, word, raw, below))?,
                    Entry::Block(pfn) if raw & SHARED == 0 => self.split_block(supply, word, pfn)?,
                    Entry::Block(pfn) => waited_once(self.break_block(supply, word, raw, pfn))?,
                }
            };
        }
        Ok(())
    }

    /// The first word on the way to `frame` that does not lead to a node of the tree's own.
    pub(super) fn locate_own<M: Machine>(&self, machine: &M, frame: u64) -> (Word, u64, u32) {
        let mut node = entry::frame(self.root.load(Ordering::Acquire));
        for level in (0..self.levels.load(Ordering::Relaxed)).rev() {
            let word = place(node, level, frame);
            let raw = machine.load(word);
            match Entry::decode(raw) {
                Entry::Node(below) if raw & SHARED == 0 => node = below,
                _ => return (word, raw, level),
            }
        }
        unreachable!("a word of level 0 never holds a node")
    }

    /// Makes a word vacant that others may change; `None` if it is another by now, or is being copied. Returns the frames of content that
    /// went.
    fn cut_off<M: Machine>(&self, supply: &Supply<'_, M>, word: Word, raw: u64) -> Option<u64> {
        let raw = raw & !COPYING;
        // Counted first: what a word names stays as long as the word holds it.
        let (content, nodes) = held(supply.machine, raw);
        let stored = u64::from(matches!(Entry::decode(raw), Entry::Stored(_)));
        if supply.machine.compare_exchange(word, raw, Entry::Vacant.encode() | raw & OPEN).is_err() {
            spin_loop();
            return None;
        }
        self.resident.fetch_sub(content, Ordering::Relaxed);
        self.stored.fetch_sub(stored, Ordering::Relaxed);
        self.nodes.fetch_sub(nodes, Ordering::Relaxed);
        let_go(supply, raw);
        reclaim(supply, 1);
        Some(content)
    }

    /// Makes a word vacant that says `raw`, the tree's own. The page's attribute stays.
    fn unpublish<M: Machine>(&self, supply: &Supply<'_, M>, word: Word, raw: u64, pfn: Pfn, order: Order) -> u64 {
        supply.machine.store(word, Entry::Vacant.encode() | raw & OPEN);
        supply.pool.defer(pfn, order);
        self.resident.fetch_sub(order.frames(), Ordering::Relaxed);
        order.frames()
    }

    /// The same frames back the block at `word`, the tree's own, from now on page by page.
    pub(super) fn split_block<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        word: Word,
        pfn: Pfn,
    ) -> Result<(), OutOfMemory> {
        let node = self.new_node(supply)?;
        for index in 0..Word::PER_FRAME {
            supply.machine.store(Word::new(node, index), Entry::Page(pfn.offset(index.into())).encode());
        }
        supply.pool.split(pfn, Order::BLOCK);
        supply.machine.store(word, Entry::Node(node).encode());
        Ok(())
    }

    /// Gives back everything, nodes included. Nobody reaches the tree any more.
    pub(crate) fn destroy<M: Machine>(&self, supply: &Supply<'_, M>) {
        let root = self.root.load(Ordering::Relaxed);
        if root & SHARED != 0 {
            let_go(supply, root);
        } else {
            self.destroy_node(supply, entry::frame(root));
        }
        while reclaim(supply, usize::MAX) == usize::MAX {}
        if self.is_forked() {
            // What others hold was counted here too.
            self.resident.store(0, Ordering::Relaxed);
            self.nodes.store(0, Ordering::Relaxed);
        }
        // Its place may hold a device next, which has nothing of its own.
        self.traits.store(FORKED, Ordering::Relaxed);
    }

    /// A node of the tree's own, at most four deep.
    fn destroy_node<M: Machine>(&self, supply: &Supply<'_, M>, node: Pfn) {
        for index in 0..Word::PER_FRAME {
            let give = |pfn, order: Order| {
                self.resident.fetch_sub(order.frames(), Ordering::Relaxed);
                supply.pool.give(supply.cpu, pfn, order);
            };
            let raw = supply.machine.load(Word::new(node, index));
            match Entry::decode(raw) {
                Entry::Vacant => {}
                Entry::Filling => unreachable!("whoever fills is pinned, and a grace period has passed"),
                Entry::Stored(_) | Entry::Page(_) if changes_in_place(Entry::decode(raw), raw) => {
                    self.resident.fetch_sub(1, Ordering::Relaxed);
                    let_go(supply, raw);
                }
                _ if raw & SHARED != 0 => let_go(supply, raw),
                Entry::Stored(_) => unreachable!("it changes in place"),
                Entry::Page(pfn) => give(pfn, Order::PAGE),
                Entry::Block(pfn) => give(pfn, Order::BLOCK),
                Entry::Node(child) => self.destroy_node(supply, child),
            }
        }
        self.drop_node(supply, node);
    }
}

/// Whether another than who holds the structure lock may change a word that says `entry`: with an exchange only.
fn changes_in_place(entry: Entry, raw: u64) -> bool {
    raw & (SHARED | CLEAN) != 0 || matches!(entry, Entry::Stored(_))
}

/// Pages of content and frames of nodes that a shared word leads to. At most four words deep.
fn held<M: Machine>(machine: &M, raw: u64) -> (u64, u64) {
    match Entry::decode(raw) {
        Entry::Vacant | Entry::Filling => (0, 0),
        Entry::Page(_) | Entry::Stored(_) => (1, 0),
        Entry::Block(_) => (BLOCK_FRAMES, 0),
        Entry::Node(node) => (0..Word::PER_FRAME).fold((0, 1), |(content, nodes), index| {
            let (more, below) = held(machine, machine.load(Word::new(node, index)));
            (content + more, nodes + below)
        }),
    }
}

/// Repeats what another CPU is busy with: bounded work that waits for nobody.
pub(super) fn waited<T>(mut act: impl FnMut() -> Result<T, GrantError>) -> Result<T, GrantError> {
    loop {
        match act() {
            Err(GrantError::Busy) => spin_loop(),
            answer => return answer,
        }
    }
}

/// The same for a caller that looks again anyway.
pub(super) fn waited_once(answer: Result<(), GrantError>) -> Result<(), GrantError> {
    match answer {
        Err(GrantError::Busy) => {
            spin_loop();
            Ok(())
        }
        answer => answer,
    }
}
