//! Which descriptors a guest's stage 1 reads for an address.
//!
//! Purpose: AT says that stage 2 stopped a walk, but not where (PAR_EL1 has no intermediate address then). Whoever has to
//! bring the tables into the second stage follows the walk in software, descriptor by descriptor; what the walk *means*,
//! permissions and attributes, stays the hardware's to say, by asking it again.
//!
//! Source: Arm DDI 0487 D8.2 (translation process, granules, initial level), D8.3 (descriptors), D24.2 TCR_EL1, TTBR0_EL1.
//!
//! Invariants: at most [`MOST_LEVELS`] descriptors are visited, whatever registers and tables hold.
//!
//! Known holes: output addresses above 48 bits (FEAT_LPA, FEAT_LPA2) are not composed; no guest here has so many.

use entresol_addr::Gpa;

/// Most descriptors of one walk: levels -1 to 3.
pub const MOST_LEVELS: usize = 5;
/// The level of pages.
const LAST_LEVEL: i8 = 3;

/// The registers of the EL1&0 translation regime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Regime {
    /// TCR_EL1.
    pub tcr: u64,
    /// TTBR0_EL1 and TTBR1_EL1.
    pub ttbr: [u64; 2],
    /// SCTLR_EL1.EE: tables are big-endian.
    pub big_endian: bool,
}

/// Address bits of a descriptor and of TTBRn_EL1, 47:1.
const ADDRESS: u64 = 0x0000_ffff_ffff_fffe;
const VALID: u64 = 1 << 0;
/// A table, or a page at the last level.
const TABLE: u64 = 1 << 1;
/// Bit 55 of an address selects the half (D8.2.4).
const UPPER: u64 = 1 << 55;

impl Regime {
    /// TxSZ and the logarithm of the granule, by half. Reserved granules are taken as 4 KiB.
    const fn shape(&self, upper: bool) -> (u32, u32) {
        let (size, granule) =
            if upper { (self.tcr >> 16, (self.tcr >> 30) & 3) } else { (self.tcr, (self.tcr >> 14) & 3) };
        let granule = match (upper, granule) {
            (false, 1) | (true, 3) => 16,
            (false, 2) | (true, 1) => 14,
            _ => 12,
        };
        (size as u32 & 0x3f, granule)
    }

    /// Follows the walk of `address`: `visit` gets the address of each descriptor with its level, -1 to 3, and says what
    /// the eight bytes there are, or that the walk ends.
    pub fn walk(&self, address: u64, mut visit: impl FnMut(Gpa, i8) -> Option<[u8; 8]>) {
        let upper = address & UPPER != 0;
        let (unused, granule) = self.shape(upper);
        let stride = granule - 3;
        let bits = (64 - unused).clamp(granule + 1, 52);
        let levels = (bits - granule).div_ceil(stride);
        // The first table has only the entries that are left for it.
        let first = bits - granule - (levels - 1) * stride;
        let base = self.ttbr[upper as usize] & ADDRESS;
        let mut table = base & !((8 << first) - 1);
        for below in (0..levels).rev().take(MOST_LEVELS) {
            let width = if below == levels - 1 { first } else { stride };
            let index = address >> (granule + below * stride) & ((1 << width) - 1);
            let Some(bytes) = visit(Gpa::new(table | (index * 8)), LAST_LEVEL - below as i8) else { return };
            let descriptor = if self.big_endian { u64::from_be_bytes(bytes) } else { u64::from_le_bytes(bytes) };
            if descriptor & VALID == 0 || descriptor & TABLE == 0 {
                return;
            }
            table = descriptor & ADDRESS & !((1 << granule) - 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    /// T0SZ 25 and T1SZ 16, 4 KiB both; T0SZ 16 and T1SZ 17 of 64 KiB and 16 KiB.
    const SMALL: u64 = 25 | 16 << 16 | 2 << 30;
    const LARGE: u64 = 16 | 1 << 14 | 17 << 16 | 1 << 30;

    fn regime(tcr: u64) -> Regime {
        Regime { tcr, ttbr: [0x4000_0000 | 0xabcd << 48 | 1, 0x5000_0000], big_endian: false }
    }

    /// Addresses of the descriptors if each leads to the table at `next`.
    fn visits(regime: Regime, address: u64, mut next: u64, end: u64) -> Vec<u64> {
        let mut all = Vec::new();
        let mut levels = Vec::new();
        regime.walk(address, |gpa, level| {
            all.push(gpa.get());
            levels.push(level);
            next += 0x1_0000;
            let descriptor = next | if all.len() as u64 == end { 1 } else { 3 };
            Some(if regime.big_endian { descriptor.to_be_bytes() } else { descriptor.to_le_bytes() })
        });
        assert!(levels.windows(2).all(|pair| pair[1] == pair[0] + 1));
        assert!(end != 0 || levels.last() == Some(&LAST_LEVEL));
        all
    }

    #[test]
    fn levels_and_indices_follow_size_and_granule() {
        // 39 bits of 4 KiB: levels 1, 2, 3.
        let address = 3 << 30 | 5 << 21 | 7 << 12 | 0x123;
        assert_eq!(visits(regime(SMALL), address, 0, 0), [0x4000_0018, 0x1_0028, 0x2_0038]);
        // The upper half, 48 bits: levels 0 to 3. A tag in the top byte says nothing.
        let address = 0xff << 56 | 0xff << 48 | 1 << 39 | 3 << 30 | 5 << 21 | 7 << 12;
        let expected = [0x5000_0008, 0x1_0018, 0x2_0028, 0x3_0038];
        assert_eq!(visits(regime(SMALL), address, 0, 0), expected);
        assert_eq!(visits(regime(SMALL), address & !(0xff << 56) | 0x80 << 48, 0, 0), expected);
        // 48 bits of 64 KiB: six bits at level 1, then 2 and 3.
        let address = 63 << 42 | 5 << 29 | 7 << 16;
        assert_eq!(visits(regime(LARGE), address, 0, 0), [0x4000_0000 + 63 * 8, 0x1_0028, 0x2_0038]);
        // 47 bits of 16 KiB: levels 1 to 3 of eleven bits each.
        let address = 0xffff << 48 | 1 << 47 | 2047 << 36 | 5 << 25 | 7 << 14;
        assert_eq!(visits(regime(LARGE), address, 0, 0), [0x5000_0000 + 2047 * 8, 0x1_0028, 0x2_0038]);
    }

    #[test]
    fn a_block_and_an_invalid_descriptor_end_it() {
        let address = 3 << 30 | 5 << 21;
        assert_eq!(visits(regime(SMALL), address, 0, 2).len(), 2);
        let mut count = 0;
        regime(SMALL).walk(address, |_, _| {
            count += 1;
            Some([2, 0, 0, 0, 0, 0, 0, 0])
        });
        assert_eq!(count, 1);
    }

    #[test]
    fn tables_may_be_big_endian() {
        let big = Regime { big_endian: true, ..regime(SMALL) };
        assert_eq!(visits(big, 3 << 30, 0, 0), visits(regime(SMALL), 3 << 30, 0, 0));
    }

    proptest! {
        #[test]
        fn any_registers_and_tables_make_a_short_walk(tcr: u64, low: u64, high: u64, address: u64, descriptor: u64, big: bool) {
            let regime = Regime { tcr, ttbr: [low, high], big_endian: big };
            let mut count = 0;
            regime.walk(address, |gpa, level| {
                count += 1;
                assert!((-1..=LAST_LEVEL).contains(&level));
                assert!(gpa.get() >> 48 == 0 && gpa.get() % 8 == 0);
                Some((descriptor | 3 | 3 << 56).to_le_bytes())
            });
            prop_assert!((1..=MOST_LEVELS).contains(&count));
        }
    }
}
