//! What a processor may keep of the guest's own tables: the architecture's TLB, for vCPUs that run on shadow tables.
//!
//! Purpose: the reference that shadow tables are held against. Each word of the guest's tables keeps its history. A walk of a vCPU may use
//! any value that stood since the vCPU flushed the page (INVLPG) or everything (a load of CR3); what was overwritten before is gone for
//! it, whatever other vCPUs flushed (AMD APM volume 2, 5.5.2; Intel SDM volume 3, 4.10.4). It comes to a table by an entry that stood no later
//! than the one that it uses there: what was overwritten before a table was linked is seen on no way through that link. An entry that is not present
//! is kept nowhere: a walk that ends there has read it since the access began.
//!
//! Four levels, pages of 4 KiB. Known holes: the accessed and dirty flags, which scenarios set ahead; entries that the owner
//! writes while vCPUs run.

use entresol_addr::Gpa;

use super::config::MAX_CPUS;
use super::tlb::{NEVER, Stamp};

/// Numbers from here on are of shadow tables, among [`Tables`](super::tables::Tables); the rest of division by it is their virtual machine's.
pub const SHADOWS: usize = 1 << 16;

/// The number of the shadow tables that `vm` has for the guest's root at `root`, among [`Tables`](super::tables::Tables).
pub const fn shadow(vm: usize, root: Gpa) -> usize {
    vm + SHADOWS * (root.get() >> 12) as usize
}

/// P of an entry.
const PRESENT: u64 = 1;
/// R/W of an entry.
const WRITABLE: u64 = 1 << 1;
/// NX of an entry.
const NO_EXECUTE: u64 = 1 << 63;
/// Bits 51:12.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// A value of a word, and since when.
type Past = (Stamp, u64);

/// Where a walk of the guest's tables may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Led {
    /// At a page.
    To {
        /// The address, to the byte.
        gpa: Gpa,
        /// All entries permit stores.
        write: bool,
        /// All entries permit fetches.
        execute: bool,
    },
    /// Nowhere: a page fault.
    Nowhere,
}

/// The words of the guests' tables, and who flushed what.
#[derive(Debug, Default)]
pub struct Linear {
    /// Where the root of the tables is that each CPU's vCPU runs on.
    pub roots: [Gpa; MAX_CPUS],
    words: Vec<(usize, Gpa, Vec<Past>)>,
    /// (CPU, linear page or everything, when), for each vCPU that runs on shadow tables.
    flushed: Vec<(usize, Option<u64>, Stamp)>,
}

impl Linear {
    /// The word at `at` of `vm` is `value` from now on.
    pub fn wrote(&mut self, vm: usize, at: Gpa, value: u64, now: Stamp) {
        match self.words.iter_mut().find(|(of, place, _)| (*of, *place) == (vm, at)) {
            Some((.., history)) => history.push((now, value)),
            None => self.words.push((vm, at, vec![(0, 0), (now, value)])),
        }
    }

    /// The vCPU of `cpu` has flushed the page of `linear`, or everything.
    pub fn flush(&mut self, cpu: usize, linear: Option<u64>, now: Stamp) {
        self.flushed.push((cpu, linear.map(|linear| linear >> 12), now));
    }

    /// When the vCPU of `cpu` last flushed what it knows of `linear`.
    pub fn floor(&self, cpu: usize, linear: u64) -> Stamp {
        let ours =
            self.flushed.iter().filter(|(by, page, _)| *by == cpu && page.is_none_or(|page| page == linear >> 12));
        ours.map(|(.., when)| *when).max().unwrap_or(0)
    }

    /// Every way that a walk for `linear` from the table at `root` may end, if entries are as old as `floor`, the newest first. Each entry was read
    /// after the one that leads to it.
    pub fn ways(&self, vm: usize, root: Gpa, linear: u64, floor: Stamp) -> Vec<Led> {
        let mut tables = vec![(root, true, true, floor)];
        let mut ends = Vec::new();
        for level in (0..4).rev() {
            let index = linear >> (12 + 9 * level) & 511;
            let mut below = Vec::new();
            for (table, write, execute, since) in tables {
                for (from, raw) in self.values(vm, Gpa::new(table.get() + index * 8), since) {
                    let next = Gpa::new(raw & ADDRESS);
                    let (write, execute) = (write && raw & WRITABLE != 0, execute && raw & NO_EXECUTE == 0);
                    match raw & PRESENT {
                        0 => ends.push(Led::Nowhere),
                        _ if level == 0 => {
                            let gpa = Gpa::new(next.get() | linear & 0xfff);
                            ends.push(Led::To { gpa, write, execute });
                        }
                        _ => below.push((next, write, execute, since.max(from))),
                    }
                }
            }
            tables = below;
        }
        ends
    }

    /// What a word said since `floor`, each from when on.
    fn values(&self, vm: usize, at: Gpa, floor: Stamp) -> Vec<Past> {
        let Some((.., history)) = self.words.iter().find(|(of, place, _)| (*of, *place) == (vm, at)) else {
            return vec![(0, 0)];
        };
        let until = |place: usize| history.get(place + 1).map_or(NEVER, |(when, _)| *when);
        (0..history.len()).rev().filter(|place| until(*place) > floor).map(|place| history[place]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_counts_until_the_vcpu_flushes_after_it_was_overwritten() {
        let mut linear = Linear::default();
        for (at, value) in [(0x1000, 0x2067), (0x2000, 0x3067), (0x3000, 0x4067), (0x4008, 0x9065)] {
            linear.wrote(0, Gpa::new(at), value, 1);
        }
        let to = |gpa, write| Led::To { gpa: Gpa::new(gpa), write, execute: true };
        let ways = |linear: &Linear, cpu| linear.ways(0, Gpa::new(0x1000), 0x1010, linear.floor(cpu, 0x1010));
        linear.flush(0, None, 2);
        linear.flush(1, None, 2);
        assert_eq!(ways(&linear, 0), [to(0x9010, false)]);
        linear.wrote(0, Gpa::new(0x4008), 0x8067, 3);
        assert_eq!(ways(&linear, 0), [to(0x8010, true), to(0x9010, false)]);
        linear.flush(0, Some(0x1000), 4);
        linear.flush(1, Some(0x2000), 4);
        assert_eq!((ways(&linear, 0), ways(&linear, 1).len()), (vec![to(0x8010, true)], 2), "each vCPU for itself");
        linear.wrote(0, Gpa::new(0x3000), 0, 5);
        assert_eq!(ways(&linear, 0), [Led::Nowhere, to(0x8010, true)]);
        linear.flush(0, None, 6);
        assert_eq!(ways(&linear, 0), [Led::Nowhere]);
    }

    #[test]
    fn what_was_overwritten_before_its_table_was_linked_is_on_no_way_through_the_link() {
        let mut linear = Linear::default();
        for (at, value, when) in [(0x1000, 0x2067, 1), (0x2000, 0x3067, 1), (0x4008, 0x9067, 1), (0x4008, 0x8067, 4)] {
            linear.wrote(0, Gpa::new(at), value, when);
        }
        let ends = |linear: &Linear| linear.ways(0, Gpa::new(0x1000), 0x1000, 2);
        let to = |gpa| Led::To { gpa: Gpa::new(gpa), write: true, execute: true };
        linear.wrote(0, Gpa::new(0x3000), 0x4067, 5);
        assert_eq!(ends(&linear), [Led::Nowhere, to(0x8000)], "linked after it was overwritten");
        let early = Linear {
            words: linear
                .words
                .iter()
                .cloned()
                .map(|(vm, at, mut history)| {
                    history.iter_mut().filter(|(when, _)| *when == 5).for_each(|(when, _)| *when = 3);
                    (vm, at, history)
                })
                .collect(),
            ..Linear::default()
        };
        assert_eq!(ends(&early), [Led::Nowhere, to(0x8000), to(0x9000)], "linked before");
    }
}
