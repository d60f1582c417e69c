//! The simplest machine: host memory, no caches, no TLBs, a log of what was asked.
//!
//! Purpose: unit and property tests of the core on any host. It keeps no stale copies, so it cannot show a missing
//! flush; `model` does. What it can show is what was asked for, in order, through [`FlatMachine::events`].

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use entresol_addr::{Hpa, PAGE_SHIFT, PAGE_SIZE, Pfn, PfnRange};
use entresol_sync::Mutex;

use crate::{Features, Machine, TlbOp, Word};

const WORDS: u64 = Word::PER_FRAME as u64;

/// What the core asked of the machine, besides words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// `zero`.
    Zero(PfnRange),
    /// `copy`, with the number of frames.
    Copy(Pfn, Pfn, u64),
    /// `clean_invalidate_to_poc`.
    Clean(PfnRange),
    /// `invalidate_icache`.
    Icache(PfnRange),
    /// `tlb`.
    Tlb(TlbOp),
    /// `complete`.
    Complete,
    /// A word was published: its place and its new value.
    Word(Word, u64),
}

/// Host memory that answers as a machine; frames `first .. first + count`.
pub struct FlatMachine {
    first: Pfn,
    words: Box<[AtomicU64]>,
    features: Features,
    events: Mutex<Vec<Event>>,
}

impl FlatMachine {
    /// A machine of `count` frames from `first`, filled with a poison pattern so that nobody relies on zero.
    pub fn new(first: Pfn, count: u64, features: Features) -> Self {
        let words = (0..count * WORDS).map(|_| AtomicU64::new(0xdead_dead_dead_dead)).collect();
        Self { first, words, features, events: Mutex::new(Vec::new()) }
    }

    /// The machine of most tests: forced write-back, coherent instruction caches, 16-bit VMIDs.
    pub fn coherent(first: Pfn, count: u64) -> Self {
        let features = Features { forced_write_back: true, coherent_icache: true, physical_bits: 48, vmid_bits: 16 };
        Self::new(first, count, features)
    }

    /// Frames that exist.
    pub fn frames(&self) -> PfnRange {
        PfnRange::new(self.first, self.words.len() as u64 / WORDS).expect("constructed from a range")
    }

    /// Takes the log so far.
    pub fn events(&self) -> Vec<Event> {
        core::mem::take(&mut self.events.lock())
    }

    fn log(&self, event: Event) {
        self.events.lock().push(event);
    }

    fn cell(&self, address: Hpa) -> &AtomicU64 {
        let index = address.get().checked_sub(self.first.base().get()).expect("below the machine's memory") / 8;
        self.words.get(index as usize).expect("above the machine's memory")
    }

    fn page(&self, frame: Pfn) -> &[AtomicU64] {
        let start = (frame.since(self.first) * WORDS) as usize;
        &self.words[start..start + WORDS as usize]
    }
}

// SAFETY: no pointer is made; words are atomics; `complete` has nothing to wait for; features are a constant.
unsafe impl Machine for FlatMachine {
    fn features(&self) -> Features {
        self.features
    }

    fn load(&self, word: Word) -> u64 {
        self.cell(word.address()).load(Ordering::Acquire)
    }

    fn store(&self, word: Word, value: u64) {
        self.cell(word.address()).store(value, Ordering::Release);
        self.log(Event::Word(word, value));
    }

    fn compare_exchange(&self, word: Word, current: u64, new: u64) -> Result<u64, u64> {
        let old = self.cell(word.address()).compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)?;
        self.log(Event::Word(word, new));
        Ok(old)
    }

    fn published(&self) {}

    fn zero(&self, frames: PfnRange) {
        for frame in 0..frames.count() {
            for word in self.page(frames.start().offset(frame)) {
                word.store(0, Ordering::Relaxed);
            }
        }
        self.log(Event::Zero(frames));
    }

    fn copy(&self, from: Pfn, to: Pfn, count: u64) {
        for frame in 0..count {
            for (source, target) in self.page(from.offset(frame)).iter().zip(self.page(to.offset(frame))) {
                target.store(source.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
        self.log(Event::Copy(from, to, count));
    }

    fn read(&self, from: Hpa, to: &mut [u8]) {
        for (byte, address) in to.iter_mut().zip(from.get()..) {
            *byte = self.cell(Hpa::new(address & !7)).load(Ordering::Relaxed).to_le_bytes()[(address % 8) as usize];
        }
    }

    fn write(&self, to: Hpa, from: &[u8]) {
        for (byte, address) in from.iter().zip(to.get()..) {
            let shift = address % 8 * 8;
            let cell = self.cell(Hpa::new(address & !7));
            let merged = |old: u64| Some(old & !(0xff << shift) | u64::from(*byte) << shift);
            cell.fetch_update(Ordering::Relaxed, Ordering::Relaxed, merged).expect("merged is total");
        }
    }

    fn clean_invalidate_to_poc(&self, frames: PfnRange) {
        self.log(Event::Clean(frames));
    }

    fn invalidate_icache(&self, frames: PfnRange) {
        self.log(Event::Icache(frames));
    }

    fn tlb(&self, op: TlbOp) {
        self.log(Event::Tlb(op));
    }

    fn complete(&self) {
        self.log(Event::Complete);
    }
}

const _: () = assert!(PAGE_SIZE == 1 << PAGE_SHIFT && WORDS * 8 == PAGE_SIZE);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_words_are_the_same_memory() {
        let machine = FlatMachine::coherent(Pfn::new(4), 2);
        machine.zero(machine.frames());
        machine.write(Hpa::new(0x4ffd), &[1, 2, 3, 4, 5]);
        let mut back = [0; 7];
        machine.read(Hpa::new(0x4ffc), &mut back);
        assert_eq!(back, [0, 1, 2, 3, 4, 5, 0]);
        assert_eq!(machine.load(Word::new(Pfn::new(5), 0)), 0x0504);
    }

    #[test]
    #[should_panic(expected = "above the machine's memory")]
    fn a_frame_outside_is_refused() {
        FlatMachine::coherent(Pfn::new(4), 2).load(Word::new(Pfn::new(6), 0));
    }
}
