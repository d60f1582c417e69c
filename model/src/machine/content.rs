//! What one page holds: mostly one value all over, and a few words that differ.
//!
//! Zeroing, poisoning and copying a page are then as cheap as a word, which is what makes a schedule cost microseconds.

use arrayvec::ArrayVec;
use entresol_machine::Word;

/// Words of a page.
pub const WORDS: u16 = Word::PER_FRAME;

/// Words that may differ from the fill before all of them are kept.
const FEW: usize = 4;

/// The 512 words of one page.
#[derive(Clone, Debug)]
pub struct Content {
    fill: u64,
    few: ArrayVec<(u16, u64), FEW>,
    /// All words, once more than a few differ.
    all: Option<Box<[u64]>>,
}

impl Content {
    /// A page of one value.
    pub fn filled(fill: u64) -> Self {
        Self { fill, few: ArrayVec::new(), all: None }
    }

    /// Word `index`, below 512.
    pub fn get(&self, index: u16) -> u64 {
        if let Some(all) = &self.all {
            return all[usize::from(index)];
        }
        self.few.iter().find(|(at, _)| *at == index).map_or(self.fill, |(_, value)| *value)
    }

    /// Stores a word.
    pub fn set(&mut self, index: u16, value: u64) {
        if let Some(all) = &mut self.all {
            all[usize::from(index)] = value;
            return;
        }
        if let Some((_, old)) = self.few.iter_mut().find(|(at, _)| *at == index) {
            *old = value;
        } else if value != self.fill && self.few.try_push((index, value)).is_err() {
            let mut all: Box<[u64]> = (0..WORDS).map(|at| self.get(at)).collect();
            all[usize::from(index)] = value;
            self.all = Some(all);
        }
    }

    /// Words that are not `value`, with their places.
    pub fn other_than(&self, value: u64) -> Vec<(u16, u64)> {
        if self.all.is_none() && self.fill == value {
            return self.few.iter().copied().filter(|(_, word)| *word != value).collect();
        }
        (0..WORDS).map(|at| (at, self.get(at))).filter(|(_, word)| *word != value).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_page_is_an_array(fill in 0u64..3, stores in prop::collection::vec((0u16..512, 0u64..3), 0..40)) {
            let mut page = Content::filled(fill);
            let mut naive = vec![fill; 512];
            for (index, value) in stores {
                page.set(index, value);
                naive[usize::from(index)] = value;
            }
            for index in 0..512 {
                prop_assert_eq!(page.get(index), naive[usize::from(index)]);
            }
            let others = page.other_than(0);
            prop_assert_eq!(others.len(), naive.iter().filter(|word| **word != 0).count());
        }
    }
}
