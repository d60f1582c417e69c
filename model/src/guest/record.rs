//! What the owner asked for, as the lab remembers it: the slots of each virtual machine, and which are changing.

use entresol_addr::{Gfn, GfnRange};

use crate::machine::tlb::Stamp;

/// A slot that exists, or that an update is creating or taking away.
#[derive(Clone, Debug)]
pub struct SlotRecord {
    /// Whose.
    pub vm: usize,
    /// Its number.
    pub id: u32,
    /// Guest frames.
    pub range: GfnRange,
    /// The object behind it.
    pub object: usize,
    /// The object's frame behind its first.
    pub offset: u64,
    /// The owner asked for a read-only slot.
    pub read_only: bool,
    /// The object behind it is read-only.
    pub rom: bool,
    /// The object behind it is a device.
    pub device: bool,
    /// An update is on its way.
    pub changing: bool,
    /// When the last update of it ended.
    pub since: Stamp,
}

impl SlotRecord {
    /// Whether a guest's store belongs to the owner.
    pub fn refuses_stores(&self) -> bool {
        self.read_only || self.rom
    }
}

/// What lies at a guest address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// No slot.
    Nothing,
    /// Memory that guests may not change.
    ReadOnly,
    /// Memory.
    Writable,
    /// A device.
    Device,
}

/// All slots.
#[derive(Debug, Default)]
pub struct Records {
    slots: Vec<SlotRecord>,
    /// Slots that went: whose, where they lay, and when the update ended.
    gone: Vec<(usize, GfnRange, Stamp)>,
}

impl Records {
    /// A slot is being created; it lies there from now on.
    pub fn begin_create(&mut self, slot: SlotRecord) {
        self.slots.push(SlotRecord { changing: true, ..slot });
    }

    /// Slot `id` of `vm` is being changed.
    pub fn begin_change(&mut self, vm: usize, id: u32) {
        self.mine(vm, id).for_each(|slot| slot.changing = true);
    }

    /// The update of slot `id` of `vm` has ended: it lies at `at`, or nowhere.
    pub fn end(&mut self, vm: usize, id: u32, at: Option<Gfn>, now: Stamp) {
        let gone = &mut self.gone;
        self.slots.retain(|slot| {
            let stays = !(slot.vm == vm && slot.id == id) || at == Some(slot.range.start());
            if !stays {
                gone.push((vm, slot.range, now));
            }
            stays
        });
        self.mine(vm, id).for_each(|slot| (slot.changing, slot.since) = (false, now));
    }

    fn mine(&mut self, vm: usize, id: u32) -> impl Iterator<Item = &mut SlotRecord> {
        self.slots.iter_mut().filter(move |slot| slot.vm == vm && slot.id == id)
    }

    /// The slot `id` of `vm`.
    pub fn get(&self, vm: usize, id: u32) -> Option<&SlotRecord> {
        self.slots.iter().find(|slot| slot.vm == vm && slot.id == id)
    }

    /// The slots of `vm`, those that change included.
    pub fn of(&self, vm: usize) -> impl Iterator<Item = &SlotRecord> {
        self.slots.iter().filter(move |slot| slot.vm == vm)
    }

    /// A slot in which `gfn` of `vm` lies, changing or not.
    pub fn any_at(&self, vm: usize, gfn: Gfn) -> Option<&SlotRecord> {
        self.of(vm).find(|slot| slot.range.contains(gfn))
    }

    /// What lay at `gfn` of `vm` all the time since `since`, if it was one thing.
    pub fn target(&self, vm: usize, gfn: Gfn, since: Stamp) -> Option<Target> {
        if self.any_at(vm, gfn).is_none() {
            let went = self.gone.iter().any(|(of, range, when)| *of == vm && range.contains(gfn) && *when >= since);
            return (!went).then_some(Target::Nothing);
        }
        let slot = self.stable_at(vm, gfn, since)?;
        Some(match (slot.device, slot.refuses_stores()) {
            (_, true) => Target::ReadOnly,
            (true, false) => Target::Device,
            (false, false) => Target::Writable,
        })
    }

    /// The slot in which `gfn` of `vm` lies and which nobody has changed since `since`.
    pub fn stable_at(&self, vm: usize, gfn: Gfn, since: Stamp) -> Option<&SlotRecord> {
        self.of(vm).find(|slot| slot.range.contains(gfn) && !slot.changing && slot.since <= since)
    }
}
