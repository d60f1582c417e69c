//! Which places of the source are worth a decision.
//!
//! Purpose: letting another CPU go before an operation matters only if the operation is on something that another CPU
//! touches too, and one of them changes it. The explorer learns from each schedule which places of the source have such
//! operations ([`Sites::is_shared`]) and decides only there; an exhaustive search starts again when it learns of a new
//! one. Of a place that goes through the words of a page only those words count that some place shares: copying a node of 512
//! words is a decision where another CPU may use the same word, and not 512. That is sound for sequentially consistent memory: between two shared operations of a CPU nothing that it does is
//! seen by others, so any schedule equals one that switches just before shared operations.
//!
//! The same record tells who waits in vain: a CPU in a waiting loop goes on when another CPU has changed something that
//! it read since it last waited, and not before.

use std::collections::HashMap;

use entresol_machine::Word;
use entresol_sync::lab::Site;

/// Places that touched one address, before all count as shared without asking further.
const SITES: usize = 6;

/// Places of the source, numbered, for the life of an exploration.
#[derive(Debug, Default)]
pub struct Sites {
    by_pointer: HashMap<usize, u16, Spread>,
    by_name: HashMap<(&'static str, u32, u32), u16>,
    shared: Vec<bool>,
    /// Words of pages that are shared, whichever page and place it is.
    words: [u64; Word::PER_FRAME as usize / 64],
    /// How many places and words are shared.
    count: usize,
}

/// Marks the addresses of words of pages among those that operations announce. No host address has this bit.
pub const WORD: usize = 1 << 60;

/// Which word of a page `address` is, if it is one.
fn word(address: usize) -> Option<usize> {
    (address & WORD != 0).then_some(address >> 3 & (Word::PER_FRAME as usize - 1))
}

/// A hasher for keys that are addresses: one multiplication.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spread(u64);

impl std::hash::Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_usize(usize::from(*byte));
        }
    }

    fn write_usize(&mut self, key: usize) {
        self.0 = (self.0 ^ key as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
    }
}

impl std::hash::BuildHasher for Spread {
    type Hasher = Self;

    fn build_hasher(&self) -> Self {
        Self::default()
    }
}

impl Sites {
    /// The number of a place.
    pub fn number(&mut self, site: Site) -> u16 {
        let pointer = std::ptr::from_ref(site).addr();
        if let Some(number) = self.by_pointer.get(&pointer) {
            return *number;
        }
        // One place may have several copies of its name.
        let next = self.shared.len() as u16;
        let number = *self.by_name.entry((site.file(), site.line(), site.column())).or_insert(next);
        if number == next {
            self.shared.push(false);
        }
        self.by_pointer.insert(pointer, number);
        number
    }

    /// Whether operations there may touch what others touch.
    pub fn is_shared(&self, site: u16) -> bool {
        self.shared[usize::from(site)]
    }

    /// Whether an operation there on `address` may be one on what others touch.
    pub fn is_shared_at(&self, site: u16, address: usize) -> bool {
        self.is_shared(site) && word(address).is_none_or(|word| self.words[word / 64] >> (word % 64) & 1 != 0)
    }

    /// How many places and words are shared: it only grows.
    pub fn shared(&self) -> usize {
        self.count
    }

    /// All names of places that are shared, as `file:line:column`.
    pub fn shared_names(&self) -> Vec<String> {
        let shared = self.by_name.iter().filter(|(_, number)| self.is_shared(**number));
        let mut names: Vec<String> =
            shared.map(|((file, line, column), _)| format!("{file}:{line}:{column}")).collect();
        names.sort();
        names
    }

    /// Places that another exploration of the same scenario found shared.
    pub fn learn(&mut self, other: &Self) {
        for (name, number) in &other.by_name {
            let next = self.shared.len() as u16;
            let mine = *self.by_name.entry(*name).or_insert(next);
            if mine == next {
                self.shared.push(false);
            }
            if other.is_shared(*number) {
                self.share(mine);
            }
        }
        for (mine, others) in self.words.iter_mut().zip(other.words) {
            self.count += (others & !*mine).count_ones() as usize;
            *mine |= others;
        }
    }

    /// An address is shared.
    fn share_word(&mut self, address: usize) {
        if let Some(word) = word(address) {
            let (place, bit) = (&mut self.words[word / 64], 1 << (word % 64));
            self.count += usize::from(*place & bit == 0);
            *place |= bit;
        }
    }

    fn share(&mut self, site: u16) {
        let shared = &mut self.shared[usize::from(site)];
        self.count += usize::from(!*shared);
        *shared = true;
    }
}

/// What happened to one address in this schedule.
#[derive(Clone, Copy, Debug, Default)]
struct Record {
    address: usize,
    /// The schedule it belongs to; others are forgotten.
    epoch: u32,
    readers: u8,
    writers: u8,
    sites: [u16; SITES],
    used: u8,
    written: u64,
    writer: u8,
}

/// What every address was used for in one schedule.
#[derive(Debug)]
pub struct Accesses {
    records: Vec<Record>,
    epoch: u32,
    live: usize,
    /// For each CPU what it read since it last waited, and when.
    reads: Vec<Vec<(usize, u64)>>,
}

impl Accesses {
    /// Nothing happened yet, on `cpus` CPUs.
    pub fn new(cpus: usize) -> Self {
        Self { records: vec![Record::default(); 1024], epoch: 1, live: 0, reads: vec![Vec::new(); cpus] }
    }

    /// Forgets a schedule.
    pub fn clear(&mut self, cpus: usize) {
        self.epoch += 1;
        self.live = 0;
        self.reads.resize_with(cpus, Vec::new);
        self.reads.iter_mut().for_each(Vec::clear);
    }

    fn place(&self, address: usize) -> usize {
        let mask = self.records.len() - 1;
        let mut place = (address as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(20) as usize & mask;
        loop {
            let record = &self.records[place];
            if record.epoch != self.epoch || record.address == address {
                return place;
            }
            place = (place + 1) & mask;
        }
    }

    fn record(&mut self, address: usize) -> &mut Record {
        let mut place = self.place(address);
        if self.records[place].epoch != self.epoch {
            if self.live * 2 > self.records.len() {
                self.grow();
                place = self.place(address);
            }
            self.live += 1;
            self.records[place] = Record { address, epoch: self.epoch, ..Record::default() };
        }
        &mut self.records[place]
    }

    fn grow(&mut self) {
        let size = self.records.len() * 2;
        let old = std::mem::replace(&mut self.records, vec![Record::default(); size]);
        for record in old.into_iter().filter(|record| record.epoch == self.epoch) {
            let place = self.place(record.address);
            self.records[place] = record;
        }
    }

    /// `cpu` uses `address` at `step`. Marks the places that share it.
    pub fn note(&mut self, sites: &mut Sites, cpu: usize, address: usize, write: bool, site: u16, step: u64) {
        if !write {
            self.reads[cpu].push((address, step));
        }
        let bit = 1 << cpu;
        let record = self.record(address);
        let (conflict, full) = {
            let others = if write { record.readers | record.writers } else { record.writers };
            (others & !bit != 0, usize::from(record.used) == SITES)
        };
        if write {
            record.writers |= bit;
            (record.written, record.writer) = (step, cpu as u8);
            // A read-modify-write waits for others' changes too.
            record.readers |= bit;
        } else {
            record.readers |= bit;
        }
        let known = &record.sites[..usize::from(record.used)];
        if !known.contains(&site) {
            if full {
                sites.share(site);
            } else {
                record.sites[usize::from(record.used)] = site;
                record.used += 1;
            }
        }
        // Once shared, always shared: places that come later conflict themselves.
        if conflict {
            sites.share_word(address);
            for site in &record.sites[..usize::from(record.used)] {
                sites.share(*site);
            }
        }
    }

    /// Whether another CPU has changed something since `cpu` read it.
    pub fn moved_on(&self, cpu: usize) -> bool {
        self.reads[cpu].iter().any(|(address, step)| {
            let record = &self.records[self.place(*address)];
            record.epoch == self.epoch && record.written > *step && usize::from(record.writer) != cpu
        })
    }

    /// Whether `cpu` has read `address` since it last waited.
    pub fn has_read(&self, cpu: usize, address: usize) -> bool {
        self.reads[cpu].iter().any(|(read, _)| *read == address)
    }

    /// `cpu` begins another round of waiting.
    pub fn forget_reads(&mut self, cpu: usize) {
        self.reads[cpu].clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::Location;

    #[track_caller]
    fn here() -> Site {
        Location::caller()
    }

    #[test]
    fn a_place_is_shared_when_two_cpus_meet_there_and_one_writes() {
        let (mut sites, mut accesses) = (Sites::default(), Accesses::new(2));
        let [a, b, c] = [here(), here(), here()].map(|site| sites.number(site));
        accesses.note(&mut sites, 0, 0x100, false, a, 1);
        accesses.note(&mut sites, 1, 0x100, false, b, 2);
        accesses.note(&mut sites, 0, 0x200, true, c, 3);
        assert_eq!(sites.shared(), 0, "two readers, and one CPU alone");
        accesses.note(&mut sites, 1, 0x100, true, b, 4);
        assert!(sites.is_shared(a) && sites.is_shared(b) && !sites.is_shared(c));
        accesses.clear(2);
        accesses.note(&mut sites, 1, 0x200, true, c, 1);
        assert!(!sites.is_shared(c), "another schedule's accesses do not count");
    }

    #[test]
    fn a_place_that_goes_through_a_page_is_shared_at_shared_words() {
        let (mut sites, mut accesses) = (Sites::default(), Accesses::new(2));
        let [a, b] = [here(), here()].map(|site| sites.number(site));
        (0..512).for_each(|word| accesses.note(&mut sites, 0, WORD | 0x1000 | word << 3, false, a, 1));
        accesses.note(&mut sites, 1, WORD | 0x1018, true, b, 2);
        assert_eq!(sites.shared(), 3, "two places and a word");
        assert!(sites.is_shared_at(a, WORD | 0x5018) && !sites.is_shared_at(a, WORD | 0x1020));
        let mut others = Sites::default();
        others.learn(&sites);
        assert_eq!(others.shared(), 3);
    }

    #[test]
    fn waiting_ends_when_another_cpu_changes_what_was_read() {
        let (mut sites, mut accesses) = (Sites::default(), Accesses::new(2));
        let site = sites.number(here());
        accesses.note(&mut sites, 0, 0x100, false, site, 1);
        accesses.note(&mut sites, 0, 0x100, true, site, 2);
        assert!(!accesses.moved_on(0), "its own store");
        accesses.note(&mut sites, 1, 0x300, true, site, 3);
        assert!(!accesses.moved_on(0));
        accesses.note(&mut sites, 1, 0x100, true, site, 4);
        assert!(accesses.moved_on(0) && accesses.has_read(0, 0x100));
        accesses.forget_reads(0);
        assert!(!accesses.moved_on(0));
    }

    #[test]
    fn many_addresses_are_kept_apart() {
        let (mut sites, mut accesses) = (Sites::default(), Accesses::new(2));
        let site = sites.number(here());
        for address in 0..5000 {
            accesses.note(&mut sites, 0, address * 8, true, site, 1);
        }
        assert_eq!(sites.shared(), 0);
        accesses.note(&mut sites, 1, 4999 * 8, false, site, 2);
        assert_eq!(sites.shared(), 1);
    }
}
