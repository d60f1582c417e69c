//! Planted bugs: mistakes that were made before, each a switch in the production path.
//!
//! Protocol: `planted!(Bug)` stands in the core where the mistake would be made, and is `false` unless the thread has
//! switched that bug on with [`plant`]. The lab switches one on and shows that it is found. Names are the
//! specification's, with a word for the place where the core has the mistake's shape.

use core::cell::Cell;

/// A bug of the zoo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Bug {
    /// Z-A1: a page becomes reachable by a path that does not clean it to the point of coherency.
    ZA1,
    /// Z-A2: the page is cleaned after its entry was published.
    ZA2,
    /// Z-A3: a fault asks only whether the sequence moved, not whether an invalidation is in progress.
    ZA3,
    /// Z-A4: a fault asks only whether an invalidation is in progress, not whether the sequence moved.
    ZA4,
    /// Z-A5: the sequence is sampled after the backing was asked and the size decided.
    ZA5,
    /// Z-A6: a valid entry becomes a different valid one without a break.
    ZA6,
    /// Z-A7: a frame is freed before the TLB invalidation has completed.
    ZA7,
    /// Z-A8: frames in hand are not given back on the path that gives up.
    ZA8,
    /// Z-A9: an entry becomes executable without an instruction cache invalidation.
    ZA9,
    /// Z-A10: a write fault makes an entry writable without setting the page's dirty bit.
    ZA10,
    /// Z-A11: only a part of a block is cleaned.
    ZA11,
    /// Z-B1: a translation fault by cache maintenance counts as a write.
    ZB1,
    /// Z-B2: cache maintenance of read-only memory is given to the owner as if it were a device's.
    ZB2,
    /// Z-B3: a permission fault by DC IVAC on read-only memory counts as spurious.
    ZB3,
    /// Z-B4: a stage-1 walk that must write to read-only memory is given to the owner.
    ZB4,
    /// Z-B5: an emulated access steps over its instruction twice, and one that is an abort writes its data all the same.
    ZB5,
    /// Z-B6: the ring of coalesced writes computes its distances modulo 2^32.
    ZB6,
    /// Z-C1: an MMIO entry counts although slots were made since.
    ZC1,
    /// Z-C2: generations begin anew, and MMIO entries of the round before stay.
    ZC2,
    /// Z-C3: an MMIO entry takes the place of a leaf, and the leaf's translation stays.
    ZC3,
    /// Z-C4: an entry that was taken away between the fault and the walk counts as a malformed one.
    ZC4,
    /// Z-C5: a flush of one page leaves an MMIO entry.
    ZC5,
    /// Z-C6: table pages are freed while somebody may be walking through them.
    ZC6,
    /// Z-C7: the short way of a write fault makes writable what its object shares.
    ZC7,
    /// Z-C8: an MMIO entry counts although an update of the slots is in progress.
    ZC8,
    /// Z-D1: a release removes the frame, though another lease of it lives.
    ZD1,
    /// Z-D2: an invalidation leaves what page-frame caches know of the range.
    ZD2,
    /// Z-D3: a late release takes a lease of the frame's next owner.
    ZD3,
    /// Z-D4: a frame whose removal failed counts as absent.
    ZD4,
    /// Z-D5: a removed frame is not invalidated.
    ZD5,
    /// Z-D6: a conversion takes a cache's lease for over, as a hole may, and does not release it.
    ZD6,
    /// Z-D7: a cache that is for another piece of the same page still says where the piece before lies.
    ZD7,
    /// Z-D8: a lease is handed out before the frame is in the mapping again.
    ZD8,
    /// Z-D9: a frame of private memory is given to somebody else unzeroed.
    ZD9,
    /// Z-D10: a bad frame's entries are taken away before those that were being made are there.
    ZD10,
    /// Z-E1: the tags of a place are gone when its page has come back once.
    ZE1,
    /// Z-E2: a page is there before its tags are cleared.
    ZE2,
    /// Z-E3: of a block, only the first page's tags are cleared.
    ZE3,
    /// Z-E4: a place is free before the page that is read from it is there.
    ZE4,
    /// Z-E5: a copy has the bytes and not the tags.
    ZE5,
    /// Z-E6: pages become one by their bytes, and their tags are not compared.
    ZE6,
    /// Z-E7: an entry for a device's addresses is one of Normal memory, where a slot showed memory before.
    ZE7,
    /// Z-E8: a swap device is removed when each of its pages is in some frame, though another sharer's word still names the place.
    ZE8,
    /// Z-G1: a write goes through a shared node without copying the path.
    ZG1,
    /// Z-G2: the difference of two relatives passes over what was written in one part of a shared block.
    ZG2,
    /// Z-G3: two pages are compared before writes to them are kept out, and then become one.
    ZG3,
    /// Z-G4: a fork shares memory while faults that it does not know of are still publishing.
    ZG4,
    /// Z-G5: tables that a fork detached are freed while somebody may stand in them.
    ZG5,
    /// Z-F1: the generation moves, and the update goes on, before the grace period is over.
    ZF1,
    /// Z-F2: an update that is given up leaves its slot invalid.
    ZF2,
    /// Z-F3: the dirty log is cleared before the pages are write-protected again.
    ZF3,
    /// Z-F4: the end of what a ring entry names wraps, and is taken for a part of the slot.
    ZF4,
    /// Z-F7: bits of the dirty log are taken while faults go on, and one of them publishes after.
    ZF7,
    /// Z-F5: VMIDs are given out again without a flush.
    ZF5,
    /// Z-F6: an update of flags alone unmaps the slot.
    ZF6,
    /// Z-X1, in no specification: a block is as large as its object allows, whatever its slot says.
    ZX1,
    /// Z-X2, in no specification: an entry is as writable as its object allows, whatever its slot says.
    ZX2,
    /// Z-X3, in no specification: a page-frame cache is activated and is not among those that invalidations look at.
    ZX3,
    /// Z-X4, in no specification: a frame that was kept is used without asking whether anything has moved since.
    ZX4,
    /// Z-X5, in no specification: what a walk read before its tables were protected is put into the shadow tables that it needed.
    ZX5,
    /// Z-X6, in no specification: shadow tables are compared before the flush that keeps other CPUs from storing to what they show.
    ZX6,
    /// Z-X7, in no specification: an invalidation of the second stage leaves shadow entries.
    ZX7,
    /// Z-X8, in no specification: the second try of a shadow fault goes by what the first has read, whatever has changed since.
    ZX8,
    /// Z-X9, in no specification: a way comes to a shadow table that is there, and what the guest has changed in it meanwhile stays.
    ZX9,
    /// Z-X10, in no specification: a walk counts that was made before the flush which keeps other CPUs from storing to what it read.
    ZX10,
    /// Z-X11, in no specification: a load of the root leaves what the vCPU knows to be no memory.
    ZX11,
    /// Z-X12, in no specification: a root whose shadow is there is loaded without comparing what hangs from it.
    ZX12,
}

std::thread_local! {
    static PLANTED: Cell<u128> = const { Cell::new(0) };
}

/// Switches exactly these bugs on, on this thread.
pub fn plant(bugs: &[Bug]) {
    PLANTED.set(bugs.iter().fold(0, |set, bug| set | 1u128 << *bug as u8));
}

/// Whether `bug` is switched on, on this thread.
#[inline]
pub fn is_planted(bug: Bug) -> bool {
    PLANTED.get() & 1u128 << bug as u8 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_planted_is() {
        plant(&[Bug::ZA3, Bug::ZF6]);
        assert!(crate::planted!(ZA3) && crate::planted!(ZF6) && !crate::planted!(ZA1));
        plant(&[]);
        assert!(!crate::planted!(ZA3));
    }
}
