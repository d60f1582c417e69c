//! The way to the disk and back.
//!
//! A request has a buffer of its own, and its place in `pending` while the disk has it. Pages that vCPUs wait for ([`crate::paging`])
//! have precedence over those that leave; what lies behind them is brought with them.
//!
//! Failures: a page that cannot be written stays, and the reclaim that wanted it out ends; one that cannot be read pauses whoever shows it. Neither
//! loses anything.

use crate::arch::cpu;
use arrayvec::ArrayVec;
use entresol_addr::PAGE_SIZE;
use entresol_backing::{ObjectHandle, Out};
use entresol_machine::{Machine, Tags};

use super::pressure::ENOUGH;
use super::{Page, RESERVED, SECTORS, Swap, TAGGED};
use crate::block::{Buffer, DEPTH, Operation, Request};
use crate::host;
use crate::paging::{self, Reading, Whose};

/// Pages behind one that is waited for that are brought with it.
const AHEAD: u64 = 8;

const PAGE: usize = PAGE_SIZE as usize;

/// A page on its way.
pub(super) enum Pending {
    In(Reading),
    Out(Leaving),
}

/// A page that leaves.
pub(super) struct Leaving {
    pub out: Out,
    pub page: Page,
}

impl Swap {
    /// Takes what the disk has done.
    pub(super) fn collect(&mut self) {
        let mut written: ArrayVec<Page, { 2 * DEPTH }> = ArrayVec::new();
        while let Some(done) = self.disk.take() {
            let place = done.request.tag as usize;
            let Some(pending) = self.pending.get_mut(place).and_then(Option::take) else { continue };
            self.spare.extend(done.request.buffer);
            if let Err(error) = done.result {
                log::warn!("swap: {error}");
            }
            match pending {
                Pending::In(reading) => {
                    match (done.result, self.spare.last()) {
                        (Ok(()), Some(buffer)) => fill(reading, buffer),
                        _ => reading.failed(),
                    }
                    self.has_read(place, done.result.is_ok());
                }
                Pending::Out(Leaving { out, page }) => {
                    out.finish(&host::get().supply(cpu::index()), done.result.is_ok());
                    match done.result {
                        Ok(()) if !written.is_full() && self.removal.is_none() => written.push(page),
                        // It leaves when the hand comes again.
                        Ok(()) => {}
                        Err(_) => self.give_up(page.number),
                    }
                }
            }
        }
        written.sort_unstable_by_key(|page| (page.number, page.frame));
        let next_to = |one: &Page, other: &Page| one.number == other.number && one.frame + 1 == other.frame;
        for run in written.chunk_by(next_to) {
            self.let_go(run[0], run.len() as u64);
        }
    }

    /// Asks the disk for pages that are waited for.
    pub(super) fn read(&mut self) {
        while !self.spare.is_empty()
            && let Some(reading) = paging::next(self.store)
        {
            if let Some((object, frame)) = reading.page() {
                self.read_ahead(object, frame);
            }
            self.submit(Pending::In(reading));
        }
    }

    /// What lies behind a page that a guest waits for is brought with it, as far as there is room for both.
    fn read_ahead(&self, object: ObjectHandle, frame: u64) {
        let host = host::get();
        for frame in frame + 1..=frame + AHEAD.min(self.spare.len().saturating_sub(RESERVED) as u64) {
            let stored = {
                let pin = host.epoch.pin(cpu::index());
                host.objects.get(&pin, object).and_then(|object| object.stored_at(&host.machine, frame))
            };
            let Some(slot) = stored.filter(|slot| slot.store() == self.store) else { return };
            if host.pool.free_frames() < ENOUGH {
                return;
            }
            // If it does not come, who needs it asks again.
            paging::want_frame(object, frame, slot, Whose::Nobodys);
        }
    }

    /// Gives the disk a request; there is a spare buffer.
    pub(super) fn submit(&mut self, pending: Pending) {
        let free = self.pending.iter().position(Option::is_none);
        let (Some(tag), Some(mut buffer)) = (free, self.spare.pop()) else {
            unreachable!("a buffer for each request, and a place for each buffer");
        };
        let (operation, slot, tagged) = match &pending {
            Pending::In(reading) => (Operation::Read, reading.slot(), reading.is_tagged()),
            Pending::Out(leaving) => (Operation::Write, leaving.out.slot(), save(&leaving.out, &mut buffer)),
        };
        let (sector, len) = (slot.index() * SECTORS, if tagged { TAGGED } else { PAGE });
        let request = Request { operation, sector, len, buffer: Some(buffer), tag: tag as u64 };
        if let Err(refused) = self.disk.submit(request) {
            log::warn!("swap: {}", refused.error);
            self.spare.extend(refused.request.buffer);
            match pending {
                Pending::In(reading) => {
                    reading.failed();
                    self.has_read(tag, false);
                }
                Pending::Out(leaving) => {
                    leaving.out.finish(&host::get().supply(cpu::index()), false);
                    self.give_up(leaving.page.number);
                }
            }
            return;
        }
        self.pending[tag] = Some(pending);
    }
}

/// What of the page is to be written, its tags behind its bytes. Whether it has some.
fn save(out: &Out, buffer: &mut Buffer) -> bool {
    let (machine, bytes) = (&host::get().machine, buffer.bytes_mut());
    machine.read(out.pfn().base(), &mut bytes[..PAGE]);
    let tags = out.tags(machine);
    if let Some(tags) = &tags {
        // The rest of the sector is nobody's, and goes to the disk too.
        bytes[PAGE..TAGGED].fill(0);
        bytes[PAGE..PAGE + Tags::BYTES].copy_from_slice(&tags.to_bytes());
    }
    tags.is_some()
}

/// What was read is the page, with its tags if it has some.
fn fill(reading: Reading, buffer: &Buffer) {
    let bytes = buffer.bytes();
    host::get().machine.write(reading.pfn().base(), &bytes[..PAGE]);
    let tags = bytes[PAGE..].first_chunk().filter(|_| reading.is_tagged()).map(Tags::from_bytes);
    reading.filled(tags.as_ref());
}
