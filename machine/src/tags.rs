//! The allocation tags of one frame, as a value.
//!
//! Source: Arm DDI 0487 D10.1 (memory tagging): four bits for each granule of sixteen bytes.

use entresol_addr::PAGE_SIZE;

/// Bytes that share a tag.
pub const GRANULE: u64 = 16;

const BITS: usize = 4;
const PER_WORD: usize = u64::BITS as usize / BITS;

/// The tags of a 4 KiB frame, 128 bytes: granule `g` in bits `4 * (g % 16)` of word `g / 16`, as LDGM and STGM have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tags(pub [u64; Self::WORDS]);

impl Tags {
    /// Granules of a frame.
    pub const GRANULES: usize = (PAGE_SIZE / GRANULE) as usize;
    /// Words that hold their tags.
    pub const WORDS: usize = Self::GRANULES / PER_WORD;
    /// All zero.
    pub const ZERO: Self = Self([0; Self::WORDS]);

    /// Bytes that they are packed into.
    pub const BYTES: usize = Self::WORDS * size_of::<u64>();

    /// Two granules to a byte, the lower in the low four bits.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        for (to, word) in bytes.chunks_exact_mut(size_of::<u64>()).zip(self.0) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// What [`Self::to_bytes`] has packed.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let mut tags = Self::ZERO;
        for (word, from) in tags.0.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*from);
        }
        tags
    }

    /// The tag of granule `granule` (modulo 256), 0–15.
    #[inline]
    pub const fn get(&self, granule: usize) -> u8 {
        let granule = granule % Self::GRANULES;
        (self.0[granule / PER_WORD] >> (granule % PER_WORD * BITS)) as u8 & 0xf
    }

    /// Gives granule `granule` (modulo 256) the low four bits of `tag`.
    #[inline]
    pub const fn set(&mut self, granule: usize, tag: u8) {
        let granule = granule % Self::GRANULES;
        let shift = granule % PER_WORD * BITS;
        let word = &mut self.0[granule / PER_WORD];
        *word = *word & !(0xf << shift) | (tag as u64 & 0xf) << shift;
    }
}

const _: () = assert!(size_of::<Tags>() == 128);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_granule_has_a_tag_of_its_own() {
        let mut tags = Tags::ZERO;
        for granule in 0..Tags::GRANULES {
            tags.set(granule, (granule * 7) as u8);
        }
        for granule in 0..Tags::GRANULES {
            assert_eq!(tags.get(granule), (granule * 7) as u8 & 0xf);
        }
        let bytes = tags.to_bytes();
        assert_eq!((bytes[0], bytes[127], Tags::from_bytes(&bytes)), (0x70, 0x92, tags));
        tags.set(17, 0xff);
        assert_eq!((tags.get(16), tags.get(17), tags.get(18)), (0, 0xf, 14));
        assert_eq!(tags.0[1] >> 4 & 0xf, 0xf, "granule 17 is the second of the second word");
    }
}
