//! A fault of a vCPU on shadow tables.

use entresol_addr::{Gfn, Gpa};
use entresol_machine::{Machine, Vmid};
use entresol_sync::planted;

use crate::page::{Page, Record};
use crate::sync::index;
use crate::tables::Shadow;
use crate::{Backing, GuestMemory, GuestTables, Key, Rights, ShadowFormat, Walk};

/// Most times that one fault walks: once for what is there, twice for what is made, more if there is no room.
const TRIES: usize = 4;

/// Why a way cannot be filled yet.
enum Missing {
    /// Tables were made, or compared anew.
    Made,
    /// No frame is left for one.
    Room,
}

/// Where an access leads on a way that is there, for another try of the same access.
#[derive(Clone, Copy, Debug)]
pub struct Beaten {
    /// The table of level 1.
    page: u32,
    gpa: Gpa,
    /// What an entry may allow.
    rights: Rights,
    /// [`Shadow::changes`] when the guest's entry was read.
    changes: u64,
}

/// How a fault ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a fault that nobody acts on stops the guest"]
pub enum Answer<G, M> {
    /// The access can be made again.
    Resume,
    /// No memory is there, or it is read-only: the owner emulates the access.
    Mmio(Gpa),
    /// The guest's own tables refuse it.
    Guest(G),
    /// The frame cannot be given now.
    Memory(M),
    /// The vCPU's root is not the one that its registers name: [`Shadow::load`] first.
    Unloaded,
}

impl<F: ShadowFormat> Shadow<F> {
    /// Handles a fault of `vcpu` at `linear`. `vmid` is what the VM's translations are cached under. `beaten`: what an earlier try of the
    /// same access has found, which ended with [`Answer::Memory`]; it counts for as long as nothing has changed.
    #[allow(clippy::too_many_arguments, reason = "the machine, the vCPU, its memory and its access")]
    #[inline]
    pub fn fault<M: Machine, G: GuestTables, B: GuestMemory>(
        &mut self,
        machine: &M,
        vmid: Vmid,
        vcpu: usize,
        guest: &mut G,
        memory: &mut B,
        linear: u64,
        request: G::Request,
        beaten: &mut Option<Beaten>,
    ) -> Answer<G::Error, B::Error> {
        if beaten.is_none_or(|known| known.changes != self.changes && !planted!(ZX8)) {
            *beaten = match self.beaten(vcpu, guest, linear, request) {
                Ok(found) => found,
                Err(error) => return Answer::Guest(error),
            };
        }
        let Some(Beaten { page, gpa, rights, .. }) = *beaten else {
            return self.by_walk(machine, vmid, vcpu, guest, memory, linear, request);
        };
        let write = guest.writes(request);
        let backing = match memory.backing(gpa.frame(), write) {
            Ok(backing) => backing,
            Err(error) => return Answer::Memory(error),
        };
        let answer = self.fill(machine, vcpu, page, (gpa, rights), linear, write, backing, || memory.generation());
        self.settle(machine, vmid);
        answer
    }

    /// The same by a walk of the guest's tables.
    #[cold]
    #[inline(never)]
    #[allow(clippy::too_many_arguments, reason = "as above")]
    fn by_walk<M: Machine, G: GuestTables, B: GuestMemory>(
        &mut self,
        machine: &M,
        vmid: Vmid,
        vcpu: usize,
        guest: &mut G,
        memory: &mut B,
        linear: u64,
        request: G::Request,
    ) -> Answer<G::Error, B::Error> {
        let write = guest.writes(request);
        self.count_change();
        for _ in 0..TRIES {
            let walk = match guest.walk(linear, request) {
                Ok(walk) => walk,
                Err(error) => return Answer::Guest(error),
            };
            let backing = match memory.backing(walk.gpa.frame(), write) {
                Ok(backing) => backing,
                Err(error) => return Answer::Memory(error),
            };
            let root = self.vcpus[vcpu].root.filter(|root| self.pages[*root as usize].key == Some(walk.keys[0]));
            let Some(root) = root else { return Answer::Unloaded };
            match self.descend(machine, vmid, guest, root, &walk, linear) {
                Ok(page) => {
                    let found = (walk.gpa, walk.rights);
                    let answer = self.fill(machine, vcpu, page, found, linear, write, backing, || memory.generation());
                    self.settle(machine, vmid);
                    return answer;
                }
                // The walk may have read a table before it was protected: it is not to be believed any more.
                Err(Missing::Made) => {
                    if !planted!(ZX10) {
                        self.settle(machine, vmid);
                    }
                    if planted!(ZX5)
                        && let Ok(page) = self.descend(machine, vmid, guest, root, &walk, linear)
                    {
                        let found = (walk.gpa, walk.rights);
                        return self.fill(machine, vcpu, page, found, linear, write, backing, || memory.generation());
                    }
                }
                Err(Missing::Room) => self.clear(machine, vmid),
            }
        }
        // Other CPUs change the tables on the way: the guest's access begins again.
        Answer::Resume
    }

    /// A fault by a word that the hardware refuses. What the vCPU knows, or an MMIO entry that is true, answers it without a walk of
    /// the guest's tables; else it is a fault like others.
    #[allow(clippy::too_many_arguments, reason = "as above")]
    pub fn refused<M: Machine, G: GuestTables, B: GuestMemory>(
        &mut self,
        machine: &M,
        vmid: Vmid,
        vcpu: usize,
        guest: &mut G,
        memory: &mut B,
        linear: u64,
        request: G::Request,
        beaten: &mut Option<Beaten>,
    ) -> Answer<G::Error, B::Error> {
        let now = memory.generation();
        let offset = linear & 0xfff;
        let known = self.vcpus[vcpu].mmio.filter(|(page, ..)| *page == linear >> 12);
        let known = known.map(|(_, gfn, rights, generation)| (gfn, rights, generation));
        // A word keeps a part of the generation; what is compared is all of it.
        let looks = |(gfn, rights, generation), now| {
            self.format.mmio(gfn, rights, generation) == self.format.mmio(gfn, rights, now)
        };
        let is_true = |known: &(Gfn, Rights, u64)| {
            let as_far_as_kept = planted!(ZC2) && now.is_some_and(|now| looks(*known, now));
            let same = now == Some(known.2) || planted!(ZC1) || as_far_as_kept;
            same && guest.allows(known.1, request)
        };
        let cached = known.filter(is_true);
        let found = cached.or_else(|| self.find_mmio(vcpu, linear).filter(is_true));
        let own = &mut self.vcpus[vcpu];
        if let Some((gfn, rights, generation)) = found {
            if cached.is_some() {
                own.counts.cached += 1
            } else {
                own.counts.walked += 1
            }
            own.mmio = Some((linear >> 12, gfn, rights, generation));
            return Answer::Mmio(Gpa::new(gfn.base().get() | offset));
        }
        own.counts.refreshed += 1;
        self.fault(machine, vmid, vcpu, guest, memory, linear, request, beaten)
    }

    /// The MMIO entry behind `linear`.
    fn find_mmio(&self, vcpu: usize, linear: u64) -> Option<(Gfn, Rights, u64)> {
        let mut page = self.vcpus[vcpu].root?;
        loop {
            let key = self.pages[page as usize].key?;
            match self.pages[page as usize].records[index(linear, key.level)] {
                Record::Link(child) => page = child,
                Record::Mmio { gfn, rights, generation } => return Some((gfn, rights, generation)),
                Record::Vacant | Record::Leaf { .. } => return None,
            }
        }
    }

    /// Where `request` at `linear` leads, by the tables that are there: those above level 1 say what the guest's say, because nobody
    /// could write to these since, and only the last entry is read. `None`: the guest's tables are to be walked.
    #[inline]
    fn beaten<G: GuestTables>(
        &self,
        vcpu: usize,
        guest: &mut G,
        linear: u64,
        request: G::Request,
    ) -> Result<Option<Beaten>, G::Error> {
        let Some(mut page) = self.vcpus[vcpu].root else { return Ok(None) };
        let mut table = &self.pages[page as usize];
        if table.key.as_ref().is_none_or(|key| !guest.is_root(key)) {
            return Ok(None);
        }
        loop {
            let Page { key: Some(key), unsynced, records } = table else { return Ok(None) };
            if key.level == 1 {
                let (found, changes) = (guest.last(key, linear, request)?, self.changes);
                return Ok(found.map(|(gpa, rights)| Beaten { page, gpa, rights, changes }));
            }
            match records[index(linear, key.level)] {
                Record::Link(child) if !unsynced => page = child,
                _ => return Ok(None),
            }
            table = &self.pages[page as usize];
        }
    }

    /// The table of level 1 on the way. What is missing on it is made, and then the walk is to be made again. Only a walk that has read
    /// nothing but tables that were there before it makes a link: one that was read before it was protected may lead elsewhere by now.
    fn descend<M: Machine, G: GuestTables>(
        &mut self,
        machine: &M,
        vmid: Vmid,
        guest: &mut G,
        root: u32,
        walk: &Walk,
        linear: u64,
    ) -> Result<u32, Missing> {
        let (mut page, mut made) = (root, false);
        for pair in walk.keys[..walk.depth].windows(2) {
            let [above, key] = [pair[0], pair[1]];
            let at = index(linear, above.level);
            page = match self.pages[page as usize].records[at] {
                Record::Link(child) if self.pages[child as usize].key == Some(key) => child,
                _ => {
                    let (child, is_new) = self.take(machine, vmid, guest, &key).ok_or(Missing::Room)?;
                    made |= is_new;
                    if !made {
                        self.link(machine, page, at, child);
                    }
                    child
                }
            };
        }
        if made { Err(Missing::Made) } else { Ok(page) }
    }

    /// The table with this key, for a way that did not lead to it: nothing on that way says what the guest does not say now, down
    /// to the last level. And whether the walk was earlier than that.
    fn take<M: Machine, G: GuestTables>(
        &mut self,
        machine: &M,
        vmid: Vmid,
        guest: &mut G,
        key: &Key,
    ) -> Option<(u32, bool)> {
        match self.find(key) {
            Some(page) => {
                let behind = (key.level > 1 && !self.unsynced.is_empty()) || self.pages[page as usize].unsynced;
                if behind && !planted!(ZX9) {
                    self.sync_all(machine, vmid, guest);
                }
                Some((page, behind && !planted!(ZX9)))
            }
            None => self.make(machine, key).map(|page| (page, true)),
        }
    }

    /// Fills the entry for `linear` in `page`.
    #[allow(clippy::too_many_arguments, reason = "what was found out about one access")]
    fn fill<M: Machine, G, E>(
        &mut self,
        machine: &M,
        vcpu: usize,
        page: u32,
        (gpa, allowed): (Gpa, Rights),
        linear: u64,
        write: bool,
        backing: Backing,
        generation: impl FnOnce() -> Option<u64>,
    ) -> Answer<G, E> {
        let (gfn, at) = (gpa.frame(), index(linear, 1));
        match backing {
            Backing::Frame { writable, .. } if write && !writable => Answer::Mmio(gpa),
            Backing::Frame { pfn, writable } => {
                let (may_write, is_synced) = (allowed.write && writable, self.is_synced(gfn));
                if write && is_synced {
                    self.unsync(gfn);
                }
                let rights = Rights { write: may_write && (write || !is_synced), ..allowed };
                self.map(machine, page, at, gfn, pfn, rights);
                Answer::Resume
            }
            Backing::Nothing => {
                match generation() {
                    Some(generation) => {
                        let made = self.mark_mmio(machine, page, at, gfn, allowed, generation);
                        self.vcpus[vcpu].counts.made += u64::from(made);
                        self.vcpus[vcpu].mmio = Some((linear >> 12, gfn, allowed, generation));
                    }
                    None => self.drop_entry(machine, page, at),
                }
                Answer::Mmio(gpa)
            }
        }
    }
}
