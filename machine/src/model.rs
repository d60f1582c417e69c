//! A machine made of safe code: how the lab's model implements [`Machine`] without the right to be unsafe.
//!
//! Purpose: [`Machine`] is unsafe to implement because the core hands out memory on its word. A [`Model`] has no memory
//! but its own data structures, and safe code cannot break the promises about other people's references; what is left
//! of them is about values, and a model that gets values wrong is a wrong model, not undefined behaviour. So the step
//! from the one trait to the other is made here, once.
//!
//! The methods are those of [`Machine`]; each knows its caller's place in the source. A model that has no hypervisor's own
//! mapping leaves those about it as they are: nothing can leave it, so nobody asks for the rest.

use entresol_addr::{Hpa, Pfn, PfnRange};

use crate::own::{RemoveError, Work};
use crate::{Features, Machine, Tags, TlbOp, Word};

/// What a model does for each method of [`Machine`].
#[allow(missing_docs, reason = "each is the method of the same name of `Machine`")]
#[allow(clippy::missing_errors_doc, reason = "as above")]
pub trait Model: Sync {
    fn features(&self) -> Features;
    #[track_caller]
    fn load(&self, word: Word) -> u64;
    #[track_caller]
    fn store(&self, word: Word, value: u64);
    #[track_caller]
    fn compare_exchange(&self, word: Word, current: u64, new: u64) -> Result<u64, u64>;
    #[track_caller]
    fn published(&self);
    #[track_caller]
    fn zero(&self, frames: PfnRange);
    #[track_caller]
    fn copy(&self, from: Pfn, to: Pfn, count: u64);
    #[track_caller]
    fn clear_tags(&self, frames: PfnRange);
    #[track_caller]
    fn copy_tags(&self, from: Pfn, to: Pfn, count: u64);
    #[track_caller]
    fn load_tags(&self, frame: Pfn) -> Tags;
    #[track_caller]
    fn store_tags(&self, frame: Pfn, tags: &Tags);
    #[track_caller]
    fn read(&self, from: Hpa, to: &mut [u8]);
    #[track_caller]
    fn write(&self, to: Hpa, from: &[u8]);
    #[track_caller]
    fn clean_invalidate_to_poc(&self, frames: PfnRange);
    #[track_caller]
    fn invalidate_icache(&self, frames: PfnRange);
    #[track_caller]
    fn tlb(&self, op: TlbOp);
    fn can_unmap_own(&self) -> bool {
        false
    }
    #[track_caller]
    fn unmap_own(&self, frames: PfnRange) -> Result<(), RemoveError> {
        Err(RemoveError::Unsplittable { pfn: frames.start() })
    }
    #[track_caller]
    fn map_own(&self, frames: PfnRange) {
        panic!("{frames:x?} are in the mapping: nothing can leave it")
    }
    #[track_caller]
    fn is_mapped_own(&self, _frame: Pfn) -> bool {
        true
    }
    #[track_caller]
    fn through_window(&self, frame: Pfn, _work: Work<'_>) {
        panic!("frame {frame:#x} is in the mapping: it needs no window")
    }
    #[track_caller]
    fn complete(&self);
}

/// A [`Model`] as a [`Machine`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Modelled<T>(pub T);

// SAFETY: 1. `T` is safe code: it reaches no memory but through Rust's own rules. 2. and 3. Models run every CPU on one
// thread, one operation at a time, and say themselves what a guest's hardware may see. 4. `features` is `T`'s promise;
// the core reads it once.
unsafe impl<T: Model> Machine for Modelled<T> {
    fn features(&self) -> Features {
        self.0.features()
    }

    #[track_caller]
    fn load(&self, word: Word) -> u64 {
        self.0.load(word)
    }

    #[track_caller]
    fn store(&self, word: Word, value: u64) {
        self.0.store(word, value);
    }

    #[track_caller]
    fn compare_exchange(&self, word: Word, current: u64, new: u64) -> Result<u64, u64> {
        self.0.compare_exchange(word, current, new)
    }

    #[track_caller]
    fn published(&self) {
        self.0.published();
    }

    #[track_caller]
    fn zero(&self, frames: PfnRange) {
        self.0.zero(frames);
    }

    #[track_caller]
    fn copy(&self, from: Pfn, to: Pfn, count: u64) {
        self.0.copy(from, to, count);
    }

    #[track_caller]
    fn clear_tags(&self, frames: PfnRange) {
        self.0.clear_tags(frames);
    }

    #[track_caller]
    fn copy_tags(&self, from: Pfn, to: Pfn, count: u64) {
        self.0.copy_tags(from, to, count);
    }

    #[track_caller]
    fn load_tags(&self, frame: Pfn) -> Tags {
        self.0.load_tags(frame)
    }

    #[track_caller]
    fn store_tags(&self, frame: Pfn, tags: &Tags) {
        self.0.store_tags(frame, tags);
    }

    #[track_caller]
    fn read(&self, from: Hpa, to: &mut [u8]) {
        self.0.read(from, to);
    }

    #[track_caller]
    fn write(&self, to: Hpa, from: &[u8]) {
        self.0.write(to, from);
    }

    #[track_caller]
    fn clean_invalidate_to_poc(&self, frames: PfnRange) {
        self.0.clean_invalidate_to_poc(frames);
    }

    #[track_caller]
    fn invalidate_icache(&self, frames: PfnRange) {
        self.0.invalidate_icache(frames);
    }

    #[track_caller]
    fn tlb(&self, op: TlbOp) {
        self.0.tlb(op);
    }

    fn can_unmap_own(&self) -> bool {
        self.0.can_unmap_own()
    }

    #[track_caller]
    fn unmap_own(&self, frames: PfnRange) -> Result<(), RemoveError> {
        self.0.unmap_own(frames)
    }

    #[track_caller]
    fn map_own(&self, frames: PfnRange) {
        self.0.map_own(frames);
    }

    #[track_caller]
    fn is_mapped_own(&self, frame: Pfn) -> bool {
        self.0.is_mapped_own(frame)
    }

    #[track_caller]
    fn through_window(&self, frame: Pfn, work: Work<'_>) {
        self.0.through_window(frame, work);
    }

    #[track_caller]
    fn complete(&self) {
        self.0.complete();
    }
}
