//! One memory object.
//!
//! Purpose: what a slot's frames are, behind one interface: [`Object::grant`] for faults, [`Object::populate`] and
//! [`Object::punch`] for the owner, [`Object::read`] and [`Object::write`] for loaders and devices.
//!
//! Shape: an [`Object`] never moves and is never freed, it is only made anew in the same place (see [`table`]); its
//! fields are atomics that change only while nobody can reach it. So a reader needs a pin, not a lock.

mod bytes;
mod convert;
mod error;
mod fork;
mod merge;
mod poison;
mod search;
mod stored;
mod table;

pub use bytes::{AccessError, Reach};
pub use convert::ConvertError;
use entresol_addr::{PageSize, Pfn, PfnRange};
use entresol_machine::Machine;
use entresol_sync::atomic::{AtomicU32, AtomicU64, Ordering};
use entresol_sync::{Mutex, planted};
pub use error::{CreateError, DestroyError, PopulateError, PunchError, TableError};
pub use fork::{Differences, ForkError, Frozen};
pub use poison::PoisonError;
pub use search::{Found, Search};
pub use stored::{Fetch, Out, OutError, PutError};
pub use table::{MAX_OBJECTS, ObjectHandle, Objects};

use crate::tree::{Ahead, Look, PRIVATE, TAGGED, Tree};
use crate::{Grant, GrantError, Memory, OutOfMemory, Supply};

/// What anonymous memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// 4 KiB pages only.
    Pages,
    /// 2 MiB blocks where one is free and lies inside the object, pages elsewhere. A block that is shared is copied page
    /// by page.
    Blocks,
    /// The same, but a shared block is copied whole where a block is free.
    WholeBlocks,
}

/// An object to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spec {
    /// Memory that is zero until it is touched.
    Anonymous {
        /// Its extent.
        frames: u64,
        /// What it is made of.
        policy: Policy,
        /// Its frames have allocation tags, cleared like its bytes: for guests that may use them.
        tagged: bool,
    },
    /// The same, of frames that are absent from the hypervisor's own mapping (D9). Its kind is [`Kind::Anonymous`], and
    /// [`Object::is_private`].
    Private {
        /// Its extent.
        frames: u64,
        /// What it is made of.
        policy: Policy,
    },
    /// Machine addresses that are not memory.
    Device {
        /// The first.
        first: Pfn,
        /// How many.
        frames: u64,
    },
    /// Bytes that are in memory already and that no guest changes.
    Rom {
        /// Where they begin.
        first: Pfn,
        /// How many frames they fill.
        frames: u64,
        /// Whether the frames become the pool's when the object is destroyed.
        owned: bool,
    },
}

impl Spec {
    /// Plain anonymous memory.
    pub const fn anonymous(frames: u64, policy: Policy) -> Self {
        Self::Anonymous { frames, policy, tagged: false }
    }
}

/// What kind of object one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Memory, zero until touched, made of what the policy says.
    Anonymous(Policy),
    /// Machine addresses that are not memory.
    Device,
    /// Bytes that no guest changes; `owned` as in [`Spec::Rom`].
    Rom {
        /// Whether the frames become the pool's in the end.
        owned: bool,
    },
}

impl Kind {
    const fn encode(self) -> u32 {
        match self {
            Self::Anonymous(Policy::Pages) => 0,
            Self::Anonymous(Policy::Blocks) => 1,
            Self::Device => 2,
            Self::Rom { owned: false } => 3,
            Self::Rom { owned: true } => 4,
            Self::Anonymous(Policy::WholeBlocks) => 5,
        }
    }

    #[inline]
    fn decode(raw: u32) -> Self {
        match raw {
            0 => Self::Anonymous(Policy::Pages),
            1 => Self::Anonymous(Policy::Blocks),
            2 => Self::Device,
            3 => Self::Rom { owned: false },
            4 => Self::Rom { owned: true },
            5 => Self::Anonymous(Policy::WholeBlocks),
            _ => unreachable!("only encode writes kinds"),
        }
    }
}

/// A memory object. See [`Objects::get`].
#[derive(Debug)]
pub struct Object {
    /// The handle that finds it, 0 if none does.
    live: AtomicU32,
    kind: AtomicU32,
    frames: AtomicU64,
    /// First frame of a device or ROM.
    first: AtomicU64,
    /// Content of anonymous memory.
    tree: Tree,
    /// Held by whoever takes content away.
    structure: Mutex<()>,
}

impl Object {
    pub(crate) const fn new() -> Self {
        Self {
            live: AtomicU32::new(0),
            kind: AtomicU32::new(0),
            frames: AtomicU64::new(0),
            first: AtomicU64::new(0),
            tree: Tree::new(),
            structure: Mutex::new(()),
        }
    }

    /// Becomes what `spec`, which was checked, says. Nobody reaches it.
    fn make<M: Machine>(&self, supply: &Supply<'_, M>, spec: Spec) -> Result<(), OutOfMemory> {
        let (kind, first, frames) = match spec {
            Spec::Anonymous { frames, policy, tagged } => {
                self.tree.make(supply, frames, policy, if tagged { TAGGED } else { 0 })?;
                (Kind::Anonymous(policy), Pfn::new(0), frames)
            }
            Spec::Private { frames, policy } => {
                self.tree.make(supply, frames, policy, PRIVATE)?;
                (Kind::Anonymous(policy), Pfn::new(0), frames)
            }
            Spec::Device { first, frames } => (Kind::Device, first, frames),
            Spec::Rom { first, frames, owned } => (Kind::Rom { owned }, first, frames),
        };
        self.kind.store(kind.encode(), Ordering::Relaxed);
        self.first.store(first.get(), Ordering::Relaxed);
        self.frames.store(frames, Ordering::Relaxed);
        Ok(())
    }

    /// Gives everything back. Nobody reaches it.
    fn unmake<M: Machine>(&self, supply: &Supply<'_, M>) {
        match self.kind() {
            Kind::Anonymous(_) => self.tree.destroy(supply),
            Kind::Rom { owned: true } => {
                supply.pool.add(self.fixed()).expect("checked when the object was made; the frames were its own since")
            }
            Kind::Device | Kind::Rom { owned: false } => {}
        }
        assert_eq!(self.tree.content() + self.node_frames(), 0, "a destroyed object holds no frame");
    }

    /// Its name, if it is live: under a pin, as long as that lasts.
    fn handle(&self) -> Option<ObjectHandle> {
        let raw = self.live.load(Ordering::Acquire);
        (raw != 0).then_some(ObjectHandle::from_raw(raw))
    }

    /// What kind it is.
    #[inline]
    pub fn kind(&self) -> Kind {
        Kind::decode(self.kind.load(Ordering::Relaxed))
    }

    /// Whether its content is private memory: absent from the hypervisor's own mapping, reached through
    /// [`Self::read`], [`Self::write`] and leases only.
    #[inline]
    pub fn is_private(&self) -> bool {
        matches!(self.kind(), Kind::Anonymous(_)) && self.tree.is_private()
    }

    /// Its extent in frames.
    #[inline]
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    /// Whether its frames have valid allocation tags: anonymous memory that was made so.
    pub fn is_tagged(&self) -> bool {
        matches!(self.kind(), Kind::Anonymous(_)) && self.tree.is_tagged()
    }

    /// Makes sure that a guest which may use allocation tags finds valid ones in whatever of this object is mapped as
    /// memory, and says whether it does: those of read-only memory, which nobody changes, are cleared here.
    pub fn make_tags_valid<M: Machine>(&self, machine: &M) -> bool {
        match self.kind() {
            Kind::Anonymous(_) => self.is_tagged(),
            Kind::Rom { .. } => {
                machine.clear_tags(self.fixed());
                true
            }
            // Mapped as a device: it has no tags to be used.
            Kind::Device => true,
        }
    }

    /// Frames of content that it has in memory. 0 for devices and ROM. Of an object that shares stored pages with relatives,
    /// as far as its own doing goes.
    pub fn resident_frames(&self) -> u64 {
        self.tree.resident()
    }

    /// Frames of content that it may have in memory: nothing vacant is filled past it ([`GrantError::OutOfMemory`]). What is fetched
    /// from a store is not asked, nor are nodes; CPUs that fill at the same moment may go past it by a page each. A fork gets it too.
    pub fn set_limit(&self, frames: u64) {
        self.tree.set_limit(frames);
    }

    /// Frames until that limit. `None`: there is none.
    pub fn room(&self) -> Option<u64> {
        self.tree.room()
    }

    /// Pages of content that it has in stores, with the same reservation.
    pub fn stored_frames(&self) -> u64 {
        self.tree.content() - self.tree.resident()
    }

    /// Frames that hold its tree. 0 for devices and ROM.
    pub fn node_frames(&self) -> u64 {
        self.tree.nodes()
    }

    /// What backs frame `frame`; made, zeroed, if nothing does yet. `write` says whether the access needs to write. Nothing
    /// is copied: what relatives may share is granted for reading only, and so is the zero page, which a forked object
    /// reads as where it was never touched.
    ///
    /// # Errors
    ///
    /// [`GrantError`]; nothing changed. [`GrantError::Shared`] asks for [`Self::own`].
    #[inline]
    pub fn grant<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64, write: bool) -> Result<Grant, GrantError> {
        self.check_inside(frame)?;
        match self.kind() {
            Kind::Anonymous(_) => self.tree.grant(supply, frame, write),
            Kind::Device if planted!(ZE7) => Ok(self.fixed_grant(frame, Memory::Normal)),
            Kind::Device => Ok(self.fixed_grant(frame, Memory::Device)),
            Kind::Rom { .. } if write => Err(GrantError::ReadOnly),
            Kind::Rom { .. } => Ok(self.fixed_grant(frame, Memory::Normal)),
        }
    }

    /// What backs frame `frame`, for writing, copied from what relatives share if need be. The caller stays pinned until
    /// no translation shows what was there before: neither one that it finds, nor one that is being made meanwhile. The
    /// first half is to unmap; the second, that who maps for reading asks [`Self::is_still`] after it has published.
    ///
    /// # Errors
    ///
    /// [`GrantError`], but never [`GrantError::Shared`]. What the object reads as did not change.
    pub fn own<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Result<Grant, GrantError> {
        self.own_with(supply, frame, Ahead::NONE)
    }

    /// As [`Self::own`], with a copy in hand: used if the page is still the one that was copied, else given back.
    ///
    /// # Errors
    ///
    /// As [`Self::own`].
    pub fn own_with<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        frame: u64,
        mut ahead: Ahead,
    ) -> Result<Grant, GrantError> {
        let answer = match self.kind() {
            Kind::Anonymous(_) => self.check_inside(frame).and_then(|()| self.tree.own(supply, frame, &mut ahead)),
            Kind::Device | Kind::Rom { .. } => self.grant(supply, frame, true),
        };
        ahead.give_back(supply);
        answer
    }

    /// Copies the page at `frame` that relatives share, if there is one, for a later [`Self::own_with`]. The caller is
    /// pinned, and may unpin in between.
    ///
    /// # Errors
    ///
    /// [`GrantError::Outside`], [`GrantError::OutOfMemory`].
    pub fn copy_ahead<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Result<Ahead, GrantError> {
        self.check_inside(frame)?;
        match self.kind() {
            Kind::Anonymous(_) => Ok(self.tree.copy_ahead(supply, frame)?),
            Kind::Device | Kind::Rom { .. } => Ok(Ahead::NONE),
        }
    }

    /// Whether `grant`, got for frame `frame` and for reading, is what would be granted now.
    pub fn is_still<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64, grant: &Grant) -> bool {
        match self.present(supply, frame) {
            Some(now) => (now.pfn, now.size, now.extent_start) == (grant.pfn, grant.size, grant.extent_start),
            // A bad page is not the zero page either.
            None => supply.pool.is_zero_page(grant.pfn),
        }
    }

    /// What backs frame `frame`, if something does that is not bad: for mapping around a fault, and for looking without touching.
    pub fn present<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Option<Grant> {
        self.check_inside(frame).ok()?;
        match self.look(supply.machine, frame) {
            Look::Present(grant) => supply.pool.sound(grant, frame),
            Look::Stored(_) | Look::Vacant => None,
        }
    }

    /// What there is for a frame inside, bad or not.
    fn look<M: Machine>(&self, machine: &M, frame: u64) -> Look {
        match self.kind() {
            Kind::Anonymous(_) => self.tree.look(machine, frame),
            Kind::Device => Look::Present(self.fixed_grant(frame, Memory::Device)),
            Kind::Rom { .. } => Look::Present(self.fixed_grant(frame, Memory::Normal)),
        }
    }

    /// Whether something backs frame `frame`, bad or not.
    pub fn is_resident<M: Machine>(&self, machine: &M, frame: u64) -> bool {
        self.check_inside(frame).is_ok() && matches!(self.look(machine, frame), Look::Present(_))
    }

    /// Makes the frames `start .. start + count`, as touching them would.
    ///
    /// # Errors
    ///
    /// [`PopulateError`] says how far it came; what was made stays.
    pub fn populate<M: Machine>(&self, supply: &Supply<'_, M>, start: u64, count: u64) -> Result<(), PopulateError> {
        let frames = self.frames();
        let outside = GrantError::Outside { frame: start.max(frames), frames };
        let end = start.checked_add(count).filter(|end| *end <= frames);
        let end = end.ok_or(PopulateError { done: 0, error: outside })?;
        let mut frame = start;
        while frame < end {
            // The zero page is nothing that stays.
            let grant = match self.grant_waiting(supply, frame, false) {
                Ok(grant) if supply.pool.is_zero_page(grant.pfn) => self.grant_waiting(supply, frame, true),
                answer => answer,
            };
            let grant = grant.map_err(|error| PopulateError { done: frame - start, error })?;
            frame = grant.extent_start + grant.size.frames();
        }
        Ok(())
    }

    /// Makes the frames `start .. start + count` vacant: they read as zero. Their frames are deferred. Returns how many
    /// went. The caller is pinned, has removed the translations to them, and keeps new ones from being made meanwhile.
    ///
    /// # Errors
    ///
    /// [`PunchError`]; what the object reads as did not change.
    pub fn punch<M: Machine>(&self, supply: &Supply<'_, M>, start: u64, count: u64) -> Result<u64, PunchError> {
        let Kind::Anonymous(_) = self.kind() else {
            return Err(PunchError::Kind { kind: self.kind() });
        };
        let frames = self.frames();
        let end = start.checked_add(count).filter(|end| *end <= frames);
        let end = end.ok_or(PunchError::Outside { start, count, frames })?;
        let _structure = self.structure.lock();
        self.tree.punch(supply, start, end).map_err(|error| match error {
            GrantError::Forking => PunchError::Forking,
            GrantError::OutOfMemory => PunchError::OutOfMemory,
            GrantError::Busy
            | GrantError::Shared
            | GrantError::ReadOnly
            | GrantError::Stored { .. }
            | GrantError::Poisoned
            | GrantError::Outside { .. } => {
                unreachable!("a tree waits for who is busy, needs no content for this, and its extent was checked")
            }
        })
    }

    /// As `grant`, and for writing as [`Self::own`], but waits for whoever fills or copies the same part.
    ///
    /// # Errors
    ///
    /// As `grant`, but never [`GrantError::Busy`] or [`GrantError::Shared`].
    pub fn grant_waiting<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        frame: u64,
        write: bool,
    ) -> Result<Grant, GrantError> {
        loop {
            let answer = match self.grant(supply, frame, write) {
                Err(GrantError::Shared) => self.own(supply, frame),
                answer => answer,
            };
            match answer {
                // Filling is bounded work of a CPU that nothing interrupts.
                Err(GrantError::Busy) => entresol_sync::hint::spin_loop(),
                answer => return answer,
            }
        }
    }

    #[inline]
    fn check_inside(&self, frame: u64) -> Result<(), GrantError> {
        let frames = self.frames();
        if frame < frames { Ok(()) } else { Err(GrantError::Outside { frame, frames }) }
    }

    /// The frames of a device or ROM.
    fn fixed(&self) -> PfnRange {
        let first = Pfn::new(self.first.load(Ordering::Relaxed));
        PfnRange::new(first, self.frames()).expect("checked when the object was made")
    }

    /// The largest block around a frame of a device or ROM that lies wholly inside it.
    fn fixed_grant(&self, frame: u64, memory: Memory) -> Grant {
        let all = self.fixed();
        let exact = all.start().offset(frame);
        let whole = |size: &PageSize| all.covers(PfnRange::block(exact, *size));
        let size = PageSize::ALL.into_iter().rev().find(whole).unwrap_or(PageSize::Size4K);
        let pfn = exact.align_down(size);
        let writable = memory == Memory::Device;
        Grant { pfn, extent_start: pfn.since(all.start()), size, writable, memory, fresh: false }
    }
}
