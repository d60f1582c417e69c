//! One word of a tree's node.
//!
//! Shape: bits 7:0 say what it is, bits 63:8 which frame. Zero is vacant, so a zeroed frame is an empty node.

use entresol_addr::Pfn;

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
}

const TAG_BITS: u32 = 8;

impl Entry {
    #[inline]
    pub(crate) const fn encode(self) -> u64 {
        let (tag, pfn) = match self {
            Self::Vacant => (0, Pfn::new(0)),
            Self::Filling => (1, Pfn::new(0)),
            Self::Page(pfn) => (2, pfn),
            Self::Block(pfn) => (3, pfn),
            Self::Node(pfn) => (4, pfn),
        };
        pfn.get() << TAG_BITS | tag
    }

    #[inline]
    pub(crate) fn decode(raw: u64) -> Self {
        let pfn = Pfn::new(raw >> TAG_BITS);
        match raw & ((1 << TAG_BITS) - 1) {
            0 => Self::Vacant,
            1 => Self::Filling,
            2 => Self::Page(pfn),
            3 => Self::Block(pfn),
            4 => Self::Node(pfn),
            _ => unreachable!("nodes are written through encode only, and no guest reaches them"),
        }
    }
}

const _: () = assert!(Entry::Vacant.encode() == 0);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn decode_undoes_encode(raw in 0u64..1 << 40) {
            let pfn = Pfn::new(raw);
            for entry in [Entry::Vacant, Entry::Filling, Entry::Page(pfn), Entry::Block(pfn), Entry::Node(pfn)] {
                prop_assert_eq!(Entry::decode(entry.encode()), entry);
            }
        }
    }
}
