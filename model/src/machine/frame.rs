//! One frame of memory as caches show it.
//!
//! Purpose: what an observer reads depends on the way it reads. The hypervisor and a guest with caches on go through one
//! coherent data cache (Arm DDI 0487 B2.7: caches of one shareability domain are coherent for cacheable accesses); a
//! guest with its MMU off or with a Non-cacheable mapping reads and writes memory at the point of coherency (B2.12,
//! mismatched attributes); fetches may see an instruction cache that nobody told of a store (D7.5.9).
//!
//! Protocol: a line may be evicted, or filled, at any moment. The model decides that only when an access comes whose
//! result depends on it ("lazily"), through a [`Pick`]: answer 0 is the stalest possibility. One page is one line.
//!
//! - `dirty` is the line, if stores went into it; memory below is older.
//! - `memory` is what memory has held since the line was last invalidated, oldest first. A clean copy in the cache may
//!   be any of these; the last is what memory holds.
//! - `stale_code` is what the page held while a guest could execute it, as long as no instruction cache invalidation
//!   came after.
//!
//! Clean and invalidate takes effect at the barrier that completes it, for what was stored before it began.
//!
//! Known holes: lines are pages, so false sharing inside a page is not seen; speculative fills of pages that only the
//! guest maps are not told apart from the hypervisor's own.

use entresol_machine::Tags;

use super::content::Content;

/// Decides among `n` possibilities of the hardware; 0 is the stalest.
pub type Pick<'a> = &'a mut dyn FnMut(usize) -> usize;

/// Memory versions and stale instruction copies that are remembered.
const REMEMBERED: usize = 4;

/// What freed and never used frames hold.
pub const POISON: u64 = 0xdead_f4ee_dead_f4ee;

/// The tags that freed and never used frames have.
pub const POISON_TAGS: Tags = Tags([0xdead_f4ee_dead_f4ee; Tags::WORDS]);

/// One frame.
#[derive(Debug)]
pub struct Frame {
    memory: Vec<Content>,
    dirty: Option<Content>,
    /// The dirty line holds stores of the hypervisor.
    host_dirty: bool,
    /// Counts changes of the line.
    changes: u64,
    /// Counts stores of any kind: what an exclusive access watches.
    stores: u64,
    stale_code: Vec<Content>,
    /// Its allocation tags, coherent for every observer.
    pub tags: Tags,
    /// A guest could execute it at some time.
    pub executable: bool,
    /// When the hypervisor last wrote it.
    pub host_written: u64,
    /// When the last completed instruction cache invalidation of it began.
    pub icache_clean: u64,
    /// The pool has given it out.
    pub taken: bool,
    /// It is read-only memory from the beginning.
    pub rom: bool,
    /// Which tables it is: one of the second stage, or a shadow table, once for each way to it.
    pub tables: Vec<usize>,
}

/// A clean and invalidate that has begun.
#[derive(Debug)]
pub struct Cleaning {
    line: Option<Content>,
    changes: u64,
}

impl Default for Frame {
    fn default() -> Self {
        Self::new()
    }
}

impl Frame {
    /// A frame nobody uses.
    pub fn new() -> Self {
        Self {
            memory: vec![Content::filled(POISON)],
            dirty: None,
            host_dirty: false,
            changes: 0,
            stores: 0,
            stale_code: Vec::new(),
            tags: POISON_TAGS,
            executable: false,
            host_written: 0,
            icache_clean: 0,
            taken: false,
            rom: false,
            tables: Vec::new(),
        }
    }

    /// Holds `content` from the beginning.
    pub fn preset(&mut self, content: Content) {
        self.memory = vec![content];
    }

    /// What memory holds.
    fn last(&self) -> &Content {
        self.memory.last().expect("memory holds something")
    }

    /// What the cache shows now without asking what was evicted.
    pub fn line(&self) -> &Content {
        self.dirty.as_ref().unwrap_or_else(|| self.last())
    }

    /// What memory holds at word `index`.
    pub fn in_memory(&self, index: u16) -> u64 {
        self.last().get(index)
    }

    /// Whether memory lacks stores of the hypervisor.
    pub fn owes_clean(&self) -> bool {
        self.host_dirty && self.dirty.is_some()
    }

    /// Whether the line is dirty.
    pub fn is_dirty(&self) -> bool {
        self.dirty.is_some()
    }

    /// Whether an instruction cache may hold something older.
    pub fn has_stale_code(&self) -> bool {
        !self.stale_code.is_empty()
    }

    /// Stores so far, through the cache or past it.
    pub fn stores(&self) -> u64 {
        self.stores
    }

    /// Read through the cache.
    pub fn read(&mut self, index: u16, pick: Pick<'_>) -> u64 {
        if let Some(line) = &self.dirty {
            return line.get(index);
        }
        let now = self.last().get(index);
        if self.memory.len() > 1 && self.memory.iter().any(|old| old.get(index) != now) {
            let chosen = pick(self.memory.len());
            self.memory.drain(..chosen);
            return self.memory[0].get(index);
        }
        now
    }

    /// Write through the cache.
    pub fn write(&mut self, index: u16, value: u64, host: bool, now: u64, pick: Pick<'_>) {
        self.remember_code();
        if self.dirty.is_none() {
            if self.memory.len() > 1 {
                let chosen = pick(self.memory.len());
                self.dirty = Some(self.memory[chosen].clone());
                self.memory.drain(..self.memory.len() - 1);
            } else {
                self.dirty = Some(self.last().clone());
            }
            self.host_dirty = false;
        }
        self.changed(host, now);
        if let Some(line) = &mut self.dirty {
            line.set(index, value);
        }
    }

    /// The hypervisor fills the whole page through the cache.
    pub fn replace(&mut self, content: Content, now: u64) {
        self.remember_code();
        self.memory.drain(..self.memory.len() - 1);
        self.dirty = Some(content);
        self.changed(true, now);
    }

    /// Read past the cache.
    pub fn read_uncached(&mut self, index: u16, pick: Pick<'_>) -> u64 {
        let memory = self.last().get(index);
        let Some(line) = &self.dirty else { return memory };
        let cached = line.get(index);
        if cached == memory || pick(2) == 0 {
            return memory;
        }
        self.evict();
        cached
    }

    /// Write past the cache.
    pub fn write_uncached(&mut self, index: u16, value: u64, pick: Pick<'_>) {
        self.remember_code();
        self.stores += 1;
        // Either the dirty line is still there and will overwrite this later, or it was written back before.
        if self.dirty.is_some() && pick(2) == 1 {
            self.evict();
        }
        let mut content = self.last().clone();
        content.set(index, value);
        self.push(content);
    }

    /// Instruction fetch.
    pub fn fetch(&mut self, index: u16, pick: Pick<'_>) -> u64 {
        let now = self.read(index, pick);
        let mut seen: Vec<u64> = Vec::new();
        for old in self.stale_code.iter().map(|code| code.get(index)).chain([now]) {
            if !seen.contains(&old) {
                seen.push(old);
            }
        }
        if seen.len() == 1 { now } else { seen[pick(seen.len())] }
    }

    /// A clean and invalidate begins.
    pub fn begin_clean(&self) -> Cleaning {
        Cleaning { line: self.dirty.clone(), changes: self.changes }
    }

    /// It has completed.
    pub fn end_clean(&mut self, cleaning: Cleaning) {
        if let Some(line) = cleaning.line {
            self.push(line);
        }
        self.memory.drain(..self.memory.len() - 1);
        if self.changes == cleaning.changes {
            self.dirty = None;
            self.host_dirty = false;
        }
    }

    /// A clean without an invalidation, whole: memory is as new as the line, and a copy may stay.
    pub fn clean(&mut self) {
        if self.dirty.is_some() {
            self.evict();
            self.memory.drain(..self.memory.len() - 1);
        }
    }

    /// An instruction cache invalidation that began at `began` has completed.
    pub fn end_icache(&mut self, began: u64) {
        self.stale_code.clear();
        self.icache_clean = self.icache_clean.max(began);
    }

    /// The pool has it back: whoever reads it from now on reads poison.
    pub fn poison(&mut self) {
        self.remember_code();
        self.memory = vec![Content::filled(POISON)];
        self.dirty = None;
        self.host_dirty = false;
        self.changes += 1;
        self.stores += 1;
        self.taken = false;
        self.tags = POISON_TAGS;
        self.tables.clear();
    }

    fn changed(&mut self, host: bool, now: u64) {
        self.changes += 1;
        self.stores += 1;
        if host {
            self.host_dirty = true;
            self.host_written = now;
        }
    }

    fn evict(&mut self) {
        if let Some(line) = self.dirty.take() {
            self.push(line);
            self.host_dirty = false;
        }
    }

    fn push(&mut self, content: Content) {
        if self.memory.len() == REMEMBERED {
            self.memory.remove(0);
        }
        self.memory.push(content);
    }

    fn remember_code(&mut self) {
        if self.executable {
            if self.stale_code.len() == REMEMBERED {
                self.stale_code.remove(0);
            }
            let now = self.line().clone();
            self.stale_code.push(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Never reached: nothing depends on the hardware.
    fn certain(n: usize) -> usize {
        panic!("{n} possibilities where there should be one");
    }

    fn zeroed() -> Frame {
        let mut frame = Frame::new();
        frame.replace(Content::filled(0), 1);
        frame
    }

    #[test]
    fn memory_lags_behind_a_dirty_line() {
        let mut frame = zeroed();
        assert!(frame.owes_clean());
        assert_eq!(frame.read(0, &mut certain), 0);
        assert_eq!(frame.read_uncached(0, &mut |_| 0), POISON, "not evicted");
        assert_eq!(frame.read_uncached(0, &mut |_| 1), 0, "evicted");
        assert_eq!(frame.read_uncached(0, &mut certain), 0, "for good");
    }

    #[test]
    fn a_clean_covers_what_was_stored_before_it_began() {
        let mut frame = zeroed();
        let cleaning = frame.begin_clean();
        frame.write(1, 7, true, 2, &mut certain);
        frame.end_clean(cleaning);
        assert!(frame.owes_clean());
        assert_eq!(frame.read_uncached(0, &mut certain), 0);
        assert_eq!(frame.read_uncached(1, &mut |_| 0), 0);
        let cleaning = frame.begin_clean();
        frame.end_clean(cleaning);
        assert_eq!(frame.read_uncached(1, &mut certain), 7);
    }

    #[test]
    fn a_clean_copy_may_hide_an_uncached_store_until_it_is_invalidated() {
        let mut frame = zeroed();
        let cleaning = frame.begin_clean();
        frame.end_clean(cleaning);
        frame.write_uncached(0, 5, &mut certain);
        assert_eq!(frame.read_uncached(0, &mut certain), 5);
        assert_eq!(frame.read(0, &mut |_| 0), 0, "a clean line was there");
        let cleaning = frame.begin_clean();
        frame.end_clean(cleaning);
        assert_eq!(frame.read(0, &mut certain), 5);
    }

    #[test]
    fn a_dirty_line_may_overwrite_an_uncached_store() {
        let mut frame = zeroed();
        frame.write_uncached(0, 5, &mut |_| 0);
        let cleaning = frame.begin_clean();
        frame.end_clean(cleaning);
        assert_eq!(frame.read_uncached(0, &mut certain), 0);
    }

    #[test]
    fn a_clean_makes_memory_new_and_leaves_older_copies() {
        let mut frame = zeroed();
        frame.clean();
        assert!(!frame.owes_clean());
        assert_eq!(frame.read_uncached(0, &mut certain), 0);
        frame.write_uncached(0, 5, &mut certain);
        frame.clean();
        assert_eq!(frame.read(0, &mut |_| 0), 0, "the copy is older than memory, and stays");
        assert_eq!(frame.stores(), 2, "a clean stores nothing");
    }

    #[test]
    fn fetches_see_old_code_until_the_instruction_cache_is_invalidated() {
        let mut frame = zeroed();
        frame.executable = true;
        frame.write(0, 9, true, 2, &mut certain);
        assert_eq!(frame.fetch(0, &mut |_| 0), 0);
        assert_eq!(frame.fetch(0, &mut |_| 1), 9);
        frame.end_icache(3);
        assert_eq!(frame.fetch(0, &mut certain), 9);
    }
}
