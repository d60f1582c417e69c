//! One change of the store after the other.

use entresol_backing::Order;
use entresol_sync::atomic::{AtomicBool, Ordering};
use entresol_wire::store::{BLOCK, Commit, Directory, Step};

use super::{DIRECTORY, Failure, io};
use crate::block::{Buffer, Operation};

/// Somebody has the turn.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// The right to change the store; nobody else has it.
#[must_use = "dropping it gives the right back"]
pub struct Turn(());

impl Turn {
    /// Takes it.
    ///
    /// # Errors
    ///
    /// [`Failure::Busy`].
    pub fn take() -> Result<Self, Failure> {
        if TAKEN.swap(true, Ordering::Acquire) { Err(Failure::Busy) } else { Ok(Self(())) }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        TAKEN.store(false, Ordering::Release);
    }
}

/// Makes `directory`, all of whose data is written, the one that counts.
///
/// # Errors
///
/// [`Failure`]. If the first flush failed, the old one counts. After that nobody knows until the store is opened again, so it
/// is not used any more.
pub async fn commit(_turn: &Turn, directory: Directory) -> Result<(), Failure> {
    let mut commit = Commit::new(directory)?;
    while commit.step() != Step::Done {
        let unknown = commit.step() == Step::Write || commit.is_written();
        if let Err(failure) = carry_out(&commit).await {
            if unknown {
                log::error!("store: not used any more until the machine starts again: a commit failed: {failure}");
                *DIRECTORY.lock() = Err(failure.clone());
            }
            return Err(failure);
        }
        commit.advance();
    }
    *DIRECTORY.lock() = Ok(Some(commit.into_directory()));
    Ok(())
}

async fn carry_out(commit: &Commit) -> Result<(), Failure> {
    match commit.step() {
        Step::Flush => io::flush().await?,
        Step::Write => {
            for (index, piece) in commit.image().chunks(BLOCK as usize).enumerate() {
                let mut buffer = Buffer::take(Order::PAGE)?;
                buffer.bytes_mut().copy_from_slice(piece);
                let block = commit.block() + index as u64;
                io::submit(Operation::Write, block, 1, Some(buffer)).await?.done().await?;
            }
        }
        Step::Done => {}
    }
    Ok(())
}
