//! The stacks of a CPU, and who called whom on them.
//!
//! Purpose: a report of a bug says which functions led to it, and whether a stack overflowed, whatever the registers hold.
//!
//! A CPU's area: a guard page, the stacks on which exceptions are reported, a guard page, the main stack. The guards are mapped to
//! nothing.
//!
//! Invariants: pure; a backtrace ends, since frames grow towards higher addresses.

use entresol_addr::PAGE_SIZE;

use crate::memory::Region;

/// The parts of a CPU's stack area that are mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackArea {
    /// For reports.
    pub emergency: Region,
    /// For everything else.
    pub main: Region,
}

impl StackArea {
    /// The area of `size` bytes from `start` on, `emergency` of them for reports.
    pub const fn new(start: u64, size: u64, emergency: u64) -> Self {
        let emergency = Region { start: start + PAGE_SIZE, end: start + PAGE_SIZE + emergency };
        Self { emergency, main: Region { start: emergency.end + PAGE_SIZE, end: start + size } }
    }

    /// Whether a stack that overflowed reaches `address`.
    pub const fn is_guard(&self, address: u64) -> bool {
        let first = Region { start: self.emergency.start - PAGE_SIZE, end: self.emergency.start };
        let second = Region { start: self.emergency.end, end: self.main.start };
        first.contains(address) || second.contains(address)
    }

    /// Whether the two words of a frame record at `address` lie on one of its stacks.
    pub fn has_record(&self, address: u64) -> bool {
        let inside = |part: &Region| part.contains(address) && part.contains(address.saturating_add(15));
        address.is_multiple_of(8) && [self.main, self.emergency].iter().any(inside)
    }
}

/// Addresses in functions, from frame record to frame record: the caller's record, and where it goes on.
pub struct Trace<R> {
    /// Where it begins.
    pub first: u64,
    /// The frame pointer there.
    pub frame_pointer: u64,
    /// Bytes to go back from where a caller goes on, so that the address is in its call.
    pub back: u64,
    /// Reads a record, if it is one.
    pub read: R,
}

impl<R: FnMut(u64) -> Option<[u64; 2]>> Iterator for Trace<R> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let address = core::mem::take(&mut self.first);
        if address == 0 {
            return None;
        }
        if let Some([next, goes_on]) = (self.read)(self.frame_pointer) {
            // Anything but a higher one is the end, or nonsense.
            self.frame_pointer = if next > self.frame_pointer { next } else { 0 };
            self.first = goes_on.saturating_sub(self.back);
        }
        Some(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    const AREA: StackArea = StackArea::new(0x10_0000, 0x2_0000, 0x8000);

    #[test]
    fn an_area_has_two_stacks_above_guards() {
        assert_eq!(AREA.emergency, Region { start: 0x10_1000, end: 0x10_9000 });
        assert_eq!(AREA.main, Region { start: 0x10_a000, end: 0x12_0000 });
        for (address, guard) in
            [(0xf_ffff, false), (0x10_0000, true), (0x10_0fff, true), (0x10_1000, false), (0x10_8fff, false)]
        {
            assert_eq!(AREA.is_guard(address), guard, "{address:#x}");
        }
        assert!(AREA.is_guard(0x10_9000) && AREA.is_guard(0x10_9fff) && !AREA.is_guard(0x10_a000));
    }

    #[test]
    fn a_record_lies_on_one_stack() {
        for (address, record) in [
            (0x10_a000, true),
            (0x11_fff0, true),
            (0x11_fff8, false),
            (0x10_8ff8, false),
            (0x10_a004, false),
            (0x10_9000, false),
            (0, false),
            (u64::MAX - 7, false),
        ] {
            assert_eq!(AREA.has_record(address), record, "{address:#x}");
        }
    }

    #[test]
    fn a_trace_goes_up_and_ends() {
        let records = [(0x100u64, [0x200u64, 0x4004u64]), (0x200, [0x180, 0x5004]), (0x180, [0x300, 0x6004])];
        let read = |at| records.iter().find(|(address, _)| *address == at).map(|(_, record)| *record);
        let trace = Trace { first: 0x3000, frame_pointer: 0x100, back: 4, read };
        assert_eq!(trace.collect::<Vec<_>>(), [0x3000, 0x4000, 0x5000], "a record below is not followed");
        let nothing = Trace { first: 0x3000, frame_pointer: 7, back: 4, read };
        assert_eq!(nothing.collect::<Vec<_>>(), [0x3000]);
        let looping = Trace { first: 1, frame_pointer: 8, back: 4, read: |at| (at == 8).then_some([8, 9]) };
        assert_eq!(looping.collect::<Vec<_>>(), [1, 5], "a record that names itself is the last");
    }
}
