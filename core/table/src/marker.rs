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
