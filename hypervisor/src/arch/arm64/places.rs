//! What is at an address, where an exit has to know before it does something.

use entresol_addr::Gpa;
use entresol_slot::Hint;
use entresol_wire::config::{ReadOnlyStore, UnclaimedMmio};

use super::cpu;
use crate::host;
use crate::vm::Vm;

impl Vm {
    /// Whether the guest has memory at `gpa`, writable or not.
    pub fn is_memory(&self, gpa: Gpa) -> bool {
        let pin = host::get().epoch.pin(cpu::index());
        self.memory.slots().find(&pin, gpa.frame(), &Hint::new()).is_some()
    }

    /// Cleans and invalidates everything that is mapped.
    pub fn clean_everything(&self) {
        self.memory.clean_all(cpu::index());
    }

    /// Whether some device answers in all of the page at `page`: none of them has less than pages.
    pub fn fills(&self, page: u64) -> bool {
        self.device_at(page).is_some() || self.board.is_controller(page)
    }

    /// Whether a store or load at `gpa`, which no memory served, will be answered, or tried again; if not, that is noted.
    pub fn answers(&self, gpa: Gpa, write: bool) -> bool {
        let (address, policies) = (gpa.get(), &self.config.policies);
        let claimed = self.device_at(address).is_some() || self.board.is_controller(address);
        if claimed || self.devices.flash_at(address).is_some() {
            return true;
        }
        let pin = host::get().epoch.pin(cpu::index());
        if let Some(slot) = self.memory.slots().find(&pin, gpa.frame(), &Hint::new()) {
            return !(write && slot.is_read_only()) || policies.read_only_store == ReadOnlyStore::Ignore;
        }
        let answers = policies.unclaimed_mmio == UnclaimedMmio::ReadAsZero;
        if !answers {
            self.unclaimed.bump();
        }
        answers
    }
}
