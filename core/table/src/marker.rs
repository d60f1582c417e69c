//! Invalid words that are owned: the kinds of [`Entry::Broken`](crate::Entry::Broken).
//!
//! Layout: the format's `BROKEN` in its `MARKER_BITS` low bits, two bits of kind, then the kind's own number.

use crate::Format;

const KIND_BITS: u32 = 2;
/// Bits of a number that every format has room for.
const VALUE_BITS: u32 = 50;

/// Whose an invalid word is; the crate documentation says what each allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Marker {
    /// A call in progress will store something valid.
    Claimed,
    /// Removed by the unmap with this ticket; its flush is not done.
    Removed(Ticket),
    /// The table page of this word is unlinked; the number is the freezer's own (50 bits).
    Frozen(u64),
}

/// Names one unmap. 50 bits, which no run of a machine exhausts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

impl Ticket {
    /// Ticket `count`, modulo the width of a marker.
    pub(crate) const fn new(count: u64) -> Self {
        Self(count & ((1 << VALUE_BITS) - 1))
    }
}

impl Marker {
    /// The word that says this.
    #[inline]
    pub(crate) const fn encode<F: Format>(self) -> u64 {
        const { assert!(F::BROKEN != 0 && F::BROKEN >> F::MARKER_BITS == 0) };
        const { assert!(F::MARKER_BITS + KIND_BITS + VALUE_BITS <= u64::BITS) };
        // A frozen word may hold a frame number plus one.
        const { assert!(F::FRAME_BITS < VALUE_BITS) };
        let (kind, value) = match self {
            Self::Claimed => (0, 0),
            Self::Removed(ticket) => (1, ticket.0),
            Self::Frozen(value) => (2, value),
        };
        F::BROKEN | kind << F::MARKER_BITS | value << (F::MARKER_BITS + KIND_BITS)
    }

    /// What a word that decodes as `Entry::Broken` says.
    #[inline]
    pub(crate) const fn decode<F: Format>(raw: u64) -> Self {
        let value = raw >> (F::MARKER_BITS + KIND_BITS);
        match raw >> F::MARKER_BITS & ((1 << KIND_BITS) - 1) {
            0 => Self::Claimed,
            1 => Self::Removed(Ticket::new(value)),
            _ => Self::Frozen(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Entry, Geometry, Leaf};
    use entresol_addr::Pfn;

    /// The widest format that the layout allows.
    #[derive(Clone, Copy)]
    struct Wide;

    impl Format for Wide {
        const BROKEN: u64 = 0x80;
        const FRAME_BITS: u32 = 40;

        fn geometry(&self, ipa_bits: u8) -> Option<Geometry> {
            Geometry::new(ipa_bits, 1)
        }

        fn decode(&self, _: u64, _: u8) -> Entry {
            Entry::Broken
        }

        fn leaf(&self, _: &Leaf) -> u64 {
            1
        }

        fn table(&self, _: Pfn) -> u64 {
            3
        }

        fn young(&self, raw: u64) -> u64 {
            raw
        }
    }

    #[test]
    fn decoding_undoes_encoding() {
        let most = (1 << VALUE_BITS) - 1;
        let values = (0..VALUE_BITS).map(|bit| 1 << bit).chain([0, most, 1 << 40]);
        for value in values {
            for marker in [Marker::Claimed, Marker::Removed(Ticket::new(value)), Marker::Frozen(value)] {
                let raw = marker.encode::<Wide>();
                assert_eq!(Marker::decode::<Wide>(raw), marker);
                assert_eq!(raw & ((1 << Wide::MARKER_BITS) - 1), Wide::BROKEN);
            }
        }
    }

    #[test]
    fn a_ticket_stays_in_its_width() {
        assert_eq!(Ticket::new(1 << VALUE_BITS), Ticket::new(0));
        assert_ne!(Ticket::new(1), Ticket::new(0));
    }
}
