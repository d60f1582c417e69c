//! The hypervisor's own mapping: which frames are in it, and which of those that are not a CPU may translate all the same.
//!
//! Rules: an entry that is taken away may stay in any CPU's translation caches, by speculation alone, until an invalidation
//! that began after it has completed (Arm DDI 0487 D8.14); an entry that was not there is in none. So coming back needs nothing.
//!
//! Known holes: windows are whole operations of their CPU, so that their own entries are never seen.

use std::collections::BTreeMap;

use entresol_addr::{Pfn, PfnRange};

use super::config::MAX_CPUS;
use super::tlb::Stamp;

/// A frame that is not in the mapping.
#[derive(Clone, Copy, Debug)]
struct Absent {
    since: Stamp,
    /// No CPU translates to it any more.
    flushed: bool,
}

/// The mapping.
#[derive(Debug, Default)]
pub struct Own {
    absent: BTreeMap<u64, Absent>,
    pending: [Vec<(PfnRange, Stamp)>; MAX_CPUS],
}

impl Own {
    /// Entries are taken away.
    pub fn unmap(&mut self, frames: PfnRange, now: Stamp) {
        for pfn in frames.start().get()..frames.end().get() {
            self.absent.insert(pfn, Absent { since: now, flushed: false });
        }
    }

    /// Entries are there again.
    pub fn map(&mut self, frames: PfnRange) {
        self.absent.retain(|pfn, _| !frames.contains(Pfn::new(*pfn)));
    }

    /// `cpu` begins an invalidation.
    pub fn begin(&mut self, cpu: usize, frames: PfnRange, now: Stamp) {
        self.pending[cpu].push((frames, now));
    }

    /// What `cpu` has begun is complete.
    pub fn complete(&mut self, cpu: usize) {
        for (frames, began) in std::mem::take(&mut self.pending[cpu]) {
            let range = frames.start().get()..frames.end().get();
            let covered = self.absent.range_mut(range).filter(|(_, absent)| absent.since < began);
            covered.for_each(|(_, absent)| absent.flushed = true);
        }
    }

    /// Whether the frame is in the mapping.
    pub fn is_mapped(&self, pfn: Pfn) -> bool {
        !self.absent.contains_key(&pfn.get())
    }

    /// Whether any frame is not.
    pub fn is_used(&self) -> bool {
        !self.absent.is_empty()
    }

    /// A frame that is not in the mapping, and that a CPU may translate all the same.
    pub fn lingering(&self) -> Option<Pfn> {
        self.absent.iter().find(|(_, absent)| !absent.flushed).map(|(pfn, _)| Pfn::new(*pfn))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_lingers_until_an_invalidation_that_began_later_is_complete() {
        let frames = PfnRange::new(Pfn::new(8), 2).unwrap();
        let mut own = Own::default();
        own.begin(0, frames, 1);
        own.unmap(frames, 2);
        own.complete(0);
        assert!(!own.is_mapped(Pfn::new(9)) && own.is_mapped(Pfn::new(10)));
        assert_eq!(own.lingering(), Some(Pfn::new(8)), "it began too early");
        own.begin(1, PfnRange::single(Pfn::new(8)), 3);
        own.complete(0);
        assert_eq!(own.lingering(), Some(Pfn::new(8)), "another CPU's is not complete");
        own.complete(1);
        assert_eq!(own.lingering(), Some(Pfn::new(9)));
        own.map(frames);
        assert!(own.lingering().is_none() && !own.is_used());
    }
}
