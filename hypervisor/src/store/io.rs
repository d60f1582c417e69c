//! Requests of tasks to the store's disk.
//!
//! Protocol: [`submit`] waits for a place in the device's queue, [`Ticket::done`] for the answer; several tickets may be out at
//! once. A ticket that is dropped is forgotten: its buffer comes back to the pool when the device is done with it.
//!
//! Lock order: places → the disk.

use core::future::poll_fn;
use core::task::Poll;

use entresol_sync::Mutex;
use entresol_wire::store::BLOCK;

use crate::block::{self, Buffer, Completion, DEPTH, DiskError, Operation, Request, SECTOR};
use crate::host_work::Work;

/// Sectors of a block.
const SECTORS: u64 = BLOCK / SECTOR;

enum Place {
    Free,
    Waiting,
    /// Nobody waits for it any more.
    Forgotten,
    Done(Completion),
}

static PLACES: Mutex<[Place; DEPTH]> = Mutex::new([const { Place::Free }; DEPTH]);

/// The answer to a request, to come.
#[must_use = "dropping it forgets the answer"]
pub struct Ticket(usize);

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut places = PLACES.lock();
        let place = &mut places[self.0];
        *place = if matches!(place, Place::Waiting) { Place::Forgotten } else { Place::Free };
    }
}

impl Ticket {
    /// Waits for it: the buffer back, and how it went.
    ///
    /// # Errors
    ///
    /// [`DiskError`].
    pub async fn done(self) -> Result<Option<Buffer>, DiskError> {
        poll_fn(|_| {
            let mut places = PLACES.lock();
            match core::mem::replace(&mut places[self.0], Place::Free) {
                Place::Done(Completion { request, result }) => Poll::Ready(result.map(|()| request.buffer)),
                other => {
                    places[self.0] = other;
                    Poll::Pending
                }
            }
        })
        .await
    }
}

/// Takes what the disk has finished.
pub fn collect() {
    let Some(disk) = block::find(Work::Store) else { return };
    while let Some(done) = disk.take() {
        let mut places = PLACES.lock();
        let place = &mut places[done.request.tag as usize];
        *place = if matches!(place, Place::Forgotten) { Place::Free } else { Place::Done(done) };
    }
}

/// Gives the disk a request for `blocks` blocks from `block` on, as soon as it takes one.
///
/// # Errors
///
/// [`DiskError`]: it is refused.
pub async fn submit(
    operation: Operation,
    block: u64,
    blocks: u64,
    buffer: Option<Buffer>,
) -> Result<Ticket, DiskError> {
    let len = (blocks * BLOCK) as usize;
    let mut request = Some(Request { operation, sector: block * SECTORS, len, buffer, tag: 0 });
    poll_fn(|_| {
        let disk = block::find(Work::Store).ok_or(DiskError::Broken)?;
        let mut places = PLACES.lock();
        let Some(free) = places.iter().position(|place| matches!(place, Place::Free)) else { return Poll::Pending };
        let Some(request_now) = request.take() else { return Poll::Pending };
        match disk.submit(Request { tag: free as u64, ..request_now }) {
            Ok(()) => {
                places[free] = Place::Waiting;
                Poll::Ready(Ok(Ticket(free)))
            }
            Err(refused) if refused.error == DiskError::Full => {
                request = Some(refused.request);
                Poll::Pending
            }
            Err(refused) => Poll::Ready(Err(refused.error)),
        }
    })
    .await
}

/// Reads `blocks` blocks from `block` on into `buffer`, and waits for them.
///
/// # Errors
///
/// [`DiskError`].
pub async fn read(block: u64, blocks: u64, buffer: Buffer) -> Result<Buffer, DiskError> {
    let ticket = submit(Operation::Read, block, blocks, Some(buffer)).await?;
    ticket.done().await?.ok_or(DiskError::Broken)
}

/// Waits until everything that was written, and whose tickets are done, stays.
///
/// # Errors
///
/// [`DiskError`].
pub async fn flush() -> Result<(), DiskError> {
    submit(Operation::Flush, 0, 0, None).await?.done().await.map(drop)
}
