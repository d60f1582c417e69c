//! What was written reads back; what was damaged says how.

use std::string::ToString;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;

fn sample(picks: &[(u8, bool)]) -> (Index, Trailer) {
    let mut index = Index::default();
    for object in 0..3 {
        let mut frame = 0;
        for (gap, page) in picks {
            frame += u64::from(*gap);
            index.push(object, frame, page.then_some(u32::from(*gap) * 77)).expect("a host has a heap");
            frame += 1;
        }
    }
    let trailer = Trailer {
        base: 3,
        pages: index.checksums.len() as u64,
        state: 5000,
        state_checksum: 9,
        index_checksum: crc32fast::hash(&index.encode().expect("a host has a heap")),
        runs: index.runs.len() as u64,
        tagged: picks.len() % 2 == 1,
        shared: (picks.len() % 3 == 1).then_some(SharedPart { runs: 300 * picks.len() as u64, checksum: 7 }),
    };
    (index, trailer)
}

fn file_blocks(trailer: &Trailer) -> u64 {
    let (first, count) = trailer.shared_place();
    first + count + 1
}

proptest! {
    #[test]
    fn decode_undoes_encode(picks in prop::collection::vec((0u8..4, any::<bool>()), 0..60)) {
        let (index, trailer) = sample(&picks);
        let block = trailer.encode();
        prop_assert_eq!(Trailer::decode(&block, file_blocks(&trailer)).expect("right"), trailer);
        prop_assert_eq!(Index::decode(&index.encode().expect("a host has a heap"), &trailer, &[400; 3]).expect("right"), index);
    }

    /// A stranger's numbers, whose checksums are right: an error, or runs that lie in the objects and have the file's pages.
    #[test]
    fn a_strangers_index_is_refused_or_right(
        picks in prop::collection::vec((0u8..4, any::<bool>()), 1..20),
        damages in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
    ) {
        let (index, mut trailer) = sample(&picks);
        let mut bytes = index.encode().expect("a host has a heap");
        for (at, value) in damages {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        trailer.index_checksum = crc32fast::hash(&bytes);
        if let Ok(read) = Index::decode(&bytes, &trailer, &[100; 3]) {
            prop_assert!(read.runs.iter().all(|run| run.object < 3 && run.count > 0 && run.first + run.count <= 100));
            let pages: u64 = read.runs.iter().filter(|run| !run.vacant).map(|run| run.count).sum();
            prop_assert_eq!(pages, read.checksums.len() as u64);
        }
    }

    #[test]
    fn any_bytes_are_no_trailer_or_one_that_fits(
        bytes in prop::collection::vec(any::<u8>(), 72),
        (version, flags) in (3u8..6, 0u8..8),
        file in any::<u64>(),
    ) {
        let mut block = [0; BLOCK as usize];
        block[..72].copy_from_slice(&bytes);
        block[..8].copy_from_slice(b"ENTSNAPS");
        block[8..16].copy_from_slice(&[version, 0, 0, 0, 0, 0, 0, 0]);
        block[56..60].copy_from_slice(&[flags, 0, 0, 0]);
        let checksum = crc32fast::hash(&block);
        block[12..16].copy_from_slice(&checksum.to_le_bytes());
        let file = file >> 20;
        if let Ok(trailer) = Trailer::decode(&block, file) {
            prop_assert_eq!(file_blocks(&trailer), file);
            prop_assert_eq!((trailer.tagged, trailer.shared.is_some()), (flags & 1 != 0, flags & 2 != 0));
        }
        let known = version == 4 && flags < 4;
        prop_assert!(known || Trailer::decode(&block, file).is_err(), "version {}, flags {}", version, flags);
    }
}

/// Each page and each block of tags has a block of its own, and they are all there is before the state.
#[test]
fn pages_and_tags_lie_side_by_side() {
    for count in [0, 1, 31, 32, 33, 64, 65, 100] {
        let pages = Pages { count, tagged: true };
        let mut all: Vec<u64> = (0..count).map(|page| pages.block(page)).collect();
        all.extend((0..count).filter_map(|page| pages.tags(page)).map(|(block, _)| block));
        all.sort_unstable();
        all.dedup();
        assert!(all.iter().copied().eq(0..pages.blocks()), "{count}: {all:?}");
        let mut places: Vec<_> = (0..count).map(|page| pages.tags(page)).collect();
        places.dedup();
        assert_eq!(places.len() as u64, count, "no two share their tags");
        let plain = Pages { count, tagged: false };
        assert_eq!((plain.blocks(), plain.block(7), plain.tags(7)), (count, 7, None));
    }
    let page = [7; BLOCK as usize];
    assert_eq!(page_checksum(&page, None), crc32fast::hash(&page));
    assert_ne!(page_checksum(&page, Some(&[1; TAGS])), page_checksum(&page, Some(&[2; TAGS])));
}

#[test]
fn each_damage_has_its_message() {
    let (index, trailer) = sample(&[(0, true), (1, false), (0, true)]);
    let (block, blocks) = (trailer.encode(), file_blocks(&trailer));
    let message = |block: &[u8; 4096], blocks| Trailer::decode(block, blocks).expect_err("wrong").to_string();
    assert_eq!(message(&[0; 4096], 1), "not a snapshot: its last block does not begin with \"ENTSNAPS\"");
    let mut newer = block;
    newer[8] = 5;
    assert_eq!(message(&newer, blocks), "the snapshot has version 5, this hypervisor reads version 4");
    let mut flags = block;
    flags[57] = 1;
    flags[12..16].fill(0);
    let checksum = crc32fast::hash(&flags);
    flags[12..16].copy_from_slice(&checksum.to_le_bytes());
    assert!(message(&flags, blocks).starts_with("the snapshot's flags = "));
    let mut flipped = block;
    flipped[20] ^= 1;
    assert!(message(&flipped, blocks).starts_with("the snapshot's trailer has the checksum 0x"));
    assert!(message(&block, blocks - 1).starts_with("the snapshot's length = "));
    let bytes: Vec<u8> = index.encode().expect("a host has a heap");
    let message =
        |bytes: &[u8], objects: &[u64]| Index::decode(bytes, &trailer, objects).expect_err("wrong").to_string();
    assert!(message(&bytes[1..], &[9; 3]).starts_with("the snapshot's index = "));
    assert!(message(&bytes, &[9; 2]).contains("of object 2: must lie in the object's 0 frames"));
    let mut damaged = bytes;
    damaged[9] ^= 4;
    assert!(message(&damaged, &[9; 3]).starts_with("the snapshot's index has the checksum 0x"));
}
