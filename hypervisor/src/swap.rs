//! Memory on a disk: the outer machine's device `entresol-swap`.
//!
//! Purpose: pages of guests that were not used lately make room for others. The core says which page may leave, and that it is the
//! same when it is back ([`entresol_mmu::begin_out`]); here is who leaves, and when, and the way to the disk and back.
//!
//! Protocol, all of it host's work: the owner asks for so much of a virtual machine's memory ([`reclaim`]). A hand goes round its
//! frames, [`WINDOW`] at a time: what was used since the hand came last is made old, and stays; the rest goes out. A page whose place on the disk is
//! still right is discarded at once; another is written, and discarded when it is written, unless it was used meanwhile.
//! Under pressure, when fewer than [`LOW`] frames are free or somebody waits for one, memory is reclaimed unasked, from who has most, [`BATCH`]
//! at a time, until [`HIGH`] are free ([`Round`]). A round that finds nothing more to take ends, and who still has no frame is paused.
//! Some frames are put by for the nodes of blocks that are taken apart while there is no other.
//!
//! Pages that vCPUs wait for ([`crate::paging`]) have precedence over those that leave, and always some of the disk's requests.
//!
//! Failures: a page that cannot be written stays, and the reclaim that wanted it out ends; one that cannot be read pauses whoever shows it
//! ([`crate::paging`]). Neither loses anything.
//!
//! Invariants: INV-7: what is on its way is in `pending`, with its buffer inside the driver. Nothing here allocates after [`init`] but
//! frames for nodes when a block is taken apart. Lock order: the state here is first of all, and host's work alone takes it.
//!
//! Known holes: blocks that forks share stay in memory until they are written. A place has no room for tags yet: a guest has none.

use alloc::sync::Arc;
use alloc::vec::Vec;

use arrayvec::ArrayVec;
use entresol_addr::{Gfn, GfnRange, PAGE_SHIFT, PAGE_SIZE, PageSize, Pfn};
use entresol_arch_arm64::stage2::Stage2;
use entresol_backing::{ObjectHandle, Order, Out, OutError, StoreError, StoreId};
use entresol_loader::virt;
use entresol_machine::Machine;
use entresol_metal_arm64::{Metal, cpu};
use entresol_mmu::{Frames, LeaveError, Shown, begin_out, discard};
use entresol_sync::Mutex;
use entresol_wire::config::MAX_VMS;

use crate::block::{self, Buffer, DEPTH, Disk, Operation, Request, SECTOR};
use crate::host_work::{self, Work};
use crate::paging::{self, Reading, Whose};
use crate::vm::{OutOfHeap, Vm};
use crate::{host, registry};

/// Frames that the hand looks at in one step.
const WINDOW: u64 = 8;
/// Steps between two looks at other work.
const STEPS: usize = 16;
/// Requests that pages on their way out leave to others.
const RESERVED: usize = DEPTH / 4;
/// Free frames below which memory is reclaimed unasked, and from which on it is enough.
const LOW: u64 = 4096;
const HIGH: u64 = 2 * LOW;
/// Free frames with which who waits for one goes on.
const ENOUGH: u64 = 256;
/// Pages that are taken from one virtual machine before another is looked for.
const BATCH: u64 = 2048;
/// Pages behind one that is waited for that are brought with it.
const AHEAD: u64 = 8;
/// Frames that are looked at together for places to free.
const LOOKS: u64 = 1024;
/// Frames that are put by.
const PUT_BY: usize = 32;
/// Sectors of a place.
const SECTORS: u64 = PAGE_SIZE / SECTOR;

const _: () = assert!(WINDOW as usize <= DEPTH - RESERVED);

/// A page on its way.
enum Pending {
    In(Reading),
    Out(Leaving),
}

/// A page that leaves.
struct Leaving {
    out: Out,
    page: Page,
}

/// A page of a virtual machine's memory.
#[derive(Clone, Copy)]
struct Page {
    number: usize,
    object: ObjectHandle,
    frame: u64,
}

/// A wish for memory of one virtual machine.
struct Job {
    number: usize,
    object: ObjectHandle,
    /// Pages that are still to go, those on their way not counted.
    left: u64,
    /// Where the hand is.
    hand: u64,
    /// Frames that it passed since something left.
    idle: u64,
    /// Nobody asked for it: it is part of the round.
    unasked: bool,
}

/// Memory is short.
struct Round {
    /// Who has nothing more to give, by number.
    tried: [bool; MAX_VMS],
}

struct Swap {
    disk: &'static Disk,
    store: StoreId,
    pending: [Option<Pending>; DEPTH],
    spare: ArrayVec<Buffer, DEPTH>,
    jobs: ArrayVec<Job, { MAX_VMS + 1 }>,
    /// Where the hand stopped in each virtual machine.
    hands: [u64; MAX_VMS],
    round: Option<Round>,
    /// The last round found nothing, and there is no more free, nor anybody who waits, since.
    hopeless: bool,
    /// Where frames were last looked at whose places are to be freed.
    looked_at: u64,
    /// Frames for nodes.
    put_by: ArrayVec<Pfn, PUT_BY>,
}

static SWAP: Mutex<Option<Swap>> = Mutex::new(None);

/// Why no memory is reclaimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The machine has no disk for it.
    NoDisk,
    /// Less than a page, or no whole pages.
    Size,
}

/// Begins to use the disk, if there is one.
pub fn init() {
    let Some(disk) = block::find(Work::Swap) else { return };
    match start(disk) {
        Ok(slots) => log::info!("swap: {} MiB", slots >> 8),
        Err(what) => log::error!("swap: not used: {what}"),
    }
}

fn start(disk: &'static Disk) -> Result<u64, &'static str> {
    let mut spare = ArrayVec::new();
    for _ in 0..DEPTH {
        spare.push(Buffer::take(Order::PAGE).map_err(|_| "no frames for its buffers")?);
    }
    let slots = disk.sectors() / SECTORS;
    let stores = host::get().pool.stores();
    let store =
        stores.open_counted(slots).map_err(|_| "it has no place for a page, or the heap none for its records")?;
    paging::keep(store, Work::Swap).map_err(|_| "there are too many stores")?;
    let pending = [const { None }; DEPTH];
    let mut swap = Swap {
        disk,
        store,
        pending,
        spare,
        jobs: ArrayVec::new(),
        hands: [0; MAX_VMS],
        round: None,
        hopeless: false,
        looked_at: 0,
        put_by: ArrayVec::new(),
    };
    swap.put_frames_by();
    *SWAP.lock() = Some(swap);
    paging::reclaim_by(Work::Swap);
    Ok(slots)
}

/// So many bytes of the virtual machine's memory are to leave, as far as they can. Host's work.
///
/// # Errors
///
/// [`Refusal`]; nothing changed.
pub fn reclaim(number: usize, vm: &Vm, bytes: u64) -> Result<(), Refusal> {
    let mut swap = SWAP.lock();
    let swap = swap.as_mut().ok_or(Refusal::NoDisk)?;
    if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(Refusal::Size);
    }
    let (object, left) = (vm.ram(), bytes >> PAGE_SHIFT);
    // The newest wish counts.
    swap.jobs.retain(|job| job.number != number);
    swap.jobs.push(Job { number, object, left, hand: swap.hands[number], idle: 0, unasked: false });
    host_work::raise(Work::Swap);
    Ok(())
}

/// Raises the work if memory is short.
pub fn look_at_pressure() {
    if paging::has_reclaim() && host::get().pool.free_frames() < LOW {
        host_work::raise(Work::Swap);
    }
}

/// Takes what the disk has done, and gives it what is to do.
pub fn serve() {
    let mut swap = SWAP.lock();
    let Some(swap) = swap.as_mut() else { return };
    swap.collect();
    swap.read();
    swap.relieve();
    let mut steps = 0;
    while let Some(job) = swap.jobs.pop() {
        if swap.spare.len() < RESERVED + WINDOW as usize {
            // Completions go on with it.
            swap.jobs.push(job);
            return;
        }
        if let Some(job) = swap.step(job) {
            // The others have their turn.
            swap.jobs.insert(0, job);
        } else if swap.round.is_some() {
            host_work::raise(Work::Swap);
        }
        steps += 1;
        if steps == STEPS {
            host_work::raise(Work::Swap);
            return;
        }
    }
}

/// Who has most in memory that may leave, of those that were not tried.
fn largest(tried: &[bool; MAX_VMS]) -> Option<(usize, ObjectHandle)> {
    let all = (0..MAX_VMS).filter(|number| !tried[*number]);
    let all = all.filter_map(|number| registry::find(number).map(|vm| (number, vm)));
    let (number, vm) = all.filter(|(_, vm)| !vm.config.private).max_by_key(|(_, vm)| vm.resident_frames())?;
    Some((number, vm.ram()))
}

/// A virtual machine's memory as the core wants it named, and that of all who may share it.
fn family(number: usize, object: ObjectHandle) -> Option<Vec<Arc<Vm>>> {
    let vm = registry::find(number).filter(|vm| vm.shows(object))?;
    let shares = vm.is_forked();
    let mut all = Vec::new();
    all.try_reserve_exact(MAX_VMS).map_err(|_| OutOfHeap).ok()?;
    all.push(vm);
    if shares {
        let frames = all[0].memory_frames();
        let others = (0..MAX_VMS).filter(|other| *other != number).filter_map(registry::find);
        all.extend(others.filter(|other| other.is_forked() && other.memory_frames() == frames));
    }
    Some(all)
}

fn shown(family: &[Arc<Vm>]) -> ArrayVec<Shown<'_, 'static, Metal, Stage2>, MAX_VMS> {
    family.iter().map(|vm| Shown { vm: &vm.memory, object: vm.ram() }).collect()
}

/// The guest frames of a virtual machine's frames.
fn guest(frames: Frames) -> Option<GfnRange> {
    GfnRange::new(Gfn::new((virt::RAM_BASE >> PAGE_SHIFT) + frames.start), frames.count)
}

/// Whether somebody has used one of the frames since they were made old.
fn used(family: &[Arc<Vm>], frames: Frames) -> bool {
    // What lies outside a guest's address space is not to leave.
    guest(frames).is_none_or(|range| family.iter().any(|vm| vm.memory.test_young(cpu::index(), range).unwrap_or(true)))
}

/// Makes the frames old.
fn age(family: &[Arc<Vm>], frames: Frames) {
    let Some(range) = guest(frames) else { return };
    for vm in family {
        if let Err(error) = vm.memory.clear_young(cpu::index(), range) {
            log::error!("swap: vm {}: {error:?}", vm.config.name);
        }
    }
}

/// The frames of `window` that are in memory and that nobody used since the hand came last.
fn old(family: &[Arc<Vm>], window: Frames) -> ArrayVec<u64, { WINDOW as usize }> {
    let all = window.start..window.start + window.count;
    all.filter(|frame| family[0].backing(*frame).is_some() && !used(family, Frames { start: *frame, count: 1 }))
        .collect()
}

/// The block that backs `frame`, if one does.
fn block_at(vm: &Vm, frame: u64) -> Option<Frames> {
    let grant = vm.backing(frame).filter(|grant| grant.size != PageSize::Size4K)?;
    Some(Frames { start: grant.extent_start, count: grant.size.frames() })
}

impl Swap {
    /// Begins, goes on with or ends a round.
    fn relieve(&mut self) {
        let pool = &host::get().pool;
        let free = pool.free_frames();
        if free >= ENOUGH {
            self.put_frames_by();
            paging::memory_came(false);
        }
        if free >= HIGH {
            self.round = None;
            return;
        }
        let wanted = paging::is_memory_wanted();
        self.hopeless &= free < LOW && !wanted;
        if self.round.is_none() && (free < LOW || wanted) && !self.hopeless {
            self.round = Some(Round { tried: [false; MAX_VMS] });
        }
        let Some(round) = &self.round else { return };
        // What is on its way out may be enough.
        let leaving = self.pending.iter().flatten().any(|pending| matches!(pending, Pending::Out(_)));
        if leaving || self.jobs.iter().any(|job| job.unasked) {
            return;
        }
        match largest(&round.tried) {
            Some((number, object)) => {
                let hand = self.hands[number];
                self.jobs.push(Job { number, object, left: BATCH, hand, idle: 0, unasked: true });
            }
            None => {
                (self.round, self.hopeless) = (None, true);
                paging::memory_came(true);
            }
        }
    }

    /// A job is over: if it has not found what it was to, there is no more where it looked.
    fn has_given(&mut self, job: &Job) {
        if let Some(round) = self.round.as_mut().filter(|_| job.unasked && job.left != 0) {
            round.tried[job.number] = true;
        }
    }

    /// A page of virtual machine `number` could not be written.
    fn give_up(&mut self, number: usize) {
        self.jobs.retain(|job| job.number != number);
        if let Some(round) = &mut self.round {
            round.tried[number] = true;
        }
    }

    /// Frees places of pages that are in memory too: to leave again they must be written. Whether there were any.
    fn free_places(&mut self) -> bool {
        let pool = &host::get().pool;
        let before = pool.stores().taken(self.store);
        let mut looked = 0;
        while looked < pool.total_frames() && pool.stores().taken(self.store) == before {
            let _pin = host::get().epoch.pin(cpu::index());
            let next = pool.stop_keeping_for(self.store, self.looked_at, LOOKS);
            looked += LOOKS;
            self.looked_at = next.unwrap_or(0);
        }
        pool.stores().taken(self.store) != before
    }

    fn put_frames_by(&mut self) {
        while !self.put_by.is_full()
            && let Ok(frame) = host::get().pool.take(cpu::index(), Order::PAGE)
        {
            self.put_by.push(frame);
        }
    }

    /// Gives back what was put by. Whether there was something.
    fn spend_put_by(&mut self) -> bool {
        let had = !self.put_by.is_empty();
        for frame in self.put_by.drain(..) {
            host::get().pool.give(cpu::index(), frame, Order::PAGE);
        }
        had
    }

    /// Takes what the disk has done.
    fn collect(&mut self) {
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
                    if let (Ok(()), Some(buffer)) = (done.result, self.spare.last()) {
                        host::get().machine.write(reading.pfn().base(), buffer.bytes());
                    }
                    reading.finish(done.result.is_ok());
                }
                Pending::Out(Leaving { out, page }) => {
                    out.finish(&host::get().supply(cpu::index()), done.result.is_ok());
                    match done.result {
                        Ok(()) if !written.is_full() => written.push(page),
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

    /// Pages that were written leave, but for those that were used since.
    fn let_go(&mut self, first: Page, count: u64) {
        let Some(family) = family(first.number, first.object) else { return };
        let shown = shown(&family);
        for frame in first.frame..first.frame + count {
            let frames = Frames { start: frame, count: 1 };
            if !used(&family, frames) && discard(cpu::index(), &shown, frames) == Ok(1) {
                continue;
            }
            // Another goes in its place.
            self.jobs.iter_mut().filter(|job| job.number == first.number).for_each(|job| job.left += 1);
        }
    }

    /// Asks the disk for pages that are waited for.
    fn read(&mut self) {
        while !self.spare.is_empty()
            && let Some(reading) = paging::next(self.store)
        {
            if let Some((object, frame)) = reading.page() {
                self.read_ahead(object, frame);
            }
            let sector = reading.slot().index() * SECTORS;
            self.submit(Operation::Read, sector, Pending::In(reading));
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
    fn submit(&mut self, operation: Operation, sector: u64, pending: Pending) {
        let free = self.pending.iter().position(Option::is_none);
        let (Some(tag), Some(mut buffer)) = (free, self.spare.pop()) else {
            unreachable!("a buffer for each request, and a place for each buffer");
        };
        if let Pending::Out(leaving) = &pending {
            host::get().machine.read(leaving.out.pfn().base(), buffer.bytes_mut());
        }
        let len = PAGE_SIZE as usize;
        let request = Request { operation, sector, len, buffer: Some(buffer), tag: tag as u64 };
        if let Err(refused) = self.disk.submit(request) {
            log::warn!("swap: {}", refused.error);
            self.spare.extend(refused.request.buffer);
            match pending {
                Pending::In(reading) => reading.finish(false),
                Pending::Out(leaving) => {
                    leaving.out.finish(&host::get().supply(cpu::index()), false);
                    self.give_up(leaving.page.number);
                }
            }
            return;
        }
        self.pending[tag] = Some(pending);
    }

    /// One window of a job; the job, if there is more of it.
    fn step(&mut self, mut job: Job) -> Option<Job> {
        let family = family(job.number, job.object)?;
        let total = family[0].memory_frames();
        if job.left == 0 || job.idle > 2 * total {
            self.hands[job.number] = job.hand;
            self.has_given(&job);
            return None;
        }
        job.hand %= total;
        if let Some(block) = block_at(&family[0], job.hand)
            && used(&family, block)
        {
            // One entry for all of it: it is used as a whole.
            age(&family, block);
            let end = block.start + block.count;
            job.idle += end - job.hand;
            job.hand = end;
            return Some(job);
        }
        let window = Frames { start: job.hand, count: WINDOW.min(total - job.hand).min(job.left) };
        let old = old(&family, window);
        if used(&family, window) {
            age(&family, window);
        }
        job.hand += window.count;
        job.idle += window.count;
        for run in old.chunk_by(|one, other| one + 1 == *other) {
            let frames = Frames { start: run[0], count: run.len() as u64 };
            match self.leave(&family, &job, frames) {
                Ok(0) => {}
                Ok(left) => {
                    job.left = job.left.saturating_sub(left);
                    job.idle = 0;
                }
                // Nothing of it leaves: it is looked at again when there is room.
                Err(LeaveError::Out(OutError::OutOfMemory)) if self.spend_put_by() => job.hand = frames.start,
                Err(LeaveError::Out(OutError::Store(StoreError::Full { .. }))) if self.free_places() => {
                    job.hand = frames.start;
                }
                Err(error) => {
                    log::warn!("swap: vm {}: {error:?}", family[0].config.name);
                    self.has_given(&job);
                    return None;
                }
            }
        }
        Some(job)
    }

    /// Pages begin to leave, or have left. Returns how many.
    fn leave(&mut self, family: &[Arc<Vm>], job: &Job, frames: Frames) -> Result<u64, LeaveError> {
        let shown = shown(family);
        let mut outs: ArrayVec<Leaving, { WINDOW as usize }> = ArrayVec::new();
        let begun = begin_out(cpu::index(), &shown, frames, self.store, |frame, out| {
            outs.push(Leaving { out, page: Page { number: job.number, object: job.object, frame } });
        });
        let mut count = outs.len() as u64;
        for leaving in outs {
            let sector = leaving.out.slot().index() * SECTORS;
            self.submit(Operation::Write, sector, Pending::Out(leaving));
        }
        begun?;
        if count < frames.count {
            count += discard(cpu::index(), &shown, frames)?;
        }
        Ok(count)
    }
}
