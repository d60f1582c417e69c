//! Bytes that are read as operations. Every byte string is a sequence; what is missing at the end is zero.

/// Reads an input from the front.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// An input from its beginning.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether nothing is left.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte, or zero.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// The next byte as a number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        u64::from(self.byte()) % limit
    }

    /// The next byte as one of `choices`, of which there is one.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// The lowest bit of the next byte.
    pub fn bit(&mut self) -> bool {
        self.byte() & 1 != 0
    }
}
