//! Allocation tags of anonymous memory, on a machine whose frames have poisoned tags until somebody clears them.

use std::collections::BTreeMap;
use std::vec::Vec;

use entresol_machine::flat::Event;
use entresol_machine::{Machine, Tags};
use proptest::prelude::*;

use crate::tests::Host;
use crate::*;

/// Two nodes of pages and a tail; a block fits twice.
const FRAMES: u64 = 2 * 512 + 40;

impl Host {
    fn tagged(&self, policy: Policy) -> ObjectHandle {
        self.objects.create(&self.supply(0), Spec::Anonymous { frames: FRAMES, policy, tagged: true }).unwrap()
    }

    /// The tags that a guest finds.
    fn tags(&self, handle: ObjectHandle, frame: u64) -> Tags {
        self.on(handle, |object, supply| {
            let grant = object.grant_waiting(supply, frame, false).unwrap();
            self.machine.load_tags(grant.frame(frame))
        })
    }

    /// What a guest's STG does.
    fn tag(&self, handle: ObjectHandle, frame: u64, granule: usize, tag: u8) {
        self.on(handle, |object, supply| {
            let pfn = object.grant_waiting(supply, frame, true).unwrap().frame(frame);
            let mut tags = self.machine.load_tags(pfn);
            tags.set(granule, tag);
            self.machine.store_tags(pfn, &tags);
        });
    }
}

#[test]
fn fresh_memory_has_no_tag_that_nobody_gave_it() {
    for policy in [Policy::Pages, Policy::Blocks] {
        let host = Host::new(4 * 512);
        let handle = host.tagged(policy);
        for frame in [0, 511, 600, FRAMES - 1] {
            assert_eq!(host.tags(handle, frame), Tags::ZERO, "{policy:?} {frame}");
        }
    }
}

#[test]
fn a_relative_reads_the_tags_and_changes_its_own() {
    for policy in [Policy::Pages, Policy::Blocks, Policy::WholeBlocks] {
        let host = Host::new(8 * 512);
        let parent = host.tagged(policy);
        host.tag(parent, 7, 3, 0xa);
        let child = host.fork(parent);
        assert!(host.on(child, |object, _| object.is_tagged()));
        host.tag(child, 7, 4, 0xb);
        let both = host.tags(child, 7);
        assert_eq!((both.get(3), both.get(4)), (0xa, 0xb), "{policy:?}");
        assert_eq!((host.tags(parent, 7).get(3), host.tags(parent, 7).get(4)), (0xa, 0), "{policy:?}");
        assert_eq!(host.tags(child, 900), Tags::ZERO, "the zero page");
    }
}

#[test]
fn only_pages_of_equal_tags_become_one() {
    let host = Host::new(8 * 512);
    let (one, other) = (host.tagged(Policy::Pages), host.tagged(Policy::Pages));
    let plain = host.anonymous(FRAMES, Policy::Pages);
    for handle in [one, other, plain] {
        host.on(handle, |object, _| object.take_part());
        host.put(handle, 7, 5).unwrap();
    }
    host.tag(other, 7, 3, 0xa);
    assert_eq!(host.merge((one, 7), (other, 7)), Merged::Differs);
    assert_eq!((host.merge((one, 7), (plain, 7)), host.merge((plain, 7), (one, 7))), (Merged::Differs, Merged::Gone));
    assert_eq!(host.merge((plain, 7), (other, 7)), Merged::Differs, "the plain one has tags that nobody gave it");
    host.tag(one, 7, 3, 0xa);
    assert_eq!(host.merge((one, 7), (other, 7)), Merged::Done);
    host.tag(one, 7, 3, 0xb);
    assert_eq!((host.tags(one, 7).get(3), host.tags(other, 7).get(3)), (0xb, 0xa));
}

#[test]
fn zeros_with_a_tag_are_not_untouched() {
    let host = Host::new(8 * 512);
    let (pages, blocks) = (host.tagged(Policy::Pages), host.tagged(Policy::Blocks));
    for (handle, frame) in [(pages, 3), (pages, 4), (blocks, 3), (blocks, 600)] {
        host.on(handle, |object, _| object.take_part());
        host.put(handle, frame, 0).unwrap();
    }
    host.tag(pages, 3, 200, 1);
    host.tag(blocks, 511, 0, 1);
    host.on(pages, |object, supply| {
        assert_eq!((object.vacate(supply, 3), object.vacate(supply, 4)), (Merged::Differs, Merged::Done));
    });
    host.on(blocks, |object, supply| {
        let vacated = [3, 600].map(|frame| object.vacate_block(supply, frame));
        assert_eq!(vacated, [Merged::Differs, Merged::Done]);
    });
    assert_eq!((host.tags(pages, 3).get(200), host.tags(blocks, 511).get(0)), (1, 1));
    assert_eq!((host.tags(pages, 4), host.tags(blocks, 600)), (Tags::ZERO, Tags::ZERO));
}

#[test]
fn memory_without_tags_costs_nothing() {
    let host = Host::new(4 * 512);
    let parent = host.anonymous(FRAMES, Policy::Blocks);
    host.put(parent, 7, 1).unwrap();
    let child = host.fork(parent);
    host.put(child, 7, 2).unwrap();
    let tagged = host.tagged(Policy::Blocks);
    let of_tags = |event: &Event| matches!(event, Event::ClearTags(_) | Event::CopyTags(..));
    assert_eq!(host.machine.events().iter().filter(|event| of_tags(event)).count(), 0);
    host.tags(tagged, 0);
    assert_eq!(host.machine.events().iter().filter(|event| of_tags(event)).count(), 1, "a block, at once");
}

/// The tags that a relative was given, by frame and granule.
type Known = BTreeMap<(u64, usize), u8>;

#[derive(Clone, Copy, Debug)]
enum Step {
    Tag(u64, usize, u8),
    Write(u64, u8),
    Fork,
    Punch(u64, u64),
    /// The frame of another relative joins this one.
    Merge(u64, usize, u64),
    Vacate(u64),
}

fn steps() -> impl Strategy<Value = Vec<(usize, Step)>> {
    let frame = || prop_oneof![0..8u64, 508..520u64, 0..FRAMES];
    let step = prop_oneof![
        4 => (frame(), 0..Tags::GRANULES, 1..16u8).prop_map(|(frame, granule, tag)| Step::Tag(frame, granule, tag)),
        2 => (frame(), any::<u8>()).prop_map(|(frame, byte)| Step::Write(frame, byte)),
        1 => Just(Step::Fork),
        1 => (frame(), 1..600u64).prop_map(|(frame, count)| Step::Punch(frame, count)),
        4 => (0..8u64, 0..4usize, 0..8u64).prop_map(|(frame, other, at)| Step::Merge(frame, other, at)),
        2 => frame().prop_map(Step::Vacate),
    ];
    prop::collection::vec((0..4usize, step), 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is written, forked, punched, merged and given back as zeros: each relative has the tags that its own history gave it (INV-12).
    #[test]
    fn tags_travel_with_the_page(
        steps in steps(), policy in prop::sample::select(std::vec![Policy::Pages, Policy::Blocks, Policy::WholeBlocks]),
    ) {
        let host = Host::new(16 * 512);
        // Two that are no relatives.
        let mut family: Vec<(ObjectHandle, Known)> = (0..2).map(|_| (host.tagged(policy), Known::new())).collect();
        family.iter().for_each(|(handle, _)| host.on(*handle, |object, _| object.take_part()));
        for (who, step) in steps {
            let (who, room) = (who % family.len(), family.len() < 5);
            if let Step::Merge(frame, other, at) = step {
                host.merge((family[who].0, frame), (family[other % family.len()].0, at));
                continue;
            }
            let (handle, known) = &mut family[who];
            match step {
                Step::Tag(frame, granule, tag) => {
                    host.tag(*handle, frame, granule, tag);
                    known.insert((frame, granule), tag);
                }
                Step::Write(frame, byte) => host.put(*handle, frame, byte).unwrap(),
                Step::Fork if room => {
                    let child = (host.fork(*handle), known.clone());
                    family.push(child);
                }
                Step::Fork => {}
                Step::Punch(frame, count) => {
                    let count = count.min(FRAMES - frame);
                    host.on(*handle, |object, supply| object.punch(supply, frame, count)).unwrap();
                    known.retain(|(at, _), _| !(frame..frame + count).contains(at));
                }
                Step::Vacate(frame) => {
                    host.on(*handle, |object, supply| {
                        object.vacate_block(supply, frame);
                        object.vacate(supply, frame);
                    });
                }
                Step::Merge(..) => {}
            }
        }
        for (handle, known) in &family {
            let frames = known.keys().map(|(frame, _)| *frame).chain([0, 512, FRAMES - 1]);
            for frame in frames {
                let mut expected = Tags::ZERO;
                for ((_, granule), tag) in known.range((frame, 0)..(frame + 1, 0)) {
                    expected.set(*granule, *tag);
                }
                prop_assert_eq!(host.tags(*handle, frame), expected, "frame {}", frame);
            }
        }
    }
}
