//! One word of a tree's node.
//!
//! Shape: bits 2:0 say what it is, bits 7:3 are flags, bits 63:8 say which frame, or which place of a store. Zero is vacant,
//! so a zeroed frame is an empty node. A word with a flag always names something, but for `OPEN`, which a word of level 0 keeps
//! whatever it holds.

use entresol_addr::Pfn;

use crate::StoreSlot;

/// What a word of a node says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Never touched: reads as zero.
    Vacant,
    /// Some CPU is making this part; only that CPU may store to the word.
    Filling,
    /// A page of content (level 0).
    Page(Pfn),
    /// 512 contiguous frames of content (level 1).
    Block(Pfn),
    /// A node of the level below.
    Node(Pfn),
    /// A page that no frame has (level 0).
    Stored(StoreSlot),
}

const TAG_BITS: u32 = 8;
const KIND: u64 = 0b111;
/// Others may refer to what the word names, and to everything below it: it is never written again.
pub(crate) const SHARED: u64 = 1 << 3;
/// With `SHARED`: some CPU is making the tree's own copy; only that CPU may store to the word.
pub(crate) const COPYING: u64 = 1 << 4;
/// With `SHARED`, of a root: nothing is made and nothing taken away until the fork is done.
pub(crate) const FROZEN: u64 = 1 << 5;
/// Of a page: a place of a store may hold the same. Who would write the page lets go of the place first.
pub(crate) const CLEAN: u64 = 1 << 6;
/// Of private memory (level 0): the guest shares the page with the hypervisor. This bit is the page's attribute, whether
/// something backs it or not.
pub(crate) const OPEN: u64 = 1 << 7;

impl Entry {
    #[inline]
    pub(crate) const fn encode(self) -> u64 {
        let (tag, name) = match self {
            Self::Vacant => (0, 0),
            Self::Filling => (1, 0),
            Self::Page(pfn) => (2, pfn.get()),
            Self::Block(pfn) => (3, pfn.get()),
            Self::Node(pfn) => (4, pfn.get()),
            Self::Stored(slot) => (5, slot.raw()),
        };
        name << TAG_BITS | tag
    }

    #[inline]
    pub(crate) fn decode(raw: u64) -> Self {
        let pfn = frame(raw);
        match raw & KIND {
            0 => Self::Vacant,
            1 => Self::Filling,
            2 => Self::Page(pfn),
            3 => Self::Block(pfn),
            4 => Self::Node(pfn),
            5 => Self::Stored(StoreSlot::from_raw(raw >> TAG_BITS)),
            _ => unreachable!("nodes are written through encode only, and no guest reaches them"),
        }
    }
}

/// Whether a word names a node that is the tree's own.
#[inline]
pub(crate) const fn is_own_node(raw: u64) -> bool {
    tag(raw) == tag(Entry::Node(Pfn::new(0)).encode())
}

/// Whether a word names a page that is the tree's own.
#[inline]
pub(crate) const fn is_own_page(raw: u64) -> bool {
    tag(raw) == tag(Entry::Page(Pfn::new(0)).encode())
}

/// Whether a word names a block that is the tree's own.
#[inline]
pub(crate) const fn is_own_block(raw: u64) -> bool {
    tag(raw) == tag(Entry::Block(Pfn::new(0)).encode())
}

/// Whether nothing was ever put where the word is, or it was taken away.
#[inline]
pub(crate) const fn is_vacant(raw: u64) -> bool {
    raw & KIND == 0
}

/// Kind and flags.
#[inline]
const fn tag(raw: u64) -> u8 {
    raw as u8
}

/// The frame that a word names.
#[inline]
pub(crate) const fn frame(raw: u64) -> Pfn {
    Pfn::new(raw >> TAG_BITS)
}

const _: () = assert!(Entry::Vacant.encode() == 0 && StoreSlot::BITS + TAG_BITS <= u64::BITS);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn decode_undoes_encode(raw in 0u64..1 << 40) {
            let (pfn, slot) = (Pfn::new(raw), StoreSlot::from_raw(raw << 16));
            let named = [Entry::Page(pfn), Entry::Block(pfn), Entry::Node(pfn), Entry::Stored(slot)];
            for entry in named.into_iter().chain([Entry::Vacant, Entry::Filling]) {
                prop_assert_eq!(Entry::decode(entry.encode()), entry);
                prop_assert_eq!(Entry::decode(entry.encode() | SHARED | COPYING | FROZEN | CLEAN | OPEN), entry);
                prop_assert_eq!(is_vacant(entry.encode() | OPEN), entry == Entry::Vacant);
            }
        }
    }
}
