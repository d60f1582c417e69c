//! The simplest machine: host memory, no caches, no TLBs, a log of what was asked.
//!
//! Purpose: unit and property tests of the core on any host. It keeps no stale copies, so it cannot show a missing
//! flush; `model` does. What it can show is what was asked for, in order, through [`FlatMachine::events`], and the use of
//! a frame that is not in the hypervisor's own mapping: it panics, as metal would fault.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use entresol_addr::{Hpa, PAGE_SHIFT, PAGE_SIZE, Pfn, PfnRange};
use entresol_sync::Mutex;

use crate::own::{RemoveError, Work, is_own_unit};
use crate::{Features, Machine, Tags, TlbOp, Word};

const WORDS: u64 = Word::PER_FRAME as u64;
const POISON_TAGS: Tags = Tags([0xdead_dead_dead_dead; Tags::WORDS]);

/// What the core asked of the machine, besides words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// `zero`.
    Zero(PfnRange),
    /// `copy`, with the number of frames.
    Copy(Pfn, Pfn, u64),
    /// `clear_tags`.
    ClearTags(PfnRange),
    /// `copy_tags`, with the number of frames.
    CopyTags(Pfn, Pfn, u64),
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
    /// `unmap_own` that did it.
    UnmapOwn(PfnRange),
    /// `map_own`.
    MapOwn(PfnRange),
    /// `through_window`.
    Window(Pfn),
}

/// Host memory that answers as a machine; frames `first .. first + count`.
pub struct FlatMachine {
    first: Pfn,
    words: Box<[AtomicU64]>,
    /// Frames that are not in the hypervisor's own mapping.
    absent: Box<[AtomicBool]>,
    /// How many of the next removals fail.
    failing: AtomicU64,
    tags: Mutex<Box<[Tags]>>,
    features: Features,
    events: Mutex<Vec<Event>>,
}

impl FlatMachine {
    /// A machine of `count` frames from `first`, filled with a poison pattern so that nobody relies on zero.
    pub fn new(first: Pfn, count: u64, features: Features) -> Self {
        let words = (0..count * WORDS).map(|_| AtomicU64::new(0xdead_dead_dead_dead)).collect();
        let absent = (0..count).map(|_| AtomicBool::new(false)).collect();
        let tags = Mutex::new((0..count).map(|_| POISON_TAGS).collect());
        Self { first, words, absent, failing: AtomicU64::new(0), tags, features, events: Mutex::new(Vec::new()) }
    }

    /// The machine of most tests: forced write-back, coherent instruction caches, 16-bit VMIDs.
    pub fn coherent(first: Pfn, count: u64) -> Self {
        let features =
            Features { forced_write_back: true, coherent_icache: true, physical_bits: 48, vmid_bits: 16, tags: true };
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

    /// The next `count` calls of `unmap_own` fail with [`RemoveError::TryAgain`].
    pub fn fail_removals(&self, count: u64) {
        self.failing.store(count, Ordering::Relaxed);
    }

    /// The mark of a frame that is not in the hypervisor's own mapping.
    fn absence(&self, frame: Pfn) -> &AtomicBool {
        let index = frame.get().checked_sub(self.first.get()).expect("below the machine's memory");
        self.absent.get(index as usize).expect("above the machine's memory")
    }

    /// What the hypervisor's own mapping would answer to an access.
    fn reach(&self, frame: Pfn) {
        assert!(
            !self.absence(frame).load(Ordering::Relaxed),
            "frame {frame:#x} is not in the hypervisor's own mapping"
        );
    }

    fn each(frames: PfnRange) -> impl Iterator<Item = Pfn> {
        (0..frames.count()).map(move |offset| frames.start().offset(offset))
    }

    fn read_bytes(&self, from: Hpa, to: &mut [u8]) {
        for (byte, address) in to.iter_mut().zip(from.get()..) {
            *byte = self.cell(Hpa::new(address & !7)).load(Ordering::Relaxed).to_le_bytes()[(address % 8) as usize];
        }
    }

    fn write_bytes(&self, to: Hpa, from: &[u8]) {
        for (byte, address) in from.iter().zip(to.get()..) {
            let shift = address % 8 * 8;
            let cell = self.cell(Hpa::new(address & !7));
            let merged = |old: u64| Some(old & !(0xff << shift) | u64::from(*byte) << shift);
            cell.fetch_update(Ordering::Relaxed, Ordering::Relaxed, merged).expect("merged is total");
        }
    }

    fn fill_with_zero(&self, frame: Pfn) {
        self.page(frame).iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }

    fn copy_page(&self, from: Pfn, to: Pfn) {
        for (source, target) in self.page(from).iter().zip(self.page(to)) {
            target.store(source.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    fn log(&self, event: Event) {
        self.events.lock().push(event);
    }

    fn cell(&self, address: Hpa) -> &AtomicU64 {
        let index = address.get().checked_sub(self.first.base().get()).expect("below the machine's memory") / 8;
        self.words.get(index as usize).expect("above the machine's memory")
    }

    fn numbers(&self, frames: PfnRange) -> core::ops::Range<usize> {
        let start = frames.start().since(self.first) as usize;
        start..start + frames.count() as usize
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
        self.reach(word.frame());
        self.cell(word.address()).load(Ordering::Acquire)
    }

    fn store(&self, word: Word, value: u64) {
        self.reach(word.frame());
        self.cell(word.address()).store(value, Ordering::Release);
        self.log(Event::Word(word, value));
    }

    fn compare_exchange(&self, word: Word, current: u64, new: u64) -> Result<u64, u64> {
        self.reach(word.frame());
        let old = self.cell(word.address()).compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)?;
        self.log(Event::Word(word, new));
        Ok(old)
    }

    fn published(&self) {}

    fn zero(&self, frames: PfnRange) {
        for frame in Self::each(frames) {
            self.reach(frame);
            self.fill_with_zero(frame);
        }
        self.log(Event::Zero(frames));
    }

    fn copy(&self, from: Pfn, to: Pfn, count: u64) {
        for frame in 0..count {
            let (from, to) = (from.offset(frame), to.offset(frame));
            self.reach(from);
            self.reach(to);
            self.copy_page(from, to);
        }
        self.log(Event::Copy(from, to, count));
    }

    fn clear_tags(&self, frames: PfnRange) {
        if self.features.tags {
            self.tags.lock()[self.numbers(frames)].fill(Tags::ZERO);
            self.log(Event::ClearTags(frames));
        }
    }

    fn copy_tags(&self, from: Pfn, to: Pfn, count: u64) {
        if self.features.tags {
            let frames = PfnRange::new(from, count).expect("frames of the machine");
            self.tags.lock().copy_within(self.numbers(frames), to.since(self.first) as usize);
            self.log(Event::CopyTags(from, to, count));
        }
    }

    fn load_tags(&self, frame: Pfn) -> Tags {
        if self.features.tags { self.tags.lock()[frame.since(self.first) as usize] } else { Tags::ZERO }
    }

    fn store_tags(&self, frame: Pfn, tags: &Tags) {
        if self.features.tags {
            self.tags.lock()[frame.since(self.first) as usize] = *tags;
        }
    }

    fn read(&self, from: Hpa, to: &mut [u8]) {
        to.iter().zip(from.get()..).for_each(|(_, address)| self.reach(Hpa::new(address).frame()));
        self.read_bytes(from, to);
    }

    fn write(&self, to: Hpa, from: &[u8]) {
        from.iter().zip(to.get()..).for_each(|(_, address)| self.reach(Hpa::new(address).frame()));
        self.write_bytes(to, from);
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

    fn can_unmap_own(&self) -> bool {
        true
    }

    fn unmap_own(&self, frames: PfnRange) -> Result<(), RemoveError> {
        assert!(is_own_unit(frames), "{frames:?} are no unit of the own mapping");
        let one_less = |left: u64| left.checked_sub(1);
        if self.failing.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok() {
            return Err(RemoveError::TryAgain { pfn: frames.start() });
        }
        for frame in Self::each(frames) {
            assert!(!self.absence(frame).swap(true, Ordering::Relaxed), "frame {frame:#x} was absent already");
        }
        self.log(Event::UnmapOwn(frames));
        Ok(())
    }

    fn map_own(&self, frames: PfnRange) {
        assert!(is_own_unit(frames), "{frames:?} are no unit of the own mapping");
        for frame in Self::each(frames) {
            assert!(self.absence(frame).swap(false, Ordering::Relaxed), "frame {frame:#x} was not absent");
        }
        self.log(Event::MapOwn(frames));
    }

    fn is_mapped_own(&self, frame: Pfn) -> bool {
        !self.absence(frame).load(Ordering::Relaxed)
    }

    fn through_window(&self, frame: Pfn, work: Work<'_>) {
        let place = |at: u16, len: usize| {
            assert!(u64::from(at) + len as u64 <= PAGE_SIZE, "{len} bytes at {at:#x} leave the window");
            Hpa::new(frame.base().get() + u64::from(at))
        };
        match work {
            Work::Read { at, to } => self.read_bytes(place(at, to.len()), to),
            Work::Write { at, from } => self.write_bytes(place(at, from.len()), from),
            Work::Zero => self.fill_with_zero(frame),
            Work::Copy { from } => self.copy_page(from, frame),
        }
        self.log(Event::Window(frame));
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
    fn an_absent_frame_is_reached_by_a_window_only() {
        let machine = FlatMachine::coherent(Pfn::new(512), 512);
        let block = machine.frames();
        machine.zero(block);
        machine.fail_removals(1);
        assert_eq!(machine.unmap_own(block), Err(RemoveError::TryAgain { pfn: block.start() }));
        assert!(machine.is_mapped_own(block.start()));
        machine.unmap_own(block).unwrap();
        let frame = block.start().offset(3);
        machine.through_window(frame, Work::Write { at: 4090, from: b"secret" });
        let mut back = [0; 6];
        machine.through_window(frame, Work::Read { at: 4090, to: &mut back });
        assert_eq!(&back, b"secret");
        machine.map_own(PfnRange::single(frame));
        machine.read(Hpa::new(frame.base().get() + 4090), &mut back);
        assert_eq!(&back, b"secret");
        machine.unmap_own(PfnRange::single(frame)).unwrap();
        assert!(!machine.is_mapped_own(frame));
    }

    #[test]
    #[should_panic(expected = "not in the hypervisor's own mapping")]
    fn an_absent_frame_is_not_read() {
        let machine = FlatMachine::coherent(Pfn::new(512), 512);
        machine.unmap_own(machine.frames()).unwrap();
        machine.load(Word::new(Pfn::new(513), 0));
    }

    #[test]
    #[should_panic(expected = "above the machine's memory")]
    fn a_frame_outside_is_refused() {
        FlatMachine::coherent(Pfn::new(4), 2).load(Word::new(Pfn::new(6), 0));
    }
}
