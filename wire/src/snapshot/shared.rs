//! Which pages a private machine shares with its hypervisor: the attribute of each page of its memory.
//!
//! Form: runs in rising order, each of 16 bytes: the first guest frame (its address divided by 4096), and how many from there on,
//! not 0. Neighbouring runs are one. Each file has all of them, also one that is the difference to another: what a page's attribute
//! was earlier is of no use to anybody.

use alloc::collections::TryReserveError;
use alloc::format;
use alloc::vec::Vec;
use core::ops::Range;

use super::{SnapshotError, blocks, check_part, field, number};

const RUN: usize = 16;

/// Where the runs are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedPart {
    /// How many there are.
    pub runs: u64,
    /// CRC-32 of their bytes.
    pub checksum: u32,
}

impl SharedPart {
    pub(super) fn bytes(&self) -> u64 {
        self.runs.saturating_mul(RUN as u64)
    }

    pub(super) fn blocks(&self) -> u64 {
        blocks(self.bytes())
    }
}

/// Guest frames that a private machine shares with its hypervisor; all others are private.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shared(Vec<Range<u64>>);

impl Shared {
    /// `count` frames more, from `first` on, which lie behind all others.
    ///
    /// # Errors
    /// The heap has no room.
    pub fn push(&mut self, first: u64, count: u64) -> Result<(), TryReserveError> {
        match self.0.last_mut() {
            Some(run) if run.end == first => run.end += count,
            _ if count == 0 => {}
            _ => {
                self.0.try_reserve(1)?;
                self.0.push(first..first + count);
            }
        }
        Ok(())
    }

    /// The runs, in rising order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.0.iter().cloned()
    }

    /// Its bytes, without what fills up the last block.
    ///
    /// # Errors
    /// The heap has no room.
    pub fn encode(&self) -> Result<Vec<u8>, TryReserveError> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(self.0.len() * RUN)?;
        for run in &self.0 {
            bytes.extend(run.start.to_le_bytes());
            bytes.extend((run.end - run.start).to_le_bytes());
        }
        Ok(bytes)
    }

    /// Where `bytes`, which are these runs, are said to be.
    pub fn part(&self, bytes: &[u8]) -> SharedPart {
        SharedPart { runs: self.0.len() as u64, checksum: crc32fast::hash(bytes) }
    }

    /// The runs in `bytes`, of a machine whose private memory is at the frames `memory`, in rising order.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn decode(bytes: &[u8], part: &SharedPart, memory: &[Range<u64>]) -> Result<Self, SnapshotError> {
        let bytes = usize::try_from(part.bytes()).ok().and_then(|length| bytes.get(..length));
        let bytes = bytes.ok_or_else(|| field("shared pages", part.runs, "must be in the file"))?;
        check_part("list of shared pages", bytes, part.checksum)?;
        let mut shared = Self::default();
        let no_room = |_| field("shared pages", part.runs, "must fit into the heap");
        shared.0.try_reserve_exact(bytes.len() / RUN).map_err(no_room)?;
        let mut behind = 0;
        for bytes in bytes.as_chunks::<RUN>().0 {
            let (first, count) = (number(bytes, 0), number(bytes, 8));
            let end = first.checked_add(count).filter(|_| count != 0 && first >= behind);
            let inside = |end: &u64| memory.iter().any(|range| range.start <= first && *end <= range.end);
            let Some(end) = end.filter(inside) else {
                let value = format_args!("{count} frames from {first:#x}");
                let rule = format!("must lie in private memory, at {memory:x?}, behind those before");
                return Err(field("shared pages", value, rule));
            };
            // One run ends where the next begins only if they are of different memories.
            shared.0.push(first..end);
            behind = end;
        }
        Ok(shared)
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use proptest::prelude::*;

    use super::*;

    const MEMORY: [Range<u64>; 2] = [10..11, 0x4_0000..0x4_1000];

    fn sample(picks: &[(u8, u8)]) -> Shared {
        let mut shared = Shared::default();
        shared.push(10, 1).unwrap();
        let mut frame = MEMORY[1].start;
        for (gap, count) in picks {
            frame += u64::from(*gap);
            shared.push(frame, (*count).into()).unwrap();
            frame += u64::from(*count);
        }
        shared
    }

    proptest! {
        #[test]
        fn decode_undoes_encode(picks in prop::collection::vec((0u8..4, 0u8..4), 0..60)) {
            let shared = sample(&picks);
            let bytes = shared.encode().unwrap();
            prop_assert_eq!(Shared::decode(&bytes, &shared.part(&bytes), &MEMORY).expect("right"), shared.clone());
            let pages = |picks: &[(u8, u8)]| 1 + picks.iter().map(|(_, count)| u64::from(*count)).sum::<u64>();
            prop_assert_eq!(shared.runs().map(|run| run.end - run.start).sum::<u64>(), pages(&picks));
        }

        /// A stranger's numbers, whose checksum is right: an error, or runs that rise and lie in the memory.
        #[test]
        fn a_strangers_list_is_refused_or_right(
            picks in prop::collection::vec((0u8..4, 1u8..4), 1..20),
            damages in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
            lie in -2i64..2,
        ) {
            let shared = sample(&picks);
            let mut bytes = shared.encode().unwrap();
            for (at, value) in damages {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            let mut part = shared.part(&bytes);
            part.runs = part.runs.saturating_add_signed(lie);
            if let Ok(read) = Shared::decode(&bytes, &part, &MEMORY) {
                let mut behind = 0;
                for run in read.runs() {
                    prop_assert!(run.start >= behind && run.start < run.end);
                    prop_assert!(MEMORY.iter().any(|range| range.start <= run.start && run.end <= range.end));
                    behind = run.end;
                }
            }
        }
    }

    #[test]
    fn each_damage_has_its_message() {
        let shared = sample(&[(1, 2)]);
        let bytes = shared.encode().unwrap();
        let part = shared.part(&bytes);
        let message = |bytes: &[u8], part: &SharedPart, memory: &[Range<u64>]| {
            Shared::decode(bytes, part, memory).expect_err("wrong").to_string()
        };
        let elsewhere = message(&bytes, &part, &MEMORY[1..]);
        assert!(elsewhere.starts_with("the snapshot's shared pages = 1 frames from 0xa: must lie in"), "{elsewhere}");
        assert!(message(&bytes[1..], &part, &MEMORY).contains("must be in the file"));
        assert!(message(&bytes, &SharedPart { runs: u64::MAX, ..part }, &MEMORY).contains("must be in the file"));
        let damaged = message(&bytes, &SharedPart { checksum: part.checksum ^ 1, ..part }, &MEMORY);
        assert!(damaged.starts_with("the snapshot's list of shared pages has the checksum"), "{damaged}");
    }
}
