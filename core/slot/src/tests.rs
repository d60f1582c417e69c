//! The table of the specification row by row, random updates against a list, and readers against a writer.

use std::string::ToString;
use std::vec::Vec;

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SIZE};
use entresol_sync::Epoch;
use proptest::prelude::*;

use crate::*;

const OBJECT: ObjectId = ObjectId::new(7);
const SHAPE: Option<ObjectShape> = Some(ObjectShape { frames: 1000, private: false });
const LIMIT: u64 = 1 << 20;

fn slots() -> Slots {
    Slots::with_capacity(32, LIMIT).unwrap()
}

/// A request in frames.
fn request(id: u32, base: u64, count: u64, offset: u64, flags: SlotFlags) -> SlotRequest {
    SlotRequest {
        id,
        base: Gpa::new(base * PAGE_SIZE),
        size: count * PAGE_SIZE,
        object: OBJECT,
        offset: offset * PAGE_SIZE,
        flags: flags.bits(),
    }
}

/// Carries a request out, as a caller whose second stage needs no flush does.
fn apply(slots: &Slots, epoch: &Epoch, request: &SlotRequest, shape: Option<ObjectShape>) -> Result<Change, SlotError> {
    let ready = match slots.update(epoch, request, shape)? {
        Update::Unchanged => return Ok(Change::Nothing),
        Update::Publish(ready) => ready,
        Update::Withdraw(withdraw) => withdraw.invalidate(),
    };
    let change = ready.change();
    ready.commit();
    Ok(change)
}

fn find(slots: &Slots, epoch: &Epoch, gfn: u64) -> Option<Slot> {
    slots.find(&epoch.pin(0), Gfn::new(gfn), &Hint::new()).map(|found| *found)
}

fn all(slots: &Slots, epoch: &Epoch) -> Vec<Slot> {
    slots.iter(&epoch.pin(0)).map(|found| *found).collect()
}

const NONE: SlotFlags = SlotFlags::empty();

#[test]
fn every_refusal_of_the_table_names_its_rule_and_changes_nothing() {
    let (slots, epoch) = (slots(), Epoch::new());
    apply(&slots, &epoch, &request(1, 100, 10, 0, NONE), SHAPE).unwrap();
    apply(&slots, &epoch, &request(2, 200, 10, 0, NONE), SHAPE).unwrap();
    let before = (all(&slots, &epoch), slots.generation());
    let good = request(3, 300, 10, 0, NONE);
    let private = Some(ObjectShape { frames: 1000, private: true });
    let unaligned = |field| SlotError::Unaligned { field, value: 0 };
    let immutable = |field| SlotError::Immutable { field, old: 0, new: 0 };
    let object = ObjectId::new(8);
    let outside = SlotError::OutsideObject { offset: 0, size: 0, extent: 0 };
    let overlaps = SlotError::Overlaps { base: Gpa::new(0), size: 0, other: 0, other_base: Gpa::new(0), other_size: 0 };
    let cases: Vec<(SlotRequest, Option<ObjectShape>, SlotError, ErrorKind)> = [
        (SlotRequest { size: 4097, ..good }, SHAPE, unaligned("size")),
        (SlotRequest { base: Gpa::new(1), ..good }, SHAPE, unaligned("base")),
        (SlotRequest { offset: 512, ..good }, SHAPE, unaligned("offset")),
        (SlotRequest { base: Gpa::new(!0xfff), ..good }, SHAPE, SlotError::Wraps { field: "base", value: 0, size: 0 }),
        (SlotRequest { offset: !0xfff, ..good }, SHAPE, SlotError::Wraps { field: "offset", value: 0, size: 0 }),
        (request(3, 300, 10, 991, NONE), SHAPE, outside),
        (request(3, 300, 1001, 0, NONE), SHAPE, outside),
        (SlotRequest { flags: 1 << 2, ..good }, SHAPE, SlotError::UnknownFlags { flags: 0 }),
        (SlotRequest { flags: 1 << 31, ..good }, SHAPE, SlotError::UnknownFlags { flags: 0 }),
        (SlotRequest { id: 32, ..good }, SHAPE, SlotError::UnknownSlot { id: 0, capacity: 0 }),
        (SlotRequest { id: 1 << 16 | 3, ..good }, SHAPE, SlotError::UnknownAddressSpace { space: 0 }),
        (good, None, SlotError::UnknownObject { object }),
        (request(3, 300, 10, 0, SlotFlags::READ_ONLY), private, SlotError::PrivateObject { flags: NONE }),
        (request(3, 300, 10, 0, SlotFlags::LOG_DIRTY), private, SlotError::PrivateObject { flags: NONE }),
        (request(3, 300, 0, 0, NONE), SHAPE, SlotError::Absent { id: 0 }),
        (request(1, 100, 11, 0, NONE), SHAPE, immutable("size")),
        (SlotRequest { object, ..request(1, 100, 10, 0, NONE) }, SHAPE, immutable("object")),
        (request(1, 100, 10, 1, NONE), SHAPE, immutable("offset")),
        (request(1, 100, 10, 0, SlotFlags::READ_ONLY), SHAPE, immutable("flags.read_only")),
        (request(3, 109, 2, 0, NONE), SHAPE, overlaps),
        (request(3, 95, 6, 0, NONE), SHAPE, overlaps),
        (request(3, 95, 500, 0, NONE), SHAPE, overlaps),
        (request(1, 195, 10, 0, NONE), SHAPE, overlaps),
        (request(3, LIMIT - 9, 10, 0, NONE), SHAPE, SlotError::BeyondLimit { end: 0, limit: 0 }),
        (request(1, LIMIT - 9, 10, 0, NONE), SHAPE, SlotError::BeyondLimit { end: 0, limit: 0 }),
    ]
    .into_iter()
    .map(|(request, shape, error)| (request, shape, error, error.kind()))
    .collect();
    for (request, shape, like, kind) in cases {
        let error = apply(&slots, &epoch, &request, shape).unwrap_err();
        assert_eq!(core::mem::discriminant(&error), core::mem::discriminant(&like), "{error:?} for {request:?}");
        match (error, like) {
            (SlotError::Unaligned { field, .. }, SlotError::Unaligned { field: expected, .. })
            | (SlotError::Wraps { field, .. }, SlotError::Wraps { field: expected, .. })
            | (SlotError::Immutable { field, .. }, SlotError::Immutable { field: expected, .. }) => {
                assert_eq!(field, expected)
            }
            _ => {}
        }
        assert_eq!(error.kind(), kind);
        assert!(error.to_string().contains("must") || error.to_string().contains("only"), "{error}");
        assert_eq!((all(&slots, &epoch), slots.generation()), before, "{error} changed something");
    }
}

#[test]
fn errors_say_field_value_and_rule() {
    let (slots, epoch) = (slots(), Epoch::new());
    apply(&slots, &epoch, &request(1, 100, 10, 0, NONE), SHAPE).unwrap();
    let say = |request| apply(&slots, &epoch, &request, SHAPE).unwrap_err().to_string();
    assert_eq!(
        say(request(2, 105, 1, 0, NONE)),
        "base 0x69000: with size 0x1000 it must not overlap slot 1 (0xa000 bytes at 0x64000)"
    );
    assert_eq!(
        say(SlotRequest { base: Gpa::new(5), ..request(2, 0, 1, 0, NONE) }),
        "base 0x5: must be a multiple of 0x1000"
    );
    assert_eq!(say(request(2, LIMIT, 1, 0, NONE)), "base: the end 0x100001000 must not exceed 0x100000000");
}

#[test]
fn every_acceptance_of_the_table() {
    let (slots, epoch) = (slots(), Epoch::new());
    let mut last = slots.generation();
    let mut moved = |expected: bool| {
        let now = slots.generation();
        assert_eq!(now != last, expected);
        assert!(!now.in_progress());
        last = now;
    };
    let wanted = Slot { id: 5, base: Gfn::new(10), count: 4, object: OBJECT, offset: 3, flags: NONE };
    let ask = |base, flags| apply(&slots, &epoch, &request(5, base, 4, 3, flags), SHAPE);

    assert_eq!(ask(10, NONE), Ok(Change::Create(wanted)));
    moved(true);
    assert_eq!(ask(10, NONE), Ok(Change::Nothing));
    moved(false);
    let logged = Slot { flags: SlotFlags::LOG_DIRTY, ..wanted };
    assert_eq!(ask(10, SlotFlags::LOG_DIRTY), Ok(Change::Flags { from: wanted, to: logged }));
    moved(true);
    // Onto a part of its own old range, with the flags along.
    let there = Slot { base: Gfn::new(12), ..wanted };
    assert_eq!(ask(12, NONE), Ok(Change::Move { from: logged, to: there }));
    moved(true);
    assert_eq!((find(&slots, &epoch, 11), find(&slots, &epoch, 12)), (None, Some(there)));
    // A delete looks at nothing but the number.
    assert_eq!(apply(&slots, &epoch, &request(5, 999, 0, 0, NONE), None), Ok(Change::Delete(there)));
    moved(true);
    assert!(all(&slots, &epoch).is_empty());
    // The last frame of the address space is inside it.
    ask(LIMIT - 4, NONE).unwrap();
    assert_eq!(find(&slots, &epoch, LIMIT - 1).unwrap().object_frame(Gfn::new(LIMIT - 1)), 6);
}

#[test]
fn flags_only_never_withdraws() {
    let (slots, epoch) = (slots(), Epoch::new());
    apply(&slots, &epoch, &request(0, 0, 4, 0, NONE), SHAPE).unwrap();
    match slots.update(&epoch, &request(0, 0, 4, 0, SlotFlags::LOG_DIRTY), SHAPE).unwrap() {
        Update::Publish(ready) => {
            assert_eq!(ready.withdrawn(), None);
            ready.revert();
        }
        _ => panic!("flags only must not withdraw the slot"),
    }
    assert_eq!(find(&slots, &epoch, 0).unwrap().flags, NONE, "a reverted update changes nothing");
}

#[test]
fn a_withdrawn_slot_is_found_by_its_object_only_and_a_failed_prepare_puts_it_back() {
    let (slots, epoch) = (slots(), Epoch::new());
    apply(&slots, &epoch, &request(0, 50, 4, 20, NONE), SHAPE).unwrap();
    let old = find(&slots, &epoch, 50).unwrap();
    for target in [request(0, 90, 4, 20, NONE), request(0, 0, 0, 0, NONE)] {
        let Update::Withdraw(withdraw) = slots.update(&epoch, &target, SHAPE).unwrap() else {
            panic!("delete and move withdraw");
        };
        assert_eq!(find(&slots, &epoch, 50), Some(old), "not before it is said");
        let ready = withdraw.invalidate();
        assert_eq!(ready.withdrawn(), Some(old));
        assert_eq!((find(&slots, &epoch, 50), all(&slots, &epoch).len()), (None, 0));
        let pin = epoch.pin(0);
        assert_eq!(slots.mappings(&pin, OBJECT, 22, 1).count(), 1, "the notifier must still reach its translations");
        drop(pin);
        drop(ready);
        assert_eq!((find(&slots, &epoch, 50), find(&slots, &epoch, 90)), (Some(old), None));
    }
}

#[test]
fn an_answer_is_current_until_the_next_publication() {
    let (slots, epoch) = (slots(), Epoch::new());
    apply(&slots, &epoch, &request(0, 0, 4, 0, NONE), SHAPE).unwrap();
    let pin = epoch.pin(0);
    let found = slots.find(&pin, Gfn::new(1), &Hint::new()).unwrap();
    assert!(slots.is_current(&found, &pin));
    let moved = std::thread::scope(|scope| {
        let (slots, epoch) = (&slots, &epoch);
        scope.spawn(move || apply(slots, epoch, &request(1, 10, 4, 0, NONE), SHAPE).unwrap());
        while !slots.generation().in_progress() {
            std::thread::yield_now();
        }
        // The publication waits for this pin, so all of this happens while it is in progress.
        assert!(!slots.is_current(&found, &pin));
        let during = slots.find(&pin, Gfn::new(1), &Hint::new()).unwrap();
        assert!(!slots.is_current(&during, &pin), "nothing found during an update is current");
        assert_eq!(
            slots.generation().get() >> 1,
            found.generation().get() >> 1,
            "the generation waits for the grace period"
        );
        drop(pin);
        slots
    });
    let pin = epoch.pin(0);
    assert!(!moved.is_current(&found, &pin));
    let again = moved.find(&pin, Gfn::new(1), &Hint::new()).unwrap();
    assert!(moved.is_current(&again, &pin));
}

#[test]
fn a_capacity_out_of_range_is_refused() {
    assert_eq!(Slots::with_capacity(0, 1).err(), Some(CreateError::Capacity { value: 0 }));
    assert_eq!(Slots::with_capacity(65_537, 1).err(), Some(CreateError::Capacity { value: 65_537 }));
}

#[test]
fn as_many_slots_as_the_specification_wants() {
    const COUNT: u32 = 32_764;
    let (slots, epoch) = (Slots::with_capacity(COUNT, 1 << 30).unwrap(), Epoch::new());
    let object = |id: u32| ObjectId::new(id / 500);
    for id in 0..COUNT {
        let plain = request(id, u64::from(id) * 3, 2, u64::from(id % 500), NONE);
        apply(&slots, &epoch, &SlotRequest { object: object(id), ..plain }, SHAPE).unwrap();
    }
    let (pin, hint) = (epoch.pin(0), Hint::new());
    for id in (0..COUNT).step_by(97) {
        let gfn = Gfn::new(u64::from(id) * 3 + 1);
        assert_eq!(slots.find(&pin, gfn, &hint).map(|slot| u32::from(slot.id)), Some(id));
        assert_eq!(slots.find(&pin, gfn.offset(1), &hint), None);
    }
    let of_frame = slots.mappings(&pin, object(20_000), 7, 1).map(|slot| slot.id).collect::<Vec<_>>();
    assert_eq!(of_frame, [20_006, 20_007], "two slots show frame 7 of every object");
}

/// The slots as a list: what everything else must agree with.
#[derive(Default)]
struct Naive(Vec<Slot>);

impl Naive {
    fn apply(&mut self, request: &SlotRequest) -> Result<(), ErrorKind> {
        let id = request.id as u16;
        let (base, count) = (request.base.frame(), request.size / PAGE_SIZE);
        let old = self.0.iter().position(|slot| slot.id == id);
        if count == 0 {
            self.0.remove(old.ok_or(ErrorKind::InvalidArgument)?);
            return Ok(());
        }
        let flags = SlotFlags::from_bits_retain(request.flags);
        let new = Slot { id, base, count, object: request.object, offset: request.offset / PAGE_SIZE, flags };
        if new.offset + new.count > SHAPE.unwrap().frames {
            return Err(ErrorKind::InvalidArgument);
        }
        if let Some(at) = old {
            let same = |slot: Slot| (slot.count, slot.object, slot.offset, slot.is_read_only());
            if same(self.0[at]) != same(new) {
                return Err(ErrorKind::InvalidArgument);
            }
        }
        let range = GfnRange::new(base, count).unwrap();
        if self.0.iter().any(|slot| slot.id != id && slot.range().overlaps(range)) {
            return Err(ErrorKind::Exists);
        }
        if range.end().get() > LIMIT {
            return Err(ErrorKind::BadAddress);
        }
        old.map(|at| self.0.remove(at));
        self.0.push(new);
        Ok(())
    }
}

fn any_request() -> impl Strategy<Value = SlotRequest> {
    let base = prop_oneof![9 => 0u64..40, 1 => LIMIT - 4..LIMIT + 2];
    (0u32..12, base, 0u64..8, 0u64..6, 0u32..3, 0u32..4).prop_map(|(id, base, count, offset, object, flags)| {
        SlotRequest {
            object: ObjectId::new(object),
            ..request(id, base, count, offset, SlotFlags::from_bits_retain(flags))
        }
    })
}

proptest! {
    #[test]
    fn random_updates_agree_with_a_list(requests in prop::collection::vec((any_request(), any::<bool>()), 1..80)) {
        let (slots, epoch, hint) = (slots(), Epoch::new(), Hint::new());
        let mut naive = Naive::default();
        for (mut request, again) in requests {
            // Half of the time, aim at what is there, so that moves and flags are not rare.
            if let Some(slot) = naive.0.first().filter(|_| again && request.size != 0) {
                let size = slot.count * PAGE_SIZE;
                let offset = slot.offset * PAGE_SIZE;
                request = SlotRequest { id: slot.id.into(), size, object: slot.object, offset, ..request };
            }
            let outcome = apply(&slots, &epoch, &request, SHAPE).map(drop);
            prop_assert_eq!(outcome.map_err(|error| error.kind()), naive.apply(&request));

            let pin = epoch.pin(0);
            for gfn in (0..50).chain(LIMIT - 5..LIMIT + 2).map(Gfn::new) {
                let expected = naive.0.iter().find(|slot| slot.contains(gfn)).copied();
                prop_assert_eq!(slots.find(&pin, gfn, &hint).map(|slot| *slot), expected);
            }
            for (object, start, count) in (0..3).flat_map(|o| (0..14).map(move |s| (ObjectId::new(o), s, s % 4))) {
                let mut found: Vec<_> = slots.mappings(&pin, object, start, count).map(|slot| *slot).collect();
                let shows = |slot: &&Slot| slot.object == object && slot.guest_range(start, count).is_some();
                let mut expected: Vec<_> = naive.0.iter().filter(shows).copied().collect();
                found.sort_by_key(|slot| slot.id);
                expected.sort_by_key(|slot| slot.id);
                prop_assert_eq!(found, expected);
            }
        }
    }
}

#[test]
fn readers_never_see_a_torn_or_an_overlapping_slot() {
    const READERS: usize = 2;
    const ROUNDS: u64 = 20;
    let (slots, epoch) = (slots(), Epoch::new());
    let shape = Some(ObjectShape { frames: 1 << 20, private: false });
    // What a slot must be is a function of its number and its object, so a mixture of two shows.
    let made = |id: u32, round: u64| {
        let size = 1 + (round + u64::from(id)) % 7;
        SlotRequest { object: ObjectId::new((id << 16) | size as u32), ..request(id, 0, size, 100 * size, NONE) }
    };
    let done = std::sync::atomic::AtomicBool::new(false);
    let seen = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for reader in 0..READERS {
            let (slots, epoch, done, seen) = (&slots, &epoch, &done, &seen);
            scope.spawn(move || {
                let hint = Hint::new();
                while !done.load(std::sync::atomic::Ordering::Acquire) {
                    let pin = epoch.pin(reader + 1);
                    let mut last = 0;
                    for slot in slots.iter(&pin) {
                        assert!(slot.base.get() >= last, "slots overlap");
                        last = slot.range().end().get();
                        assert_eq!(slot.object.get(), u32::from(slot.id) << 16 | slot.count as u32, "torn");
                        assert_eq!(slot.offset, 100 * slot.count, "torn");
                        let again = slots.find(&pin, slot.base, &hint);
                        if slots.is_current(&slot, &pin) {
                            // An update may have begun since; then `again` says so itself.
                            assert!(again.is_none_or(|again| !slots.is_current(&again, &pin) || *again == *slot));
                        }
                        seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    }
                    drop(pin);
                    // Where CPUs are few, lose this one here rather than while the writer waits for the pin.
                    std::thread::yield_now();
                }
            });
        }
        for round in 0..ROUNDS {
            for id in 0..6 {
                let target = SlotRequest { base: Gpa::new(u64::from(id) * 10 * PAGE_SIZE), ..made(id, round) };
                apply(&slots, &epoch, &target, shape).unwrap();
            }
            // Every round is watched: nothing goes away before a reader has seen some of it.
            let before = seen.load(std::sync::atomic::Ordering::Relaxed);
            while seen.load(std::sync::atomic::Ordering::Relaxed) == before {
                std::thread::yield_now();
            }
            for id in 0..6 {
                let far = 100 + u64::from(5 - id) * 10 + round % 3;
                let target = SlotRequest { base: Gpa::new(far * PAGE_SIZE), ..made(id, round) };
                apply(&slots, &epoch, &target, shape).unwrap();
            }
            for id in 0..6 {
                apply(&slots, &epoch, &request(id, 0, 0, 0, NONE), None).unwrap();
            }
        }
        done.store(true, std::sync::atomic::Ordering::Release);
    });
}

#[test]
fn a_frame_is_a_slots_or_leaving_or_nobodys() {
    let (slots, epoch) = (slots(), Epoch::new());
    apply(&slots, &epoch, &request(0, 50, 4, 20, NONE), SHAPE).unwrap();
    let place = |gfn| slots.place(&epoch.pin(0), Gfn::new(gfn));
    assert!(matches!(place(53), Place::Slot(found) if found.id == 0));
    assert_eq!((place(49), place(54)), (Place::Nothing(slots.generation()), Place::Nothing(slots.generation())));
    let Update::Withdraw(withdraw) = slots.update(&epoch, &request(0, 50, 0, 0, NONE), None).unwrap() else {
        panic!("a deletion withdraws");
    };
    let ready = withdraw.invalidate();
    assert_eq!((place(53), place(54)), (Place::Leaving, Place::Nothing(slots.generation())));
    ready.commit();
    assert_eq!(place(53), Place::Nothing(slots.generation()));
}

#[test]
fn a_generation_moves_ahead_only() {
    let (slots, epoch) = (slots(), Epoch::new());
    apply(&slots, &epoch, &request(0, 50, 4, 20, NONE), SHAPE).unwrap();
    let before = slots.generation();
    slots.renumber(&epoch, before.count(), || panic!("it is there already"));
    assert_eq!(slots.generation(), before);
    slots.renumber(&epoch, 1 << 19, || {
        assert!(slots.generation().in_progress() && slots.generation().count() == before.count());
    });
    assert_eq!((slots.generation().count(), slots.generation().in_progress()), (1 << 19, false));
    assert_eq!(find(&slots, &epoch, 50).unwrap().id, 0, "the slots are as they were");
    apply(&slots, &epoch, &request(1, 60, 4, 20, NONE), SHAPE).unwrap();
    assert_eq!((slots.generation().count(), all(&slots, &epoch).len()), ((1 << 19) + 1, 2));
}
