//! Slots that show the guest's own memory a second time: vendor calls of the hypervisor.

use guest_rt::smccc;

/// Makes, moves or deletes a slot: X1 bits 15:0 its number, 31:16 its flags, 63:32 the page of memory behind its first; X2 its
/// guest physical address; X3 its bytes, 0 to delete it.
const SLOT: u64 = 0xc600_0003;
/// Takes a range's second-stage entries away: X1 its first byte, X2 its length.
const ZAP: u64 = 0xc600_0001;
/// The flag of a slot that the guest may not write through.
const READ_ONLY: u64 = 1 << 1;

/// The lowest number that such a slot may have.
pub const FIRST_ALIAS: u64 = 16;

/// Bytes of a page.
pub const PAGE: u64 = 0x1000;

/// A slot that shows `pages` pages of memory, from page `first` of it on, at `base`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its number, from [`FIRST_ALIAS`].
    pub number: u64,
    /// Where it is.
    pub base: u64,
    /// How long it is.
    pub pages: u64,
    /// The page of memory behind its first.
    pub first: u64,
    /// Stores do not go through it.
    pub read_only: bool,
}

impl Window {
    /// Makes it, or moves or changes the one of its number. Whether that was accepted.
    pub fn set(&self) -> bool {
        let flags = if self.read_only { READ_ONLY } else { 0 };
        smccc::hvc([SLOT, self.number | flags << 16 | self.first << 32, self.base, self.pages * PAGE]) == 0
    }

    /// Deletes it.
    pub fn delete(&self) -> bool {
        smccc::hvc([SLOT, self.number, self.base, 0]) == 0
    }

    /// Takes its entries away.
    pub fn zap(&self) {
        zap(self.base, self.pages * PAGE);
    }
}

/// Takes a range's second-stage entries away; contents stay.
pub fn zap(start: u64, size: u64) {
    assert_eq!(smccc::hvc([ZAP, start, size, 0]), 0, "the range is the guest's");
}
