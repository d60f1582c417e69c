//! What an owner does with the log of a slot.
//!
//! Words of a log are as in the KVM API: bit `b` of word `w` is page `64 w + b` of the slot.

use core::fmt;
use core::ops::Range;

use entresol_addr::{Gfn, GfnRange};
use entresol_machine::Machine;
use entresol_slot::Slot;
use entresol_sync::{hint, planted};
use entresol_table::Format;

use super::bitmap::{Bitmap, PAGES};
use crate::Invalidation;
use crate::vm::Vm;

/// Words of a log that are taken at once, 1 GiB of pages: faults there wait no longer than for these.
const CHUNK: u64 = 1 << 12;

/// Why an owner's request about a log was refused. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogError {
    /// No such slot.
    Absent {
        /// Its number.
        slot: u16,
    },
    /// The slot does not log.
    NotLogged {
        /// Its number.
        slot: u16,
    },
    /// The buffer is too small for the pages.
    Buffer {
        /// Words that it has.
        words: usize,
        /// Words that the pages need.
        needed: u64,
    },
    /// The first page is not a multiple of 64.
    Unaligned {
        /// The page.
        first: u64,
    },
    /// The number of pages is not a multiple of 64, and they do not end with the slot.
    Partial {
        /// The first page.
        first: u64,
        /// The number.
        count: u64,
        /// Pages of the slot.
        pages: u64,
    },
    /// The pages end after the slot does.
    Outside {
        /// The first page.
        first: u64,
        /// Their number.
        count: u64,
        /// Pages of the slot.
        pages: u64,
    },
    /// No frame for a table, after so many blocks were split.
    OutOfMemory {
        /// How many.
        split: u64,
    },
}

impl fmt::Display for LogError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Absent { slot } => write!(f, "slot {slot}: must exist"),
            Self::NotLogged { slot } => write!(f, "slot {slot}: its flags must contain dirty-log"),
            Self::Buffer { words, needed } => write!(f, "buffer: {words} words: must be at least {needed}"),
            Self::Unaligned { first } => write!(f, "first page {first}: must be a multiple of {PAGES}"),
            Self::Partial { first, count, pages } => write!(
                f,
                "pages {count}: must be a multiple of {PAGES}, or from {first} reach the slot's end at {pages}"
            ),
            Self::Outside { first, count, pages } => {
                write!(f, "first page {first}: with {count} pages it must end within the slot's {pages}")
            }
            Self::OutOfMemory { split } => write!(f, "out of memory for tables after {split} blocks were split"),
        }
    }
}

impl core::error::Error for LogError {}

/// What was read of a log, and of which slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPart {
    /// The slot's first frame.
    pub base: Gfn,
    /// Its pages.
    pub pages: u64,
    /// Pages that were read.
    pub count: u64,
}

/// Words that `pages` pages have.
const fn words(pages: u64) -> u64 {
    pages.div_ceil(PAGES)
}

/// Refuses a buffer that is too small.
const fn check_buffer(buffer: &[u64], pages: u64) -> Result<(), LogError> {
    let needed = words(pages);
    if (buffer.len() as u64) < needed {
        return Err(LogError::Buffer { words: buffer.len(), needed });
    }
    Ok(())
}

/// The words that pages `first .. first + count` of a slot of `pages` are, by the rules of `KVM_CLEAR_DIRTY_LOG`.
fn part(first: u64, count: u64, pages: u64) -> Result<Range<u64>, LogError> {
    if !first.is_multiple_of(PAGES) {
        return Err(LogError::Unaligned { first });
    }
    let end = first.checked_add(count).filter(|end| *end <= pages);
    let end = end.ok_or(LogError::Outside { first, count, pages })?;
    if !count.is_multiple_of(PAGES) && end != pages {
        return Err(LogError::Partial { first, count, pages });
    }
    Ok(first / PAGES..words(end))
}

/// The guest frames of the words `words` of the log of `slot`, if it has so many.
fn frames(slot: &Slot, words: &Range<u64>) -> Option<GfnRange> {
    let (first, end) = (words.start.checked_mul(PAGES)?, words.end.checked_mul(PAGES)?.min(slot.count));
    GfnRange::new(slot.base.offset(first), end.checked_sub(first)?)
}

/// The places of the bits of `mask`, in order.
fn bits(mut mask: u64) -> impl Iterator<Item = u64> {
    core::iter::from_fn(move || {
        let bit = u64::from(mask.trailing_zeros());
        let some = mask != 0;
        mask &= mask.wrapping_sub(1);
        some.then_some(bit)
    })
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// Fetches the log of slot `slot` into `to` and clears it: what it names is write-protected, and the TLBs are flushed,
    /// before it returns. Copy the pages after that. Returns how many are named.
    ///
    /// # Errors
    ///
    /// [`LogError`].
    pub fn get_dirty_log(&self, cpu: usize, slot: u16, to: &mut [u64]) -> Result<u64, LogError> {
        let _owner = self.logs.owner();
        let (slot, log) = self.log_of(cpu, slot)?;
        check_buffer(to, slot.count)?;
        to.fill(0);
        let mut count = 0;
        self.take(
            cpu,
            &slot,
            log,
            0..words(slot.count),
            |_| u64::MAX,
            |index, bits| {
                to[index as usize] = bits;
                count += u64::from(bits.count_ones());
            },
        );
        Ok(count)
    }

    /// Copies the log of slot `slot` to `to`, and leaves everything as it is: [`Vm::clear_dirty_log`] comes later. Returns
    /// how many pages are named.
    ///
    /// # Errors
    ///
    /// [`LogError`].
    pub fn read_dirty_log(&self, cpu: usize, slot: u16, to: &mut [u64]) -> Result<u64, LogError> {
        let _owner = self.logs.owner();
        let (slot, log) = self.log_of(cpu, slot)?;
        check_buffer(to, slot.count)?;
        self.copy_words(log, 0..words(slot.count), to);
        Ok(to.iter().map(|word| u64::from(word.count_ones())).sum())
    }

    /// The same for the part of the log that begins with page `first` and is as long as `to`, or ends with the slot; words
    /// after that become 0.
    ///
    /// # Errors
    ///
    /// [`LogError`]: `first` is a multiple of 64 and lies in the slot.
    pub fn read_dirty_part(&self, cpu: usize, slot: u16, first: u64, to: &mut [u64]) -> Result<LogPart, LogError> {
        let _owner = self.logs.owner();
        let (slot, log) = self.log_of(cpu, slot)?;
        let left = slot.count.checked_sub(first).ok_or(LogError::Outside { first, count: 0, pages: slot.count })?;
        let count = (to.len() as u64).saturating_mul(PAGES).min(left);
        self.copy_words(log, part(first, count, slot.count)?, to);
        Ok(LogPart { base: slot.base, pages: slot.count, count })
    }

    fn copy_words(&self, log: Bitmap, part: Range<u64>, to: &mut [u64]) {
        to.fill(0);
        for (index, word) in part.zip(to.iter_mut()) {
            *word = log.load(&self.host.machine, index);
        }
    }

    /// Clears what `named` names of the pages `first .. first + count` of slot `slot`, after it has write-protected these
    /// and flushed the TLBs. Bit 0 of `named` is page `first`. Copy the pages after that. Returns how many were cleared.
    ///
    /// # Errors
    ///
    /// [`LogError`]: `first` is a multiple of 64, and so is `count` unless it reaches the slot's end.
    pub fn clear_dirty_log(
        &self,
        cpu: usize,
        slot: u16,
        first: u64,
        count: u64,
        named: &[u64],
    ) -> Result<u64, LogError> {
        let _owner = self.logs.owner();
        let (slot, log) = self.log_of(cpu, slot)?;
        let part = part(first, count, slot.count)?;
        check_buffer(named, count)?;
        let start = part.start;
        let mut cleared = 0;
        self.take(
            cpu,
            &slot,
            log,
            part,
            |index| named[(index - start) as usize],
            |_, bits| {
                cleared += u64::from(bits.count_ones());
            },
        );
        Ok(cleared)
    }

    /// Whether the page behind `gfn` is in the log of its slot; `None` if no slot is there that logs.
    pub fn is_dirty(&self, pin: &entresol_sync::Pin<'_>, gfn: Gfn) -> Option<bool> {
        let slot = self.slots.find(pin, gfn, &entresol_slot::Hint::new()).filter(|slot| slot.logs_dirty())?;
        self.logs.is_dirty(&self.host.machine, &slot, gfn)
    }

    /// Frames of the pool that logs take.
    pub fn log_frames(&self, pin: &entresol_sync::Pin<'_>) -> u64 {
        let log = |slot: &Slot| self.logs.get(slot.id).map_or(0, |log| log.frames(slot.count));
        self.slots.iter(pin).map(|slot| log(&slot)).sum()
    }

    /// Where the log of slot `id` stands, for audits: the first frame of bits, if all follow each other (as for a slot of at most
    /// 32,768 pages), or the first of the frames above them.
    pub fn log_root(&self, pin: &entresol_sync::Pin<'_>, id: u16) -> Option<entresol_addr::Pfn> {
        self.slots.get(pin, id).and_then(|slot| self.logs.get(slot.id)).map(|log| log.parts().0)
    }

    /// Slot `id` and its log. The caller holds the owner's lock, so both stay.
    pub(super) fn log_of(&self, cpu: usize, id: u16) -> Result<(Slot, Bitmap), LogError> {
        let pin = self.host.epoch.pin(cpu);
        let slot = *self.slots.get(&pin, id).ok_or(LogError::Absent { slot: id })?;
        let log = self.logs.get(id).filter(|_| slot.logs_dirty()).ok_or(LogError::NotLogged { slot: id })?;
        Ok((slot, log))
    }

    /// Takes the bits `chosen` out of the words `part` of the log of `slot`, chunk by chunk; `taken` gets each word with what
    /// was set.
    pub(super) fn take(
        &self,
        cpu: usize,
        slot: &Slot,
        log: Bitmap,
        part: Range<u64>,
        chosen: impl Fn(u64) -> u64,
        mut taken: impl FnMut(u64, u64),
    ) {
        let mut start = part.start;
        while start < part.end {
            let chunk = start..part.end.min(start + CHUNK);
            start = chunk.end;
            // What is set from now on may as well be in the next fetch.
            if chunk.clone().any(|index| log.load(&self.host.machine, index) & chosen(index) != 0) {
                self.take_chunk(cpu, slot, log, chunk, &chosen, &mut taken);
            }
        }
    }

    fn take_chunk(
        &self,
        cpu: usize,
        slot: &Slot,
        log: Bitmap,
        chunk: Range<u64>,
        chosen: &impl Fn(u64) -> u64,
        taken: &mut impl FnMut(u64, u64),
    ) {
        let machine = &self.host.machine;
        let Some(range) = frames(slot, &chunk) else { return };
        let mut take = || chunk.clone().for_each(|index| taken(index, log.take(machine, index, chosen(index))));
        let invalidation = self.exclude(range);
        if planted!(ZF3) {
            take();
            self.reprotect(cpu, (0..range.count()).map(|page| range.start().offset(page)));
        } else {
            let set = |index| bits(log.load(machine, index) & chosen(index)).map(move |bit| PAGES * index + bit);
            self.reprotect(cpu, chunk.clone().flat_map(set).map(|page| slot.base.offset(page)));
            take();
        }
        self.notifier.end(invalidation);
    }

    /// When it returns, no fault publishes in `range` until the invalidation ends. Waits while too many are in progress.
    pub(super) fn exclude(&self, range: GfnRange) -> Invalidation {
        let range = if planted!(ZF7) { GfnRange::single(Gfn::new(0)) } else { range };
        let invalidation = loop {
            match self.notifier.start(range) {
                Ok(invalidation) => break invalidation,
                Err(crate::TooMany) => hint::spin_loop(),
            }
        };
        self.host.epoch.synchronize();
        invalidation
    }

    /// Takes the write permission of the pages away and flushes.
    pub(super) fn reprotect(&self, cpu: usize, pages: impl Iterator<Item = Gfn>) {
        let _pin = self.host.epoch.pin(cpu);
        let flushes = self.flushes(&self.stats.tlb_range);
        let changed = self.table.protect_frames(&self.host.machine, flushes, pages);
        self.stats.reprotected.add(changed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_whole_words_or_end_with_the_slot() {
        assert_eq!(part(0, 64, 100), Ok(0..1));
        assert_eq!(part(64, 36, 100), Ok(1..2));
        assert_eq!(part(0, 100, 100), Ok(0..2));
        assert_eq!(part(0, 0, 100), Ok(0..0));
        assert_eq!(part(1, 64, 100), Err(LogError::Unaligned { first: 1 }));
        assert_eq!(part(0, 65, 100), Err(LogError::Partial { first: 0, count: 65, pages: 100 }));
        assert_eq!(part(64, 37, 100), Err(LogError::Outside { first: 64, count: 37, pages: 100 }));
        let last = !63;
        assert_eq!(part(last, 64, 100), Err(LogError::Outside { first: last, count: 64, pages: 100 }));
    }

    #[test]
    fn bits_are_found_in_order() {
        assert_eq!(bits(0).count(), 0);
        assert!(bits(1 << 63 | 0b101).eq([0, 2, 63]));
        assert!(bits(u64::MAX).eq(0..64));
    }
}
