//! Instructions that a vCPU was stopped in before.
//!
//! Purpose: a driver touches its device by a few instructions, again and again. To find out anew each time what they are, the guest's
//! tables are walked to their bytes, and these decoded. What both found depends on few words of memory: the entries that the walk
//! used, and the bytes. As long as these are the same, so is the instruction.
//!
//! Protocol: after an instruction was found, [`Memo::keep`] with the words that it depends on, by where they are in the machine, and with
//! whatever says that they are still there. [`Memo::recall`] loads them all again, each time, and compares. So nothing that the guest
//! does to its tables or its code has to be noticed, and nothing is older than by a walk.
//!
//! Invariants: an instruction is recalled only if each of its words holds, at some moment of the call, what it held when it was found,
//! in the same state of the processor ([`Place`]). Nothing allocates.
//!
//! Known holes: [`WAYS`] instructions at a time, each in one place of the memo. Not kept: code across two pages, and what is walked by
//! entries of 32 bits or page-directory pointers (`Mode::Bits32`, `Mode::Pae`).

use entresol_addr::Hpa;

use super::Instruction;

/// Instructions that are kept.
pub const WAYS: usize = 8;
/// Words that one depends on: five entries, and those that 15 bytes may touch.
pub const MOST_WORDS: usize = 8;

/// Where the processor was, and all of its state that says what is fetched there, and how it is decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// RIP.
    pub rip: u64,
    /// The code segment's base.
    pub base: u64,
    /// CR3.
    pub root: u64,
    /// CR0.
    pub cr0: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// The code segment's attributes.
    pub attributes: u16,
    /// Whether it is user code.
    pub user: bool,
}

/// A word of the machine's memory, aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Where.
    pub at: Hpa,
    /// What it holds.
    pub value: u64,
}

struct Known<K> {
    place: Place,
    /// Says whether the words are where they were.
    kept: K,
    words: [Held; MOST_WORDS],
    count: usize,
    instruction: Instruction,
}

/// What one vCPU keeps.
pub struct Memo<K>([Option<Known<K>>; WAYS]);

impl<K> Default for Memo<K> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K> Memo<K> {
    /// Nothing.
    pub const fn new() -> Self {
        Self([const { None }; WAYS])
    }

    /// The instruction at `place`, if it is known and nothing that it depends on has changed: `still` answers for what `keep` was given,
    /// `load` loads a word.
    #[inline]
    pub fn recall(
        &self,
        place: &Place,
        still: impl FnOnce(&K) -> bool,
        mut load: impl FnMut(Hpa) -> u64,
    ) -> Option<&Instruction> {
        let known = self.0[way(place)].as_ref().filter(|known| known.place == *place && still(&known.kept))?;
        let same = known.words[..known.count].iter().all(|word| load(word.at) == word.value);
        same.then_some(&known.instruction)
    }

    /// At `place` is `instruction`, as long as `words` hold what they do. More than [`MOST_WORDS`] are not kept.
    pub fn keep(&mut self, place: &Place, kept: K, words: impl IntoIterator<Item = Held>, instruction: &Instruction) {
        let mut known = Known {
            place: *place,
            kept,
            words: [Held { at: Hpa::new(0), value: 0 }; MOST_WORDS],
            count: 0,
            instruction: *instruction,
        };
        for word in words {
            let Some(free) = known.words.get_mut(known.count) else { return };
            *free = word;
            known.count += 1;
        }
        self.0[way(place)] = Some(known);
    }
}

/// Where an instruction is kept. Neighbours have different places, and so have those that are alike in neighbouring functions.
const fn way(place: &Place) -> usize {
    (place.rip ^ place.rip >> 3 ^ place.rip >> 6 ^ place.rip >> 12) as usize % WAYS
}
