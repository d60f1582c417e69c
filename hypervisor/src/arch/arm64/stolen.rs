//! Stolen time: how long each vCPU was ready and another had its CPU, told to the guest (Arm DEN 0057, "Paravirtualized Time").
//!
//! Purpose: a guest that knows it does not take the time that others ran for its own tasks'.
//!
//! Protocol: the guest asks for a vCPU's record by PV_TIME_ST, from that vCPU, and gets an address: a page of its own, one
//! slot beside its memory, has the records of all, 64 bytes each. From then on the record says at every turn's beginning what
//! the scheduler has counted ([`Wait`]): nothing is done at the exits in between. Each vCPU has a page-frame cache for the
//! eight bytes that change, so telling takes a check and a store; the CPU that the vCPU is loaded on is the only one that writes
//! them. A private machine's page is private, too: the caches lease its frame, all of them the same one.
//!
//! A copy of the virtual machine goes on counting where the parent was; its page is shared until it is written. So does one that
//! is made from a snapshot, with a fresh page, which is told before its guest runs. One that starts over begins at zero. Time in
//! which its owner has paused it is not stolen.
//!
//! Invariants: no counted time is lost: what cannot be told at one turn is told at a later one. The guest may do with the page
//! what it likes, and give it back, too: the record is written again to what is there then.

use entresol_addr::{GfnRange, Gpa, PAGE_SIZE};
use entresol_arch_arm64::smccc;
use entresol_backing::{CreateError, ObjectHandle, Policy, Spec};
use entresol_loader::virt;
use entresol_metal_arm64::cpu;
use entresol_mmu::ConvertError;
use entresol_slot::{Hint, ObjectId, SlotError, SlotRequest};
use entresol_wire::config::{self, MAX_VCPUS};

use super::Memory;
use crate::host;
use crate::vm::Vm;
use crate::vm::slots::RECORDS;

/// Bytes of a record (DEN 0057, stolen time structure).
const RECORD: u64 = 64;
/// Where the time is in it, in nanoseconds; revision and attributes before it are 0.
const TIME: u64 = 8;
/// Bytes of the time.
const BYTES: u64 = 8;

const _: () = assert!(RECORD * MAX_VCPUS as u64 <= PAGE_SIZE);

/// The page with the records of one virtual machine. Dropped after the slot that shows it.
pub struct Records(ObjectHandle);

impl Records {
    /// A page that nobody has touched, private or with allocation tags as the memory of a machine like `config` is.
    ///
    /// # Errors
    ///
    /// [`CreateError`].
    pub fn new<F>(config: &config::Vm<F>) -> Result<Self, CreateError> {
        let host = host::get();
        let (frames, policy) = (virt::STOLEN_TIME_SIZE / PAGE_SIZE, Policy::Pages);
        let spec = if config.private {
            Spec::Private { frames, policy }
        } else {
            Spec::Anonymous { frames, policy, tagged: config.mte }
        };
        host.objects.create(&host.supply(cpu::index()), spec).map(Self)
    }

    /// Shows it in `memory`.
    ///
    /// # Errors
    ///
    /// [`SlotError`].
    pub fn show(&self, memory: &Memory) -> Result<(), SlotError> {
        let request = SlotRequest {
            id: RECORDS,
            base: Gpa::new(virt::STOLEN_TIME_BASE),
            size: virt::STOLEN_TIME_SIZE,
            object: ObjectId::new(self.0.raw()),
            offset: 0,
            flags: 0,
        };
        memory.set_slot(cpu::index(), &request)
    }

    /// Those of a copy that was made with its memory.
    pub fn of_copy(memory: &Memory) -> Self {
        let pin = host::get().epoch.pin(cpu::index());
        let slot = memory.slots().find(&pin, Gpa::new(virt::STOLEN_TIME_BASE).frame(), &Hint::new());
        Self(ObjectHandle::from_raw(slot.expect("a slot that every machine starts with, and that stays").object.get()))
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        let host = host::get();
        if let Err(error) = host.objects.destroy(&host.supply(cpu::index()), &host.epoch, self.0) {
            log::error!("records of stolen time stay: {error:?}");
        }
    }
}

impl Vm {
    /// The address of the record of vCPU `index`, which asks for it; SMCCC's "not supported" if there is no frame for it.
    #[cold]
    pub fn stolen_time_record(&self, index: usize) -> u64 {
        self.vcpu(index).wait.tell(true);
        if self.tell_stolen_time(index) {
            return record(index).get();
        }
        self.vcpu(index).wait.tell(false);
        smccc::NOT_SUPPORTED
    }

    /// Says in the record of vCPU `index`, which is about to run on this CPU, how long it has waited, if the guest wants to know.
    /// Not called with a grace period pinned. Whether it was said, or nobody wants it.
    #[inline]
    pub fn tell_stolen_time(&self, index: usize) -> bool {
        let wait = &self.vcpu(index).wait;
        if !wait.is_told() {
            return true;
        }
        let bytes = wait.nanoseconds().to_le_bytes();
        // The second time after a refresh; what moves even then is told at the next turn.
        self.store_time(index, &bytes) || self.find_record(index) && self.store_time(index, &bytes)
    }

    /// Whether the guest shares the page with the records with the hypervisor.
    pub fn shares_records(&self) -> bool {
        let pin = host::get().epoch.pin(cpu::index());
        self.memory.is_open(&pin, &Hint::new(), Gpa::new(virt::STOLEN_TIME_BASE)) == Some(true)
    }

    /// It does from now on. Of a machine that has not run yet.
    ///
    /// # Errors
    ///
    /// [`ConvertError`].
    pub fn share_records(&self) -> Result<(), ConvertError> {
        let page = GfnRange::single(Gpa::new(virt::STOLEN_TIME_BASE).frame());
        self.memory.convert(cpu::index(), page, true).map(drop)
    }

    /// Whether the cache of vCPU `index`'s record knows where it lies.
    pub fn knows_record(&self, index: usize) -> bool {
        let pin = host::get().epoch.pin(cpu::index());
        self.memory.check(&pin, index, BYTES).is_some()
    }

    /// Whether the record's cache knew where to.
    fn store_time(&self, index: usize, bytes: &[u8]) -> bool {
        let pin = host::get().epoch.pin(cpu::index());
        let piece = self.memory.check(&pin, index, BYTES);
        if let Some(piece) = &piece {
            self.memory.write_piece(piece, bytes);
        }
        piece.is_some()
    }

    /// Has the record's cache look again. A copy's begins to look here.
    #[cold]
    fn find_record(&self, index: usize) -> bool {
        let time = Gpa::new(record(index).get() + TIME);
        let found = self.memory.activate(cpu::index(), index, time, BYTES);
        if let Err(error) = &found {
            log::debug!("vm {}: vCPU {index}: stolen time is told later: {error:?}", self.config.name);
        }
        found.is_ok()
    }
}

/// Where the record of vCPU `index` is.
fn record(index: usize) -> Gpa {
    Gpa::new(virt::STOLEN_TIME_BASE + RECORD * index as u64)
}
