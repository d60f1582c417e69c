//! The bytes of one file: written from the first to the last, read from anywhere.
//!
//! Protocol of writing: [`Writer::begin`], [`Writer::page`] and [`Writer::bytes`] in order, then [`Writer::finish`], which
//! commits; or [`Writer::abandon`], and the store is as it was. Several requests are out at a time; both ends wait for all of
//! them: a write that came late would fall into blocks that are another's by then.
//!
//! Known hole: a writer that is dropped in between leaves its last requests to the device. Nobody drops one: a task runs
//! to its end.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

use entresol_backing::Order;
use entresol_wire::store::{self, BLOCK, Directory, Extent, File};

use super::change::{self, Turn};
use super::io::{self, Ticket};
use super::{Failure, task};
use crate::block::{Buffer, Operation};

/// Blocks of one request.
const PIECE: Order = match Order::new(4) {
    Some(order) => order,
    None => Order::PAGE,
};
/// Requests that are out at most: the others of the queue are for who reads.
const OUT: usize = 4;

/// What is filled for the next request.
struct Piece {
    buffer: Buffer,
    extent: Extent,
    filled: usize,
}

/// A file that is being written.
pub struct Writer<'t> {
    turn: &'t Turn,
    places: store::Writer,
    piece: Option<Piece>,
    out: VecDeque<Ticket>,
    length: u64,
    checksum: crc32fast::Hasher,
}

impl<'t> Writer<'t> {
    /// A file called `name`, which needs the file of number `base`, or 0. It takes the place of one of that name.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn begin(turn: &'t Turn, directory: &Directory, name: &str, base: u64) -> Result<Self, Failure> {
        let places = store::Writer::new(directory, name, base)?;
        let checksum = crc32fast::Hasher::new();
        Ok(Self { turn, places, piece: None, out: VecDeque::new(), length: 0, checksum })
    }

    /// The number that the file gets.
    pub fn id(&self) -> u64 {
        self.places.id()
    }

    /// Bytes so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Appends a block, which `fill` fills whole.
    ///
    /// # Errors
    ///
    /// [`Failure`]; then only [`Writer::abandon`] is left.
    pub async fn page(&mut self, fill: impl FnOnce(&mut [u8])) -> Result<(), Failure> {
        let piece = match &mut self.piece {
            Some(piece) => piece,
            none => {
                let buffer = Buffer::take(PIECE)?;
                let extent = self.places.append(PIECE.frames() as u32)?;
                none.insert(Piece { buffer, extent, filled: 0 })
            }
        };
        let at = piece.filled * BLOCK as usize;
        let page = &mut piece.buffer.bytes_mut()[at..at + BLOCK as usize];
        fill(page);
        self.checksum.update(page);
        piece.filled += 1;
        self.length += BLOCK;
        if piece.filled == piece.extent.count as usize { self.send().await } else { Ok(()) }
    }

    /// Appends bytes, and zeros up to the next block.
    ///
    /// # Errors
    ///
    /// As [`Writer::page`].
    pub async fn bytes(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        for part in bytes.chunks(BLOCK as usize) {
            self.page(|page| {
                page[..part.len()].copy_from_slice(part);
                page[part.len()..].fill(0);
            })
            .await?;
        }
        Ok(())
    }

    /// Gives the disk what is filled; guests have their turn.
    async fn send(&mut self) -> Result<(), Failure> {
        let Some(Piece { buffer, extent, filled }) = self.piece.take() else { return Ok(()) };
        self.places.give_back(extent.count - filled as u32);
        if self.out.len() >= OUT
            && let Some(oldest) = self.out.pop_front()
        {
            oldest.done().await?;
        }
        self.out.push_back(io::submit(Operation::Write, extent.start.into(), filled as u64, Some(buffer)).await?);
        task::pause().await;
        Ok(())
    }

    /// Waits for every request.
    async fn settle(&mut self) -> Result<(), Failure> {
        let mut result = Ok(());
        while let Some(ticket) = self.out.pop_front() {
            result = result.and(ticket.done().await.map(drop).map_err(Failure::from));
        }
        result
    }

    /// The file is whole: it is there from now on.
    ///
    /// # Errors
    ///
    /// [`Failure`]; the store is as it was.
    pub async fn finish(mut self) -> Result<(), Failure> {
        let sent = self.send().await;
        let settled = self.settle().await;
        sent.and(settled)?;
        let next = self.places.finish(self.length, self.checksum.finalize())?;
        change::commit(self.turn, next).await
    }

    /// There will be no such file.
    pub async fn abandon(mut self, why: &Failure) {
        if let Err(failure) = self.settle().await {
            log::warn!("store: a file was given up ({why}), and its last writes failed: {failure}");
        }
    }
}

/// Reads `blocks` blocks of `file`, from its block `first` on.
///
/// # Errors
///
/// [`Failure::Damaged`] if the file ends before; else the disk's.
pub async fn read(file: &File, first: u64, blocks: u64) -> Result<Vec<u8>, Failure> {
    let damaged = |block| Failure::Damaged { file: String::from(&*file.name), block };
    let mut bytes = Vec::new();
    if first.checked_add(blocks).is_none_or(|end| end > file.blocks()) {
        return Err(damaged(first));
    }
    bytes.try_reserve_exact((blocks * BLOCK) as usize).map_err(|_| Failure::OutOfMemory)?;
    let (mut next, end) = (first, first + blocks);
    while next < end {
        let (place, together) = file.place(next).ok_or_else(|| damaged(next))?;
        let count = together.min(end - next).min(PIECE.frames());
        let buffer = io::read(place, count, Buffer::take(PIECE)?).await?;
        bytes.extend_from_slice(&buffer.bytes()[..(count * BLOCK) as usize]);
        next += count;
        task::pause().await;
    }
    Ok(bytes)
}
