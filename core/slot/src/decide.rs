//! What a request means: the table "Slot updates" of the specification, without effects.

use entresol_addr::{Gpa, PAGE_SHIFT, PAGE_SIZE};

use crate::{ObjectId, Set, Slot, SlotError, SlotFlags};

/// What an owner asks for, in bytes and raw bits, nothing checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRequest {
    /// Bits 15:0 the slot, bits 31:16 the address space, as in the KVM API.
    pub id: u32,
    /// First guest physical address.
    pub base: Gpa,
    /// Bytes; 0 deletes.
    pub size: u64,
    /// The object behind it. Not looked at when deleting.
    pub object: ObjectId,
    /// The object's byte behind `base`. Not looked at when deleting, but for its alignment.
    pub offset: u64,
    /// Bits of [`SlotFlags`].
    pub flags: u32,
}

/// What a decision must know of the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectShape {
    /// Its extent in frames.
    pub frames: u64,
    /// Its frames are outside the hypervisor's mapping (D9).
    pub private: bool,
}

/// What an accepted request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Everything is as asked already.
    Nothing,
    /// A slot where there was none.
    Create(Slot),
    /// The slot goes.
    Delete(Slot),
    /// The guest address changes, and the flags with it if they differ.
    Move {
        /// As it is.
        from: Slot,
        /// As it will be.
        to: Slot,
    },
    /// Only flags change: nothing is unmapped.
    Flags {
        /// As it is.
        from: Slot,
        /// As it will be.
        to: Slot,
    },
}

/// Decides. `object` is the shape of `request.object`, `None` if there is no such object; `limit` is one past the last
/// guest frame of the machine.
///
/// # Errors
///
/// [`SlotError`], by the rules of the specification.
pub fn decide(set: &Set, limit: u64, request: &SlotRequest, object: Option<ObjectShape>) -> Result<Change, SlotError> {
    let (id, flags) = check_numbers(set, request)?;
    let existing = set.get(id);
    if request.size == 0 {
        return existing.map(Change::Delete).ok_or(SlotError::Absent { id });
    }
    check_object(request, flags, object)?;
    let wanted = Slot {
        id,
        base: request.base.frame(),
        count: request.size >> PAGE_SHIFT,
        object: request.object,
        offset: request.offset >> PAGE_SHIFT,
        flags,
    };
    let change = match existing {
        None => Change::Create(wanted),
        Some(from) => alter(from, wanted)?,
    };
    if matches!(change, Change::Create(_) | Change::Move { .. }) {
        check_place(set, limit, wanted)?;
    }
    Ok(change)
}

/// What can be said of the numbers alone.
fn check_numbers(set: &Set, request: &SlotRequest) -> Result<(u16, SlotFlags), SlotError> {
    let flags = SlotFlags::from_bits(request.flags).ok_or(SlotError::UnknownFlags { flags: request.flags })?;
    let (id, space) = (request.id & 0xffff, request.id >> 16);
    if space != 0 {
        return Err(SlotError::UnknownAddressSpace { space });
    }
    let capacity = set.capacity();
    if id >= capacity {
        return Err(SlotError::UnknownSlot { id, capacity });
    }
    let fields = [("size", request.size), ("base", request.base.get()), ("offset", request.offset)];
    for (field, value) in fields {
        if !value.is_multiple_of(PAGE_SIZE) {
            return Err(SlotError::Unaligned { field, value });
        }
    }
    for (field, value) in &fields[1..] {
        if value.checked_add(request.size).is_none() {
            return Err(SlotError::Wraps { field, value: *value, size: request.size });
        }
    }
    // Bits 15:0 were cut out above.
    Ok((id as u16, flags))
}

/// What the object permits. The offset does not wrap.
fn check_object(request: &SlotRequest, flags: SlotFlags, object: Option<ObjectShape>) -> Result<(), SlotError> {
    let object = object.ok_or(SlotError::UnknownObject { object: request.object })?;
    if (request.offset + request.size) >> PAGE_SHIFT > object.frames {
        let extent = object.frames.saturating_mul(PAGE_SIZE);
        return Err(SlotError::OutsideObject { offset: request.offset, size: request.size, extent });
    }
    if object.private && !flags.is_empty() {
        return Err(SlotError::PrivateObject { flags });
    }
    Ok(())
}

/// An existing slot and what is wanted of it.
fn alter(from: Slot, to: Slot) -> Result<Change, SlotError> {
    let read_only = |slot: Slot| u64::from((slot.flags & SlotFlags::READ_ONLY).bits());
    for (field, old, new) in [
        ("size", from.count << PAGE_SHIFT, to.count << PAGE_SHIFT),
        ("object", from.object.get().into(), to.object.get().into()),
        ("offset", from.offset << PAGE_SHIFT, to.offset << PAGE_SHIFT),
        ("flags.read_only", read_only(from), read_only(to)),
    ] {
        if old != new {
            return Err(SlotError::Immutable { field, old, new });
        }
    }
    Ok(match (from.base == to.base, from.flags == to.flags) {
        (false, _) => Change::Move { from, to },
        (true, false) => Change::Flags { from, to },
        (true, true) => Change::Nothing,
    })
}

/// Whether there is room at the guest address.
fn check_place(set: &Set, limit: u64, wanted: Slot) -> Result<(), SlotError> {
    if let Some(other) = set.overlapping(wanted.range(), wanted.id) {
        return Err(SlotError::Overlaps {
            base: wanted.base.base(),
            size: wanted.count << PAGE_SHIFT,
            other: other.id,
            other_base: other.base.base(),
            other_size: other.count << PAGE_SHIFT,
        });
    }
    let end = wanted.range().end().get();
    if end > limit {
        let bytes = |frames: u64| frames.saturating_mul(PAGE_SIZE);
        return Err(SlotError::BeyondLimit { end: bytes(end), limit: bytes(limit) });
    }
    Ok(())
}
