//! Memory that is read from a snapshot's files while its machine runs already.
//!
//! Purpose: a machine that is made from a file does not wait for its memory. Each page of the chain's files is a place of a
//! *plain* store of the core ([`entresol_backing::Stores::open`]); the new memory names these places, and a page is read when somebody needs it.
//! Meanwhile the others are brought, in order, so that the files are free again.
//!
//! Protocol: [`Source::open`] and [`Source::put`], from the oldest file to the newest; the machine starts; [`Source::begin`]. [`READERS`] tasks take
//! what is wanted ([`crate::paging::next`]), read it, compare its checksum, and say how it went. A page that cannot be read, or is
//! another than was written, stops who touches it ([`crate::vm::Pause::Storage`]); let run again, it is read again. Bringing ends at the first such page, and
//! stops nobody.
//!
//! When no page is left there, frames are no longer known to hold what the files do, and the store is closed. As long as it
//! is open its files cannot be removed or replaced ([`check_unused`]).
//!
//! Relatives: the image that the next difference is against, and machines that were forked since, get the frame that one of
//! them reads: otherwise what none of them wrote would be kept twice, and would be a difference.
//!
//! Known holes: memory that comes so is mapped by pages of 4 KiB. Disks and private memory are read before the machine runs.
//!
//! Invariants: INV-7: a place that is named is a reference, and a store is closed when there is none.
//! Lock order: the list of sources is a leaf.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::future::poll_fn;
use core::task::Poll;

use crate::arch::{cpu, timer};
use entresol_addr::PAGE_SIZE;
use entresol_backing::{GrantError, ObjectHandle, Order, PutError, StoreId, StoreSlot};
use entresol_machine::{Machine, Tags};
use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicBool, Ordering};
use entresol_wire::Refusal;
use entresol_wire::config::MAX_VMS;
use entresol_wire::control::{Code, Error};
use entresol_wire::store::{Directory, File};

use super::{Refused, kept};
use crate::block::Buffer;
use crate::host_work::{self, Work};
use crate::paging::{self, Missing, Reading};
use crate::store::{Failure, io, task};
use crate::{host, registry};

/// Pages of one source that are read at once.
const READERS: usize = 8;
/// Frames that are looked at before guests have their turn.
const LOOKS: u64 = 512;

/// The open sources.
static SOURCES: Mutex<Vec<Arc<Source>>> = Mutex::new(Vec::new());

/// A file, and the checksums of its pages.
#[derive(Clone)]
pub struct Pages {
    pub file: File,
    pub checksums: Vec<u32>,
    /// They have tags.
    pub tagged: bool,
}

/// Where the memory of a machine comes from.
pub struct Source {
    store: StoreId,
    /// Oldest first, with the place of its first page.
    files: Vec<(u64, Pages)>,
    closed: AtomicBool,
}

/// The file called `name`, if there is one, may be removed or replaced.
///
/// # Errors
///
/// [`Refused`]: memory is still to be read from it.
pub fn check_unused(directory: &Directory, name: &str) -> Result<(), Refused> {
    let Ok(file) = directory.file(name) else { return Ok(()) };
    let sources = SOURCES.lock();
    let mut used = sources.iter().flat_map(|source| &source.files);
    if !used.any(|(_, pages)| pages.file.id == file.id) {
        return Ok(());
    }
    let rule = "must not be changed while a machine that was made from it still reads its memory there";
    Err(Refused(Error::refused(Code::WrongState, Refusal::text("file", name, rule))))
}

impl Source {
    /// A store whose places are the pages of `files`, oldest first; `None` if they have none.
    ///
    /// # Errors
    ///
    /// [`Refused`]: there are too many.
    pub fn open(files: Vec<Pages>) -> Result<Option<Arc<Self>>, Refused> {
        let mut places = 0;
        let numbered = files.into_iter().map(|pages| {
            let first = places;
            places += pages.checksums.len() as u64;
            (first, pages)
        });
        let files: Vec<_> = numbered.collect();
        if places == 0 {
            return Ok(None);
        }
        let stores = host::get().pool.stores();
        // All files of a chain are of one machine.
        let tagged = files.iter().any(|(_, pages)| pages.tagged);
        let opened = if tagged { stores.open_tagged(places) } else { stores.open(places) };
        let store = opened.map_err(|error| Refused::because(alloc::format!("memory to be read later: {error}")))?;
        paging::keep(store, Work::Store).map_err(|paging::TooMany| {
            stores.close(store).expect("nothing refers to a store that was just opened");
            Refused::because("memory to be read later: too many machines read theirs")
        })?;
        let source = Arc::new(Self { store, files, closed: AtomicBool::new(false) });
        SOURCES.lock().push(source.clone());
        Ok(Some(source))
    }

    /// Frames `first .. first + count` of `object`, which were never touched, read as the pages of file `number` from `page` on.
    ///
    /// # Errors
    ///
    /// [`Refused`].
    pub fn put(
        &self,
        (number, page): (usize, u64),
        (object, first, count): (ObjectHandle, u64, u64),
    ) -> Result<(), Refused> {
        let host = host::get();
        let supply = host.supply(cpu::index());
        let (start, _) = self.files.get(number).ok_or_else(|| Refused::because("a run is of no file"))?;
        for index in 0..count {
            let pin = host.epoch.pin(cpu::index());
            let object = host.objects.get(&pin, object).ok_or_else(|| Refused::because("an object is gone"))?;
            let slot = StoreSlot::new(self.store, start + page + index);
            object.put_stored(&supply, first + index, slot).map_err(|error| match error {
                PutError::Grant(GrantError::OutOfMemory) => Refused::out_of_memory(entresol_backing::OutOfMemory),
                error => Refused::because(alloc::format!("{error}")),
            })?;
        }
        Ok(())
    }

    /// Nobody has named a place that is still wanted: the store closes as soon as nothing refers to it.
    pub fn abandon(self: Arc<Self>) {
        task::spawn(async move { self.close_when_empty().await });
    }

    /// Pages are read from now on: those that are wanted, and the others meanwhile.
    pub fn begin(self: Arc<Self>, name: String, begun: u64) {
        for _ in 0..READERS {
            let source = self.clone();
            task::spawn(async move {
                while let Some(reading) = source.next().await {
                    source.read(reading).await;
                }
            });
        }
        task::spawn(async move {
            match self.bring_all().await {
                Ok(()) => {
                    self.let_go().await;
                    let milliseconds = (timer::now() - begun) * 1000 / timer::frequency();
                    log::info!("restore {name}: all of its memory is read after {milliseconds} ms");
                }
                Err(missing) => {
                    log::warn!("restore {name}: {missing:?}: the rest of its memory is read when it is touched");
                }
            }
            self.close_when_empty().await;
        });
    }

    async fn next(&self) -> Option<Reading> {
        poll_fn(|_| match paging::next(self.store) {
            Some(reading) => Poll::Ready(Some(reading)),
            None if self.closed.load(Ordering::Acquire) => Poll::Ready(None),
            None => Poll::Pending,
        })
        .await
    }

    /// Fills a frame, for all relatives that have none for it.
    async fn read(&self, mut reading: Reading) {
        let filled = self.fill(&reading).await.inspect_err(|failure| log::error!("restore: {failure}"));
        for object in memories() {
            reading.also(object);
        }
        match filled {
            Ok(tags) => reading.filled(tags.as_ref()),
            Err(_) => reading.failed(),
        }
    }

    async fn fill(&self, reading: &Reading) -> Result<Option<Tags>, Failure> {
        let index = reading.slot().index();
        let number = self.files.partition_point(|(first, _)| *first <= index);
        let (first, pages) = &self.files[number - 1];
        let page = index - first;
        let bytes = read_block(&pages.file, pages.layout().block(page)).await?;
        let tags = match pages.layout().tags(page) {
            Some((block, _)) => Some(read_block(&pages.file, block).await?),
            None => None,
        };
        let bytes = &bytes.bytes()[..PAGE_SIZE as usize];
        let tags = pages.check(page, bytes, tags.as_ref().map(Buffer::bytes))?;
        host::get().machine.write(reading.pfn().base(), bytes);
        Ok(tags)
    }

    /// Brings what machines and images still have there.
    async fn bring_all(&self) -> Result<(), Missing> {
        for object in memories() {
            let mut frame = 0;
            while let Some(found) = self.next_stored(object, &mut frame) {
                if let Some(slot) = found {
                    paging::bring(object, frame, slot).await?;
                }
                task::pause().await;
            }
        }
        Ok(())
    }

    /// The next place of this store that `object` names, from `frame` on, or nothing yet. `None` at its end.
    fn next_stored(&self, object: ObjectHandle, frame: &mut u64) -> Option<Option<StoreSlot>> {
        let host = host::get();
        let pin = host.epoch.pin(cpu::index());
        let object = host.objects.get(&pin, object).filter(|object| object.stored_frames() != 0)?;
        for _ in 0..LOOKS {
            if *frame >= object.frames() {
                return None;
            }
            let stored = object.stored_at(&host.machine, *frame);
            if let Some(slot) = stored.filter(|slot| slot.store() == self.store) {
                return Some(Some(slot));
            }
            *frame += 1;
        }
        Some(None)
    }

    /// No frame is known any more to hold what a page of the files does: they are not needed for that.
    async fn let_go(&self) {
        let mut from = Some(0);
        while let Some(index) = from {
            {
                let host = host::get();
                let _pin = host.epoch.pin(cpu::index());
                from = host.pool.stop_keeping_for(self.store, index, LOOKS);
            }
            task::pause().await;
        }
    }

    /// Waits until nothing refers to the store, and closes it.
    async fn close_when_empty(&self) {
        let stores = host::get().pool.stores();
        poll_fn(|_| if stores.references(self.store) == Some(0) { Poll::Ready(()) } else { Poll::Pending }).await;
        // Nobody names a place of it again.
        paging::stop_keeping(self.store);
        if let Err(error) = stores.close(self.store) {
            log::error!("restore: {error}");
        }
        self.closed.store(true, Ordering::Release);
        SOURCES.lock().retain(|source| source.store != self.store);
        host_work::raise(Work::Store);
    }
}

async fn read_block(file: &File, block: u64) -> Result<Buffer, Failure> {
    let (place, _) = file.place(block).ok_or_else(|| Failure::Damaged { file: file.name.clone(), block })?;
    io::read(place, 1, Buffer::take(Order::PAGE)?).await.map_err(Failure::from)
}

/// The memory of every machine, and of the image that is kept of it.
fn memories() -> impl Iterator<Item = ObjectHandle> {
    let of = |number| [registry::find(number).map(|vm| vm.ram()), kept::memory(number)];
    (0..MAX_VMS).flat_map(of).flatten()
}
