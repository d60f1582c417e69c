//! Pages that are fetched: who waits for what, and what happens when it has come.
//!
//! Purpose: a vCPU, or a device, that needs a page which a store has ([`entresol_mmu::Absent`]) says so here ([`want`]) and gives
//! way; its siblings and all others run. The store's keeper takes what is wanted ([`next`]), fills the frame in its own time, and says
//! how that went ([`Reading::filled`], [`Reading::failed`]). Whoever waited then tries again.
//!
//! Protocol: a keeper is host's work; it says which work of its own to raise ([`keep`]). There is one reading for a place,
//! however many want it: their pages are noted with it, and get the same frame. A vCPU sleeps until its reading is over
//! ([`crate::sched::Leave::Fetch`]); a device is remembered by its virtual machine, and goes on when any reading is over. Both look
//! again then, as does a task of the store ([`bring`]): a page may have come by another way, have gone, or have missed its place in the note.
//!
//! Who needs a frame where there is none waits here too, if somebody reclaims ([`frames_for`]): until frames have been freed, or a round of reclaim has
//! found nothing that may leave ([`memory_came`]). In the second case the first who finds none again is told so, and is paused by its
//! caller; that is one guest less that wants some.
//!
//! Who may have no more frames (`memory.max`) waits the same way for room of its own ([`room_came`]). A reading that is on its way is not stopped by that.
//!
//! When a reading fails that a guest wants, every virtual machine that shows a page of it is paused ([`Pause::Storage`]). Nothing is remembered of
//! the failure: let run again, it asks anew. A virtual machine that ends leaves its readings as they are: nobody has the
//! page then, and the frame is given back.
//!
//! Invariants: INV-7: a frame that was taken for a reading is put in or given back by `filled` or `failed`. Nothing here
//! allocates on the heap. Bounded: [`READINGS`] at once; who wants more waits until one of them is over.
//! Lock order: scheduler → the table here → pool.

use core::future::poll_fn;
use core::task::Poll;

use crate::arch::cpu;
use entresol_addr::{Gpa, Pfn};
use entresol_backing::{Fetch, ObjectHandle, StoreId, StoreSlot};
use entresol_devices::kick::Kick;
use entresol_machine::Tags;
use entresol_mmu::Absent;
use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicBool, Ordering};

use crate::host_work::{self, Work};
use crate::store::task;
use crate::vm::{Pause, Vm};
use crate::{host, registry, sched};

/// Readings at once.
const READINGS: usize = 64;
/// Pages that get the frame of one reading; others that want it read again.
const PAGES: usize = 8;
/// Failures that a task takes for those of the page that it wants.
const FAILURES: u32 = 3;
/// Keepers at once.
const KEEPERS: usize = 64;

/// A reading, or frames, to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

impl Ticket {
    /// Bits for the place: a ticket is one register, because it lies in what every exit returns.
    const PLACE: u32 = 7;

    /// The reading of that number, in that place.
    const fn new(place: usize, number: u64) -> Self {
        Self(number << Self::PLACE | place as u64)
    }

    const fn place(self) -> usize {
        (self.0 & ((1 << Self::PLACE) - 1)) as usize
    }

    const fn number(self) -> u64 {
        self.0 >> Self::PLACE
    }
}

/// Where, after the readings, the waits for frames and for room are.
const FRAMES: usize = READINGS;
const ROOM: usize = READINGS + 1;

const _: () = assert!(ROOM < 1 << Ticket::PLACE);

/// What [`want`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// It is on its way, or something is whose end makes room for it.
    Later(Ticket),
    /// It is not absent any more.
    Now,
    /// No frame for it.
    OutOfMemory,
    /// Nobody keeps its store.
    Lost,
}

/// Who wants a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// A guest, or a device of its: it stops if it cannot have it.
    Guests,
    /// The hypervisor itself: if it does not come, nobody stops.
    Nobodys,
}

/// The page of an object that is wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Page {
    object: ObjectHandle,
    frame: u64,
}

struct Entry {
    number: u64,
    slot: StoreSlot,
    /// Until a keeper takes it.
    fetch: Option<Fetch>,
    /// A guest wants it.
    guests: bool,
    pages: [Option<Page>; PAGES],
}

struct Table {
    entries: [Option<Entry>; READINGS],
    keepers: [Option<(StoreId, Work)>; KEEPERS],
    /// Readings that ever were.
    count: u64,
    /// Those that failed.
    failures: u64,
}

/// The wait for frames.
struct Memory {
    /// Who reclaims.
    keeper: Option<Work>,
    /// Ends of the wait so far.
    round: u64,
    /// Why the last end was one without frames, until somebody has been told.
    lack: Option<Pause>,
    /// Somebody waits.
    wanted: bool,
    /// Counts the ends of waits for room below a limit.
    rooms: u64,
}

/// A virtual machine's wait for room below its limit.
#[derive(Debug, Default)]
pub struct Short(Mutex<Shortage>);

#[derive(Debug, Default)]
struct Shortage {
    wanted: bool,
    /// Why none could be made, until somebody has been told.
    lack: Option<Pause>,
}

static MEMORY: Mutex<Memory> = Mutex::new(Memory { keeper: None, round: 0, lack: None, wanted: false, rooms: 0 });

static TABLE: Mutex<Table> =
    Mutex::new(Table { entries: [const { None }; READINGS], keepers: [None; KEEPERS], count: 0, failures: 0 });

/// Whether a device waits.
static DEVICES: AtomicBool = AtomicBool::new(false);
/// Whether a task of the store waits.
static TASKS: AtomicBool = AtomicBool::new(false);

impl Entry {
    /// The page gets the frame too, if there is room for the note.
    fn note(&mut self, page: Page) {
        if !self.pages.contains(&Some(page))
            && let Some(free) = self.pages.iter_mut().find(|page| page.is_none())
        {
            *free = Some(page);
        }
    }
}

impl Table {
    fn keeper(&self, store: StoreId) -> Option<Work> {
        self.keepers.iter().flatten().find(|(kept, _)| *kept == store).map(|(_, work)| *work)
    }

    /// The reading of `slot`, with `page` noted.
    fn join(&mut self, slot: StoreSlot, page: Page, whose: Whose) -> Option<Ticket> {
        let place = self.entries.iter().position(|entry| entry.as_ref().is_some_and(|entry| entry.slot == slot))?;
        let entry = self.entries[place].as_mut()?;
        entry.guests |= whose == Whose::Guests;
        entry.note(page);
        Some(Ticket::new(place, entry.number))
    }

    /// A reading whose end is the end of a wait for room.
    fn any(&self) -> Option<Ticket> {
        let place = (self.count % READINGS as u64) as usize;
        self.entries[place].as_ref().map(|entry| Ticket::new(place, entry.number))
    }
}

/// The store's pages are fetched by who does `work`, from now on.
///
/// # Errors
///
/// There are as many keepers as there may be; nothing changed.
pub fn keep(store: StoreId, work: Work) -> Result<(), TooMany> {
    let mut table = TABLE.lock();
    let place = table.keepers.iter_mut().find(|place| place.is_none()).ok_or(TooMany)?;
    *place = Some((store, work));
    Ok(())
}

/// Nobody fetches the store's pages any more: there are none, and it is about to be closed.
pub fn stop_keeping(store: StoreId) {
    let mut table = TABLE.lock();
    for place in table.keepers.iter_mut().filter(|place| place.is_some_and(|(kept, _)| kept == store)) {
        *place = None;
    }
}

/// As many keepers as there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

/// The page that is absent is to be fetched; `vm` shows it.
pub fn want(vm: &Vm, gpa: Gpa) -> Wanted {
    if vm.room() == Some(0) {
        return Wanted::OutOfMemory;
    }
    let absent = {
        let pin = host::get().epoch.pin(cpu::index());
        vm.memory.absent(&pin, gpa)
    };
    match absent {
        Some(Absent { object, frame, slot }) => want_frame(object, frame, slot, Whose::Guests),
        None => Wanted::Now,
    }
}

/// Frame `frame` of `object`, whose content is at `slot`, is to be fetched.
pub fn want_frame(object: ObjectHandle, frame: u64, slot: StoreSlot, whose: Whose) -> Wanted {
    let page = Page { object, frame };
    let host = host::get();
    if is_brought(page, slot) {
        return Wanted::Now;
    }
    let mut table = TABLE.lock();
    if let Some(ticket) = table.join(slot, page, whose) {
        return Wanted::Later(ticket);
    }
    let Some(work) = table.keeper(slot.store()) else {
        // The last keeper went when nobody had a page there any more.
        return if place_of(object, frame) == Some(slot) { Wanted::Lost } else { Wanted::Now };
    };
    let Some(place) = table.entries.iter().position(Option::is_none) else {
        return table.any().map_or(Wanted::Now, Wanted::Later);
    };
    let fetch = match Fetch::new(&host.supply(cpu::index()), slot) {
        Ok(Some(fetch)) => fetch,
        Ok(None) => return Wanted::Now,
        Err(entresol_backing::OutOfMemory) => return Wanted::OutOfMemory,
    };
    table.count += 1;
    let number = table.count;
    let mut pages = [None; PAGES];
    pages[0] = Some(page);
    table.entries[place] = Some(Entry { number, slot, fetch: Some(fetch), guests: whose == Whose::Guests, pages });
    drop(table);
    host_work::raise(work);
    Wanted::Later(Ticket::new(place, number))
}

/// Gives the page the frame that has the same already, of a relative's that came back before. Whether there is one.
fn is_brought(page: Page, slot: StoreSlot) -> bool {
    let host = host::get();
    let supply = host.supply(cpu::index());
    let pin = host.epoch.pin(cpu::index());
    let Some(fetch) = Fetch::cached(&supply, slot) else { return false };
    let restored =
        host.objects.get(&pin, page.object).is_some_and(|object| object.restore(&supply, page.frame, &fetch));
    fetch.give_back(&supply);
    restored
}

/// Whether the reading is still on its way. Asked under the scheduler's lock.
pub fn is_pending(ticket: Ticket) -> bool {
    match ticket.place() {
        FRAMES => return MEMORY.lock().round == ticket.number(),
        ROOM => return MEMORY.lock().rooms == ticket.number(),
        _ => {}
    }
    TABLE.lock().entries[ticket.place()].as_ref().is_some_and(|entry| entry.number == ticket.number())
}

/// Frames are reclaimed by who does `work`, from now on.
pub fn reclaim_by(work: Work) {
    MEMORY.lock().keeper = Some(work);
}

/// Nobody reclaims frames any more. Who waits for some has still to be told ([`memory_came`], [`room_came`]).
pub fn stop_reclaim() {
    MEMORY.lock().keeper = None;
}

/// There is no frame for `vm`, or it may have no more: the end of the wait for one.
///
/// # Errors
///
/// Nobody can reclaim any: why it is to be paused.
pub fn frames_for(vm: &Vm) -> Result<Ticket, Pause> {
    if vm.room() != Some(0) {
        return frames();
    }
    let memory = MEMORY.lock();
    let mut short = vm.short.0.lock();
    if let Some(lack) = short.lack.take() {
        return Err(lack);
    }
    let work = memory.keeper.ok_or(Pause::OutOfMemory)?;
    short.wanted = true;
    let ticket = Ticket::new(ROOM, memory.rooms);
    drop((short, memory));
    host_work::raise(work);
    Ok(ticket)
}

/// Whether somebody waits for room below the limit of `vm`.
pub fn is_room_wanted(vm: &Vm) -> bool {
    vm.short.0.lock().wanted
}

/// `vm` has room, or gets none for the reason `lack`. Host's work.
pub fn room_came(vm: &Vm, lack: Option<Pause>) {
    let mut memory = MEMORY.lock();
    {
        let mut short = vm.short.0.lock();
        if !core::mem::take(&mut short.wanted) {
            return;
        }
        short.lack = lack;
    }
    let ticket = Ticket::new(ROOM, memory.rooms);
    memory.rooms += 1;
    drop(memory);
    sched::fetched(ticket);
    wake_others();
}

/// There is no frame: the end of the wait for one.
fn frames() -> Result<Ticket, Pause> {
    let mut memory = MEMORY.lock();
    if let Some(lack) = memory.lack.take() {
        return Err(lack);
    }
    let work = memory.keeper.ok_or(Pause::OutOfMemory)?;
    memory.wanted = true;
    let ticket = Ticket::new(FRAMES, memory.round);
    drop(memory);
    host_work::raise(work);
    Ok(ticket)
}

/// Whether somebody reclaims.
pub fn has_reclaim() -> bool {
    MEMORY.lock().keeper.is_some()
}

/// Whether somebody waits for frames.
pub fn is_memory_wanted() -> bool {
    MEMORY.lock().wanted
}

/// Frames were freed, or none can be for the reason `lack`. Host's work.
pub fn memory_came(lack: Option<Pause>) {
    let mut memory = MEMORY.lock();
    if !core::mem::take(&mut memory.wanted) {
        return;
    }
    memory.lack = lack;
    let ticket = Ticket::new(FRAMES, memory.round);
    memory.round += 1;
    drop(memory);
    sched::fetched(ticket);
    wake_others();
}

/// Devices and tasks that wait look again.
fn wake_others() {
    if DEVICES.swap(false, Ordering::SeqCst) {
        registry::for_each(let_device_go_on);
    }
    if TASKS.swap(false, Ordering::SeqCst) {
        host_work::raise(Work::Store);
    }
}

/// A device of `vm` waits for a frame.
pub fn device_waits_for(vm: &Vm, ticket: Ticket) {
    DEVICES.store(true, Ordering::SeqCst);
    // As for a page.
    if !is_pending(ticket) {
        let_device_go_on(vm);
    }
}

/// Why a page did not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// No frame for it.
    OutOfMemory,
    /// It cannot be read, or nobody keeps its store.
    Unreadable,
}

/// Fetches frame `frame` of `object`, for a task of the store: until `slot` is not what it names any more.
///
/// # Errors
///
/// [`Missing`].
pub async fn bring(object: ObjectHandle, frame: u64, slot: StoreSlot) -> Result<(), Missing> {
    let mut failures = 0;
    while place_of(object, frame) == Some(slot) {
        let before = TABLE.lock().failures;
        match want_frame(object, frame, slot, Whose::Nobodys) {
            Wanted::Later(reading) => until_over(reading).await,
            Wanted::Now => task::pause().await,
            Wanted::OutOfMemory => until_over(frames().map_err(|_| Missing::OutOfMemory)?).await,
            Wanted::Lost => return Err(Missing::Unreadable),
        }
        // It may have been another's that failed, but not each time.
        failures += u32::from(TABLE.lock().failures != before);
        if failures == FAILURES {
            return Err(Missing::Unreadable);
        }
    }
    Ok(())
}

/// Where a store has frame `frame` of `object`.
fn place_of(object: ObjectHandle, frame: u64) -> Option<StoreSlot> {
    let host = host::get();
    let pin = host.epoch.pin(cpu::index());
    host.objects.get(&pin, object)?.stored_at(&host.machine, frame)
}

async fn until_over(ticket: Ticket) {
    poll_fn(|_| {
        TASKS.store(true, Ordering::SeqCst);
        // Noted before the question: a reading that is over after it raises the work.
        if is_pending(ticket) { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
}

/// A device of `vm` waits for a page: it goes on when a reading is over, or at once if there is none.
pub fn device_waits(vm: &Vm) {
    DEVICES.store(true, Ordering::SeqCst);
    // Noted before the question: a reading that is over after it finds the device.
    if TABLE.lock().entries.iter().all(Option::is_none) {
        let_device_go_on(vm);
    }
}

fn let_device_go_on(vm: &Vm) {
    if vm.devices.go_on() {
        sched::kick(vm, Kick::all(vm.vcpus()));
    }
}

/// A page on its way, in its keeper's hands.
#[must_use = "whoever waits for it waits for ever"]
pub struct Reading {
    ticket: Ticket,
    fetch: Fetch,
}

/// The next page of `store` that is wanted, for its keeper.
pub fn next(store: StoreId) -> Option<Reading> {
    let mut table = TABLE.lock();
    let waits = |entry: &Entry| entry.fetch.is_some() && entry.slot.store() == store;
    let oldest = (0..READINGS).filter(|place| table.entries[*place].as_ref().is_some_and(waits));
    let place = oldest.min_by_key(|place| table.entries[*place].as_ref().map(|entry| entry.number))?;
    let entry = table.entries[place].as_mut()?;
    let fetch = entry.fetch.take()?;
    Some(Reading { ticket: Ticket::new(place, entry.number), fetch })
}

impl Reading {
    /// The frame to fill.
    pub fn pfn(&self) -> Pfn {
        self.fetch.pfn()
    }

    /// Where its content lies.
    pub fn slot(&self) -> StoreSlot {
        self.fetch.slot()
    }

    /// The page that a guest waits for, as its object and the frame there.
    pub fn page(&self) -> Option<(ObjectHandle, u64)> {
        let table = TABLE.lock();
        let entry = table.entries[self.ticket.place()].as_ref().filter(|entry| entry.guests)?;
        entry.pages[0].map(|page| (page.object, page.frame))
    }

    /// The same frame of `object` is filled too, if it waits for the same place.
    pub fn also(&mut self, object: ObjectHandle) {
        let mut table = TABLE.lock();
        let Some(entry) = table.entries[self.ticket.place()].as_mut() else { return };
        let Some(Page { frame, .. }) = entry.pages[0] else { return };
        if place_of(object, frame) == Some(entry.slot) {
            entry.note(Page { object, frame });
        }
    }

    /// Whether its content has tags beside it.
    pub fn is_tagged(&self) -> bool {
        self.fetch.is_tagged()
    }

    /// The frame is filled, and gets these tags, if its content has some. Host's work.
    pub fn filled(mut self, tags: Option<&Tags>) {
        self.fetch.filled(&host::get().supply(cpu::index()), tags);
        self.end(true);
    }

    /// The frame could not be filled. Host's work.
    pub fn failed(self) {
        TABLE.lock().failures += 1;
        self.end(false);
    }

    fn end(self, filled: bool) {
        let Self { ticket, fetch } = self;
        let host = host::get();
        let supply = host.supply(cpu::index());
        let noted = TABLE.lock().entries[ticket.place()].as_ref().map(|entry| (entry.pages, entry.guests));
        let (pages, guests) = noted.unwrap_or(([None; PAGES], false));
        for page in pages.into_iter().flatten() {
            if filled {
                let pin = host.epoch.pin(cpu::index());
                if let Some(object) = host.objects.get(&pin, page.object) {
                    object.restore(&supply, page.frame, &fetch);
                }
            } else if guests {
                registry::for_each(|vm| {
                    if vm.shows(page.object) {
                        vm.pause(Pause::Storage);
                    }
                });
            }
        }
        // Whoever was noted since looks again, and finds the page or begins anew.
        TABLE.lock().entries[ticket.place()] = None;
        fetch.give_back(&supply);
        sched::fetched(ticket);
        wake_others();
    }
}
