//! What the core must be like, said as simply as it can be: lists and maps, no speed, no order.

use std::collections::{BTreeMap, BTreeSet};

use entresol_slot::{SlotFlags, SlotRequest};

/// Bytes of a page.
const PAGE: u64 = 4096;
/// What memory holds that nobody has written.
pub const POISON: u64 = 0xdead_dead_dead_dead;

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behind {
    /// Zero until written.
    Memory,
    /// What the machine held, for ever.
    Rom,
    /// Not memory.
    Device,
}

/// An object.
#[derive(Clone, Copy, Debug)]
pub struct Object {
    /// The number that the core gave it.
    pub number: u32,
    /// What it is.
    pub behind: Behind,
    /// Its extent.
    pub frames: u64,
}

/// A slot, in frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// First guest frame.
    pub base: u64,
    /// Frames.
    pub count: u64,
    /// Its object's number.
    pub object: u32,
    /// The object's frame behind `base`.
    pub offset: u64,
    /// Bits of [`SlotFlags`].
    pub flags: u32,
}

impl Slot {
    /// Whether the guest may not write.
    pub fn is_read_only(&self) -> bool {
        self.flags & SlotFlags::READ_ONLY.bits() != 0
    }

    /// Whether writes are logged.
    pub fn logs(&self) -> bool {
        self.flags & SlotFlags::LOG_DIRTY.bits() != 0
    }

    /// Whether it holds the guest frame.
    pub fn holds(&self, gfn: u64) -> bool {
        (self.base..self.base + self.count).contains(&gfn)
    }

    /// The object's frame behind a guest frame that it holds.
    pub fn behind(&self, gfn: u64) -> u64 {
        gfn - self.base + self.offset
    }
}

/// Everything that the reference knows.
#[derive(Debug, Default)]
pub struct Reference {
    /// The objects.
    pub objects: Vec<Object>,
    /// The slots by number.
    pub slots: BTreeMap<u16, Slot>,
    /// First words of frames by object and frame, if they were written.
    words: BTreeMap<(u32, u64), u64>,
    /// Pages written since the log was taken: slot, page of the slot.
    pub dirty: BTreeSet<(u16, u64)>,
}

impl Reference {
    /// The object of that number.
    pub fn object(&self, number: u32) -> Option<Object> {
        self.objects.iter().copied().find(|object| object.number == number)
    }

    /// The slot that holds a guest frame.
    pub fn at(&self, gfn: u64) -> Option<(u16, Slot)> {
        self.slots.iter().map(|(id, slot)| (*id, *slot)).find(|(_, slot)| slot.holds(gfn))
    }

    /// The same with objects of other numbers. Memory that has none is not this machine's.
    pub fn renamed(&self, numbers: &BTreeMap<u32, u32>) -> Self {
        let name = |object: u32| numbers.get(&object).copied();
        let objects = self.objects.iter().filter_map(|object| match name(object.number) {
            Some(number) => Some(Object { number, ..*object }),
            None => (object.behind != Behind::Memory).then_some(*object),
        });
        let slots =
            self.slots.iter().filter_map(|(id, slot)| Some((*id, Slot { object: name(slot.object)?, ..*slot })));
        let words = self.words.iter().filter_map(|((object, frame), word)| Some(((name(*object)?, *frame), *word)));
        Self { objects: objects.collect(), slots: slots.collect(), words: words.collect(), dirty: BTreeSet::new() }
    }

    /// The first word of an object's frame.
    pub fn word(&self, object: u32, frame: u64) -> u64 {
        let untouched = match self.object(object).map(|object| object.behind) {
            Some(Behind::Memory) => 0,
            _ => POISON,
        };
        self.words.get(&(object, frame)).copied().unwrap_or(untouched)
    }

    /// A guest or its owner writes the first word behind a guest frame.
    pub fn write(&mut self, gfn: u64, value: u64) {
        let Some((id, slot)) = self.at(gfn) else { return };
        // A device keeps what it likes, and has nothing to log.
        if self.object(slot.object).is_none_or(|object| object.behind != Behind::Memory) {
            return;
        }
        self.words.insert((slot.object, slot.behind(gfn)), value);
        if slot.logs() {
            self.dirty.insert((id, gfn - slot.base));
        }
    }

    /// Frames of an object lose their content.
    pub fn punch(&mut self, object: u32, start: u64, count: u64) {
        self.words.retain(|(of, frame), _| *of != object || !(start..start + count).contains(frame));
    }

    /// A frame of an object was given back through some slot: who shows it sees that it was written.
    pub fn discard(&mut self, object: u32, frame: u64) {
        if self.words.remove(&(object, frame)).is_none_or(|word| word == 0) {
            return;
        }
        let shows = |slot: &Slot| slot.object == object && (slot.offset..slot.offset + slot.count).contains(&frame);
        let logging = self.slots.iter().filter(|(_, slot)| slot.logs() && shows(slot));
        self.dirty.extend(logging.map(|(id, slot)| (*id, frame - slot.offset)));
    }

    /// The slots after an update, if it is one that the owner may ask for.
    pub fn updated(&self, request: &SlotRequest, capacity: u32) -> Option<BTreeMap<u16, Slot>> {
        let id = request.id as u16;
        let aligned = [request.base.get(), request.size, request.offset].iter().all(|value| value % PAGE == 0);
        if !aligned || request.id >= capacity || request.flags & !SlotFlags::all().bits() != 0 {
            return None;
        }
        let mut slots = self.slots.clone();
        let old = slots.remove(&id);
        if request.size == 0 {
            return old.map(|_| slots);
        }
        let slot = Slot {
            base: request.base.get() / PAGE,
            count: request.size / PAGE,
            object: request.object.get(),
            offset: request.offset / PAGE,
            flags: request.flags,
        };
        let fits = self.object(slot.object).is_some_and(|object| slot.offset + slot.count <= object.frames);
        let overlaps = |old: &Slot| old.base < slot.base + slot.count && slot.base < old.base + old.count;
        let keeps = old.is_none_or(|old| {
            (old.count, old.object, old.offset, old.is_read_only())
                == (slot.count, slot.object, slot.offset, slot.is_read_only())
        });
        if !fits || !keeps || slots.values().any(overlaps) {
            return None;
        }
        slots.insert(id, slot);
        Some(slots)
    }

    /// The slots are these now. A slot that moved, went, or logs no more or anew, has an empty log.
    pub fn accept(&mut self, slots: BTreeMap<u16, Slot>) {
        let place = |slot: &Slot| (slot.base, slot.logs());
        let before = std::mem::replace(&mut self.slots, slots);
        self.dirty.retain(|(id, _)| before.get(id).map(place) == self.slots.get(id).map(place));
    }
}
