//! One root for two trees.
//!
//! Protocol: `freeze`, under the structure lock, so that nothing is being taken away; a grace period, so that nothing is
//! being made and no earlier grant is being written; the caller takes writable translations away; `adopt`; `thaw`. The
//! content is that of the moment in which the last translation was gone.

use entresol_addr::Pfn;
use entresol_machine::{Machine, Word};
use entresol_sync::atomic::Ordering;

use super::entry::{self, COPYING, FROZEN, SHARED};
use super::{BLOCK_FRAMES, CONVERTED, Entry, FORKED, LIMITED, TAGGED, Tree};
use crate::{Order, Supply};

/// The tree is frozen already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frozen;

impl Tree {
    /// From now on, and until `thaw`, nothing is made, copied or taken away. Waits for a CPU that copies the root.
    pub(crate) fn freeze(&self) -> Result<(), Frozen> {
        self.traits.fetch_or(FORKED, Ordering::Relaxed);
        loop {
            let raw = self.root.load(Ordering::Acquire);
            if raw & FROZEN != 0 {
                return Err(Frozen);
            }
            let frozen = raw | SHARED | FROZEN;
            let change =
                self.root.compare_exchange(raw & !COPYING, frozen & !COPYING, Ordering::AcqRel, Ordering::Acquire);
            if change.is_ok() {
                return Ok(());
            }
            entresol_sync::hint::spin_loop();
        }
    }

    /// Ends what `freeze` began. The root stays shared: if it was not given to anybody, the next write copies it in vain.
    pub(crate) fn thaw(&self) {
        let was = self.root.fetch_and(!FROZEN, Ordering::AcqRel);
        assert!(was & FROZEN != 0, "a tree is thawed once");
    }

    /// Pages may be shared from now on, as after a fork.
    pub(crate) fn take_part(&self) {
        self.traits.fetch_or(FORKED, Ordering::Relaxed);
    }

    /// Whether whatever it has is its own to write, without asking: it never shared, and no page of it was ever clean.
    #[inline]
    pub(crate) fn is_own(&self) -> bool {
        !self.is_forked() && !self.cleaned.load(Ordering::Acquire)
    }

    /// Whether it shares, or did once.
    #[inline]
    pub(crate) fn is_forked(&self) -> bool {
        self.traits.load(Ordering::Relaxed) & FORKED != 0
    }

    /// Becomes a relative of `other`, which is frozen since a grace period, with the same content. This one is of the same
    /// shape, empty, and nobody uses it.
    pub(crate) fn adopt<M: Machine>(&self, supply: &Supply<'_, M>, other: &Self) {
        let root = entry::frame(other.root.load(Ordering::Acquire));
        supply.pool.share(root);
        let inherited = other.traits.load(Ordering::Relaxed) & (TAGGED | LIMITED | CONVERTED);
        self.traits.fetch_or(FORKED | inherited, Ordering::Relaxed);
        self.limit.store(other.limit.load(Ordering::Relaxed), Ordering::Relaxed);
        self.resident.store(other.resident.load(Ordering::Relaxed), Ordering::Relaxed);
        self.stored.store(other.stored.load(Ordering::Relaxed), Ordering::Relaxed);
        self.nodes.store(other.nodes.load(Ordering::Relaxed), Ordering::Relaxed);
        let empty = self.root.swap(Entry::Node(root).encode() | SHARED, Ordering::AcqRel);
        supply.pool.give(supply.cpu, entry::frame(empty), Order::PAGE);
    }

    /// Every frame that the tree reaches, nodes included, once for each way to it.
    pub(crate) fn visit_frames<M: Machine>(&self, machine: &M, visit: &mut impl FnMut(Pfn)) {
        visit_below(machine, self.root.load(Ordering::Acquire), visit);
    }

    /// Whether nothing was ever put into it.
    pub(crate) fn is_untouched(&self) -> bool {
        !self.is_forked() && self.content() == 0 && self.nodes() == 1
    }
}

/// At most four nodes deep.
fn visit_below<M: Machine>(machine: &M, raw: u64, visit: &mut impl FnMut(Pfn)) {
    match Entry::decode(raw) {
        Entry::Vacant | Entry::Filling | Entry::Stored(_) => {}
        Entry::Page(pfn) => visit(pfn),
        Entry::Block(pfn) => (0..BLOCK_FRAMES).for_each(|index| visit(pfn.offset(index))),
        Entry::Node(node) => {
            visit(node);
            (0..Word::PER_FRAME).for_each(|index| visit_below(machine, machine.load(Word::new(node, index)), visit));
        }
    }
}
