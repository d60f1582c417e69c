//! What the guest owes its processor after a change of its tables, and what we owe it then: comparing.

use entresol_addr::Gfn;
use entresol_machine::{Machine, Vmid};
use entresol_sync::planted;

use crate::page::{Record, WORDS};
use crate::rmap::EntryId;
use crate::tables::Shadow;
use crate::{GuestTables, Key, Says, ShadowFormat, Source};

impl<F: ShadowFormat> Shadow<F> {
    /// `vcpu` loads its root, or flushes everything: from now on it runs on [`Shadow::root`], and uses nothing that the guest has
    /// changed before. `vmid` is what the VM's translations are cached under.
    pub fn load<M: Machine, G: GuestTables>(&mut self, machine: &M, vmid: Vmid, vcpu: usize, guest: &mut G) {
        let key = guest.root();
        self.count_change();
        if !planted!(ZX11) {
            self.vcpus[vcpu].mmio = None;
        }
        if !planted!(ZX12) || self.find(&key).is_none() {
            self.sync_all(machine, vmid, guest);
        }
        self.vcpus[vcpu].root = None;
        let root = self.find(&key).or_else(|| self.make(machine, &key));
        let root = root.unwrap_or_else(|| {
            self.clear(machine, vmid);
            self.make(machine, &key).expect("there are more frames than vCPUs have roots")
        });
        self.vcpus[vcpu].root = Some(root);
        self.settle(machine, vmid);
    }

    /// `vcpu` flushes the page at `linear`.
    pub fn invalidate_page<M: Machine, G: GuestTables>(
        &mut self,
        machine: &M,
        vmid: Vmid,
        vcpu: usize,
        guest: &mut G,
        linear: u64,
    ) {
        if self.vcpus[vcpu].mmio.is_some_and(|(page, ..)| page == linear >> 12) && !planted!(ZC5) {
            self.vcpus[vcpu].mmio = None;
        }
        self.count_change();
        for place in 0..self.unsynced.len() {
            let page = self.unsynced[place];
            if self.pages[page as usize].key.is_some_and(|key| key.level > 1) {
                self.compare_all(machine, page, guest);
            }
        }
        let mut at = self.vcpus[vcpu].root;
        while let Some(page) = at {
            let Some(key) = self.pages[page as usize].key else { break };
            let index = index(linear, key.level);
            if self.pages[page as usize].unsynced {
                self.compare(machine, page, index, guest);
            }
            at = match self.pages[page as usize].records[index] {
                Record::Link(child) => Some(child),
                _ => None,
            };
        }
        self.settle(machine, vmid);
    }

    /// The guest, or somebody for it, is about to write to `gfn`, which holds a table that is shown: it can from now on.
    pub fn unsync(&mut self, gfn: Gfn) {
        self.count_change();
        let mut at = self.places.next(gfn, None);
        while let Some(EntryId(number)) = at {
            at = self.places.next(gfn, Some(EntryId(number)));
            let page = &mut self.pages[number as usize];
            if page.shows(gfn) && !core::mem::replace(&mut page.unsynced, true) {
                // There is room for every table.
                self.unsynced.push(number);
            }
        }
    }

    /// Whether `gfn` holds a table that is shown and that the guest cannot write to.
    pub fn is_synced(&self, gfn: Gfn) -> bool {
        self.any_at(gfn, |page| !page.unsynced && page.shows(gfn))
    }

    /// Makes every table say what the guest's does, and keeps the guest from writing to any unnoticed.
    pub(crate) fn sync_all<M: Machine, G: GuestTables>(&mut self, machine: &M, vmid: Vmid, guest: &mut G) {
        for place in 0..self.unsynced.len() {
            if let Some(gfn) = self.pages[self.unsynced[place] as usize].key.and_then(|key| key.table()) {
                self.protect(machine, gfn);
            }
        }
        // What is written from here on faults, or was written before it is read.
        if !planted!(ZX6) {
            self.settle(machine, vmid);
        }
        while let Some(page) = self.unsynced.pop() {
            self.pages[page as usize].unsynced = false;
            self.compare_all(machine, page, guest);
        }
    }

    fn compare_all<M: Machine, G: GuestTables>(&mut self, machine: &M, page: u32, guest: &mut G) {
        for index in 0..WORDS {
            self.compare(machine, page, index, guest);
        }
    }

    /// Drops what a word says if the guest says something else.
    fn compare<M: Machine, G: GuestTables>(&mut self, machine: &M, page: u32, index: usize, guest: &mut G) {
        let (Some(key), record) = (self.pages[page as usize].key, self.pages[page as usize].records[index]) else {
            return;
        };
        if record == Record::Vacant {
            return;
        }
        let stays = match (record, says(&key, index as u16, guest)) {
            (Record::Link(child), Says::Table(key)) => self.pages[child as usize].key == Some(key),
            (Record::Leaf { gfn, rights, .. }, Says::Page { gfn: now, rights: allowed }) => {
                gfn == now && rights.stays_under(allowed)
            }
            (Record::Mmio { gfn, rights, .. }, Says::Page { gfn: now, rights: allowed }) => {
                gfn == now && rights.stays_under(allowed) || planted!(ZC5)
            }
            (Record::Mmio { .. }, _) => planted!(ZC5),
            _ => false,
        };
        if !stays {
            self.drop_entry(machine, page, index);
        }
    }
}

/// Which word of a table at `level` an address leads through.
pub(crate) const fn index(linear: u64, level: u8) -> usize {
    (linear >> (12 + 9 * (level as u32 - 1))) as usize & (WORDS - 1)
}

/// What stands behind a word now.
pub(crate) fn says<G: GuestTables>(key: &Key, index: u16, guest: &mut G) -> Says {
    let Source::Page { gfn } = key.source else { return guest.read(key, index) };
    let below = gfn.offset(u64::from(index) << (9 * (u32::from(key.level) - 1)));
    if key.level == 1 {
        return Says::Page { gfn: below, rights: key.rights };
    }
    Says::Table(Key { source: Source::Page { gfn: below }, level: key.level - 1, ..*key })
}
