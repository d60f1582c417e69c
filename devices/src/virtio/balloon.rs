//! Traditional memory balloon device (virtio 5.5).
//!
//! Purpose: memory that a guest can do without goes back to the machine. Its owner asks for some ([`VirtioMmio::set_target`]),
//! and the driver fills the balloon with pages (*inflate*), or takes some out (*deflate*); and without being asked, the driver
//! reports pages that are free at the moment.
//!
//! Queues: inflate, deflate, statistics, and two for reports: virtio 5.5.2 numbers that queue 4, and drivers that count only
//! queues of features that both sides have (Linux before 6.11) number it 3, as queue 3 belongs to a feature that is not
//! offered here.
//!
//! Protocol:
//! - *Inflate*: a buffer is an array of page numbers. Their memory goes before the buffer is given back: from then on the
//!   driver may do with a page what it likes, whether it has told so or not (virtio 5.5.6.1.2), and finds it zero. That is
//!   why MUST_TELL_HOST is not offered, and *deflate* has nothing to do but count.
//! - *Reports*: a buffer's segments are the free pages themselves. Only whole pages inside a segment go. A driver that fills
//!   free pages with a value other than zero says so in `poison_val`; its reports are taken and change nothing.
//! - *Statistics*: one buffer stays with the device until its owner asks for news ([`VirtioMmio::ask_statistics`]); it is
//!   given back then, and the driver puts up a new one, filled.
//!
//! A part of the work is bounded by the pages it names. How far a buffer has come is its progress in bytes, as for other
//! devices. [`Busy`] leaves it where it is, to be tried again.
//!
//! A guest may name pages that it does not have, or the same ones twice: the host says what it made of them ([`Given`]), and
//! the owner reads the sums. Nothing else comes of it.
//!
//! Lock order: the device's lock, then what [`GiveBack`] takes.

use alloc::vec::Vec;

use entresol_addr::{Gfn, GfnRange, PAGE_SHIFT, PAGE_SIZE};
use virtio::balloon::F;

use super::chain::Chain;
use super::queue::Queue;
use super::{OutOfMemory, Service, Stop, VirtioDevice, VirtioMmio, registers};
use crate::bus::{GuestMemory, Interrupt, Work};

/// Queue of page numbers that go into the balloon.
const INFLATE: usize = 0;
/// Queue of page numbers that come out of it.
const DEFLATE: usize = 1;
/// Queue of statistics.
const STATISTICS: usize = 2;

/// Bytes of a page number in a buffer.
const NUMBER: u64 = 4;
/// Page numbers that are given back together: as many as Linux has in a buffer.
const NUMBERS_AT_ONCE: usize = 256;
/// Pages of a report that are given back together.
const REPORTED_AT_ONCE: u64 = 512;
/// What giving back a page costs that is named alone, in bytes copied ([`Service::spend`]).
const ALONE: usize = 1024;
/// What it costs among neighbours, at most.
const TOGETHER: usize = 256;

/// Bytes of a statistic: a tag of 16 bits and a value of 64 (virtio 5.5.6.3).
const STATISTIC: u64 = 10;
/// Statistics that are read of one buffer: more than there are tags.
const STATISTICS_MAX: usize = 64;

/// What the tags of statistics mean, in their order (virtio 5.5.6.4). Memory is in bytes.
pub const TAGS: [&str; 10] = [
    "swap-in",
    "swap-out",
    "major-faults",
    "minor-faults",
    "free-memory",
    "total-memory",
    "available-memory",
    "disk-caches",
    "hugetlb-allocations",
    "hugetlb-failures",
];

/// What became of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// Frames that the machine has back.
    pub frames: u64,
    /// Pages that are not the guest's to give.
    pub refused: u64,
    /// Pages that stay, because giving them back needs memory first.
    pub kept: u64,
}

/// Something else is done with the guest's memory at the moment; to be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy;

/// Where a guest's memory goes back to.
pub trait GiveBack: Send + Sync {
    /// Gives back the pages of `ranges`, which lie anywhere: they read as zero from now on.
    ///
    /// # Errors
    ///
    /// [`Busy`]; all, some or none of the pages went.
    fn give_back(&self, ranges: &[GfnRange]) -> Result<Given, Busy>;
}

impl<T: GiveBack + ?Sized> GiveBack for alloc::sync::Arc<T> {
    fn give_back(&self, ranges: &[GfnRange]) -> Result<Given, Busy> {
        (**self).give_back(ranges)
    }
}

/// What a balloon's owner reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Pages that the balloon shall have.
    pub target: u32,
    /// Pages that the driver says it has.
    pub actual: u32,
    /// Frames that inflating gave back.
    pub inflated: u64,
    /// Pages that the driver took out.
    pub deflated: u64,
    /// Frames that reports gave back.
    pub reported: u64,
    /// Pages that were named and are not the guest's to give.
    pub refused: u64,
    /// Pages that stayed for want of memory.
    pub kept: u64,
    /// How often the driver has told its statistics.
    pub updates: u64,
    /// What it told last, by [`TAGS`].
    pub statistics: [Option<u64>; TAGS.len()],
}

/// A memory balloon.
pub struct Balloon<H> {
    host: H,
    reading: Reading,
    /// What the driver fills free pages with.
    poison: u32,
    /// The owner wants news.
    asked: bool,
    numbers: Vec<u8>,
    ranges: Vec<GfnRange>,
}

/// Cuts sorted page numbers into ranges, at most as many as numbers.
fn runs(numbers: &mut [u32], ranges: &mut Vec<GfnRange>) {
    numbers.sort_unstable();
    ranges.clear();
    for number in numbers.iter().map(|number| Gfn::new(u64::from(*number))) {
        match ranges.last_mut() {
            // The same page twice is one.
            Some(last) if last.contains(number) => {}
            Some(last) if last.end() == number => *last = longer(*last),
            // There is room: a range for each number.
            _ => ranges.push(GfnRange::single(number)),
        }
    }
}

/// The range and the page after it; it ends far below the end of all pages.
fn longer(range: GfnRange) -> GfnRange {
    GfnRange::new(range.start(), range.count() + 1).unwrap_or(range)
}

/// The whole pages in `bytes` from `start`, which do not wrap.
fn whole_pages(start: u64, bytes: u64) -> Option<GfnRange> {
    let first = start.div_ceil(PAGE_SIZE);
    let end = (start + bytes) >> PAGE_SHIFT;
    GfnRange::new(Gfn::new(first), end.checked_sub(first)?).filter(|range| !range.is_empty())
}

/// The part of a report that begins at byte `progress` of the chain's segments: its pages, at most `most`, and the progress
/// after it. `None` at the end.
fn next_reported(chain: &Chain, progress: u64, most: u64) -> Option<(Option<GfnRange>, u64)> {
    let mut before = 0;
    for (gpa, len) in chain.segments() {
        let len = u64::from(len);
        let Some(rest) = (before + len).checked_sub(progress).filter(|rest| *rest != 0) else {
            before += len;
            continue;
        };
        let start = gpa.get() + (len - rest);
        let Some(pages) = whole_pages(start, rest).filter(|pages| pages.count() > most) else {
            return Some((whole_pages(start, rest), before + len));
        };
        let pages = GfnRange::new(pages.start(), most)?;
        return Some((Some(pages), progress + (pages.end().base().get() - start)));
    }
    None
}

impl<H: GiveBack> Balloon<H> {
    /// A balloon whose pages go to `host`, empty.
    ///
    /// # Errors
    ///
    /// If the heap has no room for its buffers.
    pub fn new(host: H) -> Result<Self, OutOfMemory> {
        let (mut numbers, mut ranges) = (Vec::new(), Vec::new());
        numbers.try_reserve_exact(NUMBERS_AT_ONCE * NUMBER as usize).map_err(|_| OutOfMemory)?;
        numbers.resize(NUMBERS_AT_ONCE * NUMBER as usize, 0);
        ranges.try_reserve_exact(NUMBERS_AT_ONCE).map_err(|_| OutOfMemory)?;
        Ok(Self { host, reading: Reading::default(), poison: 0, asked: false, numbers, ranges })
    }

    /// The same for a copy of the virtual machine, which has as little of its memory.
    ///
    /// # Errors
    ///
    /// If the heap has no room for its buffers.
    pub fn fork<C: GiveBack>(&self, host: C) -> Result<Balloon<C>, OutOfMemory> {
        let empty = Balloon::new(host)?;
        Ok(Balloon { reading: self.reading, poison: self.poison, asked: self.asked, ..empty })
    }

    fn count(&mut self, given: Given) {
        self.reading.refused += given.refused;
        self.reading.kept += given.kept;
    }

    /// Takes pages that the driver puts into the balloon.
    fn inflate(&mut self, queue: &mut Queue, service: &mut Service<'_>) -> Result<Work, Stop> {
        while !service.is_spent() {
            let Some(head) = service.next(queue)? else { return Ok(Work::Idle) };
            let bytes = service.chain.readable_bytes() / NUMBER * NUMBER;
            while queue.progress < bytes {
                if service.is_spent() {
                    return Ok(Work::More);
                }
                let rest = usize::try_from(bytes - queue.progress).unwrap_or(usize::MAX);
                let piece_bytes = rest.min(self.numbers.len());
                service.chain.read(service.memory, queue.progress, &mut self.numbers[..piece_bytes])?;
                let Some(given) = self.give_back_named(piece_bytes) else { return Ok(Work::More) };
                self.reading.inflated += given.frames;
                self.count(given);
                service.spend(piece_bytes / NUMBER as usize * ALONE);
                queue.progress += piece_bytes as u64;
            }
            queue.complete(service.memory, head, 0)?;
        }
        Ok(Work::More)
    }

    /// Gives back the pages whose numbers are the first `bytes` of the buffer.
    fn give_back_named(&mut self, bytes: usize) -> Option<Given> {
        let mut numbers = [0; NUMBERS_AT_ONCE];
        let (words, _) = self.numbers[..bytes].as_chunks::<{ NUMBER as usize }>();
        for (to, word) in numbers.iter_mut().zip(words) {
            *to = u32::from_le_bytes(*word);
        }
        runs(&mut numbers[..words.len()], &mut self.ranges);
        self.host.give_back(&self.ranges).ok()
    }

    /// Pages come out of the balloon: they are there when they are touched.
    fn deflate(&mut self, queue: &mut Queue, service: &mut Service<'_>) -> Result<Work, Stop> {
        while !service.is_spent() {
            let Some(head) = service.next(queue)? else { return Ok(Work::Idle) };
            self.reading.deflated += service.chain.readable_bytes() / NUMBER;
            queue.complete(service.memory, head, 0)?;
        }
        Ok(Work::More)
    }

    /// Takes pages that are free.
    fn take_reports(&mut self, queue: &mut Queue, service: &mut Service<'_>) -> Result<Work, Stop> {
        while !service.is_spent() {
            let Some(head) = service.next(queue)? else { return Ok(Work::Idle) };
            // Zero is not what the driver would find there.
            let taken = self.poison == 0;
            while let Some((pages, progress)) =
                next_reported(service.chain, queue.progress, REPORTED_AT_ONCE).filter(|_| taken)
            {
                if service.is_spent() {
                    return Ok(Work::More);
                }
                if let Some(pages) = pages {
                    let Ok(given) = self.host.give_back(&[pages]) else { return Ok(Work::More) };
                    self.reading.reported += given.frames;
                    self.count(given);
                    service.spend(pages.count() as usize * TOGETHER);
                }
                service.spend(ALONE);
                queue.progress = progress;
            }
            queue.complete(service.memory, head, 0)?;
        }
        Ok(Work::More)
    }

    /// Reads the buffer of statistics that the driver has put up; gives it back if there shall be news. Its progress says
    /// whether it was read.
    fn take_statistics(&mut self, queue: &mut Queue, service: &mut Service<'_>) -> Result<Work, Stop> {
        while !service.is_spent() {
            let Some(head) = service.next(queue)? else { return Ok(Work::Idle) };
            if queue.progress == 0 {
                self.read_statistics(service)?;
                queue.progress = 1;
            }
            if !self.asked {
                return Ok(Work::Idle);
            }
            queue.complete(service.memory, head, 0)?;
            self.asked = false;
        }
        Ok(Work::More)
    }

    fn read_statistics(&mut self, service: &mut Service<'_>) -> Result<(), Stop> {
        let count = service.chain.readable_bytes() / STATISTIC;
        let count = usize::try_from(count).unwrap_or(usize::MAX).min(STATISTICS_MAX);
        let mut bytes = [0; STATISTICS_MAX * STATISTIC as usize];
        let bytes = &mut bytes[..count * STATISTIC as usize];
        service.chain.read(service.memory, 0, bytes)?;
        service.spend(bytes.len());
        let mut statistics = [None; TAGS.len()];
        for [t0, t1, value @ ..] in bytes.as_chunks::<{ STATISTIC as usize }>().0 {
            let tag = usize::from(u16::from_le_bytes([*t0, *t1]));
            if let Some(place) = statistics.get_mut(tag) {
                *place = Some(u64::from_le_bytes(*value));
            }
        }
        self.reading.statistics = statistics;
        self.reading.updates += 1;
        Ok(())
    }
}

impl<H: GiveBack> VirtioDevice for Balloon<H> {
    const ID: virtio::Id = virtio::Id::Balloon;
    const QUEUES: usize = 5;

    fn features(&self) -> u64 {
        (F::STATS_VQ | F::DEFLATE_ON_OOM | F::PAGE_POISON | F::PAGE_REPORTING).bits().to_ne() as u64
    }

    /// `num_pages`, `actual`, `free_page_hint_cmd_id`, `poison_val` (virtio 5.5.4).
    fn config(&self) -> [u8; registers::CONFIG_BYTES] {
        let mut config = [0; registers::CONFIG_BYTES];
        config[0..4].copy_from_slice(&self.reading.target.to_le_bytes());
        config[4..8].copy_from_slice(&self.reading.actual.to_le_bytes());
        config[12..16].copy_from_slice(&self.poison.to_le_bytes());
        config
    }

    fn write_config(&mut self, offset: u64, size: u8, value: u64) {
        match (offset, size) {
            (4, 4) => self.reading.actual = value as u32,
            (12, 4) => self.poison = value as u32,
            _ => {}
        }
    }

    fn serve(&mut self, index: usize, queue: &mut Queue, service: &mut Service<'_>) -> Result<Work, Stop> {
        match index {
            INFLATE => self.inflate(queue, service),
            DEFLATE => self.deflate(queue, service),
            STATISTICS => self.take_statistics(queue, service),
            _ => self.take_reports(queue, service),
        }
    }

    /// The target stays: it is the owner's.
    fn reset(&mut self) {
        self.reading.actual = 0;
        self.reading.statistics = [None; TAGS.len()];
        self.poison = 0;
        self.asked = false;
    }
}

impl<H: GiveBack, M: GuestMemory, L: Interrupt> VirtioMmio<Balloon<H>, M, L> {
    /// Tells the driver how many pages of 4 KiB the balloon shall have.
    pub fn set_target(&self, pages: u32) {
        self.access(|state, _| {
            if state.device.reading.target != pages {
                state.device.reading.target = pages;
                state.config_changed();
            }
        });
    }

    /// What is known at the moment.
    pub fn reading(&self) -> Reading {
        self.access(|state, _| state.device.reading)
    }

    /// Asks the driver for news, which a later [`Self::reading`] shows; its `updates` tell that they are there.
    pub fn ask_statistics(&self) {
        self.access(|state, memory| {
            state.device.asked = true;
            state.serve(memory, STATISTICS);
        });
    }
}

#[cfg(test)]
mod tests {
    use entresol_addr::Gpa;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_become_ranges() {
        let of = |numbers: &[u32]| {
            let mut ranges = Vec::new();
            runs(&mut numbers.to_vec(), &mut ranges);
            ranges.iter().map(|range| (range.start().get(), range.count())).collect::<Vec<_>>()
        };
        assert_eq!(of(&[]), []);
        assert_eq!(of(&[9, 7, 8, 8, 3]), [(3, 1), (7, 3)]);
        assert_eq!(of(&[u32::MAX, 0, u32::MAX - 1]), [(0, 1), (u64::from(u32::MAX) - 1, 2)]);
    }

    #[test]
    fn only_whole_pages_are_free() {
        let pages = |start, bytes| whole_pages(start, bytes).map(|range| (range.start().get(), range.count()));
        assert_eq!(pages(0x1000, 0x2000), Some((1, 2)));
        assert_eq!(pages(0x1001, 0x1fff), Some((2, 1)));
        assert_eq!(pages(0x1001, 0x1ffe), None);
        assert_eq!(pages(0xfff, 2), None);
        assert_eq!(pages(0, 0), None);
    }

    proptest! {
        /// Walked in whatever steps, a report names each whole page of each segment once.
        #[test]
        fn a_report_is_walked_to_its_end(
            segments in prop::collection::vec((0u64..40_000, 1u32..30_000), 0..6),
            most in 1u64..5,
        ) {
            let mut chain = Chain::new().unwrap();
            let mut expected = Vec::new();
            for (start, len) in segments {
                chain.push(Gpa::new(start), len, true).unwrap();
                expected.extend(whole_pages(start, len.into()).into_iter().flat_map(|pages| {
                    (0..pages.count()).map(move |page| pages.start().get() + page)
                }));
            }
            let (mut progress, mut seen) = (0, Vec::new());
            while let Some((pages, after)) = next_reported(&chain, progress, most) {
                prop_assert!(after > progress);
                progress = after;
                if let Some(pages) = pages {
                    prop_assert!(pages.count() <= most);
                    seen.extend((0..pages.count()).map(|page| pages.start().get() + page));
                }
            }
            prop_assert_eq!(seen, expected);
        }
    }
}
