//! The two ends of a logged write: a page becomes writable in place, a block gives way to the pages around the one that is
//! written.

mod common;

use common::{Bench, VMID, gfns, leaf};
use entresol_addr::{Gfn, PageSize, Pfn};
use entresol_machine::flat::Event;
use entresol_machine::{Machine, TlbOp, Word};
use entresol_table::{Entry, Format, LEAF_LEVEL, Permissions, Walk};

const SMALL: PageSize = PageSize::Size4K;
const BLOCK: PageSize = PageSize::Size2M;
const READ: Permissions = Permissions::READ;

fn walk(bench: &Bench, gfn: u64) -> Walk {
    bench.table.walk_to_page(&bench.machine, Gfn::new(gfn)).unwrap()
}

/// A zeroed frame of the bench's that its table does not use.
fn spare(bench: &mut Bench) -> Pfn {
    bench.reserve(1).pop().unwrap()
}

#[test]
fn the_walk_ends_where_the_other_does() {
    let mut bench = Bench::new(40, 8);
    bench.map(3, &leaf(0x1000, SMALL, READ), &mut ()).unwrap();
    bench.map(1024, &leaf(0x4000, BLOCK, READ), &mut ()).unwrap();
    for gfn in [0, 3, 4, 1024, 1500, 1 << 20] {
        let (one, other) = (walk(&bench, gfn), bench.table.walk(&bench.machine, Gfn::new(gfn)).unwrap());
        assert_eq!(
            (one.word, one.level, one.raw, one.entry),
            (other.word, other.level, other.raw, other.entry),
            "{gfn}"
        );
    }
    assert!(bench.table.walk_to_page(&bench.machine, Gfn::new(1 << 28)).is_none());
}

#[test]
fn a_page_becomes_writable_in_place_and_is_flushed() {
    let mut bench = Bench::new(40, 8);
    bench.map(3, &leaf(0x1000, SMALL, READ), &mut ()).unwrap();
    let at = walk(&bench, 3);
    bench.machine.events();
    assert!(bench.table.permit_write(&bench.machine, VMID, Gfn::new(3), &at));
    let flush = TlbOp::Ipa { vmid: VMID, gfn: Gfn::new(3), size: SMALL, leaf_only: true };
    let events = bench.machine.events();
    assert!(matches!(events[0], Event::Word(word, _) if word == at.word), "{events:?}");
    assert_eq!(events[1..], [Event::Tlb(flush), Event::Complete]);
    let Entry::Leaf(now) = walk(&bench, 3).entry else { panic!("the page is gone") };
    assert!(now.permissions.write && now.young && now.pfn == Pfn::new(0x1000));
    assert!(!bench.table.permit_write(&bench.machine, VMID, Gfn::new(3), &at), "the entry has changed since");
    assert!(!bench.table.permit_write(&bench.machine, VMID, Gfn::new(9), &walk(&bench, 9)), "nothing is there");
    assert!(bench.machine.events().is_empty());
}

#[test]
fn a_block_gives_way_to_the_pages_around_the_write() {
    for (around, first, count) in [(0, 37, 1), (1, 37, 1), (16, 32, 16), (512, 0, 512), (4096, 0, 512)] {
        let mut bench = Bench::new(40, 8);
        bench.map(1024, &leaf(0x4000, BLOCK, READ), &mut ()).unwrap();
        let frame = spare(&mut bench);
        let (at, gfn) = (walk(&bench, 1024 + 37), Gfn::new(1024 + 37));
        bench.machine.events();
        let (table, machine) = (&bench.table, &bench.machine);
        assert_eq!(table.split_for_write(machine, VMID, gfn, at.word, at.raw, frame, around), Ok(()));
        let flush = TlbOp::Ipa { vmid: VMID, gfn, size: BLOCK, leaf_only: true };
        // The pages' words lie in a table that nobody sees yet.
        let mut events = machine.events();
        events.retain(|event| !matches!(event, Event::Word(word, _) if *word != at.word));
        let [Event::Word(..), middle @ .., Event::Word(..)] = &events[..] else { panic!("{events:?}") };
        assert_eq!(middle, [Event::Tlb(flush), Event::Complete], "broken and flushed before it is made");
        for page in 0..512 {
            let entry = walk(&bench, 1024 + page).entry;
            if !(first..first + count).contains(&page) {
                assert_eq!(entry, Entry::Vacant, "page {page}, {around} around");
                continue;
            }
            let Entry::Leaf(leaf) = entry else { panic!("page {page}, {around} around: {entry:?}") };
            assert_eq!((leaf.pfn, leaf.size), (Pfn::new(0x4000 + page), SMALL));
            assert_eq!(leaf.permissions.write, page == 37);
        }
        let census = bench.table.census();
        assert_eq!((census.of(SMALL), census.of(BLOCK)), (count, 0));
    }
}

#[test]
fn a_split_that_loses_gives_the_frame_back_as_it_was() {
    let mut bench = Bench::new(40, 8);
    bench.map(1024, &leaf(0x4000, BLOCK, READ), &mut ()).unwrap();
    bench.map(3, &leaf(0x1000, SMALL, READ), &mut ()).unwrap();
    let frame = spare(&mut bench);
    let gfn = Gfn::new(1030);
    let at = walk(&bench, 1030);
    // Another CPU was faster.
    bench.table.age(&bench.machine, VMID, gfns(1024, 512));
    let (table, machine) = (&bench.table, &bench.machine);
    assert_eq!(table.split_for_write(machine, VMID, gfn, at.word, at.raw, frame, 16), Err(frame));
    assert!((0..Word::PER_FRAME).all(|index| machine.load(Word::new(frame, index)) == 0));
    assert_eq!(table.census().of(BLOCK), 1);
    let vacant = walk(&bench, 9);
    assert_eq!(table.split_for_write(machine, VMID, Gfn::new(9), vacant.word, vacant.raw, frame, 16), Err(frame));
}

#[test]
fn short_ways_say_what_the_long_ones_do() {
    let mut bench = Bench::new(40, 8);
    bench.map(3, &leaf(0x1000, SMALL, Permissions::READ_WRITE), &mut ()).unwrap();
    let (format, raw) = (bench.table.format(), walk(&bench, 3).raw);
    let protected = format.protected(raw, LEAF_LEVEL).unwrap();
    assert_eq!(format.decode(protected, LEAF_LEVEL), Entry::Leaf(leaf(0x1000, SMALL, READ)));
    assert_eq!(format.writable(protected, LEAF_LEVEL), raw);
    assert_eq!((format.protected(0, LEAF_LEVEL), format.writable(0, LEAF_LEVEL)), (None, 0));
}
