//! Pages of equal content that become one frame: what a merge does to the words of one tree.
//!
//! Protocol: a page that is to be merged is the tree's own, and nobody writes it: the caller has taken its translations
//! away and keeps faults out (an invalidation is in progress), and holds the object's structure lock. A page is first
//! *offered*: its own word is marked shared, and from then on its frame never changes, like everything that is reached
//! through a marked word. Then other pages *join* it: a reference to the offered frame is counted ([`Offered`]), the bytes are
//! compared, the word is exchanged for one that names the offered frame, marked, and the frame that it named is deferred. A
//! page of zeros becomes vacant instead. Each reads the same before and after, so pinned readers see no difference.
//!
//! Where pages have allocation tags these are content: they are compared as bytes are, and a page of zeros has tags of zero.
//! A page that has tags and one that has none are never one frame (D10).
//!
//! Only words with nothing marked above them are looked at. What relatives share is one frame already, and taking it
//! apart would copy nodes; and a word that a fork has marked stays what it is, so a difference of relatives names nothing
//! that was not written. An offered page's own word cannot be told from one that a fork has marked: either may be joined.
//!
//! Bound: a frame is joined while it has fewer than [`MOST_JOINED`] references. So one tree reaches a frame by at most so
//! many words, and forks, of which there are fewer than objects, cannot make the count overflow.
//!
//! Invariants: INV-7, INV-11, INV-12.

use entresol_addr::{Hpa, PAGE_SIZE, Pfn, PfnRange};
use entresol_machine::{Machine, Tags, Word};
use entresol_sync::atomic::Ordering;
use entresol_sync::planted;

use super::entry::{self, CLEAN, SHARED};
use super::structure::after;
use super::{BLOCK_FRAMES, Entry, Tree};
use crate::{MAX_OBJECTS, Order, OutOfMemory, Supply};

/// The most references to a frame at which another page may still join it.
pub(crate) const MOST_JOINED: u32 = 128;

const _: () = assert!((MOST_JOINED as u64) * (MAX_OBJECTS as u64) < 1 << 24, "references are counted in 24 bits");

/// Bytes that are compared at once.
const CHUNK: usize = 1024;

/// What a scanner finds at one frame of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing that can be merged: vacant, being made, shared by relatives with the way to it, bad, or as a store has it.
    Other,
    /// A page, or a part of a block, that is the object's own and may be written.
    Own(Pfn),
    /// A page that is never written again: others may join it.
    Offered(Pfn),
}

/// What a scanner finds in the 512 frames around one frame of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// Nothing that can be merged, up to this frame.
    Nothing {
        /// The first frame behind it, a multiple of 512 or the end of the tree.
        next: u64,
    },
    /// A block of 2 MiB that is the object's own.
    Block,
    /// Pages.
    Pages,
}

/// A reference to an offered page, for a page that shall join it.
#[must_use = "the reference is lost if it is dropped"]
#[derive(Debug)]
pub struct Offered {
    pfn: Pfn,
    /// The frame has valid allocation tags.
    tagged: bool,
}

impl Offered {
    /// The frame.
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// Gives the reference back.
    pub fn give_back<M>(self, supply: &Supply<'_, M>) {
        supply.pool.release(self.pfn);
    }
}

/// What became of a page that was to be merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merged {
    /// It is the offered page's frame now, or vacant; its own frame is deferred.
    Done,
    /// It has other bytes, or other tags.
    Differs,
    /// It is not the object's own page any more.
    Gone,
}

impl Tree {
    /// The word that decides about `frame`, if the way to it is the tree's own.
    fn own_word<M: Machine>(&self, machine: &M, frame: u64) -> Option<(Word, u64, u32)> {
        let root = self.root.load(Ordering::Acquire);
        (root & SHARED == 0).then(|| self.locate_own(machine, frame))
    }

    /// What stands at `frame`, which lies inside.
    pub(crate) fn standing<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Standing {
        let Some((_, raw, _)) = self.own_word(supply.machine, frame) else { return Standing::Other };
        match Entry::decode(raw) {
            Entry::Page(pfn) if raw & CLEAN != 0 || supply.pool.is_poisoned(pfn) => Standing::Other,
            Entry::Page(pfn) if raw & SHARED != 0 => Standing::Offered(pfn),
            Entry::Page(pfn) => Standing::Own(pfn),
            Entry::Block(pfn) if raw & SHARED == 0 => Standing::Own(pfn.offset(frame & (BLOCK_FRAMES - 1))),
            _ => Standing::Other,
        }
    }

    /// What the 512 frames from `start`, a multiple of 512 that lies inside, hold.
    pub(crate) fn span<M: Machine>(&self, machine: &M, start: u64) -> Span {
        let Some((_, raw, level)) = self.own_word(machine, start) else { return Span::Nothing { next: u64::MAX } };
        match Entry::decode(raw) {
            _ if level == 0 => Span::Pages,
            Entry::Block(_) if raw & SHARED == 0 => Span::Block,
            _ => Span::Nothing { next: after(start, level) },
        }
    }

    /// The own page at `frame` is never written again. `false` if there is none.
    pub(crate) fn offer<M: Machine>(&self, machine: &M, frame: u64) -> bool {
        match self.own_page(machine, frame) {
            Some((word, raw, _)) => machine.compare_exchange(word, raw, raw | SHARED).is_ok(),
            None => false,
        }
    }

    /// A reference to the offered page at `frame`. The caller is pinned.
    pub(crate) fn hold_offered<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Option<Offered> {
        let Standing::Offered(pfn) = self.standing(supply, frame) else { return None };
        // The caller is pinned, so the frame is nobody else's: what was released since is deferred.
        supply.pool.share_if_sound(pfn, MOST_JOINED).then_some(Offered { pfn, tagged: self.is_tagged() })
    }

    /// Whether the own page at `frame` has the bytes and the tags of `offered`.
    pub(crate) fn reads_as<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64, offered: &Offered) -> bool {
        matches!(self.standing(supply, frame), Standing::Own(pfn) if self.same(supply, pfn, offered))
    }

    /// Whether the own page `pfn` has the bytes and the tags of `offered`.
    fn same<M: Machine>(&self, supply: &Supply<'_, M>, pfn: Pfn, offered: &Offered) -> bool {
        let machine = supply.machine;
        if supply.pool.is_poisoned(offered.pfn) {
            return false;
        }
        let tagged = self.is_tagged();
        let same_tags = || !tagged || machine.load_tags(pfn) == machine.load_tags(offered.pfn);
        (tagged == offered.tagged && same_tags() || planted!(ZE6)) && same_content(machine, pfn, offered.pfn)
    }

    /// Whether the own page `pfn` reads as untouched memory does.
    fn reads_untouched<M: Machine>(&self, machine: &M, pfn: Pfn) -> bool {
        (!self.is_tagged() || machine.load_tags(pfn) == Tags::ZERO || planted!(ZE6)) && is_zero(machine, pfn)
    }

    /// The own page at `frame`, if it has the bytes and the tags of `offered`, becomes that frame.
    pub(crate) fn join<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64, offered: Offered) -> Merged {
        let outcome = match self.own_page(supply.machine, frame) {
            Some((_, _, pfn)) if !planted!(ZG3) && !self.same(supply, pfn, &offered) => Merged::Differs,
            Some((word, raw, pfn)) => {
                let joined = Entry::Page(offered.pfn).encode() | SHARED;
                self.replace(supply, word, raw, joined, pfn)
            }
            None => Merged::Gone,
        };
        if outcome != Merged::Done {
            offered.give_back(supply);
        }
        outcome
    }

    /// The own page at `frame`, if it is all zeros, its tags too, becomes vacant.
    pub(crate) fn vacate<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Merged {
        match self.own_page(supply.machine, frame) {
            Some((_, _, pfn)) if !self.reads_untouched(supply.machine, pfn) => Merged::Differs,
            Some((word, raw, pfn)) => {
                let outcome = self.replace(supply, word, raw, Entry::Vacant.encode(), pfn);
                if outcome == Merged::Done {
                    self.resident.fetch_sub(1, Ordering::Relaxed);
                }
                outcome
            }
            None => Merged::Gone,
        }
    }

    /// Whether the block of the tree's own at `frame` is all zeros, its tags too.
    pub(crate) fn is_zero_block<M: Machine>(&self, machine: &M, frame: u64) -> bool {
        match self.own_word(machine, frame) {
            Some((_, raw, _)) if entry::is_own_block(raw) => {
                (0..BLOCK_FRAMES).all(|index| self.reads_untouched(machine, entry::frame(raw).offset(index)))
            }
            _ => false,
        }
    }

    /// A block of the tree's own at `frame` becomes pages of its own. `false` if there is none.
    pub(crate) fn break_own_block<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Result<bool, OutOfMemory> {
        match self.own_word(supply.machine, frame) {
            Some((word, raw, _)) if entry::is_own_block(raw) => {
                self.split_block(supply, word, entry::frame(raw)).map(|()| true)
            }
            _ => Ok(false),
        }
    }

    fn own_page<M: Machine>(&self, machine: &M, frame: u64) -> Option<(Word, u64, Pfn)> {
        let (word, raw, _) = self.own_word(machine, frame)?;
        entry::is_own_page(raw).then(|| (word, raw, entry::frame(raw)))
    }

    fn replace<M: Machine>(&self, supply: &Supply<'_, M>, word: Word, raw: u64, new: u64, pfn: Pfn) -> Merged {
        if supply.machine.compare_exchange(word, raw, new).is_err() {
            return Merged::Gone;
        }
        supply.pool.defer(pfn, Order::PAGE);
        Merged::Done
    }
}

/// What a guest has written past the caches is in memory: a cache may have a line from before.
fn look_at<M: Machine>(machine: &M, pfn: Pfn) {
    if !machine.features().forced_write_back {
        machine.clean_invalidate_to_poc(PfnRange::single(pfn));
        machine.complete();
    }
}

fn chunks(pfn: Pfn) -> impl Iterator<Item = Hpa> {
    (0..PAGE_SIZE).step_by(CHUNK).map(move |offset| Hpa::new(pfn.base().get() + offset))
}

fn same_content<M: Machine>(machine: &M, one: Pfn, other: Pfn) -> bool {
    look_at(machine, one);
    look_at(machine, other);
    let (mut left, mut right) = ([0; CHUNK], [0; CHUNK]);
    chunks(one).zip(chunks(other)).all(|(one, other)| {
        machine.read(one, &mut left);
        machine.read(other, &mut right);
        left == right
    })
}

fn is_zero<M: Machine>(machine: &M, pfn: Pfn) -> bool {
    look_at(machine, pfn);
    let mut bytes = [0; CHUNK];
    chunks(pfn).all(|at| {
        machine.read(at, &mut bytes);
        bytes == [0; CHUNK]
    })
}
