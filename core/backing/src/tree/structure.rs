//! Taking content away: punching holes, splitting blocks, destroying the tree.
//!
//! Protocol: the caller holds the object's structure lock, so words that hold something stay what they are but for
//! what happens here; claims and exchanges of vacant words go on meanwhile. What is unpublished is deferred, because
//! pinned readers may still use it. Destroying is different: nobody can reach the object any more.

use entresol_addr::Pfn;
use entresol_machine::{Machine, Word};
use entresol_sync::atomic::Ordering;

use super::{BLOCK_FRAMES, Entry, Located, NODE_SHIFT, Tree};
use crate::{Order, OutOfMemory, Supply};

impl Located {
    /// The first frame after the part that this word stands for, seen from a frame in it.
    fn after(&self, frame: u64) -> u64 {
        (frame | ((1 << (NODE_SHIFT * self.level)) - 1)) + 1
    }
}

impl Tree {
    /// Makes the frames `start .. end` vacant; they lie inside. Returns how many went. A part that another CPU fills
    /// meanwhile may be there afterwards: it is zero, as if it had been touched later.
    pub(crate) fn punch<M: Machine>(&self, supply: &Supply<'_, M>, start: u64, end: u64) -> Result<u64, OutOfMemory> {
        for edge in [start, end] {
            if edge % BLOCK_FRAMES != 0 {
                self.split_block(supply, edge)?;
            }
        }
        let (mut frame, mut punched) = (start, 0);
        while frame < end {
            let found = self.locate(supply.machine, frame);
            let after = found.after(frame);
            punched += match found.entry {
                Entry::Page(pfn) => self.unpublish(supply, found.word, pfn, Order::PAGE),
                // One that appeared across an edge since is zero.
                Entry::Block(pfn) if frame % BLOCK_FRAMES == 0 && after <= end => {
                    self.unpublish(supply, found.word, pfn, Order::BLOCK)
                }
                Entry::Block(_) | Entry::Vacant | Entry::Filling | Entry::Node(_) => 0,
            };
            frame = after;
        }
        Ok(punched)
    }

    fn unpublish<M: Machine>(&self, supply: &Supply<'_, M>, word: Word, pfn: Pfn, order: Order) -> u64 {
        supply.machine.store(word, Entry::Vacant.encode());
        supply.pool.defer(pfn, order);
        self.resident.fetch_sub(order.frames(), Ordering::Relaxed);
        order.frames()
    }

    /// If a block backs `frame`, the same frames back it from now on page by page.
    fn split_block<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Result<(), OutOfMemory> {
        let found = self.locate(supply.machine, frame);
        let Entry::Block(pfn) = found.entry else { return Ok(()) };
        let node = self.new_node(supply)?;
        for index in 0..Word::PER_FRAME {
            supply.machine.store(Word::new(node, index), Entry::Page(pfn.offset(index.into())).encode());
        }
        supply.pool.split(pfn, Order::BLOCK);
        supply.machine.store(found.word, Entry::Node(node).encode());
        Ok(())
    }

    /// Gives back everything, nodes included. Nobody reaches the tree any more.
    pub(crate) fn destroy<M: Machine>(&self, supply: &Supply<'_, M>) {
        self.destroy_node(supply, Pfn::new(self.root.load(Ordering::Relaxed)));
    }

    /// At most four nodes deep.
    fn destroy_node<M: Machine>(&self, supply: &Supply<'_, M>, node: Pfn) {
        for index in 0..Word::PER_FRAME {
            let give = |pfn, order: Order| {
                self.resident.fetch_sub(order.frames(), Ordering::Relaxed);
                supply.pool.give(supply.cpu, pfn, order);
            };
            match Entry::decode(supply.machine.load(Word::new(node, index))) {
                Entry::Vacant => {}
                Entry::Filling => unreachable!("whoever fills is pinned, and a grace period has passed"),
                Entry::Page(pfn) => give(pfn, Order::PAGE),
                Entry::Block(pfn) => give(pfn, Order::BLOCK),
                Entry::Node(child) => self.destroy_node(supply, child),
            }
        }
        self.drop_node(supply, node);
    }
}
