//! The model as a machine: what each operation of the core does to it, and who looks at it.
//!
//! Protocol of an operation: the schedule decides who goes on ([`step`]), the model changes, checkers look, a violation
//! ends the schedule ([`settle`]).

use std::panic::Location;

use entresol_addr::{Hpa, Pfn, PfnRange};
use entresol_machine::model::Model;
use entresol_machine::own::{RemoveError, Work};
use entresol_machine::{Features, Tags, TlbOp, Word};
use entresol_sync::lab::Site;

use super::{Lab, TLB, own_key, page_key, range, settle, step, with, word_key};
use crate::check::{Check, inv04, inv07};
use crate::machine::content::Content;
use crate::report::Event;

/// The model as a machine. Everything is in the thread's laboratory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hardware;

impl Hardware {
    /// A change of a range of pages by their addresses: the first stands for all.
    fn pages(site: Site, frames: PfnRange, what: &'static str, change: impl FnOnce(&mut Lab, usize)) {
        Self::named(site, frames, what, |lab, cpu| {
            lab.reaches(frames, site);
            change(lab, cpu);
        });
    }

    /// The same of pages that need not be in the hypervisor's own mapping.
    fn named(site: Site, frames: PfnRange, what: &'static str, change: impl FnOnce(&mut Lab, usize)) {
        step(page_key(frames.start()), true, site);
        with(|lab| {
            let cpu = lab.schedule.current();
            lab.uses(frames);
            change(lab, cpu);
            lab.log(Some(site), || match frames.count() {
                1 => format!("{what} frame {:#x}", frames.start()),
                count => format!("{what} {count} frames from {:#x}", frames.start()),
            });
        });
        settle();
    }
}

impl Hardware {
    /// A device reads a frame, once the hypervisor's stores to it are done.
    #[track_caller]
    pub fn save(self, frame: Pfn) -> Content {
        let site = Location::caller();
        step(page_key(frame), false, site);
        let content = with(|lab| {
            lab.reaches(PfnRange::single(frame), site);
            lab.log(Some(site), || format!("the device reads frame {frame:#x}"));
            let mut content = lab.world.frame_mut(frame).line().clone();
            // Words of zero are the fill of nearly every page of a scenario.
            for (index, _) in content.other_than(0) {
                let word = lab.machine(|world, pick| world.load(Word::new(frame, index), pick));
                content.set(index, word);
            }
            content
        });
        settle();
        content
    }

    /// A device has filled a frame.
    #[track_caller]
    pub fn fill(self, frame: Pfn, content: &Content) {
        Self::pages(Location::caller(), PfnRange::single(frame), "the device fills", |lab, _| {
            lab.world.replace(frame, content.clone());
        });
    }
}

fn each(frames: PfnRange) -> impl Iterator<Item = Pfn> {
    (0..frames.count()).map(move |offset| frames.start().offset(offset))
}

impl Model for Hardware {
    fn features(&self) -> Features {
        with(|lab| lab.world.config.features())
    }

    #[track_caller]
    fn load(&self, word: Word) -> u64 {
        let site = Location::caller();
        step(word_key(word), false, site);
        let value = with(|lab| {
            lab.reaches(PfnRange::single(word.frame()), site);
            lab.machine(|world, pick| world.load(word, pick))
        });
        settle();
        value
    }

    #[track_caller]
    fn store(&self, word: Word, value: u64) {
        let site = Location::caller();
        step(word_key(word), true, site);
        with(|lab| {
            lab.reaches(PfnRange::single(word.frame()), site);
            change(lab, word, value, site);
        });
        settle();
    }

    #[track_caller]
    fn compare_exchange(&self, word: Word, current: u64, new: u64) -> Result<u64, u64> {
        let site = Location::caller();
        step(word_key(word), true, site);
        let result = with(|lab| {
            lab.reaches(PfnRange::single(word.frame()), site);
            let found = lab.machine(|world, pick| world.load(word, pick));
            if found != current {
                return Err(found);
            }
            change(lab, word, new, site);
            Ok(found)
        });
        settle();
        result
    }

    fn published(&self) {}

    #[track_caller]
    fn zero(&self, frames: PfnRange) {
        Self::pages(Location::caller(), frames, "zero", |lab, _| {
            for pfn in each(frames) {
                if lab.checks.has(Check::Inv7) {
                    let reached = inv07::renewed(&lab.world, pfn);
                    lab.found(Check::Inv7, reached);
                }
                lab.world.replace(pfn, Content::filled(0));
            }
        });
    }

    #[track_caller]
    fn copy(&self, from: Pfn, to: Pfn, count: u64) {
        let frames = range(to.get(), count);
        Self::pages(Location::caller(), frames, "copy to", |lab, _| {
            each(frames).for_each(|pfn| lab.world.copy(from.offset(pfn.since(to)), pfn));
        });
    }

    #[track_caller]
    fn clear_tags(&self, frames: PfnRange) {
        if self.features().tags {
            Self::pages(Location::caller(), frames, "clear the tags of", |lab, _| {
                each(frames).for_each(|pfn| lab.world.frame_mut(pfn).tags = Tags::ZERO);
            });
        }
    }

    #[track_caller]
    fn copy_tags(&self, from: Pfn, to: Pfn, count: u64) {
        if self.features().tags {
            let frames = range(to.get(), count);
            Self::pages(Location::caller(), frames, "copy tags to", |lab, _| {
                each(frames).for_each(|pfn| {
                    lab.world.frame_mut(pfn).tags = lab.world.frame_mut(from.offset(pfn.since(to))).tags;
                });
            });
        }
    }

    #[track_caller]
    fn load_tags(&self, frame: Pfn) -> Tags {
        if !self.features().tags {
            return Tags::ZERO;
        }
        step(page_key(frame), false, Location::caller());
        with(|lab| lab.world.frame_mut(frame).tags)
    }

    #[track_caller]
    fn store_tags(&self, frame: Pfn, tags: &Tags) {
        if self.features().tags {
            Self::pages(Location::caller(), PfnRange::single(frame), "store tags of", |lab, _| {
                lab.world.frame_mut(frame).tags = *tags;
            });
        }
    }

    #[track_caller]
    fn read(&self, from: Hpa, to: &mut [u8]) {
        let site = Location::caller();
        step(page_key(from.frame()), false, site);
        with(|lab| {
            lab.reaches(PfnRange::single(from.frame()), site);
            read_bytes(lab, from, to);
        });
        settle();
    }

    #[track_caller]
    fn write(&self, to: Hpa, from: &[u8]) {
        let site = Location::caller();
        Self::pages(site, PfnRange::single(to.frame()), "write", |lab, _| {
            write_bytes(lab, to, from, site);
        });
    }

    #[track_caller]
    fn clean_invalidate_to_poc(&self, frames: PfnRange) {
        Self::named(Location::caller(), frames, "DC CIVAC", |lab, cpu| lab.world.begin_clean(cpu, frames));
    }

    #[track_caller]
    fn invalidate_icache(&self, frames: PfnRange) {
        Self::named(Location::caller(), frames, "IC IVAU", |lab, cpu| lab.world.begin_icache(cpu, frames));
    }

    #[track_caller]
    fn tlb(&self, op: TlbOp) {
        let site = Location::caller();
        step(TLB, true, site);
        with(|lab| {
            let cpu = lab.schedule.current();
            lab.world.begin_flush(cpu, op);
            lab.log(Some(site), || format!("TLBI {op:?}"));
        });
    }

    fn can_unmap_own(&self) -> bool {
        true
    }

    #[track_caller]
    fn unmap_own(&self, frames: PfnRange) -> Result<(), RemoveError> {
        let (site, pfn) = (Location::caller(), frames.start());
        step(own_key(pfn), true, site);
        with(|lab| {
            let may_fail = lab.world.config.removals_fail && lab.schedule.running && frames.count() == 1;
            if may_fail && lab.machine(|_, pick| pick(2)) == 0 {
                lab.mark("removal failed");
                lab.log(Some(site), || format!("frame {pfn:#x} stays in the hypervisor's mapping"));
                return Err(RemoveError::TryAgain { pfn });
            }
            lab.world.unmap_own(frames);
            lab.log(Some(site), || format!("{} frames from {pfn:#x} leave the hypervisor's mapping", frames.count()));
            Ok(())
        })
    }

    #[track_caller]
    fn map_own(&self, frames: PfnRange) {
        let (site, pfn) = (Location::caller(), frames.start());
        step(own_key(pfn), true, site);
        with(|lab| {
            lab.world.own.map(frames);
            lab.log(Some(site), || format!("{} frames from {pfn:#x} are in the hypervisor's mapping", frames.count()));
        });
    }

    #[track_caller]
    fn is_mapped_own(&self, frame: Pfn) -> bool {
        step(own_key(frame), false, Location::caller());
        with(|lab| lab.world.own.is_mapped(frame))
    }

    #[track_caller]
    fn through_window(&self, frame: Pfn, work: Work<'_>) {
        let site = Location::caller();
        let at = |byte: u16| Hpa::new(frame.base().get() + u64::from(byte));
        Self::named(site, PfnRange::single(frame), "through a window:", |lab, _| match work {
            Work::Read { at: byte, to } => read_bytes(lab, at(byte), to),
            Work::Write { at: byte, from } => write_bytes(lab, at(byte), from, site),
            Work::Zero => lab.world.replace(frame, Content::filled(0)),
            Work::Copy { from } => lab.world.copy(from, frame),
        });
    }

    #[track_caller]
    fn complete(&self) {
        let site = Location::caller();
        step(TLB, true, site);
        with(|lab| {
            let cpu = lab.schedule.current();
            lab.world.complete(cpu);
            lab.log(Some(site), || "DSB: everything begun has completed".to_owned());
        });
    }
}

fn word_at(address: u64) -> Word {
    let address = Hpa::new(address);
    Word::new(address.frame(), (address.page_offset() / 8) as u16)
}

/// The hypervisor reads bytes.
fn read_bytes(lab: &mut Lab, from: Hpa, to: &mut [u8]) {
    for (byte, address) in to.iter_mut().zip(from.get()..) {
        let word = lab.machine(|world, pick| world.load(word_at(address), pick));
        *byte = word.to_le_bytes()[(address % 8) as usize];
    }
}

/// The hypervisor writes bytes.
fn write_bytes(lab: &mut Lab, to: Hpa, from: &[u8], site: Site) {
    let (mut at, mut rest) = (to.get(), from);
    while !rest.is_empty() {
        let within = (at % 8) as usize;
        let (now, later) = rest.split_at(rest.len().min(8 - within));
        let mut bytes = lab.machine(|world, pick| world.load(word_at(at), pick)).to_le_bytes();
        bytes[within..within + now.len()].copy_from_slice(now);
        change(lab, word_at(at), u64::from_le_bytes(bytes), site);
        (at, rest) = (at + now.len() as u64, later);
    }
}

/// The hardware sets bits of an entry that a walk of a guest's access has just read.
#[track_caller]
pub fn set_by_hardware(lab: &mut Lab, word: Word, bits: u64) {
    let site = Location::caller();
    lab.schedule.access_now(word_key(word), true, site);
    let raw = lab.machine(|world, pick| world.load(word, pick));
    change(lab, word, raw | bits, site);
}

/// A word becomes `value`.
fn change(lab: &mut Lab, word: Word, value: u64, site: Site) {
    if lab.checks.has(Check::Inv4) {
        let wrong = inv04::cleared(&lab.world, &lab.logs, word, value);
        lab.found(Check::Inv4, wrong);
    }
    let writes = lab.machine(|world, pick| world.store(word, value, pick));
    for write in &writes {
        lab.log(Some(site), || {
            format!("level {} entry for gfn {:#x}: {}", write.level, write.span.start(), Event::entry(write.new))
        });
    }
    lab.entries(&writes);
}
