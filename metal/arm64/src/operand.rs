//! Operands of TLB invalidations by intermediate physical address: pure arithmetic, tested on any host.
//!
//! Source: Arm DDI 0487 D8.16.4 (TLBI IPAS2E1IS), D8.16.5 (range operations), C5.5 for the operands' fields.

use entresol_addr::{Gfn, GfnRange};

/// Frames above which a whole VMID is cheaper to invalidate than page by page.
const MOST_SINGLES: u64 = 64;
/// Frames that the range operations reach with one sweep: (31 + 1) << (5 * 3 + 1).
const MOST_FRAMES: u64 = 1 << 21;

/// Operand of IPAS2E1IS and IPAS2LE1IS: IPA\[51:12\] in bits 39:0, no level hint.
#[inline]
pub const fn single(gfn: Gfn) -> u64 {
    gfn.get() & ((1 << 40) - 1)
}

/// One instruction of a range invalidation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// IPAS2E1IS with this operand.
    Single(u64),
    /// RIPAS2E1IS with this operand.
    Range(u64),
}

/// The instructions that invalidate a range, or `None` if the whole VMID should be.
pub fn steps(range: GfnRange, has_ranges: bool) -> Option<Steps> {
    let most = if has_ranges { MOST_FRAMES } else { MOST_SINGLES };
    (range.count() <= most).then_some(Steps { at: range.start(), left: range.count(), has_ranges })
}

/// Iterator of [`steps`].
#[derive(Clone, Debug)]
pub struct Steps {
    at: Gfn,
    left: u64,
    has_ranges: bool,
}

/// RIPAS2E1IS: TG 47:46 (0b01: 4 KiB), SCALE 45:44, NUM 43:39, BaseADDR 36:0; it covers (NUM + 1) << (5 * SCALE + 1).
const fn range_operand(at: Gfn, scale: u64, num: u64) -> u64 {
    0b01 << 46 | scale << 44 | num << 39 | at.get() & ((1 << 37) - 1)
}

impl Iterator for Steps {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        if self.left == 0 {
            return None;
        }
        let scale = if self.left < 2 || !self.has_ranges { None } else { Some(((self.left.ilog2() - 1) / 5).min(3)) };
        let (step, frames) = match scale {
            None => (Step::Single(single(self.at)), 1),
            Some(scale) => {
                let units = (self.left >> (5 * scale + 1)).min(32);
                (Step::Range(range_operand(self.at, scale.into(), units - 1)), units << (5 * scale + 1))
            }
        };
        self.at = self.at.offset(frames);
        self.left -= frames;
        Some(step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(step: Step) -> (u64, u64) {
        match step {
            Step::Single(operand) => (operand, 1),
            Step::Range(operand) => {
                assert_eq!(operand >> 46, 1, "4 KiB granule");
                let (scale, num) = (operand >> 44 & 3, operand >> 39 & 0x1f);
                (operand & ((1 << 37) - 1), (num + 1) << (5 * scale + 1))
            }
        }
    }

    #[test]
    fn steps_cover_the_range_exactly_and_in_order() {
        for has_ranges in [false, true] {
            for count in (0..200).chain([511, 512, 513, 4096, 99_999, (1 << 21) - 1, 1 << 21]) {
                let range = GfnRange::new(Gfn::new(0x12_3457), count).unwrap();
                let Some(steps) = steps(range, has_ranges) else {
                    assert!(!has_ranges && count > MOST_SINGLES);
                    continue;
                };
                let mut at = range.start().get();
                let mut number = 0;
                for step in steps {
                    let (start, covered) = frames(step);
                    assert_eq!(start, at, "{count} {has_ranges}");
                    at += covered;
                    number += 1;
                }
                assert_eq!(at, range.end().get());
                assert!(!has_ranges || number <= 5, "{number} steps for {count} frames");
            }
        }
    }

    #[test]
    fn what_is_too_large_is_left_to_the_vmid() {
        let frames = |count| GfnRange::new(Gfn::new(0), count).unwrap();
        assert!(steps(frames(MOST_SINGLES + 1), false).is_none());
        assert!(steps(frames(MOST_FRAMES + 1), true).is_none());
    }

    #[test]
    fn the_address_is_shifted_to_a_frame_number() {
        assert_eq!(single(Gfn::new(0x4_0000)), 0x4_0000);
    }
}
