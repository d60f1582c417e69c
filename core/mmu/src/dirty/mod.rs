//! Dirty tracking: which pages of a slot were written.
//!
//! Purpose: a slot with [`SlotFlags::LOG_DIRTY`](entresol_slot::SlotFlags::LOG_DIRTY) has a log, one bit a page. The
//! owner fetches it ([`Vm::get_dirty_log`]), or reads it and clears parts of it later ([`Vm::read_dirty_log`],
//! [`Vm::clear_dirty_log`]); or lets each vCPU hand it the pages one by one through a ring ([`Ring`]). The specification
//! is `vm-memory`, "Dirty tracking".
//!
//! | file | what |
//! |---|---|
//! | `bitmap` | the bits of one slot, in frames of the pool |
//! | `fault` | how a fault in a slot that logs ends |
//! | `change` | what a slot update means for the log: make, protect, put together, free |
//! | `owner` | get, read, clear |
//! | `ring`, `rings` | one ring; all rings of a virtual machine |
//!
//! Protocol of the guest's writes: entries of such a slot are 4 KiB, and writable only by a fault that writes; that fault
//! sets the bit *before* it publishes the writable entry, so no moment has one without the other (INV-4).
//!
//! Protocol of the owner: whoever clears bits announces the pages to the notifier and waits a grace period, as for an
//! invalidation. From then on no fault publishes there. It takes the write permission away, flushes, waits for the flush,
//! and only then clears the bits (Z-F3); then it ends the announcement. Without that exclusion a fault could set its bit,
//! lose it to the owner, and publish a writable entry after: lost writes.
//!
//! Protocol of writes that are not the guest's ([`Vm::write`]): bytes first, then the bit. If the owner clears between the
//! two, the page it copies has the bytes already, and is named once more.
//!
//! The rings say nothing new: a page enters one when its bit goes from 0 to 1 through a vCPU, and its bit is cleared when
//! the entry is reset. What finds no room in a ring, or is written while no vCPU runs, is in the log only.
//!
//! Invariants: INV-4, INV-7. Nothing that a guest does allocates (D8): the log is made before the slot's flag is published,
//! and freed a grace period after it is gone. So whoever finds a slot that logs, under a pin, finds its log.
//!
//! Lock order: `owner` → slot update → notifier → object → pool. Faults take none of them.
//!
//! Known holes: hardware dirty state (FEAT_HAFDBS) is not used. A fault that loses its entry to another CPU between the bit
//! and the entry leaves the bit set; the guest's write is still to come then. Memory that the owner changes in the object,
//! past the slot, is not logged.

mod bitmap;
mod change;
mod fault;
mod owner;
mod ring;
mod rings;

#[cfg(test)]
mod tests;

use alloc::boxed::Box;
use alloc::vec::Vec;

use bitmap::Bitmap;
use entresol_addr::{Gfn, Pfn};
use entresol_backing::Order;
use entresol_machine::Machine;
use entresol_slot::Slot;
use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicU64, Ordering};
pub use owner::{LogError, LogPart};
pub use ring::{RESERVE, Ring, RingEntry, RingState};
use rings::Rings;
pub use rings::{RingFull, RingsError};

use crate::OutOfHeap;
#[cfg(doc)]
use crate::Vm;

/// The log of one slot, as its place keeps it: 0 for none, else the root's frame, the height, and [`ARMED`].
#[derive(Debug)]
struct Cell(AtomicU64);

/// Every writable entry of the slot has its bit: logging has begun, entries of before are write-protected.
const ARMED: u64 = 1 << 0;
const HEIGHT_SHIFT: u32 = 1;
const FRAME_SHIFT: u32 = 8;

impl Cell {
    const fn none() -> Self {
        Self(AtomicU64::new(0))
    }

    fn set(&self, bitmap: Bitmap) {
        let (root, height) = bitmap.parts();
        self.0.store(root.get() << FRAME_SHIFT | u64::from(height) << HEIGHT_SHIFT, Ordering::Release);
    }

    fn arm(&self) {
        self.0.fetch_or(ARMED, Ordering::Release);
    }

    fn take(&self) -> Option<Bitmap> {
        bitmap(self.0.swap(0, Ordering::AcqRel))
    }

    #[inline]
    fn get(&self) -> Option<Bitmap> {
        bitmap(self.0.load(Ordering::Acquire))
    }

    fn is_armed(&self) -> bool {
        self.0.load(Ordering::Acquire) & ARMED != 0
    }
}

#[inline]
fn bitmap(raw: u64) -> Option<Bitmap> {
    let height = (raw >> HEIGHT_SHIFT) as u8 & 3;
    (raw != 0).then(|| Bitmap::from_parts(Pfn::new(raw >> FRAME_SHIFT), height))
}

const _: () = assert!(bitmap::MAX_HEIGHT <= 3);

/// The dirty tracking of one virtual machine.
pub(crate) struct Logs {
    /// By slot number.
    cells: Box<[Cell]>,
    /// Held by whoever makes, frees, clears or resets.
    owner: Mutex<()>,
    rings: Rings,
}

impl Logs {
    /// No slot logs, of `slots`.
    pub(crate) fn new(slots: u32) -> Result<Self, OutOfHeap> {
        let mut cells = Vec::new();
        cells.try_reserve_exact(slots as usize).map_err(|_| OutOfHeap)?;
        cells.resize_with(slots as usize, Cell::none);
        Ok(Self { cells: cells.into_boxed_slice(), owner: Mutex::new(()), rings: Rings::new() })
    }

    /// The log of slot `id`.
    #[inline]
    fn get(&self, id: u16) -> Option<Bitmap> {
        self.cells.get(usize::from(id))?.get()
    }

    /// `gfn` of `slot`, which logs, is or becomes dirty. The caller is pinned on CPU `cpu`, and found the slot under that
    /// pin.
    pub(crate) fn mark<M: Machine>(&self, machine: &M, cpu: usize, slot: &Slot, gfn: Gfn) {
        let page = gfn.since(slot.base);
        let bitmap = self.get(slot.id).expect("a slot that logs has its log before it is found");
        if bitmap.set(machine, page) {
            self.rings.push(cpu, slot.id, page);
        }
    }

    /// The same in few instructions, where there are no rings and the bits lie in a row; `false` if nothing was done.
    #[inline(always)]
    fn mark_alone<M: Machine>(&self, machine: &M, slot: &Slot, gfn: Gfn) -> bool {
        let bitmap = self.get(slot.id).filter(|_| !self.rings.are_made());
        bitmap.and_then(|bitmap| bitmap.set_in_row(machine, gfn.since(slot.base))).is_some()
    }

    /// Whether the page of `slot` behind `gfn` is dirty; `None` if logging has not begun there.
    pub(crate) fn is_dirty<M: Machine>(&self, machine: &M, slot: &Slot, gfn: Gfn) -> Option<bool> {
        let cell = self.cells.get(usize::from(slot.id)).filter(|cell| cell.is_armed())?;
        cell.get().map(|bitmap| bitmap.is_set(machine, gfn.since(slot.base)))
    }

    /// Gives the log of slot `id`, of `pages` pages, to `free`. Nobody reaches it any more.
    pub(crate) fn free<M: Machine>(&self, machine: &M, id: u16, pages: u64, free: &mut dyn FnMut(Pfn, Order)) {
        if let Some(bitmap) = self.cells.get(usize::from(id)).and_then(Cell::take) {
            bitmap.free(machine, pages, free);
        }
    }
}
