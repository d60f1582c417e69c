//! The slots of one virtual machine, as readers see them.
//!
//! Protocol: one word, the state, says which set is active, whether an update is in progress, and the generation. A
//! reader loads it once and has all three of one moment.

use core::fmt;

use entresol_addr::Gfn;
use entresol_sync::atomic::{AtomicU32, AtomicU64, Ordering};
use entresol_sync::{Epoch, Mutex, Pin, ordering, planted};

use crate::set::Validity;
use crate::{Generation, Mappings, ObjectId, ObjectShape, Set, Slot, SlotError, SlotRef, SlotRequest, Update};

/// The most slots that one machine may have: what bits 15:0 of a request can name.
pub const MAX_SLOTS: u32 = 1 << 16;

/// Bit of the state: which of the two sets readers use.
const ACTIVE: u64 = 1 << 0;
/// Bit of the state: readers of both sets may be about.
const IN_PROGRESS: u64 = 1 << 1;
/// One generation.
const STEP: u64 = 1 << 2;

/// Where one vCPU found its slot last time.
#[derive(Debug, Default)]
pub struct Hint(AtomicU32);

impl Hint {
    /// No slot found yet.
    pub const fn new() -> Self {
        Self(AtomicU32::new(0))
    }
}

/// What lies at a guest frame, for whoever wants to remember that nothing does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A slot.
    Slot(SlotRef),
    /// A slot that is being withdrawn: what becomes of the frame is not decided yet.
    Leaving,
    /// No slot, in this state of the slots.
    Nothing(Generation),
}

/// Why no slots could be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateError {
    /// The capacity is 0, or above [`MAX_SLOTS`].
    Capacity {
        /// What was asked for.
        value: u32,
    },
    /// The heap has no room.
    OutOfHeap,
}

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capacity { value } => write!(f, "slots {value}: must be 1 to {MAX_SLOTS}"),
            Self::OutOfHeap => f.write_str("slots: the heap has no room for them"),
        }
    }
}

impl core::error::Error for CreateError {}

/// The slots of one virtual machine.
pub struct Slots {
    state: AtomicU64,
    sets: [Set; 2],
    pub(crate) updating: Mutex<()>,
    limit: u64,
}

impl Slots {
    /// Room for slots numbered below `capacity`, in a guest physical address space of `limit` frames.
    ///
    /// # Errors
    ///
    /// [`CreateError`].
    pub fn with_capacity(capacity: u32, limit: u64) -> Result<Self, CreateError> {
        if capacity == 0 || capacity > MAX_SLOTS {
            return Err(CreateError::Capacity { value: capacity });
        }
        let set = || Set::with_capacity(capacity as usize).ok_or(CreateError::OutOfHeap);
        Ok(Self { state: AtomicU64::new(0), sets: [set()?, set()?], updating: Mutex::new(()), limit })
    }

    /// The valid slot that `gfn` lies in.
    #[inline]
    pub fn find(&self, _pin: &Pin<'_>, gfn: Gfn, hint: &Hint) -> Option<SlotRef> {
        let (set, generation) = self.active();
        let slot = match set.find_hinted(gfn, hint.0.load(Ordering::Relaxed) as u16) {
            Some(slot) => slot,
            None => find_again(set, gfn, hint)?,
        };
        Some(SlotRef { slot, generation })
    }

    /// What lies at `gfn`.
    pub fn place(&self, _pin: &Pin<'_>, gfn: Gfn) -> Place {
        let (set, generation) = self.active();
        match set.holder(gfn) {
            Some((slot, Validity::Valid)) => Place::Slot(SlotRef { slot, generation }),
            Some((_, Validity::Invalid)) => Place::Leaving,
            None => Place::Nothing(generation),
        }
    }

    /// The valid slot numbered `id`.
    pub fn get(&self, _pin: &Pin<'_>, id: u16) -> Option<SlotRef> {
        let (set, generation) = self.active();
        set.get_valid(id).map(|slot| SlotRef { slot, generation })
    }

    /// Whether `slot` still says what the slots say, and no update is in progress. What is published before the pin
    /// ends is seen by the flush of every later update.
    #[inline]
    pub fn is_current(&self, slot: &SlotRef, _pin: &Pin<'_>) -> bool {
        self.generation() == slot.generation && !slot.generation.in_progress()
    }

    /// The state of the slots, for what is kept from one exit to the next.
    #[inline]
    pub fn generation(&self) -> Generation {
        Generation::new(self.state.load(Ordering::Acquire) >> 1)
    }

    /// The slots that show a frame of `object` in `start .. start + count`, by offset. Slots that are being withdrawn
    /// are among them: the guest may still reach the object through what was mapped.
    pub fn mappings<'s>(&'s self, _pin: &'s Pin<'_>, object: ObjectId, start: u64, count: u64) -> Mappings<'s> {
        let (set, generation) = self.active();
        set.mappings(generation, object, start, count)
    }

    /// The valid slots in the order of guest frames.
    pub fn iter<'s>(&'s self, _pin: &'s Pin<'_>) -> impl Iterator<Item = SlotRef> + 's {
        let (set, generation) = self.active();
        let valid = set.iter().filter(|(_, validity)| *validity == Validity::Valid);
        valid.map(move |(slot, _)| SlotRef { slot, generation })
    }

    /// One past the last guest frame of the machine.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Slot numbers are below this.
    pub fn capacity(&self) -> u32 {
        self.sets[0].capacity()
    }

    /// Decides what `request` means and takes the update lock for it. `object` is the shape of `request.object`, `None`
    /// if there is no such object. Publications wait for grace periods of `epoch`, which is the one that readers pin;
    /// the caller's own CPU is not pinned then.
    ///
    /// # Errors
    ///
    /// [`SlotError`]; nothing changed.
    pub fn update<'s>(
        &'s self,
        epoch: &'s Epoch,
        request: &SlotRequest,
        object: Option<ObjectShape>,
    ) -> Result<Update<'s>, SlotError> {
        Update::begin(self, epoch, request, object)
    }

    /// Moves the generation to `count`, as if so many publications had been made, unless it is there or beyond already.
    /// `meanwhile` runs while an update counts as in progress, and nobody is left who read the slots before it did.
    ///
    /// For whoever keeps only a part of a generation: when that part would repeat, `meanwhile` forgets what was kept. The
    /// caller's own CPU is not pinned.
    pub fn renumber(&self, epoch: &Epoch, count: u64, meanwhile: impl FnOnce()) {
        let _updating = self.updating.lock();
        let state = self.state.load(Ordering::Relaxed);
        if state / STEP >= count {
            return;
        }
        self.state.store(state | IN_PROGRESS, Ordering::Release);
        epoch.synchronize();
        meanwhile();
        self.state.store(state & ACTIVE | (count * STEP), Ordering::Release);
    }

    #[inline]
    fn active(&self) -> (&Set, Generation) {
        let state = self.state.load(ordering!(SlotsFind, Acquire, Relaxed));
        let set = if state & ACTIVE == 0 { &self.sets[0] } else { &self.sets[1] };
        (set, Generation::new(state >> 1))
    }

    /// What readers see, for the holder of the update lock.
    pub(crate) fn published(&self) -> &Set {
        self.active().0
    }

    /// Makes slot `id` become `to` for every reader, and waits until no reader can hold what it was. The caller holds
    /// the update lock.
    pub(crate) fn publish(&self, epoch: &Epoch, id: u16, to: Option<(Slot, Validity)>) {
        let state = self.state.load(Ordering::Relaxed);
        let next = state ^ ACTIVE;
        self.sets[(next & ACTIVE) as usize].replace(id, to);
        self.state.store(next | IN_PROGRESS, ordering!(SlotsPublish, Release, Relaxed));
        if !planted!(ZF1) {
            epoch.synchronize();
        }
        self.sets[(state & ACTIVE) as usize].replace(id, to);
        self.state.store(next + STEP, Ordering::Release);
    }
}

/// The hint missed.
#[cold]
fn find_again(set: &Set, gfn: Gfn, hint: &Hint) -> Option<Slot> {
    let slot = set.find(gfn)?;
    hint.0.store(slot.id.into(), Ordering::Relaxed);
    Some(slot)
}
