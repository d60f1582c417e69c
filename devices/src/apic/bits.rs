//! 256 bits, one for each vector, as IRR, ISR and TMR have them: eight registers of 32.

use serde::{Deserialize, Serialize};

/// A set of vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Vectors([u32; 8]);

impl Vectors {
    pub const NONE: Self = Self([0; 8]);

    pub fn set(&mut self, vector: u8, on: bool) {
        let word = &mut self.0[usize::from(vector / 32)];
        let bit = 1 << (vector % 32);
        *word = if on { *word | bit } else { *word & !bit };
    }

    pub fn has(&self, vector: u8) -> bool {
        self.0[usize::from(vector / 32)] >> (vector % 32) & 1 != 0
    }

    /// The most urgent: vectors are priorities.
    pub fn highest(&self) -> Option<u8> {
        let (index, word) = self.0.iter().enumerate().rev().find(|(_, word)| **word != 0)?;
        Some(index as u8 * 32 + 31 - word.leading_zeros() as u8)
    }

    /// One of its registers, 0–7.
    pub fn register(&self, index: usize) -> u32 {
        self.0.get(index).copied().unwrap_or_default()
    }
}
