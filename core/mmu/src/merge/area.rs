//! What a scan remembers of one object: how far it is, and the sum that each page had when it was last read.
//!
//! Shape: a frame of 512 words for each span of 512 frames that had a page to read, found through a list that is made when
//! the object begins to take part.

use alloc::vec::Vec;

use entresol_addr::{Pfn, PfnRange};
use entresol_backing::{ObjectHandle, Order, Supply};
use entresol_machine::{Machine, Word};

use super::{SPAN, has_room};
use crate::OutOfHeap;

pub(super) struct Area {
    object: ObjectHandle,
    /// The frame of each span's sums.
    sums: Vec<Option<Pfn>>,
    /// The first frame of the object that the scan has not looked at in this round.
    pub(super) next: u64,
}

impl Area {
    /// Nothing is remembered of `frames` frames.
    pub(super) fn new(object: ObjectHandle, frames: u64) -> Result<Self, OutOfHeap> {
        let spans = usize::try_from(frames.div_ceil(SPAN)).map_err(|_| OutOfHeap)?;
        let mut sums = Vec::new();
        sums.try_reserve_exact(spans).map_err(|_| OutOfHeap)?;
        sums.resize(spans, None);
        Ok(Self { object, sums, next: 0 })
    }

    pub(super) fn object(&self) -> ObjectHandle {
        self.object
    }

    /// Frames that it holds.
    pub(super) fn frames(&self) -> u64 {
        self.sums.iter().flatten().count() as u64
    }

    /// Makes room for the sums around `frame`; without it nothing is remembered there.
    pub(super) fn make_room<M: Machine>(&mut self, supply: &Supply<'_, M>, frame: u64) {
        let Some(place @ None) = self.sums.get_mut((frame / SPAN) as usize) else { return };
        if has_room(supply.pool)
            && let Ok(pfn) = supply.pool.take(supply.cpu, Order::PAGE)
        {
            supply.machine.zero(PfnRange::single(pfn));
            *place = Some(pfn);
        }
    }

    /// The last sum of the page at `frame`, 0 if there is none.
    pub(super) fn sum<M: Machine>(&self, machine: &M, frame: u64) -> u64 {
        self.word(frame).map_or(0, |word| machine.load(word))
    }

    pub(super) fn remember<M: Machine>(&self, machine: &M, frame: u64, sum: u64) {
        if let Some(word) = self.word(frame) {
            machine.store(word, sum);
        }
    }

    fn word(&self, frame: u64) -> Option<Word> {
        let pfn = self.sums.get((frame / SPAN) as usize).copied().flatten()?;
        Some(Word::new(pfn, (frame % SPAN) as u16))
    }

    /// Forgets all sums.
    pub(super) fn clear(&mut self, give: &mut impl FnMut(Pfn)) {
        self.sums.iter_mut().filter_map(Option::take).for_each(give);
    }
}
