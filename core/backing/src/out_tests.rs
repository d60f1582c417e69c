//! Pages that leave memory and come back: against naive maps, writes that fail, stores that are full, and relatives.

use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;

use entresol_addr::{PAGE_SIZE, PageSize, Pfn};
use entresol_machine::{Machine, Tags};
use proptest::prelude::*;

use crate::tests::Host;
use crate::*;

const FRAMES: u64 = 2 * 512 + 20;
/// The byte of a page where `fork_tests` writes.
const AT: u64 = 5;

/// A limited object fills pages until it is full, where a block would be too much too; what leaves makes room, and so does a hole; a fork is
/// limited as its parent was.
#[test]
fn a_limit_is_kept() {
    let host = Host::new(4 * 512);
    let mut device = Device::new(&host, 16);
    let handle = host.anonymous(FRAMES, Policy::Blocks);
    let grant =
        |handle, frame| host.on(handle, |object, supply| object.grant(supply, frame, true).map(|grant| grant.size));
    let room = |handle| host.on(handle, |object, _| object.room());
    assert_eq!(room(handle), None);
    host.on(handle, |object, _| object.set_limit(514));
    assert_eq!(grant(handle, 0), Ok(PageSize::Size2M));
    assert_eq!((grant(handle, 512), grant(handle, 600)), (Ok(PageSize::Size4K), Ok(PageSize::Size4K)));
    assert_eq!((grant(handle, 700), room(handle)), (Err(GrantError::OutOfMemory), Some(0)));
    // What is there is granted all the same.
    assert_eq!((grant(handle, 3), grant(handle, 600)), (Ok(PageSize::Size2M), Ok(PageSize::Size4K)));
    assert!(device.begin(&host, handle, 600).unwrap());
    device.finish(&host, 0, true);
    assert!(discard(&host, handle, 600));
    assert_eq!((grant(handle, 700), grant(handle, 701)), (Ok(PageSize::Size4K), Err(GrantError::OutOfMemory)));
    // A page that comes back is not asked, and is one too many then.
    device.bring(&host, handle, 600);
    assert_eq!((room(handle), grant(handle, 701)), (Some(0), Err(GrantError::OutOfMemory)));
    host.on(handle, |object, supply| object.punch(supply, 0, 512)).unwrap();
    assert_eq!((room(handle), grant(handle, 0)), (Some(511), Ok(PageSize::Size4K)));
    let child = host.fork(handle);
    assert_eq!(room(child), Some(510));
}

/// What the host's frames have before anybody clears them.
pub(crate) const FOREIGN: Tags = Tags([0x7777_7777_7777_7777; Tags::WORDS]);

/// A swap device: the byte at [`AT`] and the tags of each place.
pub(crate) struct Device {
    pub(crate) store: StoreId,
    pub(crate) holds: BTreeMap<u64, (u8, Option<Tags>)>,
    /// Writes on their way.
    pub(crate) writing: Vec<Out>,
}

impl Device {
    pub(crate) fn new(host: &Host, places: u64) -> Self {
        let store = host.pool.stores().open_counted(places).unwrap();
        Self { store, holds: BTreeMap::new(), writing: Vec::new() }
    }

    pub(crate) fn begin(&mut self, host: &Host, handle: ObjectHandle, frame: u64) -> Result<bool, OutError> {
        let out = host.on(handle, |object, supply| object.begin_out(supply, frame, self.store))?;
        let begun = out.is_some();
        self.writing.extend(out);
        Ok(begun)
    }

    pub(crate) fn finish(&mut self, host: &Host, place: usize, written: bool) {
        let out = self.writing.swap_remove(place);
        // What fails may have written anything.
        let held = if written { (at(host, out.pfn()), out.tags(&host.machine)) } else { (0xdd, Some(FOREIGN)) };
        self.holds.insert(out.slot().index(), held);
        out.finish(&host.supply(0), written);
    }

    pub(crate) fn bring(&self, host: &Host, handle: ObjectHandle, frame: u64) {
        host.on(handle, |object, supply| {
            let Some(slot) = object.stored_at(&host.machine, frame) else { return };
            let fetch = Fetch::cached(supply, slot).unwrap_or_else(|| {
                let mut fetch = Fetch::new(supply, slot).unwrap().unwrap();
                let (byte, tags) = self.holds[&slot.index()];
                let mut page = vec![0; PAGE_SIZE as usize];
                page[AT as usize] = byte;
                host.machine.write(fetch.pfn().base(), &page);
                assert_eq!(fetch.is_tagged(), object.is_tagged(), "a place has tags iff the object has");
                host.machine.store_tags(fetch.pfn(), &FOREIGN);
                fetch.filled(supply, tags.as_ref());
                fetch
            });
            assert!(object.restore(supply, frame, &fetch));
            fetch.give_back(supply);
        });
    }

    /// Out as a whole; whether it left.
    pub(crate) fn put_out(&mut self, host: &Host, handle: ObjectHandle, frame: u64) -> bool {
        if self.begin(host, handle, frame) == Ok(true) {
            self.finish(host, self.writing.len() - 1, true);
        }
        discard(host, handle, frame)
    }

    /// What a search finds, `steps` steps at a time.
    pub(crate) fn search(&self, host: &Host, steps: usize) -> Vec<(ObjectHandle, u64, StoreSlot)> {
        let (mut search, mut all) = (Search::default(), Vec::new());
        loop {
            let pin = host.epoch.pin(0);
            match search.next(&host.objects, &pin, &host.machine, self.store, steps) {
                Found::Page { object, frame, slot } => all.push((object, frame, slot)),
                Found::Nothing => {}
                Found::End => return all,
            }
        }
    }

    pub(crate) fn taken(&self, host: &Host) -> u64 {
        host.pool.stores().taken(self.store).unwrap()
    }
}

fn at(host: &Host, pfn: Pfn) -> u8 {
    let mut byte = [0];
    host.machine.read(entresol_addr::Hpa::new(pfn.base().get() + AT), &mut byte);
    byte[0]
}

fn discard(host: &Host, handle: ObjectHandle, frame: u64) -> bool {
    host.on(handle, |object, supply| object.discard(supply, frame))
}

#[test]
fn a_page_goes_out_and_comes_back_and_goes_again_unwritten() {
    let host = Host::new(64);
    let mut device = Device::new(&host, 4);
    let handle = host.anonymous(FRAMES, Policy::Pages);
    host.put(handle, 3, 7).unwrap();
    let before = host.pool.free_frames();
    assert!(!discard(&host, handle, 3), "nothing has it yet");
    assert!(device.begin(&host, handle, 3).unwrap());
    assert!(!discard(&host, handle, 3), "the place is not valid yet");
    assert!(!device.begin(&host, handle, 3).unwrap(), "it is on its way");
    assert_eq!(host.byte(handle, 3), 7);
    device.finish(&host, 0, true);
    assert!(discard(&host, handle, 3));
    host.on(handle, |object, _| assert_eq!(object.resident_frames(), 0));
    host.settle();
    assert_eq!(host.pool.free_frames(), before + 1);
    for _ in 0..3 {
        device.bring(&host, handle, 3);
        assert_eq!(host.byte(handle, 3), 7);
        assert!(!device.begin(&host, handle, 3).unwrap(), "clean: nothing to write");
        assert!(discard(&host, handle, 3));
    }
    assert_eq!(host.pool.stores().taken(device.store), Some(1));
    device.bring(&host, handle, 3);
    host.put(handle, 3, 8).unwrap();
    assert_eq!(host.pool.stores().taken(device.store), Some(0), "its place went when it was written");
    assert!(!discard(&host, handle, 3));
    host.destroy(handle);
    assert_eq!(host.pool.stores().close(device.store), Ok(()));
    assert_eq!(host.pool.free_frames(), host.pool.total_frames());
}

#[test]
fn a_page_that_is_written_while_it_goes_out_stays() {
    let host = Host::new(64);
    let mut device = Device::new(&host, 4);
    let handle = host.anonymous(FRAMES, Policy::Pages);
    for written in [true, false] {
        host.put(handle, 3, 7).unwrap();
        assert!(device.begin(&host, handle, 3).unwrap());
        host.put(handle, 3, 8).unwrap();
        assert_eq!(at(&host, device.writing[0].pfn()), 7, "what is being written does not change");
        device.finish(&host, 0, written);
        assert!(!discard(&host, handle, 3));
        assert_eq!((host.byte(handle, 3), host.pool.stores().taken(device.store)), (8, Some(0)));
    }
    // A failure leaves the page where it was; it is written again in place.
    assert!(device.begin(&host, handle, 3).unwrap());
    device.finish(&host, 0, false);
    assert!(!discard(&host, handle, 3));
    let free = host.pool.free_frames();
    host.put(handle, 3, 9).unwrap();
    assert_eq!((host.byte(handle, 3), host.pool.free_frames()), (9, free));
    host.assert_exact_family(&[handle]);
}

#[test]
fn relatives_share_a_page_that_is_out_and_one_frame_when_it_is_back() {
    let host = Host::new(128);
    let mut device = Device::new(&host, 4);
    let parent = host.anonymous(FRAMES, Policy::Pages);
    host.put(parent, 3, 7).unwrap();
    let child = host.fork(parent);
    // The node is the child's own by now, and the page still shared.
    host.put(child, 4, 1).unwrap();
    assert!(device.put_out(&host, parent, 3));
    assert_eq!(host.byte(child, 3), 7, "the frame is its own");
    // It comes from the child's frame.
    device.holds.clear();
    device.bring(&host, parent, 3);
    let pfn = |handle| host.on(handle, |object, supply| object.present(supply, 3).unwrap().pfn);
    assert_eq!(pfn(parent), pfn(child));
    assert!(discard(&host, parent, 3) && discard(&host, child, 3), "nothing to write for either");
    assert_eq!(host.pool.stores().taken(device.store), Some(1));
    assert!(host.differing(parent, child).iter().eq([&4]));
    device.holds.insert(0, (7, None));
    device.bring(&host, child, 3);
    device.bring(&host, parent, 3);
    assert_eq!((host.byte(parent, 3), pfn(parent)), (7, pfn(child)));
    host.put(child, 3, 9).unwrap();
    host.put(parent, 3, 10).unwrap();
    assert_eq!((host.byte(parent, 3), host.byte(child, 3)), (10, 9));
    host.destroy(parent);
    host.destroy(child);
    host.settle();
    assert_eq!(host.pool.free_frames(), host.pool.total_frames());
    assert_eq!(host.pool.stores().close(device.store), Ok(()));
}

#[test]
fn a_full_store_and_a_block_are_said_and_split() {
    let host = Host::new(3 * 512);
    let mut device = Device::new(&host, 2);
    let handle = host.anonymous(1024, Policy::Blocks);
    host.put(handle, 20, 1).unwrap();
    assert!(device.put_out(&host, handle, 20) && device.put_out(&host, handle, 21));
    let full = StoreError::Full { store: device.store };
    assert_eq!(device.begin(&host, handle, 22), Err(OutError::Store(full)));
    assert!(host.on(handle, |object, _| object.is_resident(&host.machine, 22)));
    device.bring(&host, handle, 20);
    assert_eq!((host.byte(handle, 20), host.byte(handle, 22)), (1, 0));
    assert_eq!(host.on(handle, |object, supply| object.punch(supply, 0, 512)), Ok(512));
    assert_eq!(host.pool.stores().taken(device.store), Some(0));
    // Places are anybody's again, and an owner cannot name one.
    let slot = StoreSlot::new(device.store, 0);
    let outside = StoreError::Outside { slot, slots: 0 };
    assert_eq!(host.on(handle, |object, supply| object.put_stored(supply, 9, slot)), Err(PutError::Store(outside)));
    for value in [0, (1 << 31) + 1] {
        assert_eq!(host.pool.stores().open_counted(value), Err(StoreError::Slots { value, limit: 1 << 31 }));
    }
    host.destroy(handle);
    assert_eq!(host.pool.stores().close(device.store), Ok(()));
}

#[derive(Clone, Debug)]
enum Act {
    Begin { member: usize, frame: u64 },
    Finish { place: usize, written: bool },
    Discard { member: usize, frame: u64 },
    PutOut { member: usize, frame: u64 },
    Bring { member: usize, frame: u64 },
    Write { member: usize, frame: u64, byte: u8 },
    Punch { member: usize, start: u64, count: u64 },
    Fork { member: usize },
    Drop { member: usize },
}

fn any_act() -> impl Strategy<Value = Act> {
    let frame = || prop_oneof![508u64..516, 0u64..4];
    let member = || 0usize..5;
    prop_oneof![
        5 => (member(), frame()).prop_map(|(member, frame)| Act::Begin { member, frame }),
        5 => (0usize..8, prop::bool::weighted(0.7)).prop_map(|(place, written)| Act::Finish { place, written }),
        4 => (member(), frame()).prop_map(|(member, frame)| Act::Discard { member, frame }),
        4 => (member(), frame()).prop_map(|(member, frame)| Act::PutOut { member, frame }),
        4 => (member(), frame()).prop_map(|(member, frame)| Act::Bring { member, frame }),
        7 => (member(), frame(), 1u8..).prop_map(|(member, frame, byte)| Act::Write { member, frame, byte }),
        1 => (member(), frame(), 0u64..30).prop_map(|(member, start, count)| Act::Punch { member, start, count }),
        2 => member().prop_map(|member| Act::Fork { member }),
        1 => member().prop_map(|member| Act::Drop { member }),
    ]
}

/// A relative and its bytes by frame.
struct Member {
    handle: ObjectHandle,
    bytes: BTreeMap<u64, u8>,
}

impl Member {
    fn expected(&self, frame: u64) -> u8 {
        self.bytes.get(&frame).copied().unwrap_or(0)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn pages_read_the_same_wherever_they_are(
        policy in prop_oneof![Just(Policy::Pages), Just(Policy::Blocks)],
        slots in prop_oneof![Just(3u64), Just(64)],
        acts in prop::collection::vec(any_act(), 1..120),
        steps in 1usize..40,
    ) {
        let host = Host::new(6 * 512);
        let mut device = Device::new(&host, slots);
        let handle = host.anonymous(FRAMES, policy);
        let mut family = vec![Member { handle, bytes: BTreeMap::new() }];
        for act in acts {
            let count = family.len();
            let full = Err(OutError::Store(StoreError::Full { store: device.store }));
            match act {
                Act::Begin { member, frame } => {
                    let begun = device.begin(&host, family[member % count].handle, frame);
                    prop_assert!(begun.is_ok() || begun == full);
                }
                Act::Finish { place, written } if !device.writing.is_empty() => {
                    device.finish(&host, place % device.writing.len(), written);
                }
                Act::Discard { member, frame } => {
                    discard(&host, family[member % count].handle, frame);
                }
                Act::PutOut { member, frame } => {
                    let handle = family[member % count].handle;
                    match device.begin(&host, handle, frame) {
                        Ok(true) => device.finish(&host, device.writing.len() - 1, true),
                        other => prop_assert!(other.is_ok() || other == full),
                    }
                    discard(&host, handle, frame);
                }
                Act::Bring { member, frame } => device.bring(&host, family[member % count].handle, frame),
                Act::Write { member, frame, byte } => {
                    let member = &mut family[member % count];
                    device.bring(&host, member.handle, frame);
                    host.put(member.handle, frame, byte).unwrap();
                    member.bytes.insert(frame, byte);
                }
                Act::Punch { member, start, count: frames } => {
                    let member = &mut family[member % count];
                    host.on(member.handle, |object, supply| object.punch(supply, start, frames)).unwrap();
                    member.bytes.retain(|frame, _| !(start..start + frames).contains(frame));
                }
                Act::Fork { member } if count < 5 => {
                    let handle = host.fork(family[member % count].handle);
                    family.push(Member { handle, bytes: family[member % count].bytes.clone() });
                }
                Act::Drop { member } if count > 1 => host.destroy(family.swap_remove(member % count).handle),
                Act::Finish { .. } | Act::Fork { .. } | Act::Drop { .. } => {}
            }
        }
        let handles: Vec<_> = family.iter().map(|member| member.handle).collect();
        if let [one, other, ..] = &family[..] {
            let differing = host.differing(one.handle, other.handle);
            let missed = |frame: &u64| one.expected(*frame) != other.expected(*frame) && !differing.contains(frame);
            prop_assert_eq!((0..FRAMES).find(missed), None);
        }
        while !device.writing.is_empty() {
            device.finish(&host, 0, true);
        }
        let mut expected = Vec::new();
        let mut sorted = handles.clone();
        sorted.sort_by_key(|handle| handle.raw() as u16);
        for handle in sorted {
            let stored = |frame| host.on(handle, |object, _| object.stored_at(&host.machine, frame));
            expected.extend((0..FRAMES).filter_map(|frame| Some((handle, frame, stored(frame)?))));
        }
        let found = device.search(&host, steps);
        prop_assert_eq!(&found, &expected);
        for (handle, frame, _) in found {
            device.bring(&host, handle, frame);
        }
        prop_assert_eq!(device.search(&host, steps), []);
        for member in &family {
            for frame in (0..4).chain(500..550) {
                prop_assert_eq!(host.byte(member.handle, frame), member.expected(frame), "frame {}", frame);
            }
        }
        host.assert_exact_family(&handles);
        host.settle();
        {
            let _pin = host.epoch.pin(0);
            prop_assert_eq!(host.pool.stop_keeping_for(device.store, 0, u64::MAX), None);
        }
        prop_assert_eq!(host.pool.stores().taken(device.store), Some(0));
        prop_assert_eq!(host.pool.stores().close(device.store), Ok(()));
        for member in &family {
            prop_assert!((0..FRAMES).all(|frame| host.byte(member.handle, frame) == member.expected(frame)));
        }
        handles.into_iter().for_each(|handle| host.destroy(handle));
        host.settle();
        prop_assert_eq!(host.pool.free_frames(), host.pool.total_frames());
    }
}
