//! Memory on a disk: the outer machine's device `entresol-swap`.
//!
//! Purpose: pages of guests that were not used lately make room for others. The core says which page may leave, and that it is the
//! same when it is back ([`entresol_mmu::begin_out`]); here is who leaves, and when, and the way to the disk and back.
//!
//! | room | what is in it |
//! |---|---|
//! | this one | the state, what the owner asks for, one turn of the work |
//! | [`hand`] | which pages of a virtual machine leave |
//! | [`pressure`] | when memory is reclaimed unasked, and whose |
//! | [`device`] | requests to the disk, and what has become of them |
//! | [`removal`] | the disk is taken out of use |
//!
//! Protocol, all of it host's work: the owner asks for so much of a virtual machine's memory ([`reclaim`]), and is told how much left when there is no
//! more, or the disk has failed. The newest wish for a virtual machine counts; who wished before is told what has left until then.
//!
//! Invariants: INV-7: what is on its way is in `pending`, with its buffer inside the driver. Nothing here allocates after [`init`] but
//! frames for nodes when a block is taken apart, and the families that the hand looks at. Lock order: the state here is first of all, and host's work alone takes it.
//!
//! A place is nine sectors: eight have the page, the ninth its tags, if it has some ([`entresol_backing::Out::tags`]). One request
//! writes both, or neither counts; no two places share a sector, so none tears another's tags.

mod device;
mod hand;
mod pressure;
mod removal;

use arrayvec::ArrayVec;
use entresol_addr::{PAGE_SHIFT, PAGE_SIZE, Pfn};
use entresol_backing::{ObjectHandle, Order, StoreId};
use entresol_machine::Tags;
use entresol_sync::Mutex;
use entresol_wire::config::MAX_VMS;
use entresol_wire::control::{Answer, Code, Error};

use self::device::{Leaving, Pending};
use self::pressure::Round;
use self::removal::Removal;
use crate::block::{self, Buffer, DEPTH, Disk, SECTOR};
use crate::control::Later;
use crate::host_work::{self, Work};
use crate::vm::{Pause, Vm};
use crate::{host, paging};

pub use self::pressure::look_at_pressure;
pub use self::removal::{Refusal as Stays, remove};

/// Frames that the hand looks at in one step.
const WINDOW: u64 = 8;
/// Steps between two looks at other work: below half a millisecond. Where a guest keeps the boot CPU busy there is one look in each turn of its.
const STEPS: usize = 64;
/// Requests that pages on their way out leave to others.
const RESERVED: usize = DEPTH / 4;
/// Frames that are put by.
const PUT_BY: usize = 32;
/// Bytes of a page with its tags, in whole sectors.
const TAGGED: usize = (PAGE_SIZE + SECTOR) as usize;
/// Sectors of a place.
const SECTORS: u64 = TAGGED as u64 / SECTOR;
/// Two frames.
const BUFFER: Order = Order::new(1).expect("small");

const _: () = assert!(Tags::BYTES as u64 <= SECTOR && TAGGED as u64 <= BUFFER.frames() * PAGE_SIZE);

const _: () = assert!(WINDOW as usize <= DEPTH - RESERVED);

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
    why: Why,
}

/// Why memory leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// The owner asked for it.
    Asked,
    /// It is part of the round.
    Short,
    /// The virtual machine has all that it may have.
    Limit,
}

/// What the owner asked for.
struct Wish {
    number: usize,
    /// Pages that left since.
    gone: u64,
    /// Those of them that the disk had already.
    unwritten: u64,
    /// A page could not be written.
    failed: bool,
    answer: Later,
}

struct Swap {
    disk: &'static Disk,
    store: StoreId,
    pending: [Option<Pending>; DEPTH],
    spare: ArrayVec<Buffer, DEPTH>,
    jobs: ArrayVec<Job, { 2 * MAX_VMS + 1 }>,
    wishes: ArrayVec<Wish, MAX_VMS>,
    /// Where the hand stopped in each virtual machine.
    hands: [u64; MAX_VMS],
    round: Option<Round>,
    /// The last round found nothing, and there is no more free, nor anybody who waits, since.
    hopeless: bool,
    /// Why somebody's last job for room found too little, by number.
    spent: [Option<Pause>; MAX_VMS],
    /// Where frames were last looked at whose places are to be freed.
    looked_at: u64,
    /// Frames for nodes.
    put_by: ArrayVec<Pfn, PUT_BY>,
    /// It is to be used no more.
    removal: Option<Removal>,
}

static SWAP: Mutex<Option<Swap>> = Mutex::new(None);

/// Why no memory is reclaimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The machine has no disk for it, or does not use it.
    NoDisk,
    /// The disk is being removed.
    Removing,
    /// Less than a page, or no whole pages.
    Size,
}

/// Begins to use the disk, if there is one.
pub fn init() {
    if block::find(Work::Swap).is_some()
        && let Err(what) = add()
    {
        log::error!("swap: {what}");
    }
}

/// The disk is used, from now on. Returns bytes that it has room for.
///
/// # Errors
///
/// Why it is not; nothing changed.
pub fn add() -> Result<u64, &'static str> {
    let disk = block::find(Work::Swap).ok_or("the machine has no disk entresol-swap")?;
    if SWAP.lock().is_some() {
        return Err("the disk entresol-swap is in use");
    }
    let slots = start(disk)?;
    log::info!("swap: {} MiB", slots >> 8);
    Ok(slots << PAGE_SHIFT)
}

fn start(disk: &'static Disk) -> Result<u64, &'static str> {
    let mut spare = ArrayVec::new();
    for _ in 0..DEPTH {
        spare.push(Buffer::take(BUFFER).map_err(|_| "there are no frames for the buffers of the disk entresol-swap")?);
    }
    let slots = disk.sectors() / SECTORS;
    let stores = host::get().pool.stores();
    let store = stores
        .open_counted(slots)
        .map_err(|_| "the disk entresol-swap has no place for a page, or the heap none for its records")?;
    if paging::keep(store, Work::Swap).is_err() {
        stores.close(store).map_err(|_| "a store that was just opened is in use")?;
        return Err("there are too many stores");
    }
    let pending = [const { None }; DEPTH];
    let mut swap = Swap {
        disk,
        store,
        pending,
        spare,
        jobs: ArrayVec::new(),
        wishes: ArrayVec::new(),
        hands: [0; MAX_VMS],
        round: None,
        hopeless: false,
        spent: [None; MAX_VMS],
        looked_at: 0,
        put_by: ArrayVec::new(),
        removal: None,
    };
    swap.put_frames_by();
    *SWAP.lock() = Some(swap);
    paging::reclaim_by(Work::Swap);
    Ok(slots)
}

/// So many bytes of the virtual machine's memory are to leave, as far as they can. Answered with the bytes that left. Host's work.
///
/// # Errors
///
/// [`Refusal`]; nothing changed.
pub fn reclaim(number: usize, vm: &Vm, bytes: u64) -> Result<Later, Refusal> {
    let mut swap = SWAP.lock();
    let swap = swap.as_mut().ok_or(Refusal::NoDisk)?;
    if swap.is_leaving_use() {
        return Err(Refusal::Removing);
    }
    if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(Refusal::Size);
    }
    let (object, left) = (vm.ram(), bytes >> PAGE_SHIFT);
    swap.jobs.retain(|job| job.number != number);
    swap.answer(|wish| wish.number == number);
    let answer = Later::default();
    swap.wishes.push(Wish { number, gone: 0, unwritten: 0, failed: false, answer: answer.clone() });
    swap.jobs.push(Job { number, object, left, hand: swap.hands[number], idle: 0, why: Why::Asked });
    host_work::raise(Work::Swap);
    Ok(answer)
}

/// Takes what the disk has done, and gives it what is to do.
pub fn serve() {
    let mut state = SWAP.lock();
    let Some(swap) = state.as_mut() else { return };
    swap.collect();
    swap.read();
    if swap.is_leaving_use() {
        if swap.empty()
            && let Some(swap) = state.take()
        {
            swap.finish();
        }
        return;
    }
    swap.make_room();
    swap.relieve();
    swap.work();
    swap.answer_fulfilled();
}

impl Swap {
    /// Some steps of the jobs, in turn.
    fn work(&mut self) {
        for _ in 0..STEPS {
            let Some(job) = self.jobs.pop() else { return };
            if self.spare.len() < RESERVED + WINDOW as usize {
                // Completions go on with it.
                self.jobs.push(job);
                return;
            }
            if let Some(job) = self.step(job) {
                // The others have their turn.
                self.jobs.insert(0, job);
            } else {
                host_work::raise(Work::Swap);
            }
        }
        host_work::raise(Work::Swap);
    }

    /// Pages of virtual machine `number` have left.
    fn have_left(&mut self, number: usize, pages: u64) {
        self.wishes.iter_mut().filter(|wish| wish.number == number).for_each(|wish| wish.gone += pages);
    }

    /// The disk had them already: nothing was written.
    fn have_left_unwritten(&mut self, number: usize, pages: u64) {
        self.have_left(number, pages);
        self.wishes.iter_mut().filter(|wish| wish.number == number).for_each(|wish| wish.unwritten += pages);
    }

    /// Answers the wishes of which no more leaves.
    fn answer_fulfilled(&mut self) {
        let over = |number| !self.jobs.iter().any(|job| job.number == number) && !self.is_leaving(number);
        let mut all = [false; MAX_VMS];
        self.wishes.iter().for_each(|wish| all[wish.number] = over(wish.number));
        self.answer(|wish| all[wish.number]);
    }

    /// Whether a page of virtual machine `number` is on its way out.
    fn is_leaving(&self, number: usize) -> bool {
        let out = |pending: &Pending| matches!(pending, Pending::Out(Leaving { page, .. }) if page.number == number);
        self.pending.iter().flatten().any(out)
    }

    fn answer(&mut self, over: impl Fn(&Wish) -> bool) {
        self.wishes.retain(|wish| {
            let over = over(wish);
            if over {
                log::info!(
                    "swap: vm {}: {} pages have left, {} of them unwritten",
                    wish.number,
                    wish.gone,
                    wish.unwritten
                );
                let failed = || Error::new(Code::StoreFailed, "the disk entresol-swap did not write a page");
                wish.answer.say(if wish.failed { Err(failed()) } else { Ok(Answer::Count(wish.gone << PAGE_SHIFT)) });
            }
            !over
        });
    }
}
