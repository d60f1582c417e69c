//! From a guest frame to the shadow entries that map it.
//!
//! Shape: a number for each entry of each shadow page; chains of numbers by a hash of the frame, linked both ways through two arrays.
//! All of it is made once, for as many entries as there can be: nothing that a guest does allocates. An entry comes and goes in
//! a bounded time, however long its chain is: a guest may map one frame everywhere.

use alloc::boxed::Box;
use alloc::vec::Vec;

use entresol_addr::Gfn;

/// The number of an entry: its page's, times 512, plus its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryId(pub u32);

const END: u32 = u32::MAX;

/// The map.
pub(crate) struct Rmap {
    heads: Box<[u32]>,
    next: Box<[u32]>,
    /// The entry before; at the head of a chain [`END`].
    before: Box<[u32]>,
}

fn filled(count: usize) -> Option<Box<[u32]>> {
    let mut all = Vec::new();
    all.try_reserve_exact(count).ok()?;
    all.resize(count, END);
    Some(all.into_boxed_slice())
}

impl Rmap {
    /// For entries numbered below `entries`; `None` if the heap has no room.
    pub(crate) fn new(entries: usize) -> Option<Self> {
        let heads = filled((entries / 4).next_power_of_two())?;
        Some(Self { heads, next: filled(entries)?, before: filled(entries)? })
    }

    fn place(&self, gfn: Gfn) -> usize {
        let mixed = gfn.get().wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 32) as usize & (self.heads.len() - 1)
    }

    /// `entry` maps `gfn` from now on.
    pub(crate) fn insert(&mut self, gfn: Gfn, entry: EntryId) {
        let place = self.place(gfn);
        let head = core::mem::replace(&mut self.heads[place], entry.0);
        self.next[entry.0 as usize] = head;
        self.before[entry.0 as usize] = END;
        if head != END {
            self.before[head as usize] = entry.0;
        }
    }

    /// `entry`, which maps `gfn`, does so no more.
    pub(crate) fn remove(&mut self, gfn: Gfn, entry: EntryId) {
        let at = entry.0 as usize;
        let (next, before) =
            (core::mem::replace(&mut self.next[at], END), core::mem::replace(&mut self.before[at], END));
        match before {
            END => {
                let place = self.place(gfn);
                self.heads[place] = next;
            }
            before => self.next[before as usize] = next,
        }
        if next != END {
            self.before[next as usize] = before;
        }
    }

    /// The first entry whose frame has the hash of `gfn`, or the one after `entry`. Others than those of `gfn` are among them.
    pub(crate) fn next(&self, gfn: Gfn, after: Option<EntryId>) -> Option<EntryId> {
        let next = after.map_or_else(|| self.heads[self.place(gfn)], |entry| self.next[entry.0 as usize]);
        (next != END).then_some(EntryId(next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_hold_what_was_put_in_and_not_taken_out() {
        let mut map = Rmap::new(64).unwrap();
        let gfns = [Gfn::new(7), Gfn::new(8), Gfn::new(1 << 20)];
        for entry in 0..48 {
            map.insert(gfns[entry as usize % 3], EntryId(entry));
        }
        // The head, the end and the middle of each chain, and some come back.
        let gone = |entry: u32| !(3..=44).contains(&entry) || entry % 4 == 1;
        for entry in (0..48).filter(|entry| gone(*entry)) {
            map.remove(gfns[entry as usize % 3], EntryId(entry));
        }
        map.insert(gfns[2], EntryId(2));
        for (number, gfn) in gfns.into_iter().enumerate() {
            let (mut at, mut seen) = (None, Vec::new());
            while let Some(entry) = map.next(gfn, at) {
                seen.push(entry.0);
                at = Some(entry);
            }
            for entry in (0..48).filter(|entry| *entry as usize % 3 == number) {
                assert_eq!(seen.contains(&entry), !gone(entry) || entry == 2, "{entry}");
            }
        }
    }
}
