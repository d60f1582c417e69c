//! Shadow tables: what a processor without a second stage walks in place of the guest's own tables.
//!
//! Purpose: a guest's tables say which of its frames an address means; slots and objects say where that frame is. A shadow table says
//! both in one. This crate keeps shadow tables as a cache of the guest's, filled by faults, and owes the guest what a TLB owes it:
//! an entry that the guest has changed may be used until the guest flushes it, and no longer. How a guest's entries read is its
//! architecture's business ([`GuestTables`]), the words of a shadow table the processor's ([`ShadowFormat`]), frames the owner's
//! ([`GuestMemory`]).
//!
//! # Tables
//!
//! A shadow table is what its [`Key`] says: the guest's table whose entries it shows, what the way to it allows, how entries are
//! read. Ways with equal keys share one, so processes that share a part of their tables share its shadow. It stands in one of the
//! frames that were given at creation; when all are used, everything is dropped and comes back by faults.
//!
//! # Protocol
//!
//! * *Fault*: walk the guest's tables, as the processor would, flags and all; ask for the frame; make the tables on the way that are
//!   missing, or whose guest entry leads elsewhere by now; fill the entry. It permits stores only once the guest's dirty flag is
//!   set. Where tables were made or compared, nothing is linked, and the walk is made again: it may have read them before they were
//!   protected.
//! * *A fault on a way that is there* reads the guest's last entry alone ([`GuestTables::last`]): links of synced tables say what
//!   the guest's entries say, for nobody could write to these since. What that entry does not plainly allow, a walk decides. Where the frame
//!   is not there yet, the next try of the same access goes by what this one has read ([`Beaten`]), as if a TLB had it, unless tables have been
//!   made, compared, flushed or opened to stores since: what was read may be in none of them by then.
//! * *A guest's table that is shown is write-protected*: every entry that maps its frame loses the permission (reverse map). The
//!   guest's store faults, and makes the table *unsynced*: writable, and perhaps changed. That holds for tables of all levels: no
//!   instruction is emulated, and a table that maps itself is no special case.
//! * *INVLPG* ([`Shadow::invalidate_page`]): the entry of that address is compared with the guest's, and so are all entries of
//!   unsynced tables above level 1, because the instruction drops every cached table entry. What differs is dropped: MMIO
//!   entries are no exception.
//! * *A load of the root, a full flush* ([`Shadow::load`]): every unsynced table is write-protected again, TLBs are flushed, and then
//!   it is compared: what another vCPU writes after that faults.
//! * *A way that comes to a table anew* has all unsynced ones compared first: it may lead on to them, and nothing of them can be in a
//!   TLB for addresses of that way.
//! * *Backing changes* ([`Shadow::invalidate`]): the entries that map a frame are dropped, and a table that is shown there is unsynced:
//!   it may hold other words now.
//! * *No memory*: an MMIO entry, true for one generation of the slots; the vCPU remembers its page by linear address.
//!
//! When a call returns, TLBs hold nothing that it dropped: one flush of the VM, if anything was dropped that allowed an access.
//!
//! # Invariants
//!
//! [`Shadow::audit`] states them: an entry that permits stores maps no frame of a synced table (a guest cannot change behind our
//! back what is not compared); the reverse map holds exactly the entries of pages; words say what the records say.
//!
//! # Concurrency
//!
//! The owner, which is the crate `mmu`, holds a lock around each call, and looks at its second stage under it: what it shows there and
//! takes back later is dropped by [`Shadow::invalidate`]. vCPUs walk the words meanwhile: every word is
//! stored whole, and a frame is used for another table only after the flush.
//!
//! # Known holes
//!
//! Shadow entries are of 4 KiB, whatever the guest's are. Global pages do not survive a load of the root. An
//! access that is answered by an MMIO entry takes the owner's lock unless the vCPU knows its page. No room for one more table drops all
//! of them.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod fault;
mod guest;
mod page;
mod rmap;
mod sync;
mod tables;

pub use fault::{Answer, Beaten};
pub use guest::{
    Backing, GuestMemory, GuestTables, GuestWords, Key, MOST_LEVELS, Regime, Rights, Says, ShadowFormat, Source, Stop,
    Walk,
};
pub use tables::{Counts, CreateError, MOST_VCPUS, Shadow};
