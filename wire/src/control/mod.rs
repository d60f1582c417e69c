//! The control channel: what an owner asks of a running hypervisor, and what it says.
//!
//! Transport: a byte stream without ends, of which neither side knows when the other comes or goes (a virtio console
//! port; on the host, QEMU's socket, which serves one client at a time and drops what the hypervisor says to nobody).
//!
//! Protocol: every message is one JSON object on one line, at most [`MAX_LINE`] bytes; empty lines mean nothing.
//!
//! ```text
//! host → hypervisor   {"id":7,"op":"stats","vm":"web"}                              a request
//! hypervisor → host   {"id":7,"ok":{"stats":{…}}}                                   its response, or
//!                     {"id":7,"error":{"code":"no-such-vm","message":"…",…}}
//!                     {"event":{"console":{"vm":"web","data":"bG9naW46IA=="}}}      whenever it happens
//! ```
//!
//! - Every request gets exactly one response, in the order of the requests, with the `id` of its request: below 2^53, so
//!   that every JSON reader keeps it whole. A line that cannot be read gets an error whose `id` is null if it had none.
//! - A request is refused if it has a key that its operation does not know: an owner's typing mistake is not ignored.
//!   A response or an event may gain keys; who reads it ignores those that it does not know.
//! - A client starts with a newline, which ends what a client before it left unfinished, then `hello` with an id that
//!   no other client would choose, and ignores every line until that response. `hello` also ends the session before
//!   it: its console is detached.
//! - `console` attaches one virtual machine's console: an event with the output that was kept from before, then one
//!   for each piece of output, at most [`CONSOLE_CHUNK`] bytes each, until `detach`, another `console` or `hello`. While
//!   attached, [`Event::State`] tells that the VM stops or goes on. Output that the channel could not take is counted,
//!   and told by [`Event::Dropped`]: a slow client never stops a guest.
//! - `input` gives bytes to the attached console. The answer says how many the guest's device took; if that is not
//!   all, an [`Event::InputReady`] follows when there is room again, and the client sends the rest then.
//! - `slots` answers at most [`SLOTS_PER_ANSWER`] rows, from slot number `from` on, and says where the next begin.
//! - `set-slot` makes a slot that shows the memory of a virtual machine a second time, or moves it, or with size 0 deletes it, while
//!   the machine runs; the answer comes when no vCPU can meet what was there before.
//! - `posted` takes what the guest stored in zones of coalesced MMIO and how often its doorbells rang. While its console is
//!   attached, [`Event::Doorbell`] tells once that some doorbell rang since `posted` was asked last.
//! - `audit` looks at every frame and every memory object, and answers counts. `probe` reads a page of a guest by its machine
//!   address and tells whether that faulted, not what was there.
//! - `fork` makes a copy called `name`, or with a `count` so many, called `name`-1 and so on: all of them or none.
//! - `snapshot` writes a machine into a file of the store, and is answered when the file is whole; `restore` makes a machine
//!   from one, and is answered when it runs. What is asked after it waits for that answer.
//! - `files` lists the store; `remove-file` takes a file out of it, and is answered when the store is changed on the disk.
//! - `tags-read` tells the allocation tags of pages, `tags-write` gives them others and counts the pages: of at most [`TAGGED_PER_ANSWER`]. Both go as far
//!   as they can, and are refused if that is not one page.
//! - `dirty-start` has the machine keep a dirty log, `dirty-get` tells and clears dirty pages, at most [`RUNS_PER_ANSWER`] runs of
//!   them at a time, and says where the next begin; the pages are to be copied after the answer. What a lost answer named is lost:
//!   who cannot have that starts the log as `manual`, and clears what it has read by `dirty-clear`. `dirty-harvest` takes from the
//!   rings, oldest first, and is asked again as long as it says `next`. `dirty-mark` and `dirty-since` are told likewise, without a log.
//! - `merge` tells how far the search for equal pages is and what it took; with `rounds` so many rounds over all memory that takes
//!   part are made at once, without a pause between their steps.
//! - Operations are added as the hypervisor learns them; one that it does not know is refused by its name.
//!
//! Memory: what a guest causes (events) is encoded into a buffer that exists already. Reading a request takes heap of at
//! most its line's length.

mod audit;
mod bytes;
mod dirty;
mod encode;
mod event;
mod fields;
mod files;
mod lines;
mod posted;
mod request;
mod response;
mod stats;
#[cfg(test)]
mod tests;

pub use audit::{Audit, Poisoned, Probe, ProbeFault};
pub use bytes::Bytes;
pub use dirty::{Dirty, PagePlace, PageRun, Pages};
pub use encode::{Message, TooLong};
pub use event::Event;
pub use files::{FileRow, Files};
pub use lines::{LineTooLong, Lines};
pub use posted::{Hex, Posted, PostedWrite, Rings};
pub use request::{Alias, Malformed, Op, Request};
pub use response::{Answer, Code, Error, Hello, MergeStatus, Response, SlotPage, SlotRow, State, VmRow};
pub use stats::{Balloon, Entries, Faults, Merge, Stats, Tlb};

/// Longest line, in bytes, its newline included.
pub const MAX_LINE: usize = 64 << 10;
/// Most bytes of console data in one message; encoded, with a name and the rest, they fit into a line many times.
pub const CONSOLE_CHUNK: usize = 8 << 10;
/// Most rows in one answer to `slots`.
pub const SLOTS_PER_ANSWER: usize = 256;
/// Most writes in one answer to `posted`: what the ring behind it holds.
pub const POSTED_WRITES: usize = 169;
/// Most runs of pages in one answer.
pub const RUNS_PER_ANSWER: usize = 1024;

/// Pages whose tags are told at once.
pub const TAGGED_PER_ANSWER: u64 = 32;
/// Version of this protocol. It changes when a reader of the old one would go wrong.
pub const PROTOCOL: u32 = 1;
/// Ids are below this.
pub const ID_LIMIT: u64 = 1 << 53;

const _: () = assert!(CONSOLE_CHUNK.div_ceil(3) * 4 + 1024 < MAX_LINE);
// A request has them as bytes.
const _: () = assert!(TAGGED_PER_ANSWER as usize * 256 <= CONSOLE_CHUNK);
