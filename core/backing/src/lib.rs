//! What stands behind guest frames: memory objects, and the machine's frames that they are made of.
//!
//! Purpose: a slot names `(object, frame)`; this crate says which frame of the machine that is, and makes one when
//! there is none yet ([`Object::grant`]). It owns every frame that guests, second-stage tables and its own trees use
//! ([`FramePool`]). It knows no guest address: what shows an object to a guest is the business of slots and tables.
//!
//! Three kinds of object ([`Spec`]): *anonymous* memory, zero until touched, in a radix tree of pages and 2 MiB blocks
//! (D2), which may be *private*: absent from the hypervisor's own mapping (D9); a *device*, machine addresses that are not memory; and *ROM*, bytes that lie in memory already and never
//! change through a guest (INV-13).
//!
//! Protocol of a fault: pin the epoch, [`Objects::get`], [`Object::grant`], publish the translation, unpin. A
//! [`Grant`] is plain data and stays true as long as the caller is pinned, because everything that is unpublished is
//! given back only after a grace period ([`FramePool::defer`], [`Objects::destroy`]). That the *translation* is gone
//! before the frame is, is the caller's: it removes translations first, then punches or destroys.
//!
//! An anonymous object can be forked ([`Objects::fork`]): the relatives share one tree until they write, and each write
//! copies what it needs ([`Object::own`]). What they differ in is found without looking at what they share
//! ([`Object::differences`]). The tree's own chapter is in `tree`.
//!
//! A page of anonymous memory may be in no frame but in a place of a store ([`store`]): then there is no grant for it, not
//! even for writing, until somebody has fetched it ([`Fetch`], [`Object::restore`]). It reads the same, before and after (D2),
//! so relatives share what is stored as they share frames.
//!
//! A frame may turn out to be bad ([`Object::poison`]): it is never given out again, and nobody reads what is in it.
//!
//! Invariants: INV-7 (a frame is in exactly one of these states: free, cached, taken, deferred, in quarantine; giving one back twice
//! is caught in release builds too), INV-11 (a fresh page is zeroed before its word is published), INV-13. Everything
//! that can fail is undone before it is reported: out of memory leaves a vacant word and exact counts (D8). Nothing
//! is allocated on the heap after creation.
//!
//! Lock order: objects → structure of one object → shared blocks → deferred → private frames → a CPU's cache → buddy; stores and a
//! frame's lease lock are leaves. A fault on memory
//! that is present takes none; a fresh page takes its own CPU's cache.
//!
//! Known holes: a node stays until its object is destroyed, so a 2 MiB span that was once backed by pages is not backed
//! by a block again, and punching keeps 1/512 of what it frees. What was shared once is copied by whoever writes it, also
//! when all relatives but one are gone: nobody can tell yet that the last reader of another's is gone too.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod audit;
mod grant;
mod object;
mod pool;
mod store;
mod tree;

#[cfg(test)]
mod convert_tests;
#[cfg(test)]
mod fork_tests;
#[cfg(test)]
mod merge_tests;
#[cfg(test)]
mod out_tag_tests;
#[cfg(test)]
mod out_tests;
#[cfg(test)]
mod poison_tests;
#[cfg(test)]
mod private_tests;
#[cfg(test)]
mod stored_tests;
#[cfg(test)]
mod tag_tests;
#[cfg(test)]
mod tests;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

pub use audit::{Audit, audit};
use entresol_machine::Machine;
pub use grant::{Grant, GrantError, Memory};
pub use object::{
    AccessError, ConvertError, CreateError, DestroyError, Differences, Fetch, ForkError, Found, Frozen, Kind,
    MAX_OBJECTS, Object, ObjectHandle, Objects, Out, OutError, PoisonError, Policy, PopulateError, PunchError,
    PutError, Reach, Search, Spec, TableError,
};
pub use pool::{AddError, FrameMeta, FramePool, Lease, LeaseError, Order};
pub use store::{MAX_STORES, StoreError, StoreId, StoreSlot, Stores};
pub use tree::{Ahead, Merged, Offered, Span, Standing};

/// No free frame, or none of the size asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory;

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("out of memory: the machine has no free frame")
    }
}

impl core::error::Error for OutOfMemory {}

/// The heap has no room for what is made once, at creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfHeap;

impl fmt::Display for OutOfHeap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("out of heap: no room for a table made at creation")
    }
}

impl core::error::Error for OutOfHeap {}

/// Where an operation gets frames from and what it fills them with: the machine, its pool, and the CPU it runs on.
pub struct Supply<'a, M> {
    /// The machine.
    pub machine: &'a M,
    /// The machine's frames.
    pub pool: &'a FramePool,
    /// The CPU that the caller runs on, below the pool's number of CPUs.
    pub cpu: usize,
}

impl<'a, M: Machine> Supply<'a, M> {
    /// A supply for CPU `cpu`.
    #[inline]
    pub const fn new(machine: &'a M, pool: &'a FramePool, cpu: usize) -> Self {
        Self { machine, pool, cpu }
    }
}

impl<M: Machine> Supply<'_, M> {
    /// Zeroes private memory that was given back, at most `limit` frames or blocks, and tries removals again that failed.
    /// Returns how many frames can be used again.
    #[cold]
    pub fn scrub(&self, limit: usize) -> u64 {
        self.pool.retry_removals(self.machine);
        self.pool.scrub_private(self.machine, limit)
    }

    /// Takes back what dead nodes of shared trees refer to: at most `limit` nodes. Returns how many it was. What nobody
    /// refers to any more is deferred.
    pub fn reclaim(&self, limit: usize) -> usize {
        tree::reclaim(self, limit)
    }
}

/// `count` values on the heap.
fn try_boxed<T>(count: usize, value: impl FnMut() -> T) -> Result<Box<[T]>, OutOfHeap> {
    let mut values = Vec::new();
    values.try_reserve_exact(count).map_err(|_| OutOfHeap)?;
    values.resize_with(count, value);
    Ok(values.into_boxed_slice())
}
