//! The most urgent few of many interrupts.
//!
//! Purpose: list registers are few; a guest decides how many interrupts compete for them. Memory is bounded by the
//! number of list registers, time by the number of competitors.

use super::lr::MAX_LIST_REGISTERS;

/// One competitor. `rank` orders: lower is more urgent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Candidate {
    rank: u16,
    /// The interrupt.
    pub(super) intid: u16,
}

impl Candidate {
    /// Ordered by whether its group can be signalled at all, then by priority, then by INTID.
    pub(super) const fn new(intid: u16, priority: u8, masked: bool) -> Self {
        Self { rank: (masked as u16) << 8 | priority as u16, intid }
    }
}

/// The most urgent candidates, in order, and how many there were.
#[derive(Debug, Default)]
pub(super) struct MostUrgent {
    kept: [Candidate; MAX_LIST_REGISTERS],
    total: usize,
}

impl MostUrgent {
    /// Enters a candidate.
    pub(super) fn offer(&mut self, candidate: Candidate) {
        let kept = self.total.min(MAX_LIST_REGISTERS);
        self.total += 1;
        let place = self.kept[..kept].partition_point(|other| *other < candidate);
        if place < MAX_LIST_REGISTERS {
            let end = (kept + 1).min(MAX_LIST_REGISTERS);
            self.kept[place..end].rotate_right(1);
            self.kept[place] = candidate;
        }
    }

    /// How many were offered.
    pub(super) fn total(&self) -> usize {
        self.total
    }

    /// The first `count`, most urgent first.
    pub(super) fn first(&self, count: usize) -> impl Iterator<Item = u16> {
        self.kept[..count.min(self.total)].iter().map(|candidate| candidate.intid)
    }
}
